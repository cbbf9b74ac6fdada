"""MobileNet V1 与 V2；V3 在 mobilenet_v3.py，它的构造函数也可以从这里导入。

V1 把每个 3×3 卷积换成深度可分离卷积；V2 在它前面加一次展开、去掉窄处的激活，再加上捷径：

    V1:  3×3 逐深度 → 1×1
    V2:  1×1 展开 t 倍 → 3×3 逐深度 → 1×1 投影（线性），再加 x

``width_mult`` 按比例改变各层通道数（论文的 α），参数与乘加约随其平方变化。

维度约定：``B, C, H, W``。

参考: Howard et al., 2017, MobileNets, arXiv:1704.04861，表 1；
Sandler et al., 2018, MobileNetV2, arXiv:1801.04381，表 2。
与论文不同之处: V1 的表 1 给最后一个逐深度卷积写了步幅 2，而它的输入、输出都是 7×7，这里取 1；
V2 与 torchvision 逐位相同。
页面 efficient.md「MobileNet」。
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from chapter_04_cnn_classic.inputs import check_image
from chapter_05_resnet_modern_cnn.blocks import (
    ConvNormActivation,
    initialize_convolutions,
    initialize_linears,
    make_divisible,
)
from chapter_05_resnet_modern_cnn.mobilenet_v3 import (
    mobilenet_v3_cifar,
    mobilenet_v3_large,
    mobilenet_v3_small,
)

__all__ = [
    "MobileNetV1",
    "MobileNetV2",
    "mobilenet_v1",
    "mobilenet_v1_cifar",
    "mobilenet_v2",
    "mobilenet_v2_cifar",
    "mobilenet_v3_cifar",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
]

# ---------------------------------------------------------------- V1

# 论文表 1：每个深度可分离块的 (输出通道数, 步幅)
V1_BLOCKS = (
    (64, 1),
    *((128, 2), (128, 1)),
    *((256, 2), (256, 1)),
    *((512, 2), *[(512, 1)] * 5),
    *((1024, 2), (1024, 1)),
)
V1_CIFAR_BLOCKS = ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (256, 2))


class DepthwiseSeparable(nn.Sequential):
    """3×3 逐深度卷积与 1×1 卷积，各带 BatchNorm 与 ReLU。"""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(
            ConvNormActivation(in_channels, in_channels, 3, stride, groups=in_channels),
            ConvNormActivation(in_channels, out_channels, 1),
        )


class MobileNetV1(nn.Module):
    """``(B, in_channels, H, W) -> (B, num_classes)``，边长不小于总步幅。

    参数:
        stem: 第一个卷积的 (输出通道数, 步幅)。
        blocks: 各块的 (输出通道数, 步幅)。

    异常:
        ValueError: ``width_mult`` 不是正数。
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width_mult: float = 1.0,
        in_channels: int = 3,
        stem: tuple[int, int] = (32, 2),
        blocks: tuple[tuple[int, int], ...] = V1_BLOCKS,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.total_stride = math.prod(stride for _, stride in (stem, *blocks))
        width = make_divisible(stem[0] * width_mult)
        layers: list[nn.Module] = [ConvNormActivation(in_channels, width, 3, stem[1])]
        for channels, stride in blocks:
            out = make_divisible(channels * width_mult)
            layers.append(DepthwiseSeparable(width, out, stride))
            width = out
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width, num_classes)
        initialize_convolutions(self)
        initialize_linears(self)

    def forward(self, x: Tensor) -> Tensor:
        check_image(x, self.in_channels, self.total_stride, "MobileNetV1")
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def mobilenet_v1(num_classes: int = 1000, width_mult: float = 1.0) -> MobileNetV1:
    """论文的 MobileNet，4231976 个参数，224 像素时 568740352 次乘加。"""
    return MobileNetV1(num_classes, width_mult)


