"""优化器（一）：公共的骨架，SGD（动量、Nesterov）、Adagrad、RMSprop、Adadelta。

本文件教什么：优化器是「拿着参数与梯度，原地改参数」的一行公式，加上它要记住的几个缓冲。
类名、构造参数、缓冲的名字与 ``torch.optim`` 相同，因此两边的 ``state_dict`` 可以互换；
测试在 float64 下走 100 步，与 ``torch.optim`` 的差不超过 1e-12。
不涉及：``foreach``、``fused``、``capturable`` 等只关乎怎样执行的开关。
对应 README 的「从梯度下降到动量」与「自适应步长」两节。

记号：``p`` 参数，``g`` 梯度，``η`` 学习率（lr），``λ`` 权重衰减（weight_decay）。
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]  # 一组参数与它们的超参数
State = dict[str, Any]  # 一个参数的缓冲

# ---------------------------------------------------------------- 骨架


def require_non_negative(group: Group, *names: str) -> None:
    """``names`` 各项都应不小于 0（nan 也不行）。"""
    for name in names:
        if not group[name] >= 0:
            raise ValueError(f"{name}={group[name]} 无效：应不小于 0")


def require_fraction(group: Group, *names: str) -> None:
    """``names`` 各项（元组则每个分量）都应在 ``[0, 1)`` 之内：等于 1 就永远不会忘。"""
    for name in names:
        values = group[name] if isinstance(group[name], tuple | list) else (group[name],)
        for index, value in enumerate(values):
            if not 0 <= value < 1:
                where = f"{name}[{index}]" if len(values) > 1 else name
                raise ValueError(f"{where}={value} 无效：应在 [0, 1) 之内")


class Optimizer(torch.optim.Optimizer):
    """本章全部优化器的骨架：检查超参数，遍历参数，子类只写一个参数怎样更新。

    参数:
        params: 参数的可迭代对象，或若干 ``{"params": ..., 超参数: ...}`` 组。
        defaults: 各组缺省的超参数，须含 ``lr`` 与 ``maximize``。

    异常:
        ValueError: 没有参数，或某一组的超参数无效。
        RuntimeError: 梯度是稀疏的，而这个优化器的更新公式用到每个元素。
    """

    supports_sparse = False

    def __init__(self, params: Iterable[Tensor] | Iterable[Group], defaults: Group) -> None:
        if not isinstance(params, Tensor):  # 只给一个张量时，由基类报错
            params = list(params)
            if not params:
                raise ValueError("优化器得到的参数列表是空的：请传入 model.parameters()")
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """加入一组参数；没有写明的超参数取缺省值。"""
        if not isinstance(param_group["params"], Tensor):  # 迭代器只能走一遍
            param_group = param_group | {"params": list(param_group["params"])}
        self.check(self.defaults | param_group)
        super().add_param_group(param_group)

    def check(self, group: Group) -> None:
        """检查一组超参数。"""
        require_non_negative(group, "lr", "weight_decay")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """更新全部有梯度的参数一次；``closure`` 给出时先调用它重算损失与梯度，返回该损失。"""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:  # 没有参与这次前向的参数不动，它的计步也不走
                    self._step_one(p, group)
        return loss

    def _step_one(self, p: Tensor, group: Group) -> None:
        if p.grad.is_sparse and not self.supports_sparse:
            raise RuntimeError(f"{type(self).__name__} 不支持稀疏梯度：请用 SGD，或 sparse=False")
        if p.is_complex():
            raise TypeError(f"{type(self).__name__} 不支持复数参数：请拆成实部与虚部")
        state = self.state[p]
        if not state:
            state.update(self.init_state(p, group))
        self.update(p, -p.grad if group["maximize"] else p.grad, state, group)

    def train(self) -> None:
        """训练之前调用；只有参数在训练与评估时不同的优化器（Schedule-Free）才有事可做。"""

    def eval(self) -> None:
        """评估与保存之前调用。"""

    def init_state(self, p: Tensor, group: Group) -> State:
        """参数 ``p`` 的全部缓冲的初值。"""
        raise NotImplementedError

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """由梯度 ``g`` 原地更新 ``p`` 与 ``state``；不得改动 ``g``，它就是 ``p.grad``。"""
        raise NotImplementedError


def tick(state: State) -> float:
    """计步加一，返回现在是第几步；没有梯度的一步不算。"""
    state["step"] += 1
    return state["step"].item()


def new_state(p: Tensor, *buffers: str) -> State:
    """计步 ``step``（从 0 起），以及若干与 ``p`` 同形的零缓冲。"""
    return {"step": torch.tensor(0.0)} | {name: torch.zeros_like(p) for name in buffers}


def add_l2(p: Tensor, g: Tensor, group: Group) -> Tensor:
    """``g + λp``：惩罚项 ``λ/2 ‖p‖²`` 的梯度并入 ``g``（L2 正则，与解耦的衰减不同）。"""
    return g.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else g


# ---------------------------------------------------------------- 动量


class SGD(Optimizer):
    """随机梯度下降，可带动量与 Nesterov 修正。

    ``b ← μb + (1−d)g``（第一步 ``b ← g``），``p ← p − ηb``；Nesterov 用 ``g + μb`` 代替 ``b``。

    参数:
        momentum: ``μ``，0 即没有动量。
        dampening: ``d``。
        nesterov: 是否用 Nesterov 修正；要求 ``μ > 0`` 且 ``d = 0``。

    参考: Polyak, 1964；Nesterov, 1983；Sutskever 等, 2013（动量的这种写法）。
    """

    supports_sparse = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening}
        defaults |= {"weight_decay": weight_decay, "nesterov": nesterov, "maximize": maximize}
        super().__init__(params, defaults)

    def check(self, group: Group) -> None:
        super().check(group)
        require_non_negative(group, "momentum")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov=True 要求 momentum 大于 0 且 dampening 等于 0，"
                f"实为 {group['momentum']} 与 {group['dampening']}"
            )

    def init_state(self, p: Tensor, group: Group) -> State:
        return {}  # 动量缓冲由第一个梯度开始，见 update

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        lr, mu = group["lr"], group["momentum"]
        g = add_l2(p, g, group)
        if mu:
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = g.clone()
            else:  # b ← μ b + (1 − d) g
                state["momentum_buffer"].mul_(mu).add_(g, alpha=1 - group["dampening"])
            b = state["momentum_buffer"]
            g = g.add(b, alpha=mu) if group["nesterov"] else b
        p.add_(g, alpha=-lr)  # p ← p − η b


# ---------------------------------------------------------------- 每个坐标自己的步长


class Adagrad(Optimizer):
    """``s ← s + g²``，``p ← p − η_t g/(√s + ε)``，``η_t = η/(1 + (t−1)·lr_decay)``。

    历史上梯度大的坐标步长小，稀疏的坐标步长大；``s`` 只增不减，步长终将趋于零。

    参考: Duchi, Hazan, Singer, 2011, JMLR 12。
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps}
        defaults |= {"initial_accumulator_value": initial_accumulator_value, "maximize": maximize}
        super().__init__(params, defaults)

    def check(self, group: Group) -> None:
        super().check(group)
        require_non_negative(group, "lr_decay", "initial_accumulator_value", "eps")

    def init_state(self, p: Tensor, group: Group) -> State:
        state = new_state(p, "sum")
        state["sum"].fill_(group["initial_accumulator_value"])
        return state

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        lr = group["lr"] / (1 + (tick(state) - 1) * group["lr_decay"])
        g, s = add_l2(p, g, group), state["sum"]
        s.addcmul_(g, g)  # s ← s + g²
        p.addcdiv_(g, s.sqrt().add_(group["eps"]), value=-lr)  # p ← p − η g / (√s + ε)


