"""demo.py 里归一化各专题的图：接受数组，返回 ``Figure``；不训练，不读写文件。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from utils.plot import MUTED, PALETTE, new_figure, plot_curves

IDLE, LINKED, TARGET = "#E5E7EB", "#7DB4DC", PALETTE[1]

# ---------------------------------------------------------------- 谁与谁共用统计量


def _draw_elements(axes: Axes, linked: np.ndarray, index: Sequence[int]) -> None:
    """一行一个样本，一块一个通道，块内一格一个位置：(N, C, L) 的每个元素都看得见。"""
    cells, colors = [], []
    for (n, c, position), flag in np.ndenumerate(linked):
        x = c * (linked.shape[2] + 0.8) + position
        cells.append(Rectangle((x + 0.06, n + 0.06), 0.88, 0.88))
        colors.append(TARGET if (n, c, position) == tuple(index) else LINKED if flag else IDLE)
    axes.add_collection(PatchCollection(cells, facecolors=colors, linewidths=0))
    samples, channels, length = linked.shape
    pitch = length + 0.8
    axes.set(xlim=(-0.3, channels * pitch - 0.5), ylim=(samples + 0.15, -0.15), aspect="equal")
    axes.set_xticks(
        [c * pitch + length / 2 for c in range(channels)], [f"$c={c}$" for c in range(channels)]
    )
    axes.set_yticks(np.arange(samples) + 0.5, [f"$n={n}$" for n in range(samples)])
    axes.tick_params(length=0)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def axes_figure(maps: Mapping[str, Tensor], index: Sequence[int]) -> Figure:
    """每种归一化一格：橙色是一个输出的位置，蓝色是它还取决于的输入（由梯度量出）。"""
    columns = 2
    figure, grid = new_figure(len(maps) // columns, columns, size=(9.6, 4.1))
    for axes, (name, linked) in zip(grid.flat, maps.items(), strict=True):
        _draw_elements(axes, linked.numpy(), index)
        count = int(linked.sum())
        axes.set_title(f"{name}:  {count} of {linked.numel()}", fontsize=10, loc="left")
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in (TARGET, LINKED, IDLE)]
    labels = [
        r"the output $y_{ncl}$ (and its own input)",
        r"inputs with $\partial y_{ncl}/\partial x_j\neq 0$",
        "no influence",
    ]
    figure.legend(handles, labels, loc="outside lower center", ncol=3)
    return figure


# ---------------------------------------------------------------- 批的大小


def batch_figure(batches: Sequence[int], errors: Mapping[str, Sequence[Tensor]]) -> Figure:
    """验证错误率对批的大小；误差棒是各种子的标准差。"""
    figure, grid = new_figure(1, 1, size=(6.4, 4.0))
    axes = grid[0, 0]
    colors = dict(
        zip(("BatchNorm", "GroupNorm", "LayerNorm", "none"), [*PALETTE[:3], MUTED], strict=True)
    )
    for name, row in errors.items():
        means = [100 * e.mean().item() for e in row]
        spreads = [100 * e.std().item() for e in row]
        again = name not in colors
        axes.errorbar(
            batches,
            means,
            spreads,
            color=colors["BatchNorm"] if again else colors[name],
            linestyle=":" if again else "-",
            marker="o",
            markersize=4,
            markerfacecolor="white" if again else None,
            capsize=3,
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(b) for b in batches])
    axes.set(
        xlabel=r"batch size (learning rate $\propto$ batch size)",
        ylabel="validation error (%)",
        title="same samples seen, one epoch",
        ylim=(0, None),
    )
    axes.legend(loc="upper center")
    return figure


# ---------------------------------------------------------------- 训练与推理


class ModePanels(NamedTuple):
    """四格的数据。"""

    batches: Sequence[int]
    company: Sequence[Tensor]  # 每个批大小：同一样本与各种同伴一起时的概率
    alone: float  # 写了 eval() 时的概率
    wrong: Mapping[str, Sequence[float]]  # 忘了 eval() 的错误率
    right: float  # 写了 eval() 的错误率
    variances: Sequence[tuple[float, float]]  # (无偏, 有偏)
    warmup: Mapping[str, Sequence[float]]  # 滑动均值的相对误差


def _draw_company(axes: Axes, panels: ModePanels) -> None:
    axes.boxplot(
        [c.numpy() for c in panels.company],
        whis=(5, 95),
        showfliers=False,
        widths=0.5,
        patch_artist=True,
        boxprops={"facecolor": LINKED, "edgecolor": PALETTE[0]},
        whiskerprops={"color": PALETTE[0]},
        capprops={"color": PALETTE[0]},
        medianprops={"color": "black"},
    )
    axes.set_xticks(range(1, len(panels.batches) + 1), [str(b) for b in panels.batches])
    axes.axhline(panels.alone, color=PALETTE[1], linestyle="--", linewidth=1.4, label="eval()")
    axes.set(
        title="(a) one image among random companions",
        xlabel="batch size",
        ylabel="probability of its class",
        ylim=(0, 1.1),
    )
    axes.legend(loc="upper right")


def _draw_variance(axes: Axes, panels: ModePanels) -> None:
    n = np.geomspace(min(panels.batches), max(panels.batches), 100)
    axes.plot(n, (n - 1) / n, color=MUTED, linewidth=1, label="$(n-1)/n$")
    for column, (label, marker) in enumerate([("times $n/(n-1)$", "o"), ("biased", "s")]):
        axes.plot(panels.batches, [v[column] for v in panels.variances], marker, label=label)
    axes.set(title="(c) running variance, true value 1", xlabel="batch size $n$", ylim=(0.4, 1.1))
    axes.legend(loc="lower right")


def _draw_warmup(axes: Axes, panels: ModePanels) -> None:
    plot_curves(axes, panels.warmup, xlabel="training steps", log_y=True)
    steps = np.arange(1, len(panels.warmup["m = 0.1"]) + 1)
    for m in (0.1, 0.01):
        axes.plot(steps, (1 - m) ** steps, color="#CBD5E1", linewidth=5, zorder=1)
    axes.annotate("gray: $(1-m)^t$", (24, 0.12), color=MUTED, fontsize=9)
    axes.set(title="(d) running mean: relative error", ylim=(1e-3, 1.5))
    axes.legend(loc="lower left")


def modes_figure(panels: ModePanels) -> Figure:
    """训练与推理不一致的四种来源。"""
    figure, grid = new_figure(2, 2, size=(9.6, 6.6))
    _draw_company(grid[0, 0], panels)
    plot_curves(
        grid[0, 1],
        {name: [100 * e for e in row] for name, row in panels.wrong.items()},
        x=panels.batches,
        xlabel="batch size",
        ylabel="validation error (%)",
        title="(b) eval() forgotten",
        references={"eval() called": 100 * panels.right},
    )
    _draw_variance(grid[1, 0], panels)
    for axes in (grid[0, 1], grid[1, 0]):
        axes.set_xscale("log", base=2)
        axes.set_xticks(panels.batches, [str(b) for b in panels.batches])
    _draw_warmup(grid[1, 1], panels)
    return figure


# ---------------------------------------------------------------- 手推的反向


def backward_figure(
    pieces: Sequence[np.ndarray], runs: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> Figure:
    """左：∂ℓ/∂x 是 ĝ 对 x̂ 回归的残差；中、右：把统计量当常数，参数一直涨，损失却不降。"""
    x_hat, g_hat, gradient = pieces
    figure, grid = new_figure(1, 3, size=(11.4, 3.6))
    axes = grid[0, 0]
    order = np.argsort(x_hat)
    fit = g_hat - gradient  # 均值 + 斜率 · x̂
    axes.vlines(x_hat, fit, g_hat, color=PALETTE[1], linewidth=1.6, label="residual $= s\\,g_x$")
    axes.plot(x_hat[order], fit[order], color=MUTED, linewidth=1.2, label="least-squares fit")
    axes.plot(x_hat, g_hat, "o", color=PALETTE[0], markersize=5, label=r"$\hat g$ per sample")
    axes.set(xlabel=r"$\hat x$", ylabel=r"$\hat g$", title="the gradient is a residual")
    axes.set_ylim(g_hat.min() - 0.15, g_hat.max() + 0.75)
    axes.legend(fontsize=8, loc="upper center", ncol=2, handlelength=1.2)
    labels = {"true gradient": "true gradient", "frozen": r"$\mu,\sigma^2$ held constant"}
    for column, title in enumerate(["loss", r"norm of $(W, b)$"]):
        curves = {labels[name]: run[column] for name, run in runs.items()}
        plot_curves(grid[0, column + 1], curves, xlabel="step", title=title)
    return figure
