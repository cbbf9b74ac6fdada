"""优化器（三）：不再逐元素。Muon、Schedule-Free AdamW、SAM。

本文件教什么：Muon 把整个矩阵的更新量正交化；Schedule-Free 用平均代替学习率的下降；SAM 在最坏的
邻点上求梯度。对应 README 的「新的想法」一节。

维度约定：``m × n`` 的矩阵是 ``nn.Linear`` 的权重 ``(out, in)``；其余记号同 ``optimizers.py``。
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from chapter_03_optimization_regularization.optimizers import (
    Group,
    Optimizer,
    State,
    new_state,
    require_fraction,
    require_non_negative,
    tick,
)
from chapter_03_optimization_regularization.optimizers_adam import AdamW

# ---------------------------------------------------------------- Muon

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # 0 处斜率大、[0.7, 1.2] 左右即可，不求收敛到 1


def newton_schulz(
    matrix: Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = NEWTON_SCHULZ,
    eps: float = 1e-7,
) -> Tensor:
    """只用矩阵乘法把 ``G = UΣVᵀ`` 近似成 ``UVᵀ``：``X ← aX + b(XXᵀ)X + c(XXᵀ)²X``。

    每一步只改奇异值：``σ ← aσ + bσ³ + cσ⁵``；先除以 Frobenius 范数，使 ``σ ≤ 1``。

    参数:
        matrix: ``(m, n)``；迭代就在它的精度里进行。
        steps: 迭代次数。

    返回:
        ``(m, n)``，奇异值在 0.68 到 1.20 之间（归一化之后小于 0.002 的除外）。
        代价：每步 ``4k²l + 2k³`` 次浮点运算，``k ≤ l`` 是两个边长。

    参考: Jordan 等, 2024, "Muon: An optimizer for hidden layers in neural networks"。
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix  # 让 XXᵀ 是较小的一边
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T  # (k, k)
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)  # b XXᵀ + c (XXᵀ)²
        x = torch.addmm(x, polynomial, x, beta=a)  # a X + (b XXᵀ + c (XXᵀ)²) X
    return x.T if tall else x