def mobilenet_v1_cifar(
    num_classes: int = 10, in_channels: int = 3, stem_stride: int = 1
) -> MobileNetV1:
    """32 像素的形式：第一个卷积默认不缩小，6 个块，32 -> 4。"""
    return MobileNetV1(num_classes, 1.0, in_channels, (16, stem_stride), V1_CIFAR_BLOCKS)


# ---------------------------------------------------------------- V2

# 论文表 2：(展开倍数 t, 输出通道数 c, 重复次数 n, 第一个的步幅 s)
V2_BLOCKS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
V2_CIFAR_BLOCKS = ((1, 16, 1, 1), (4, 24, 1, 2), (4, 32, 2, 2), (4, 64, 2, 2))


class InvertedResidual(nn.Module):
    """倒残差：窄 -> 宽 -> 窄，窄处不加激活，捷径接在窄处。

    与常见的瓶颈（宽 -> 窄 -> 宽）相反：捷径传的是窄的张量，训练与推理都省内存。
    ``stride == 1`` 而且输入、输出通道数相同时才有捷径。

    参数:
        expand_ratio: t，中间的通道数是输入的 t 倍；1 时省去展开。
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expand_ratio: int) -> None:
        super().__init__()
        expanded = in_channels * expand_ratio
        layers: list[nn.Module] = []
        if expand_ratio != 1:
            layers.append(ConvNormActivation(in_channels, expanded, 1, activation=nn.ReLU6))
        layers += [
            ConvNormActivation(expanded, expanded, 3, stride, expanded, activation=nn.ReLU6),
            nn.Conv2d(expanded, out_channels, 1, bias=False),  # 线性瓶颈：后面没有激活
            nn.BatchNorm2d(out_channels),
        ]
        self.conv = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """``(B, in_channels, H, W) -> (B, num_classes)``，边长不小于总步幅。

    参数:
        width_mult: 通道数的倍数 α；大于 1 时末尾的 1×1 卷积才跟着变宽，照论文。
        stem: 第一个卷积的 (输出通道数, 步幅)。
        blocks: 各段的 (t, c, n, s)。
        last_channels: 末尾 1×1 卷积的输出通道数。

    异常:
        ValueError: ``width_mult`` 不是正数。
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width_mult: float = 1.0,
        dropout: float = 0.2,
        in_channels: int = 3,
        stem: tuple[int, int] = (32, 2),
        blocks: tuple[tuple[int, int, int, int], ...] = V2_BLOCKS,
        last_channels: int = 1280,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.total_stride = stem[1] * math.prod(s for *_, s in blocks)
        width = make_divisible(stem[0] * width_mult)
        layers: list[nn.Module] = [
            ConvNormActivation(in_channels, width, 3, stem[1], activation=nn.ReLU6)
        ]
        for expand_ratio, channels, repeats, first_stride in blocks:
            out = make_divisible(channels * width_mult)
            for i in range(repeats):
                stride = first_stride if i == 0 else 1
                layers.append(InvertedResidual(width, out, stride, expand_ratio))
                width = out
        last = make_divisible(last_channels * max(1.0, width_mult))
        layers.append(ConvNormActivation(width, last, 1, activation=nn.ReLU6))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))
        initialize_convolutions(self)
        initialize_linears(self)

    def forward(self, x: Tensor) -> Tensor:
        check_image(x, self.in_channels, self.total_stride, "MobileNetV2")
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def mobilenet_v2(
    num_classes: int = 1000, width_mult: float = 1.0, dropout: float = 0.2
) -> MobileNetV2:
    """3504872 个参数，224 像素时约 3 亿次乘加。"""
    return MobileNetV2(num_classes, width_mult, dropout)


def mobilenet_v2_cifar(
    num_classes: int = 10, in_channels: int = 3, stem_stride: int = 1
) -> MobileNetV2:
    """32 像素的形式：第一个卷积默认不缩小，6 个倒残差，展开 4 倍，32 -> 4。"""
    stem = (16, stem_stride)
    return MobileNetV2(num_classes, 1.0, 0.0, in_channels, stem, V2_CIFAR_BLOCKS, 256)
