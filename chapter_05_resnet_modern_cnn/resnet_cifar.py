"""小图的 ``6n+2`` 层 ResNet，没有捷径的孪生网络，预激活与 SE 形式。

    捷径:    y = ReLU(F(x) + x)        孪生:    y = ReLU(F(x))        预激活:  y = F(x) + x

孪生网络（plain network）与 ResNet 的参数一个不多、一个不少，因此两者之差只能归于捷径。

维度约定：``B, C, H, W``。

参考: He et al., 2015, arXiv:1512.03385，第 4.2 节；
He et al., 2016, Identity Mappings in Deep Residual Networks, arXiv:1603.05027（预激活）；
Hu et al., 2017, Squeeze-and-Excitation Networks, arXiv:1709.01507，图 3（SE-ResNet）。
README「捷径」与「预激活」，页面 degradation.md。
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from chapter_04_cnn_classic.inputs import check_image
from chapter_05_resnet_modern_cnn.blocks import initialize_convolutions
from chapter_05_resnet_modern_cnn.resnet import conv3x3, zero_last_gamma
from chapter_05_resnet_modern_cnn.se import SqueezeExcitation


class PadShortcut(nn.Module):
    """无参数的捷径（论文的方案 A）：隔点取样，多出的通道补零；孪生网络的参数量因此完全相同。"""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))


class CifarBlock(nn.Module):
    """两个 3×3 卷积的块，``(B, C_in, H, W) -> (B, C_out, H/stride, W/stride)``。

    参数:
        in_channels, out_channels, stride: 同 ``resnet.BasicBlock``。
        shortcut: 假则去掉捷径，成为孪生网络；其余一切不变。
    """

    final_norm: str | None = "bn2"  # zero_last_gamma 置零的 BatchNorm

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, shortcut: bool = True
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        same = stride == 1 and in_channels == out_channels
        self.shortcut: nn.Module | None = None
        if shortcut:
            self.shortcut = (
                nn.Identity() if same else PadShortcut(in_channels, out_channels, stride)
            )
            if not same:  # γ 若为零，补零的通道恒为 0，而 ReLU 在 0 处的导数也是 0：永远学不到
                self.final_norm = None

    def residual(self, x: Tensor) -> Tensor:
        """``F(x)``。"""
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        out = self.residual(x)
        return F.relu(out if self.shortcut is None else out + self.shortcut(x))


class PreActBlock(CifarBlock):
    """预激活形式：BatchNorm 与 ReLU 移到卷积之前，相加之后不再有非线性。

    直路于是从头到尾是真正的恒等：``x_L = x_l + Σ F(x_i)``，梯度里有一项原样传回。
    """

    final_norm = None

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, shortcut: bool = True
    ) -> None:
        super().__init__(in_channels, out_channels, stride, shortcut)
        self.bn1 = nn.BatchNorm2d(in_channels)

    def residual(self, x: Tensor) -> Tensor:
        """``F(x)``。"""
        out = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(out)))

    def forward(self, x: Tensor) -> Tensor:
        out = self.residual(x)
        return out if self.shortcut is None else out + self.shortcut(x)


class SEBlock(CifarBlock):
    """残差分支末尾加上 SE：相加之前给每个通道一个由内容决定的系数。

    压缩比为 4；论文为 16，那里的通道多得多。
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, shortcut: bool = True
    ) -> None:
        super().__init__(in_channels, out_channels, stride, shortcut)
        self.se = SqueezeExcitation(out_channels, max(1, out_channels // 4))

    def residual(self, x: Tensor) -> Tensor:
        """``F(x)``。"""
        return self.se(super().residual(x))


class CifarResNet(nn.Module):
    """论文第 4.2 节的 ``6n+2`` 层小图网络，``(B, in_channels, H, W) -> (B, num_classes)``。

    一个 3×3 卷积，三个阶段各 ``n`` 个块（通道 16、32、64，边长 32、16、8），全局平均池化，全连接。

    参数:
        depth: 层数，``6n+2``：20、32、44、56、110……
        width: 第一个阶段的通道数，论文为 16。
        shortcut: 假则为孪生网络。
        block: ``CifarBlock``、``PreActBlock`` 或 ``SEBlock``。
        stem_stride: 起始卷积的步幅；2 时各阶段的边长减半，运算量约为四分之一。
        zero_init_residual: 是否用 ``zero_last_gamma`` 初始化；通道数改变的块除外。预激活形式
            没有末尾的 γ，不适用。
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        width: int = 16,
        shortcut: bool = True,
        block: type[CifarBlock] = CifarBlock,
        stem_stride: int = 1,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth={depth} 应为 6n+2，如 20、32、44、56、110")
        self.preact = block is PreActBlock
        if zero_init_residual and (self.preact or not shortcut):
            raise ValueError("zero_init_residual 只适用于有捷径、非预激活的网络")
        self.in_channels = in_channels
        self.conv1 = conv3x3(in_channels, width, stem_stride)
        self.bn1 = nn.BatchNorm2d(4 * width if self.preact else width)
        blocks, channels = [], width
        for stage in range(3):
            for index in range((depth - 2) // 6):
                s = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(channels, width * 2**stage, s, shortcut))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_classes)
        initialize_convolutions(self)
        if zero_init_residual:
            zero_last_gamma(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """分类层之前的特征，``(B, in_channels, H, W) -> (B, 4·width)``。"""
        check_image(x, self.in_channels, 8, "CifarResNet")
        x = self.conv1(x)
        # bn1 与 ReLU：预激活形式放在最后一个块之后，其余放在起始卷积之后
        x = x if self.preact else F.relu(self.bn1(x))
        x = self.blocks(x)
        x = F.relu(self.bn1(x)) if self.preact else x
        return x.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.forward_features(x))


def resnet20(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """20 层，269722 个参数（10 类）。"""
    return CifarResNet(20, num_classes, in_channels)


def resnet56(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """56 层，853018 个参数。"""
    return CifarResNet(56, num_classes, in_channels)


def resnet110(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """110 层，1727962 个参数。"""
    return CifarResNet(110, num_classes, in_channels)


def plain20(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """``resnet20`` 的孪生网络。"""
    return CifarResNet(20, num_classes, in_channels, shortcut=False)


def plain56(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """``resnet56`` 的孪生网络。"""
    return CifarResNet(56, num_classes, in_channels, shortcut=False)


def plain110(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """``resnet110`` 的孪生网络。"""
    return CifarResNet(110, num_classes, in_channels, shortcut=False)


def preact_resnet20(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """20 层的预激活形式。"""
    return CifarResNet(20, num_classes, in_channels, block=PreActBlock)
