"""自定义算子：用 ``torch.autograd.Function`` 写自己的前向与反向。

本文件教什么：什么时候值得自己写反向（融合、省内存、不可导的前向），以及怎样写对。三个例子：
``fused_cross_entropy`` 把几步并成一个算子；``binarize`` 前向不可导，反向用直通估计；``silu`` 只存
输入，反向重算，并且另写了反向的反向。每个都用 ``gradcheck``、``gradgradcheck`` 核对。
不涉及：C++ 与 CUDA 扩展。对应 README 的「自定义算子」一节。

反向里若只用可导的运算处理保存的张量，二阶导数就自动有了（前两个例子）；反向若也是一个
``Function``，则要为它再写一次反向（第三个例子）。
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks

# ---------------------------------------------------------------- 融合


class _FusedCrossEntropy(Function):
    """``(1/B) Σ (logsumexp(z) − z_t)``；只保存 logits 本身，不保存 softmax。"""

    @staticmethod
    def forward(logits: Tensor, target: Tensor) -> Tensor:
        picked = logits.gather(1, target.unsqueeze(1)).squeeze(1)
        return (logits.logsumexp(dim=1) - picked).mean()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        logits, target = ctx.saved_tensors
        one_hot = torch.zeros_like(logits).scatter(1, target.unsqueeze(1), 1.0)
        return (logits.softmax(dim=1) - one_hot) * (g / len(logits)), None


def fused_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """平均交叉熵（nats），一个算子；反向为 ``(softmax(z) − e_t)/B``。

    参数:
        logits: 浮点 ``(B, C)``。
        target: int64 ``(B,)``，取值 0 到 C − 1。
    """
    if logits.ndim != 2 or target.shape != logits.shape[:1]:
        raise ValueError(
            f"fused_cross_entropy：logits 应为 (B, C)，target 应为 (B,)，"
            f"实为 {tuple(logits.shape)} 与 {tuple(target.shape)}"
        )
    return _FusedCrossEntropy.apply(logits, target)


# ---------------------------------------------------------------- 直通估计


class _Binarize(Function):
    """前向取符号；反向当作 ``clip(x, −1, 1)`` 来求导。"""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * (x.abs() <= 1)


def binarize(x: Tensor) -> Tensor:
    """``±1`` 二值化，反向用直通估计（straight-through estimator）。

    符号函数的导数几乎处处是 0，照实求导则什么也学不到；直通估计在 ``|x| ≤ 1`` 处把它当作恒等。
    它不是前向的导数，所以 ``gradcheck`` 必然不过：这不是错，是有意为之。

    参考: Bengio 等, 2013, arXiv:1308.3432；Courbariaux 等, 2016, arXiv:1602.02830, 式 (4)。
    """
    return _Binarize.apply(x)


# ---------------------------------------------------------------- 带二阶导数


class _SiLU(Function):
    """``y = x σ(x)``，只保存 ``x``。"""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _SiLUBackward.apply(g, *ctx.saved_tensors)


class _SiLUBackward(Function):
    """``gx = g y′(x)``，``y′ = σ + xσ(1−σ)``；它的反向要用 ``y″ = σ(1−σ)(2 + x(1−2σ))``。"""

    @staticmethod
    def forward(g: Tensor, x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        return g * (s + x * s * (1 - s))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gg: Tensor) -> tuple[Tensor, Tensor]:
        g, x = ctx.saved_tensors
        s = torch.sigmoid(x)
        slope = s * (1 - s)
        return gg * (s + x * slope), gg * g * slope * (2 + x * (1 - 2 * s))


def silu(x: Tensor) -> Tensor:
    """``x σ(x)``：只保存输入，反向重算 σ；由原语拼成的写法要多存一个 σ(x)。

    参考: Elfwing 等, 2017, arXiv:1702.03118。
    """
    return _SiLU.apply(x)


# ---------------------------------------------------------------- 保存了多少


def saved_bytes(function: Callable[..., Tensor], *inputs: Tensor) -> int:
    """``function(*inputs)`` 为反向保存了多少字节；同一块内存只数一次，输入本身也算。"""
    storages: dict[int, torch.UntypedStorage] = {}  # 留住它们，地址才不会被别的张量重用

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x.detach()  # 交回 x 自己的话，保存输出的算子就成了环，再也释放不掉

    with saved_tensors_hooks(pack, lambda x: x):
        function(*inputs)
    return sum(storage.nbytes() for storage in storages.values())
