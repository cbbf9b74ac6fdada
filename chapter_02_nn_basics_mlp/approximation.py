"""万能逼近的构造性证明，写成可以运行的代码；以及深度、频率对逼近的影响。

本文件教什么：不训练，直接写出一个 ReLU 网络的权重，使它与给定函数处处相差不超过 ε；
深度怎样以指数方式增加折线的段数；训练为什么先学会低频。
不涉及：多维情形的构造（README 里有思路）。对应 README 的「万能逼近」一节。

维度约定：一维输入 ``x`` 形状 ``(N, 1)``，输出 ``(N, 1)``；构造出的网络用 float64。
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from chapter_02_nn_basics_mlp.activations import relu
from chapter_02_nn_basics_mlp.losses import mse
from chapter_02_nn_basics_mlp.mlp import MLP

# ---------------------------------------------------------------- 一个隐藏层：帽函数的叠加


def hat(x: Tensor, center: float, h: float) -> Tensor:
    """帽函数（三角形的尖峰）：``center`` 处为 1，``center ± h`` 之外为 0，由三个 ReLU 拼成。

    ``(relu(x − c + h) − 2 relu(x − c) + relu(x − c − h)) / h``
    """
    d = x - center
    return (relu(d + h) - 2 * relu(d) + relu(d - h)) / h


def sum_of_hats(function: Callable[[Tensor], Tensor], x: Tensor, knots: Tensor) -> Tensor:
    """``Σ_i f(x_i) · hat_i(x)``：逼近的字面写法，``n + 1`` 个帽函数，每个三个 ReLU。"""
    h = (knots[1] - knots[0]).item()
    heights = function(knots)
    pairs = zip(knots.tolist(), heights.tolist(), strict=True)
    return sum((height * hat(x, c, h) for c, height in pairs), torch.zeros_like(x))


def pieces_for(epsilon: float, lipschitz: float, low: float = -1.0, high: float = 1.0) -> int:
    """误差不超过 ``epsilon`` 所需的段数 ``n = ⌈L (b − a) / (2ε)⌉``，``L`` 为利普希茨常数。

    推导：段内 ``x = (1 − t) x_i + t x_{i+1}``，
    ``|f(x) − p(x)| ≤ (1 − t)|f(x) − f(x_i)| + t|f(x) − f(x_{i+1})| ≤ 2t(1 − t) L h ≤ L h / 2``。
    """
    if epsilon <= 0 or lipschitz <= 0 or low >= high:
        raise ValueError(
            f"应有 ε > 0、L > 0、low < high，实为 {epsilon}、{lipschitz}、{(low, high)}"
        )
    return math.ceil(lipschitz * (high - low) / (2 * epsilon))


@torch.no_grad()
def build_relu_network(
    function: Callable[[Tensor], Tensor], pieces: int, low: float = -1.0, high: float = 1.0
) -> MLP:
    """不经训练，直接写出一个单隐藏层 ReLU 网络，在等距节点上插值 ``function``。

    把所有帽函数里转折点相同的 ReLU 合并，只剩 ``pieces`` 个神经元：
    ``p(x) = f(x_0) + Σ_i (s_i − s_{i−1}) relu(x − x_i)``，``s_i`` 是第 i 段的斜率，``s_{−1} = 0``。

    参数:
        function: 逐元素的一维函数。
        pieces: 段数，也是隐藏层的宽度。

    返回:
        float64 的 ``MLP(1, (pieces,), 1, "relu")``。
    """
    knots = torch.linspace(low, high, pieces + 1, dtype=torch.float64)
    values = function(knots)
    slopes = values.diff() / knots.diff()
    model = MLP(1, (pieces,), 1, "relu").double()
    first, second = model.layers
    first.weight.fill_(1.0)
    first.bias.copy_(-knots[:-1])
    second.weight.copy_(slopes.diff(prepend=slopes.new_zeros(1)).unsqueeze(0))
    second.bias.copy_(values[:1])
    return model


@torch.no_grad()
def max_error(
    model: nn.Module,
    function: Callable[[Tensor], Tensor],
    low: float = -1.0,
    high: float = 1.0,
    points: int = 20_001,
) -> float:
    """密网格上的最大误差 ``max |p(x) − f(x)|``。"""
    dtype = next(model.parameters()).dtype
    x = torch.linspace(low, high, points, dtype=dtype).unsqueeze(1)
    return (model(x) - function(x)).abs().max().item()


# ---------------------------------------------------------------- 深度：2ᵏ 段的锯齿


def tent(x: Tensor) -> Tensor:
    """帐篷映射 ``2 relu(x) − 4 relu(x − ½)``：``[0, 1]`` 对折一次，两个 ReLU。"""
    return 2 * relu(x) - 4 * relu(x - 0.5)


@torch.no_grad()
def build_sawtooth_network(depth: int) -> MLP:
    """帐篷映射复合 ``depth`` 次：每层两个神经元，得到 ``2^depth`` 段的锯齿。

    参考: Telgarsky, 2016, arXiv:1602.04485。
    """
    model = MLP(1, (2,) * depth, 1, "relu").double()
    combine = torch.tensor([[2.0, -4.0]], dtype=torch.float64)  # 由两个 ReLU 得到帐篷的值
    for index, layer in enumerate(model.layers):
        layer.bias.zero_()
        if index == depth:
            layer.weight.copy_(combine)
            continue
        layer.weight.copy_(combine.expand(2, 2) if index else torch.ones(2, 1))
        layer.bias[1] = -0.5
    return model


@torch.no_grad()
def count_linear_pieces(
    model: nn.Module, low: float = 0.0, high: float = 1.0, points: int = 2**16 + 1
) -> int:
    """一维折线函数的段数：在二进等距网格上数斜率改变了几次，再加一。

    前提是每个转折点都落在网格上（锯齿网络的转折点是二进小数），否则会把一次转折数成两次。
    """
    x = torch.linspace(low, high, points, dtype=torch.float64).unsqueeze(1)
    slopes = model(x).flatten().diff() * (points - 1) / (high - low)
    return 1 + int((slopes.diff().abs() > 1e-6).sum())


# ---------------------------------------------------------------- 频率：谱偏置


class FourierFeatures(nn.Module):
    """``x -> [sin(πkx), cos(πkx)]``，``k = 1..count``：把高频直接摆在输入里。

    ``(N, 1) -> (N, 2·count)``。参考: Tancik 等, 2020, arXiv:2006.10739。
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.arange(1, count + 1.0))

    def forward(self, x: Tensor) -> Tensor:
        angle = math.pi * x * self.frequencies  # (N, 1) -> (N, count)
        return torch.cat([angle.sin(), angle.cos()], dim=1)


