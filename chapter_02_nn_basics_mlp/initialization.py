"""权重初始化：Xavier 与 Kaiming，使信号逐层传播时方差不变。

本文件教什么：方差守恒的推导怎样变成一行代码。不涉及：正交初始化（第 6 章）。
对应 README 的「初始化」一节。

维度约定：权重形状 ``(out_features, in_features)``，与 ``nn.Linear`` 相同；
``fan_in = in_features``，``fan_out = out_features``。
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# 激活函数使方差缩小的倍数的平方根之倒数。ReLU：一半的输入被置零，E[relu(z)²] = Var(z)/2
GAINS = {
    "identity": 1.0,
    "sigmoid": 1.0,
    "tanh": 5 / 3,
    "relu": math.sqrt(2),
    "leaky_relu": math.sqrt(2 / (1 + 0.01**2)),
    # 这几个没有公认的增益，形状接近 ReLU，沿用它的
    "gelu": math.sqrt(2),
    "gelu_tanh": math.sqrt(2),
    "silu": math.sqrt(2),
}


@torch.no_grad()
def _fill_normal(weight: Tensor, std: float, generator: torch.Generator | None) -> Tensor:
    return weight.normal_(0.0, std, generator=generator)


@torch.no_grad()
def _fill_uniform(weight: Tensor, std: float, generator: torch.Generator | None) -> Tensor:
    bound = math.sqrt(3) * std  # U(−b, b) 的方差是 b²/3
    return weight.uniform_(-bound, bound, generator=generator)


def _xavier_std(weight: Tensor, gain: float) -> float:
    fan_out, fan_in = weight.shape
    return gain * math.sqrt(2 / (fan_in + fan_out))


def _kaiming_std(weight: Tensor, activation: str) -> float:
    return GAINS[activation] / math.sqrt(weight.shape[1])


def xavier_uniform_(
    weight: Tensor, gain: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """``U(−b, b)``，``b = gain · √(6 / (fan_in + fan_out))``，原地。

    参考: Glorot 与 Bengio, 2010, 式 (16)。
    """
    return _fill_uniform(weight, _xavier_std(weight, gain), generator)


def xavier_normal_(
    weight: Tensor, gain: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """``N(0, gain² · 2 / (fan_in + fan_out))``，原地。"""
    return _fill_normal(weight, _xavier_std(weight, gain), generator)


def kaiming_uniform_(
    weight: Tensor, activation: str = "relu", generator: torch.Generator | None = None
) -> Tensor:
    """``U(−b, b)``，``b = gain · √(3 / fan_in)``，原地。

    参考: He 等, 2015, arXiv:1502.01852, 式 (10)。
    """
    return _fill_uniform(weight, _kaiming_std(weight, activation), generator)


def kaiming_normal_(
    weight: Tensor, activation: str = "relu", generator: torch.Generator | None = None
) -> Tensor:
    """``N(0, gain² / fan_in)``，原地。参考: He 等, 2015, arXiv:1502.01852, 式 (10)。"""
    return _fill_normal(weight, _kaiming_std(weight, activation), generator)
