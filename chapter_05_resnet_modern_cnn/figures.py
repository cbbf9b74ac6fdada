"""``train.py`` 的图：训练曲线与混淆矩阵。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils.plot import confusion_matrix, new_figure, plot_curves


def history_figure(runs: Mapping[str, Mapping[str, Any]], chance: float) -> Figure:
    """左：训练损失；右：验证错误率；每个网络一条线。"""
    figure, axes = new_figure(1, 2)
    epochs = [row["epoch"] for row in next(iter(runs.values()))["history"]]
    losses = {name: [row["train_loss"] for row in run["history"]] for name, run in runs.items()}
    errors = {
        name: [100 * (1 - row["val_accuracy"]) for row in run["history"]]
        for name, run in runs.items()
    }
    plot_curves(
        axes[0, 0],
        losses,
        x=epochs,
        ylabel="cross-entropy (nats)",
        title="training loss",
        references={"uniform guess": -np.log(chance)},
    )
    plot_curves(
        axes[0, 1],
        errors,
        x=epochs,
        ylabel="error (%)",
        title="validation error",
        references={"chance": 100 * (1 - chance)},
    )
    for axis in axes[0]:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def confusion_figure(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """混淆矩阵。"""
    side = max(4.2, 0.5 * len(names))
    figure, axes = new_figure(size=(side + 0.6, side))
    confusion_matrix(axes[0, 0], counts, names)
    return figure


def training_figures(
    runs: Mapping[str, Mapping[str, Any]], chance: float, names: Sequence[str]
) -> dict[str, Figure]:
    """``train.py`` 的全部图，``文件名 -> Figure``；混淆矩阵是第一个网络的。"""
    first = next(iter(runs.values()))
    return {
        "history.png": history_figure(runs, chance),
        "confusion.png": confusion_figure(np.array(first["confusion"]), names),
    }


def gallery_figure(images: np.ndarray, names: Sequence[str]) -> Figure:
    """每类一行的画廊；``images`` 为 uint8 ``(类数 · 列数, 3, H, W)``，按类排列。"""
    columns = len(images) // len(names)
    size = images.shape[2] + 2  # 每张图四周留一像素白边
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=255)
    canvas = padded.reshape(len(names), columns, 3, size, size).transpose(0, 3, 1, 4, 2)
    figure, axes = new_figure(size=(7.6, 7.0))
    axes[0, 0].imshow(canvas.reshape(len(names) * size, columns * size, 3))
    axes[0, 0].set_yticks([(k + 0.5) * size for k in range(len(names))], names)
    axes[0, 0].set_xticks([])
    axes[0, 0].grid(False)
    for spine in axes[0, 0].spines.values():
        spine.set_visible(False)
    return figure


def ablation_figure(scores: Mapping[str, Sequence[float]]) -> Figure:
    """各种做法的验证准确率：每个种子一个空心点，平均是实心的；竖线是第一种做法的平均。"""
    figure, axes = new_figure(size=(7.2, 0.38 * len(scores) + 1.2))
    axis = axes[0, 0]
    base = 100 * np.mean(next(iter(scores.values())))
    axis.axvline(base, color="0.6", linestyle="--", linewidth=1)
    for row, values in enumerate(scores.values()):
        percent = 100 * np.array(values)
        axis.scatter(percent, [row] * len(percent), s=28, facecolors="none", edgecolors="C0")
        axis.scatter(
            percent.mean(), row, s=60, color="C0" if percent.mean() >= base - 1e-9 else "C3"
        )
    axis.set_yticks(range(len(scores)), list(scores))
    axis.invert_yaxis()
    axis.set_xlabel("validation accuracy (%)")
    axis.set_title("one change at a time")
    return figure
