"""demo.py 里梯度噪声、低精度、Muon、混合各专题的图：接受数组，返回 ``Figure``。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.plot import MUTED, PALETTE, new_figure


def noise_figure(
    sizes: Sequence[int],
    variances: Sequence[float],
    exact: float,
    steps: Sequence[int],
    scales: Sequence[float],
    losses: Sequence[float],
) -> Figure:
    """左：梯度的方差对批大小；右：训练中的噪声尺度与损失。"""
    figure, grid = new_figure(1, 2, size=(9.4, 3.5))
    axes = grid[0, 0]
    axes.plot(sizes, exact / np.asarray(sizes), "--", color=MUTED, label=r"$\mathrm{tr}\,\Sigma/B$")
    axes.plot(sizes, variances, "o", color=PALETTE[0], label="measured")
    axes.set(title="variance of the batch gradient", xlabel="batch size $B$")
    axes.set(xscale="log", yscale="log")
    axes.legend()
    axes = grid[0, 1]
    axes.plot(steps, scales, "o-", color=PALETTE[0], markersize=3)
    axes.set(title="along training", xlabel="step", yscale="log")
    axes.set_ylabel("gradient noise scale", color=PALETTE[0])
    right = axes.twinx()
    right.plot(steps, losses, color=PALETTE[1])
    right.set_ylabel("training loss (nats)", color=PALETTE[1])
    right.grid(False)
    right.spines["right"].set_visible(True)
    return figure


def _draw_range(axes: Axes) -> None:
    """fp16 的三段：下溢成 0，次正规数，正规数。"""
    axes.axvspan(-60, -25, color="#FDE2E2", zorder=0)  # 小于最小次正规数的一半
    axes.axvspan(-25, -14, color="#FEF3C7", zorder=0)
    axes.axvspan(-14, 16, color="#DCFCE7", zorder=0)
    for position, text in ((-33, "underflow"), (-19.5, "subnormal"), (-6, "normal")):
        axes.text(position, 0.97, text, transform=axes.get_xaxis_transform(), fontsize=8,
                  color=MUTED, ha="center", va="top")  # fmt: skip


def precision_figure(
    log_gradients: np.ndarray, scale: float, curves: Mapping[str, Sequence[float]]
) -> Figure:
    """左：梯度的大小与 fp16 的范围；右：各种精度的训练损失。"""
    figure, grid = new_figure(1, 2, size=(10.6, 3.8))
    axes, bins = grid[0, 0], np.arange(-46, 4)
    _draw_range(axes)
    axes.hist(log_gradients, bins, color=PALETTE[1], alpha=0.75, label="gradients")
    shifted = log_gradients + np.log2(scale)
    label = rf"times $2^{{{np.log2(scale):.0f}}}$"
    axes.hist(shifted, bins, color=PALETTE[0], alpha=0.75, label=label)
    axes.set(title="gradients against the range of fp16", xlim=(-44, 2))
    axes.set_ylim(top=1.13 * axes.get_ylim()[1])  # 给三段的名字留出一行
    axes.set(xlabel=r"$\log_2 |g|$", ylabel="count")
    axes.legend(loc="center right")
    axes = grid[0, 1]
    styles = ("-", "-", "--", "--", "-")
    for index, (name, losses) in enumerate(curves.items()):
        axes.plot(losses, styles[index], color=PALETTE[index], label=name, linewidth=1.5)
    axes.set(title="training loss", xlabel="step", ylabel="nats", yscale="log")
    axes.legend()
    return figure


def muon_figure(
    sigma: np.ndarray,
    maps: Mapping[int, Sequence[float]],
    before: np.ndarray,
    after: np.ndarray,
) -> Figure:
    """左：迭代若干次之后的奇异值；右：一个动量矩阵的奇异值，正交化之前与之后。"""
    figure, grid = new_figure(1, 2, size=(9.6, 3.6))
    axes = grid[0, 0]
    axes.axhspan(0.7, 1.2, color="#E5E7EB", zorder=0)
    for index, (steps, values) in enumerate(maps.items()):
        axes.plot(
            sigma, values, color=PALETTE[index], label=f"{steps} iteration" + "s" * (steps > 1)
        )
    axes.set(title="Newton-Schulz map", xlabel=r"$\sigma$ before", ylabel=r"$\sigma$ after")
    axes.set_xscale("log")
    axes.legend()
    axes, order = grid[0, 1], np.arange(1, len(before) + 1)
    axes.plot(
        order, before / before[0], color=PALETTE[1], label="momentum, relative to the largest"
    )
    axes.plot(order, after, color=PALETTE[0], label="orthogonalized")
    axes.set(title="singular values of one momentum matrix", xlabel="index", yscale="log")
    axes.legend(loc="lower left")
    return figure


def mixing_figure(rows: Mapping[str, tuple[np.ndarray, Sequence[str]]]) -> Figure:
    """每种混合一行；标题是软标签。"""
    columns = len(next(iter(rows.values()))[0])
    figure, grid = new_figure(len(rows), columns, size=(1.25 * columns, 1.6 * len(rows)))
    for line, (name, (images, titles)) in zip(grid, rows.items(), strict=True):
        for axes, image, title in zip(line, images, titles, strict=True):
            axes.imshow(image[0], cmap="gray", vmin=0, vmax=1)
            axes.set_title(title, fontsize=7.5, fontweight="normal", pad=3)
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
        line[0].set_ylabel(name, fontweight="bold")
    return figure
