"""``deploy.py`` 的图：准确率随权重位数的变化；一层各通道的范围与两种刻度。"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from chapter_05_resnet_modern_cnn.quantization import symmetric_grid
from utils.plot import MUTED, PALETTE, new_figure

LEVELS_BITS = 4  # 画 4 位的刻度：8 位的 255 格画出来是一片
HIGH = 2 ** (LEVELS_BITS - 1) - 1


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
        # 字写在曲线不经过的地方：位数少时准确率低，位数多时高
        places = ((run["fp32"]["accuracy"], "fp32", 2.4), (chance, "chance", 4.6))
        for level, label, place in places:
            axes.axhline(level, color=MUTED, linestyle="--", linewidth=1)
            axes.annotate(
                label, (place, level), xytext=(0, 3), textcoords="offset points", color=MUTED
            )
        axes.set(xlabel="weight bits", title=f"{name}, 8-bit activations", ylim=(0, 1))
        axes.invert_xaxis()
    grid[0, 0].set_ylabel("test accuracy")
    grid[0, 0].legend(loc="lower left", bbox_to_anchor=(0, 0.2))
    return figure


def most_uneven_convolution(model: nn.Module) -> tuple[str, nn.Conv2d, float]:
    """通道之间范围最悬殊的卷积，与它最大的通道是中位数的通道的几倍。

    倍数为 r 时，逐张量的 8 位刻度只给中位数的通道留下 ±127/r 格。
    """
    layers = [(n, m) for n, m in model.named_modules() if type(m) is nn.Conv2d]

    def spread(item: tuple[str, nn.Conv2d]) -> float:
        ranges = item[1].weight.detach().flatten(1).abs().amax(dim=1)
        return (ranges.max() / ranges.median()).item()

    name, conv = max(layers, key=spread)
    return name, conv, spread((name, conv))


def _draw_ranges(axes: Axes, weight: np.ndarray, scale: float, title: str) -> None:
    """每个输出通道一条竖线，从最小到最大的权重；横线是整个张量共用的刻度。"""
    for level in scale * np.arange(-HIGH, HIGH + 1):
        axes.axhline(level, color=PALETTE[1], linewidth=0.6, alpha=0.7)
    low, high = weight.min(axis=1), weight.max(axis=1)
    axes.vlines(np.arange(len(weight)), low, high, color=PALETTE[0])
    axes.grid(False)
    axes.set(xlabel="output channel, sorted by range", ylabel="folded weight", title=title)


def _draw_levels(axes: Axes, weight: np.ndarray, scale: float) -> None:
    """每个输出通道的范围里有几格：共用一个刻度，与各用各的（总是满的）。"""
    used = 2 * np.round(np.abs(weight).max(axis=1) / scale) + 1
    axes.bar(np.arange(len(used)), used, color=PALETTE[0], label="per-tensor")
    axes.axhline(2 * HIGH + 1, color=PALETTE[1], label="per-channel")
    axes.set(
        xlabel="output channel, sorted by range",
        ylabel="levels within its range",
        title=f"{LEVELS_BITS}-bit levels per channel",
        ylim=(0, 2 * HIGH + 5),
        yticks=range(1, 2 * HIGH + 2, 2),
    )
    axes.legend(loc="upper left", ncol=2)
    axes.grid(False, axis="x")


def weights_figure(networks: Mapping[str, nn.Module]) -> Figure:
    """每个网络一行：通道范围最悬殊的一层，左边是各通道的范围与共用的刻度，右边是各通道用到几格。

    参数:
        networks: 名字 -> 折叠之后的网络。
    """
    figure, grid = new_figure(len(networks), 2, size=(9.2, 3.3 * len(networks)))
    for (left, right), (name, model) in zip(grid, networks.items(), strict=True):
        layer, conv, _ = most_uneven_convolution(model)
        weight = conv.weight.detach().flatten(1)
        scale = symmetric_grid(weight, LEVELS_BITS, per_channel=False).scale.item()
        rows = weight[weight.abs().amax(dim=1).argsort()].numpy()
        _draw_ranges(left, rows, scale, f"{name}, {layer}")
        _draw_levels(right, rows, scale)
    return figure
