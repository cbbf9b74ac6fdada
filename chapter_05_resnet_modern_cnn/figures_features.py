"""``features.py`` 的图：准确率随标签数的变化、特征的投影、Grad-CAM。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from utils.plot import MUTED, PALETTE, new_figure

# 做法 -> (颜色, 线型)；对照用虚线或灰
LOOKS = {
    "fine-tuning": (PALETTE[1], "-"),
    "linear probe": (PALETTE[0], "-"),
    "head by SGD": (PALETTE[5], "--"),
    "kNN": (PALETTE[2], "-"),
    "from scratch": (PALETTE[6], "-"),
    "pixels": (PALETTE[3], "--"),
    "random backbone": ("#9CA3AF", "-"),
}


def accuracy_figure(
    budgets: Sequence[int], table: Mapping[str, Mapping[str, Sequence]], chance: float
) -> Figure:
    """左：测试准确率随每类标签数的变化（对数轴）；右：标签最多时，每次要花的秒数。"""
    figure, grid = new_figure(1, 2, size=(10.4, 4.2), width_ratios=[1.35, 1])
    left, right = grid[0]
    left.set_xscale("log")
    for name, (color, style) in LOOKS.items():
        if name not in table:
            continue
        row = table[name]
        y = 100 * np.array(row["mean"])
        spread = 100 * np.array([s or 0 for s in row["std"]])
        left.errorbar(
            budgets, y, yerr=spread, fmt=f"o{style}", color=color, label=name, capsize=2.5,
            markersize=4, elinewidth=1,
        )  # fmt: skip
    left.axhline(100 * chance, color=MUTED, linestyle=":", linewidth=1)
    left.annotate(
        "chance", (budgets[-1], 100 * chance), xytext=(0, -11), textcoords="offset points",
        ha="right", fontsize=8, color=MUTED,
    )  # fmt: skip
    left.set_xticks(budgets, [str(n) for n in budgets])
    left.minorticks_off()
    left.set(xlabel="labels per class", ylabel="test accuracy (%)", ylim=(0, 101))
    left.set_title("what a few labels buy")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=7)
    names = sorted(table, key=lambda name: table[name]["seconds"][-1], reverse=True)
    seconds = [table[name]["seconds"][-1] for name in names]
    right.barh(names, seconds, color=[LOOKS[name][0] for name in names], height=0.6, log=True)
    for index, (name, value) in enumerate(zip(names, seconds, strict=True)):
        text = f" {value:.2g} s, {100 * table[name]['mean'][-1]:.1f}%"
        right.text(value, index, text, va="center", fontsize=8.5)
    right.set_xlim(min(seconds) / 3, max(seconds) * 40)
    right.grid(axis="y", visible=False)
    right.set(xlabel="seconds per fit")
    right.set_title(f"cost and accuracy, {budgets[-1]} labels per class")
    return figure


def projection_figure(
    projections: Mapping[str, np.ndarray], labels: np.ndarray, names: Sequence[str]
) -> Figure:
    """每个网络一幅：特征的前两个主成分，颜色是类别，各类的中心写着名字。"""
    labels = np.asarray(labels)
    colors = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"]
    figure, grid = new_figure(1, len(projections), size=(4.1 * len(projections), 4.3))
    for axes, (title, points) in zip(grid[0], projections.items(), strict=True):
        points = np.asarray(points)
        axes.scatter(
            *points.T, c=labels, cmap=colors, vmin=-0.5, vmax=colors.N - 0.5, s=9, alpha=0.55,
            linewidths=0,
        )  # fmt: skip
        for label in np.unique(labels):
            centre = np.median(points[labels == label], axis=0)
            axes.text(
                *centre, names[label], color="white", fontsize=9, fontweight="bold", ha="center",
                va="center",
                bbox={"boxstyle": "circle,pad=0.15", "fc": colors(label % colors.N), "ec": "white"},
            )  # fmt: skip
        axes.set(xticks=[], yticks=[], xlabel="PC 1", ylabel="PC 2")
        axes.set_title(title, fontsize=10)
        axes.grid(False)
    return figure


def cam_figure(
    pictures: np.ndarray, names: Sequence[str], heats: Mapping[str, np.ndarray]
) -> Figure:
    """每类一列：原图，与各层的 Grad-CAM 盖在变灰的原图上。"""
    rows = 1 + len(heats)
    figure, grid = new_figure(rows, len(pictures), size=(1.05 * len(pictures) + 0.5, 1.1 * rows))
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        for side in axes.spines.values():
            side.set_visible(False)
    for column, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        grid[0, column].imshow(picture, interpolation="nearest")
        grid[0, column].set_title(name, fontsize=9, fontweight="normal", pad=3)
        for axes, heat in zip(grid[1:, column], heats.values(), strict=True):
            axes.imshow(picture.mean(axis=2), cmap="gray", vmin=-0.3, vmax=1.3)
            level = heat[column] / max(heat[column].max(), 1e-12)
            axes.imshow(level, cmap="inferno", vmin=0, vmax=1, alpha=0.25 + 0.6 * level)
    for axes, label in zip(grid[:, 0], ("input", *heats), strict=True):
        axes.set_ylabel(label, fontsize=9)
    return figure
