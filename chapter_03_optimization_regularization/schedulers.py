"""学习率调度：阶梯、指数、余弦、预热、单周期、Noam、WSD；学习率范围测试。

本文件教什么：一个调度就是「第 ``t`` 步的学习率是基准的几倍」这样一个函数。每个类只写出这个函数
``factor(t)``，其余（记步数、写进参数组、存取状态）都在基类里。名字与构造参数同
``torch.optim.lr_scheduler``，取值相差不超过 1e-12；torch 多用递推，这里一律用通项。
对应 README 的「学习率调度」一节。

记号：``t`` 已经走过的步数，从 0 起；``η_t = η · factor(t)``，``η`` 是构造时优化器里的学习率。
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# ---------------------------------------------------------------- 骨架


class LRScheduler:
    """每次 ``step()`` 把各组的学习率设为 ``η · factor(t)``；构造时即设为 ``t = 0`` 的值。

    参数:
        optimizer: 任何 ``torch.optim.Optimizer``。

    先 ``optimizer.step()``，再 ``scheduler.step()``。
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.last_epoch = 0  # torch 的叫法；按步调用时就是步数
        self._apply()

    def factor(self, t: int) -> float:
        """第 ``t`` 步的学习率是基准的几倍。"""
        raise NotImplementedError

    def lr_at(self, t: int, base_lr: float) -> float:
        """第 ``t`` 步的学习率；不是简单的倍数的（如余弦有下限），子类改写它。"""
        return base_lr * self.factor(t)

    def step(self) -> None:
        """走一步。"""
        self.last_epoch += 1
        self._apply()

    def _apply(self) -> None:
        if len(self.base_lrs) != len(self.optimizer.param_groups):
            raise ValueError("建立调度之后，优化器又加了参数组：请先加完参数组，再建立调度")
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = self.lr_at(self.last_epoch, base_lr)

    def get_last_lr(self) -> list[float]:
        """各组现在的学习率。"""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """续训所需的一切：步数与基准。"""
        return {"last_epoch": self.last_epoch, "base_lrs": list(self.base_lrs)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """恢复，并立即写进优化器。"""
        if len(state_dict["base_lrs"]) != len(self.optimizer.param_groups):
            raise ValueError(
                f"调度的状态有 {len(state_dict['base_lrs'])} 组，"
                f"而优化器有 {len(self.optimizer.param_groups)} 组"
            )
        self.last_epoch = state_dict["last_epoch"]
        self.base_lrs = list(state_dict["base_lrs"])
        self._apply()


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}={value} 无效：应大于 0")


def _cosine(start: float, end: float, progress: float) -> float:
    """由 ``start`` 沿半个余弦到 ``end``，``progress`` 由 0 到 1。"""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


# ---------------------------------------------------------------- 下降


class ConstantLR(LRScheduler):
    """不调度：``factor = 1``。用作对照。"""

    def factor(self, t: int) -> float:
        return 1.0


