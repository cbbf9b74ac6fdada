"""早停与权重平均：训练停在哪里、最后用哪一组权重。

本文件教什么：``EarlyStopping`` 记住验证最好的一刻；``EMA``、``SWA`` 把轨迹上的权重平均起来，
抵消小批量噪声；权重换了，批归一化的统计量就要用 ``update_bn`` 重算。
不涉及：学习率调度。对应 regularization.md。

与 ``torch.optim.swa_utils`` 的差别：平均的参数不求梯度；``update_bn`` 也认本章的批归一化，
并逐个模块（而不是整个模型）恢复训练、评估的开关。
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from chapter_03_optimization_regularization.normalization import BatchNorm1d, BatchNorm2d

# InstanceNorm 也可以记统计量，但它与批无关，不必重算
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, BatchNorm1d, BatchNorm2d)


class EarlyStopping:
    """验证指标连续 ``patience`` 次没有改善就该停；同时留着最好的权重。

    每轮验证之后 ``if stopper.step(loss, model): break``，循环结束后 ``stopper.restore(model)``。

    参数:
        patience: 容许连续多少次没有改善。
        min_delta: 至少好这么多才算改善。
        mode: ``"min"`` 越小越好（损失），``"max"`` 越大越好（准确率）。

    异常:
        ValueError: 参数不合法。
    """

    def __init__(self, patience: int, min_delta: float = 0.0, mode: str = "min") -> None:
        if patience < 1:
            raise ValueError(f"patience={patience} 应至少为 1：连续这么多次没有改善才停")
        if not min_delta >= 0:
            raise ValueError(f"min_delta={min_delta} 应不小于 0")
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode!r} 应为 'min'（越小越好）或 'max'（越大越好）")
        self.patience, self.min_delta, self.mode = patience, min_delta, mode
        self.best = math.inf if mode == "min" else -math.inf
        self.best_weights: dict[str, Tensor] = {}
        self.bad_steps = 0

    def step(self, value: float, model: nn.Module) -> bool:
        """记下这一次的指标；返回是否应当停止。nan 与任何数比较都为假，因而算作没有改善。"""
        gain = self.best - value if self.mode == "min" else value - self.best
        if gain > self.min_delta:
            self.best, self.bad_steps = value, 0
            # state_dict 里是参数本身的引用，不复制就会跟着训练一起变
            self.best_weights = {k: v.clone() for k, v in model.state_dict().items()}
        else:
            self.bad_steps += 1
        return self.bad_steps >= self.patience

    def restore(self, model: nn.Module) -> None:
        """把最好的权重放回模型。

        异常:
            RuntimeError: 从来没有过一次有效的指标。
        """
        if not self.best_weights:
            raise RuntimeError("EarlyStopping 还没有记下任何权重：先用有限的指标调用 step")
        model.load_state_dict(self.best_weights)

    def state_dict(self) -> dict[str, Any]:
        """续训所需的一切，随检查点保存；可以 ``weights_only=True`` 读回。"""
        weights = {key: value.clone() for key, value in self.best_weights.items()}
        return {"best": self.best, "bad_steps": self.bad_steps, "best_weights": weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """恢复 ``state_dict`` 记下的一切；``patience`` 等参数由构造时给出。"""
        self.best, self.bad_steps = state["best"], state["bad_steps"]
        self.best_weights = {key: value.clone() for key, value in state["best_weights"].items()}


# ---------------------------------------------------------------- 权重平均


class WeightAverage(nn.Module):
    """模型的一份拷贝，权重是训练轨迹的平均：``w̄ ← w̄ + a (w − w̄)``，子类给出 ``a``。

    第一次 ``update_parameters`` 照抄，因此不需要 Adam 那样的偏差修正。缓冲区（批归一化的统计量）
    不平均，每次照抄原模型的：它们属于原模型的权重，评估之前应当用 ``update_bn`` 重算。

    state_dict 的键与 ``torch.optim.swa_utils.AveragedModel`` 相同，可以互相读取。
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = deepcopy(model).requires_grad_(False)
        self.register_buffer("n_averaged", torch.tensor(0))

    def rate(self, count: int) -> float:
        """已平均 ``count ≥ 1`` 个模型时，新模型所占的份额 a。"""
        raise NotImplementedError

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """把 ``model`` 当前的权重并入平均；在每次 ``optimizer.step()`` 之后（或每轮末）调用。"""
        count = int(self.n_averaged)
        rate = self.rate(count) if count else 1.0
        for average, current in zip(self.module.parameters(), model.parameters(), strict=True):
            average.lerp_(current, rate)  # rate 为 1 时就是照抄
        for ours, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
        self.n_averaged += 1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class EMA(WeightAverage):
    """指数移动平均 ``w̄ ← β w̄ + (1−β) w``，相当于最近约 ``1/(1−β)`` 步的平均。

    参数:
        model: 被平均的模型。
        decay: β，0 到 1 之间；常用 0.99 到 0.9999。

    异常:
        ValueError: decay 不在 0 到 1 之间。

    参考: Polyak 与 Juditsky, 1992；Morales-Brotons, Vogels 与 Hendrikx, 2024, arXiv:2411.18704。
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        if not 0 <= decay <= 1:
            raise ValueError(f"decay={decay} 应在 0 到 1 之间：旧的平均所占的份额")
        self.decay = decay

    def rate(self, count: int) -> float:
        """恒为 ``1 − β``。"""
        return 1 - self.decay


class SWA(WeightAverage):
    """等权平均 ``w̄_n = (1/n) Σ w_i``，写成递推 ``w̄ ← w̄ + (w − w̄)/(n+1)``。

    参考: Izmailov 等, 2018, arXiv:1803.05407。
    """

    def rate(self, count: int) -> float:
        """``1/(n+1)``：越往后，新模型的份额越小。"""
        return 1 / (count + 1)


# ---------------------------------------------------------------- 批归一化的统计量


@torch.no_grad()
def update_bn(batches: Iterable[Any], model: nn.Module) -> None:
    """用训练数据重算批归一化的统计量：平均的权重从没有前向过，抄来的统计量不是它的。

    各批的统计量取等权平均（``momentum = None``），与批的先后无关。

    参数:
        batches: 产出输入张量，或第一个元素是输入的元组。
        model: 原地修改其批归一化的 ``running_mean`` 与 ``running_var``；没有批归一化则什么也不做。
    """
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    training = [(module, module.training) for module in model.modules()]
    model.train()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    try:
        for batch in batches:
            model(batch[0] if isinstance(batch, (list, tuple)) else batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, flag in training:
            module.training = flag
