"""池化：最大（带下标）、平均、自适应、全局，以及不靠 autograd 推出的反向。

最大池化把梯度交给窗口里最大的那一个；平均池化平分给每一个。自适应池化由输出大小反推每个窗口的
起止，窗口大小可以不等；输出为 1×1 时就是全局平均池化。

不处理：``ceil_mode``，以及空洞的最大池化。

维度约定：``B, C, H, W`` 输入；``P Q`` 输出高宽；``R S`` 窗口高宽。

参考: Scherer et al., 2010, Evaluation of Pooling Operations in Convolutional Architectures；
Lin et al., 2013, arXiv:1312.4400（全局平均池化）。README「池化」。
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from chapter_04_cnn_classic.conv import Geometry, Size, as_pair, col2im, make_geometry


def _window_geometry(x: Tensor, kernel: Size, stride: Size | None, padding: Size) -> Geometry:
    """池化的几何；``stride`` 缺省等于窗口大小（互不重叠）。"""
    if x.ndim != 4:
        raise ValueError(f"池化的输入应为 (B, C, H, W)，实为 {tuple(x.shape)}")
    size = as_pair(kernel, "kernel_size")
    padding = as_pair(padding, "padding", at_least=0)
    geometry = make_geometry(size, size if stride is None else stride, padding)
    if 2 * geometry.pads[2] > size[0] or 2 * geometry.pads[0] > size[1]:
        raise ValueError(f"padding={padding} 至多为窗口 {kernel} 的一半，否则有的窗口里没有像素")
    return geometry


def _windows(padded: Tensor, geometry: Geometry, size: tuple[int, int]) -> list[Tensor]:
    """窗口里每个位置 ``(r, s)`` 的元素，``R·S`` 个 ``(B, C, P, Q)``，都是视图。"""
    (rows, columns), (step_h, step_w) = geometry.kernel, geometry.stride
    height, width = size
    return [
        padded[
            :,
            :,
            r : r + step_h * (height - 1) + 1 : step_h,
            s : s + step_w * (width - 1) + 1 : step_w,
        ]
        for r, s in product(range(rows), range(columns))
    ]


# ---------------------------------------------------------------- 最大池化


class _MaxPool2d(torch.autograd.Function):
    """最大池化；梯度只流向每个窗口里最大的那个像素。"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        size = geometry.output_size(*x.shape[2:])
        lowest = -torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
        best, *others = _windows(F.pad(x, geometry.pads, value=lowest), geometry, size)
        best, winner = best.clone(), torch.zeros(best.shape, dtype=torch.int64, device=x.device)
        for index, value in enumerate(others, start=1):
            # 并列时取先遇到的（行优先）；nan 一律取胜，不让坏值被悄悄掩盖
            better = (value > best) | value.isnan()
            best = torch.where(better, value, best)
            winner.masked_fill_(better, index)
        ctx.geometry, ctx.shape = geometry, x.shape
        indices = _flat_indices(winner, geometry, x.shape[3])
        ctx.save_for_backward(indices)
        ctx.mark_non_differentiable(indices)
        return best, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        batch, channels, height, width = ctx.shape
        gx = grad.new_zeros(batch, channels, height * width)
        gx.scatter_add_(2, indices.flatten(2), grad.flatten(2))  # 窗口重叠时同一像素可多次取胜
        return gx.view(ctx.shape), None


def _flat_indices(winner: Tensor, geometry: Geometry, width: int) -> Tensor:
    """窗口内的编号 ``r·S + s`` -> 未填充的图上的一维下标 ``h·W + w``。"""
    left, _, top, _ = geometry.pads
    rows = torch.arange(winner.shape[2], device=winner.device) * geometry.stride[0] - top
    columns = torch.arange(winner.shape[3], device=winner.device) * geometry.stride[1] - left
    row = winner // geometry.kernel[1] + rows.view(-1, 1)
    column = winner % geometry.kernel[1] + columns
    # 窗口里全是 −∞ 时胜者停在左上角，那里可能是填充：截到 0，正是窗口里第一个真实的像素
    return row.clamp(min=0) * width + column.clamp(min=0)


