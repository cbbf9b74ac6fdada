"""检查优化器时共用的几个小工具：各种形状的参数，由参数与步数决定的梯度。"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from chapter_03_optimization_regularization.optimizers_modern import SAM
from tests.parity import normal

SHAPES = [(5, 7), (7,), (3, 2, 4), (1, 1), ()]  # 矩阵、向量、高维、单个元素、标量
MATRICES = [(5, 7), (9, 4), (6, 6)]


def make_params(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    return [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def walk(optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    """``steps`` 步：梯度由参数与步数决定，尺度随坐标与时间变化；标量参数隔一步才有梯度。"""
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def set_gradients(t: int) -> Tensor:
        for index, p in enumerate(params):
            noise = normal(*p.shape, seed=1000 * t + index)
            p.grad = 0.3 * p.detach() + noise * 10 ** math.sin(index + t / 10)
            if p.dim() == 0 and t % 2:
                p.grad = None
        return torch.zeros(())

    for t in range(start, start + steps):
        set_gradients(t)
        optimizer.step(partial(set_gradients, t) if isinstance(optimizer, SAM) else None)


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]
