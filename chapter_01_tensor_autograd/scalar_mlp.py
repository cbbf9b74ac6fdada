"""标量引擎上的多层感知机：用一个个 ``Value`` 搭成的网络，训练一步，以及带环的对照。

本文件教什么：神经元就是加权和再过激活；把上万个标量结点连起来，``backward`` 照样一次算清全部梯度。
训练一步的代价大半不在算术，而在造对象；图里若有环，还要再加上垃圾回收。
对应 README 的「标量引擎」一节。

维度约定：``I``、``O`` 一层的输入与输出宽度，``N`` 样本数。
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul

import numpy as np
import torch

from chapter_01_tensor_autograd.scalar_engine import Number, Value


class ScalarMLP:
    """由 ``Value`` 搭成的多层感知机：ReLU 激活，最后一层没有激活。

    参数:
        sizes: 各层宽度，如 ``(2, 16, 16, 1)``。
        generator: 初始化用的生成器：权重 ``U(−√(3/I), √(3/I))``，方差 1/I；偏置为零。
    """

    def __init__(self, sizes: Sequence[int], generator: torch.Generator) -> None:
        self.layers: list[list[tuple[list[Value], Value]]] = []  # 每个神经元：(权重, 偏置)
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
            values = 2 * torch.rand(fan_out, fan_in, generator=generator, dtype=torch.float64) - 1
            rows = (values * math.sqrt(3 / fan_in)).tolist()
            self.layers.append([([Value(w) for w in row], Value(0.0)) for row in rows])

    def __call__(self, x: Sequence[Value | Number]) -> list[Value]:
        """一个样本的前向：``(I,) -> (O,)``。"""
        width = len(self.layers[0][0][0])
        if len(x) != width:
            raise ValueError(f"ScalarMLP：输入有 {len(x)} 个数，应为 {width} 个")
        for depth, layer in enumerate(self.layers, start=1):
            x = [sum(map(mul, weights, x), bias) for weights, bias in layer]
            if depth < len(self.layers):
                x = [value.relu() for value in x]
        return x

    def parameters(self) -> list[Value]:
        """全部参数。"""
        return [p for layer in self.layers for weights, bias in layer for p in (*weights, bias)]

    def scores(self, points: np.ndarray) -> np.ndarray:
        """取出权重，用 NumPy 算一大批点的输出 ``(N, I) -> (N, O)``；不建图，画决策边界用。"""
        x = points
        for depth, layer in enumerate(self.layers, start=1):
            weight = np.array([[w.data for w in weights] for weights, _ in layer])
            x = x @ weight.T + np.array([bias.data for _, bias in layer])
            x = np.maximum(x, 0) if depth < len(self.layers) else x
        return x


def hinge_step(model: ScalarMLP, xs: list[list[float]], ys: list[int], lr: float) -> float:
    """全批量的一步梯度下降：合页损失 ``mean max(0, 1 − y·f(x))``，``y = ±1``；返回损失。"""
    losses = [(1 - model(x)[0] * y).relu() for x, y in zip(xs, ys, strict=True)]
    loss = sum(losses[1:], losses[0]) * (1 / len(losses))
    for p in model.parameters():
        p.grad = 0.0
    loss.backward()
    for p in model.parameters():
        p.data -= lr * p.grad
    return loss.data


class ClosureValue(Value):
    """常见的写法，用来比较代价：每个结点带一个传播梯度的闭包，而闭包捉住了结点自己，成了环。"""

    __slots__ = ("propagate",)

    def __init__(self, *arguments: Value | Number) -> None:
        super().__init__(*arguments)

        def propagate() -> None:
            for parent, local in ((self.left, self.d_left), (self.right, self.d_right)):
                if parent is not None:
                    parent.grad += local * self.grad

        self.propagate = propagate

    def backward(self) -> None:
        """排出拓扑序，再倒着挨个调用闭包。"""
        order, visited, stack = [], set(), [(self, False)]
        while stack:
            node, finished = stack.pop()
            if finished:  # 父结点都已排好
                order.append(node)
            elif node not in visited:
                visited.add(node)
                stack.append((node, True))
                stack.extend((p, False) for p in (node.left, node.right) if p is not None)
        self.grad = 1.0
        for node in reversed(order):
            node.propagate()
