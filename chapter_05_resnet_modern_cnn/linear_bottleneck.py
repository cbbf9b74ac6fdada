"""ReLU 在窄处丢掉多少信息：倒残差为什么在窄的地方不加激活。

把 d 维的 x 映到 n 维再加 ReLU，``y = ReLU(T x)``，T 的元素独立、标准正态。y 的正分量给出等式
``t_i · x = y_i``，其余只说 ``t_i · x ≤ 0``。于是

    x 可由 y 唯一确定  ⟺  正分量对应的行张成 R^d  ⟺（T 随机，几乎必然）正分量至少 d 个

每行的符号各一半机会，正分量的个数服从 Binomial(n, 1/2)，所以能复原的概率有闭式；
n = d（不展开）时只有 2^-d，n = 6d 时几乎是 1。

维度约定：N 个点，d 维嵌到 n 维。

参考: Sandler et al., 2018, MobileNetV2, arXiv:1801.04381，图 1 与第 3.2 节。
与论文不同之处: 论文用 T 的广义逆把 y 线性地映回去；这里用最好的解码器（只解正分量的方程），
因此量出的是信息本身的丢失，而且有理论值可以对照。
页面 efficient.md「倒残差与线性瓶颈」。
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def relu_embedding(x: Tensor, matrix: Tensor) -> Tensor:
    """``ReLU(T x)``：``(N, d)``、``(n, d)`` -> ``(N, n)``。"""
    return (x @ matrix.T).relu()


def recover(y: Tensor, matrix: Tensor) -> Tensor:
    """由 ``y = ReLU(T x)`` 解出 x：只用正分量的方程，欠定时取最短的解。

    参数:
        y: ``(N, n)``。
        matrix: T，``(n, d)``。

    返回:
        ``(N, d)``。
    """
    equations = matrix * (y > 0).unsqueeze(-1)  # (N, n, d)，不用的行置零
    return (torch.linalg.pinv(equations) @ y.unsqueeze(-1)).squeeze(-1)


def recoverable_probability(dimension: int, width: int) -> float:
    """``P[Binomial(n, 1/2) ≥ d]``：T 随机，d 维的 x 能从 n 维的 ``ReLU(T x)`` 复原的概率。"""
    return sum(math.comb(width, j) for j in range(dimension, width + 1)) / 2**width


def surviving_dimensions(dimension: int, width: int) -> float:
    """``E[min(d, A)] / d``，A ~ Binomial(n, 1/2)：x 附近的 d 个方向平均有多大一份还传得过去。

    ``ReLU(T x)`` 在 x 处的雅可比矩阵由正分量的行组成，秩为 ``min(d, A)``。
    """
    total = sum(math.comb(width, j) * min(dimension, j) for j in range(width + 1))
    return total / (2**width * dimension)


def recovered_share(x: Tensor, matrix: Tensor, tolerance: float = 1e-6) -> float:
    """量出来的份额：复原的相对误差不超过 ``tolerance`` 的点。"""
    error = (recover(relu_embedding(x, matrix), matrix) - x).norm(dim=1)
    return (error <= tolerance * x.norm(dim=1)).double().mean().item()


def spiral(count: int) -> Tensor:
    """平面上的一条螺线，两圈，``(count, 2)``，float64，半径 0.1 到 1。"""
    t = torch.linspace(0, 1, count, dtype=torch.float64)
    angle = 4 * math.pi * t
    return (0.1 + 0.9 * t).unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], dim=-1)
