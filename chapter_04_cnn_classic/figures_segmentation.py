"""``segmentation.py`` 的图：场景、真值、预测、错误并排，各类的 IoU，训练曲线。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from utils.plot import MUTED, PALETTE, plot_curves

BACKGROUND = "#E5E7EB"
COLORS = (BACKGROUND, *PALETTE[:4])  # 0 是背景，k + 1 是第 k 类
WRONG = "#B91C1C"
ROWS = ("scene", "truth", "prediction", "errors")


def _show(axes: Axes, picture: np.ndarray, **options: object) -> None:
    """一格图像：不要坐标与边框。"""
    axes.imshow(picture, interpolation="nearest", **options)
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_grid(
    figure: Figure,
    images: np.ndarray,
    masks: np.ndarray,
    guesses: np.ndarray,
    names: Sequence[str],
) -> None:
    """四行：场景、真值、预测、错误的像素（红）；一列一个场景。"""
    colors = {"cmap": ListedColormap(COLORS), "vmin": 0, "vmax": len(COLORS) - 1}
    grid = figure.subplots(len(ROWS), len(images), squeeze=False)
    for column, (image, truth, guess) in enumerate(zip(images, masks, guesses, strict=True)):
        faded = 255 - (255 - image.astype(float)) * 0.35  # 淡化的场景，错误画在它上面
        faded[truth != guess] = [int(WRONG[i : i + 2], 16) for i in (1, 3, 5)]
        _show(grid[0, column], image)
        _show(grid[1, column], truth, **colors)
        _show(grid[2, column], guess, **colors)
        _show(grid[3, column], faded.astype(np.uint8))
        share = 100 * (truth != guess).mean()
        grid[3, column].set_xlabel(f"{share:.1f}% wrong", fontsize=8, color=MUTED, labelpad=2)
    for axes, name in zip(grid[:, 0], ROWS, strict=True):
        axes.set_ylabel(name, fontsize=10, fontweight="bold")
    handles = [Patch(color=color, label=name) for color, name in zip(COLORS, names, strict=True)]
    handles.append(Patch(color=WRONG, label="wrong pixel"))
    figure.legend(handles=handles, loc="outside upper center", ncol=len(handles))


def _draw_bars(axes: Axes, ious: Sequence[float], names: Sequence[str], miou: float) -> None:
    """各类的 IoU；平均写在标题里。"""
    bars = axes.bar(names, ious, color=COLORS, width=0.65)
    bars[0].set_color("#9CA3AF")
    axes.bar_label(bars, fmt="%.3f", fontsize=8, padding=2)
    axes.set(ylim=(0, 1.1), ylabel="IoU", title=f"test IoU per class (mean {miou:.3f})")
    axes.grid(False, axis="x")


def segmentation_figure(
    images: Tensor,
    masks: Tensor,
    guesses: Tensor,
    ious: Sequence[float],
    history: Sequence[Mapping[str, float]],
    names: Sequence[str],
    chance: float,
    miou: float,
) -> Figure:
    """分割的结果一览。

    参数:
        images, masks: uint8 ``(N, 3, S, S)`` 与 int64 ``(N, S, S)``；只画前 ``len(guesses)`` 个。
        guesses: 预测，int64 ``(n, S, S)``。
        ious: 各类的 IoU，含背景，次序同 ``names``。
        history: 逐轮记录，有 ``epoch`` 与 ``val_miou``。
        chance, miou: 机会线与测试 mIoU。
    """
    count = len(guesses)
    figure = Figure(figsize=(9.4, 9.6), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, height_ratios=(2.55, 1), hspace=0.02)
    pictures = images[:count].numpy().transpose(0, 2, 3, 1)
    _draw_grid(top, pictures, masks[:count].numpy(), guesses.numpy(), names)
    left, right = bottom.subplots(1, 2)
    _draw_bars(left, ious, names, miou)
    plot_curves(
        right,
        {"validation mIoU": [row["val_miou"] for row in history]},
        x=[row["epoch"] for row in history],
        ylabel="mIoU",
        title="validation mIoU",
        references={"all background": chance},
    )
    right.set_ylim(0, 1)
    right.xaxis.get_major_locator().set_params(integer=True)
    return figure
