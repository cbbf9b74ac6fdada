"""Network in Network：1×1 卷积是每个像素上的全连接层，全局平均池化代替全连接分类器。

维度约定：``B, C, H, W``。与论文的差别：权重用 Kaiming 初始化；池化四周填充一圈。

参考: Lin, Chen, Yan, 2013, Network In Network, arXiv:1312.4400。README「NiN」。
"""

from __future__ import annotations

from torch import Tensor, nn

from chapter_04_cnn_classic.inputs import check_image
from chapter_04_cnn_classic.pooling import global_avg_pool2d


def nin_block(in_channels: int, channels: tuple[int, int, int], kernel: int) -> nn.Sequential:
    """一个 ``kernel × kernel`` 卷积后接两个 1×1 卷积：在每个位置上滑动一个小 MLP。"""
    first, second, third = channels
    return nn.Sequential(
        nn.Conv2d(in_channels, first, kernel, padding=kernel // 2),
        nn.ReLU(inplace=True),
        nn.Conv2d(first, second, kernel_size=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(second, third, kernel_size=1),
        nn.ReLU(inplace=True),
    )


class NiN(nn.Module):
    """论文用于 CIFAR-10 的网络，``(B, in_channels, H, W) -> (B, num_classes)``，``H, W ≥ 8``。

    参数:
        width: 论文为 192；1×1 卷积的通道数按论文的比例。
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 3, width: int = 192, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        narrow, middle = width // 2, width * 5 // 6  # 96 与 160
        self.features = nn.Sequential(
            nin_block(in_channels, (width, middle, narrow), kernel=5),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
            nn.Dropout(dropout),
            nin_block(narrow, (width, width, width), kernel=5),
            nn.AvgPool2d(kernel_size=3, stride=2, padding=1, count_include_pad=False),
            nn.Dropout(dropout),
            nin_block(width, (width, width, num_classes), kernel=3),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        check_image(x, self.in_channels, 8, "NiN")
        return global_avg_pool2d(self.features(x))  # 每类一张特征图，全局平均就是得分


def nin_small(num_classes: int = 10, in_channels: int = 3, width: int = 96) -> NiN:
    """宽度减半的 NiN，两核上几分钟可训。"""
    return NiN(num_classes, in_channels, width)
