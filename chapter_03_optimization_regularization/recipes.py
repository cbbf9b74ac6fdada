"""一次训练的全部选择，与一个公平的比较。

本文件教什么：比较方法之前，先把「还要调什么」与「怎样算赢」说清楚。``Recipe`` 是一次训练的全部
选择；``Arm`` 是参加比较的一方，它自己还有一个旋钮（多为学习率）要调；``compare`` 给每一方同样多的
候选值，只看验证集挑选，最后才看一次测试集。
对应 README 的「怎样公平地比较」一节。
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from chapter_02_nn_basics_mlp.losses import cross_entropy
from chapter_03_optimization_regularization.averaging import EarlyStopping
from chapter_03_optimization_regularization.data import Task
from chapter_03_optimization_regularization.schedulers import LRScheduler


def plain_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """交叉熵，nats。"""
    return cross_entropy(model(x), y)


@dataclass
class Recipe:
    """一次训练的全部选择。

    参数:
        model: 被训练的网络。
        optimizer: 本章的优化器。
        schedule: 学习率调度，每步走一次。
        loss: 训练损失 ``(model, x, y) -> 标量``；标签平滑、mixup、惩罚项都写在这里。
        after_step: 每步更新之后做的事：近端算子、权重平均。
        evaluated: 评估时所用的网络；权重平均时不是 ``model`` 本身。
        stopper: 早停；``None`` 表示走完。
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = plain_loss
    after_step: Callable[[], None] | None = None
    evaluated: nn.Module | None = None
    stopper: EarlyStopping | None = None

    @property
    def watched(self) -> nn.Module:
        """评估所用的网络。"""
        return self.evaluated or self.model


@dataclass
class Run:
    """一次训练的结果；错误率在 0 与 1 之间，损失以 nats 计。"""

    knob: float
    seed: int
    recipe: Recipe
    curve: list[tuple[int, float]]  # (步数, 验证损失)
    val_loss: float
    val_error: float
    test_error: float = math.nan
    seconds: float = math.nan  # 这一次训练的墙钟时间，含途中的验证


class Arm(NamedTuple):
    """参加比较的一方。

    ``build(task, knob, steps, seed, device)`` 给出旋钮取 ``knob`` 时的 ``Recipe``，``steps`` 是总步
    数；``batch_size`` 为 ``None`` 时用实验的批大小。
    """

    name: str
    knobs: tuple[float, ...]
    build: Callable[[Task, float, int, int, torch.device], Recipe]
    batch_size: int | None = None


class Comparison(NamedTuple):
    """一方的全部运行，与验证集选中的旋钮。"""

    arm: Arm
    runs: list[Run]
    knob: float
    tuning: dict[float, float]  # 各个旋钮在挑选时的平均验证损失；补跑的种子不算在内

    @property
    def chosen(self) -> list[Run]:
        """选中的旋钮的各个种子。"""
        return [run for run in self.runs if run.knob == self.knob]

    def test_errors(self) -> list[float]:
        """选中的旋钮的测试错误率，按种子的次序。"""
        return [run.test_error for run in self.chosen]

    def at_edge(self) -> bool:
        """选中的是否在候选值的边上：那样的话，更好的可能还在外面。只有两个候选值时无所谓边。"""
        return len(self.arm.knobs) > 2 and self.knob in (self.arm.knobs[0], self.arm.knobs[-1])


def compare(
    arms: Sequence[Arm],
    run_once: Callable[[Arm, float, int], Run],
    seeds: Sequence[int],
    tune_seeds: int,
    key: Callable[[Run], float],
) -> list[Comparison]:
    """每一方：各个旋钮先用 ``tune_seeds`` 个种子训练，按验证指标选一个，再补齐其余的种子。

    参数:
        run_once: ``(arm, knob, seed) -> Run``，做一次训练；不得看测试集。
        key: 选择所看的验证指标，越小越好；nan 与 inf 算最差。
    """

    def score(runs: list[Run]) -> float:
        if not all(math.isfinite(run.val_loss) for run in runs):
            return math.inf  # 只看错误率会上当：全是 nan 的输出，argmax 是第 0 类
        return statistics.fmean(key(run) for run in runs)

    total = sum(len(arm.knobs) * tune_seeds + len(seeds) - tune_seeds for arm in arms)
    done = []
    with tqdm(total=total, desc="训练", unit="次") as bar:
        for arm in arms:
            bar.set_postfix_str(arm.name)
            tried: dict[float, list[Run]] = {}
            for knob in arm.knobs:
                for seed in seeds[:tune_seeds]:
                    tried.setdefault(knob, []).append(run_once(arm, knob, seed))
                    bar.update()
            scores = {knob: score(runs) for knob, runs in tried.items()}
            tuning = {
                knob: statistics.fmean(run.val_loss for run in runs) for knob, runs in tried.items()
            }
            best = min(scores, key=scores.__getitem__)
            for seed in seeds[tune_seeds:]:
                tried[best].append(run_once(arm, best, seed))
                bar.update()
            runs = [run for group in tried.values() for run in group]
            done.append(Comparison(arm, runs, best, tuning))
    return done


def standard_error(values: Sequence[float]) -> float:
    """均值的标准误 ``s/√n``；只有一个时没有。"""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def mean_and_error(values: Sequence[float], style: str = ".2f") -> str:
    """``均值 ± 标准误``；只有一个值时没有标准误，写成 ``—``。

    ``style`` 是均值的格式，小数点之前的符号与宽度不用于标准误。
    """
    error = standard_error(values)
    shown = "—" if math.isnan(error) else f"{error:{style[style.index('.') :]}}"
    return f"{statistics.fmean(values):{style}} ± {shown}"


def steps_to_reach(curve: Sequence[tuple[int, float]], target: float) -> float:
    """验证损失第一次不高于 ``target`` 的步数，两次评估之间线性内插；始终没有则为 inf。"""
    previous: tuple[int, float] | None = None
    for step, loss in curve:
        if loss <= target:
            if previous is None or not math.isfinite(previous[1]):
                return step
            share = (previous[1] - target) / (previous[1] - loss)
            return previous[0] + share * (step - previous[0])
        previous = (step, loss)
    return math.inf
