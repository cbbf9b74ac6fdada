"""激活函数：取值与手推的导数，以及薄薄的 ``nn.Module`` 外壳。

本文件教什么：每个激活函数的公式、导数，以及怎样写才不溢出。
不涉及：带可学习参数的激活（PReLU）、随机激活（RReLU）。
对应 README 的「激活函数」一节。

逐元素激活的反向传播只有一行：上游梯度乘以导数。softmax 的各输出互相牵连，
它的雅可比矩阵不是对角的，因此单独写出 ``softmax_backward``。

维度约定：逐元素函数接受任意形状；softmax 作用于最后一维，形状 ``(..., C)``。
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715  # Hendrycks 与 Gimpel (2016) 的 tanh 近似中的系数


# ---------------------------------------------------------------- 逐元素：取值与导数


def identity(x: Tensor) -> Tensor:
    """恒等函数：没有激活时的对照，整个网络退化为线性。"""
    return x


def identity_prime(x: Tensor) -> Tensor:
    """恒等函数的导数 1。"""
    return torch.ones_like(x)


def relu(x: Tensor) -> Tensor:
    r"""``max(0, x)``。写成 ``x ≤ 0`` 的判断，使 nan 能传播出来，且 0 处的次梯度取 0。"""
    return torch.where(x <= 0, torch.zeros_like(x), x)


def relu_prime(x: Tensor) -> Tensor:
    """``1[x > 0]``；0 处不可导，按惯例取次梯度 0。"""
    return (x > 0).to(x.dtype)


def leaky_relu(x: Tensor, slope: float = 0.01) -> Tensor:
    """``x`` (x > 0) 或 ``slope · x`` (x ≤ 0)。"""
    return torch.where(x > 0, x, slope * x)


def leaky_relu_prime(x: Tensor, slope: float = 0.01) -> Tensor:
    """``1`` (x > 0) 或 ``slope`` (x ≤ 0)。"""
    return torch.where(x > 0, torch.ones_like(x), torch.full_like(x, slope))


def sigmoid(x: Tensor) -> Tensor:
    r"""``σ(x) = 1 / (1 + e^{-x})``，按符号分两支计算，指数永远不为正，因此不会溢出。

    两支的输入先各自截断（先 where 再 exp）：否则未被选中的一支仍会产生 inf，
    反向传播时 ``0 · inf = nan``。nan 与谁比较都为假，因此两支都把它留下。
    """
    zero = torch.zeros_like(x)
    e_neg = torch.exp(-torch.where(x < 0, zero, x))  # x ≥ 0 的一支
    e_pos = torch.exp(torch.where(x >= 0, zero, x))  # x < 0 的一支
    return torch.where(x >= 0, 1 / (1 + e_neg), e_pos / (1 + e_pos))


def sigmoid_prime(x: Tensor) -> Tensor:
    """``σ(x)(1 − σ(x)) = σ(x) σ(−x)``；后一形式在 x 很大时没有相消。最大值 1/4。"""
    return sigmoid(x) * sigmoid(-x)


def tanh(x: Tensor) -> Tensor:
    """``tanh(x) = 2σ(2x) − 1``；0 附近这个差会损失精度，所以直接用 torch 的初等函数。"""
    return torch.tanh(x)


def tanh_prime(x: Tensor) -> Tensor:
    """``1 − tanh²(x)``，最大值 1。"""
    return 1 - torch.tanh(x).square()


def gelu(x: Tensor) -> Tensor:
    r"""``x Φ(x) = x · ½(1 + erf(x/√2))``，Φ 是标准正态分布函数。

    参考: Hendrycks 与 Gimpel, 2016, arXiv:1606.08415。
    """
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_prime(x: Tensor) -> Tensor:
    """``Φ(x) + x φ(x)``，φ 是标准正态密度（乘积法则）。"""
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU 的 tanh 近似 ``½x(1 + tanh(√(2/π)(x + 0.044715x³)))``，误差小于 5e-4。"""
    return 0.5 * x * (1 + torch.tanh(SQRT_2_OVER_PI * (x + GELU_CUBIC * x**3)))