class StepLR(LRScheduler):
    """``γ^⌊t/step_size⌋``：每 ``step_size`` 步乘一次 ``γ``。"""

    def __init__(
        self, optimizer: torch.optim.Optimizer, step_size: int, gamma: float = 0.1
    ) -> None:
        _require_positive(step_size=step_size)
        self.step_size, self.gamma = step_size, gamma
        super().__init__(optimizer)

    def factor(self, t: int) -> float:
        return self.gamma ** (t // self.step_size)


class MultiStepLR(LRScheduler):
    """``γ^k``，``k`` 是已经越过的里程碑的个数。"""

    def __init__(
        self, optimizer: torch.optim.Optimizer, milestones: Iterable[int], gamma: float = 0.1
    ) -> None:
        self.milestones, self.gamma = sorted(milestones), gamma
        super().__init__(optimizer)

    def factor(self, t: int) -> float:
        return self.gamma ** bisect_right(self.milestones, t)


class ExponentialLR(LRScheduler):
    """``γᵗ``。"""

    def __init__(self, optimizer: torch.optim.Optimizer, gamma: float) -> None:
        self.gamma = gamma
        super().__init__(optimizer)

    def factor(self, t: int) -> float:
        return self.gamma**t


class CosineAnnealingLR(LRScheduler):
    """``η_min + (η − η_min)(1 + cos(πt/T_max))/2``；过了 ``T_max`` 再升回去。

    参考: Loshchilov, Hutter, 2016, arXiv:1608.03983, 式 (5)（不含重启）。
    """

    def __init__(self, optimizer: torch.optim.Optimizer, T_max: int, eta_min: float = 0.0) -> None:
        _require_positive(T_max=T_max)
        self.T_max, self.eta_min = T_max, eta_min
        super().__init__(optimizer)

    def lr_at(self, t: int, base_lr: float) -> float:
        return _cosine(base_lr, self.eta_min, t / self.T_max)


# ---------------------------------------------------------------- 预热


class LinearLR(LRScheduler):
    """由 ``start_factor`` 线性升（降）到 ``end_factor``，走 ``total_iters`` 步，之后不变：预热。"""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        start_factor: float = 1 / 3,
        end_factor: float = 1.0,
        total_iters: int = 5,
    ) -> None:
        _require_positive(start_factor=start_factor, total_iters=total_iters)
        self.start_factor, self.end_factor = start_factor, end_factor
        self.total_iters = total_iters
        super().__init__(optimizer)

    def factor(self, t: int) -> float:
        progress = min(1.0, t / self.total_iters)
        return self.start_factor + (self.end_factor - self.start_factor) * progress


class WarmupCosineLR(LRScheduler):
    """线性预热 ``warmup`` 步，再沿余弦降到 ``min_factor``，共 ``total_steps`` 步。

    第 0 步的倍数是 ``1/(warmup + 1)`` 而不是 0，否则第一步白走。
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup: int,
        total_steps: int,
        min_factor: float = 0.0,
    ) -> None:
        if not 0 <= warmup < total_steps:
            raise ValueError(f"warmup={warmup} 无效：应在 [0, total_steps={total_steps}) 之内")
        self.warmup, self.total_steps, self.min_factor = warmup, total_steps, min_factor
        super().__init__(optimizer)

    def factor(self, t: int) -> float:
        if t < self.warmup:
            return (t + 1) / (self.warmup + 1)
        progress = min(1.0, (t - self.warmup) / (self.total_steps - self.warmup))
        return _cosine(1.0, self.min_factor, progress)


class NoamLR(LRScheduler):
    """``d_model^{−½} · min(s^{−½}, s · warmup^{−3/2})``，``s = t + 1``：线性升，再按 ``1/√s`` 降。

    优化器的学习率应设为 1（或想要的整体倍数）；峰值为 ``(d_model · warmup)^{−½}``。

    参考: Vaswani 等, 2017, arXiv:1706.03762, 式 (3)。
    """

    def __init__(self, optimizer: torch.optim.Optimizer, d_model: int, warmup: int = 4000) -> None:
        _require_positive(d_model=d_model, warmup=warmup)
        self.d_model, self.warmup = d_model, warmup
        super().__init__(optimizer)

    def factor(self, t: int) -> float:
        s = t + 1
        return self.d_model**-0.5 * min(s**-0.5, s * self.warmup**-1.5)


class WarmupStableDecayLR(LRScheduler):
    """WSD：预热，长时间不变，最后一小段线性降到 ``min_factor``。

    不变的一段可以任意延长；想要一个可用的模型时，从任何一个检查点接上下降的一段即可。

    参考: Hu 等, 2024, arXiv:2404.06395；线性的下降段见 Hägele 等, 2024, arXiv:2405.18392。
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup: int,
        stable: int,
        decay: int,
        min_factor: float = 0.0,
    ) -> None:
        if min(warmup, stable) < 0 or decay < 1:
            raise ValueError(
                f"warmup={warmup}、stable={stable} 应不小于 0，decay={decay} 应不小于 1"
            )
        self.warmup, self.stable, self.decay = warmup, stable, decay
        self.min_factor = min_factor
        super().__init__(optimizer)

    def factor(self, t: int) -> float:
        if t < self.warmup:
            return (t + 1) / (self.warmup + 1)
        progress = (t - self.warmup - self.stable) / self.decay
        return 1 + (self.min_factor - 1) * min(1.0, max(0.0, progress))


# ---------------------------------------------------------------- 单周期


