"""``degradation.py`` 的图：接受数组，返回 ``Figure``；不训练，不读写文件。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
        axes.set(xlabel="epoch", title=title, xlim=(0, epochs[-1]), ylim=(-2, 100))
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
    grid[0, 1].sharey(grid[0, 0])
    titles = ("at initialization", f"after {epoch} epochs")
    for axes, runs, title in zip(grid[0], (start, later), titles, strict=False):
        for name, values in runs.items():
            axes.plot(range(1, len(values) + 1), values, label=name, **LOOKS[name])
        axes.set(xlabel="convolution, shallow to deep", yscale="log", title=title)
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


def lesion_figure(cut: Mapping[str, Mapping[str, Any]], chance: float) -> Figure:
    """每个网络逐块拆除之后的错误率；最右是随机拆掉若干块。

    参数:
        cut: 网络 -> ``intact`` 完好时的错误率；``single`` 拆掉第 i 块之后的；``changing`` 改变
            形状的块的编号；``counts`` 与 ``several`` ``(次, len(counts))``，随机拆掉若干块之后的。
        chance: 机会线，错误率。
    """
    widths = [max(len(found["single"]), 12) for found in cut.values()]
    figure, grid = new_figure(
        1, len(cut) + 1, size=(13.5, 3.5), sharey=True, width_ratios=[*widths, 18]
    )
    last = grid[0, -1]
    for axes, (name, found) in zip(grid[0], cut.items(), strict=False):
        color, height = LOOKS[name]["color"], 100 * np.array(found["single"])
        bars = axes.bar(range(1, len(height) + 1), height, color=color, width=0.75)
        for index in found["changing"]:
            bars[index].set(facecolor="white", edgecolor=color, hatch="////")
        level = 100 * found["intact"]
        axes.axhline(level, color="black", linewidth=1.2, linestyle=(0, (4, 1.5)))
        axes.set(xlabel="block removed", title=name, ylim=(0, 100))
        axes.grid(axis="x", visible=False)
        _band(last, found["counts"], 100 * np.array(found["several"]), name)
    for axes in grid[0]:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.axhline(100 * chance, color=MUTED, linestyle=":", linewidth=1)
    last.set(xlabel="number of blocks removed", title="several at random", xlim=(0, None))
    last.legend(loc="lower right")
    grid[0, 0].set_ylabel("training error (%)")
    return figure
