"""ResNet 家族：每个残差块只学输入与目标之差，信号与梯度都有一条不经过任何权重的直路。

    y = F(x) + x          ∂L/∂x = ∂L/∂y · (I + ∂F/∂x)

ImageNet 形式（ResNet、ResNeXt、Wide ResNet）的参数名、参数量与输出都与 torchvision 相同，官方权重
可以直接装入；小图形式（``resnet18_cifar`` 等）把起始层换成 3×3 卷积。论文第 4.2 节的小图
网络（20、56、110 层）与预激活形式在 ``resnet_cifar.py``。

与论文的差别：下采样的步幅放在 ``Bottleneck`` 的 3×3 卷积上（论文放在第一个 1×1 上，白白丢掉四分之三
的像素；torchvision 的做法，称为 v1.5）。

维度约定：``B, C, H, W``。

参考: He et al., 2015, Deep Residual Learning for Image Recognition, arXiv:1512.03385；
Zagoruyko 与 Komodakis, 2016, arXiv:1605.07146（Wide ResNet）；
Xie et al., 2016, arXiv:1611.05431（ResNeXt）。README「残差块」「瓶颈、分组与加宽」「零 γ」。
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from chapter_04_cnn_classic.inputs import check_image
from chapter_05_resnet_modern_cnn.blocks import initialize_convolutions

# ---------------------------------------------------------------- 残差块


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """3×3 卷积，边长只随步幅缩小；后面总跟着 BatchNorm，偏置会被均值减掉，所以不要。"""
    return nn.Conv2d(in_channels, out_channels, 3, stride, 1, groups=groups, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """1×1 卷积：每个像素上的一次线性变换。"""
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """捷径：形状不变时什么也不做（``None``），否则 1×1 卷积加 BatchNorm（论文的方案 B）。"""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """两个 3×3 卷积的残差块，``(B, C_in, H, W) -> (B, width, H/stride, W/stride)``。

    参数:
        in_channels: 输入通道数。
        width: 两个卷积的输出通道数。
        stride: 第一个卷积的步幅。
        shortcut: 捷径，``None`` 表示恒等。
    """

    expansion = 1  # 输出通道数是 width 的几倍
    final_norm = "bn2"  # 残差分支的最后一个 BatchNorm

    def __init__(
        self, in_channels: int, width: int, stride: int = 1, shortcut: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut

    def residual(self, x: Tensor) -> Tensor:
        """``F(x)``：需要学的那一部分。"""
        out = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.residual(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """1×1 降维、3×3、1×1 升维的残差块，``(B, C_in, H, W) -> (B, 4·width, H/stride, W/stride)``。

    3×3 卷积在窄的中间层上进行：通道数 256 时，参数量 256·64 + 9·64² + 64·256 ≈ 7 万，
    两个 3×3 卷积则是 2·9·256² ≈ 118 万。

    参数（其余同 ``BasicBlock``）:
        inner: 中间层的通道数；ResNet 等于 ``width``，Wide ResNet 与 ResNeXt 更宽。
        groups: 3×3 卷积的分组数；大于 1 就是 ResNeXt，每组只看自己的 ``inner/groups`` 个通道。
    """

    expansion = 4
    final_norm = "bn3"

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        shortcut: nn.Module | None = None,
        inner: int | None = None,
        groups: int = 1,
    ) -> None:
        super().__init__()
        inner = width if inner is None else inner
        self.conv1 = conv1x1(in_channels, inner)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv3x3(inner, inner, stride, groups)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = conv1x1(inner, self.expansion * width)
        self.bn3 = nn.BatchNorm2d(self.expansion * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


Block = BasicBlock | Bottleneck


def zero_last_gamma(model: nn.Module) -> None:
    """把每个残差块最后一个 BatchNorm 的 γ 置零：起步时 ``F(x) = 0``，每个块都是恒等。

    网络于是从很浅的有效深度出发，各块在训练中逐渐加入；γ 自己的梯度不为零，所以不会卡住。
    参考: Goyal et al., 2017, arXiv:1706.02677，第 5.1 节。
    """
    for layer in model.modules():
        if name := getattr(layer, "final_norm", None):
            nn.init.zeros_(getattr(layer, name).weight)


# ---------------------------------------------------------------- ImageNet 形式


class ResNet(nn.Module):
    """ImageNet 形式的 ResNet，``(B, in_channels, H, W) -> (B, num_classes)``。

    参数:
        block: ``BasicBlock`` 或 ``Bottleneck``。
        layers: 四个阶段各有几个块；从第二个阶段起，每个阶段的第一个块把边长减半。
        num_classes: 类别数。
        in_channels: 图像的通道数。
        width: 第一个阶段的 ``width``，以后逐阶段加倍。
        inner_scale: ``Bottleneck`` 中间层宽度的倍数（Wide ResNet 与 ResNeXt 为 2）。
        groups: ``Bottleneck`` 的分组数。
        small_stem: 给出时，起始层为这个步幅的 3×3 卷积、不池化，供 32 像素的小图用；
            ``None`` 则为步幅 2 的 7×7 卷积加池化，边长先缩到四分之一。
        zero_init_residual: 是否用 ``zero_last_gamma`` 初始化。
    """

    def __init__(
        self,
        block: type[Block],
        layers: Sequence[int],
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        width: int = 64,
        inner_scale: int = 1,
        groups: int = 1,
        small_stem: int | None = None,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        if width < 1 or len(layers) != 4 or min(layers) < 1:
            raise ValueError(f"layers 应为四个正整数，width 至少为 1，实为 {layers} 与 {width}")
        if block is BasicBlock and (inner_scale, groups) != (1, 1):
            raise ValueError(f"inner_scale={inner_scale}、groups={groups} 只用于 Bottleneck")
        self.in_channels, self.min_size = in_channels, 32 if small_stem is None else small_stem
        self._channels = width  # 下一个块的输入通道数
        if small_stem is None:
            self.conv1 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
        else:
            self.conv1 = conv3x3(in_channels, width, small_stem)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        options = {} if block is BasicBlock else {"groups": groups}
        for stage, depth in enumerate(layers):
            w = width * 2**stage
            if block is Bottleneck:
                options["inner"] = w * inner_scale
            stride = 1 if stage == 0 else 2
            setattr(self, f"layer{stage + 1}", self._stage(block, w, depth, stride, **options))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self._channels, num_classes)
        initialize_convolutions(self)
        if zero_init_residual:
            zero_last_gamma(self)

    def _stage(
        self, block: type[Block], width: int, depth: int, stride: int, **options: int
    ) -> nn.Sequential:
        blocks = []
        for index in range(depth):
            s = stride if index == 0 else 1
            shortcut = projection(self._channels, width * block.expansion, s)
            blocks.append(block(self._channels, width, s, shortcut, **options))
            self._channels = width * block.expansion
        return nn.Sequential(*blocks)

    def forward_features(self, x: Tensor) -> Tensor:
        """分类层之前的特征，``(B, in_channels, H, W) -> (B, C)``。"""
        check_image(x, self.in_channels, self.min_size, "ResNet")
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.avgpool(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.forward_features(x))


def resnet18(num_classes: int = 1000, **options: Any) -> ResNet:
    """18 层，11689512 个参数（1000 类）；``options`` 是 ``ResNet`` 的其余参数，下同。"""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, **options)


def resnet34(num_classes: int = 1000, **options: Any) -> ResNet:
    """34 层，21797672 个参数。"""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, **options)


def resnet50(num_classes: int = 1000, **options: Any) -> ResNet:
    """50 层，25557032 个参数。"""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, **options)


def resnet101(num_classes: int = 1000, **options: Any) -> ResNet:
    """101 层，44549160 个参数。"""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, **options)


def resnet152(num_classes: int = 1000, **options: Any) -> ResNet:
    """152 层，60192808 个参数。"""
    return ResNet(Bottleneck, (3, 8, 36, 3), num_classes, **options)


def resnext50_32x4d(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNeXt-50：3×3 卷积分成 32 组，每组 4 个通道起；25028904 个参数。"""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, inner_scale=2, groups=32, **options)


def wide_resnet50_2(num_classes: int = 1000, **options: Any) -> ResNet:
    """Wide ResNet-50：中间层加宽一倍；68883240 个参数。"""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, inner_scale=2, **options)


# ---------------------------------------------------------------- 小图


def resnet10_cifar(
    num_classes: int = 10, in_channels: int = 3, stem_stride: int = 1, width: int = 32
) -> ResNet:
    """32 像素的 10 层 ResNet：每个阶段一个块，边长 32、16、8、4。"""
    options = {"in_channels": in_channels, "width": width, "small_stem": stem_stride}
    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes, **options)


def resnet18_cifar(
    num_classes: int = 10, in_channels: int = 3, stem_stride: int = 1, width: int = 64
) -> ResNet:
    """32 像素的 18 层 ResNet：每个阶段两个块，边长 32、16、8、4。"""
    options = {"in_channels": in_channels, "width": width, "small_stem": stem_stride}
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, **options)
