"""引擎上的网络：``Linear`` 与 ``MLP``，只有 train.py 用得到的那么多；以及它的 PyTorch 孪生。

本文件教什么：模块不过是一组参数加一个前向函数。参数名、形状与缺省初始化的分布同 ``torch.nn``，
``state_dict`` 可以与 PyTorch 互换。层、初始化与训练的道理在第 2 章。

维度约定：``B`` 批大小，``I``、``O`` 输入与输出宽度。
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from chapter_01_tensor_autograd import functional as F
from chapter_01_tensor_autograd.engine import Tensor, no_grad

ACTIVATIONS = ("relu", "tanh", "sigmoid", "gelu", "silu")


class Linear:
    """``y = x Wᵀ + b``，初始化为 ``U(−1/√I, 1/√I)``，同 ``nn.Linear``。"""

    def __init__(
        self, in_features: int, out_features: int, generator: torch.Generator, dtype: Any
    ) -> None:
        bound = 1 / math.sqrt(in_features)

        def uniform(*shape: int) -> Tensor:
            values = torch.empty(shape, dtype=torch.float64)
            values.uniform_(-bound, bound, generator=generator)
            return Tensor(values.numpy(), requires_grad=True, dtype=dtype)

        self.weight, self.bias = uniform(out_features, in_features), uniform(out_features)

    def __call__(self, x: Tensor) -> Tensor:
        """``(B, I) -> (B, O)``。"""
        return F.linear(x, self.weight, self.bias)


class MLP:
    """多层感知机：``Linear``、激活交替，最后一层没有激活。

    参数:
        sizes: 各层宽度 ``(输入, 隐藏……, 输出)``，至少两个正整数。
        activation: ``ACTIVATIONS`` 之一。
        generator: 初始化用的生成器。
        dtype: 参数的 NumPy dtype。

    异常:
        ValueError: 宽度或激活函数不合要求。
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str,
        generator: torch.Generator,
        dtype: Any = np.float64,
    ) -> None:
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"sizes={tuple(sizes)} 应至少含输入与输出两个正整数")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r} 不认识：可选 {'、'.join(ACTIVATIONS)}")
        self.activation = getattr(F, activation)
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        self.layers = [Linear(*pair, generator, dtype) for pair in pairs]

    def __call__(self, x: Tensor) -> Tensor:
        """``(B, 输入) -> (B, 输出)``。"""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)

    def named_parameters(self) -> dict[str, Tensor]:
        """``layers.0.weight``、``layers.0.bias``、……"""
        return {
            f"layers.{i}.{name}": getattr(layer, name)
            for i, layer in enumerate(self.layers)
            for name in ("weight", "bias")
        }

    def parameters(self) -> list[Tensor]:
        """全部参数，由浅到深。"""
        return list(self.named_parameters().values())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """参数的副本，``torch.nn.Module.load_state_dict`` 可以直接装入。"""
        return {name: torch.tensor(p.numpy()) for name, p in self.named_parameters().items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """装入 PyTorch 的参数；名字与形状须完全相同，否则一个也不改。"""
        own = self.named_parameters()
        shapes = {name: tuple(p.shape) for name, p in own.items()}
        given = {name: tuple(value.shape) for name, value in state.items()}
        if shapes != given:
            raise ValueError(f"load_state_dict：应为 {shapes}，实为 {given}")
        with no_grad():
            for name, value in state.items():
                own[name].copy_(value.detach().cpu().numpy())


class TorchMLP(torch.nn.Module):
    """``MLP`` 的 PyTorch 孪生：结构、参数名相同，用来逐步比较。"""

    def __init__(self, sizes: Sequence[int], activation: str) -> None:
        super().__init__()
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(*pair) for pair in pairs)
        self.activation = getattr(torch.nn.functional, activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)
