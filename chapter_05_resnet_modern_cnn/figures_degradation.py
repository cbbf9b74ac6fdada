"""``degradation.py`` 的图：接受数组，返回 ``Figure``；不训练，不读写文件。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.plot import MUTED, PALETTE, new_figure

BLUE, ORANGE = PALETTE[:2]
# 颜色分有无捷径，线型分深浅
LOOKS = {
    "plain20": {"color": ORANGE, "linestyle": (0, (4, 1.5))},
    "plain56": {"color": ORANGE},
    "resnet20": {"color": BLUE, "linestyle": (0, (4, 1.5))},
    "resnet56": {"color": BLUE},
}


def _band(axes: Axes, x: Sequence[float], values: np.ndarray, name: str) -> None:
    """``values`` 为 ``(种子, 点)``：线是平均，色带由最小到最大。"""
    look = LOOKS[name]
    axes.plot(x, values.mean(axis=0), label=name, **look)
    axes.fill_between(
        x, values.min(axis=0), values.max(axis=0), color=look["color"], alpha=0.15, linewidth=0
    )


def training_figure(
    epochs: Sequence[int],
    train: Mapping[str, np.ndarray],
    val: Mapping[str, np.ndarray],
    chance: float,
) -> Figure:
    """左：训练集上的错误率；右：验证集上的。

    参数:
        epochs: 测量时已走完的轮数。
        train, val: 网络 -> 错误率 ``(种子, 次)``，0 到 1。
        chance: 机会线，错误率。
    """
    figure, grid = new_figure(1, 2, size=(9.2, 3.6), sharey=True)
    for axes, errors, title in zip(
        grid[0], (train, val), ("training error", "validation error"), strict=True
    ):
        for name, values in errors.items():
            _band(axes, epochs, 100 * values, name)
        axes.axhline(100 * chance, color=MUTED, linestyle=":", linewidth=1)
        axes.set(xlabel="epoch", title=title, xlim=(0, epochs[-1]), ylim=(0, 100))
    grid[0, 0].annotate(
        "chance", (0.01, 100 * chance), xycoords=("axes fraction", "data"),
        xytext=(0, 3), textcoords="offset points", fontsize=8, color=MUTED,
    )  # fmt: skip
    grid[0, 0].set_ylabel("error (%)")
    grid[0, 1].legend(loc="lower left")
    return figure


def gradient_figure(
    start: Mapping[str, Sequence[float]],
    later: Mapping[str, Sequence[float]],
    noises: Sequence[float],
    similarity: Mapping[str, Sequence[float]],
    epoch: int,
) -> Figure:
    """左、中：每个卷积的相对梯度，初始化时与训练 ``epoch`` 轮之后；右：邻近输入的梯度的余弦。

    参数:
        start, later: 网络 -> 各卷积的 ``‖g‖/‖W‖``，由浅到深。
        noises: 输入噪声的相对大小。
        similarity: 网络 -> 各噪声下的平均余弦。
    """
    figure, grid = new_figure(1, 3, size=(12.4, 3.6))
    titles = ("at initialization", f"after {epoch} epochs")
    for axes, runs, title in zip(grid[0], (start, later), titles, strict=False):
        for name, values in runs.items():
            axes.plot(range(1, len(values) + 1), values, label=name, **LOOKS[name])
        axes.set(xlabel="convolution, shallow to deep", yscale="log", title=title)
    grid[0, 1].sharey(grid[0, 0])
    grid[0, 0].set_ylabel(r"$\Vert\partial L/\partial W\Vert\,/\,\Vert W\Vert$")
    axes = grid[0, 2]
    for name, values in similarity.items():
        axes.plot(noises, values, marker="o", markersize=3.5, **LOOKS[name])
    axes.set(
        xscale="log", ylim=(-0.05, 1.02), xlabel="input noise (relative)", ylabel="cosine",
        title="gradients of nearby inputs",
    )  # fmt: skip
    axes.axhline(0, color=MUTED, linestyle=":", linewidth=1)
    grid[0, 0].legend()
    return figure


def lesion_figure(
    singles: Mapping[str, Sequence[float]],
    intact: Mapping[str, float],
    counts: Sequence[int],
    several: Mapping[str, np.ndarray],
    shape_changing: Mapping[str, Sequence[int]],
    chance: float,
) -> Figure:
    """上：每个网络逐块拆除之后的错误率；下右：随机拆掉若干块。

    参数:
        singles: 网络 -> 拆掉第 i 块之后的验证错误率，0 到 1。
        intact: 网络 -> 完好时的验证错误率。
        counts: 拆掉的块数。
        several: 网络 -> 错误率 ``(次, len(counts))``。
        shape_changing: 网络 -> 负责缩小与加宽的块的编号。
        chance: 机会线，错误率。
    """
    widths = [max(len(values), 12) for values in singles.values()]
    figure, grid = new_figure(
        1, len(singles) + 1, size=(13.5, 3.5), sharey=True, width_ratios=[*widths, 16]
    )
    for axes, (name, values) in zip(grid[0], singles.items(), strict=False):
        color = LOOKS[name]["color"]
        bars = axes.bar(range(1, len(values) + 1), 100 * np.array(values), color=color, width=0.75)
        for index in shape_changing[name]:
            bars[index].set(facecolor="white", edgecolor=color, hatch="////")
        axes.axhline(100 * intact[name], color="black", linewidth=1.2, linestyle=(0, (4, 1.5)))
        axes.axhline(100 * chance, color=MUTED, linestyle=":", linewidth=1)
        axes.set(xlabel="block removed", title=name, ylim=(0, 100))
        axes.grid(axis="x", visible=False)
    axes = grid[0, -1]
    for name, values in several.items():
        _band(axes, counts, 100 * values, name)
    axes.axhline(100 * chance, color=MUTED, linestyle=":", linewidth=1)
    axes.set(xlabel="number of blocks removed", title="several at random")
    axes.legend(loc="lower right")
    grid[0, 0].set_ylabel("validation error (%)")
    return figure
