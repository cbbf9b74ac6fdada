"""低精度训练：浮点格式、舍入、损失缩放、fp32 主权重。

本文件教什么：一个浮点格式由指数与尾数的位数完全决定；fp16 会上溢、下溢，bf16 只是粗；
损失缩放怎样把梯度搬进 fp16 的范围；为什么权重要留一份 fp32 的。
不涉及：自动选择哪些算子用低精度（``torch.autocast``）、fp8。
对应 landscapes.md 的「低精度训练」一节。
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# ---------------------------------------------------------------- 浮点格式


class FloatFormat(NamedTuple):
    """IEEE 式的二进制浮点格式：1 位符号、E 位指数、M 位尾数。

    指数域全 1 表示 inf 与 nan，全 0 表示零与次正规数，其余表示 ``±2^e · (1 + m / 2^M)``，
    ``e`` 从 ``2 − 2^{E−1}`` 到 ``2^{E−1} − 1``。
    """

    exponent_bits: int
    mantissa_bits: int

    @property
    def max_exponent(self) -> int:
        """最大的指数 ``e_max = 2^{E−1} − 1``，也是指数域的偏移量。"""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def min_exponent(self) -> int:
        """正规数最小的指数 ``e_min = 1 − e_max``。"""
        return 1 - self.max_exponent

    @property
    def max(self) -> float:
        """最大的有限数 ``2^{e_max} (2 − 2^{−M})``。"""
        return math.ldexp(2 - 2.0**-self.mantissa_bits, self.max_exponent)

    @property
    def smallest_normal(self) -> float:
        """最小的正规数 ``2^{e_min}``；再小就开始丢有效位。"""
        return math.ldexp(1.0, self.min_exponent)

    @property
    def smallest_subnormal(self) -> float:
        """最小的正数 ``2^{e_min − M}``；不到它一半的数变成零。"""
        return math.ldexp(1.0, self.min_exponent - self.mantissa_bits)

    @property
    def eps(self) -> float:
        """1 与下一个数的距离 ``2^{−M}``；相对舍入误差至多为它的一半。"""
        return 2.0**-self.mantissa_bits


FORMATS: dict[str, FloatFormat] = {
    "float32": FloatFormat(8, 23),
    "float16": FloatFormat(5, 10),
    "bfloat16": FloatFormat(8, 7),
}


def round_to_format(x: Tensor, form: FloatFormat) -> Tensor:
    """把每个数舍入到 ``form`` 中最近的数（一样近时取偶），结果仍存成 float64。

    先求 ``x`` 所在的区间 ``[2^e, 2^{e+1})``，其中相邻两数相距 ``2^{e−M}``；
    小于 ``2^{e_min}`` 的数共用最小的间距，这就是次正规数。超过最大数的变成 inf。

    参数:
        x: 任意形状；float32 或 float64（float64 的次正规数除外）。
    """
    x = x.double()
    exponent = (torch.frexp(x).exponent - 1).clamp(min=form.min_exponent)  # ⌊log2|x|⌋
    spacing = torch.exp2((exponent - form.mantissa_bits).double())
    rounded = torch.where(x.isfinite(), (x / spacing).round() * spacing, x)
    return torch.where(rounded.abs() > form.max, x.sign() * math.inf, rounded)


class CastLoss(NamedTuple):
    """转换成低精度时损失了什么：非零有限数中各占多少比例。"""

    overflow: float  # 变成 inf
    underflow: float  # 变成 0
    subnormal: float  # 落在次正规数里，有效位不足


def cast_loss(x: Tensor, dtype: torch.dtype) -> CastLoss:
    """统计 ``x.to(dtype)`` 的上溢、下溢与次正规数的比例。

    异常:
        ValueError: 没有非零的有限数。
    """
    x = x.detach()[x.detach().isfinite() & (x.detach() != 0)]
    if x.numel() == 0:
        raise ValueError("cast_loss 的输入没有非零的有限数，比例没有意义")
    low = x.to(dtype).double().abs()
    zero, tiny = low == 0, low < torch.finfo(dtype).smallest_normal
    return CastLoss(
        low.isinf().double().mean().item(),
        zero.double().mean().item(),
        (tiny & ~zero).double().mean().item(),
    )


# ---------------------------------------------------------------- 损失缩放


def _float32(value: float) -> float:
    """舍入到 float32：缩放因子以 float32 保存，与 PyTorch 相同。"""
    return torch.tensor(value, dtype=torch.float32).item()


class LossScaler:
    """动态损失缩放：损失乘 s，反向得到的梯度也都乘 s，用之前再除回去。

    没有上溢时，连续 ``growth_interval`` 步之后 s 乘 ``growth_factor``；一旦上溢，这一步作废，
    s 乘 ``backoff_factor``。于是 s 总在"再大就上溢"的边缘。用法与 ``torch.amp.GradScaler`` 相同::

        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)      # 可省；要裁剪梯度时先调用
        scaler.step(optimizer)
        scaler.update()

    参数:
        init_scale: 最初的 s，正数。
        growth_factor: 大于 1。
        backoff_factor: 0 与 1 之间。
        growth_interval: 正整数，单位步。

    异常:
        ValueError: 参数越界。

    与 ``GradScaler`` 的差别：只支持一台设备，梯度是稠密的；一次迭代可以有多个优化器。

    参考: Micikevicius 等, 2017, arXiv:1710.03740, 3.2 节。
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        if not (init_scale > 0 and math.isfinite(init_scale)):
            raise ValueError(f"init_scale={init_scale} 应为有限的正数")
        if not growth_factor > 1:
            raise ValueError(f"growth_factor={growth_factor} 应大于 1，否则不会增长")
        if not 0 < backoff_factor < 1:
            raise ValueError(f"backoff_factor={backoff_factor} 应在 0 与 1 之间，否则不会回退")
        if growth_interval < 1:
            raise ValueError(f"growth_interval={growth_interval} 应为正整数")
        self._scale = _float32(init_scale)
        self.growth_factor, self.backoff_factor = growth_factor, backoff_factor
        self.growth_interval = growth_interval
        self._growth_tracker = 0  # 连续多少步没有上溢
        self._overflowed: dict[int, bool] = {}  # 本次迭代已经除回去的优化器 -> 有没有上溢
        self._stepped: set[int] = set()

    def get_scale(self) -> float:
        """当前的缩放因子 s。"""
        return self._scale

    def scale(self, loss: Tensor) -> Tensor:
        """``s · L``。"""
        # 乘 float32 的张量而不是 python 数：fp16 的标量损失会提升到 float32，s · L 不会溢出
        return loss * torch.tensor(self._scale, dtype=torch.float32, device=loss.device)

    @torch.no_grad()
    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """把优化器名下的梯度原地除以 s，并记下有没有 inf 或 nan。

        异常:
            RuntimeError: 本次迭代已经除过，或已经走过一步。
            ValueError: 梯度是 fp16 的：除回去又会下溢，缩放就白做了；请用 fp32 主权重。
        """
        if id(optimizer) in self._stepped:
            raise RuntimeError("unscale_ 应在 step 之前调用")
        if id(optimizer) in self._overflowed:
            raise RuntimeError("自上次 update 以来，已经对这个优化器调用过 unscale_")
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in params if p.grad is not None]
        if any(g.dtype == torch.float16 for g in grads):
            raise ValueError("不能对 fp16 的梯度做 unscale_：除回去又会下溢，请改用 fp32 主权重")
        inverse = _float32(1 / self._scale)
        overflowed = False
        for g in grads:
            overflowed |= not g.isfinite().all().item()
            g.mul_(inverse)
        self._overflowed[id(optimizer)] = overflowed

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """没有上溢则 ``optimizer.step()``，否则跳过这一步；还没有 ``unscale_`` 就先做。

        异常:
            RuntimeError: 自上次 ``update`` 以来已经走过一步。
        """
        if id(optimizer) in self._stepped:
            raise RuntimeError("自上次 update 以来，已经对这个优化器调用过 step")
        if id(optimizer) not in self._overflowed:
            self.unscale_(optimizer)
        if not self._overflowed[id(optimizer)]:
            optimizer.step()
        self._stepped.add(id(optimizer))

    def update(self) -> None:
        """一次迭代的末尾：按有没有上溢调整 s。

        异常:
            RuntimeError: 本次迭代没有检查过任何梯度。
        """
        if not self._overflowed:
            raise RuntimeError("update 之前应先调用 step 或 unscale_")
        if any(self._overflowed.values()):
            self._scale = _float32(self._scale * self.backoff_factor)
            self._growth_tracker = 0
        else:
            self._growth_tracker += 1
            if self._growth_tracker == self.growth_interval:
                grown = _float32(self._scale * self.growth_factor)
                self._scale = grown if math.isfinite(grown) else self._scale
                self._growth_tracker = 0
        self._overflowed, self._stepped = {}, set()

    def state_dict(self) -> dict[str, Any]:
        """与 ``GradScaler`` 同名的五项，可以互相读。"""
        return {
            "scale": self._scale,
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": self._growth_tracker,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """恢复 ``state_dict`` 保存的状态。"""
        self._scale = _float32(state["scale"])
        self.growth_factor, self.backoff_factor = state["growth_factor"], state["backoff_factor"]
        self.growth_interval = state["growth_interval"]
        self._growth_tracker = state["_growth_tracker"]


# ---------------------------------------------------------------- fp32 主权重


def master_weights(model: nn.Module) -> list[Tensor]:
    """网络参数的 fp32 副本，与 ``model.parameters()`` 同序；优化器更新的是它们。"""
    return [p.detach().float().clone().requires_grad_(p.requires_grad) for p in model.parameters()]


def mixed_precision_step(
    model: nn.Module,
    masters: list[Tensor],
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[nn.Module], Tensor],
    scaler: LossScaler | None,
) -> float:
    """一步混合精度训练：低精度的权重与激活，fp32 的主权重；返回（未缩放的）损失。

    返回时 ``model`` 里仍是更新之前的权重，下一步开头才舍入进来；评估、保存用主权重。

    参数:
        model: 低精度的网络；开始时把主权重舍入进它的参数。
        masters: ``master_weights`` 的返回值，由 ``optimizer`` 更新。
        optimizer: 建在 ``masters`` 上的优化器。
        loss_fn: ``model -> 标量损失``；损失本身应在 fp32 里算。
        scaler: 损失缩放；bf16 不需要，传 ``None``。
    """
    with torch.no_grad():
        for p, master in zip(model.parameters(), masters, strict=True):
            p.copy_(master)  # 1. 主权重舍入成低精度
            p.grad = None
    loss = loss_fn(model)  # 2. 前向
    (loss if scaler is None else scaler.scale(loss)).backward()  # 3. 反向，梯度是低精度的
    for p, master in zip(model.parameters(), masters, strict=True):
        # 4. 先变成 fp32，再除以 s：次序反了就又下溢了
        master.grad = None if p.grad is None else p.grad.float()
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)  # 5. 除以 s、查 inf、更新主权重
        scaler.update()
    return loss.item()
