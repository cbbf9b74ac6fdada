"""正则化、权重平均与校准各专题的图：接受数组，返回 ``Figure``；不训练，不读写文件。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from utils.plot import MUTED, PALETTE, SEQUENTIAL, new_figure

# ---------------------------------------------------------------- 稀疏


def sparsity_figure(
    strengths: Sequence[float],
    paths: Mapping[str, np.ndarray],
    support: int,
    exact: Any,
    naive: Any,
) -> Figure:
    """三种正则的路径，与近端、次梯度两种解法各个权重的大小。"""
    figure, grid = new_figure(2, 2, size=(9.6, 6.4))
    for axes, (name, path) in zip(grid.flat, paths.items(), strict=False):
        axes.semilogx(strengths, path[:, support:], color="#CBD5E1", linewidth=0.9)
        axes.semilogx(strengths, path[:, 2:support], color=PALETTE[0], linewidth=1.6)
        axes.semilogx(strengths, path[:, :2], color=PALETTE[1], linewidth=1.8)
        axes.set(title=f"{name} path", xlabel=r"strength $\lambda$ (log scale)", ylim=(-1.35, 2.3))
        axes.invert_xaxis()
    handles = [
        axes.plot([], [], color=color, label=label)[0]
        for color, label in (
            (PALETTE[1], "relevant, near-duplicates"),
            (PALETTE[0], "relevant"),
            ("#CBD5E1", "irrelevant"),
        )
    ]
    grid[0, 0].legend(handles=handles, fontsize=8, loc="upper left")
    grid[0, 0].set_ylabel("weight")
    grid[1, 0].set_ylabel("weight")
    axes, floor = grid[1, 1], 3e-7
    order = np.arange(len(exact))
    for values, marker, label, offset in (
        (naive, "o", "subgradient of $|w|$", -0.15),
        (exact, "s", "proximal step", 0.15),
    ):
        heights = np.maximum(np.abs(np.asarray(values)), floor)
        axes.semilogy(order + offset, heights, marker, markersize=4, linestyle="", label=label)
    axes.axhline(floor, color=MUTED, linewidth=0.8, linestyle=":")
    axes.text(len(exact) - 0.5, floor * 1.5, "exactly 0", color=MUTED, fontsize=8, ha="right")
    axes.axvline(support - 0.5, color=MUTED, linewidth=0.8)
    axes.set(title=r"$|w|$ after training, L1", xlabel="feature", ylim=(1e-7, 30))
    axes.legend(loc="upper right", fontsize=8, ncol=2, handletextpad=0.2)
    return figure


# ---------------------------------------------------------------- 衰减


def decay_figure(
    scales: Any,
    rates: Mapping[str, Any],
    curves: Mapping[str, Any],
    shown: tuple[int, ...],
    decay: float,
) -> Figure:
    """左：相对衰减率对梯度的尺度；右：几个尺度下权重的平均值随步数。"""
    figure, grid = new_figure(1, 2, size=(9.6, 3.5))
    markers = {"SGD + L2": "^", "Adam + L2": "o", "AdamW": "s"}
    colors = dict(zip(markers, (MUTED, PALETTE[1], PALETTE[0]), strict=True))
    for name, rate in rates.items():
        style = {"marker": markers[name], "color": colors[name], "linestyle": ""}
        if name == "SGD + L2":  # 与 AdamW 重合，画大而空，才都看得见
            style |= {"markersize": 10, "markerfacecolor": "none"}
        grid[0, 0].loglog(scales, rate, label=name, **({"markersize": 4.5} | style))
    theory = 1 / np.sqrt(np.asarray(scales) ** 2 + decay**2)
    grid[0, 0].loglog(scales, theory, "--", color=PALETTE[1], linewidth=1, zorder=1)
    grid[0, 0].axhline(1, color=PALETTE[0], linestyle="--", linewidth=1, zorder=1)
    grid[0, 0].annotate(
        r"theory $1/\sqrt{\sigma^2+\alpha^2}$", (8, 0.16), fontsize=9, color=PALETTE[1]
    )
    grid[0, 0].set(
        title="how fast a weight decays",
        xlabel=r"gradient standard deviation $\sigma$",
        ylabel=r"decay rate $/\,(\eta\alpha)$",
    )
    grid[0, 0].legend(loc="lower left")
    for index, style in zip(shown, (":", "-", "--"), strict=True):
        label = rf"Adam + L2, $\sigma={scales[index].item():.2g}$"
        line = curves["Adam + L2"][:, index]
        grid[0, 1].plot(line, style, color=colors["Adam + L2"], label=label)
    label, line = r"AdamW, every $\sigma$", curves["AdamW"][:, shown[0]]
    grid[0, 1].plot(line, color=colors["AdamW"], label=label, linewidth=4, alpha=0.5)
    grid[0, 1].set(title="average weight, noise-only gradients", xlabel="step")
    grid[0, 1].legend(loc="lower left")
    return figure


# ---------------------------------------------------------------- Dropout


def dropout_figure(
    rates: Sequence[float],
    inverted: Sequence[float],
    plain: Sequence[float],
    shift: Sequence[float],
    counts: Sequence[int],
    gaps: Mapping[str, Sequence[float]],
) -> Figure:
    """左：评估与训练的激活之比；中：批归一化的方差偏移；右：集成与缩放的网络之差。"""
    figure, grid = new_figure(1, 3, size=(12, 3.5))
    p = np.linspace(0, 0.8, 81)
    axes = grid[0, 0]
    axes.plot(rates, plain, "o", color=PALETTE[1], markersize=5, label="mask only")
    axes.plot(p, 1 / (1 - p), "--", color=PALETTE[1], linewidth=1, label="$1/(1-p)$")
    axes.plot(rates, inverted, "s", color=PALETTE[0], markersize=5, label="inverted")
    axes.set(title="mean activation, eval / train", xlabel="drop probability $p$")
    axes.legend()
    axes = grid[0, 1]
    mean2, second = 1 / (2 * np.pi), 0.5  # ReLU(N(0, 1))：E[x]² 与 E[x²]
    axes.plot(rates, shift, "o", color=PALETTE[2], markersize=5, label="measured")
    theory = (second - mean2) / (second / (1 - p) - mean2)
    axes.plot(p, theory, "--", color=PALETTE[2], linewidth=1, label="theory")
    axes.set(
        title="variance, eval / remembered by BN", xlabel="drop probability $p$", ylim=(0, 1.08)
    )
    axes.legend()
    axes = grid[0, 2]
    for name, values in gaps.items():
        axes.loglog(counts, values, marker="o", markersize=4, label=name)
    guide = gaps["geometric mean"][-1] * np.sqrt(counts[-1] / np.asarray(counts, dtype=float))
    axes.loglog(counts, guide, "--", color=MUTED, linewidth=1, label=r"$\propto 1/\sqrt{k}$")
    axes.set(title="gap to the weight-scaled net", xlabel="masks averaged $k$")
    axes.legend(fontsize=8)
    return figure


# ---------------------------------------------------------------- 梯度裁剪


def clipping_figure(
    w: Any,
    u: Any,
    surface: Any,
    runs: Mapping[str, Mapping[str, Sequence]],
    teacher: tuple[float, float],
) -> Figure:
    """左：损失面与三条轨迹；右：损失随步数。"""
    figure, grid = new_figure(1, 2, size=(9.6, 3.9), width_ratios=[1.25, 1])
    axes = grid[0, 0]
    levels = np.linspace(-3, 7, 21)
    filled = axes.contourf(
        w, u, np.log10(np.maximum(surface, 1e-4)), levels, cmap=SEQUENTIAL, extend="both"
    )
    bar = figure.colorbar(filled, ax=axes, ticks=[-2, 0, 2, 4, 6])
    bar.ax.set_title(r"$\log_{10}$ loss", fontsize=8, fontweight="normal")
    bar.outline.set_visible(False)
    colors = {"no clipping": "#F87171", "by norm": "white", "by value": PALETTE[4]}
    for name, run in runs.items():
        path = np.asarray(run["path"])
        if name == "no clipping":
            step = path[1] - path[0]
            target = path[0] + 0.35 * step / np.abs(step).max()
            arrow = {"arrowstyle": "-|>", "color": colors[name], "lw": 1.8}
            axes.annotate("", xy=target, xytext=path[0], arrowprops=arrow)
            axes.text(0.78, -1.2, "one step: off the map", color="white", fontsize=9)
        else:
            axes.plot(*path.T, color=colors[name], linewidth=1.8, label=name)
    axes.plot(*teacher, "*", color="white", markersize=13, markeredgecolor="black")
    axes.plot(*runs["by norm"]["path"][0], "o", color="white", markeredgecolor="black")
    axes.set(xlim=(w[0], w[-1]), ylim=(u[0], u[-1]), xlabel="$w$", ylabel="$u$")
    axes.set_title(r"$h_t = w\,h_{t-1} + u\,x_t$, 20 steps")
    axes.grid(False)
    axes.legend(loc="upper right", labelcolor="white", fontsize=9)
    axes = grid[0, 1]
    for (name, run), color in zip(runs.items(), (PALETTE[1], PALETTE[0], PALETTE[4]), strict=True):
        loss = np.asarray(run["loss"], dtype=float)
        finite = np.isfinite(loss)
        steps = np.arange(1, len(loss) + 1)
        label = name if finite.all() else f"{name}: overflow at step {steps[~finite][0]}"
        marker = None if finite.all() else "X"
        axes.semilogy(steps[finite], loss[finite], color=color, label=label, marker=marker)
    axes.set(title="training loss", xlabel="step", ylabel="loss", ylim=(1e-4, 1e10))
    axes.legend()
    return figure


# ---------------------------------------------------------------- 权重平均


def averaging_figure(
    variances: Mapping[str, Any],
    levels: Mapping[str, float],
    counts: Sequence[int],
    swa_theory: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    bayes: float,
) -> Figure:
    """左：二次函数上各种平均的方差随步数；右：小网络的验证损失随轮次。"""
    figure, grid = new_figure(1, 2, size=(9.6, 3.7))
    axes = grid[0, 0]
    for (name, values), color in zip(variances.items(), PALETTE, strict=False):
        steps = np.arange(1, len(values) + 1)
        axes.loglog(steps, values, color=color, label=name, linewidth=1.4)
        if name in levels:
            axes.axhline(levels[name], color=color, linestyle="--", linewidth=0.9)
    axes.loglog(counts, swa_theory, "o", color="black", markersize=4, label="theory, SWA")
    axes.set(title=r"noisy quadratic: variance of $w$", xlabel="step", xlim=(1, counts[-1]))
    axes.legend(fontsize=8, loc="lower left")
    axes = grid[0, 1]
    for name, color in (("SGD", PALETTE[0]), ("EMA", PALETTE[1]), ("SWA", PALETTE[3])):
        values = curves[name]
        axes.plot(range(1, len(values) + 1), values, color=color, label=name)
    axes.axhline(bayes, color=MUTED, linestyle="--", linewidth=1, label="Bayes")
    axes.set(title="two moons: validation NLL (nats)", xlabel="epoch")
    axes.legend(fontsize=8, ncol=2)
    return figure


# ---------------------------------------------------------------- 校准


def calibration_figure(
    scores: Mapping[str, tuple[float, float, float, Any]],
    maps: Mapping[str, Any],
    extent: tuple[float, float, float, float],
    x: Any,
    y: Any,
) -> Figure:
    """上：各方法的可靠性图；下：平面上的置信度与不确定性，点是训练样本。"""
    figure, grid = new_figure(2, len(maps), size=(14, 6.0))
    for axes, (name, (_, error, nll, bins)) in zip(grid[0], scores.items(), strict=True):
        confidence, accuracy, count = (np.asarray(part) for part in bins)
        used = count >= 10  # 样本太少的格子只有噪声
        centres = (np.arange(len(count))[used] + 0.5) / len(count)
        width = 0.9 / len(count)
        low, high = np.minimum(accuracy, confidence)[used], np.maximum(accuracy, confidence)[used]
        over = (confidence > accuracy)[used]
        axes.bar(centres, low, width, color=PALETTE[0], label="accuracy")
        for flag, color, label in (
            (over, "#F2B28C", "overconfident"),
            (~over, PALETTE[2], "under"),
        ):
            gap = np.where(flag, high - low, 0)  # 准确率与置信度之间的一段，颜色说明谁高
            axes.bar(centres, gap, width, low, color=color, label=label)
        axes.plot([0.5, 1], [0.5, 1], "--", color=MUTED, linewidth=1)
        axes.set(title=name, xlim=(0.48, 1.02), ylim=(0.4, 1.02), xlabel="confidence")
        axes.text(0.5, 0.93, f"ECE {error:.3f}\nNLL {nll:.3f}", fontsize=9, va="center")
    grid[0, 0].set_ylabel("accuracy")
    grid[0, -1].legend(fontsize=8, loc=(0.01, 0.5))
    limits = {"confidence": (0.5, 1.0), "entropy": (0, np.log(2)), "information": (0, 0.25)}
    for axes, (name, values) in zip(grid[1], maps.items(), strict=True):
        low, high = limits[name.split()[-1]]
        colormap = SEQUENTIAL if name.endswith("confidence") else "magma"
        style = {"cmap": colormap, "vmin": low, "vmax": high, "origin": "lower"}
        image = axes.imshow(values, extent=extent, aspect="auto", **style)
        for label, marker in ((0, "o"), (1, "^")):
            axes.plot(*np.asarray(x)[np.asarray(y) == label].T, marker, color="white", ms=1.6)
        axes.set(title=name, xticks=[], yticks=[], xlim=extent[:2], ylim=extent[2:])
        axes.title.set_fontsize(9.5)
        axes.grid(False)
        figure.colorbar(image, ax=axes, orientation="horizontal", pad=0.04, aspect=25)
    return figure
