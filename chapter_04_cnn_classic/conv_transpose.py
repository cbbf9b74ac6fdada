"""转置卷积：``conv.py`` 里「对输入求梯度」的那一半，没有新的算法。

前向是卷积的反向，反向是卷积的前向。它常被叫作反卷积（deconvolution），但并不求逆：只还原形状，
不还原数值。

维度约定同 ``conv.py``；这里输入是卷积的输出 ``(B, C, P, Q)``，输出是卷积的输入 ``(B, O, H, W)``。

参考: Zeiler et al., 2010, Deconvolutional Networks；Dumoulin 与 Visin, 2016, arXiv:1603.07285。
README「转置卷积」。
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chapter_04_cnn_classic.conv import (
    Geometry,
    Size,
    add_bias,
    as_pair,
    check_bias,
    conv_forward,
    conv_grad_input,
    conv_grad_weight,
    make_geometry,
)


class _ConvTranspose2d(torch.autograd.Function):
    """与 ``_Conv2d`` 恰好对调：它的前向是对方的反向，它的反向是对方的前向。"""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, geometry: Geometry, size: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        # 裁去填充得到的是视图：复制一份，输出才能就地修改（如 ReLU(inplace=True)）、才能 view
        y = conv_grad_input(x.contiguous(), weight, geometry, size)
        return y.clone(memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, *_ = ctx.needs_input_grad
        # output_padding 不小于步幅（须小于空洞率）时，卷积会多出几行几列，切去
        height, width = x.shape[2:]
        gx = conv_forward(grad, weight, ctx.geometry)[..., :height, :width] if need_x else None
        gw = conv_grad_weight(grad, x.contiguous(), ctx.geometry) if need_weight else None
        return gx, gw, None, None


def conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> Tensor:
    """转置卷积：以同样的核与几何，把 ``conv2d`` 的输出形状变回输入形状（不是求逆）。

    参数:
        x: ``(B, C, P, Q)``。
        weight: ``(C, O/G, R, S)``，注意前两维与 ``conv2d`` 相反。
        bias: ``(O,)``。
        output_padding: 步幅大于 1 时多种输入大小对应同一个输出大小，用它选定其一；
            须小于步幅或空洞率。
        stride, padding, groups, dilation: 与之对应的卷积的参数；次序同 ``F.conv_transpose2d``。

    返回:
        ``(B, O, H, W)``，``H = (P−1)s − 2·padding + d(R−1) + output_padding + 1``。

    参考: Zeiler et al., 2010, Deconvolutional Networks；Dumoulin 与 Visin, 2016。
    """
    if x.ndim != 4 or weight.ndim != 4 or groups < 1 or x.shape[1] % groups:
        raise ValueError(
            f"输入应为 (B, C, P, Q)，核应为 (C, O/G, R, S)，C 须被组数 {groups} 整除，实为 "
            f"{tuple(x.shape)} 与 {tuple(weight.shape)}"
        )
    if x.shape[1] != weight.shape[0]:
        raise ValueError(
            f"通道不相配：输入有 {x.shape[1]} 个，核 {tuple(weight.shape)} 的第一维应与之相等"
        )
    check_bias(bias, weight.shape[1] * groups)
    if isinstance(padding, str):
        raise ValueError(f"转置卷积的 padding={padding!r} 应为整数")
    geometry = make_geometry(tuple(weight.shape[2:]), stride, padding, dilation, groups)
    extra = as_pair(output_padding, "output_padding", at_least=0)
    size = []
    for axis, length in enumerate(x.shape[2:]):
        step, gap = geometry.stride[axis], geometry.dilation[axis]
        if extra[axis] >= max(step, gap):
            raise ValueError(f"output_padding={extra[axis]} 应小于步幅 {step} 或空洞率 {gap}")
        pad = geometry.pads[2] if axis == 0 else geometry.pads[0]
        reach = gap * (geometry.kernel[axis] - 1) + 1
        size.append((length - 1) * step - 2 * pad + reach + extra[axis])
    if min(size) < 1:
        raise ValueError(f"转置卷积的输出大小 {tuple(size)} 应为正：padding 太大")
    return add_bias(_ConvTranspose2d.apply(x, weight, geometry, tuple(size)), bias)
