"""全书统一的画图风格与几种常用的图。

只用 matplotlib 的面向对象接口（``Figure``），不碰 pyplot，因此不需要显示器。导入本模块会把
``STYLE`` 设为 matplotlib 的缺省风格：图例、标题等在画的那一刻才读取风格，只在建图时设置不够。
图中文字用英文或数学符号，因为新机器上往往没有中文字体。
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from utils.file_io_util import atomic_write

# Okabe 与 Ito (2008) 的色盲安全调色板，按相邻两色对比度重排
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SEQUENTIAL = "viridis"
DIVERGING = "RdBu_r"
MUTED = "#6B7280"  # 参考线、次要文字
MAX_BYTES = 200_000

STYLE: dict[str, Any] = {
    "figure.dpi": 130,
    "figure.facecolor": "white",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9CA3AF",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
    "grid.color": "#E5E7EB",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.color": "#4B5563",
    "ytick.color": "#4B5563",
    "mathtext.fontset": "cm",
}
matplotlib.rcParams.update(STYLE)


def new_figure(
    rows: int = 1,
    columns: int = 1,
    size: tuple[float, float] | None = None,
    **subplots: Any,
) -> tuple[Figure, np.ndarray]:
    """新建一张统一风格的图。

    参数:
        rows, columns: 子图的行数与列数。
        size: 整张图的 (宽, 高)，英寸；缺省时每个子图 4.2 × 3.2。
        subplots: 传给 ``Figure.subplots``，如 ``sharex=True``。

    返回:
        (图, 形状 ``(rows, columns)`` 的子图数组)。
    """
    figure = Figure(figsize=size or (4.2 * columns, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **subplots)


def save_figure(figure: Figure, path: Path) -> Path:
    """原子地存成 PNG，至多 200 KB：先减到 256 色，仍然太大再逐步降低分辨率。"""
    from PIL import Image  # matplotlib 自身依赖 Pillow

    dpi = STYLE["figure.dpi"]
    while True:
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=dpi, format="png")
        if buffer.tell() > MAX_BYTES:
            image = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
            buffer = io.BytesIO()
            image.save(buffer, format="png", optimize=True)
        if buffer.tell() <= MAX_BYTES:
            break
        dpi *= 0.85
    atomic_write(path, lambda stream: stream.write(buffer.getbuffer()))
    return Path(path)


# ---------------------------------------------------------------- 画在一个子图上


def plot_curves(
    axes: Axes,
    curves: Mapping[str, Sequence[float]],
    *,
    x: Sequence[float] | None = None,
    xlabel: str = "epoch",
    ylabel: str = "",
    title: str = "",
    references: Mapping[str, float] | None = None,
    log_y: bool = False,
) -> None:
    """若干条曲线画在一起；``references`` 是水平参考线，如机会线与理论极限。"""
    for name, values in curves.items():
        positions = range(1, len(values) + 1) if x is None else x
        marker = "o" if len(values) == 1 else None
        axes.plot(positions, values, label=name, marker=marker)
    for name, level in (references or {}).items():
        axes.axhline(level, color=MUTED, linestyle="--", linewidth=1)
        axes.annotate(
            name,
            (1, level),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=MUTED,
        )
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if log_y:
        axes.set_yscale("log")
    if len(curves) > 1:
        axes.legend()


def heatmap(
    axes: Axes,
    values: np.ndarray,
    *,
    x_labels: Sequence[str] | None = None,
    y_labels: Sequence[str] | None = None,
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    text: str | Callable[[float], str] | None = None,
    colormap: str = SEQUENTIAL,
    limits: tuple[float, float] | None = None,
) -> Any:
    """热图；``text`` 是格式（如 ``".2f"``）或函数时在每格写出数值。返回 ``AxesImage``。"""
    values = np.asarray(values, dtype=float)
    low, high = limits or (np.nanmin(values), np.nanmax(values))
    image = axes.imshow(values, cmap=colormap, vmin=low, vmax=high, aspect="auto")
    axes.grid(False)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if x_labels is not None:
        axes.set_xticks(range(len(x_labels)), x_labels)
    if y_labels is not None:
        axes.set_yticks(range(len(y_labels)), y_labels)
    if text is not None:
        for (row, column), value in np.ndenumerate(values):
            shown = text(value) if callable(text) else format(value, text)
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            color = "white" if dark else "black"
            axes.text(column, row, shown, ha="center", va="center", fontsize=8, color=color)
    return image


def confusion_matrix(
    axes: Axes, counts: np.ndarray, class_names: Sequence[str], title: str = "confusion matrix"
) -> None:
    """混淆矩阵：行为真实类别，列为预测类别；颜色是行内比例，数字是个数（零不写）。"""
    counts = np.asarray(counts)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    heatmap(
        axes,
        shares,
        x_labels=class_names,
        y_labels=class_names,
        xlabel="predicted",
        ylabel="true",
        title=title,
        colormap="Blues",
        limits=(0, 1),
    )
    if max(map(len, class_names)) > 3:
        axes.tick_params(axis="x", rotation=45)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count}", ha="center", va="center", fontsize=7, color=color)


def image_grid(
    images: np.ndarray,
    titles: Sequence[str] | None = None,
    *,
    columns: int = 8,
    cell: float = 1.0,
    title: str = "",
) -> Figure:
    """一组小图。``images`` 为 ``(N, C, H, W)`` 或 ``(N, H, W)``，uint8 或 0 到 1 的浮点数。"""
    images = np.asarray(images)
    if images.ndim == 4:
        images = images[:, 0] if images.shape[1] == 1 else images.transpose(0, 2, 3, 1)
    columns = max(1, min(columns, len(images)))
    rows = max(1, -(-len(images) // columns))
    height = cell * (1.25 if titles is not None else 1.0)
    size = (columns * cell, rows * height + (0.35 if title else 0))
    figure, grid = new_figure(rows, columns, size=size)
    top = 255 if images.dtype == np.uint8 else 1
    for index, axes in enumerate(grid.flat):
        axes.axis("off")
        if index < len(images):
            axes.imshow(images[index], cmap="gray", vmin=0, vmax=top, interpolation="nearest")
            if titles is not None:
                axes.set_title(titles[index], fontsize=8, fontweight="normal", pad=2)
    if title:
        figure.suptitle(title, fontsize=11, fontweight="bold")
    return figure
