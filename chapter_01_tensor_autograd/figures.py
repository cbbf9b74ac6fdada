"""train.py、data_parallel.py、benchmark.py 的图：接受数组，返回 ``Figure``；不训练，不读写。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from utils.plot import DIVERGING, MUTED, PALETTE, new_figure, plot_curves

CLASS_COLORS = PALETTE[:2]
Extent = tuple[float, float, float, float]
GRID = 160  # 决策边界图每边的点数

# ---------------------------------------------------------------- train.py


def curves_figure(record: Mapping[str, Mapping[str, Sequence[float]]], window: int = 25) -> Figure:
    """左：两方的训练损失（``window`` 步的滑动平均），粗线在下、细线在上；右：每一步之差。"""
    figure, grid = new_figure(1, 2, size=(9.6, 3.4))
    styles = ({"linewidth": 5, "color": PALETTE[5]}, {"linewidth": 1.1, "color": "black"})
    for (name, history), style in zip(record.items(), styles, strict=True):
        window = min(window, len(history["loss"]))
        smooth = np.convolve(history["loss"], np.ones(window) / window, mode="valid")
        steps = np.arange(window, window + len(smooth))
        grid[0, 0].plot(steps, smooth, label=name, **style)
    title = f"training loss, mean of {window} steps"
    grid[0, 0].set(xlabel="step", ylabel="loss (nats)", title=title)
    grid[0, 0].legend()
    ours, theirs = (np.array(history["loss"]) for history in record.values())
    gap = np.abs(ours - theirs)
    axes, epsilon = grid[0, 1], np.finfo(float).eps
    axes.plot(np.where(gap > 0, gap, np.nan), ".", color=PALETTE[2], markersize=2)
    plot_curves(
        axes,
        {},
        xlabel="step",
        ylabel="difference (nats)",
        title="|engine − PyTorch| at every step",
        references={"float64 epsilon": epsilon},
        log_y=True,
    )
    return figure


def plane_grid(points: np.ndarray) -> tuple[np.ndarray, Extent]:
    """覆盖全部点的网格 ``(GRID², 2)``（第一维为 y）与它的范围。"""
    low, high = points.min(axis=0) - 0.15, points.max(axis=0) + 0.15
    x, y = (np.linspace(low[d], high[d], GRID) for d in (0, 1))
    mesh = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    return mesh, (low[0], high[0], low[1], high[1])


def boundary_figure(
    panels: Mapping[str, np.ndarray],
    bayes: np.ndarray,
    extent: Extent,
    points: np.ndarray,
    labels: np.ndarray,
) -> Figure:
    """决策边界：每方一格，底色是类别 1 的概率，黑线是概率 ½，虚线是贝叶斯边界。"""
    figure, grid = new_figure(1, len(panels), size=(4.8 * len(panels), 3.9), sharey=True)
    for axes, (title, values) in zip(grid[0], panels.items(), strict=True):
        probability = values.reshape(GRID, GRID)
        axes.imshow(
            probability,
            origin="lower",
            extent=extent,
            cmap=DIVERGING,
            vmin=-0.8,
            vmax=1.8,
            aspect="auto",
        )
        axes.contour(probability, [0.5], extent=extent, colors="black", linewidths=1.4)
        axes.contour(bayes.reshape(GRID, GRID), [0.5], extent=extent, colors=MUTED,
                     linewidths=1.0, linestyles="--")  # fmt: skip
        for label, color in enumerate(CLASS_COLORS):
            chosen = points[:1000][labels[:1000] == label]
            axes.scatter(*chosen.T, s=4, color=color, linewidths=0, alpha=0.6)
        axes.grid(False)
        axes.set(title=title, xlabel="$x_1$")
    grid[0, 0].set_ylabel("$x_2$")
    return figure


# ---------------------------------------------------------------- data_parallel.py


def data_parallel_figure(
    steps: Sequence[Mapping[str, Any]], all_reduce: Sequence[Mapping[str, float]]
) -> Figure:
    """三格：最大的批一步的毫秒数；加速随批的大小；all-reduce 的时间随数据的大小。"""
    figure, grid = new_figure(1, 3, size=(13.4, 3.2), width_ratios=(1.3, 1, 1))
    axes, largest = grid[0, 0], steps[-1]
    values = [1e3 * value for value in largest["seconds"].values()]
    axes.barh(list(largest["seconds"]), values, color=[MUTED, MUTED, PALETTE[5], PALETTE[0]])
    for row, value in enumerate(values):
        axes.text(value, row, f" {value:.1f} ms", va="center", fontsize=9)
    axes.set(xlabel="milliseconds", title=f"one step, batch {largest['batch_size']}")
    axes.margins(x=0.18)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes = grid[0, 1]
    batches = [step["batch_size"] for step in steps]
    seconds = np.array([list(step["seconds"].values()) for step in steps])  # (批, 四种设置)
    names = list(largest["seconds"])
    axes.plot(batches, seconds[:, 0] / seconds[:, 3], "o-", label=names[3].split(",")[0])
    axes.plot(batches, seconds[:, 0] / seconds[:, 1], "o-", color=MUTED, label=names[1])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="batch size", ylabel="times faster than 1 thread",
             title="speed-up", ylim=(0, None))  # fmt: skip
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.legend(loc="lower right")
    axes = grid[0, 2]
    sizes = [row["mib"] for row in all_reduce]
    for name, label in (("ring", "ring, send/recv (ours)"), ("official", "gloo all_reduce")):
        axes.plot(sizes, [1e3 * row[name] for row in all_reduce], "o-", label=label)
    axes.set(xscale="log", yscale="log", xlabel="MiB", ylabel="milliseconds", title="all-reduce")
    for axis, ticks in ((axes.xaxis, sizes), (axes.yaxis, (0.1, 0.2, 0.5, 1, 2, 5))):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(
            lambda value, _: f"{value:.2g}" if value >= 0.1 else f"1/{1 / value:.0f}"
        )
        axis.set_minor_locator(NullLocator())
    axes.legend()
    return figure


# ---------------------------------------------------------------- benchmark.py


def speed_figure(
    epoch: Mapping[str, Sequence[float]],
    scalar: Mapping[str, Sequence[float]],
    chains: Sequence[Mapping[str, float]],
) -> Figure:
    """三格：MLP 一轮的秒数；标量引擎一步的毫秒数；链的内存。"""
    figure, grid = new_figure(1, 3, size=(13.0, 3.0), width_ratios=(1, 1.25, 1))
    panels = (
        (grid[0, 0], epoch, 1.0, "s", ".3f", "MLP 784-256-10, one epoch", [PALETTE[0], MUTED]),
        (grid[0, 1], scalar, 1e3, "ms", ".0f", "scalar engine, one step",
         [PALETTE[0], PALETTE[5], PALETTE[1], PALETTE[4]]),
    )  # fmt: skip
    for axes, series, scale, unit, precision, title, colors in panels:
        medians = [scale * float(np.median(values)) for values in series.values()]
        axes.barh(list(series), medians, color=colors)
        for row, (median, values) in enumerate(zip(medians, series.values(), strict=True)):
            axes.plot(scale * np.array(values), [row] * len(values), ".", color="black", ms=2)
            place = max(median, scale * max(values))
            axes.text(place, row, f"  {median:{precision}} {unit}", va="center", fontsize=9)
        axes.set(xlabel=f"{unit} (median; dots: every run)", title=title)
        axes.margins(x=0.25)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    axes = grid[0, 2]
    lengths = [chain["length"] / 1e6 for chain in chains]
    axes.plot(lengths, [chain["mib"] for chain in chains], "o-", color=PALETTE[2])
    axes.set(xlabel="million nodes in the chain", ylabel="peak RSS of the process (MiB)",
             title="a long chain, engine", xlim=(0, None), ylim=(0, None))  # fmt: skip
    return figure
