"""``deploy.py`` 的图：准确率随权重位数的变化；一层权重的分布与两种刻度。"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from chapter_05_resnet_modern_cnn.quantization import symmetric_grid
from utils.plot import MUTED, PALETTE, new_figure

LEVELS_BITS = 4  # 右图的刻度画 4 位的：8 位的 255 格画出来是一片


def accuracy_figure(runs: Mapping[str, Mapping[str, Any]], chance: float) -> Figure:
    """每个网络一格：测试准确率随权重位数的变化，激活都是 8 位。

    参数:
        runs: 网络的名字 -> ``metrics.json`` 里 ``runs`` 的一项。
        chance: 机会线。
    """
    figure, grid = new_figure(1, len(runs), size=(4.6 * len(runs), 3.6), sharey=True)
    for axes, (name, run) in zip(grid[0], runs.items(), strict=True):
        for scheme, scores in run["weights"].items():
            bits = [int(b) for b in scores]
            axes.plot(bits, [s["accuracy"] for s in scores.values()], "o-", label=scheme)
        for level, label in ((run["fp32"]["accuracy"], "fp32"), (chance, "chance")):
            axes.axhline(level, color=MUTED, linestyle="--", linewidth=1)
            axes.annotate(label, (8, level), xytext=(0, 3), textcoords="offset points", color=MUTED)
        axes.set(xlabel="weight bits", title=f"{name}, 8-bit activations", ylim=(0, 1))
        axes.invert_xaxis()
    grid[0, 0].set_ylabel("test accuracy")
    grid[0, 0].legend(loc="center left")
    return figure


def most_uneven_convolution(model: nn.Module) -> tuple[str, nn.Conv2d]:
    """通道之间范围最悬殊（最大与中位数之比）的卷积。"""
    layers = [(n, m) for n, m in model.named_modules() if type(m) is nn.Conv2d]

    def spread(item: tuple[str, nn.Conv2d]) -> float:
        ranges = item[1].weight.detach().flatten(1).abs().amax(dim=1)
        return (ranges.max() / ranges.median()).item()

    return max(layers, key=spread)


def _draw_channels(axes: Axes, weight: np.ndarray, name: str) -> None:
    """每个输出通道一条竖线，从最小到最大的权重；横线是整个张量共用的 4 位刻度。"""
    order = np.argsort(np.abs(weight).max(axis=1))
    rows = weight[order]
    top = np.abs(weight).max()
    for level in np.arange(-7, 8) * top / 7:
        axes.axhline(level, color=PALETTE[1], linewidth=0.6, alpha=0.7)
    axes.vlines(np.arange(len(rows)), rows.min(axis=1), rows.max(axis=1), color=PALETTE[0])
    axes.grid(False)
    axes.set(
        xlabel="output channel, sorted by range",
        ylabel="folded weight",
        title=f"{name}: ranges and one {LEVELS_BITS}-bit grid",
    )


def _draw_histogram(axes: Axes, weight: np.ndarray, scale: float, name: str) -> None:
    """全部权重的直方图（对数），与逐张量的 4 位刻度。"""
    axes.hist(weight.ravel(), bins=121, color=PALETTE[0])
    for level in np.arange(-7, 8) * scale:
        axes.axvline(level, color=PALETTE[1], linewidth=0.8, alpha=0.7)
    rounded = np.abs(weight) < scale / 2
    axes.set_yscale("log")
    axes.set(
        xlabel="folded weight",
        ylabel="count",
        title=f"{name}: {100 * rounded.mean():.0f}% round to zero",
    )
    axes.grid(False)


def weights_figure(networks: Mapping[str, nn.Module]) -> Figure:
    """每个网络一行：通道范围最悬殊的一层，左边是直方图，右边是各通道的范围，都叠上共用的刻度。

    参数:
        networks: 名字 -> 折叠之后的网络。
    """
    figure, grid = new_figure(len(networks), 2, size=(9.2, 3.3 * len(networks)))
    for (left, right), (name, model) in zip(grid, networks.items(), strict=True):
        layer, conv = most_uneven_convolution(model)
        weight = conv.weight.detach().flatten(1)
        scale = symmetric_grid(weight, LEVELS_BITS, per_channel=False).scale.item()
        _draw_histogram(left, weight.numpy(), scale, name)
        _draw_channels(right, weight.numpy(), layer)
    return figure
