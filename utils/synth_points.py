"""合成的二维分类数据：双月与双螺旋，最佳可能的准确率算得出来。

每一类是一条曲线上的均匀样本加各向同性的高斯噪声；于是类条件密度有积分表达式，贝叶斯分类器
（任何分类器的上限）可以直接算出，不必估计。

维度约定：``N`` 样本数；点 ``(N, 2)``，类别 int64 ``(N,)``，两类各半。
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Curve = Callable[[Tensor, Tensor | int], Tensor]  # (t ∈ [0, 1], 类别) -> 点 (N, 2)

SPIRAL_TURNS = 1.5  # 每条螺旋臂的圈数
SPIRAL_NOISE = 0.06  # 各坐标上高斯噪声的标准差
MOON_NOISE = 0.2


def spiral_curve(t: Tensor, label: Tensor | int) -> Tensor:
    """螺旋臂；两臂相差半圈。"""
    radius = 0.1 + 0.9 * t
    angle = 2 * math.pi * SPIRAL_TURNS * t + math.pi * label
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)


def moon_curve(t: Tensor, label: Tensor | int) -> Tensor:
    """单位半圆：类别 0 在上，类别 1 倒过来、右移 1、上移 ½，两者交错。"""
    angle, sign = math.pi * t, 1 - 2 * label
    return torch.stack(
        [sign * torch.cos(angle) + label, sign * torch.sin(angle) + 0.5 * label], dim=-1
    )


def _sample(
    curve: Curve, count: int, generator: torch.Generator, noise: float
) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count) % 2
    points = curve(torch.rand(count, generator=generator), labels)
    return points + noise * torch.randn(count, 2, generator=generator), labels


def two_spirals(
    count: int, generator: torch.Generator, noise: float = SPIRAL_NOISE
) -> tuple[Tensor, Tensor]:
    """双螺旋：``(N, 2)`` 的点与 0/1 类别。"""
    return _sample(spiral_curve, count, generator, noise)


def two_moons(
    count: int, generator: torch.Generator, noise: float = MOON_NOISE
) -> tuple[Tensor, Tensor]:
    """双月：``(N, 2)`` 的点与 0/1 类别。"""
    return _sample(moon_curve, count, generator, noise)


def bayes_posterior(curve: Curve, points: Tensor, noise: float, grid: int = 600) -> Tensor:
    """贝叶斯分类器：每一点属于类别 1 的后验概率 ``(N,)``。

    类条件密度 ``p(x | c) = ∫₀¹ N(x; γ_c(t), noise² I) dt``，对 ``t`` 用等距求和；
    两类先验相等，后验就是密度之比。
    """
    t = (torch.arange(grid, dtype=points.dtype) + 0.5) / grid
    scores = []
    for label in (0, 1):
        distance2 = torch.cdist(points, curve(t, label)).square()
        scores.append(torch.logsumexp(-distance2 / (2 * noise**2), dim=1))
    return torch.sigmoid(scores[1] - scores[0])


def spiral_bayes(points: Tensor, noise: float = SPIRAL_NOISE) -> Tensor:
    """双螺旋的 ``bayes_posterior``。"""
    return bayes_posterior(spiral_curve, points, noise)


def moon_bayes(points: Tensor, noise: float = MOON_NOISE) -> Tensor:
    """双月的 ``bayes_posterior``。"""
    return bayes_posterior(moon_curve, points, noise)