def gelu_tanh_prime(x: Tensor) -> Tensor:
    """``½(1 + t) + ½x(1 − t²) u'``，其中 ``t = tanh(u)``，``u' = √(2/π)(1 + 3·0.044715x²)``。"""
    t = torch.tanh(SQRT_2_OVER_PI * (x + GELU_CUBIC * x**3))
    slope = SQRT_2_OVER_PI * (1 + 3 * GELU_CUBIC * x.square())
    return 0.5 * (1 + t) + 0.5 * x * (1 - t.square()) * slope


def silu(x: Tensor) -> Tensor:
    """``x σ(x)``，又名 Swish。参考: Elfwing 等, 2017, arXiv:1702.03118。"""
    return x * sigmoid(x)


def silu_prime(x: Tensor) -> Tensor:
    """``σ(x) + x σ(x)(1 − σ(x))``。"""
    return sigmoid(x) + x * sigmoid_prime(x)


class Activation(NamedTuple):
    """一个逐元素激活函数：取值与导数。"""

    value: Callable[[Tensor], Tensor]
    prime: Callable[[Tensor], Tensor]


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(identity, identity_prime),
    "relu": Activation(relu, relu_prime),
    "leaky_relu": Activation(leaky_relu, leaky_relu_prime),
    "sigmoid": Activation(sigmoid, sigmoid_prime),
    "tanh": Activation(tanh, tanh_prime),
    "gelu": Activation(gelu, gelu_prime),
    "gelu_tanh": Activation(gelu_tanh, gelu_tanh_prime),
    "silu": Activation(silu, silu_prime),
}


# ---------------------------------------------------------------- softmax


def softmax(x: Tensor) -> Tensor:
    r"""``softmax(x)_i = e^{x_i − m} / Σ_j e^{x_j − m}``，``m = max_j x_j``，沿最后一维。

    分子分母同乘 ``e^{−m}`` 不改变结果，而此后指数不为正，不会溢出。
    """
    shifted = torch.exp(x - x.amax(dim=-1, keepdim=True).detach())
    return shifted / shifted.sum(dim=-1, keepdim=True)


def softmax_backward(grad: Tensor, y: Tensor) -> Tensor:
    r"""由上游梯度 ``g`` 与输出 ``y`` 求 ``∂L/∂x = y ⊙ (g − ⟨g, y⟩)``，形状都是 ``(..., C)``。

    雅可比矩阵是 ``diag(y) − y yᵀ``；与 ``g`` 相乘时不必真的造出 ``C × C`` 的矩阵。
    """
    return y * (grad - (grad * y).sum(dim=-1, keepdim=True))


# ---------------------------------------------------------------- nn.Module 外壳


class ReLU(nn.Module):
    """``nn.ReLU`` 的从零实现。"""

    def forward(self, x: Tensor) -> Tensor:
        return relu(x)


class LeakyReLU(nn.Module):
    """``nn.LeakyReLU`` 的从零实现；``negative_slope`` 是负半轴的斜率。"""

    def __init__(self, negative_slope: float = 0.01) -> None:
        super().__init__()
        self.negative_slope = negative_slope

    def forward(self, x: Tensor) -> Tensor:
        return leaky_relu(x, self.negative_slope)


class Sigmoid(nn.Module):
    """``nn.Sigmoid`` 的从零实现。"""

    def forward(self, x: Tensor) -> Tensor:
        return sigmoid(x)


class Tanh(nn.Module):
    """``nn.Tanh`` 的从零实现。"""

    def forward(self, x: Tensor) -> Tensor:
        return tanh(x)


class GELU(nn.Module):
    """``nn.GELU`` 的从零实现；``approximate`` 为 ``"none"``（精确）或 ``"tanh"``。"""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        if approximate not in ("none", "tanh"):
            raise ValueError(f"approximate={approximate!r} 应为 'none' 或 'tanh'")
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x) if self.approximate == "none" else gelu_tanh(x)


class SiLU(nn.Module):
    """``nn.SiLU`` 的从零实现。"""

    def forward(self, x: Tensor) -> Tensor:
        return silu(x)


class Softmax(nn.Module):
    """``nn.Softmax(dim=-1)`` 的从零实现。"""

    def forward(self, x: Tensor) -> Tensor:
        return softmax(x)


# MLP 的 activation 参数 -> 模块
MODULES: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "relu": ReLU,
    "leaky_relu": LeakyReLU,
    "sigmoid": Sigmoid,
    "tanh": Tanh,
    "gelu": GELU,
    "gelu_tanh": lambda: GELU("tanh"),
    "silu": SiLU,
}
