"""train.py 与 benchmark.py 的图：接受数组，返回 ``Figure``；不训练，不读写文件。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from utils.plot import MUTED, PALETTE, heatmap, new_figure

Curve = tuple[Sequence[float], np.ndarray]  # (步数, 种子 × 步数 的验证损失)
Sweep = tuple[Sequence[float], Sequence[float], float]  # (旋钮, 验证损失, 选中的旋钮)
Sweeps = Mapping[str, Sweep]
STYLES = ("-", "--", ":")  # 七种颜色用完之后换线型


def _style(index: int) -> dict[str, str]:
    return {
        "color": PALETTE[index % len(PALETTE)],
        "linestyle": STYLES[index // len(PALETTE) % len(STYLES)],
    }


def log_axis(axes: Axes) -> None:
    """对数的纵轴，刻度写成 0.2、0.5、1，而不是 2×10⁻¹。"""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_sweeps(
    axes: Axes,
    sweeps: Sweeps,
    xlabel: str,
    top: float,
) -> None:
    """每一方的验证损失对旋钮；发散的（超过 ``top``、nan）画在顶上，选中的是实心点。"""
    for index, (name, (knobs, losses, chosen)) in enumerate(sweeps.items()):
        values = np.nan_to_num(np.asarray(losses, dtype=float), nan=np.inf).clip(max=top)
        axes.plot(knobs, values, label=name, linewidth=1.3, **_style(index))
        best = values[list(knobs).index(chosen)]
        axes.plot(chosen, best, "o", color=_style(index)["color"], markersize=5)
    axes.set(xlabel=xlabel, ylabel="validation loss (nats)", xscale="log")
    log_axis(axes)


def draw_curves(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """验证损失对步数：线是各种子的均值，带是最小到最大。"""
    for index, (name, (steps, losses)) in enumerate(curves.items()):
        losses = np.asarray(losses, dtype=float)
        axes.plot(steps, losses.mean(axis=0), label=name, linewidth=1.4, **_style(index))
        low, high = losses.min(axis=0), losses.max(axis=0)
        axes.fill_between(steps, low, high, color=_style(index)["color"], alpha=0.12, linewidth=0)
    axes.set(xlabel="step", ylabel="validation loss (nats)")
    log_axis(axes)


def draw_errors(axes: Axes, errors: Mapping[str, Sequence[float]], floor: float | None) -> None:
    """测试错误率：点是各种子，横线是均值 ± 标准误；按均值由好到差排列。"""
    order = sorted(errors, key=lambda name: float(np.mean(errors[name])))
    for row, name in enumerate(order):
        values = 100 * np.asarray(errors[name], dtype=float)
        spread = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0
        color = _style(list(errors).index(name))["color"]
        axes.plot(values, [row] * len(values), "o", color=color, markersize=3, alpha=0.35)
        axes.errorbar(
            values.mean(), row, xerr=spread, fmt="D", color=color, markersize=5, capsize=3
        )
    if floor is not None:
        axes.axvline(100 * floor, color=MUTED, linestyle="--", linewidth=1)
        axes.annotate(
            "Bayes", (100 * floor, 0), xytext=(4, 0), textcoords="offset points",
            fontsize=8, color=MUTED, va="center",
        )  # fmt: skip
    axes.set_yticks(range(len(order)), order)
    axes.invert_yaxis()
    axes.set(xlabel="test error (%), mean ± s.e.")
    axes.grid(axis="y", visible=False)


def comparison_figure(
    sweeps: Sweeps,
    curves: Mapping[str, Curve],
    errors: Mapping[str, Sequence[float]],
    top: float,
) -> Figure:
    """一个比较的三面：调旋钮的过程、选中之后的曲线、测试错误率。"""
    figure, grid = new_figure(1, 3, size=(13.5, 4.3))
    draw_sweeps(grid[0, 0], sweeps, "learning rate", top)
    grid[0, 0].set_title("tuning: same budget for everyone")
    draw_curves(grid[0, 1], curves)
    grid[0, 1].set_title("at the chosen learning rate")
    draw_errors(grid[0, 2], errors, None)
    grid[0, 2].set_title("test error")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7)
    return figure


def schedules_figure(
    shapes: Mapping[str, Sequence[float]],
    curves: Mapping[str, Curve],
    errors: Mapping[str, Sequence[float]],
    range_test: tuple[Sequence[float], Sequence[float]],
    chosen: float,
) -> Figure:
    """学习率的形状（相对于峰值）、验证曲线、测试错误率、范围测试。"""
    figure, grid = new_figure(2, 2, size=(11.5, 7.4))
    for index, (name, factors) in enumerate(shapes.items()):
        grid[0, 0].plot(np.asarray(factors) / max(factors), label=name, **_style(index))
    grid[0, 0].set(title="schedules", xlabel="step", ylabel="learning rate / peak")
    draw_curves(grid[0, 1], curves)
    grid[0, 1].set_title("at the chosen peak")
    draw_errors(grid[1, 0], errors, None)
    grid[1, 0].set_title("test error")
    lrs, losses = range_test
    grid[1, 1].plot(lrs, losses, color=PALETTE[0])
    grid[1, 1].axvline(
        chosen, color=PALETTE[1], linestyle="--", label=f"constant's tuned peak {chosen:.2g}"
    )
    grid[1, 1].set(title="learning-rate range test", xlabel="learning rate", xscale="log")
    grid[1, 1].set_ylabel("smoothed training loss (nats)")
    log_axis(grid[1, 1])
    grid[1, 1].legend()
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=8)
    return figure


def normalization_figure(
    sweeps: Sweeps,
    errors: Mapping[str, Sequence[float]],
    top: float,
) -> Figure:
    """调学习率的过程本身就是结论：普通网络与残差网络各一格，再加最好的学习率下的测试错误率。

    名字形如 ``plain|batch``、``residual|batch``。
    """
    figure, grid = new_figure(1, 3, size=(13.5, 4.3), width_ratios=(1, 1, 0.9))
    norms = list(dict.fromkeys(name.split("|")[1] for name in sweeps))
    for axes, kind in zip(grid[0], ("plain", "residual"), strict=False):
        draw_sweeps(axes, {norm: sweeps[f"{kind}|{norm}"] for norm in norms}, "learning rate", top)
        axes.set_title(f"10 layers, {kind}")
        axes.set_ylim(bottom=0.25)
    axes = grid[0, 2]
    for row, norm in enumerate(norms):
        for kind, offset, face in (("plain", -0.14, "white"), ("residual", 0.14, None)):
            values = 100 * np.asarray(errors[f"{kind}|{norm}"], dtype=float)
            spread = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0
            color = _style(row)["color"]
            axes.errorbar(
                values.mean(), row + offset, xerr=spread, fmt="o", color=color, capsize=3,
                markerfacecolor=face or color, label=kind if row == 0 else None,
            )  # fmt: skip
    axes.set_yticks(range(len(norms)), norms)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(title="at the best learning rate", xlabel="test error (%), mean ± s.e.")
    axes.legend(loc="lower right")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7)
    return figure


def regularizers_figure(
    errors: Mapping[str, Sequence[float]],
    losses: Mapping[str, Sequence[float]],
    floor: float | None,
) -> Figure:
    """正则化：测试错误率，与它相对于基准的成对差，以及验证损失。"""
    figure, grid = new_figure(1, 3, size=(13.5, 4.4), width_ratios=(1.1, 1, 1))
    draw_errors(grid[0, 0], errors, floor)
    grid[0, 0].set_title("test error")
    order = sorted(errors, key=lambda name: float(np.mean(errors[name])))
    base = np.asarray(errors["none"], dtype=float)
    for axes in grid[0, 1:]:
        axes.set_yticks(range(len(order)), [""] * len(order))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    for row, name in enumerate(order):
        difference = 100 * (np.asarray(errors[name]) - base)
        spread = 2 * difference.std(ddof=1) / np.sqrt(len(difference)) if len(base) > 1 else 0
        color = _style(list(errors).index(name))["color"]
        grid[0, 1].errorbar(
            difference.mean(), row, xerr=spread, fmt="D", color=color, markersize=5, capsize=3
        )
        grid[0, 2].barh(row, np.mean(losses[name]), color=color, height=0.6)
    grid[0, 1].axvline(0, color=MUTED, linewidth=1)
    grid[0, 1].set(title="paired difference to none", xlabel="points, ± 2 s.e.")
    grid[0, 2].set(title="validation loss", xlabel="nats")
    return figure


def batch_size_figure(
    sweeps: Mapping[int, Sweep],
    reached: Mapping[int, Sequence[Mapping[str, float]]],
    top: float,
) -> Figure:
    """批大小的四个侧面；``reached``：批大小 -> 各种子走到同一训练损失时的各项。"""
    figure, grid = new_figure(2, 2, size=(10.5, 7.4))
    named = {f"batch {size}": sweep for size, sweep in sweeps.items()}
    draw_sweeps(grid[0, 0], named, "learning rate", top)
    grid[0, 0].set_title("tuning at equal epochs")
    grid[0, 0].legend()
    sizes = np.asarray(list(sweeps))
    best = [chosen for _, _, chosen in sweeps.values()]
    axes = grid[0, 1]
    axes.plot(sizes, best, "o-", color=PALETTE[0], label="best")
    for power, style, name in ((1.0, "--", r"$\propto B$"), (0.5, ":", r"$\propto\sqrt{B}$")):
        axes.plot(sizes, best[0] * (sizes / sizes[0]) ** power, style, color=MUTED, label=name)
    axes.set(title="best learning rate", ylabel="learning rate")
    axes.set_ylim(min(best) / 2, max(best) * 12)
    _batch_axis(axes, sizes)
    log_axis(axes)
    axes.legend()
    _draw_tradeoff(grid[1, 0], sizes, reached)
    axes = grid[1, 1]
    for index, (size, rows) in enumerate(reached.items()):
        x, y = [row["sharpness"] for row in rows], [100 * row["test_error"] for row in rows]
        axes.plot(x, y, "o", color=_style(index)["color"], label=f"batch {size}")
    axes.set(title="sharpness at the same training loss", ylabel="test error (%)")
    axes.set_xlabel(r"$\lambda_{\max}$ of the training loss")
    axes.legend()
    return figure


def _batch_axis(axes: Axes, sizes: np.ndarray) -> None:
    axes.set(xlabel="batch size", xscale="log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()


def _draw_tradeoff(
    axes: Axes, sizes: np.ndarray, reached: Mapping[int, Sequence[Mapping[str, float]]]
) -> None:
    """走到同一训练损失：步数随批大小下降，样本数上升。"""
    for key, color, label in (("steps", PALETTE[0], "steps"), ("samples", PALETTE[1], "samples")):
        values = [[row[key] for row in rows] for rows in reached.values()]
        axes.plot(sizes, [np.mean(v) for v in values], "o-", color=color, label=label)
        for size, each in zip(sizes, values, strict=True):
            axes.plot([size] * len(each), each, ".", color=color, alpha=0.4)
    axes.set(title="to the same training loss", ylabel="count", yscale="log")
    _batch_axis(axes, sizes)
    axes.legend()


def initialization_figure(
    accuracy: Mapping[str, np.ndarray], inits: Sequence[str], depths: Sequence[int]
) -> Figure:
    """每种归一化一张热图：行为初始化，列为深度，值为验证准确率（%）。"""
    figure, grid = new_figure(1, len(accuracy), size=(3.1 * len(accuracy), 3.2), sharey=True)
    for axes, (norm, values) in zip(grid[0], accuracy.items(), strict=True):
        heatmap(
            axes, 100 * values, x_labels=[str(d) for d in depths], y_labels=inits,
            xlabel="depth", title=f"norm: {norm}", text=".0f", limits=(10, 100),
        )  # fmt: skip
    grid[0, 0].set_ylabel("initialization")
    figure.suptitle(
        "validation accuracy (%) after two epochs, best of two learning rates", fontsize=11
    )
    return figure


# ---------------------------------------------------------------- benchmark.py


def step_time_figure(seconds: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """各种写法走一步的毫秒数；``seconds``：优化器 -> 写法 -> 各次的秒数。"""
    figure, grid = new_figure(1, len(seconds), size=(5.2 * len(seconds), 2.9), sharex=True)
    for axes, (title, ways) in zip(grid[0], seconds.items(), strict=True):
        for row, (name, values) in enumerate(ways.items()):
            color = PALETTE[0] if name.startswith("ours") else PALETTE[1]
            median = 1e3 * float(np.median(values))
            axes.barh(row, median, color=color, height=0.62)
            axes.annotate(
                f"{median:.1f} ms", (median, row), xytext=(5, 0),
                textcoords="offset points", va="center", fontsize=8,
            )  # fmt: skip
        axes.set_yticks(range(len(ways)), list(ways))
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set(title=title, xlabel="ms per step, median")
        axes.grid(axis="y", visible=False)
    return figure