def muon_groups(model: nn.Module, lr: float, adamw_lr: float, **adamw: Any) -> list[Group]:
    """把一个模型的参数分成两组：隐藏层的矩阵交给 Muon，其余（偏置、嵌入、输出层……）交给 AdamW。

    输出层指最后一个二维参数；嵌入层与它的每一行各对应一个符号，正交化没有意义。卷积核是四维的，也归
    AdamW；要让 Muon 处理，得先把它展成 ``(输出通道, 其余)`` 的矩阵，这里不做。

    异常:
        ValueError: 模型里没有一个可训练的隐藏层矩阵，Muon 无事可做。
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    # 按模块而不是按参数找最后一个：与嵌入共用权重的输出层，在 parameters() 里排在最前
    every = [p for m in model.modules() for p in m.parameters(recurse=False) if p.dim() == 2]
    excluded = embeddings | {id(p) for p in every[-1:]}
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.dim() == 2 and id(p) not in excluded]
    if not matrices:
        raise ValueError(
            f"{type(model).__name__} 没有可训练的隐藏层矩阵（不算输出层、嵌入、卷积核）：请用 AdamW"
        )
    chosen = {id(p) for p in matrices}
    rest = [p for p in trainable if id(p) not in chosen]
    return [
        {"params": matrices, "lr": lr, "use_muon": True},
        {"params": rest, "lr": adamw_lr, "use_muon": False} | adamw,
    ]


class Muon(AdamW):
    """矩阵：动量之后正交化；``use_muon=False`` 的组（不是矩阵的参数）走 AdamW。

    ``b ← μb + (1−μ)g``，``u = (1−μ)g + μb``（Nesterov），
    ``p ← (1−ηλ)p − η √max(1, m/n) · newton_schulz(u)``。

    参数:
        params: 二维参数，或 ``muon_groups(model, ...)`` 给出的两组。
        momentum, nesterov, ns_steps: Muon 的 ``μ``、是否用 Nesterov、迭代次数。
        ns_dtype: 迭代的精度；``None`` 与参数相同。GPU 上用 ``torch.bfloat16``（快，误差无妨），
            此时与 ``torch.optim.Muon`` 相同。
        betas, eps: AdamW 组所用。

    异常:
        ValueError: 走 Muon 的组里有不是二维的参数。

    参考: 同 ``newton_schulz``；系数 ``√max(1, m/n)`` 使行数不同的矩阵可以共用一个学习率。
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        *,
        ns_dtype: torch.dtype | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        defaults |= {"nesterov": nesterov, "ns_steps": ns_steps, "ns_dtype": ns_dtype}
        defaults |= {"betas": betas, "eps": eps, "amsgrad": False, "maximize": maximize}
        Optimizer.__init__(self, params, defaults | {"use_muon": True})

    def check(self, group: Group) -> None:
        super().check(group)
        require_fraction(group, "momentum")
        params = group.get("params", ())
        params = [params] if isinstance(params, Tensor) else params
        shapes = [(p[1] if isinstance(p, tuple) else p).shape for p in params]  # 可以带名字
        wrong = [tuple(shape) for shape in shapes if len(shape) != 2]
        if group["use_muon"] and wrong:
            raise ValueError(f"Muon 只处理二维参数，实有形状 {wrong[0]}：请用 muon_groups 分组")

    def init_state(self, p: Tensor, group: Group) -> State:
        if group["use_muon"]:
            return {"momentum_buffer": torch.zeros_like(p)}
        return super().init_state(p, group)

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        if not group["use_muon"]:
            return super().update(p, g, state, group)
        lr, mu = group["lr"], group["momentum"]
        b = state["momentum_buffer"].lerp_(g, 1 - mu)  # b ← μ b + (1 − μ) g
        u = g.lerp(b, mu) if group["nesterov"] else b  # u = (1 − μ) g + μ b
        u = newton_schulz(u.to(group["ns_dtype"] or u.dtype), group["ns_steps"]).to(p.dtype)
        p.mul_(1 - lr * group["weight_decay"])  # p ← (1 − ηλ) p
        p.add_(u, alpha=-lr * math.sqrt(max(1, p.shape[0] / p.shape[1])))


# ---------------------------------------------------------------- Schedule-Free


