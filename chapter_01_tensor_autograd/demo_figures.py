"""demo.py 各专题的图：接受数组，返回 ``Figure``；不训练，不读写文件。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from utils.plot import DIVERGING, MUTED, PALETTE, new_figure, plot_curves

# 布局图里画哪几个
LAYOUTS = ("x", "x.T", "x[:, ::2]", "x[:1].expand(3, 4)", "x.T.reshape(2, 6)")


def layouts_figure(views: Mapping[str, torch.Tensor]) -> Figure:
    """每个视图一格：颜色与数字是元素在 ``x`` 的内存里的位置。"""
    widths = [y.shape[1] + 1.6 for y in views.values()]
    figure, grid = new_figure(1, len(views), size=(0.46 * sum(widths), 2.7), width_ratios=widths)
    colors = matplotlib.colormaps["viridis"]
    for axes, (name, y) in zip(grid[0], views.items(), strict=True):
        values = y.numpy()
        rows, columns = values.shape
        axes.imshow(values, cmap=colors, vmin=0, vmax=11)
        for (i, j), value in np.ndenumerate(values):
            color = "white" if value < 7 else "black"
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=color, fontsize=9)
        shared = name != "x.T.reshape(2, 6)"
        note = f"stride {y.stride()}\n" + ("same memory" if shared else "a copy")
        axes.set(title=name, xticks=[], yticks=[], xlim=(-1.3, columns + 0.3), ylim=(3.6, -0.5))
        axes.text((columns - 1) / 2, rows - 0.2, note, ha="center", va="top", fontsize=9)
        axes.grid(False)
        for side in axes.spines.values():
            side.set_visible(False)
    return figure


def scalar_figure(
    losses: Sequence[float], scores: np.ndarray, points: np.ndarray, labels: np.ndarray
) -> Figure:
    """左：训练损失；右：决策边界（黑线）与得分。"""
    figure, grid = new_figure(1, 2, size=(9.2, 3.4))
    plot_curves(
        grid[0, 0], {"loss": losses}, xlabel="step", ylabel="hinge loss", title="scalar engine"
    )
    axes, extent = grid[0, 1], (-1.6, 2.6, -1.2, 1.7)
    axes.imshow(scores, origin="lower", extent=extent, cmap=DIVERGING, vmin=-6, vmax=6,
                aspect="auto", alpha=0.7)  # fmt: skip
    axes.contour(scores, [0], extent=extent, colors="black", linewidths=1.4)
    for label, color in enumerate(PALETTE[:2]):
        axes.scatter(*points[labels == label].T, s=14, color=color, edgecolors="white", lw=0.4)
    axes.set(title="decision boundary", xlabel="$x_1$", ylabel="$x_2$")
    axes.grid(False)
    return figure


def steps_figure(steps: np.ndarray, curves: Mapping[str, np.ndarray]) -> Figure:
    """差分的误差随步长：右边是截断误差，左边是舍入误差。"""
    figure, grid = new_figure(1, 1, size=(7.4, 4.0))
    axes = grid[0, 0]
    for name, errors in curves.items():
        axes.plot(steps, np.clip(errors, 1e-17, None), label=name)
        if "complex" not in name:
            best = int(errors.argmin())
            axes.plot(steps[best], errors[best], "o", color=axes.lines[-1].get_color(), ms=5)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="step $h$",
        ylabel="relative error of the derivative",
        ylim=(1e-17, 10),
        title="rounding error on the left, truncation error on the right",
    )
    axes.legend(loc="lower right")
    return figure


def modes_figure(rows: Sequence[tuple[int, int, float, float]]) -> Figure:
    """同样大小的雅可比矩阵，逐行与逐列的时间随形状的变化。"""
    figure, grid = new_figure(1, 1, size=(7.0, 3.6))
    axes = grid[0, 0]
    positions = range(len(rows))
    axes.plot(positions, [1e3 * r[2] for r in rows], "o-", label="reverse mode, $m$ rows")
    axes.plot(positions, [1e3 * r[3] for r in rows], "o-", label="forward mode, $n$ columns")
    axes.set_xticks(list(positions), [f"{n}→{m}" for n, m, *_ in rows])
    axes.set(yscale="log", xlabel="inputs → outputs", ylabel="milliseconds",
             title="full Jacobian, $m\\times n$ fixed")  # fmt: skip
    axes.legend()
    return figure


def newton_figure(
    newton: np.ndarray, descent: np.ndarray, values: Mapping[str, Sequence[float]]
) -> Figure:
    """左：Rosenbrock 的等高线与两条轨迹；右：函数值随步数。"""
    figure, grid = new_figure(1, 2, size=(10.0, 4.2))
    axes = grid[0, 0]
    x, y = np.meshgrid(np.linspace(-1.7, 1.7, 200), np.linspace(-3.4, 2.2, 300))
    surface = (1 - x) ** 2 + 100 * (y - x**2) ** 2
    levels = np.logspace(-1, 3.3, 14)
    axes.contourf(x, y, surface, levels, norm=matplotlib.colors.LogNorm(), cmap="Blues_r",
                  alpha=0.65, extend="both")  # fmt: skip
    axes.plot(*descent.T, color=PALETTE[1], linewidth=2.4, label="gradient descent")
    axes.plot(*newton.T, "o-", color="black", markersize=4, linewidth=1.2, label="Newton")
    axes.plot(1, 1, "*", color=PALETTE[4], markersize=14)
    axes.set(xlabel="$x_0$", ylabel="$x_1$", ylim=(-3.4, 2.2), title="Rosenbrock")
    axes.legend(loc="lower left")
    axes.grid(False)
    axes = grid[0, 1]
    for (name, series), color in zip(values.items(), ("black", PALETTE[1]), strict=True):
        shown = np.array(series)[np.array(series) > 0]  # 恰为 0 的画不到对数轴上，写在旁边
        axes.plot(shown, "o-" if name == "newton" else "-", color=color, markersize=4, label=name)
        if len(shown) < len(series):
            axes.annotate(f"exactly 0 at step {len(shown)}", (len(shown) - 1, shown[-1]), (8, -2),
                          textcoords="offset points", fontsize=9)  # fmt: skip
    axes.set_xscale("symlog", linthresh=1)
    axes.set(yscale="log", xlim=(-0.1, None), xlabel="step", ylabel="$f$", title="convergence")
    axes.legend()
    return figure


def higher_figure(x: np.ndarray, curves: Sequence[np.ndarray]) -> Figure:
    """tanh 与它的各阶导数，各自除以最大值。"""
    figure, grid = new_figure(1, 1, size=(7.2, 3.6))
    names = [r"$\tanh x$", *(rf"$\tanh^{{({k})}} x$" for k in range(1, len(curves)))]
    scaled = {name: curve / np.abs(curve).max() for name, curve in zip(names, curves, strict=True)}
    title = "derivatives of tanh, each scaled to a maximum of 1"
    plot_curves(grid[0, 0], scaled, x=x, xlabel="$x$", title=title)
    grid[0, 0].legend(ncols=2, fontsize=8, loc="lower right")
    return figure


def binary_figure(curves: Mapping[str, Sequence[float]]) -> Figure:
    """二值激活的网络：直通估计学得动，照实求导只有最后一层在学。"""
    figure, grid = new_figure(1, 1, size=(6.6, 3.4))
    title = "hidden activations in {−1, +1}"
    plot_curves(
        grid[0, 0],
        curves,
        xlabel="step",
        ylabel="loss (nats)",
        title=title,
        references={r"$\ln 2$ (chance)": float(np.log(2))},
    )
    return figure


def checkpoint_figure(rows: Sequence[tuple[int, float, float]], layers: int) -> Figure:
    """左：激活的峰值随段数，与公式；右：一步的时间。"""
    figure, grid = new_figure(1, 2, size=(9.6, 3.5))
    segments = np.array([row[0] for row in rows], dtype=float)
    peaks = np.array([row[1] for row in rows])
    fine = np.geomspace(1, layers, 100)
    per_layer = peaks[0] / layers  # 一层的全部激活
    per_input = per_layer / 3  # 层间的那一个：Linear、GELU 的输入与 dropout 掩码，共三份
    formula = fine * per_input + layers / fine * per_layer
    axes = grid[0, 0]
    axes.plot(fine, formula, "--", color=MUTED, linewidth=1.2, label="$k$ inputs + $n/k$ layers")
    axes.plot(segments, peaks, "o", color=PALETTE[0], label="measured")
    axes.set(xscale="log", yscale="log", xlabel="segments $k$", ylabel="peak activations (MiB)",
             title=f"memory, $n={layers}$ layers")  # fmt: skip
    axes.legend()
    axes = grid[0, 1]
    times = np.array([row[2] for row in rows]) / rows[0][2]
    axes.plot(segments, times, "o", color=PALETTE[1], label="measured")
    axes.plot(fine, (4 - 1 / fine) / 3, "--", color=MUTED, linewidth=1.2, label="$(4-1/k)/3$")
    axes.set(xscale="log", xlabel="segments $k$", ylabel="time of a step / plain", ylim=(0.9, 1.7),
             title="time")  # fmt: skip
    axes.legend(loc="upper left")
    for axes in grid[0]:
        axes.set_xticks(segments, [f"{k:.0f}" for k in segments])
        axes.minorticks_off()
    ticks = [2.0**k for k in range(-9, 12) if peaks.min() / 2 < 2.0**k < 2 * peaks.max()]
    grid[0, 0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    return figure
