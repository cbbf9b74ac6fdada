"""ConvNeXt：用 Transformer 时代的配方把 ResNet 一步步改造成的纯卷积网络；tiny 与小图形式。

本文件教什么：patchify 的开头，深度可分离的 7×7 卷积，倒瓶颈，每块只有一个 LayerNorm 与一个 GELU，
layer scale，随机深度（第 3 章的 DropPath，逐样本），块外单独的下采样层。
参数名、参数量与输出都与 torchvision 相同，官方权重可以直接装入。
不涉及：训练配方（AdamW、增强、EMA），base 与 large（只是更宽更深）。

维度约定：``B, C, H, W``；LayerNorm 与 1×1 卷积（写成 Linear）在 ``B, H, W, C`` 上做。

参考: Liu, Mao, Wu, Feichtenhofer, Darrell, Xie, 2022, A ConvNet for the 2020s,
arXiv:2201.03545，2 节与附录 A；Touvron 等, 2021, arXiv:2103.17239（layer scale）。
modern.md「ConvNeXt」。
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_03_optimization_regularization.regularization import DropPath
from chapter_04_cnn_classic.inputs import check_image


class Permute(nn.Module):
    """交换各维的次序，只改步长，不搬数据。"""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


class LayerNorm2d(nn.LayerNorm):
    """对每个位置的通道归一化，``(B, C, H, W)`` 进出：换到 ``B, H, W, C`` 上做，再换回来。

    不像 BatchNorm 混合各样本，也不像 GroupNorm 混合各位置。
    """

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(
            x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps
        )
        return x.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """``x + drop_path(γ ⊙ f(x))``，f 是 7×7 深度卷积、LayerNorm、1×1 升到 4C、GELU、1×1 降回 C。

    参数:
        channels: C。
        layer_scale: γ 的初值，逐通道；很小，所以起初整个网络几乎是恒等映射。
        drop_path: 训练时整个样本跳过这一块的概率。
    """

    def __init__(self, channels: int, layer_scale: float, drop_path: float) -> None:
        super().__init__()
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), layer_scale))
        self.block = nn.Sequential(
            nn.Conv2d(channels, channels, kernel_size=7, padding=3, groups=channels),
            Permute(0, 2, 3, 1),  # (B, C, H, W) -> (B, H, W, C)
            nn.LayerNorm(channels, eps=1e-6),
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
            Permute(0, 3, 1, 2),
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.layer_scale * self.block(x))


class ConvNeXt(nn.Module):
    """``(B, in_channels, H, W) -> (B, num_classes)``，边长至少 ``patch · 2^(级数 − 1)``。

    参数:
        depths, widths: 各级的块数与通道数；级与级之间边长减半。
        patch: 开头的卷积核与步幅，像素：图像切成 ``patch × patch`` 的小块，各自线性映射。
        num_classes: 类别数。
        in_channels: 图像的通道数。
        drop_path: 最后一块的随机深度概率；从第一块的 0 起线性递增。
        layer_scale: 各块 γ 的初值。

    异常:
        ValueError: depths 与 widths 长度不同，或有小于 1 的。
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        patch: int,
        num_classes: int,
        in_channels: int = 3,
        drop_path: float = 0.0,
        layer_scale: float = 1e-6,
    ) -> None:
        super().__init__()
        if len(depths) != len(widths) or min(*depths, *widths, patch, num_classes) < 1:
            raise ValueError(
                "ConvNeXt 的 depths 与 widths 应一样长，连同 patch、num_classes 都至少为 1，"
                f"实为 {depths}、{widths}、{patch} 与 {num_classes}"
            )
        self.in_channels, self.at_least = in_channels, patch * 2 ** (len(depths) - 1)
        last = max(sum(depths) - 1, 1)
        rates = iter(drop_path * index / last for index in range(sum(depths)))
        stem = nn.Conv2d(in_channels, widths[0], kernel_size=patch, stride=patch)
        self.features = nn.Sequential(nn.Sequential(stem, LayerNorm2d(widths[0], eps=1e-6)))
        for index, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            if index:
                narrow = widths[index - 1]
                conv = nn.Conv2d(narrow, width, kernel_size=2, stride=2)
                self.features.append(nn.Sequential(LayerNorm2d(narrow, eps=1e-6), conv))
            blocks = [ConvNeXtBlock(width, layer_scale, next(rates)) for _ in range(depth)]
            self.features.append(nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            LayerNorm2d(widths[-1], eps=1e-6), nn.Flatten(), nn.Linear(widths[-1], num_classes)
        )
        self.initialize()

    def initialize(self) -> None:
        """卷积与全连接的权重取截断正态，标准差 0.02，偏置为零。"""
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        check_image(x, self.in_channels, self.at_least, "ConvNeXt")
        return self.classifier(self.avgpool(self.features(x)))


def convnext_tiny(num_classes: int = 1000, drop_path: float = 0.1) -> ConvNeXt:
    """28589128 个参数（1000 类），大小与 ResNet-50 相当。"""
    return ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768), 4, num_classes, drop_path=drop_path)


def convnext_cifar(
    num_classes: int = 10, in_channels: int = 3, stem_stride: int = 1, layer_scale: float = 1e-6
) -> ConvNeXt:
    """32 像素的形式：908890 个参数；小块的边长是 ``2·stem_stride``，三级各两块，16 -> 8 -> 4。"""
    patch, options = 2 * stem_stride, {"layer_scale": layer_scale}
    return ConvNeXt((2, 2, 2), (48, 96, 192), patch, num_classes, in_channels, **options)
