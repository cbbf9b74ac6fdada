"""本章的图：接受数组，返回 ``Figure``；不训练，不显示，不读写文件。"""

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
        axes.imshow(probability, origin="lower", extent=extent, cmap=DIVERGING, vmin=-0.3, vmax=1.3)
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
        axes.set(title=title, xlabel="true $y$")
    grid[0, 0].set_ylabel("predicted $y$")
    return figure


# ---------------------------------------------------------------- demo.py


def activations_figure(x: np.ndarray, curves: Mapping[str, tuple[Any, Any]]) -> Figure:
    """各激活函数（左）与导数（右）。"""
    figure, grid = new_figure(1, 2, size=(9.6, 3.6))
    for (name, (value, prime)), color in zip(curves.items(), PALETTE, strict=True):
        style = "--" if name == "gelu_tanh" else "-"
        grid[0, 0].plot(x, value, style, color=color, label=name)
        grid[0, 1].plot(x, prime, style, color=color, label=name)
    grid[0, 0].set(title=r"$\varphi(x)$", xlabel="x", ylim=(-1.3, 3))
    grid[0, 1].set(title=r"$\varphi^\prime(x)$", xlabel="x", ylim=(-0.2, 1.25))
    grid[0, 0].legend(fontsize=8, loc="upper left")
    return figure


def losses_figure() -> Figure:
    """左：回归损失对误差；右：分类损失对间隔。曲线由公式直接画出。"""
    figure, grid = new_figure(1, 2, size=(9.6, 3.5))
    r, m = np.linspace(-4, 4, 401), np.linspace(-4, 4, 401)
    regression = {
        "MSE  $r^2$": r**2,
        "MAE  $|r|$": np.abs(r),
        r"Huber  $\delta=1$": np.where(np.abs(r) <= 1, r**2 / 2, np.abs(r) - 0.5),
    }
    probability = 1 / (1 + np.exp(-m))
    classification = {
        "0-1": (m <= 0).astype(float),
        "logistic (BCE)": -np.log(probability),
        "hinge": np.maximum(0, 1 - m),
        r"focal  $\gamma=2$": -((1 - probability) ** 2) * np.log(probability),
    }
    plot_curves(grid[0, 0], regression, x=r, xlabel="residual $r = p - t$", ylabel="loss")
    plot_curves(grid[0, 1], classification, x=m, xlabel="margin (positive = correct)")
    grid[0, 0].set(ylim=(0, 6), title="regression losses")
    grid[0, 1].set(ylim=(0, 4.2), title="classification losses")
    return figure


def init_figure(signals: Mapping[str, Mapping[str, tuple[Any, Any]]]) -> Figure:
    """每行一种激活：左为各层激活的均方根，右为梯度的均方根。"""
    figure, grid = new_figure(len(signals), 2, size=(9.6, 3.0 * len(signals)), sharex=True)
    for row, (activation, by_scheme) in enumerate(signals.items()):
        for scheme, (forward, backward) in by_scheme.items():
            label = scheme.replace("²", "$^2$")
            depth = range(1, len(forward) + 1)
            grid[row, 0].plot(depth, forward, marker="o", markersize=3, label=label)
            grid[row, 1].plot(depth, backward, marker="o", markersize=3, label=label)
        grid[row, 0].set(ylabel="RMS", title=f"{activation}: activations")
        grid[row, 1].set(title=f"{activation}: gradients")
        for axes in grid[row]:
            axes.set_yscale("log")
    for axes in grid[-1]:
        axes.set_xlabel("hidden layer")
    grid[0, 0].legend(fontsize=8)
    return figure


def dead_relu_figure(rates: Sequence[float], dead: Mapping[str, Sequence[float]]) -> Figure:
    """死神经元的比例对学习率。"""
    figure, grid = new_figure(1, 1, size=(5.4, 3.3))
    axes = grid[0, 0]
    for offset, (name, shares) in zip((-0.18, 0.18), dead.items(), strict=True):
        bars = axes.bar(np.arange(len(rates)) + offset, 100 * np.asarray(shares), 0.34, label=name)
        axes.bar_label(bars, fmt="%.0f%%", fontsize=8)
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set(xlabel="learning rate (SGD, momentum 0.9)", ylabel="dead units (%)", ylim=(0, 110))
    axes.legend(loc="upper left")
    return figure


def debug_figure(curves: Mapping[str, tuple[Any, Any]], ln_c: float) -> Figure:
    """背一个批：损失与梯度范数。"""
    figure, grid = new_figure(1, 2, size=(9.6, 3.4))
    for name, (losses, norms) in curves.items():
        grid[0, 0].plot(losses, label=name)
        grid[0, 1].plot(norms, label=name)
    plot_curves(
        grid[0, 0],
        {},
        xlabel="step",
        title="loss on one batch (nats)",
        log_y=True,
        references={r"$\ln 10$": ln_c},
    )
    plot_curves(grid[0, 1], {}, xlabel="step", title="gradient norm", log_y=True)
    grid[0, 0].legend(fontsize=8, loc="lower left")
    return figure


