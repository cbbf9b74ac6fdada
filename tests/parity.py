"""与官方实现对照时共用的几个小工具。"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from utils import make_generator


def normal(*shape: int, seed: int = 0) -> Tensor:
    """float64 的标准正态样本。"""
    return torch.randn(shape, generator=make_generator(seed), dtype=torch.float64)


def assert_equal(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """形状、dtype 相同，最大误差不超过 ``tolerance`` 乘以最大的数（至少 1e-300，防止除以零）。"""
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=tolerance * max(expected.abs().max().item(), 1e-300)
    )


def autograd(function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """由上游梯度 ``grad`` 求 ``function(*inputs)`` 对各输入的梯度。"""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves, grad)