class ScheduleFreeAdamW(Optimizer):
    """不需要学习率调度，也不必事先知道总步数的 AdamW。

    三个序列：``z`` 走优化器的步，``x`` 是它的加权平均（最终结果），梯度在两者之间的 ``y`` 求::

        y = (1−β₁)z + β₁x
        z ← z − γ_t [g(y)/(√v̂ + ε) + λy]          γ_t = η · min(1, t/warmup_steps)
        x ← (1−c)x + c z                            c = γ_t²/Σ_{i ≤ t} γ_i²

    只存 ``z`` 与 ``v``：训练时参数里放的是 ``y``，``x`` 由两者解出。训练前调用 ``train()``，
    评估与保存前调用 ``eval()``（参数换成 ``x``）。

    异常:
        RuntimeError: 在 ``eval()`` 状态下 ``step``。

    参考: Defazio 等, 2024, arXiv:2405.15682。原文把 ``√(1−β₂ᵗ)`` 并入 ``γ_t``，此处与作者后来的
    代码一样，修正放在 ``v̂`` 里。
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        lr: float = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"warmup_steps": warmup_steps, "maximize": maximize, "train_mode": True}
        super().__init__(params, defaults)

    def check(self, group: Group) -> None:
        super().check(group)
        require_non_negative(group, "eps", "warmup_steps")
        require_fraction(group, "betas")
        if group["betas"][0] == 0:
            raise ValueError("betas[0]=0 无效：此时梯度点 y 就是 z，平均 x 无从解出")

    def init_state(self, p: Tensor, group: Group) -> State:
        return new_state(p, "exp_avg_sq") | {"z": p.clone(), "weight_sum": 0.0}

    def update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        if not group["train_mode"]:
            raise RuntimeError("ScheduleFreeAdamW 处于 eval 状态：step 之前请先调用 train()")
        step, (beta1, beta2) = tick(state), group["betas"]
        gamma = group["lr"] * min(1.0, step / max(1, group["warmup_steps"]))
        state["weight_sum"] += gamma**2
        c = gamma**2 / state["weight_sum"] if gamma else 0.0
        z, v = state["z"], state["exp_avg_sq"]
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        d = g / (v / (1 - beta2**step)).sqrt_().add_(group["eps"])  # g / (√v̂ + ε)
        d.add_(p, alpha=group["weight_decay"])  # + λy
        # 由 β₁x = y − (1−β₁)z 消去 x：y ← (1−c)[y − (1−β₁)γd] + c(z − γd)
        p.lerp_(z, c).sub_(d, alpha=gamma * ((1 - c) * (1 - beta1) + c))
        z.sub_(d, alpha=gamma)

    @torch.no_grad()
    def eval(self) -> None:
        """把参数由 ``y`` 换成 ``x = (y − (1−β₁)z)/β₁``。"""
        self._switch(False, lambda beta1: 1 - 1 / beta1)

    @torch.no_grad()
    def train(self) -> None:
        """把参数由 ``x`` 换回 ``y = β₁x + (1−β₁)z``。"""
        self._switch(True, lambda beta1: 1 - beta1)

    def _switch(self, train_mode: bool, weight: Callable[[float], float]) -> None:
        for group in self.param_groups:
            if group["train_mode"] == train_mode:
                continue
            group["train_mode"] = train_mode
            for p in group["params"]:
                if "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], weight(group["betas"][0]))


# ---------------------------------------------------------------- SAM


class SAM(Optimizer):
    """锐度感知的最小化：先沿梯度上坡走 ``ρ``，用那里的梯度从原处下坡。

    ``e = ρ g/‖g‖``，``g' = ∇L(p + e)``，再由 ``base_optimizer`` 用 ``g'`` 更新 ``p``。
    ``‖g‖`` 是全部参数合在一起的范数。每步两次前向、两次反向。

    参数:
        base_optimizer: 优化器的类，如 ``SGD``；其余关键字参数传给它。
        rho: ``ρ``，邻域的半径。

    参考: Foret 等, 2020, arXiv:2010.01412, 算法 1。

    ``step`` 必须给出 ``closure``：清零梯度、前向、反向、返回损失。两次前向中的 BatchNorm 会更新
    两次滑动统计量，Dropout 的掩码也不同，与作者的代码相同。
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        base_optimizer: type[torch.optim.Optimizer],
        rho: float = 0.05,
        **options: Any,
    ) -> None:
        self.base = base_optimizer(params, **options)
        super().__init__(self.base.param_groups, self.base.defaults | {"rho": rho})
        self._share()

    def check(self, group: Group) -> None:
        require_non_negative(group, "rho")
        if isinstance(self.base, Optimizer):  # torch.optim 的在构造时自己检查
            self.base.check(self.base.defaults | group)

    def train(self) -> None:
        if isinstance(self.base, Optimizer):  # torch.optim 的没有这两个方法，也不需要
            self.base.train()

    def eval(self) -> None:
        if isinstance(self.base, Optimizer):
            self.base.eval()

    def _share(self) -> None:
        """与 ``base`` 共用参数组与状态：改学习率、存取状态都只有一份。"""
        self.base.param_groups, self.base.state = self.param_groups, self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:
        """一步；返回原处（不是邻点）的损失。"""
        if closure is None:
            raise ValueError("SAM.step 需要 closure：它要在邻点上再求一次梯度")
        with torch.enable_grad():
            loss = closure()
        pairs = [(p, g["rho"]) for g in self.param_groups for p in g["params"]]
        pairs = [(p, rho) for p, rho in pairs if p.grad is not None]
        if not pairs:
            return loss
        norm = torch.stack([p.grad.norm() for p, _ in pairs]).norm().clamp(min=1e-12)
        places = [p.clone() for p, _ in pairs]
        for p, rho in pairs:
            p.add_(p.grad, alpha=(rho / norm).item())  # p + ρ g/‖g‖
        with torch.enable_grad():
            closure()
        for (p, _), place in zip(pairs, places, strict=True):
            p.copy_(place)  # 回到原处，逐位相同
        self.base.step()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"base": self.base}  # deepcopy 与 pickle 也要带上它

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # load_state_dict 也走这里
        self._share()
