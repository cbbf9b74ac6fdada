"""RepVGG：训练时是多分支的残差网络，推理时折叠成一条直线的 3×3 卷积；A0 与小图形式。

本文件教什么：结构重参数化（structural re-parameterization）。3×3、1×1、恒等三个分支各带 BatchNorm，
推理时每个 BatchNorm 是仿射变换，1×1 与恒等又都是特殊的 3×3 卷积，线性之和仍是一个 3×3 卷积。
折叠之后与折叠之前是同一个函数，只差舍入；训练的轨迹却不同。
不涉及：B 系列带分组的各型（``groups`` 照样可折叠，由测试核对），量化。论文的训练代码没有对照：
参数名是自己的。

维度约定：``B, C, H, W``；卷积核 ``(C_out, C_in / groups, 3, 3)``。

参考: Ding, Zhang, Ma, Han, Ding, Sun, 2021, RepVGG: Making VGG-style ConvNets Great Again,
arXiv:2101.03697，3.3 与 3.4 节。modern.md「RepVGG」。
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_04_cnn_classic.inputs import check_image
from chapter_05_resnet_modern_cnn.folding import scale_and_shift


def fold_batch_norm(weight: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """推理时 ``BN(W ⋆ x)`` 就是 ``W' ⋆ x + b'``。

    ``γ (W ⋆ x − μ) / √(σ² + ε) + β``，令 ``s = γ / √(σ² + ε)``，得 ``W' = s W``，``b' = β − s μ``。

    参数:
        weight: ``(C_out, C_in / groups, k, k)``，无偏置的卷积。
        norm: 其后的 BatchNorm，滑动统计量 μ、σ²。

    返回:
        ``(W', b')``。
    """
    scale, shift = scale_and_shift(norm)
    return weight * scale[:, None, None, None], shift


def pad_to_3x3(weight: Tensor) -> Tensor:
    """1×1 的核放在 3×3 的正中，``(C_out, C_in, 1, 1) -> (C_out, C_in, 3, 3)``。

    填充 1 的 3×3 卷积，中央的抽头读的正是填充 0 的 1×1 卷积读的像素，步幅 2 也一样。
    """
    return F.pad(weight, (1, 1, 1, 1))


def identity_kernel(channels: int, groups: int, like: Tensor) -> Tensor:
    """恒等映射写成 3×3 卷积核 ``(C, C/groups, 3, 3)``：中央是单位阵，其余为零。

    分组时输出通道 i 只读本组的 C/groups 个通道，它自己在组内排第 ``i mod (C/groups)``。
    """
    width = channels // groups
    weight = torch.zeros(channels, width, 3, 3, dtype=like.dtype, device=like.device)
    index = torch.arange(channels, device=like.device)
    weight[index, index % width, 1, 1] = 1
    return weight


class RepVGGBlock(nn.Module):
    """``relu(BN(conv3×3(x)) + BN(conv1×1(x)) + BN(x))``；变形状的块没有最后一项。"""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        options = {"stride": stride, "groups": groups, "bias": False}
        self.conv3 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, **options)
        self.norm3 = nn.BatchNorm2d(out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=1, **options)
        self.norm1 = nn.BatchNorm2d(out_channels)
        same = in_channels == out_channels and stride == 1
        self.norm0 = nn.BatchNorm2d(out_channels) if same else None  # 恒等分支

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm3(self.conv3(x)) + self.norm1(self.conv1(x))
        if self.norm0 is not None:
            y = y + self.norm0(x)
        return torch.relu(y)

    def branches(self) -> dict[str, tuple[Tensor, Tensor]]:
        """各分支折叠成的 3×3 核与偏置，``{"3x3": (W', b'), "1x1": …, "identity": …}``。"""
        kernels = {
            "3x3": (self.conv3.weight, self.norm3),
            "1x1": (pad_to_3x3(self.conv1.weight), self.norm1),
        }
        if self.norm0 is not None:
            channels, groups = self.conv3.in_channels, self.conv3.groups
            identity = identity_kernel(channels, groups, self.conv3.weight)
            kernels["identity"] = (identity, self.norm0)
        return {name: fold_batch_norm(*pair) for name, pair in kernels.items()}

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """三个分支合成的一个 3×3 卷积（带偏置）；与推理模式的这一块相差一个 ReLU。"""
        old = self.conv3
        conv = nn.Conv2d(
            old.in_channels,
            old.out_channels,
            kernel_size=3,
            stride=old.stride,
            padding=1,
            groups=old.groups,
            dtype=old.weight.dtype,
            device=old.weight.device,
        )
        weights, biases = zip(*self.branches().values(), strict=True)
        conv.weight.copy_(sum(weights))
        conv.bias.copy_(sum(biases))
        return conv


class RepVGG(nn.Module):
    """``(B, in_channels, H, W) -> (B, num_classes)``，边长至少 ``at_least``，即各步幅之积。

    参数:
        depths, widths, strides: 各级的块数、通道数、第一块的步幅。
        num_classes: 类别数。
        in_channels: 图像的通道数。

    异常:
        ValueError: 三个元组长度不同，或有小于 1 的。
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        strides: tuple[int, ...],
        num_classes: int,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        lengths = {len(depths), len(widths), len(strides)}
        if len(lengths) > 1 or min(*depths, *widths, *strides, num_classes) < 1:
            raise ValueError(
                "RepVGG 的 depths、widths、strides 应一样长，连同 num_classes 都至少为 1，"
                f"实为 {depths}、{widths}、{strides} 与 {num_classes}"
            )
        self.in_channels, self.at_least = in_channels, 1
        self.features = nn.Sequential()
        for depth, width, stride in zip(depths, widths, strides, strict=True):
            for index in range(depth):
                block = RepVGGBlock(in_channels, width, 1 if index else stride)
                self.features.append(block)
                in_channels = width
            self.at_least *= stride
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        check_image(x, self.in_channels, self.at_least, "RepVGG")
        return self.classifier(self.avgpool(self.features(x)).flatten(1))

    def fuse(self) -> RepVGG:
        """推理用的副本：每块换成「3×3 卷积、ReLU」，原来的不动。

        返回的网络处于推理模式，与 ``self.eval()`` 的输出只差舍入；没有了 BatchNorm，不宜接着训练。
        """
        deployed = copy.deepcopy(self).eval()
        deployed.features = nn.Sequential(
            *(nn.Sequential(block.fuse(), nn.ReLU(inplace=True)) for block in self.features)
        )
        return deployed


def repvgg_a0(num_classes: int = 1000) -> RepVGG:
    """RepVGG-A0：训练时 9108968 个参数，折叠之后 8309384 个（1000 类）。"""
    return RepVGG((1, 2, 4, 14, 1), (48, 48, 96, 192, 1280), (2, 2, 2, 2, 2), num_classes)


def repvgg_cifar(num_classes: int = 10, in_channels: int = 3, stem_stride: int = 1) -> RepVGG:
    """32 像素的形式：训练时 553450 个参数，折叠之后 495778 个；边长 32、16、8、4。"""
    depths, widths, strides = (1, 1, 2, 4, 1), (24, 24, 48, 96, 192), (stem_stride, 1, 2, 2, 2)
    return RepVGG(depths, widths, strides, num_classes, in_channels)
