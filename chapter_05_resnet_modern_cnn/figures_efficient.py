"""``topics_efficient.py`` 的两张图：接受数组，返回 ``Figure``；不训练，不读写文件。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.plot import MUTED, PALETTE, new_figure, plot_curves

# ---------------------------------------------------------------- separable


def _draw_savings(axes: Axes, costs: Mapping[int, Mapping[int, tuple[float, float]]]) -> None:
    """省下的倍数随输出通道数的变化：线是公式，点是数出来的；虚线是极限 ``k²``。"""
    for color, (kernel, row) in zip(PALETTE, costs.items(), strict=False):
        formula, counted = ([1 / pair[i] for pair in row.values()] for i in (0, 1))
        axes.plot(list(row), formula, color=color, label=f"{kernel}x{kernel}")
        axes.plot(list(row), counted, "o", color=color)
        axes.axhline(kernel**2, color=color, linestyle="--", linewidth=0.9)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(row), [str(channels) for channels in row])
    axes.set(xlabel="output channels N", ylabel="full / separable", title="multiply-adds saved")
    axes.legend(loc="upper left", bbox_to_anchor=(0, 0.92))


def separable_figure(
    costs: Mapping[int, Mapping[int, tuple[float, float]]],
    energy: Mapping[str, Sequence[float]],
    ranks: Sequence[int],
    accuracy: Sequence[float],
    full: float,
    chance: float,
) -> Figure:
    """左：省下的倍数；中：各秩的能量份额；右：第二层换成 r 个滤波器之后的准确率。

    参数:
        costs: ``{k: {N: (公式, 数出来的)}}``。
        energy: 名字 -> 前 r 个奇异值的能量份额，r = 1, 2, ...
        ranks, accuracy: 每个输入通道的滤波器数与对应的测试准确率。
        full, chance: 原来的准确率与机会线。
    """
    figure, grid = new_figure(1, 3, size=(11.4, 3.4))
    left, middle, right = grid[0]
    _draw_savings(left, costs)
    plot_curves(
        middle,
        energy,
        xlabel="filters per input channel r",
        ylabel="share of $\\|K\\|^2$",
        title="energy of the best rank r",
    )
    plot_curves(
        right,
        {"factorised": accuracy},
        x=list(ranks),
        xlabel="filters per input channel r",
        ylabel="test accuracy",
        title="second layer replaced",
        references={"full convolution": full, "chance": chance},
    )
    right.set_ylim(0, 1.05)
    return figure


# ---------------------------------------------------------------- bottleneck


def _draw_spiral(axes: Axes, points: np.ndarray, lost: np.ndarray, title: str) -> None:
    """复原的点按曲线上的位置着色；信息已丢的画成灰色的叉。"""
    order = np.arange(len(points))
    axes.scatter(*points[lost].T, s=9, color=MUTED, marker="x", linewidths=0.7)
    axes.scatter(*points[~lost].T, s=9, c=order[~lost], cmap="viridis", vmin=0, vmax=len(points))
    axes.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal", xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)
    axes.grid(False)


def bottleneck_figure(
    spirals: Mapping[str, tuple[np.ndarray, np.ndarray]],
    ratios: Sequence[float],
    predicted: Mapping[int, Sequence[float]],
    measured: Mapping[int, Sequence[float]],
    surviving: Mapping[int, Sequence[float]],
) -> Figure:
    """上：一条螺线经 ``ReLU(T x)`` 之后能复原的样子；下：能复原的份额，与传得过去的方向的份额。

    参数:
        spirals: 标题 -> (点 ``(N, 2)``, 是否丢失 ``(N,)``)。
        ratios: 展开倍数 n/d。
        predicted, measured: d -> 各倍数下能复原的份额，公式与实测。
        surviving: d -> 各倍数下传得过去的方向的份额。
    """
    figure, _ = new_figure(1, 1, size=(11.4, 5.6))
    figure.clear()
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.5))
    cells = top.subplots(1, len(spirals))
    for axes, (title, (points, lost)) in zip(cells, spirals.items(), strict=True):
        _draw_spiral(axes, points, lost, title)
    left, right = bottom.subplots(1, 2)
    for color, dimension in zip(PALETTE, predicted, strict=False):
        label = f"d = {dimension}"
        left.plot(ratios, predicted[dimension], color=color, label=label)
        left.plot(ratios, measured[dimension], "o", color=color)
        right.plot(ratios, surviving[dimension], color=color, label=label)
    for axes, title in ((left, "points that can be recovered"), (right, "directions that survive")):
        axes.axvline(6, color=MUTED, linestyle="--", linewidth=1)
        axes.annotate("MobileNetV2", (6, 0.06), color=MUTED, fontsize=8, ha="right", rotation=90)
        axes.set(xlabel="expansion n / d", ylabel="share", title=title, ylim=(-0.03, 1.05))
        axes.legend(loc="lower right", bbox_to_anchor=(0.88, 0.05))
    return figure