def wave_mixture(x: Tensor, frequencies: Sequence[int]) -> Tensor:
    """``[-1, 1]`` 上的 ``Σ_k sin(πkx + k)``：第 k 项有 k 个周期，振幅相同，相位错开。"""
    return sum((torch.sin(math.pi * k * x + k) for k in frequencies), torch.zeros_like(x))


def mode_errors(residual: Tensor, frequencies: Sequence[int]) -> Tensor:
    """残差在各频率上的振幅（目标的振幅是 1，所以就是相对误差），``(N, 1) -> (K,)``。

    残差须取自 ``[-1, 1)`` 上的等距点；振幅是离散傅里叶系数模的 ``2/N`` 倍。
    """
    coefficients = torch.fft.rfft(residual.flatten())
    return 2 * coefficients[list(frequencies)].abs() / len(residual)


def spectral_bias(
    model: nn.Module, frequencies: Sequence[int], steps: int, every: int, lr: float = 1e-3
) -> tuple[list[int], Tensor]:
    """训练 ``model`` 拟合 ``wave_mixture``，每隔 ``every`` 步记下各频率的误差。

    返回:
        (步数, 误差 ``(记录次数, 频率数)``)。

    参考: Rahaman 等, 2019, arXiv:1806.08734。
    """
    x = torch.arange(256.0).unsqueeze(1) / 128 - 1
    y = wave_mixture(x, frequencies)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    marks, errors = [], []
    for step in range(steps + 1):
        prediction = model(x)
        if step % every == 0:
            marks.append(step)
            errors.append(mode_errors((prediction - y).detach(), frequencies))
        optimizer.zero_grad()
        mse(prediction, y).backward()
        optimizer.step()
    return marks, torch.stack(errors)
