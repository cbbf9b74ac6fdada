"""欠拟合、过拟合与双下降：容量、数据量与测试误差的关系。

本文件教什么：多项式次数、训练集大小、随机特征的个数各自怎样影响训练与测试误差。
全部是最小二乘，有封闭解，没有优化的干扰。对应 README 的「泛化」一节。

维度约定：``N`` 样本数，``P`` 特征数。
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from chapter_02_nn_basics_mlp.activations import relu
from chapter_02_nn_basics_mlp.data import friedman, uniform

NOISE = 0.3  # 多项式实验的噪声标准差；MSE 的下限是它的平方


def noisy_sine(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``y = sin(2πx) + N(0, NOISE²)``，``x ∈ [-1, 1]`` 均匀，各为 float64 ``(N, 1)``。"""
    x = uniform(count, 1, generator).double()
    noise = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    return x, torch.sin(2 * math.pi * x) + NOISE * noise


def legendre(x: Tensor, degree: int) -> Tensor:
    """勒让德多项式 ``P_0 … P_degree`` 的值 ``(N, 1) -> (N, degree + 1)``。

    张成的空间与 ``1, x, x², …`` 相同，而条件数好得多：
    ``(k + 1) P_{k+1} = (2k + 1) x P_k − k P_{k−1}``。
    """
    columns = [torch.ones_like(x), x]
    for k in range(1, degree):
        columns.append(((2 * k + 1) * x * columns[k] - k * columns[k - 1]) / (k + 1))
    return torch.cat(columns[: degree + 1], dim=1)


def least_squares(features: Tensor, targets: Tensor) -> Tensor:
    """最小二乘解；欠定时取范数最小的那个。``(N, P), (N, 1) -> (P, 1)``。

    用 SVD（``gelsd``）：特征数等于样本数时矩阵近乎奇异，正规方程会失效。
    """
    return torch.linalg.lstsq(features, targets, driver="gelsd").solution


def polynomial_errors(
    degree: int, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> tuple[float, float]:
    """用 ``degree`` 次多项式拟合 ``train``；返回 (训练 MSE, 测试 MSE)。"""
    weights = least_squares(legendre(train[0], degree), train[1])
    errors = [(legendre(x, degree) @ weights - y).square().mean().item() for x, y in (train, test)]
    return errors[0], errors[1]


def double_descent(
    widths: Sequence[int], generator: torch.Generator, samples: int = 100
) -> list[tuple[float, float]]:
    """随机 ReLU 特征回归：第一层随机且固定，只解第二层；返回各宽度的 (训练, 测试) MSE。

    宽度刚刚超过样本数（插值门槛）时，能记住全部噪声的解几乎只有一个，而它的范数巨大；
    更宽时在无数个插值解里取范数最小的，测试误差反而再次下降。

    参考: Belkin 等, 2019, arXiv:1812.11118。
    """
    x, y = (values.double() for values in friedman(samples, generator))
    x_test, y_test = (values.double() for values in friedman(1000, generator))
    center = y.mean()
    errors = []
    for width in widths:
        weight = torch.randn(10, width, generator=generator, dtype=torch.float64)
        bias = torch.randn(width, generator=generator, dtype=torch.float64)
        train_features = relu((x - 0.5) @ weight + bias) / math.sqrt(width)
        test_features = relu((x_test - 0.5) @ weight + bias) / math.sqrt(width)
        solution = least_squares(train_features, y - center)
        train_error = (train_features @ solution + center - y).square().mean().item()
        test_error = (test_features @ solution + center - y_test).square().mean().item()
        errors.append((train_error, test_error))
    return errors
