"""参加比较的各方（二）：正则化。每一方的旋钮是它自己的强度，其余与基准完全相同。

基准是一个残差网络，AdamW（不衰减），常数学习率；每种手段写成一个就地改动 ``Recipe`` 的小函数。
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from chapter_03_optimization_regularization import schedulers as sched
from chapter_03_optimization_regularization.arms import make_model
from chapter_03_optimization_regularization.averaging import EMA, SWA, EarlyStopping
from chapter_03_optimization_regularization.data import Task
from chapter_03_optimization_regularization.optimizers import SGD
from chapter_03_optimization_regularization.optimizers_adam import Adam, AdamW
from chapter_03_optimization_regularization.optimizers_modern import SAM
from chapter_03_optimization_regularization.recipes import Arm, Recipe
from chapter_03_optimization_regularization.regularization import (
    cutmix,
    label_smoothing_cross_entropy,
    mixup,
    prox_elastic_net_,
    prox_l1_,
    soft_cross_entropy,
)
from utils import make_generator

LR = 3e-3


def _nothing(recipe: Recipe, *_) -> None:
    """基准本身，或旋钮已经在网络里。"""


def _regularizer(
    name: str, knobs: tuple[float, ...], setup: Callable = _nothing, option: str | None = None
) -> Arm:
    """在基准之上的一方。

    参数:
        setup: ``setup(recipe, knob, task, steps, generator)``，就地改动基准的 ``Recipe``。
        option: 旋钮就是网络的这个参数，如 ``"dropout"``；``None`` 表示与网络无关。
    """

    def build(task: Task, knob: float, steps: int, seed: int, device: torch.device) -> Recipe:
        options = {} if option is None else {option: knob}
        model = make_model(task, seed, device, depth=3, residual=True, **options)
        optimizer = AdamW(model.parameters(), lr=LR, weight_decay=0.0)
        recipe = Recipe(model, optimizer, sched.ConstantLR(optimizer))
        setup(recipe, knob, task, steps, make_generator(seed + 10_000))
        return recipe

    return Arm(name, knobs, build)


def _optimizer(recipe: Recipe, optimizer: SGD) -> None:
    recipe.optimizer, recipe.schedule = optimizer, sched.ConstantLR(optimizer)


def _l1(recipe: Recipe, strength: float, *_) -> None:
    first = [recipe.model.blocks[0][0].weight]  # 挑选输入坐标：只罚第一层
    recipe.after_step = lambda: prox_l1_(first, LR * strength)


def _elastic(recipe: Recipe, strength: float, *_) -> None:
    first = [recipe.model.blocks[0][0].weight]
    recipe.after_step = lambda: prox_elastic_net_(first, LR, strength, 10 * strength)


def _l2(recipe: Recipe, strength: float, *_) -> None:
    _optimizer(recipe, Adam(recipe.model.parameters(), lr=LR, weight_decay=strength))


def _decoupled(recipe: Recipe, strength: float, *_) -> None:
    _optimizer(recipe, AdamW(recipe.model.parameters(), lr=LR, weight_decay=strength))


def _sam(recipe: Recipe, rho: float, *_) -> None:
    parameters = recipe.model.parameters()
    _optimizer(recipe, SAM(parameters, AdamW, rho=rho, lr=LR, weight_decay=0.0))


def _smoothing(recipe: Recipe, strength: float, *_) -> None:
    recipe.loss = lambda model, x, y: label_smoothing_cross_entropy(model(x), y, strength)


def _mixing(mix: Callable, recipe: Recipe, alpha: float, task: Task, steps: int, generator) -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        mixed, target = mix(x, y, task.classes, alpha, generator)
        return soft_cross_entropy(model(mixed), target)

    recipe.loss = loss


def _early_stop(recipe: Recipe, patience: float, *_) -> None:
    recipe.stopper = EarlyStopping(round(patience))


def _ema(recipe: Recipe, decay: float, *_) -> None:
    average = recipe.evaluated = EMA(recipe.model, decay)
    recipe.after_step = lambda: average.update_parameters(recipe.model)


def _swa(recipe: Recipe, start: float, task: Task, steps: int, *_) -> None:
    average = recipe.evaluated = SWA(recipe.model)
    taken = 0

    def after_step() -> None:
        nonlocal taken
        taken += 1
        if taken >= start * steps:
            average.update_parameters(recipe.model)

    recipe.after_step = after_step


REGULARIZERS = (
    _regularizer("none", (0.0,)),
    _regularizer("L1 (proximal)", (0.5, 1.0, 1.5), _l1),
    _regularizer("elastic net", (0.3, 1.0, 3.0), _elastic),
    _regularizer("L2 in Adam", (0.03, 0.1, 0.3), _l2),
    _regularizer("decoupled decay", (10.0, 30.0, 60.0), _decoupled),
    _regularizer("dropout", (0.5, 0.7, 0.85), option="dropout"),
    _regularizer("DropPath", (0.7, 0.85, 0.95), option="drop_path"),
    _regularizer("label smoothing", (0.03, 0.1, 0.3), _smoothing),
    _regularizer("mixup", (1.0, 10.0, 100.0), partial(_mixing, mixup)),
    _regularizer("early stopping", (3, 10, 30), _early_stop),
    _regularizer("EMA", (0.99, 0.995, 0.998), _ema),
    _regularizer("SWA", (0.0, 0.25, 0.5), _swa),
    _regularizer("SAM", (0.5, 1.0, 2.0), _sam),
)
# 图像上的：多了 cutmix；图像比点难，强度都轻得多
IMAGE_REGULARIZERS = (
    _regularizer("none", (0.0,)),
    _regularizer("decoupled decay", (0.1, 0.3, 1.0), _decoupled),
    _regularizer("dropout", (0.1, 0.2, 0.4), option="dropout"),
    _regularizer("label smoothing", (0.1, 0.3, 0.6), _smoothing),
    _regularizer("mixup", (0.03, 0.1, 0.3), partial(_mixing, mixup)),
    _regularizer("cutmix", (0.03, 0.1, 0.3), partial(_mixing, cutmix)),
    _regularizer("early stopping", (1, 3, 10), _early_stop),
    _regularizer("EMA", (0.98, 0.99, 0.995), _ema),
)
