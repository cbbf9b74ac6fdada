"""demo.py 里损失的地形各专题的图：接受数组，返回 ``Figure``；不训练，不读写文件。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from chapter_03_optimization_regularization.landscapes import Landscape
from utils.plot import MUTED, PALETTE, SEQUENTIAL, new_figure

Path = tuple[np.ndarray, int | None]  # (轨迹 (T + 1, 2), 到达的步数)


def _contours(axes: Axes, landscape: Landscape) -> None:
    """等高线按对数取：谷底的细节与远处的陡坡都看得见。"""
    left, right, bottom, top = landscape.window
    x, y = np.meshgrid(np.linspace(left, right, 240), np.linspace(bottom, top, 240))
    points = torch.from_numpy(np.stack([x, y], axis=-1))
    height = landscape.function(points).numpy() - landscape.lowest
    levels = np.linspace(-3, np.log10(height.max()), 18)
    logs = np.log10(height + 1e-3)
    axes.contourf(x, y, logs, levels, cmap="Blues", alpha=0.35)
    axes.contour(
        x, y, logs, levels, colors="white", linewidths=0.6, linestyles="solid"
    )  # 负的等高线缺省画成虚线，这里没有那个意思
    axes.grid(False)
    axes.set(xlim=(left, right), ylim=(bottom, top))


PATH_COLORS = ("#111827", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # 底色是蓝的，避开蓝色


def trajectories_figure(panels: Mapping[str, tuple[Landscape, Mapping[str, Path]]]) -> Figure:
    """每种地形一格：对数间隔的等高线，各优化器的轨迹；图例里是到达的步数。"""
    figure, grid = new_figure(2, 2, size=(11, 8.2))
    corners = {"saddle": "lower left", "rosenbrock": "lower left", "beale": "lower right"}
    for axes, (name, (landscape, paths)) in zip(grid.flat, panels.items(), strict=True):
        _contours(axes, landscape)
        for color, (optimizer, (path, arrived)) in zip(PATH_COLORS, paths.items(), strict=True):
            stop = len(path) if arrived is None else arrived + 1
            label = f"{optimizer}: " + ("not reached" if arrived is None else f"{arrived} steps")
            marks = {"marker": "o", "markersize": 2.4, "markevery": max(1, stop // 40)}
            axes.plot(*path[:stop].T, color=color, linewidth=1.4, alpha=0.9, label=label, **marks)
        axes.plot(*landscape.start, "s", color="black", markersize=7, markeredgecolor="white")
        for point in landscape.minima:
            axes.plot(*point, "*", color="black", markersize=14, markeredgecolor="white", zorder=5)
        axes.set_title(name)
        axes.legend(fontsize=8, loc=corners.get(name, "upper left"), frameon=True, framealpha=0.9)
    return figure


def stability_figure(
    curves: Mapping[str, Sequence[float]],
    betas: Sequence[float],
    limits: Mapping[str, Sequence[tuple[float, float]]],
) -> Figure:
    """左：学习率在极限上下时损失的走向；右：带动量时实测（柱）与理论（横线）的极限。"""
    figure, grid = new_figure(1, 2, size=(9.6, 3.6))
    axes = grid[0, 0]
    for index, (ratio, losses) in enumerate(curves.items()):
        axes.plot(losses, color=PALETTE[index], label=rf"$\eta={ratio}\times 2/\lambda_{{\max}}$")
    axes.set(title="gradient descent", xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    axes, positions = grid[0, 1], np.arange(len(betas))
    for index, (name, pairs) in enumerate(limits.items()):
        places = positions + (index - 0.5) * 0.34
        measured = [pair[0] for pair in pairs]
        axes.bar(places, measured, 0.3, color=PALETTE[index], label=f"{name}, measured")
        for place, (_, theory) in zip(places, pairs, strict=True):
            axes.plot([place - 0.17, place + 0.17], [theory] * 2, color="black", linewidth=1.6)
    axes.plot([], [], color="black", label="theory")
    axes.set_xticks(positions, [rf"$\beta={beta:g}$" for beta in betas])
    axes.set(title="largest stable learning rate", ylabel=r"$\eta_{\max}$")
    axes.grid(axis="x", visible=False)
    axes.legend()
    return figure


def edge_figure(runs: Mapping[float, Mapping[str, Sequence[float]]]) -> Figure:
    """上：损失；下：锐度与 2/η（虚线）。"""
    figure, grid = new_figure(2, 1, size=(8.6, 6.2), sharex=True)
    for index, (lr, run) in enumerate(runs.items()):
        color = PALETTE[index]
        grid[0, 0].plot(run["loss"], color=color, linewidth=1.1, label=rf"$\eta={lr:g}$")
        grid[1, 0].plot(run["step"], run["sharpness"], color=color, linewidth=1.3)
        grid[1, 0].axhline(2 / lr, color=color, linestyle="--", linewidth=1)
        grid[1, 0].annotate(
            rf"$2/\eta={2 / lr:.3g}$", (1, 2 / lr), xycoords=("axes fraction", "data"),
            xytext=(4, 0), textcoords="offset points", va="center", fontsize=9, color=color,
        )  # fmt: skip
    grid[0, 0].set(title="training loss, full-batch gradient descent", ylabel="loss", yscale="log")
    grid[0, 0].legend()
    grid[1, 0].set(title=r"sharpness $\lambda_{\max}$ of the Hessian", xlabel="step")
    return figure


def bias_figure(
    moves: tuple[np.ndarray, np.ndarray], factors: Mapping[float, tuple[np.ndarray, np.ndarray]]
) -> Figure:
    """左：前 50 步各步的更新量；右：不修正 ÷ 修正的倍数，点是实测，线是公式。"""
    figure, grid = new_figure(1, 2, size=(9.6, 3.5))
    axes = grid[0, 0]
    for index, (path, name) in enumerate(zip(moves, ("corrected", "not corrected"), strict=True)):
        side = range(1, 51)
        axes.plot(side, path[:50], ".-", color=PALETTE[index], linewidth=1.2, label=name)
    axes.axhline(1, color=MUTED, linewidth=1, linestyle=":")
    axes.set(xlabel="step", ylabel=r"update / $\eta$", ylim=(0, None))
    axes.set_title(r"first 50 steps, $\beta_2=0.999$")
    axes.legend()
    axes = grid[0, 1]
    for index, (beta2, (measured, formula)) in enumerate(factors.items()):
        steps = np.arange(1, len(formula) + 1)
        shown = np.unique(np.geomspace(1, len(steps), 24).astype(int)) - 1
        color = PALETTE[index + 1]
        axes.plot(steps, formula, color=color, linewidth=1.3, label=rf"$\beta_2={beta2:g}$")
        axes.plot(steps[shown], measured[shown], "o", color=color, markersize=4.5)
    axes.axhline(1, color=MUTED, linewidth=1, linestyle=":")
    axes.set(xlabel="step", ylabel="not corrected / corrected", xscale="log", ylim=(0, None))
    axes.set_title(r"line: $(1-\beta_1^t)/\sqrt{1-\beta_2^t}$, dots: measured")
    axes.legend()
    return figure


def slice_figure(
    side: Tensor,
    surfaces: Mapping[str, np.ndarray],
    curves: Mapping[str, Tensor],
    peaks: Sequence[float],
    reach: float,
) -> Figure:
    """上：同一套等高线的二维切片；下：同一个函数的两组权重，归一化前后的一维切片。"""
    figure, grid = new_figure(2, 2, size=(9.6, 7.6), height_ratios=[1.4, 1])
    top = max(surface.max() for surface in surfaces.values())
    levels = np.geomspace(0.01, top * 1.001, 16)
    for axes, (name, surface) in zip(grid[0], surfaces.items(), strict=True):
        clipped = surface.T.clip(min=levels[0])
        filled = axes.contourf(side, side, clipped, levels, cmap=SEQUENTIAL, norm="log")
        axes.contour(side, side, clipped, levels, colors="white", linewidths=0.4)
        axes.grid(False)
        axes.set(title=name, xlabel="direction 1", ylabel="direction 2", aspect="equal")
        axes.set(xticks=[-1, -0.5, 0, 0.5, 1], yticks=[-1, -0.5, 0, 0.5, 1])
    bar = figure.colorbar(filled, ax=list(grid[0]), label="loss", shrink=0.9)
    ticks = [tick for tick in (0.01, 0.03, 0.1, 0.3, 1, 3, 10) if tick <= top]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.minorticks_off()
    labels = {"trained": "trained weights", "rescaled": "rescaled, same function"}
    for axes, kind, far in zip(grid[1], ("plain", "filter-normalized"), (reach, 1.0), strict=True):
        for color, style, peak, (name, label) in zip(
            PALETTE, ("-", "--"), peaks, labels.items(), strict=False
        ):
            values = curves[f"{kind}, {name}"]
            distance = np.linspace(-far, far, len(values))
            label = rf"{label} ($\lambda_{{\max}}={peak:.2g}$)"
            axes.plot(distance, values, style, color=color, label=label)
        axes.set(title=f"{kind} direction", xlabel="distance", ylabel="loss", ylim=(0, None))
        axes.set_xticks(np.linspace(-far, far, 5))
        axes.legend(loc="upper center", fontsize=8)
    return figure
