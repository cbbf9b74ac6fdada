"""demo.py 各专题的图：接受数组，返回 ``Figure``；不训练，不读写文件。"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.plot import DIVERGING, MUTED, PALETTE, heatmap, new_figure, plot_curves


def show(axes: Axes, picture: np.ndarray, title: str = "", **options: object) -> None:
    """不带坐标轴的一张小图。"""
    axes.imshow(picture, **({"cmap": "gray", "interpolation": "nearest"} | options))
    axes.set_title(title, fontsize=9)
    axes.axis("off")


def error_bars(
    axes: Axes, groups: Sequence[str], bars: Mapping[str, Sequence[Sequence[float]]]
) -> None:
    """分组的柱：高是平均，点是各个种子；单位 %。"""
    width = 0.8 / len(bars)
    for index, (name, values) in enumerate(bars.items()):
        places = np.arange(len(groups)) + (index - (len(bars) - 1) / 2) * width
        means = [100 * statistics.mean(v) for v in values]
        axes.bar(places, means, 0.9 * width, color=PALETTE[index], alpha=0.85, label=name)
        for place, mean, runs in zip(places, means, values, strict=True):
            axes.plot([place] * len(runs), 100 * np.array(runs), "o", color="black", markersize=3)
            axes.annotate(
                f"{mean:.1f}",
                (place, max(100 * max(runs), mean)),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel("test accuracy (%)")
    axes.grid(axis="x", visible=False)


def edge_figure(
    pictures: Sequence[np.ndarray], runs: Mapping[str, tuple[np.ndarray, list[float], float]]
) -> Figure:
    """上：输入、目标、学到的输出、学到的核；下：误差随步数的下降与理论的斜率。"""
    figure = new_figure(1, 1, size=(9.6, 5.4))[0]
    figure.clear()
    cells = figure.add_gridspec(2, 4, height_ratios=[1, 1.25])
    limit = max(abs(pictures[1]).max(), 1e-9)
    titles = ("input", "target: Sobel edges", "output of the learned kernel")
    for index, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        options = {} if index == 0 else {"cmap": DIVERGING, "vmin": -limit, "vmax": limit}
        show(figure.add_subplot(cells[0, index]), picture, title, **options)
    axes = figure.add_subplot(cells[0, 3])
    kernel = runs["digits"][0]
    heatmap(axes, kernel.round(3) + 0.0, text=".3f", colormap=DIVERGING, limits=(-2, 2))
    axes.set(xticks=[], yticks=[], aspect="equal")
    axes.set_title("learned kernel", fontsize=9)
    axes = figure.add_subplot(cells[1, :])
    for index, (name, (_, errors, condition)) in enumerate(runs.items()):
        steps = np.arange(1, len(errors) + 1)
        color = PALETTE[index]
        axes.plot(steps, errors, color=color, label=rf"{name} ($\kappa={condition:.3g}$)")
        rate = (condition - 1) / (condition + 1)
        theory = np.maximum(math.sqrt(12) * rate**steps, 1e-17)
        axes.plot(steps, theory, "--", color=color, linewidth=1)
    axes.plot(
        [],
        [],
        "--",
        color=MUTED,
        linewidth=1,
        label=r"bound $\Vert w^*\Vert\,((\kappa-1)/(\kappa+1))^t$",
    )
    axes.axhline(1e-3, color=MUTED, linewidth=1, linestyle=":")
    axes.set(xlabel="gradient step", ylabel="max |kernel - Sobel|", xscale="log", yscale="log")
    axes.set_ylim(1e-16, 5)
    axes.legend(loc="lower left")
    return figure


def equivariance_figure(
    gaps: Mapping[str, Sequence[float]],
    shifts: Sequence[int],
    curves: Mapping[str, Sequence[float]],
    pictures: tuple[np.ndarray, np.ndarray],
) -> Figure:
    """左：各种层等变的相对差；右：准确率随平移的变化，嵌入原图与移了 4 像素的图。"""
    figure, grid = new_figure(1, 2, size=(10.4, 4.0), width_ratios=[1, 1.15])
    axes, places = grid[0, 0], np.arange(len(gaps))
    for index, label in enumerate(("shift by 1 px", "shift by 2 px")):
        values = [max(pair[index], 1e-17) for pair in gaps.values()]
        axes.barh(
            places + (index - 0.5) * 0.38,
            values,
            0.34,
            left=1e-17,
            color=PALETTE[index],
            label=label,
        )
    axes.set(xscale="log", xlim=(1e-17, 10), xlabel="relative difference", yticks=places)
    axes.set_yticklabels(gaps)
    axes.invert_yaxis()
    axes.axvspan(1e-17, 1e-14, color="#E5E7EB", alpha=0.6, zorder=0)
    axes.text(2e-16, len(gaps) - 0.45, "rounding", fontsize=8, color=MUTED, ha="center")
    axes.set_title("layer(shift(x)) vs shift(layer(x))")
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper right", fontsize=8)
    axes = grid[0, 1]
    percent = {name: [100 * v for v in values] for name, values in curves.items()}
    plot_curves(
        axes,
        percent,
        x=shifts,
        xlabel="test images shifted right by (px)",
        ylabel="test accuracy (%)",
        title="trained on digits within 1.5 px of the centre",
    )
    axes.axhline(10, color=MUTED, linestyle="--", linewidth=1)
    axes.text(0, 11, "chance", fontsize=8, color=MUTED, va="bottom")
    for line in axes.lines[: len(curves)]:
        line.set_marker("o")
    axes.set(ylim=(0, 128), yticks=range(0, 101, 20))
    axes.legend(loc="upper center", ncols=2)
    for place, picture, title in ((0.04, pictures[0], "0 px"), (0.22, pictures[1], "4 px")):
        inset = axes.inset_axes((place, 0.17, 0.16, 0.22))
        show(inset, picture, title)
    return figure


def shuffled_figure(
    pair: tuple[np.ndarray, np.ndarray], scores: Mapping[tuple[str, bool], Sequence[float]]
) -> Figure:
    """左：一张图与它打乱之后；右：两种网络在原图与打乱的图上的准确率。"""
    figure, grid = new_figure(1, 3, size=(9.6, 3.2), width_ratios=[1, 1, 1.8])
    show(grid[0, 0], pair[0], "original")
    show(grid[0, 1], pair[1], "pixels permuted")
    names = list(dict.fromkeys(name for name, _ in scores))
    bars = {
        label: [scores[name, shuffled] for name in names]
        for label, shuffled in (("original", False), ("shuffled", True))
    }
    error_bars(grid[0, 2], names, bars)
    grid[0, 2].set(ylim=(0, 119), title="does the network care?", yticks=range(0, 101, 20))
    grid[0, 2].legend(ncols=2, loc="upper center")
    return figure


def ablation_figure(
    pictures: np.ndarray, scores: Mapping[tuple[bool, bool], Sequence[float]]
) -> Figure:
    """左：一张图与七个增强的样子；右：四种组合的准确率。"""
    figure = new_figure(1, 1, size=(9.6, 3.4))[0]
    figure.clear()
    left, right = figure.subfigures(1, 2, width_ratios=[1.25, 1])
    grid = left.subplots(2, 4)
    for index, (axes, picture) in enumerate(zip(grid.flat, pictures, strict=True)):
        show(axes, picture, "original" if index == 0 else "")
    left.suptitle("random rotation and shift", fontsize=11, fontweight="bold")
    axes = right.subplots()
    bars = {
        label: [scores[augment, norm] for augment in (False, True)]
        for label, norm in (("no BatchNorm", False), ("BatchNorm", True))
    }
    error_bars(axes, ["no augmentation", "augmentation"], bars)
    low = 100 * min(min(v) for v in scores.values())
    axes.set(ylim=(max(0, low - 10), 104), title="few labels, 3 seeds")
    axes.legend(ncols=2, loc="upper left", fontsize=8)
    return figure
