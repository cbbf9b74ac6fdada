"""参加比较的各方（一）：优化器、调度、归一化与初始化、批大小。

每一方是一个 ``Arm``：怎样由旋钮（学习率）造出一次训练的全部选择。候选值的个数在一个实验里处处相同。
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from chapter_03_optimization_regularization import schedulers as sched
from chapter_03_optimization_regularization.data import Task
from chapter_03_optimization_regularization.networks import INITS, NORMS, BlockMLP
from chapter_03_optimization_regularization.optimizers import SGD, Adadelta, Adagrad, RMSprop
from chapter_03_optimization_regularization.optimizers_adam import (
    Adafactor,
    Adam,
    AdamW,
    Lion,
    NAdam,
)
from chapter_03_optimization_regularization.optimizers_modern import (
    Muon,
    ScheduleFreeAdamW,
    muon_groups,
)
from chapter_03_optimization_regularization.recipes import Arm, Recipe
from utils import make_generator


def make_model(
    task: Task,
    seed: int,
    device: torch.device | str = "cpu",
    width: int = 128,
    depth: int = 2,
    **options,
) -> BlockMLP:
    """由种子决定初值的网络。"""
    sizes = (task.in_features, width, depth, task.classes)
    return BlockMLP(*sizes, generator=make_generator(seed), **options).to(device)


def grid(center: float, count: int = 5, ratio: float = 3.0) -> tuple[float, ...]:
    """以 ``center`` 为中心的等比的 ``count`` 个候选值：每一方个数相同。"""
    return tuple(center * ratio ** (i - count // 2) for i in range(count))


# ---------------------------------------------------------------- 优化器


def _optimizer_arm(name: str, center: float, make: Callable, cosine: bool = True) -> Arm:
    def build(task: Task, lr: float, steps: int, seed: int, device: torch.device) -> Recipe:
        model = make_model(task, seed, device)
        optimizer = make(model, lr)
        schedule = sched.CosineAnnealingLR(optimizer, steps) if cosine else None
        return Recipe(model, optimizer, schedule or sched.ConstantLR(optimizer))

    return Arm(name, grid(center), build)


def _plain(kind: type, **options) -> Callable:
    return lambda model, lr: kind(model.parameters(), lr=lr, **options)


def _muon(model: nn.Module, lr: float) -> Muon:
    # 其余的参数用 AdamW，学习率取矩阵的五分之一；只调一个旋钮，与别家一样
    return Muon(muon_groups(model, lr, lr / 5, weight_decay=0.01), weight_decay=0.01)


OPTIMIZERS = (
    _optimizer_arm("SGD", 0.3, _plain(SGD)),
    _optimizer_arm("Momentum", 0.05, _plain(SGD, momentum=0.9)),
    _optimizer_arm("Nesterov", 0.05, _plain(SGD, momentum=0.9, nesterov=True)),
    _optimizer_arm("Adagrad", 0.02, _plain(Adagrad)),
    _optimizer_arm("RMSprop", 1e-3, _plain(RMSprop)),
    _optimizer_arm("Adadelta", 1.0, _plain(Adadelta)),
    _optimizer_arm("Adam", 3e-3, _plain(Adam)),
    _optimizer_arm("AdamW", 3e-3, _plain(AdamW)),
    _optimizer_arm("NAdam", 3e-3, _plain(NAdam)),
    _optimizer_arm("Lion", 5e-4, _plain(Lion)),
    _optimizer_arm("Adafactor", 0.05, _plain(Adafactor)),
    _optimizer_arm("Muon", 0.02, _muon),
    _optimizer_arm("Schedule-Free", 1e-2, _plain(ScheduleFreeAdamW), cosine=False),
)

# ---------------------------------------------------------------- 调度


def _schedule_arm(name: str, make: Callable, center: float = 0.1) -> Arm:
    def build(task: Task, lr: float, steps: int, seed: int, device: torch.device) -> Recipe:
        model = make_model(task, seed, device)
        optimizer = SGD(model.parameters(), lr=lr, momentum=0.9)
        return Recipe(model, optimizer, make(optimizer, lr, steps))

    return Arm(name, grid(center), build)


def _share(steps: int, part: float) -> int:
    return max(1, round(steps * part))


def _warmup(steps: int) -> int:
    return min(_share(steps, 0.1), steps - 1)


SCHEDULES = (
    _schedule_arm("constant", lambda o, lr, n: sched.ConstantLR(o)),
    _schedule_arm("step", lambda o, lr, n: sched.StepLR(o, _share(n, 1 / 3), 0.1)),
    _schedule_arm("exponential", lambda o, lr, n: sched.ExponentialLR(o, 0.01 ** (1 / n))),
    _schedule_arm("cosine", lambda o, lr, n: sched.CosineAnnealingLR(o, n)),
    _schedule_arm("warmup + cosine", lambda o, lr, n: sched.WarmupCosineLR(o, _warmup(n), n)),
    _schedule_arm("one-cycle", lambda o, lr, n: sched.OneCycleLR(o, lr, n)),
    # 优化器里的学习率是整体的倍数：除以峰值 (d_model · warmup)^{−½}，使峰值恰为 lr
    _schedule_arm("Noam", lambda o, lr, n: _noam(o, lr, _share(n, 0.1))),
    _schedule_arm(
        "WSD",
        lambda o, lr, n: sched.WarmupStableDecayLR(
            o, _warmup(n), n - _warmup(n) - _share(n, 0.3), _share(n, 0.3)
        ),
    ),
)


def _noam(optimizer: SGD, lr: float, warmup: int) -> sched.NoamLR:
    for group in optimizer.param_groups:
        group["lr"] = lr * warmup**0.5
    return sched.NoamLR(optimizer, d_model=1, warmup=warmup)


# ---------------------------------------------------------------- 归一化与初始化


def _deep_arm(name: str, lrs: tuple[float, ...], **options) -> Arm:
    def build(task: Task, lr: float, steps: int, seed: int, device: torch.device) -> Recipe:
        model = make_model(task, seed, device, width=64, **options)
        optimizer = SGD(model.parameters(), lr=lr, momentum=0.9)
        return Recipe(model, optimizer, sched.CosineAnnealingLR(optimizer, steps))

    return Arm(name, lrs, build)


NORMALIZATIONS = tuple(
    _deep_arm(
        f"{kind}|{norm}", grid(0.03, count=7), norm=norm, depth=10, residual=kind == "residual"
    )
    for kind in ("plain", "residual")
    for norm in NORMS
)
DEPTHS = (2, 6, 16)
INITIALIZATIONS = tuple(
    _deep_arm(f"{init}|{norm}|{depth}", (0.01, 0.1), init=init, norm=norm, depth=depth)
    for init in INITS
    for norm in ("none", "batch", "layer", "rms")
    for depth in DEPTHS
)

# ---------------------------------------------------------------- 批大小


def _batch_arm(size: int) -> Arm:
    def build(task: Task, lr: float, steps: int, seed: int, device: torch.device) -> Recipe:
        model = make_model(task, seed, device)
        optimizer = SGD(model.parameters(), lr=lr)
        return Recipe(model, optimizer, sched.CosineAnnealingLR(optimizer, steps))

    return Arm(f"batch {size}", grid(0.15, count=7, ratio=2.0), build, batch_size=size)


BATCH_ARMS = tuple(map(_batch_arm, (8, 32, 128, 512)))
