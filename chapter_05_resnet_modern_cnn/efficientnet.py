"""EfficientNet B0-B7 与 V2-S：一个搜索得出的小网络，按深度、宽度、分辨率一起放大。

    深度 α^φ，宽度 β^φ，分辨率 γ^φ，  α β² γ² ≈ 2   ⟹   乘加 ∝ 深度 · 宽度² · 分辨率² ≈ 2^φ

块是 MBConv：``blocks.inverted_branch`` 加 SE（激活 SiLU）与随机深度；V2 的前几段用 Fused-MBConv，
以一个普通的 3×3 卷积代替「1×1 展开 + 3×3 逐深度」。

维度约定：``B, C, H, W``。

参考: Tan, Le, 2019, EfficientNet, arXiv:1905.11946，表 1 与式 3；
Tan, Le, 2021, EfficientNetV2, arXiv:2104.00298，表 4；
Huang et al., 2016, Deep Networks with Stochastic Depth, arXiv:1603.09382。
与论文不同之处: 与 torchvision 相同；随机深度逐样本而不是逐批（第 3 章的 ``DropPath``）。
页面 efficient.md「EfficientNet」。
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from chapter_03_optimization_regularization.regularization import DropPath
from chapter_04_cnn_classic.inputs import check_image
from chapter_05_resnet_modern_cnn.blocks import (
    ConvNormActivation,
    Norm,
    initialize_convolutions,
    inverted_branch,
    make_divisible,
)
from chapter_05_resnet_modern_cnn.se import SqueezeExcitation

# ---------------------------------------------------------------- 复合缩放


class Scale(NamedTuple):
    """一个放大方案：深度与宽度的倍数，图的边长（像素），分类器的 Dropout。"""

    depth: float
    width: float
    resolution: int
    dropout: float


# 论文作者发布的 B0-B7；不全是 α^φ：各数都经过取整与挑选
SCALES = {
    "b0": Scale(1.0, 1.0, 224, 0.2),
    "b1": Scale(1.1, 1.0, 240, 0.2),
    "b2": Scale(1.2, 1.1, 260, 0.3),
    "b3": Scale(1.4, 1.2, 300, 0.3),
    "b4": Scale(1.8, 1.4, 380, 0.4),
    "b5": Scale(2.2, 1.6, 456, 0.4),
    "b6": Scale(2.6, 1.8, 528, 0.5),
    "b7": Scale(3.1, 2.0, 600, 0.5),
}


def compound_scale(
    phi: float, alpha: float = 1.2, beta: float = 1.1, gamma: float = 1.15
) -> tuple[float, float, float]:
    """论文式 3：``(α^φ, β^φ, γ^φ)``，即深度、宽度、分辨率的倍数。

    缺省值是论文在 φ = 1 时网格搜索的结果，``α β² γ² = 1.92``。

    异常:
        ValueError: α、β、γ 小于 1：那是缩小，不是放大。
    """
    if min(alpha, beta, gamma) < 1:
        raise ValueError(f"alpha、beta、gamma 都不应小于 1，实为 {alpha}、{beta}、{gamma}")
    return alpha**phi, beta**phi, gamma**phi


def macs_multiplier(depth: float, width: float, resolution: float) -> float:
    """乘加的倍数 ``d · w² · r²``；``resolution`` 是倍数，不是像素。"""
    return depth * width**2 * resolution**2


# ---------------------------------------------------------------- 块


class StochasticResidual(nn.Module):
    """捷径加随机深度：``y = x + DropPath(block(x))``；没有捷径时 ``y = block(x)``。"""

    def __init__(self, block: nn.Sequential, has_shortcut: bool, drop_path: float) -> None:
        super().__init__()
        self.block = block
        self.drop_path = DropPath(drop_path)
        self.has_shortcut = has_shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.block(x)) if self.has_shortcut else self.block(x)


class MBConv(StochasticResidual):
    """倒残差 + SE + 随机深度；SE 的中间宽度是**输入**（不是展开之后）通道数的四分之一。

    参数:
        expand_ratio: 展开的倍数 t。
        drop_path: 训练时丢掉支路的概率；只在有捷径时起作用。
        norm: 归一化层的构造函数。
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int,
        expand_ratio: int,
        drop_path: float,
        norm: Norm,
    ) -> None:
        expanded = make_divisible(in_channels * expand_ratio)
        excitation = SqueezeExcitation(expanded, max(1, in_channels // 4), nn.SiLU)
        block = inverted_branch(
            in_channels, expanded, out_channels, kernel, stride, norm, nn.SiLU, excitation
        )
        super().__init__(block, stride == 1 and in_channels == out_channels, drop_path)


class FusedMBConv(StochasticResidual):
    """k×k 普通卷积展开，再 1×1 投影；不展开时只有一个带激活的卷积。参数同 ``MBConv``。

    逐深度卷积的乘加少，但每读一个数只做 k² 次乘加，加速器喂不饱；浅层通道少，换成普通卷积反而快。
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int,
        expand_ratio: int,
        drop_path: float,
        norm: Norm,
    ) -> None:
        expanded = make_divisible(in_channels * expand_ratio)
        if expanded == in_channels:
            widths, activations = [(in_channels, out_channels, kernel, stride)], [nn.SiLU]
        else:
            widths = [(in_channels, expanded, kernel, stride), (expanded, out_channels, 1, 1)]
            activations = [nn.SiLU, None]
        layers = [
            ConvNormActivation(*width, norm=norm, activation=activation)
            for width, activation in zip(widths, activations, strict=True)
        ]
        has_shortcut = stride == 1 and in_channels == out_channels
        super().__init__(nn.Sequential(*layers), has_shortcut, drop_path)


# ---------------------------------------------------------------- 网络


class Stage(NamedTuple):
    """一段：若干个同样的块，第一个带步幅、改通道数。"""

    block: type[MBConv] | type[FusedMBConv]
    expand_ratio: int
    kernel: int
    stride: int
    channels: int
    repeats: int

    def scaled(self, width: float, depth: float) -> Stage:
        """通道数乘 ``width`` 再取整到 8 的倍数，重复次数乘 ``depth`` 再向上取整。"""
        return self._replace(
            channels=make_divisible(self.channels * width),
            repeats=math.ceil(self.repeats * depth),
        )


B0_STAGES = (  # 论文表 1
    Stage(MBConv, 1, 3, 1, 16, 1),
    Stage(MBConv, 6, 3, 2, 24, 2),
    Stage(MBConv, 6, 5, 2, 40, 2),
    Stage(MBConv, 6, 3, 2, 80, 3),
    Stage(MBConv, 6, 5, 1, 112, 3),
    Stage(MBConv, 6, 5, 2, 192, 4),
    Stage(MBConv, 6, 3, 1, 320, 1),
)
V2_S_STAGES = (  # V2 论文表 4
    Stage(FusedMBConv, 1, 3, 1, 24, 2),
    Stage(FusedMBConv, 4, 3, 2, 48, 4),
    Stage(FusedMBConv, 4, 3, 2, 64, 4),
    Stage(MBConv, 4, 3, 2, 128, 6),
    Stage(MBConv, 6, 3, 1, 160, 9),
    Stage(MBConv, 6, 3, 2, 256, 15),
)
CIFAR_STAGES = (
    Stage(MBConv, 1, 3, 1, 16, 1),
    Stage(MBConv, 4, 3, 2, 24, 1),
    Stage(MBConv, 4, 5, 2, 32, 2),
    Stage(MBConv, 4, 3, 2, 64, 2),
)


class EfficientNet(nn.Module):
    """``(B, in_channels, H, W) -> (B, num_classes)``，边长不小于总步幅。

    参数:
        stages: 各段，已经缩放。
        stem: 第一个卷积的 (输出通道数, 步幅)。
        last_channels: 末尾 1×1 卷积的输出通道数。
        dropout: 分类器之前的 Dropout。
        stochastic_depth_prob: 最后一块附近的丢弃概率 p；第 l 块（共 L 块，从 0 数）是 ``p l / L``。
        norm: 归一化层的构造函数。
    """

    def __init__(
        self,
        stages: tuple[Stage, ...],
        num_classes: int,
        stem: tuple[int, int],
        last_channels: int,
        dropout: float,
        stochastic_depth_prob: float,
        norm: Norm = nn.BatchNorm2d,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.total_stride = stem[1] * math.prod(stage.stride for stage in stages)
        width, stride = stem
        layers: list[nn.Module] = [
            ConvNormActivation(in_channels, width, 3, stride, 1, norm, nn.SiLU)
        ]
        total, index = sum(stage.repeats for stage in stages), 0
        for stage in stages:
            blocks = []
            for i in range(stage.repeats):
                stride = stage.stride if i == 0 else 1
                drop_path = stochastic_depth_prob * index / total
                args = stage.channels, stage.kernel, stride, stage.expand_ratio, drop_path, norm
                blocks.append(stage.block(width, *args))
                width, index = stage.channels, index + 1
            layers.append(nn.Sequential(*blocks))
        layers.append(ConvNormActivation(width, last_channels, 1, 1, 1, norm, nn.SiLU))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last_channels, num_classes))
        initialize_convolutions(self)
        bound = num_classes**-0.5
        nn.init.uniform_(self.classifier[1].weight, -bound, bound)
        nn.init.zeros_(self.classifier[1].bias)

    def forward(self, x: Tensor) -> Tensor:
        check_image(x, self.in_channels, self.total_stride, "EfficientNet")
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def _efficientnet(
    name: str,
    num_classes: int,
    dropout: float | None,
    stochastic_depth_prob: float,
) -> EfficientNet:
    """按 ``SCALES`` 里的一行放大 B0；B5 以上的 BatchNorm 用 TensorFlow 的常数。"""
    scale = SCALES[name]
    stages = tuple(stage.scaled(scale.width, scale.depth) for stage in B0_STAGES)
    tensorflow = partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)
    return EfficientNet(
        stages,
        num_classes,
        stem=(make_divisible(32 * scale.width), 2),
        last_channels=4 * stages[-1].channels,
        dropout=scale.dropout if dropout is None else dropout,
        stochastic_depth_prob=stochastic_depth_prob,
        norm=tensorflow if name in ("b5", "b6", "b7") else nn.BatchNorm2d,
    )


def efficientnet_b0(
    num_classes: int = 1000, dropout: float | None = None, stochastic_depth_prob: float = 0.2
) -> EfficientNet:
    """5288548 个参数，224 像素。"""
    return _efficientnet("b0", num_classes, dropout, stochastic_depth_prob)


def efficientnet_b1(
    num_classes: int = 1000, dropout: float | None = None, stochastic_depth_prob: float = 0.2
) -> EfficientNet:
    """7794184 个参数，240 像素。"""
    return _efficientnet("b1", num_classes, dropout, stochastic_depth_prob)


def efficientnet_b2(
    num_classes: int = 1000, dropout: float | None = None, stochastic_depth_prob: float = 0.2
) -> EfficientNet:
    """9109994 个参数，260 像素。"""
    return _efficientnet("b2", num_classes, dropout, stochastic_depth_prob)


def efficientnet_b3(
    num_classes: int = 1000, dropout: float | None = None, stochastic_depth_prob: float = 0.2
) -> EfficientNet:
    """12233232 个参数，300 像素。"""
    return _efficientnet("b3", num_classes, dropout, stochastic_depth_prob)


def efficientnet_b4(
    num_classes: int = 1000, dropout: float | None = None, stochastic_depth_prob: float = 0.2
) -> EfficientNet:
    """19341616 个参数，380 像素。"""
    return _efficientnet("b4", num_classes, dropout, stochastic_depth_prob)


def efficientnet_b5(
    num_classes: int = 1000, dropout: float | None = None, stochastic_depth_prob: float = 0.2
) -> EfficientNet:
    """30389784 个参数，456 像素。"""
    return _efficientnet("b5", num_classes, dropout, stochastic_depth_prob)


def efficientnet_b6(
    num_classes: int = 1000, dropout: float | None = None, stochastic_depth_prob: float = 0.2
) -> EfficientNet:
    """43040704 个参数，528 像素。"""
    return _efficientnet("b6", num_classes, dropout, stochastic_depth_prob)


def efficientnet_b7(
    num_classes: int = 1000, dropout: float | None = None, stochastic_depth_prob: float = 0.2
) -> EfficientNet:
    """66347960 个参数，600 像素。"""
    return _efficientnet("b7", num_classes, dropout, stochastic_depth_prob)


def efficientnet_v2_s(
    num_classes: int = 1000, dropout: float = 0.2, stochastic_depth_prob: float = 0.2
) -> EfficientNet:
    """21458488 个参数，384 像素。"""
    return EfficientNet(
        V2_S_STAGES,
        num_classes,
        stem=(24, 2),
        last_channels=1280,
        dropout=dropout,
        stochastic_depth_prob=stochastic_depth_prob,
        norm=partial(nn.BatchNorm2d, eps=0.001),
    )


def efficientnet_cifar(
    num_classes: int = 10, in_channels: int = 3, stem_stride: int = 1
) -> EfficientNet:
    """32 像素的形式：B0 的前四段，展开 4 倍，第一个卷积默认不缩小，32 -> 4。"""
    return EfficientNet(
        CIFAR_STAGES,
        num_classes,
        stem=(16, stem_stride),
        last_channels=256,
        dropout=0.0,
        stochastic_depth_prob=0.1,
        in_channels=in_channels,
    )