def construct_figure(panels: Sequence[tuple[float, int, Any]], function: Any) -> Figure:
    """构造性证明：每格一个 ε，虚线是 ±ε 的带子。"""
    import torch

    figure, grid = new_figure(1, len(panels), size=(3.6 * len(panels), 3.0), sharey=True)
    x = torch.linspace(-1, 1, 1001, dtype=torch.float64).unsqueeze(1)
    truth = function(x).numpy().ravel()
    for axes, (epsilon, pieces, network) in zip(grid[0], panels, strict=True):
        fitted = network(x).detach().numpy().ravel()
        across = x.numpy().ravel()
        axes.fill_between(across, truth - epsilon, truth + epsilon, color="#DBE7F3", lw=0)
        axes.plot(across, truth, color="black", linestyle=":", linewidth=1)
        axes.plot(across, fitted, color=PALETTE[1], linewidth=1.4)
        axes.set(title=rf"$\varepsilon={epsilon:g}$: {pieces} ReLUs, no training", xlabel="x")
    return figure


def width_figure(widths: Sequence[int], errors: Mapping[str, Sequence[float]]) -> Figure:
    """最大误差对宽度，双对数。"""
    figure, grid = new_figure(1, 1, size=(5.4, 3.6))
    axes = grid[0, 0]
    for name, values in errors.items():
        axes.loglog(widths, values, marker="o", markersize=4, label=name)
    guide = errors["constructed"][-1] * (widths[-1] / np.asarray(widths, dtype=float)) ** 2
    axes.loglog(widths, guide, color=MUTED, linestyle="--", linewidth=1, label=r"$\propto 1/n^2$")
    axes.set(xlabel="hidden units $n$", ylabel="max error", title=r"approximating $\sin 2\pi x$")
    axes.legend()
    return figure


def depth_figure(
    depths: Sequence[int], deep: Sequence[int], shallow: Sequence[int], networks: Sequence[Any]
) -> Figure:
    """左：头几层的锯齿；右：段数对神经元个数。"""
    import torch

    figure, grid = new_figure(1, 2, size=(9.6, 3.4))
    x = torch.linspace(0, 1, 1025, dtype=torch.float64).unsqueeze(1)
    for index, network in enumerate(networks):
        values = network(x).detach().numpy().ravel() + 1.25 * index
        grid[0, 0].plot(x.numpy().ravel(), values, label=f"depth {index + 1}")
    grid[0, 0].set(title="tent map composed with itself", xlabel="x", yticks=[])
    grid[0, 0].legend(fontsize=8, loc="upper right")
    units = [2 * depth for depth in depths]
    grid[0, 1].semilogy(units, deep, marker="o", label="deep, 2 units a layer: $2^k$")
    grid[0, 1].semilogy(units, shallow, marker="s", label="one hidden layer: at most $n+1$")
    grid[0, 1].set(title="linear pieces", xlabel="hidden units $n$")
    grid[0, 1].legend()
    return figure


def spectral_figure(
    records: Mapping[str, tuple[Sequence[int], Any]], frequencies: Sequence[int]
) -> Figure:
    """谱偏置：各频率的误差随训练步数。"""
    figure, grid = new_figure(1, len(records), size=(4.8 * len(records), 3.4), sharey=True)
    for axes, (title, (marks, errors)) in zip(grid[0], records.items(), strict=True):
        curves = {f"k = {k}": errors[:, i] for i, k in enumerate(frequencies)}
        plot_curves(axes, curves, x=marks, xlabel="step", title=title, log_y=True)
        axes.set_ylim(1e-3, 2)
    grid[0, 0].set_ylabel("relative error of the mode")
    return figure


def polynomial_figure(
    degrees: Sequence[int],
    train: Sequence[float],
    test: Sequence[float],
    chosen: int,
    sizes: Sequence[int],
    learning: Sequence[tuple[float, float]],
    floor: float,
) -> Figure:
    """左：误差对次数，竖线是验证集选中的；右：学习曲线。"""
    figure, grid = new_figure(1, 2, size=(9.6, 3.5))
    curves = {"train": train, "test": test}
    references = {"noise variance": floor}
    plot_curves(
        grid[0, 0],
        curves,
        x=degrees,
        xlabel="polynomial degree",
        ylabel="MSE",
        log_y=True,
        title="30 samples",
        references=references,
    )
    grid[0, 0].axvline(chosen, color=MUTED, linewidth=1)
    grid[0, 0].set_ylim(1e-2, 1e2)
    both = {"train": [a for a, _ in learning], "test": [b for _, b in learning]}
    plot_curves(
        grid[0, 1],
        both,
        x=sizes,
        xlabel="training samples",
        log_y=True,
        title="degree 12",
        references=references,
    )
    grid[0, 1].set(xscale="log", ylim=(1e-2, 1e2))
    return figure


def descent_figure(
    widths: Sequence[int], train: Sequence[float], test: Sequence[float], samples: int
) -> Figure:
    """双下降：测试误差在插值门槛处冲高，之后再次下降。"""
    figure, grid = new_figure(1, 1, size=(5.8, 3.6))
    axes = grid[0, 0]
    axes.loglog(widths, test, marker="o", markersize=4, label="test")
    axes.loglog(widths, np.maximum(train, 1e-3), marker="s", markersize=4, label="train")
    axes.axvline(samples, color=MUTED, linestyle="--", linewidth=1)
    axes.annotate(
        "features = samples",
        (samples, 2e-3),
        xytext=(5, 0),
        fontsize=8,
        textcoords="offset points",
        color=MUTED,
    )
    axes.set(xlabel="random ReLU features", ylabel="MSE", ylim=(1e-3, None))
    axes.legend()
    return figure