class OneCycleLR(LRScheduler):
    """单周期：学习率沿余弦升到 ``max_lr`` 再降到接近零；动量反着走，学习率大时动量小。

    起点 ``max_lr/div_factor``，终点再除以 ``final_div_factor``；升的一段占 ``pct_start``。
    有 ``betas`` 的优化器调的是 ``β₁``。

    异常:
        ValueError: 走过了 ``total_steps``。

    参考: Smith, Topin, 2017, arXiv:1708.07120。
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        max_lr: float,
        total_steps: int,
        pct_start: float = 0.3,
        cycle_momentum: bool = True,
        base_momentum: float = 0.85,
        max_momentum: float = 0.95,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
    ) -> None:
        _require_positive(total_steps=total_steps, max_lr=max_lr)
        if not 0 <= pct_start <= 1:
            raise ValueError(f"pct_start={pct_start} 无效：应在 [0, 1] 之内")
        knows = {"momentum", "betas"} & optimizer.defaults.keys()
        if cycle_momentum and not knows:
            raise ValueError("cycle_momentum=True 要求优化器有 momentum 或 betas")
        self.total_steps, self.cycle_momentum = total_steps, cycle_momentum
        self.peak = pct_start * total_steps - 1  # 升到顶的一步；与 torch 一样可以是小数
        initial = max_lr / div_factor
        self.lrs = (initial, max_lr, initial / final_div_factor)
        self.momenta = (max_momentum, base_momentum, max_momentum)
        super().__init__(optimizer)

    def _value(self, t: int, points: tuple[float, float, float]) -> float:
        start, middle, end = points
        if t < self.peak:
            return _cosine(start, middle, t / self.peak)
        rest = self.total_steps - 1 - self.peak  # 降的一段，走到 total_steps − 1
        return _cosine(middle, end, (t - self.peak) / rest) if rest > 0 else middle

    def lr_at(self, t: int, base_lr: float) -> float:
        if t > self.total_steps:  # 最后一步之后的那次 step() 是允许的，学习率已没有用处
            raise ValueError(f"OneCycleLR 只有 {self.total_steps} 步，现在要走第 {t} 步")
        return self._value(t, self.lrs)

    def _apply(self) -> None:
        super()._apply()
        if not self.cycle_momentum:
            return
        momentum = self._value(self.last_epoch, self.momenta)
        for group in self.optimizer.param_groups:
            if "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            else:
                group["momentum"] = momentum


# ---------------------------------------------------------------- 范围测试


def lr_range_test(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    lr_min: float,
    lr_max: float,
    steps: int,
    smoothing: float = 0.9,
) -> tuple[list[float], list[float]]:
    """学习率由 ``lr_min`` 等比升到 ``lr_max``，记下每步平滑过的损失；超过最小值的 4 倍就停。

    合用的学习率在损失降得最快之处，通常是开始发散处的三分之一到十分之一。模型的权重会被改掉：
    请用一个副本。

    返回:
        (各步的学习率, 各步平滑之后的损失)，等长，至多 ``steps`` 个。

    参考: Smith, 2015, arXiv:1506.01186, 第 3.3 节。
    """
    if not 0 < lr_min < lr_max or steps < 2:
        raise ValueError(f"应有 0 < lr_min < lr_max 且 steps ≥ 2，实为 {lr_min}、{lr_max}、{steps}")
    model.train()
    lrs, losses, average = [], [], 0.0
    stream = _forever(batches)
    for t in range(steps):
        lr = lr_min * (lr_max / lr_min) ** (t / (steps - 1))
        for group in optimizer.param_groups:
            group["lr"] = lr
        x, y = next(stream)
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        average = smoothing * average + (1 - smoothing) * loss.item()
        smoothed = average / (1 - smoothing ** (t + 1))  # 与 Adam 的偏差修正同一个道理
        lrs.append(lr)
        losses.append(smoothed)
        if not smoothed <= 4 * min(losses):  # nan 也在此停下
            break
    return lrs, losses


def _forever(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterable[tuple[Tensor, Tensor]]:
    while True:
        count = 0
        for batch in batches:
            count += 1
            yield batch
        if count == 0:
            raise ValueError("batches 是空的，或只能走一遍：请传入列表、DataLoader 等")
