"""demo.py 里感受野、开销与下采样各专题的图：接受数组，返回 ``Figure``；不训练，不读写文件。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Patch, Rectangle
from torch import Tensor

from utils.plot import MUTED, PALETTE, SEQUENTIAL, new_figure

Maps = Mapping[tuple[int, int], tuple[Tensor, tuple[int, int, int]]]


def _draw_maps(axes: Axes, maps: Maps) -> None:
    """梯度量出的像素（着色）与公式给出的框（未裁，可以伸出图像）。"""
    size = next(iter(maps.values()))[0].shape[0]
    axes.add_patch(Rectangle((-0.5, -0.5), size, size, facecolor="#F3F4F6", edgecolor="#9CA3AF"))
    for index, ((row, column), (mask, (top, left, side))) in enumerate(maps.items()):
        color = PALETTE[index]
        rows, columns = np.nonzero(mask.numpy())
        low, high = (rows.min(), columns.min()), (rows.max(), columns.max())
        axes.add_patch(
            Rectangle(
                (low[1] - 0.5, low[0] - 0.5),
                high[1] - low[1] + 1,
                high[0] - low[0] + 1,
                facecolor=color,
                alpha=0.35,
            )
        )
        axes.add_patch(
            Rectangle(
                (left - 0.5, top - 0.5), side, side, fill=False, edgecolor=color, linestyle="--"
            )
        )
        axes.text(
            (low[1] + high[1]) / 2,
            (low[0] + high[0]) / 2,
            f"({row}, {column})",
            ha="center",
            va="center",
            fontsize=9,
            color=color,
            fontweight="bold",
        )
    axes.set(xlim=(-30, size + 30), ylim=(size + 30, -30), aspect="equal")
    axes.set(xlabel="input column (px)", ylabel="input row (px)")
    axes.set_title("AlexNet pool2: formula (dashed), gradient (filled)", fontsize=10)
    axes.grid(False)


def _draw_energy(axes: Axes, energy: Tensor, std: float) -> None:
    """有效感受野的热图；虚线圆是两个标准差，图的边框就是理论感受野。"""
    half = energy.shape[0] / 2
    extent = (-half, half, half, -half)
    axes.imshow(energy.sqrt(), cmap=SEQUENTIAL, extent=extent)
    axes.add_patch(
        Circle((0, 0), 2 * std, fill=False, edgecolor="white", linestyle="--", linewidth=1.3)
    )
    edge = half - 1
    axes.add_patch(Rectangle((-edge, -edge), 2 * edge, 2 * edge, fill=False, edgecolor=PALETTE[1]))
    axes.text(0, 2 * std + 1, r"$2\sigma$", color="white", ha="center", va="top")
    axes.set_title(f"32 layers: field {2 * edge:.0f} px, $\\sigma$ = {std:.1f} px", fontsize=10)
    axes.set(xlabel="offset (px)", ylabel="offset (px)")
    axes.grid(False)


def receptive_figure(
    growth: Mapping[str, Sequence[float]],
    maps: Maps,
    energy: Tensor,
    depths: Sequence[int],
    measured: Mapping[str, Sequence[float]],
) -> Figure:
    """左上：感受野逐层的增长；右上：公式与梯度；左下：有效感受野；右下：它随深度的增长。"""
    figure, grid = new_figure(2, 2, size=(10.4, 8.4))
    axes = grid[0, 0]
    for name, values in growth.items():
        axes.plot(range(1, len(values) + 1), 100 * np.array(values), "o-", markersize=4, label=name)
    axes.axhline(100, color=MUTED, linewidth=1, linestyle=":")
    axes.set(xlabel="layer (convolutions and pools)", ylabel="field / image side (%)")
    axes.set_xticks(range(2, 19, 2))
    axes.set_title("theoretical receptive field", fontsize=10)
    axes.legend()
    _draw_maps(grid[0, 1], maps)
    _draw_energy(grid[1, 0], energy, measured["ReLU"][-1])
    axes = grid[1, 1]
    line = np.array([depths[0], depths[-1]], dtype=float)
    axes.plot(line, 2 * line + 1, "-", color=MUTED, label=r"theoretical field $2n+1$")
    axes.plot(line, np.sqrt(2 * line / 3), "--", color="black", label=r"$\sigma=\sqrt{2n/3}$")
    for index, (name, values) in enumerate(measured.items()):
        style = {"color": PALETTE[index], "markersize": 7 - 2 * index}
        axes.plot(depths, values, "os"[index], label=rf"$\sigma$ measured, {name}", **style)
    axes.set(xscale="log", yscale="log", xlabel="depth n (3x3 convolutions)", ylabel="pixels")
    axes.set_xticks(depths, [str(d) for d in depths])
    axes.minorticks_off()
    axes.set_title("field grows like n, its used part like $\\sqrt{n}$", fontsize=10)
    axes.legend()
    return figure


def cost_figure(costs: Mapping[str, Sequence[tuple[str, int, int, float]]]) -> Figure:
    """每个网络一列，参数、乘加、激活各一行：每层占多少。"""
    figure, grid = new_figure(3, len(costs), size=(11, 7.2), sharex="col", width_ratios=[1, 1.7])
    kinds = (
        (1, "parameters", 1e6, "M"),
        (2, "multiply-adds", 1e6, "M"),
        (3, "activations", 1.0, "MiB"),
    )
    for column, (name, rows) in enumerate(costs.items()):
        layers = [row[0] for row in rows]
        colors = [PALETTE[0] if layer.startswith("conv") else PALETTE[1] for layer in layers]
        for line, (key, label, unit, text) in enumerate(kinds):
            axes, values = grid[line, column], [row[key] / unit for row in rows]
            axes.bar(layers, values, color=colors)
            total = sum(values)
            dense = sum(v for v, layer in zip(values, layers, strict=True) if layer[0] == "f")
            axes.set_title(
                f"{name}: {total:,.1f} {text} {label}, {100 * dense / total:.1f}% in fc",
                fontsize=10,
            )
            axes.set_ylabel(text)
            axes.grid(axis="x", visible=False)
        grid[2, column].tick_params(axis="x", rotation=60)
    kinds = (("convolution", PALETTE[0]), ("fully connected", PALETTE[1]))
    handles = [Patch(color=color, label=label) for label, color in kinds]
    grid[0, 0].legend(handles=handles, loc="upper left")
    return figure


def pooling_figure(names: Sequence[str], panels: Mapping[str, Sequence[np.ndarray]]) -> Figure:
    """每行一张图，每列一种下采样。"""
    figure, grid = new_figure(len(panels), len(names) + 1, size=(8.6, 7.0))
    for row, (label, pictures) in zip(grid, panels.items(), strict=True):
        for axes, picture in zip(row, pictures, strict=True):
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
        row[0].set_ylabel(label)
    for axes, title in zip(grid[0], ["input 28x28", *names], strict=True):
        axes.set_title(title, fontsize=10)
    return figure
