"""visualize.py 的图：接受数组，返回 ``Figure``；不训练，不读写文件。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from utils.plot import DIVERGING, PALETTE, new_figure


def to_pixels(x: Tensor, mean: Tensor, std: Tensor) -> np.ndarray:
    """归一化的图像 -> 像素值，``(B, C, H, W) -> (B, H, W)`` 或 ``(B, H, W, 3)``，0 到 1。"""
    x = x.detach().cpu() * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    x = x.clamp(0, 1).numpy()
    return x[:, 0] if x.shape[1] == 1 else x.transpose(0, 2, 3, 1)


def _show(axes: Axes, picture: np.ndarray, title: str = "", **options: object) -> None:
    axes.imshow(picture, **({"cmap": "gray", "interpolation": "nearest"} | options))
    if title:
        axes.set_title(title, fontsize=8, fontweight="normal", pad=3)
    axes.set(xticks=[], yticks=[])
    axes.grid(False)


def _tile(weight: np.ndarray) -> np.ndarray:
    """``(O, C, R, S)`` 的核铺成一张图：每列一个输出通道，每行一个输入通道，中间空一格。"""
    outputs, inputs, rows, columns = weight.shape
    sheet = np.full((inputs * (rows + 1) - 1, outputs * (columns + 1) - 1), np.nan)
    for o in range(outputs):
        for c in range(inputs):
            top, left = c * (rows + 1), o * (columns + 1)
            sheet[top : top + rows, left : left + columns] = weight[o, c]
    return sheet


def filters_figure(
    picture: np.ndarray, weights: Sequence[np.ndarray], response: np.ndarray
) -> Figure:
    """上两行：第一层的核与它对一张图的响应；下：第二层的核。"""
    first, second = weights
    count = min(8, len(first))
    figure, _ = new_figure(size=(9.6, 6.4))
    figure.clear()
    cells = figure.add_gridspec(3, count + 1, height_ratios=[1, 1, 2.4])
    _show(figure.add_subplot(cells[1, 0]), picture, "input", vmin=0, vmax=1)
    limit, top = abs(first).max(), max(response.max(), 1e-9)
    for index in range(count):
        kernel = first[index]
        if kernel.shape[0] == 3:  # 彩色输入：三个通道当作红绿蓝
            options, kernel = {}, 0.5 + kernel.transpose(1, 2, 0) / (2 * limit)
        else:
            options, kernel = {"cmap": DIVERGING, "vmin": -limit, "vmax": limit}, kernel[0]
        _show(figure.add_subplot(cells[0, index + 1]), kernel, f"kernel {index}", **options)
        axes = figure.add_subplot(cells[1, index + 1])
        _show(axes, response[index], "after ReLU", cmap="magma", vmin=0, vmax=top)
    part = second[:16, :8]
    axes, limit = figure.add_subplot(cells[2, :]), abs(part).max()
    _show(axes, _tile(part), cmap=DIVERGING, vmin=-limit, vmax=limit)
    axes.set_title(
        f"second layer: {len(part)} output channels (columns), one input channel per row"
    )
    for side in axes.spines.values():
        side.set_visible(False)
    return figure


def feature_maps_figure(picture: np.ndarray, maps: Mapping[str, np.ndarray]) -> Figure:
    """每层一行：平均激活最强的八个通道，由强到弱。"""
    figure, grid = new_figure(len(maps), 9, size=(10, 1.3 * len(maps) + 0.3))
    for row, (name, values) in zip(grid, maps.items(), strict=True):
        _show(row[0], picture, "input" if row is grid[0] else "", vmin=0, vmax=1)
        order = np.argsort(-values.mean(axis=(1, 2)))[:8]
        for axes in row[1:]:
            axes.axis("off")
        for axes, channel in zip(row[1:], order, strict=False):
            _show(axes, values[channel], f"channel {channel}", cmap="magma", vmin=0)
        row[0].set_ylabel(f"{name}\n{values.shape[1]}x{values.shape[2]}", fontsize=9)
    return figure


def explanations_figure(
    pictures: np.ndarray, captions: Sequence[str], heats: Mapping[str, np.ndarray]
) -> Figure:
    """每行一张图：原图与预测，三种热图（各自的最大绝对值定色标）。"""
    columns = len(heats) + 1
    figure, grid = new_figure(len(pictures), columns, size=(1.9 * columns, 1.85 * len(pictures)))
    for index, row in enumerate(grid):
        _show(row[0], pictures[index], vmin=0, vmax=1)
        row[0].set_ylabel(f"predicted {captions[index]}", fontsize=9)
        gray = pictures[index] if pictures[index].ndim == 2 else pictures[index].mean(axis=2)
        for axes, (name, values) in zip(row[1:], heats.items(), strict=True):
            heat, signed = values[index], name == "occlusion"
            limit = max(abs(heat).max(), 1e-12)
            if signed:
                _show(axes, heat, cmap=DIVERGING, vmin=-limit, vmax=limit)
            else:
                _show(axes, heat, cmap="magma", vmin=0, vmax=limit)
            axes.contour(gray, levels=[0.35], colors="#9CA3AF", linewidths=0.7)
    for axes, title in zip(grid[0], ("input", *heats), strict=True):
        axes.set_title(title, fontsize=11, fontweight="bold")
    return figure


def adversarial_figure(
    epsilons: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    examples: Sequence[tuple[np.ndarray, np.ndarray, tuple[int, float], tuple[int, float]]],
) -> Figure:
    """左：准确率随 ε 的下降，与同样大小的随机扰动对照；右：认错的例子。"""
    figure, _ = new_figure(size=(10.4, 4.6))
    figure.clear()
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.35])
    axes = left.subplots()
    for color, (name, values) in zip(PALETTE[1::-1], curves.items(), strict=False):
        axes.plot(
            [255 * e for e in epsilons], [100 * v for v in values], "o-", color=color, label=name
        )
    axes.set(xlabel=r"$\epsilon$ (grey levels out of 255)", ylabel="accuracy (%)", ylim=(0, 103))
    axes.set_title("same size, different direction")
    axes.legend(loc="lower left")
    if not examples:
        return figure
    grid = right.subplots(3, len(examples), squeeze=False)
    for column, (clean, moved, before, after) in zip(grid.T, examples, strict=True):
        difference = (moved - clean) if clean.ndim == 2 else (moved - clean).mean(axis=2)
        limit = max(abs(difference).max(), 1e-9)
        _show(column[0], clean, f"{before[0]} ({before[1]:.2f})", vmin=0, vmax=1)
        _show(column[1], difference, cmap=DIVERGING, vmin=-limit, vmax=limit)
        _show(column[2], moved, f"{after[0]} ({after[1]:.2f})", vmin=0, vmax=1)
    for axes, label in zip(grid[:, 0], ("clean", "difference", "adversarial"), strict=True):
        axes.set_ylabel(label)
    return figure
