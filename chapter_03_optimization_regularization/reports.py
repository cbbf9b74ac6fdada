"""六个实验的结论：由比较的结果得出表、图与判定。

每个 ``report_xxx(comparisons, context) -> Report``；数字都由 ``Run`` 算出，图交给 ``figures.py``。
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from chapter_02_nn_basics_mlp.losses import cross_entropy
from chapter_03_optimization_regularization import figures
from chapter_03_optimization_regularization.arms import DEPTHS, make_model
from chapter_03_optimization_regularization.data import Task
from chapter_03_optimization_regularization.experiments import DIGITS, POINTS, Experiment
from chapter_03_optimization_regularization.landscapes import sharpness
from chapter_03_optimization_regularization.networks import INITS
from chapter_03_optimization_regularization.optimizers import SGD
from chapter_03_optimization_regularization.recipes import (
    Comparison,
    mean_and_error,
    plain_loss,
    standard_error,
    steps_to_reach,
)
from chapter_03_optimization_regularization.schedulers import lr_range_test
from utils import Expectation, Result, make_generator
from utils.topics import Check


class Context(NamedTuple):
    """写结论要用到的：实验、预期、数据集、各种子的任务、种子、总步数、设备、是否 --smoke。"""

    plan: Experiment
    expectation: Expectation
    dataset: str
    task: Callable[[int], Task]
    seeds: Sequence[int]
    steps: int
    device: torch.device
    smoke: bool = False


class Report(NamedTuple):
    """一个实验的结论。"""

    figure: Figure
    results: list[Result]
    lines: list[str] = []  # 另外打印的几行
    details: dict[str, Any] = {}  # 另外写进 metrics.json 的


# ---------------------------------------------------------------- 共用


def table(comparisons: Sequence[Comparison], plan: Experiment) -> list[str]:
    """对齐的一张表：选中的旋钮、验证损失、测试错误率、相对于对照的成对差、训练一次的秒数。"""
    base = _by_name(comparisons)[plan.baseline].test_errors()
    lines = [
        f"      {'':18s} {plan.knob:>13s}  验证损失  测试错误率（%，± 标准误）"
        f"  与 {plan.baseline} 之差  一次训练的秒数"
    ]
    for c in comparisons:
        errors = [100 * error for error in c.test_errors()]
        gaps = [error - 100 * other for error, other in zip(errors, base, strict=True)]
        loss = statistics.fmean(run.val_loss for run in c.chosen)
        edge = "边" if c.at_edge() else "  "
        seconds = statistics.fmean(run.seconds for run in c.chosen)
        lines.append(
            f"      {c.arm.name:18s} {c.knob:11.3g} {edge} {loss:8.4f}"
            f"   {mean_and_error(errors, '6.2f'):14s}"
            f"         {mean_and_error(gaps, '+6.2f'):14s}  {seconds:6.2f}"
        )
    if any(c.at_edge() for c in comparisons):
        lines.append("      边：最好的在候选值的一端，更好的也许还在外面")
    return lines


def record(c: Comparison) -> dict[str, Any]:
    """写进 ``metrics.json`` 的一方：整个扫描与选中之后的各个种子。"""
    return {
        "knob": c.knob,
        "sweep": {f"{knob:.4g}": loss for knob, loss in c.tuning.items()},
        "val_loss": [run.val_loss for run in c.chosen],
        "test_error": c.test_errors(),
    }


def _sweeps(comparisons: Sequence[Comparison]) -> dict[str, figures.Sweep]:
    return {c.arm.name: (list(c.tuning), list(c.tuning.values()), c.knob) for c in comparisons}


def _curves(comparisons: Sequence[Comparison]) -> dict[str, figures.Curve]:
    curves = {}
    for c in comparisons:
        longest = max((run.curve for run in c.chosen), key=len)
        losses = np.full((len(c.chosen), len(longest)), np.nan)  # 中途发散的种子，后面空着
        for row, run in zip(losses, c.chosen, strict=True):
            row[: len(run.curve)] = [loss for _, loss in run.curve]
        curves[c.arm.name] = ([step for step, _ in longest], losses)
    return curves


def _errors(comparisons: Sequence[Comparison]) -> dict[str, list[float]]:
    return {c.arm.name: c.test_errors() for c in comparisons}


def _winner(comparisons: Sequence[Comparison], context: Context) -> Comparison:
    """验证集上最好的一方：挑选不看测试集；发散的排在最后。"""

    def score(c: Comparison) -> float:
        if not all(math.isfinite(run.val_loss) for run in c.chosen):
            return math.inf
        return statistics.fmean(context.plan.key(run) for run in c.chosen)

    return min(comparisons, key=score)


def _main_result(comparisons: Sequence[Comparison], context: Context) -> tuple[Comparison, Result]:
    """(胜者, 它的测试错误率：均值、标准差，以及对照的)。"""
    winner = _winner(comparisons, context)
    baseline = _by_name(comparisons)[context.plan.baseline]
    values = winner.test_errors()
    std = statistics.stdev(values) if len(values) > 1 else None
    against = statistics.fmean(baseline.test_errors())
    return winner, Result(context.expectation, statistics.fmean(values), std, against)


def _by_name(comparisons: Sequence[Comparison]) -> dict[str, Comparison]:
    return {c.arm.name: c for c in comparisons}


def _top(context: Context) -> float:
    """扫描图的上沿：总报均匀分布的损失 ``ln C`` 再高一点。"""
    return 1.3 * math.log(context.task(context.seeds[0]).classes)


# ---------------------------------------------------------------- 六个实验


def report_optimizers(comparisons: Sequence[Comparison], context: Context) -> Report:
    """最好的优化器；每一方走多少步达到 AdamW 的最终验证损失。"""
    named = _by_name(comparisons)
    target = statistics.fmean(run.val_loss for run in named["AdamW"].chosen)
    lines = [f"      达到 AdamW 的最终验证损失 {target:.4f}：步数（共 {context.steps} 步）与秒数"]
    ratios: dict[str, list[float]] = {}
    for name, c in named.items():
        steps = [steps_to_reach(run.curve, target) for run in c.chosen]
        ratios[name] = [s / context.steps for s in steps]
        if all(map(math.isfinite, steps)):
            pairs = zip(ratios[name], c.chosen, strict=True)
            seconds = statistics.fmean(share * run.seconds for share, run in pairs)
            lines.append(f"      {name:18s} {mean_and_error(steps, '6.0f'):12s} {seconds:6.2f} 秒")
    lines.append("      其余的没有全部达到")
    figure = figures.comparison_figure(
        _sweeps(comparisons), _curves(comparisons), _errors(comparisons), _top(context)
    )
    winner, result = _main_result(comparisons, context)
    results = [result]
    shares = [min(share, 1.0) for share in ratios["Muon"]]  # 没有达到的，算作走完全程
    check = Check("Muon 达到 AdamW 最终验证损失的步数 ÷ 总步数", 1.0, (0.6, 0.95))
    std = statistics.stdev(shares) if len(shares) > 1 else None
    results.append(Result(check, statistics.fmean(shares), std))
    return Report(figure, results, lines, {"steps_share": ratios, "winner": winner.arm.name})


def report_schedules(comparisons: Sequence[Comparison], context: Context) -> Report:
    """最好的调度；另做一次学习率范围测试。"""
    named = _by_name(comparisons)
    winner, result = _main_result(comparisons, context)
    task, shapes = context.task(context.seeds[0]), {}
    for c in comparisons:
        recipe = c.arm.build(task, 1.0, context.steps, 0, context.device)
        shapes[c.arm.name] = []
        for step in range(context.steps):
            shapes[c.arm.name].append(recipe.schedule.get_last_lr()[0])
            if step < context.steps - 1:
                recipe.schedule.step()
    model = make_model(task, context.seeds[0], context.device)
    batches = task.batches("train", 128, make_generator(0))
    tested = lr_range_test(
        model, batches, cross_entropy, SGD(model.parameters(), momentum=0.9), 1e-4, 10.0, 200
    )
    figure = figures.schedules_figure(
        shapes, _curves(comparisons), _errors(comparisons), tested, named["constant"].knob
    )
    lines = [f"      范围测试：损失最低处的学习率 {tested[0][int(np.nanargmin(tested[1]))]:.3g}"]
    return Report(figure, [result], lines, {"winner": winner.arm.name})


def _widest(c: Comparison, top: float) -> float:
    """训得动（验证损失不到 ``top`` 的一半）的最大学习率；没有则为 0。"""
    usable = [knob for knob, loss in c.tuning.items() if loss < top / 2]
    return max(usable, default=0.0)


def report_normalization(comparisons: Sequence[Comparison], context: Context) -> Report:
    """最好的归一化；各自能用的最大学习率。"""
    named, top = _by_name(comparisons), math.log(context.task(context.seeds[0]).classes)
    widest = {name: _widest(c, top) for name, c in named.items()}
    lines = ["      验证损失低于 ln C 一半的最大学习率"]
    lines += [f"      {name:18s} {lr:.3g}" for name, lr in widest.items()]
    figure = figures.normalization_figure(_sweeps(comparisons), _errors(comparisons), _top(context))
    _, result = _main_result(comparisons, context)
    results = [result]
    none = max(widest["plain|none"], min(named["plain|none"].arm.knobs))  # 都训不动时取最小的
    check = Check("无残差时能用的最大学习率：batch ÷ none", 1.0, (2.9, 100.0))
    results.append(Result(check, widest["plain|batch"] / none))
    return Report(figure, results, lines, {"widest": widest})


# 数据集 -> 手段 -> README 所说的方向：-1 降，+1 升；没有列出的不作断言
CLAIMS = {
    POINTS: dict.fromkeys(
        [
            "L1 (proximal)",
            "elastic net",
            "L2 in Adam",
            "decoupled decay",
            "dropout",
            "DropPath",
            "mixup",
            "early stopping",
            "EMA",
            "SWA",
            "SAM",
        ],
        -1,
    )
    | {"label smoothing": +1},
    DIGITS: {"decoupled decay": -1, "EMA": -1, "cutmix": +1},
}


def report_regularization(comparisons: Sequence[Comparison], context: Context) -> Report:
    """每种正则化使测试错误率变了多少，是不是两个标准误之外。"""
    named = _by_name(comparisons)
    base = named[context.plan.baseline].test_errors()
    clear, claims, errors = {}, [], _errors(comparisons)
    for name, values in errors.items():
        gaps = [a - b for a, b in zip(values, base, strict=True)]
        mean, error = statistics.fmean(gaps), standard_error(gaps)
        if name != context.plan.baseline and abs(mean) > 2 * error:
            clear[name] = mean
        sign = CLAIMS.get(context.dataset, {}).get(name)
        if sign is not None and error > 0:
            band = (2.0, 100.0) if sign > 0 else (-100.0, -2.0)
            check = Check(f"{name}：测试错误率之差 ÷ 标准误", 0.0, band)
            claims.append(Result(check, mean / error))
    shown = "、".join(f"{name} {100 * gap:+.1f}" for name, gap in clear.items())
    lines = [f"      两个标准误之外：{shown or '无'}"]
    losses = {c.arm.name: [run.val_loss for run in c.chosen] for c in comparisons}
    task = context.task(context.seeds[0])
    figure = figures.regularizers_figure(errors, losses, task.floor)
    winner, result = _main_result(comparisons, context)
    return Report(figure, [result, *claims], lines, {"winner": winner.arm.name, "clear": clear})


TARGET = 0.1  # 各批大小都训练到这个训练损失（nats），再比较锐度与测试错误率
MAX_STEPS = 20_000


def report_generalization(comparisons: Sequence[Comparison], context: Context) -> Report:
    """最好的学习率随批大小变化的幂；走到同一训练损失要多少步、多少样本，解有多尖。"""
    sizes = [c.arm.batch_size for c in comparisons]
    reached: dict[int, list[dict[str, float]]] = {}
    for c in comparisons:
        for seed in context.seeds:
            row = _train_to_target(c.arm.batch_size, c.knob / 2, seed, context)
            reached.setdefault(c.arm.batch_size, []).append(row)
    slope = float(np.polyfit(np.log(sizes), np.log([c.knob for c in comparisons]), 1)[0])
    lines = [
        f"      最好的学习率 ∝ 批大小的 {slope:.2f} 次方",
        f"      一半的学习率，不变，走到训练损失 {TARGET}：步数、样本数、锐度、测试错误率",
    ]
    base = reached[sizes[0]]
    for size, rows in reached.items():
        mean = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
        lines.append(
            f"      batch {size:<8d} {mean['steps']:8.0f} 步 {mean['samples']:9.0f} 个"
            f" {mean['sharpness']:8.2f} {100 * mean['test_error']:8.2f}%"
        )
    lines.append(f"      与 batch {sizes[0]} 成对相减：锐度、测试错误率（百分点）")
    lines += [f"      batch {size:<8d} {_gaps(reached[size], base)}" for size in sizes[1:]]
    for one, other in pairwise(comparisons):
        if one.knob == other.knob:  # 学习率相同的一对，差别只在批大小
            a, b = one.arm.batch_size, other.arm.batch_size
            lines.append(f"      batch {b} 与 {a}（学习率相同） {_gaps(reached[b], reached[a])}")
    sweeps = dict(zip(sizes, _sweeps(comparisons).values(), strict=True))
    figure = figures.batch_size_figure(sweeps, reached, _top(context))
    _, result = _main_result(comparisons, context)
    results = [
        result,
        Result(Check("最好的学习率对批大小的对数斜率", 0.0, (0.2, 1.1)), slope),
    ]
    return Report(figure, results, lines, {"reached": reached, "slope": slope})


def _gaps(rows: Sequence[dict[str, float]], base: Sequence[dict[str, float]]) -> str:
    """锐度、测试错误率（百分点）与 ``base`` 的成对差。"""
    shown = []
    for key, unit in (("sharpness", 1), ("test_error", 100)):
        gaps = [unit * (row[key] - other[key]) for row, other in zip(rows, base, strict=True)]
        shown.append(mean_and_error(gaps, "+.2f"))
    return "    ".join(shown)


def _train_to_target(batch_size: int, lr: float, seed: int, context: Context) -> dict[str, float]:
    """常数学习率的 SGD，直到整个训练集上的损失不超过 ``TARGET``（至多 ``MAX_STEPS`` 步）。"""
    task = context.task(seed)
    model, generator = make_model(task, seed, context.device), make_generator(seed)
    optimizer, train = SGD(model.parameters(), lr=lr), next(iter(task.batches("train", 10**6)))
    limit, taken, seen, loss = 5 if context.smoke else MAX_STEPS, 0, 0, math.inf
    every = max(1, 512 // batch_size)  # 大约每 512 个样本看一次全体的损失
    with tqdm(total=limit, desc=f"批 {batch_size}", unit="步", leave=False) as bar:
        while taken < limit and loss > TARGET:  # 发散成 nan 也在此停下
            for x, y in task.batches("train", batch_size, generator):
                optimizer.zero_grad()
                plain_loss(model, x, y).backward()
                optimizer.step()
                taken, seen = taken + 1, seen + len(y)
                bar.update()
                if taken % every == 0 or taken == limit:
                    with torch.no_grad():
                        loss = plain_loss(model, *train).item()
                    if taken == limit or not loss > TARGET:
                        break
    return {
        "steps": float(taken),
        "samples": float(seen),
        "train_loss": loss,
        "sharpness": _sharpness(model, train, seed),
        "test_error": _test_error(model, task),
    }


def _sharpness(model: nn.Module, train: tuple[Tensor, Tensor], seed: int) -> float:
    """训练损失的 ``λ_max``；发散了就没有锐度可言。"""
    parameters = list(model.parameters())
    if not all(p.isfinite().all() for p in parameters):
        return math.nan
    return sharpness(lambda: plain_loss(model, *train), parameters, make_generator(seed))


@torch.no_grad()
def _test_error(model: nn.Module, task: Task) -> float:
    x, y = next(iter(task.batches("test", 10**6)))
    return (model(x).argmax(dim=-1) != y).float().mean().item()


def report_initialization(comparisons: Sequence[Comparison], context: Context) -> Report:
    """初始化 × 归一化 × 深度的热图。"""
    accuracy: dict[str, np.ndarray] = {}
    for c in comparisons:
        init, norm, depth = c.arm.name.split("|")
        cells = accuracy.setdefault(norm, np.full((len(INITS), len(DEPTHS)), np.nan))
        value = 1 - statistics.fmean(run.val_error for run in c.chosen)
        cells[list(INITS).index(init), DEPTHS.index(int(depth))] = value
    figure = figures.initialization_figure(accuracy, list(INITS), DEPTHS)
    chance = 1 - context.task(context.seeds[0]).chance
    usable = {norm: int((cells > 2 * chance).sum()) for norm, cells in accuracy.items()}
    cells = len(INITS) * len(DEPTHS)
    lines = [f"      验证准确率高于机会线两倍的格子（共 {cells} 个）"]
    lines += [f"      {norm:18s} {count}" for norm, count in usable.items()]
    _, result = _main_result(comparisons, context)
    results = [
        result,
        Result(
            Check("训得动的组合：batch − none，格", 0.0, (2.0, cells)),
            usable["batch"] - usable["none"],
        ),
    ]
    return Report(figure, results, lines, {"usable": usable})


REPORTS = {
    "optimizers": report_optimizers,
    "schedules": report_schedules,
    "normalization": report_normalization,
    "regularization": report_regularization,
    "generalization": report_generalization,
    "initialization": report_initialization,
}
