"""modern.md 的图：接受数组，返回 ``Figure``；不训练，不读写文件。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.plot import MUTED, PALETTE, heatmap, new_figure, plot_curves

MIB = 2**20


def concat_figure(
    depths: Sequence[int],
    stored: Mapping[str, Sequence[int]],
    curves: Mapping[str, Sequence[int]],
    timelines: Mapping[str, Sequence[int]],
) -> Figure:
    """左：前向之后留着的内存随层数的增长，点是实测，线是公式；右：一步之内内存的起落。

    参数:
        depths: 各次测量的层数。
        stored: 每种实现在各层数下留着的字节数，实测。
        curves: 同上，公式，层数从 1 起逐一给出。
        timelines: 每种实现在一步之内，前向 L 段、反向 L 段各自的峰值，字节。
    """
    figure, grid = new_figure(1, 2, size=(9.8, 3.8))
    axes = grid[0, 0]
    for color, (name, values) in zip(PALETTE, stored.items(), strict=False):
        line = np.array(curves[name]) / MIB
        axes.plot(range(1, len(line) + 1), line, color=color, label=f"{name}: formula")
        axes.plot(depths, np.array(values) / MIB, "o", color=color, label=f"{name}: measured")
    axes.set(xlabel="layers L in the block", ylabel="stored for backward (MiB)", ylim=(0, None))
    axes.set_title("memory after the forward pass")
    axes.legend()
    axes = grid[0, 1]
    steps = len(next(iter(timelines.values())))
    peaks = {name: np.array(values) / MIB for name, values in timelines.items()}
    title = f"peak memory during one step, L = {steps // 2}"
    plot_curves(axes, peaks, x=range(1, steps + 1), title=title)
    axes.legend(loc="center right")
    axes.axvline(steps / 2 + 0.5, color=MUTED, linestyle="--", linewidth=1)
    options = {"transform": axes.transAxes, "va": "top", "fontsize": 8, "color": MUTED}
    axes.text(0.02, 0.99, "forward, layer 1 to L", **options)
    axes.text(0.98, 0.99, "backward, layer L to 1", ha="right", **options)
    axes.set(xlabel="layers passed", ylabel="peak while passing (MiB)", ylim=(0, None))
    return figure


def _share_bars(axes: Axes, shares: Mapping[str, np.ndarray]) -> None:
    """各块输出的能量由哪个分支贡献：堆叠的柱，和为 1。"""
    bottom = np.zeros(len(next(iter(shares.values()))))
    places = np.arange(1, len(bottom) + 1)
    for color, (name, values) in zip(PALETTE, shares.items(), strict=False):
        axes.bar(places, values, 0.75, bottom=bottom, color=color, label=name)
        bottom = bottom + values
    axes.set(xlabel="block", ylabel="share of output variance", ylim=(0, 1.22), xticks=places)
    axes.set_title("what each branch contributes")
    axes.legend(loc="upper center", ncols=3, fontsize=8)
    axes.grid(axis="x", visible=False)


def reparam_figure(
    errors: Mapping[str, Sequence[float]],
    shares: Mapping[str, np.ndarray],
    taps: Mapping[str, np.ndarray],
) -> Figure:
    """左：折叠前后逐块的相对差；中：各分支的贡献；右：各个核九个抽头的平均绝对值。

    参数:
        errors: 每种比较在各块之后的相对差，块数个。
        shares: 每个分支占各块输出方差的份额，``(块数,)``。
        taps: 每个核的 ``(3, 3)`` 平均绝对值。
    """
    figure, grid = new_figure(1, 3, size=(12.4, 3.8), width_ratios=[1.25, 1.25, 1])
    axes = grid[0, 0]
    for color, (name, values) in zip(PALETTE, errors.items(), strict=False):
        axes.plot(range(1, len(values) + 1), values, "o-", color=color, label=name, markersize=4)
    axes.set(xlabel="block", ylabel="relative difference", yscale="log", ylim=(1e-17, 1e-4))
    axes.set_xticks(range(1, len(values) + 1))
    axes.set_title("folded vs unfolded")
    axes.legend(fontsize=8, loc="center right")
    _share_bars(grid[0, 1], shares)
    grid[0, 2].remove()
    cells = grid[0, 2].get_subplotspec().subgridspec(2, 1)
    top = max(values.max() for values in taps.values())
    for index, (name, values) in enumerate(taps.items()):
        axes = figure.add_subplot(cells[index])
        heatmap(axes, values, text=".3f", limits=(0, top))
        axes.set(xticks=[], yticks=[], aspect="equal")
        axes.set_title(f"mean |weight|: {name}", fontsize=9)
    return figure
