"""引擎上的优化器：``SGD``（可带动量）与 ``Adam``，逐步等于 ``torch.optim`` 的同名者。

本文件教什么：优化器只是拿着参数与它们的 ``grad`` 做一次更新。参数是叶子，更新要放在 ``no_grad``
里，并且原地进行；更新量写进预先分配的缓冲。各种优化器的道理在第 3 章。
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from chapter_01_tensor_autograd.engine import Tensor, no_grad


class Optimizer:
    """公共部分：清零与更新；子类写出一个参数的更新量。"""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        self.parameters, self.lr = list(parameters), lr
        if not self.parameters or not lr >= 0:
            raise ValueError(
                f"优化器要有至少一个参数，学习率不为负：{len(self.parameters)} 个，{lr}"
            )
        # 每个参数一块与它同形的缓冲，装更新量
        self.buffers = [np.empty_like(p.numpy()) for p in self.parameters]

    def zero_grad(self) -> None:
        """梯度是累加的：每步之前清掉。"""
        for p in self.parameters:
            p.grad = None

    @no_grad()
    def step(self) -> None:
        """``p ← p − 更新量``；没有梯度的参数不动。"""
        for index, p in enumerate(self.parameters):
            if p.grad is not None:
                p.sub_(self.update(index, p.grad.numpy(), self.buffers[index]))

    def update(self, index: int, grad: np.ndarray, out: np.ndarray) -> np.ndarray:
        """第 ``index`` 个参数的更新量，写进 ``out`` 并返回它。"""
        raise NotImplementedError


class SGD(Optimizer):
    """``v ← μv + g``，``p ← p − ηv``；``μ = 0`` 时就是梯度下降。"""

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.0) -> None:
        super().__init__(parameters, lr)
        self.momentum = momentum
        self.velocity: list[np.ndarray | None] = [None] * len(self.parameters)

    def update(self, index: int, grad: np.ndarray, out: np.ndarray) -> np.ndarray:
        """``ηg``，有动量时 ``ηv``。"""
        if self.momentum:
            if self.velocity[index] is None:
                self.velocity[index] = grad.copy()
            else:
                self.velocity[index] *= self.momentum
                self.velocity[index] += grad
            grad = self.velocity[index]
        return np.multiply(grad, self.lr, out=out)


class Adam(Optimizer):
    """``m ← β₁m + (1−β₁)g``，``v ← β₂v + (1−β₂)g²``，``p ← p − η m̂/(√v̂ + ε)``。

    ``m̂ = m/(1−β₁ᵗ)``、``v̂ = v/(1−β₂ᵗ)`` 修正开头几步向零的偏差。

    参考: Kingma, Ba, 2014, arXiv:1412.6980, 算法 1。
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(parameters, lr)
        self.betas, self.eps = betas, eps
        self.first = [np.zeros_like(p.numpy()) for p in self.parameters]
        self.second = [np.zeros_like(p.numpy()) for p in self.parameters]
        self.steps = [0] * len(self.parameters)  # 没有梯度的一步，不算它的一步

    def update(self, index: int, grad: np.ndarray, out: np.ndarray) -> np.ndarray:
        """``η m̂/(√v̂ + ε)``。"""
        beta1, beta2 = self.betas
        m, v = self.first[index], self.second[index]
        self.steps[index] += 1
        m += (1 - beta1) * (grad - m)
        v *= beta2
        v += np.multiply(grad, (1 - beta2) * grad, out=out)
        np.sqrt(v, out=out)
        out /= math.sqrt(1 - beta2 ** self.steps[index])
        out += self.eps
        np.divide(m, out, out=out)
        out *= self.lr / (1 - beta1 ** self.steps[index])
        return out
