"""MobileNetV3：V2 的倒残差，加上 SE、h-swish、5×5 的核，通道数与深度由搜索得出。

块是 ``blocks.inverted_branch``；搜索的结果只是一张表，照抄即可。末尾的 1×1 卷积移到平均池化之后
（只在一个位置上算），省下的时间是论文第 5.1 节的要点。

维度约定：``B, C, H, W``。

参考: Howard et al., 2019, Searching for MobileNetV3, arXiv:1905.02244，表 1、表 2。
与论文不同之处: 与 torchvision 逐位相同。
页面 efficient.md「MobileNet」。
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from chapter_04_cnn_classic.inputs import check_image
from chapter_05_resnet_modern_cnn.blocks import (
    ConvNormActivation,
    Norm,
    initialize_convolutions,
    initialize_linears,
    inverted_branch,
    make_divisible,
)
from chapter_05_resnet_modern_cnn.se import SqueezeExcitation

# PyTorch 的缺省是 1e-5 与 0.1；TensorFlow 的 decay=0.99 即 momentum=0.01：旧值的权重，新值的权重
NORM: Norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)
RE, HS = nn.ReLU, nn.Hardswish


class Row(NamedTuple):
    """表中的一行：一个块。"""

    kernel: int
    expanded: int
    out: int
    se: bool
    activation: type[nn.Module]
    stride: int


LARGE = (  # 论文表 1
    Row(3, 16, 16, False, RE, 1),
    Row(3, 64, 24, False, RE, 2),
    Row(3, 72, 24, False, RE, 1),
    Row(5, 72, 40, True, RE, 2),
    Row(5, 120, 40, True, RE, 1),
    Row(5, 120, 40, True, RE, 1),
    Row(3, 240, 80, False, HS, 2),
    Row(3, 200, 80, False, HS, 1),
    Row(3, 184, 80, False, HS, 1),
    Row(3, 184, 80, False, HS, 1),
    Row(3, 480, 112, True, HS, 1),
    Row(3, 672, 112, True, HS, 1),
    Row(5, 672, 160, True, HS, 2),
    Row(5, 960, 160, True, HS, 1),
    Row(5, 960, 160, True, HS, 1),
)
SMALL = (  # 论文表 2
    Row(3, 16, 16, True, RE, 2),
    Row(3, 72, 24, False, RE, 2),
    Row(3, 88, 24, False, RE, 1),
    Row(5, 96, 40, True, HS, 2),
    Row(5, 240, 40, True, HS, 1),
    Row(5, 240, 40, True, HS, 1),
    Row(5, 120, 48, True, HS, 1),
    Row(5, 144, 48, True, HS, 1),
    Row(5, 288, 96, True, HS, 2),
    Row(5, 576, 96, True, HS, 1),
    Row(5, 576, 96, True, HS, 1),
)
CIFAR = (
    Row(3, 16, 16, True, RE, 1),
    Row(3, 64, 24, False, RE, 2),
    Row(3, 72, 24, False, RE, 1),
    Row(5, 96, 32, True, HS, 2),
    Row(5, 96, 32, True, HS, 1),
    Row(5, 128, 64, True, HS, 2),
)


class InvertedResidualV3(nn.Module):
    """带 SE 的倒残差；``stride == 1`` 而且通道数不变时有捷径。SE 的门是 hard-sigmoid，压缩比 4。"""

    def __init__(self, in_channels: int, row: Row) -> None:
        super().__init__()
        excitation = None
        if row.se:
            squeezed = make_divisible(row.expanded // 4)
            excitation = SqueezeExcitation(row.expanded, squeezed, nn.ReLU, nn.Hardsigmoid)
        self.block = inverted_branch(
            in_channels,
            row.expanded,
            row.out,
            row.kernel,
            row.stride,
            NORM,
            row.activation,
            excitation,
        )
        self.has_shortcut = row.stride == 1 and in_channels == row.out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.has_shortcut else self.block(x)


class MobileNetV3(nn.Module):
    """``(B, in_channels, H, W) -> (B, num_classes)``，边长不小于总步幅。

    参数:
        rows: 各块。
        hidden: 分类器中间的宽度。
        width_mult: 通道数的倍数。
        stem: 第一个卷积的 (输出通道数, 步幅)。

    异常:
        ValueError: ``width_mult`` 不是正数。
    """

    def __init__(
        self,
        rows: tuple[Row, ...],
        hidden: int,
        num_classes: int = 1000,
        width_mult: float = 1.0,
        dropout: float = 0.2,
        in_channels: int = 3,
        stem: tuple[int, int] = (16, 2),
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.total_stride = stem[1] * math.prod(row.stride for row in rows)
        width = make_divisible(stem[0] * width_mult)
        layers: list[nn.Module] = [ConvNormActivation(in_channels, width, 3, stem[1], 1, NORM, HS)]
        for row in rows:
            scaled = row._replace(
                expanded=make_divisible(row.expanded * width_mult),
                out=make_divisible(row.out * width_mult),
            )
            layers.append(InvertedResidualV3(width, scaled))
            width = scaled.out
        layers.append(ConvNormActivation(width, 6 * width, 1, 1, 1, NORM, HS))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        hidden = make_divisible(hidden * width_mult)
        self.classifier = nn.Sequential(
            nn.Linear(6 * width, hidden),
            nn.Hardswish(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )
        initialize_convolutions(self)
        initialize_linears(self)

    def forward(self, x: Tensor) -> Tensor:
        check_image(x, self.in_channels, self.total_stride, "MobileNetV3")
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def mobilenet_v3_large(
    num_classes: int = 1000, width_mult: float = 1.0, dropout: float = 0.2
) -> MobileNetV3:
    """5483032 个参数。"""
    return MobileNetV3(LARGE, 1280, num_classes, width_mult, dropout)


def mobilenet_v3_small(
    num_classes: int = 1000, width_mult: float = 1.0, dropout: float = 0.2
) -> MobileNetV3:
    """2542856 个参数。"""
    return MobileNetV3(SMALL, 1024, num_classes, width_mult, dropout)


def mobilenet_v3_cifar(
    num_classes: int = 10, in_channels: int = 3, stem_stride: int = 1
) -> MobileNetV3:
    """32 像素的形式：``small`` 的六个块，略窄，第一个卷积（默认）与第一个块不缩小，32 -> 4。"""
    return MobileNetV3(CIFAR, 256, num_classes, 1.0, 0.0, in_channels, (16, stem_stride))
