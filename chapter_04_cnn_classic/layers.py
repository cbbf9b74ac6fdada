"""手写的卷积与池化装成模块，与 ``torch.nn`` 的同名模块互换。

初始化与 state_dict 的键都与官方的相同，所支持的构造参数也同名。

``use_handmade`` 把一个网络里的官方层就地换成这里的，权重不动；因此本章的每个网络都能整个跑在
自己写的层上（``train.py --handmade``）。

参考: README「卷积的三种写法」。
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from chapter_04_cnn_classic.conv import Size, as_pair, conv2d_im2col
from chapter_04_cnn_classic.conv_transpose import conv_transpose2d
from chapter_04_cnn_classic.pooling import adaptive_avg_pool2d, avg_pool2d, max_pool2d


class _ConvBase(nn.Module):
    """权重、偏置与初始化：与 ``nn.Conv2d`` 相同，均匀分布，界为 ``1/√fan_in``。"""

    def __init__(self, shape: tuple[int, ...], out_channels: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)


def _check_channels(in_channels: int, out_channels: int, groups: int) -> None:
    if min(in_channels, out_channels, groups) < 1 or in_channels % groups or out_channels % groups:
        raise ValueError(
            f"通道数 {in_channels} -> {out_channels} 应为正且都被 groups={groups} 整除"
        )


class Conv2d(_ConvBase):
    """im2col 卷积层，``(B, C, H, W) -> (B, O, P, Q)``。参数同 ``nn.Conv2d``（只有零填充）。"""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        _check_channels(in_channels, out_channels, groups)
        shape = (out_channels, in_channels // groups, *as_pair(kernel_size, "kernel_size"))
        super().__init__(shape, out_channels, bias)
        self.options = (stride, padding, dilation, groups)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d_im2col(x, self.weight, self.bias, *self.options)


class ConvTranspose2d(_ConvBase):
    """转置卷积层，``(B, C, P, Q) -> (B, O, H, W)``。参数同 ``nn.ConvTranspose2d``。"""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
    ) -> None:
        _check_channels(in_channels, out_channels, groups)
        shape = (in_channels, out_channels // groups, *as_pair(kernel_size, "kernel_size"))
        super().__init__(shape, out_channels, bias)
        self.options = (stride, padding, output_padding, groups, dilation)

    def forward(self, x: Tensor) -> Tensor:
        return conv_transpose2d(x, self.weight, self.bias, *self.options)


class MaxPool2d(nn.Module):
    """最大池化层；``return_indices`` 时一并返回下标。"""

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        return_indices: bool = False,
    ) -> None:
        super().__init__()
        self.options = (kernel_size, stride, padding)
        self.return_indices = return_indices

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        values, indices = max_pool2d(x, *self.options)
        return (values, indices) if self.return_indices else values


class AvgPool2d(nn.Module):
    """平均池化层；参数同 ``nn.AvgPool2d``。"""

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        count_include_pad: bool = True,
    ) -> None:
        super().__init__()
        self.options = (kernel_size, stride, padding)
        self.count_include_pad = count_include_pad

    def forward(self, x: Tensor) -> Tensor:
        return avg_pool2d(x, *self.options, count_include_pad=self.count_include_pad)


class AdaptiveAvgPool2d(nn.Module):
    """自适应平均池化层；``output_size=1`` 就是全局平均池化（保留两个长度为 1 的维）。"""

    def __init__(self, output_size: Size) -> None:
        super().__init__()
        self.output_size = output_size

    def forward(self, x: Tensor) -> Tensor:
        return adaptive_avg_pool2d(x, self.output_size)


# ---------------------------------------------------------------- 换上手写的层


def _only(layer: nn.Module, **supported: object) -> None:
    """官方层的这些选项手写的层没有：取了别的值就报错，而不是悄悄算成另一种。"""
    for name, value in supported.items():
        actual = getattr(layer, name)
        if actual != value and actual != (value, value):
            raise ValueError(
                f"手写的 {type(layer).__name__} 只支持 {name}={value!r}，实为 {actual!r}"
            )


def _handmade_conv(layer: nn.Conv2d) -> Conv2d:
    _only(layer, padding_mode="zeros")
    with torch.device("meta"):  # 参数马上换掉：不占内存，也不动全局随机数
        ours = Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            layer.bias is not None,
        )
    ours.weight, ours.bias = layer.weight, layer.bias  # 同一份参数，优化器不必重建
    return ours


def _handmade_conv_transpose(layer: nn.ConvTranspose2d) -> ConvTranspose2d:
    with torch.device("meta"):
        ours = ConvTranspose2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.output_padding,
            layer.groups,
            layer.bias is not None,
            layer.dilation,
        )
    ours.weight, ours.bias = layer.weight, layer.bias
    return ours


def _handmade_max_pool(layer: nn.MaxPool2d) -> MaxPool2d:
    _only(layer, dilation=1, ceil_mode=False)
    return MaxPool2d(layer.kernel_size, layer.stride, layer.padding, layer.return_indices)


def _handmade_avg_pool(layer: nn.AvgPool2d) -> AvgPool2d:
    _only(layer, ceil_mode=False, divisor_override=None)
    return AvgPool2d(layer.kernel_size, layer.stride, layer.padding, layer.count_include_pad)


HANDMADE: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Conv2d: _handmade_conv,
    nn.ConvTranspose2d: _handmade_conv_transpose,
    nn.MaxPool2d: _handmade_max_pool,
    nn.AvgPool2d: _handmade_avg_pool,
    nn.AdaptiveAvgPool2d: lambda layer: AdaptiveAvgPool2d(layer.output_size),
}


def use_handmade(model: nn.Module) -> nn.Module:
    """把 ``model`` 里的官方卷积与池化层就地换成手写的，返回 ``model``；state_dict 不变。

    ``model`` 本身就是这样一层时，返回的是换成的那一层。

    异常:
        ValueError: 有的层用了手写的层没有的选项（如 ``ceil_mode``）。
    """
    # remove_duplicate=False：同一层登记在两个名字下时，两处都换
    for path, layer in list(model.named_modules(remove_duplicate=False)):
        if type(layer) not in HANDMADE:
            continue
        ours = HANDMADE[type(layer)](layer).train(layer.training)
        if not path:
            return ours
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, ours)
    return model
