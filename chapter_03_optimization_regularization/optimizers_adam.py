"""优化器（二）：Adam 一族。Adam（AMSGrad）、AdamW、NAdam、Lion、Adafactor。

本文件教什么：一阶矩给方向、二阶矩给尺度；衰减放在哪里；怎样省掉状态。
``adam_naive`` 是论文的公式，每一步都新建张量；``Adam.update`` 是同一个公式的原地写法，只新建一个
张量。10 M 个参数时两者相差数倍，差别全在内存的读写与分配（见 README「优化器的代价」）。

记号：``m``、``v`` 一、二阶矩的滑动平均，``m̂``、``v̂`` 修正偏差之后的，``t`` 步数；其余同
``optimizers.py``。
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from chapter_03_optimization_regularization.optimizers import (
    Group,
    Optimizer,
    State,
    add_l2,
    new_state,
    require_fraction,
    require_non_negative,
    tick,
)


def adam_naive(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    step: float,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adam 的一步，照着公式写，返回新的 ``(p, m, v)``；``step`` 从 1 起。

    代价：每个元素读写内存 32 次（写回参数再加 2 次），14 个中间结果各要新分配一块内存。
    """
    beta1, beta2 = betas
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    return p - lr * m_hat / (v_hat.sqrt() + eps), m, v


class Adam(Optimizer):
    """``m ← β₁m + (1−β₁)g``，``v ← β₂v + (1−β₂)g²``，``p ← p − η m̂/(√v̂ + ε)``。

    ``m̂ = m/(1−β₁ᵗ)``、``v̂ = v/(1−β₂ᵗ)`` 修正从零开始带来的偏差。``weight_decay`` 并入梯度
    （L2）；要解耦的衰减，用 ``AdamW``。

    参数:
        betas: ``(β₁, β₂)``，各在 ``[0, 1)`` 之内。
        amsgrad: 用 ``v`` 的历史最大值作分母。原文没有偏差修正，``η/√v`` 因此单调不增；这里与 torch
            一样仍乘 ``√(1−β₂ᵗ)/(1−β₁ᵗ)``，这个系数先降后升，升的一段里步长可以变大。

    参考: Kingma, Ba, 2014, arXiv:1412.6980, 算法 1；AMSGrad 见 Reddi 等, 2018, arXiv:1904.09237。
    """

    decoupled = False

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"amsgrad": amsgrad, "maximize": maximize})

    def check(self, group: Group) -> None:
        super().check(group)
        require_non_negative(group, "eps")
        require_fraction(group, "betas")

    def init_state(self, p: Tensor, group: Group) -> State:
        extra = ("max_exp_avg_sq",) if group["amsgrad"] else ()
        return new_state(p, "exp_avg", "exp_avg_sq", *extra)

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        step, lr, (beta1, beta2) = tick(state), group["lr"], group["betas"]
        m, v = state["exp_avg"], state["exp_avg_sq"]
        if self.decoupled:
            p.mul_(1 - lr * group["weight_decay"])  # p ← (1 − ηλ) p
        else:
            g = add_l2(p, g, group)  # g ← g + λp
        m.lerp_(g, 1 - beta1)  # m ← β₁ m + (1 − β₁) g
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)  # v ← β₂ v + (1 − β₂) g²
        if group["amsgrad"]:
            v = torch.maximum(state["max_exp_avg_sq"], v, out=state["max_exp_avg_sq"])
        # p ← p − η m̂/(√v̂ + ε)；分子分母同乘 c₂ = √(1 − β₂ᵗ)，修正就成了标量，不必新建 m̂ 与 v̂
        c1, c2 = 1 - beta1**step, math.sqrt(1 - beta2**step)
        p.addcdiv_(m, v.sqrt().add_(group["eps"] * c2), value=-lr * c2 / c1)


class AdamW(Adam):
    """解耦衰减的 Adam：先 ``p ← (1 − ηλ)p``，再走 Adam 的一步；衰减不经过 ``m``、``v``。

    参考: Loshchilov, Hutter, 2017, arXiv:1711.05101, 算法 2（学习率与衰减相乘，同 torch）。
    """

    decoupled = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)