def max_pool2d(
    x: Tensor, kernel_size: Size, stride: Size | None = None, padding: Size = 0
) -> tuple[Tensor, Tensor]:
    """最大池化。

    参数:
        x: ``(B, C, H, W)``。
        kernel_size, stride, padding: 同 ``F.max_pool2d``；填充处视为负无穷。

    返回:
        (最大值 ``(B, C, P, Q)``，int64 的下标 ``(B, C, P, Q)``)；下标是 ``h·W + w``，与
        ``F.max_pool2d(..., return_indices=True)`` 相同。
    """
    return _MaxPool2d.apply(x, _window_geometry(x, kernel_size, stride, padding))


# ---------------------------------------------------------------- 平均池化


class _AvgPool2d(torch.autograd.Function):
    """平均池化；梯度平分给窗口里的每个像素。"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, geometry: Geometry, weight: Tensor) -> Tensor:
        ctx.geometry, ctx.shape = geometry, x.shape
        ctx.save_for_backward(weight)
        windows = _windows(F.pad(x, geometry.pads), geometry, tuple(weight.shape))
        total = windows[0].clone()
        for value in windows[1:]:
            total += value
        return total * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        left, right, top, bottom = ctx.geometry.pads
        *batch, height, width = ctx.shape
        padded = grad.new_zeros(*batch, height + top + bottom, width + left + right)
        share = (grad * weight)[:, :, None, None].expand(-1, -1, *ctx.geometry.kernel, -1, -1)
        col2im(share, ctx.geometry, padded)
        return padded[:, :, top : top + height, left : left + width], None, None


def avg_pool2d(
    x: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    *,
    count_include_pad: bool = True,
) -> Tensor:
    """平均池化，``(B, C, H, W) -> (B, C, P, Q)``。

    参数:
        x, kernel_size, stride, padding: 同 ``F.avg_pool2d``；填充处视为零。
        count_include_pad: 除数是否把填充的像素也算进去。
    """
    geometry = _window_geometry(x, kernel_size, stride, padding)
    size = geometry.output_size(*x.shape[2:])
    inside = F.pad(x.new_ones(1, 1, *x.shape[2:]), geometry.pads, value=float(count_include_pad))
    counts = torch.stack(_windows(inside, geometry, size)).sum(dim=0)[0, 0]
    return _AvgPool2d.apply(x, geometry, 1 / counts)


# ---------------------------------------------------------------- 自适应与全局


def _averaging_matrix(size: int, out: int, like: Tensor) -> Tensor:
    """``(out, size)``：第 ``i`` 行在 ``[⌊i·size/out⌋, ⌈(i+1)·size/out⌉)`` 上取平均，其余为零。"""
    matrix = like.new_zeros(out, size)
    for i in range(out):
        start, end = i * size // out, -(-(i + 1) * size // out)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def adaptive_avg_pool2d(x: Tensor, output_size: Size) -> Tensor:
    """自适应平均池化，``(B, C, H, W) -> (B, C, P, Q)``，``P Q`` 由 ``output_size`` 给定。

    平均是可分离的线性运算：``y = A_h · x · A_wᵀ``，两次矩阵乘法即可；梯度就是它们的转置。
    代价是 ``0 · nan = nan``：一个 inf 或 nan 会染遍同一通道的所有输出，官方只染它所在的窗口。
    """
    if x.ndim != 4 or 0 in x.shape[2:]:
        raise ValueError(f"池化的输入应为 (B, C, H, W)，H、W 至少为 1，实为 {tuple(x.shape)}")
    height, width = as_pair(output_size, "output_size")
    rows = _averaging_matrix(x.shape[2], height, x)
    columns = _averaging_matrix(x.shape[3], width, x)
    return rows @ x @ columns.T


def global_avg_pool2d(x: Tensor) -> Tensor:
    """全局平均池化，``(B, C, H, W) -> (B, C)``：每个通道只留一个数，对任意大小的图都成立。"""
    return x.mean(dim=(2, 3))
