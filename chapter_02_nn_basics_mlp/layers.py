"""全连接层、SwiGLU 与手推反向传播的 MLP。

本文件教什么：一层的前向、反向各是哪几个矩阵乘法；把它们串起来就是反向传播。
``linear_backward`` 与 ``MLPManual`` 不用 autograd，所有梯度都是手推的公式；
``Linear``、``SwiGLU`` 是交给 autograd 的薄模块，测试证明两者一致。
不涉及：Dropout 与归一化（第 3 章）。对应 README 的「反向传播」一节。

维度约定：``B`` 批大小，``I`` 输入宽度，``O`` 输出宽度；权重 ``(O, I)``，与 ``nn.Linear`` 相同。
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from chapter_02_nn_basics_mlp.activations import ACTIVATIONS, silu, silu_prime
from chapter_02_nn_basics_mlp.initialization import kaiming_normal_

# ---------------------------------------------------------------- 纯函数


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = x Wᵀ + b``。

    参数:
        x: ``(..., I)``。
        weight: ``(O, I)``。
        bias: ``(O,)``。

    返回:
        ``(..., O)``。代价：每个样本 ``I · O`` 次乘加。
    """
    y = x @ weight.T
    return y if bias is None else y + bias


def linear_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """由上游梯度 ``∂L/∂y`` 求 ``(∂L/∂x, ∂L/∂W, ∂L/∂b)``。

    ``∂L/∂x = g W``，``∂L/∂W = gᵀ x``，``∂L/∂b = Σ_b g_b``：形状相容的写法只有这一种。

    参数:
        grad: ``(..., O)``。
        x: 前向时的输入 ``(..., I)``。
        weight: ``(O, I)``。

    返回:
        形状分别同 ``x``、``weight`` 与 ``(O,)``。代价：``2 · I · O`` 次乘加，前向的两倍。
    """
    rows_grad = grad.reshape(-1, grad.shape[-1])  # (..., O) -> (B, O)
    rows_x = x.reshape(-1, x.shape[-1])  # (..., I) -> (B, I)
    return grad @ weight, rows_grad.T @ rows_x, rows_grad.sum(dim=0)


def swiglu(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """``(SiLU(x W_gateᵀ) ⊙ x W_upᵀ) W_downᵀ``：一路算内容，一路算闸门。

    参考: Shazeer, 2020, arXiv:2002.05202, 式 (6)。
    """
    return linear(silu(linear(x, w_gate)) * linear(x, w_up), w_down)


def swiglu_backward(
    grad: Tensor, x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``swiglu`` 的手推反向：返回对 ``x, w_gate, w_up, w_down`` 的梯度。"""
    gate, up = linear(x, w_gate), linear(x, w_up)  # (..., H)
    g_hidden, g_down, _ = linear_backward(grad, silu(gate) * up, w_down)
    gx_gate, g_gate, _ = linear_backward(g_hidden * up * silu_prime(gate), x, w_gate)
    gx_up, g_up, _ = linear_backward(g_hidden * silu(gate), x, w_up)
    return gx_gate + gx_up, g_gate, g_up, g_down  # x 用了两次，梯度相加


# ---------------------------------------------------------------- 手推反向传播的 MLP


class MLPManual:
    """不用 autograd 的多层感知机：前向记下每层的输入，反向按链式法则逐层倒推。

    ``h_0 = x``，``z_l = h_{l−1} W_lᵀ + b_l``，``h_l = φ(z_l)``（最后一层没有激活）。

    参数:
        sizes: 各层宽度 ``(in, hidden..., out)``，至少两个数。
        activation: ``ACTIVATIONS`` 中的名字。
        generator: 初始化用的生成器。
        dtype: 参数的数据类型。
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str = "relu",
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"sizes={tuple(sizes)} 应至少含输入与输出两个正整数")
        self.activation = ACTIVATIONS[activation]
        self.weights, self.biases = [], []
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
            weight = torch.empty(fan_out, fan_in, dtype=dtype)
            self.weights.append(kaiming_normal_(weight, activation, generator))
            self.biases.append(torch.zeros(fan_out, dtype=dtype))
        self._inputs: list[Tensor] = []  # 各层的输入 h_{l−1}
        self._pre: list[Tensor] = []  # 各隐藏层的激活前 z_l

    @property
    def parameters(self) -> list[Tensor]:
        """``[W_1, b_1, W_2, b_2, ...]``，与 ``backward`` 返回的梯度同序。"""
        return [p for pair in zip(self.weights, self.biases, strict=True) for p in pair]

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in) -> (B, out)``，并记下反向传播要用的中间结果。"""
        self._inputs, self._pre = [], []
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            self._inputs.append(x)
            x = linear(x, weight, bias)
            if layer < last:
                self._pre.append(x)
                x = self.activation.value(x)
        return x

    def backward(self, grad: Tensor) -> tuple[list[Tensor], Tensor]:
        """由损失对输出的梯度 ``(B, out)`` 求全部参数与输入的梯度。

        返回:
            (与 ``parameters`` 同序的梯度, 对输入的梯度 ``(B, in)``)。

        异常:
            RuntimeError: 还没有调用过 ``forward``。
        """
        if not self._inputs:
            raise RuntimeError("MLPManual.backward 之前要先调用 forward")
        grads: list[Tensor] = []
        for layer in reversed(range(len(self.weights))):
            if layer < len(self._pre):
                grad = grad * self.activation.prime(self._pre[layer])  # 穿过激活
            grad, g_weight, g_bias = linear_backward(grad, self._inputs[layer], self.weights[layer])
            grads = [g_weight, g_bias, *grads]
        return grads, grad

    def step(self, grads: list[Tensor], lr: float) -> None:
        """一步梯度下降：``p ← p − lr · g``。"""
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter -= lr * grad


# ---------------------------------------------------------------- nn.Module 外壳


class Linear(nn.Module):
    """``nn.Linear`` 的从零实现：参数名、形状与缺省初始化的分布都相同。

    缺省初始化是 PyTorch 的 ``U(−1/√I, 1/√I)``。
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        bound = 1 / math.sqrt(in_features)
        weight = torch.empty(out_features, in_features)
        self.weight = nn.Parameter(weight.uniform_(-bound, bound, generator=generator))
        self.bias = None
        if bias:
            values = torch.empty(out_features).uniform_(-bound, bound, generator=generator)
            self.bias = nn.Parameter(values)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class SwiGLU(nn.Module):
    """SwiGLU 前馈块 ``(..., C) -> (..., C)``，没有偏置；今天的大语言模型大多用它。

    三个矩阵共 ``3 · C · hidden`` 个参数；要与宽度 ``4C`` 的普通两层 MLP 参数相等，
    应取 ``hidden = 8C/3``。
    """

    def __init__(
        self, features: int, hidden: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.gate = Linear(features, hidden, bias=False, generator=generator)
        self.up = Linear(features, hidden, bias=False, generator=generator)
        self.down = Linear(hidden, features, bias=False, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x, self.gate.weight, self.up.weight, self.down.weight)
