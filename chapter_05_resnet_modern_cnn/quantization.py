"""量化的算法：格点、范围、定点乘法。

8 位整数只有 256 个值。量化就是选一把等距的尺，刻度间隔 ``scale``，零点 ``zero_point``：

    q = clamp(round(x / scale) + zero_point, low, high),    x ≈ scale · (q - zero_point)

只要 x 在范围之内，误差不超过半个刻度。范围取大了刻度变粗，取小了两端被截断；取舍的办法见
``Observer``。本文件只有张量上的公式；量化的层与整个网络在 ``quantized_layers.py``。

本文件不处理：量化感知训练（QAT）、对数刻度、逐组（group-wise）的权重刻度。

参考: Jacob et al., 2018, Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference, arXiv:1712.05877（仿射量化与定点乘法，第 2 节）；
Krishnamoorthi, 2018, Quantizing deep convolutional networks for efficient inference,
arXiv:1806.08342（逐通道）。与论文不同：激活用有符号的整数 [-128, 127]，论文用 [0, 255]，
两者只差零点移动 128；定点乘法一次移位、遇半进一，gemmlowp 分两步舍入。deploy.md「量化」。
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

METHODS = ("minmax", "percentile", "mse")

# ---------------------------------------------------------------- 格点


class Grid(NamedTuple):
    """一把尺：刻度 ``scale``（float，> 0）、零点（int32）、最小与最大的整数。

    ``scale`` 与 ``zero_point`` 的形状能与被量化的张量广播：标量是逐张量（per-tensor），
    ``(C_out, 1, 1, 1)`` 是权重的逐通道（per-channel）。
    """

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int


def check_bits(bits: int) -> None:
    """位数只能是 2 到 8：结果都存在 int8 里。"""
    if not 2 <= bits <= 8:
        raise ValueError(f"量化的位数应在 2 与 8 之间，实为 {bits}")


def affine_grid(minimum: Tensor, maximum: Tensor, bits: int = 8) -> Grid:
    """覆盖 ``[minimum, maximum]`` 的格点，零点不必居中；用于激活。

        scale = (max - min) / (2^bits - 1),    zero_point = round(low - min / scale)

    范围先扩到含 0，且 0 恰好落在格点上：补零与 ReLU 的零都没有误差。

    参数:
        minimum, maximum: 标量张量，``minimum ≤ maximum``，有限。
    """
    check_bits(bits)
    if not (torch.isfinite(minimum) & torch.isfinite(maximum) & (minimum <= maximum)):
        raise ValueError(f"范围应有限，且最小不大于最大，实为 [{minimum:.4g}, {maximum:.4g}]")
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    minimum, maximum = minimum.clamp(max=0), maximum.clamp(min=0)
    width = maximum - minimum
    scale = torch.where(width > 0, width / (high - low), 1.0)  # 全是零：什么刻度都行
    return Grid(scale, torch.round(low - minimum / scale).int(), low, high)


def symmetric_grid(
    weight: Tensor, bits: int = 8, per_channel: bool = True, least: Tensor | float = 0.0
) -> Grid:
    """零点为 0 的格点，两端对称；用于权重。

        scale = max|w| / (2^(bits-1) - 1)

    不用 ``-2^(bits-1)`` 这一格：正负对称，8 位时 int8 × int8 的积不会超过 2^14。

    参数:
        weight: ``(C_out, ...)``。
        per_channel: 真则每个输出通道一个刻度，假则整个张量一个。
        least: 刻度的下限，标量或 ``(C_out,)``。
    """
    check_bits(bits)
    high = 2 ** (bits - 1) - 1
    ones = [1] * (weight.ndim - 1)
    largest = weight.detach().abs().flatten(1).amax(dim=1)  # (C_out,)
    scale = torch.maximum(largest / high, torch.as_tensor(least).to(largest))
    scale = torch.where(scale > 0, scale, 1.0)
    scale = scale.view(-1, *ones) if per_channel else scale.max()
    return Grid(scale, torch.zeros_like(scale, dtype=torch.int32), -high, high)


def quantize_tensor(x: Tensor, grid: Grid) -> Tensor:
    """``x`` 最近的格点的编号，int8，形状不变；超出范围的截断到两端。"""
    q = torch.round(x / grid.scale) + grid.zero_point
    return q.clamp(grid.low, grid.high).to(torch.int8)


def dequantize_tensor(q: Tensor, grid: Grid) -> Tensor:
    """格点编号 -> 浮点数。"""
    return (q.to(grid.scale.dtype) - grid.zero_point) * grid.scale


def fake_quantize(x: Tensor, grid: Grid) -> Tensor:
    """量化再还原：仍是浮点数，但只取格点上的值。"""
    return dequantize_tensor(quantize_tensor(x, grid), grid)


# ---------------------------------------------------------------- 激活的范围


class Observer:
    """看若干批激活，再定出格点；看过的值随机留样，每批 ``samples`` 个。

    参数:
        generator: 留样的随机性，CPU 上的；缺省时种子为 0。
    """

    def __init__(self, generator: torch.Generator | None = None, samples: int = 4096) -> None:
        self.generator = generator or torch.Generator().manual_seed(0)
        self.samples = samples
        self.kept: list[Tensor] = []
        self.minimum = torch.tensor(torch.inf)
        self.maximum = torch.tensor(-torch.inf)

    def update(self, x: Tensor) -> None:
        """看一批，任意形状。等距抽样会与图像的行列合拍（只看到同一列），所以随机抽。"""
        values = x.detach().float().flatten()
        self.minimum = torch.minimum(self.minimum.to(values), values.min())
        self.maximum = torch.maximum(self.maximum.to(values), values.max())
        index = torch.randint(len(values), (self.samples,), generator=self.generator)
        self.kept.append(values[index.to(values.device)])

    def grid(self, method: str = "mse", bits: int = 8, tail: float = 1e-3) -> Grid:
        """见过的激活的格点。

        参数:
            method: ``minmax`` 取见过的最小与最大，一个离群值就能毁掉刻度；``percentile`` 两端各
                舍去 ``tail`` 的值；``mse`` 把范围缩到留样的均方误差最小为止，位数越少，缩得越多。

        异常:
            ValueError: ``method`` 不认识，或还没有看过任何激活。
        """
        if method not in METHODS:
            raise ValueError(f"method={method!r} 不认识：可选 {'、'.join(METHODS)}")
        if not self.kept:
            raise ValueError("还没有看过任何激活：校准时这一层从未运行")
        if method == "minmax":
            return affine_grid(self.minimum, self.maximum, bits)
        values = torch.cat(self.kept)
        if method == "percentile":
            ends = torch.tensor([tail, 1 - tail], device=values.device)
            return affine_grid(*torch.quantile(values, ends), bits)
        shrunk = torch.linspace(0.2, 1, 17).to(values)
        grids = [affine_grid(a * self.minimum, a * self.maximum, bits) for a in shrunk]
        return min(grids, key=lambda g: (fake_quantize(values, g) - values).square().mean().item())


# ---------------------------------------------------------------- 定点乘法


def fixed_point(factor: Tensor) -> tuple[Tensor, Tensor]:
    """把正的实数写成 ``multiplier · 2^(-shift)``，``multiplier`` 是 [2^30, 2^31) 里的 int32。

    没有浮点单元的芯片靠它做实数乘法：一次整数乘法，一次移位。相对误差至多 2^(-31)。

    返回:
        (multiplier, shift)，都是 int64 张量，形状同 ``factor``。

    异常:
        ValueError: 超出 [2^(-31), 2^30)，移位数会越界。
    """
    if not ((factor >= 2**-31) & (factor < 2**30)).all():
        raise ValueError(f"定点乘数应在 [2^-31, 2^30) 之内，实为 {factor.flatten().tolist()[:4]}")
    mantissa, exponent = torch.frexp(factor.double())  # 尾数在 [0.5, 1)
    multiplier = torch.round(mantissa * 2**31).long()
    carried = multiplier == 2**31  # 尾数四舍五入成了 1
    multiplier = torch.where(carried, 2**30, multiplier)
    return multiplier, 31 - exponent.long() - carried.long()


def requantize(acc: Tensor, multiplier: Tensor, shift: Tensor, grid: Grid) -> Tensor:
    """int32 累加和 -> 下一层的 int8 输入，全程整数。

        q = clamp(zero_point + ⌊acc · multiplier · 2^(-shift) + 1/2⌋, low, high)

    ``grid`` 的范围从 0 起时，``clamp`` 的下端就是 ReLU，不用另算。

    参数:
        acc: int32；乘积用 int64，小于 2^62，不会溢出。
        multiplier, shift: 来自 ``fixed_point``，形状能与 ``acc`` 广播。
    """
    half = (torch.ones_like(shift) << shift) >> 1  # shift 为 0 时是 0
    q = ((acc.long() * multiplier + half) >> shift) + grid.zero_point
    return q.clamp(grid.low, grid.high).to(torch.int8)
