"""DenseNet：每一层读前面**所有**层的输出，新特征拼接在后面；121、169、201 层，外加小图形式。

本文件教什么：稠密块（growth rate、1×1 瓶颈）、压缩通道的过渡层；拼接为什么使朴素实现存下
O(L²k) 的特征，以及怎样用检查点降到 O(Lk)：反向时重算拼接、BatchNorm 与 ReLU，而 BatchNorm 的
滑动统计量只更新一次。ImageNet 形式的参数名、参数量与输出都与 torchvision 相同。
不涉及：论文不做增强时块内的 dropout。

维度约定：``B, C, H, W``；L 是一个稠密块的层数，k 是 growth rate。

参考: Huang, Liu, van der Maaten, Weinberger, 2016, Densely Connected Convolutional Networks,
arXiv:1608.06993，表 1；Pleiss 等, 2017, Memory-Efficient Implementation of DenseNets,
arXiv:1707.06990。modern.md「DenseNet」「拼接的内存」。
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chapter_04_cnn_classic.inputs import check_image

BOTTLENECK = 4  # 1×1 卷积输出 4k 个通道，再由 3×3 卷积得到 k 个新特征


@contextmanager
def borrowed_statistics(norm: nn.BatchNorm2d) -> Iterator[None]:
    """``with`` 之内 ``norm`` 更新的是滑动统计量的副本，出来时换回原来的。

    检查点在反向时把前向再做一遍。BatchNorm 的前向有副作用：每做一次，就向滑动平均里再混入一次这一批
    的统计量。梯度不受影响（它只用这一批的均值与方差），推理时的输出却错了。
    """
    own = norm.running_mean, norm.running_var, norm.num_batches_tracked
    norm.running_mean, norm.running_var, norm.num_batches_tracked = (x.clone() for x in own)
    try:
        yield
    finally:
        norm.running_mean, norm.running_var, norm.num_batches_tracked = own


class DenseLayer(nn.Module):
    """``k`` 个新特征：``conv3×3(relu(bn(conv1×1(relu(bn([x_0, x_1, …]))))))``。"""

    def __init__(self, in_channels: int, growth: int, memory_efficient: bool) -> None:
        super().__init__()
        self.memory_efficient = memory_efficient
        middle = BOTTLENECK * growth
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, middle, kernel_size=1, bias=False)
        self.norm2 = nn.BatchNorm2d(middle)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(middle, growth, kernel_size=3, padding=1, bias=False)

    def bottleneck(self, *features: Tensor) -> Tensor:
        """拼接，再压到 4k 个通道：大张量都在这里产生，检查点包住的就是它。

        卷积的反向只要它的输入，PyTorch 重算到凑齐要用的张量就停，因此卷积不会再做一遍。
        """
        return self.conv1(self.relu1(self.norm1(torch.cat(features, dim=1))))

    def forward(self, features: list[Tensor]) -> Tensor:
        if self.memory_efficient:
            x = checkpoint(
                self.bottleneck,
                *features,
                use_reentrant=False,
                preserve_rng_state=False,  # 里面没有随机数
                context_fn=lambda: (nullcontext(), borrowed_statistics(self.norm1)),  # 前向，重算
            )
        else:
            x = self.bottleneck(*features)
        return self.conv2(self.relu2(self.norm2(x)))


class DenseBlock(nn.Module):
    """``layers`` 层，``(B, C, H, W) -> (B, C + layers·k, H, W)``：输入与各层的新特征拼在一起。"""

    def __init__(self, layers: int, in_channels: int, growth: int, memory_efficient: bool) -> None:
        super().__init__()
        for index in range(layers):
            layer = DenseLayer(in_channels + index * growth, growth, memory_efficient)
            self.add_module(f"denselayer{index + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.children():
            features.append(layer(features))
        return torch.cat(features, dim=1)


class Transition(nn.Sequential):
    """块与块之间：1×1 卷积压缩通道（论文的压缩率 θ 取 ½），再把边长减半。"""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        self.pool = nn.AvgPool2d(kernel_size=2, stride=2)


class DenseNet(nn.Module):
    """``(B, in_channels, H, W) -> (B, num_classes)``，``H, W ≥ at_least``。

    参数:
        growth: growth rate k，每层的新特征数。
        blocks: 各稠密块的层数；块与块之间通道与边长都减半。
        stem: 第一个稠密块之前的各层，按名字；``conv0`` 是第一个卷积。
        at_least: 最小的边长，像素：再小，过渡层就减到零。
        num_classes: 类别数。
        memory_efficient: 反向时重算拼接、BatchNorm 与 ReLU，不重做卷积；内存由 O(L²k) 降到 O(Lk)。

    异常:
        ValueError: growth、blocks、num_classes 里有小于 1 的。
    """

    def __init__(
        self,
        growth: int,
        blocks: tuple[int, ...],
        stem: Mapping[str, nn.Module],
        at_least: int,
        num_classes: int,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        if min(growth, num_classes, *blocks) < 1:
            raise ValueError(
                "DenseNet 的 growth、blocks、num_classes 都至少为 1，"
                f"实为 {growth}、{blocks} 与 {num_classes}"
            )
        self.in_channels, self.at_least = stem["conv0"].in_channels, at_least
        self.features = nn.Sequential()
        for name, layer in stem.items():
            self.features.add_module(name, layer)
        channels = stem["conv0"].out_channels
        for index, layers in enumerate(blocks, start=1):
            if index > 1:
                transition = Transition(channels, channels // 2)
                self.features.add_module(f"transition{index - 1}", transition)
                channels //= 2
            block = DenseBlock(layers, channels, growth, memory_efficient)
            self.features.add_module(f"denseblock{index}", block)
            channels += layers * growth
        self.features.add_module(f"norm{len(blocks) + 1}", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)
        self.initialize()

    def initialize(self) -> None:
        """卷积用 Kaiming 初始化（fan_in），全连接的偏置为零；其余是 PyTorch 的缺省。"""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
            elif isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        check_image(x, self.in_channels, self.at_least, "DenseNet")
        x = F.relu(self.features(x), inplace=True)  # 层内是先 BN、ReLU 后卷积，末尾要补一个
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


def stored_features(layers: int, channels: int, growth: int, memory_efficient: bool) -> int:
    """一个稠密块前向之后、为反向留着的特征：每个像素多少个数。

    不计块的输出与各通道的统计量。第 ``l`` 层（从 0 数起）的输入有 ``C + lk`` 个通道。BatchNorm 与
    卷积的反向都要用各自的输入：瓶颈之后的 BN2、conv2 各留 ``4k``，之前的 BN1、conv1 各留
    ``C + lk``（ReLU 就地，用的是卷积的输入）。检查点不留后两个，改留重算的起点，即各层的新特征
    ``k``；最后一层的除外，没有别的层读它。
    """
    after = 2 * BOTTLENECK * growth * layers
    if memory_efficient:
        return after + growth * (layers - 1)
    return after + 2 * sum(channels + index * growth for index in range(layers))


# ---------------------------------------------------------------- ImageNet


def _densenet(
    blocks: tuple[int, ...], num_classes: int, memory_efficient: bool, growth: int = 32
) -> DenseNet:
    width = 2 * growth
    stem = {
        "conv0": nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False),
        "norm0": nn.BatchNorm2d(width),
        "relu0": nn.ReLU(inplace=True),
        "pool0": nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    }
    return DenseNet(growth, blocks, stem, 32, num_classes, memory_efficient)


def densenet121(num_classes: int = 1000, memory_efficient: bool = False) -> DenseNet:
    """121 层，7978856 个参数（1000 类）。"""
    return _densenet((6, 12, 24, 16), num_classes, memory_efficient)


def densenet169(num_classes: int = 1000, memory_efficient: bool = False) -> DenseNet:
    """169 层，14149480 个参数。"""
    return _densenet((6, 12, 32, 32), num_classes, memory_efficient)


def densenet201(num_classes: int = 1000, memory_efficient: bool = False) -> DenseNet:
    """201 层，20013928 个参数。"""
    return _densenet((6, 12, 48, 32), num_classes, memory_efficient)


def rename_old_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """把官方权重文件（如 ``densenet121-a639ec97.pth``）的旧名字换成现在的；新名字的原样返回。

    旧文件写作 ``denselayer1.norm.1.weight``，如今模块名里不许有点，改成了 ``norm1``；存它的 PyTorch
    还没有 ``num_batches_tracked``，缺的补零（``momentum`` 是常数时用不到它）。用法::

        model.load_state_dict(rename_old_keys(read_state_dict(path)))  # 第 4 章 weights.py
    """
    renamed = {
        re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.(?=[12]\.)", r"\1", key): value
        for key, value in state.items()
    }
    result: dict[str, Tensor] = {}
    for key, value in renamed.items():
        result[key] = value
        counter = key.replace("running_var", "num_batches_tracked")
        if counter not in renamed:
            result[counter] = torch.zeros((), dtype=torch.int64)
    return result


# ---------------------------------------------------------------- 小图


def densenet_cifar(
    num_classes: int = 10,
    in_channels: int = 3,
    stem_stride: int = 1,
    memory_efficient: bool = False,
) -> DenseNet:
    """32 像素的 DenseNet-BC，40 层，k = 12；173962 个参数，边长 32 -> 16 -> 8。

    论文的 40 层形式三块各 6 层；这里按 2、6、10 分配同样的 18 层，从最贵的大图上挪走几层，
    乘加减半。
    """
    conv = nn.Conv2d(in_channels, 24, 3, stem_stride, padding=1, bias=False)
    at_least = 4 * stem_stride
    return DenseNet(12, (2, 6, 10), {"conv0": conv}, at_least, num_classes, memory_efficient)
