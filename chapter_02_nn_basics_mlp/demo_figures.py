"""demo.py 各专题的图：接受数组，返回 ``Figure``；不训练，不读写文件。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from utils.plot import MUTED, PALETTE, new_figure, plot_curves


def activations_figure(x: np.ndarray, curves: Mapping[str, tuple[Any, Any]]) -> Figure:
    """各激活函数（左）与导数（右）。"""
    figure, grid = new_figure(1, 2, size=(9.6, 3.6))
    for (name, (value, prime)), color in zip(curves.items(), PALETTE * 2, strict=False):
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
    grid[0, 0].legend(fontsize=8, loc="center right")
    return figure


def construct_figure(panels: Sequence[tuple[float, int, Any]], function: Any) -> Figure:
    """构造性证明：每格一个 ε，虚线是 ±ε 的带子。"""
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
    figure, grid = new_figure(1, 2, size=(9.6, 3.4))
    x = torch.linspace(0, 1, 1025, dtype=torch.float64).unsqueeze(1)
    for index, network in enumerate(networks):
        values = network(x).detach().numpy().ravel() + 1.25 * index
        grid[0, 0].plot(x.numpy().ravel(), values, label=f"depth {index + 1}")
    top = 1.25 * len(networks) + 0.5  # 上方留给图例
    grid[0, 0].set(title="tent map composed with itself", xlabel="x", yticks=[], ylim=(-0.1, top))
    grid[0, 0].legend(fontsize=8, loc="upper center", ncol=4, handlelength=1)
    units = [2 * depth for depth in depths]
    grid[0, 1].semilogy(units, deep, marker="o", label="deep, 2 units a layer: $2^k$")
    grid[0, 1].semilogy(units, shallow, marker="s", label="one hidden layer: at most $n+1$")
    grid[0, 1].set(title="linear pieces", xlabel="hidden units $n$", xticks=units[1::2])
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
        axes.legend(loc="upper right", ncol=2)
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
    grid[0, 1].set_xticks(sizes, [str(size) for size in sizes])
    grid[0, 1].minorticks_off()
    grid[0, 0].set_xticks(range(2, max(degrees) + 1, 4))
    return figure


def descent_figure(
    widths: Sequence[int], train: Sequence[float], test: Sequence[float], samples: int
) -> Figure:
    """双下降：测试误差在插值门槛处冲高，之后再次下降。"""
    figure, grid = new_figure(1, 1, size=(5.8, 3.6))
    axes = grid[0, 0]
    axes.loglog(widths, test, marker="o", markersize=4, label="test")
    axes.loglog(widths, np.maximum(train, 1e-3), marker="s", markersize=4, label="train (≥ 1e-3)")
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