class RMSprop(Optimizer):
    """``v ← αv + (1−α)g²``，``p ← p − ηg/(√v + ε)``：把 Adagrad 的总和换成指数滑动平均。

    参数:
        alpha: ``α``，滑动平均的保留率。
        centered: 用方差 ``v − ḡ²`` 代替二阶矩 ``v``，``ḡ`` 是梯度的滑动平均。
        momentum: 大于零时 ``b ← μb + g/(√v + ε)``，``p ← p − ηb``。

    参考: Tieleman, Hinton, 2012, Coursera 讲义 6.5；centered 见 Graves, 2013, arXiv:1308.0850。
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"momentum": momentum, "centered": centered, "maximize": maximize}
        super().__init__(params, defaults)

    def check(self, group: Group) -> None:
        super().check(group)
        require_non_negative(group, "eps", "momentum")
        require_fraction(group, "alpha")

    def init_state(self, p: Tensor, group: Group) -> State:
        state = new_state(p, "square_avg")
        if group["momentum"] > 0:
            state["momentum_buffer"] = torch.zeros_like(p)
        if group["centered"]:
            state["grad_avg"] = torch.zeros_like(p)
        return state

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        tick(state)
        alpha, v = group["alpha"], state["square_avg"]
        g = add_l2(p, g, group)
        v.mul_(alpha).addcmul_(g, g, value=1 - alpha)  # v ← α v + (1 − α) g²
        if group["centered"]:
            mean = state["grad_avg"].lerp_(g, 1 - alpha)  # ḡ ← α ḡ + (1 − α) g
            scale = v.addcmul(mean, mean, value=-1).sqrt_().add_(group["eps"])
        else:
            scale = v.sqrt().add_(group["eps"])
        if group["momentum"] > 0:  # b ← μ b + g / (√v + ε)，p ← p − η b
            b = state["momentum_buffer"].mul_(group["momentum"]).addcdiv_(g, scale)
            p.add_(b, alpha=-group["lr"])
        else:
            p.addcdiv_(g, scale, value=-group["lr"])  # p ← p − η g / (√v + ε)


class Adadelta(Optimizer):
    """``Δ = √(u + ε)/√(v + ε) · g``，``p ← p − ηΔ``：更新量的单位与参数一致，原文没有学习率。

    ``v``、``u`` 分别是 ``g²`` 与 ``Δ²`` 的滑动平均，保留率 ``ρ``。

    参考: Zeiler, 2012, arXiv:1212.5701。
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        lr: float = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"maximize": maximize})

    def check(self, group: Group) -> None:
        super().check(group)
        require_non_negative(group, "eps")
        require_fraction(group, "rho")

    def init_state(self, p: Tensor, group: Group) -> State:
        return new_state(p, "square_avg", "acc_delta")

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        tick(state)
        rho, eps = group["rho"], group["eps"]
        v, u = state["square_avg"], state["acc_delta"]
        g = add_l2(p, g, group)
        v.mul_(rho).addcmul_(g, g, value=1 - rho)  # v ← ρ v + (1 − ρ) g²
        delta = u.add(eps).sqrt_().div_(v.add(eps).sqrt_()).mul_(g)  # Δ = √(u+ε)/√(v+ε) · g
        u.mul_(rho).addcmul_(delta, delta, value=1 - rho)  # u ← ρ u + (1 − ρ) Δ²
        p.add_(delta, alpha=-group["lr"])
