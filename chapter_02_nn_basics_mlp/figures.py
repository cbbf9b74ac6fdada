"""mlp.py、train.py 与 benchmark.py 的图：接受数组，返回 ``Figure``；不训练，不读写文件。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.plot import (
    DIVERGING,
    MUTED,
    PALETTE,
    confusion_matrix,
    image_grid,
    new_figure,
    plot_curves,
)

CLASS_COLORS = PALETTE[:2]

# ---------------------------------------------------------------- mlp.py


def fits_figure(fits: Sequence[Mapping[str, Any]]) -> Figure:
    """拟合曲线对比图：行为目标，列为宽度，每格里各激活函数一条曲线。"""
    targets = list(dict.fromkeys(fit["target"] for fit in fits))
    widths = list(dict.fromkeys(fit["width"] for fit in fits))
    activations = list(dict.fromkeys(fit["activation"] for fit in fits))
    size = (3.4 * len(widths) + 0.4, 2.1 * len(targets) + 0.6)
    figure, grid = new_figure(len(targets), len(widths), size=size, sharex=True)
    for fit in fits:
        axes = grid[targets.index(fit["target"]), widths.index(fit["width"])]
        if not axes.lines:
            _draw_truth(axes, fit)
        color = PALETTE[activations.index(fit["activation"]) % len(PALETTE)]
        label = f"{fit['activation']}  $R^2$={fit['r2']:.3f}"
        axes.plot(fit["x"], fit["prediction"], color=color, linewidth=1.5, label=label)
    for row, target in enumerate(targets):
        grid[row, 0].set_ylabel(target, fontweight="bold")
    for column, width in enumerate(widths):
        grid[0, column].set_title(f"width {width}")
        grid[-1, column].set_xlabel("x")
    for axes in grid.flat:
        axes.legend(fontsize=7.5, loc="upper left", handlelength=1.2, labelspacing=0.2)
    return figure


def _draw_truth(axes: Axes, fit: Mapping[str, Any]) -> None:
    samples = np.asarray(fit["samples"])
    axes.scatter(samples[:, 0], samples[:, 1], s=4, color="#C4C9D1", linewidths=0)
    axes.plot(fit["x"], fit["truth"], color="black", linewidth=1, linestyle=":")
    if max(fit["x"]) > 1:  # 外推：标出训练区间，并防止发散的预测压扁其余部分
        axes.axvspan(-1, 1, color="#F3F4F6", zorder=0)
    truth = np.asarray(fit["truth"])
    span = truth.max() - truth.min()
    axes.set_ylim(truth.min() - 0.2 * span, truth.max() + 0.75 * span)  # 上方留给图例


def surface_figure(fit: Mapping[str, Any]) -> Figure:
    """二维曲面：真值、预测、误差三张热图。"""
    truth, prediction = np.asarray(fit["truth"]), np.asarray(fit["prediction"])
    error = prediction - truth
    figure, grid = new_figure(1, 3, size=(11.5, 3.4))
    panels = [
        (r"truth $z=f(x,y)$", truth, np.abs(truth).max()),
        (f"MLP, $R^2$={fit['r2']:.4f}", prediction, np.abs(truth).max()),
        ("error", error, np.abs(error).max()),
    ]
    for axes, (title, values, limit) in zip(grid[0], panels, strict=True):
        image = axes.imshow(
            values.T,
            origin="lower",
            extent=(-1, 1, -1, 1),
            cmap=DIVERGING,
            vmin=-limit,
            vmax=limit,
        )
        axes.contour(values.T, 9, extent=(-1, 1, -1, 1), colors="black", linewidths=0.4, alpha=0.5)
        axes.grid(False)
        axes.set(title=title, xlabel="x", ylabel="y")
        figure.colorbar(image, ax=axes, shrink=0.9)
    return figure


# ---------------------------------------------------------------- train.py


def history_figure(
    runs: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], score: str, chance: float
) -> Figure:
    """训练与验证曲线。``runs``：模型名 -> 各个种子的逐轮记录；同一模型各种子同色。"""
    figure, grid = new_figure(1, 2, size=(9.2, 3.4))
    panels = [
        (grid[0, 0], "train_loss", "-", " train"),
        (grid[0, 0], "val_loss", "--", " validation"),
        (grid[0, 1], "val_score", "-", ""),
    ]
    for color, (model, histories) in zip(PALETTE, runs.items(), strict=False):
        for axes, key, style, suffix in panels:
            for index, history in enumerate(histories):
                epochs, values = [r["epoch"] for r in history], [r[key] for r in history]
                label = None if index else model + suffix
                axes.plot(epochs, values, style, color=color, linewidth=1.3, label=label)
    plot_curves(grid[0, 0], {}, ylabel="loss (nats or MSE)", title="loss", log_y=True)
    title = f"validation {score}"
    plot_curves(grid[0, 1], {}, ylabel=score, title=title, references={"chance": chance})
    for axes in grid[0]:
        axes.legend()
    return figure


def _scatter_classes(axes: Axes, points: np.ndarray, labels: np.ndarray, size: float) -> None:
    for label, color in enumerate(CLASS_COLORS):
        chosen = points[labels == label]
        axes.scatter(chosen[:, 0], chosen[:, 1], s=size, color=color, linewidths=0, alpha=0.6)


def boundary_figure(
    panels: Mapping[str, np.ndarray],
    points: np.ndarray,
    labels: np.ndarray,
    reach: float,
    bayes: np.ndarray,
) -> Figure:
    """决策边界：每个模型一格，底色是类别 1 的概率，黑线是概率 ½，虚线是贝叶斯边界。

    ``panels`` 与 ``bayes`` 是 ``[-reach, reach]²`` 网格上的概率，第一维为 y。
    """
    figure, grid = new_figure(1, len(panels), size=(4.4 * len(panels), 4.1), sharey=True)
    extent = (-reach, reach, -reach, reach)
    for axes, (title, probability) in zip(grid[0], panels.items(), strict=True):
        axes.imshow(probability, origin="lower", extent=extent, cmap=DIVERGING, vmin=-0.8, vmax=1.8)
        axes.contour(probability, [0.5], extent=extent, colors="black", linewidths=1.3)
        axes.contour(bayes, [0.5], extent=extent, colors=MUTED, linewidths=0.9, linestyles="--")
        _scatter_classes(axes, points, labels, 3)
        axes.grid(False)
        axes.set(title=title, xlabel="$x_1$", aspect="equal")
    grid[0, 0].set_ylabel("$x_2$")
    return figure


def hidden_space_figure(frames: Mapping[str, np.ndarray], labels: np.ndarray) -> Figure:
    """隐藏空间的变形：每格是一层表示的二维投影，螺旋逐层被拉直，直到能用一条直线分开。"""
    figure, grid = new_figure(1, len(frames), size=(3.3 * len(frames), 3.3))
    for axes, (title, points) in zip(grid[0], frames.items(), strict=True):
        _scatter_classes(axes, points, labels, 4)
        axes.set(title=title, xticks=[], yticks=[])
        axes.grid(False)
    return figure


def digits_figure(counts: np.ndarray, class_names: Sequence[str]) -> Figure:
    """混淆矩阵。"""
    figure, grid = new_figure(1, 1, size=(5.6, 4.8))
    confusion_matrix(grid[0, 0], counts, class_names, "MLP on the test set")
    return figure


def gallery_figure(images: np.ndarray, titles: Sequence[str]) -> Figure:
    """错得最有把握的图像；标题是 真实 -> 预测 (概率)。"""
    title = "most confident mistakes: true → predicted (probability)"
    return image_grid(images, titles, columns=8, cell=1.1, title=title)


def regression_figure(panels: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """预测对真值的散点；``panels``：模型名 -> (真值, 预测)。"""
    figure, grid = new_figure(1, len(panels), size=(4.2 * len(panels), 3.8), sharey=True)
    for axes, (title, (truth, prediction)) in zip(grid[0], panels.items(), strict=True):
        ends = [truth.min(), truth.max()]
        axes.scatter(truth, prediction, s=5, alpha=0.35, linewidths=0, color=PALETTE[0])
        axes.plot(ends, ends, color="black", linewidth=1, linestyle="--")
        axes.set(title=title, xlabel="true $y$ (standardized)")
    grid[0, 0].set_ylabel("predicted $y$ (standardized)")
    return figure


# ---------------------------------------------------------------- benchmark.py


def pipelines_figure(seconds: Mapping[str, Sequence[float]]) -> Figure:
    """两种数据管线一轮的秒数：条为最小值，点为每次。"""
    figure, grid = new_figure(1, 1, size=(6.4, 2.6))
    axes = grid[0, 0]
    colors = [PALETTE[name.startswith("DataLoader")] for name in seconds]
    axes.barh(list(seconds), [min(values) for values in seconds.values()], color=colors)
    for row, values in enumerate(seconds.values()):
        axes.annotate(
            f"{min(values):.2f} s",
            (max(values), row),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
        axes.plot(values, [row] * len(values), "o", color="black", markersize=2)
    axes.set(xlabel="seconds per epoch (MLP 784-256-10)")
    axes.margins(x=0.18)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return figure
