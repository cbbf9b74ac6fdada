"""``train.py`` 与 ``benchmark.py`` 的图：训练曲线、混淆矩阵、错分的样本、卷积的用时。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from chapter_04_cnn_classic.data import Data
from utils.plot import confusion_matrix, image_grid, new_figure, plot_curves

GALLERY = 32


def history_figure(history: Sequence[dict[str, float]], chance: float) -> Figure:
    """左：训练与验证损失；右：验证错误率（对数轴）。"""
    figure, axes = new_figure(1, 2)
    epochs = [row["epoch"] for row in history]
    losses = {name: [row[f"{name}_loss"] for row in history] for name in ("train", "val")}
    plot_curves(axes[0, 0], losses, x=epochs, ylabel="cross-entropy (nats)", title="loss")
    errors = {"validation": [100 * (1 - row["val_accuracy"]) for row in history]}
    plot_curves(
        axes[0, 1],
        errors,
        x=epochs,
        ylabel="error (%)",
        title="validation error",
        references={"chance": 100 * (1 - chance)},
        log_y=all(value > 0 for value in errors["validation"]),
    )
    return figure


def confusion_figure(labels: np.ndarray, guesses: np.ndarray, names: Sequence[str]) -> Figure:
    """混淆矩阵。"""
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (labels, guesses), 1)
    side = max(4.2, 0.48 * len(names))
    figure, axes = new_figure(size=(side + 0.6, side))
    confusion_matrix(axes[0, 0], counts, names)
    return figure


def mistakes_figure(data: Data, outputs: Tensor) -> Figure | None:
    """测试集里错得最自信的样本：题注为「真实 -> 预测（概率）」。没有错分则为 ``None``。"""
    images, labels, names = data.splits["test"]
    probability, guesses = outputs.softmax(dim=1).max(dim=1)
    wrong = (guesses != labels).nonzero().flatten()
    if len(wrong) == 0:
        return None
    order = wrong[probability[wrong].argsort(descending=True)][:GALLERY]
    titles = [f"{names[labels[i]]}→{names[guesses[i]]} {probability[i]:.2f}" for i in order]
    title = f"most confident mistakes ({len(wrong)} of {len(labels)} test images)"
    long = max(map(len, titles)) > 10
    return image_grid(
        images[order].numpy(),
        titles,
        columns=6 if long else 8,
        cell=1.5 if long else 1.0,
        title=title,
    )


def training_figures(
    history: Sequence[dict[str, float]], chance: float, outputs: Tensor, data: Data
) -> dict[str, Figure]:
    """``train.py`` 的全部图，``文件名 -> Figure``。"""
    labels = data.splits["test"].labels.numpy()
    drawn = {
        "history.png": history_figure(history, chance),
        "confusion.png": confusion_figure(labels, outputs.argmax(dim=1).numpy(), data.class_names),
    }
    mistakes = mistakes_figure(data, outputs)
    return drawn | ({"mistakes.png": mistakes} if mistakes else {})


def kernels_figure(kernels: Sequence[int], curves: Mapping[str, Sequence[float]]) -> Figure:
    """三种卷积的前向用时随核的边长怎样变，双对数轴。"""
    figure, axes = new_figure(size=(5.6, 3.6))
    plot_curves(
        axes[0, 0],
        curves,
        x=kernels,
        xlabel="kernel size",
        ylabel="forward time (ms)",
        title="convolution cost, 16 × 32 channels × 32 × 32",
        log_y=True,
    )
    axes[0, 0].set_xticks(kernels)
    return figure
