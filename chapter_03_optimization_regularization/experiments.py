"""六个实验：谁参加比较，各自要调什么，用什么数据。

每个实验是一个 ``Experiment``：若干 ``Arm``、数据、轮数、挑选的依据；怎样训练、怎样比较由
``train.py`` 与 ``recipes.py`` 负责，六个实验完全相同。
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from chapter_03_optimization_regularization import schedulers as sched
from chapter_03_optimization_regularization.averaging import EMA, SWA, EarlyStopping
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
    SAM,
    Muon,
    ScheduleFreeAdamW,
    muon_groups,
)
from chapter_03_optimization_regularization.recipes import Arm, Recipe, Run
from chapter_03_optimization_regularization.regularization import (
    cutmix,
    label_smoothing_cross_entropy,
    mixup,
    prox_elastic_net_,
    prox_l1_,
    soft_cross_entropy,
)
from utils import make_generator


@dataclass(frozen=True)
class Experiment:
    """一个实验。

    参数:
        question: 它要回答的问题。
        arms: 参加比较的各方。
        dataset: 缺省的数据集。
        epochs, batch_size, train_size: 缺省的轮数、批大小、训练样本数（``None`` 为全部）。
        flip: 训练标签改错的概率（带噪双月自带，不在此列）。
        seeds: 至少几个种子。
        tune_seeds: 挑旋钮时用几个种子。
        knob: 旋钮叫什么。
        key: 挑选所看的验证指标，越小越好。
    """

    question: str
    arms: tuple[Arm, ...]
    dataset: str
    epochs: int
    batch_size: int
    train_size: int | None = None
    flip: float = 0.0
    seeds: int = 3
    tune_seeds: int = 1
    knob: str = "learning rate"
    key: Callable[[Run], float] = lambda run: run.val_loss


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

# ---------------------------------------------------------------- 正则化


def _regularizer(name: str, knobs: tuple[float, ...], setup: Callable, **model_of: str) -> Arm:
    """``setup(recipe, knob, task, steps, generator)`` 就地改动基准的 ``Recipe``。

    ``model_of`` 的 ``{网络的参数: "knob"}`` 表示旋钮就是网络的这个参数（如 ``dropout``）。
    基准：残差网络，AdamW（不衰减），常数学习率。
    """

    def build(task: Task, knob: float, steps: int, seed: int, device: torch.device) -> Recipe:
        options = dict.fromkeys(model_of, knob)
        model = make_model(task, seed, device, depth=3, residual=True, **options)
        optimizer = AdamW(model.parameters(), lr=LR, weight_decay=0.0)
        recipe = Recipe(model, optimizer, sched.ConstantLR(optimizer))
        setup(recipe, knob, task, steps, make_generator(seed + 10_000))
        return recipe

    return Arm(name, knobs, build)


LR = 3e-3


def _nothing(recipe: Recipe, *_) -> None:
    """基准本身，或旋钮已经在网络里。"""


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
    _regularizer("none", (0.0,), _nothing),
    _regularizer("L1 (proximal)", (1.0, 2.0, 3.0), _l1),
    _regularizer("elastic net", (0.3, 1.0, 3.0), _elastic),
    _regularizer("L2 in Adam", (0.03, 0.1, 0.3), _l2),
    _regularizer("decoupled decay", (10.0, 30.0, 60.0), _decoupled),
    _regularizer("dropout", (0.5, 0.7, 0.85), _nothing, dropout="knob"),
    _regularizer("DropPath", (0.7, 0.85, 0.95), _nothing, drop_path="knob"),
    _regularizer("label smoothing", (0.03, 0.1, 0.3), _smoothing),
    _regularizer("mixup", (1.0, 10.0, 100.0), partial(_mixing, mixup)),
    _regularizer("early stopping", (3, 10, 30), _early_stop),
    _regularizer("EMA", (0.99, 0.995, 0.998), _ema),
    _regularizer("SWA", (0.0, 0.25, 0.5), _swa),
    _regularizer("SAM", (0.5, 1.0, 2.0), _sam),
)
# 图像上的：多了 cutmix；图像比点难，强度都轻得多
IMAGE_REGULARIZERS = (
    _regularizer("none", (0.0,), _nothing),
    _regularizer("decoupled decay", (0.1, 0.3, 1.0), _decoupled),
    _regularizer("dropout", (0.1, 0.2, 0.4), _nothing, dropout="knob"),
    _regularizer("label smoothing", (0.1, 0.3, 0.6), _smoothing),
    _regularizer("mixup", (0.03, 0.1, 0.3), partial(_mixing, mixup)),
    _regularizer("cutmix", (0.03, 0.1, 0.3), partial(_mixing, cutmix)),
    _regularizer("early stopping", (1, 3, 10), _early_stop),
    _regularizer("EMA", (0.98, 0.99, 0.995), _ema),
)

# ---------------------------------------------------------------- 批大小


def _batch_arm(size: int) -> Arm:
    def build(task: Task, lr: float, steps: int, seed: int, device: torch.device) -> Recipe:
        model = make_model(task, seed, device)
        optimizer = SGD(model.parameters(), lr=lr)
        return Recipe(model, optimizer, sched.CosineAnnealingLR(optimizer, steps))

    return Arm(f"batch {size}", grid(0.15, count=7, ratio=2.0), build, batch_size=size)


BATCH_SIZES = (8, 32, 128, 512)


def _error(run: Run) -> float:
    return run.val_error


DIGITS, POINTS = "synth-digits", "noisy-moons"
EXPERIMENTS = {
    "optimizers": Experiment(
        "学习率的预算相同，哪个优化器走得最低、最快？", OPTIMIZERS, DIGITS, 3, 128
    ),
    "schedules": Experiment("学习率怎样随步数变化最好？峰值各自调过。", SCHEDULES, DIGITS, 3, 128),
    "normalization": Experiment(
        "归一化使十层的网络能用多大的学习率？", NORMALIZATIONS, DIGITS, 3, 128, train_size=6_000
    ),
    "regularization": Experiment(
        "200 个样本、一成标签有错，哪种正则化使测试错误率下降，降多少？",
        REGULARIZERS,
        POINTS,
        60,
        50,
        train_size=200,
        seeds=8,
        tune_seeds=8,
        knob="strength",
        key=_error,
    ),
    "generalization": Experiment(
        "批大小与学习率怎样一起变？大批量的解更尖吗？",
        tuple(map(_batch_arm, BATCH_SIZES)),
        DIGITS,
        10,
        128,
        train_size=2_000,
        tune_seeds=3,
    ),
    "initialization": Experiment(
        "初始化、归一化、深度，哪些组合训得动？", INITIALIZATIONS, DIGITS, 2, 128, train_size=6_000
    ),
}
# 换成图像时，正则化的强度、样本数、轮数都不同
IMAGE_REGULARIZATION = Experiment(
    "1000 张图像、两成标签有错，哪种正则化使测试错误率下降，降多少？",
    IMAGE_REGULARIZERS,
    DIGITS,
    30,
    50,
    train_size=1_000,
    flip=0.2,
    seeds=5,
    tune_seeds=5,
    knob="strength",
    key=_error,
)