class NAdam(Optimizer):
    """把 Nesterov 的「先走一步再看」放进 Adam：更新量里多用一次这一步的梯度。

    ``μ_t = β₁(1 − ½·0.96^{tψ})``，``Π = ∏_{i ≤ t} μ_i``，
    ``p ← p − η[(1−μ_t) g/(1−Π) + μ_{t+1} m/(1−μ_{t+1}Π)]/(√v̂ + ε)``。

    参数:
        momentum_decay: ``ψ``，动量由 ``β₁/2`` 升到 ``β₁`` 的快慢。
        decoupled_weight_decay: 衰减是否解耦。

    参考: Dozat, 2016, ICLR workshop。
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"momentum_decay": momentum_decay, "maximize": maximize}
        super().__init__(params, defaults | {"decoupled_weight_decay": decoupled_weight_decay})

    def check(self, group: Group) -> None:
        super().check(group)
        require_non_negative(group, "eps", "momentum_decay")
        require_fraction(group, "betas")

    def init_state(self, p: Tensor, group: Group) -> State:
        product = torch.ones((), dtype=p.dtype)  # 载入状态时 torch 会把它换成 p 的精度
        return new_state(p, "exp_avg", "exp_avg_sq") | {"mu_product": product}

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        step, lr, (beta1, beta2) = tick(state), group["lr"], group["betas"]
        m, v = state["exp_avg"], state["exp_avg_sq"]
        if group["decoupled_weight_decay"]:
            p.mul_(1 - lr * group["weight_decay"])
        else:
            g = add_l2(p, g, group)
        # μ_t = β₁ (1 − ½ · 0.96^{tψ})
        mu, mu_next = (
            beta1 * (1 - 0.5 * 0.96 ** (t * group["momentum_decay"])) for t in (step, step + 1)
        )
        state["mu_product"] *= mu  # ∏_{i ≤ t} μ_i
        product = state["mu_product"].item()
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        scale = v.div(1 - beta2**step).sqrt_().add_(group["eps"])  # √v̂ + ε
        p.addcdiv_(g, scale, value=-lr * (1 - mu) / (1 - product))
        p.addcdiv_(m, scale, value=-lr * mu_next / (1 - product * mu_next))


class Lion(Optimizer):
    """``p ← (1−ηλ)p − η·sign(β₁m + (1−β₁)g)``，然后 ``m ← β₂m + (1−β₂)g``。

    只用符号，所以每个坐标的步长都恰为 ``η``，状态只有一份；``η`` 取 AdamW 的三到十分之一。

    参考: Chen 等, 2023, arXiv:2302.06675, 程序 1（由程序搜索得到）。
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def check(self, group: Group) -> None:
        super().check(group)
        require_fraction(group, "betas")

    def init_state(self, p: Tensor, group: Group) -> State:
        return {"exp_avg": torch.zeros_like(p)}

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        lr, (beta1, beta2), m = group["lr"], group["betas"], state["exp_avg"]
        p.mul_(1 - lr * group["weight_decay"])
        p.add_(m.lerp(g, 1 - beta1).sign_(), alpha=-lr)  # p ← p − η sign(β₁ m + (1 − β₁) g)
        m.lerp_(g, 1 - beta2)  # m ← β₂ m + (1 − β₂) g


class Adafactor(Optimizer):
    """二阶矩只记每行与每列的平均 ``r``、``c``，``v ≈ r cᵀ/mean(r)``：``m × n`` 只占 ``m + n``。

    ``β̂ = 1 − t^{beta2_decay}``；``u = g/√v``，``u ← u/max(1, RMS(u)/d)``；
    ``p ← (1−ηλ)p − α u``，``α = max(ε₂, RMS(p))·min(η, 1/√t)``。一维的参数照记完整的 ``v``。

    参数:
        eps: ``(ε₁, ε₂)``；``ε₁`` 为 ``None`` 时取该精度的机器精度。
        d: 更新量的均方根的上限。

    这是「plain」形式：没有一阶矩。参考: Shazeer, Stern, 2018, arXiv:1804.04235；数值上与
    ``torch.optim.Adafactor`` 相同（``v`` 的下限取 ``ε₁²``，加在合成之后）。
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        lr: float = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d}
        super().__init__(params, defaults | {"weight_decay": weight_decay, "maximize": maximize})

    def check(self, group: Group) -> None:
        super().check(group)
        eps1, eps2 = group["eps"]
        if (eps1 is not None and not eps1 >= 0) or not eps2 >= 0:
            raise ValueError(f"eps={group['eps']} 无效：两项都应不小于 0")
        if not group["d"] >= 1:
            raise ValueError(f"d={group['d']} 无效：应不小于 1")
        if not group["beta2_decay"] <= 0:
            raise ValueError(f"beta2_decay={group['beta2_decay']} 无效：应不大于 0")

    def init_state(self, p: Tensor, group: Group) -> State:
        if p.dim() < 2:
            return new_state(p, "variance")
        rows, columns = p.new_zeros(*p.shape[:-1], 1), p.new_zeros(*p.shape[:-2], 1, p.shape[-1])
        return new_state(p) | {"row_var": rows, "col_var": columns}

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        step, lr = tick(state), group["lr"]
        forget = step ** group["beta2_decay"]  # 1 − β̂_t；第一步为 1，所以不必修正偏差
        eps1, eps2 = group["eps"]
        eps1 = torch.finfo(p.dtype).eps if eps1 is None else eps1
        alpha = max(eps2, _rms(p)) * min(lr, 1 / math.sqrt(step))
        p.mul_(1 - lr * group["weight_decay"])
        if g.dim() < 2:
            v = state["variance"].lerp_(g.square(), forget).clone()
        else:
            r = state["row_var"].lerp_(g.square().mean(dim=-1, keepdim=True), forget)
            c = state["col_var"].lerp_(g.square().mean(dim=-2, keepdim=True), forget)
            v = (r @ c).div_(r.mean(dim=-2, keepdim=True).clamp_(min=eps1))
        u = v.clamp_(min=eps1**2).rsqrt_().mul_(g)  # u = g / √v
        p.add_(u, alpha=-alpha / max(1.0, _rms(u) / group["d"]))


def _rms(x: Tensor) -> float:
    """均方根 ``√mean(x²)``。"""
    return x.norm().item() / math.sqrt(max(1, x.numel()))
