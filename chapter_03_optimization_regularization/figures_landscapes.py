"""demo.py 里损失的地形各专题的图：接受数组，返回 ``Figure``；不训练，不读写文件。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chapter_03_optimization_regularization.landscapes import Landscape
from utils.plot import MUTED, PALETTE, new_figure

Path = tuple[np.ndarray, int | None]  # (轨迹 (T + 1, 2), 到达的步数)


def _contours(axes: Axes, landscape: Landscape) -> None:
    """等高线按对数取：谷底的细节与远处的陡坡都看得见。"""
    left, right, bottom, top = landscape.window
    x, y = np.meshgrid(np.linspace(left, right, 240), np.linspace(bottom, top, 240))
    points = torch.from_numpy(np.stack([x, y], axis=-1))
    height = landscape.function(points).numpy() - landscape.lowest
    levels = np.linspace(-3, np.log10(height.max()), 22)
    axes.contourf(x, y, np.log10(height + 1e-3), levels, cmap="Greys", alpha=0.4)
    axes.contour(x, y, np.log10(height + 1e-3), levels, colors="white", linewidths=0.5)
    axes.grid(False)
    axes.set(xlim=(left, right), ylim=(bottom, top))


def trajectories_figure(panels: Mapping[str, tuple[Landscape, Mapping[str, Path]]]) -> Figure:
    """每种地形一格：对数间隔的等高线，各优化器的轨迹；图例里是到达的步数。"""
    figure, grid = new_figure(2, 2, size=(11, 8.2))
    for axes, (name, (landscape, paths)) in zip(grid.flat, panels.items(), strict=True):
        _contours(axes, landscape)
        for index, (optimizer, (path, arrived)) in enumerate(paths.items()):
            stop = len(path) if arrived is None else arrived + 1
            label = f"{optimizer}: " + ("not reached" if arrived is None else f"{arrived} steps")
            marks = {"marker": "o", "markersize": 2.2, "markevery": max(1, stop // 40)}
            color = PALETTE[index]
            axes.plot(*path[:stop].T, color=color, linewidth=1.3, label=label, **marks)
        axes.plot(*landscape.start, "s", color="black", markersize=6)
        for point in landscape.minima:
            axes.plot(*point, "*", color="black", markersize=13, markeredgecolor="white")
        axes.set_title(name)
        axes.legend(fontsize=7.5, loc="best", frameon=True, framealpha=0.9)
    return figure


def stability_figure(
    curves: Mapping[str, Sequence[float]],
    betas: Sequence[float],
    measured: Mapping[str, Sequence[float]],
    theory: Mapping[str, Sequence[float]],
) -> Figure:
    """左：学习率在极限上下时损失的走向；右：带动量时实测与理论的极限。"""
    figure, grid = new_figure(1, 2, size=(9.6, 3.6))
    axes = grid[0, 0]
    for index, (ratio, losses) in enumerate(curves.items()):
        axes.plot(losses, color=PALETTE[index], label=rf"$\eta={ratio}\times 2/\lambda_{{\max}}$")
    axes.set(title="gradient descent", xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    axes, positions = grid[0, 1], np.arange(len(betas))
    for index, name in enumerate(measured):
        shift = (index - 0.5) * 0.34
        axes.bar(positions + shift, measured[name], 0.3, color=PALETTE[index], label=name)
        for position, value in zip(positions + shift, theory[name], strict=True):
            axes.plot([position - 0.17, position + 0.17], [value] * 2, color="black", linewidth=1.6)
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
            xytext=(-2, 3), textcoords="offset points", ha="right", fontsize=8, color=color,
        )  # fmt: skip
    grid[0, 0].set(title="training loss, full-batch gradient descent", ylabel="loss", yscale="log")
    grid[0, 0].legend()
    grid[1, 0].set(title=r"sharpness $\lambda_{\max}$ of the Hessian", xlabel="step")
    return figure


def bias_figure(curves: Mapping[str, Sequence[float]]) -> Figure:
    """梯度恒定时 Adam 的步长，以 η 为单位。"""
    figure, grid = new_figure(1, 1, size=(6.8, 3.4))
    axes = grid[0, 0]
    for index, (name, sizes) in enumerate(curves.items()):
        axes.plot(range(1, len(sizes) + 1), sizes, color=PALETTE[index], label=name)
    axes.set(xlabel="step", ylabel=r"step size / $\eta$", xscale="log", ylim=(0, None))
    axes.set_title("Adam on a constant gradient")
    axes.legend()
    return figure


def slice_figure(surfaces: Mapping[str, np.ndarray], curves: Mapping[str, np.ndarray]) -> Figure:
    """左两格：同一套等高线的二维切片；右两格：同一个函数的两组权重，归一化前后的一维切片。"""
    figure, grid = new_figure(1, 4, size=(15, 3.7))
    levels = np.geomspace(0.01, max(surface.max() for surface in surfaces.values()), 16)
    for axes, (name, surface) in zip(grid[0], surfaces.items(), strict=False):
        side = np.linspace(-1, 1, len(surface))
        clipped = surface.T.clip(min=levels[0])
        axes.contourf(side, side, clipped, levels, cmap="viridis", norm="log")
        lines = axes.contour(side, side, clipped, levels[::2], colors="white", linewidths=0.6)
        axes.clabel(lines, fmt="%.2g", fontsize=7)
        axes.grid(False)
        axes.set(title=name, xlabel="direction 1", ylabel="direction 2", aspect="equal")
    for axes, kind in zip(grid[0, 2:], ("plain", "filter-normalized"), strict=True):
        for index, (factor, style) in enumerate((("1", "-"), ("10", "--"))):
            values = curves[f"{kind}, x{factor}"]
            side = np.linspace(-1, 1, len(values))
            label = "weights" if factor == "1" else "rescaled, same function"
            axes.plot(side, values, style, color=PALETTE[index], label=label)
        axes.set(title=f"{kind} direction", xlabel="distance", ylabel="loss")
        axes.set_ylim(0, max(curves[f"{kind}, x1"].max() * 1.4, 0.1))
        axes.legend(loc="upper center", labelcolor=MUTED)
    return figure
