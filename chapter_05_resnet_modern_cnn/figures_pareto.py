"""``pareto.py`` 的图。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from utils.plot import new_figure


def front(costs: Sequence[float], gains: Sequence[float]) -> list[int]:
    """帕累托前沿上的下标，按代价由小到大：没有别人又便宜又好。"""
    chosen: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], -gains[i])):
        if not chosen or gains[index] > gains[chosen[-1]]:
            chosen.append(index)
    return chosen


def spread(heights: Sequence[float], columns: Sequence[float], gap: float) -> list[float]:
    """标签的高度：由高到低，横向相近（1.7 倍之内）的两个标签至少相隔 ``gap``。"""
    placed: dict[int, float] = {}
    for index in sorted(range(len(heights)), key=lambda i: -heights[i]):
        near = [placed[j] for j in placed if 1 / 1.7 < columns[j] / columns[index] < 1.7]
        placed[index] = min([heights[index], *(height - gap for height in near)])
    return [placed[index] for index in range(len(heights))]


def pareto_figure(rows: Mapping[str, Mapping[str, float]]) -> Figure:
    """准确率对乘加（左）、对一张图的延迟（右），代价为对数轴；线是帕累托前沿，点的面积为参数量。"""
    figure, axes = new_figure(1, 2, size=(11.5, 5.2))
    names = list(rows)
    gains = [100 * row["accuracy"] for row in rows.values()]
    areas = [20 + row["params"] / 4000 for row in rows.values()]
    panels = (
        ([row["macs"] / 1e6 for row in rows.values()], "multiply-adds (M)"),
        ([row["latency_1_ms"] for row in rows.values()], "CPU latency, one image, one thread (ms)"),
    )
    gap = (max(gains) - min(gains)) / 22
    for axis, (costs, label) in zip(axes[0], panels, strict=True):
        best = front(costs, gains)
        axis.plot([costs[i] for i in best], [gains[i] for i in best], color="0.6", zorder=1)
        axis.scatter(costs, gains, s=areas, zorder=2, alpha=0.8)
        for name, cost, gain, height in zip(
            names, costs, gains, spread(gains, costs, gap), strict=True
        ):
            style = {"arrowstyle": "-", "color": "0.7", "linewidth": 0.6}
            axis.annotate(
                name, (cost, gain), (1.08 * cost, height), fontsize=8, va="center", arrowprops=style
            )
        axis.set_xscale("log")
        axis.set_xlabel(label)
        axis.set_ylabel("test accuracy (%)")
        axis.set_xlim(0.85 * min(costs), 1.7 * max(costs))
        axis.margins(y=0.1)
    axes[0, 0].set_title("accuracy against arithmetic (area: parameters)")
    axes[0, 1].set_title("accuracy against measured time")
    return figure
