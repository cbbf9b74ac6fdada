"""AlexNet：2012 年论文的原貌、torchvision 的形式，与小图形式。

三者的卷积部分同构：五个卷积、三次重叠的 3×3 最大池化；全连接层三个，小图形式两个。
``alexnet`` 的参数名、参数量（61100840）与输出都与 torchvision 相同，官方权重可以直接装入。

- ``alexnet_2012``：96/256/384/384/256 个核，第二、四、五个卷积分两组（当年分在两块 GPU 上），
  局部响应归一化（LRN）。
- ``alexnet``：torchvision 采用的「One weird trick」版，64/192/384/256/256，不分组，没有 LRN。
- ``alexnet_small``：28/32 像素；11×11 步幅 4 的第一层换成 3×3，通道减少，少一个全连接层。

不处理：论文的双 GPU 训练、PCA 颜色扰动。

维度约定：``B, C, H, W``。

参考: Krizhevsky, Sutskever, Hinton, 2012, ImageNet Classification with Deep Convolutional Neural
Networks；Krizhevsky, 2014, arXiv:1404.5997（One weird trick）。README「AlexNet」。
"""

from __future__ import annotations

from torch import Tensor, nn

from chapter_04_cnn_classic.inputs import check_image


class AlexNet(nn.Module):
    """torchvision 的 AlexNet，``(B, 3, H, W) -> (B, num_classes)``，``H, W ≥ 63``，论文为 224。"""

    def __init__(self, num_classes: int = 1000, dropout: float = 0.5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),  # 224 -> 55
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),  # 55 -> 27
            nn.Conv2d(64, 192, kernel_size=5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),  # 27 -> 13
            nn.Conv2d(192, 384, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),  # 13 -> 6
        )
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        check_image(x, 3, 63, "AlexNet")
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def alexnet(num_classes: int = 1000, dropout: float = 0.5) -> AlexNet:
    """torchvision 的 AlexNet，61100840 个参数（1000 类）。"""
    return AlexNet(num_classes, dropout)


# ---------------------------------------------------------------- 2012 年的原貌


def local_response_norm(
    x: Tensor, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0
) -> Tensor:
    """局部响应归一化：``b_i = a_i / (k + α Σ_j a_j²)^β``。

    ``j`` 取以第 ``i`` 个通道居中的 ``size`` 个通道。论文的 α 不除以 ``size``，
    而 ``F.local_response_norm`` 除，换算时差这个倍数。

    参数:
        x: ``(B, C, H, W)``。
    """
    half = size // 2
    squares = nn.functional.pad(x.square(), (0, 0, 0, 0, half, size - 1 - half))
    # 错开的 size 份直接相加。前缀和之差虽与 size 无关，却是大数相减：通道间悬殊时 float32 只剩三位
    total = sum(squares[:, j : j + x.shape[1]] for j in range(size))
    return x / (k + alpha * total) ** beta


class LocalResponseNorm(nn.Module):
    """``local_response_norm`` 的模块形式，常数取论文的。"""

    def forward(self, x: Tensor) -> Tensor:
        return local_response_norm(x)


class AlexNet2012(nn.Module):
    """2012 年的 AlexNet，``(B, 3, 227, 227) -> (B, num_classes)``。

    论文写的输入是 224，但按所给的步幅与核只有 227（或补边）才得到 55×55。
    """

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 96, kernel_size=11, stride=4),  # 227 -> 55
            nn.ReLU(inplace=True),
            LocalResponseNorm(),
            nn.MaxPool2d(kernel_size=3, stride=2),  # 55 -> 27
            nn.Conv2d(96, 256, kernel_size=5, padding=2, groups=2),
            nn.ReLU(inplace=True),
            LocalResponseNorm(),
            nn.MaxPool2d(kernel_size=3, stride=2),  # 27 -> 13
            nn.Conv2d(256, 384, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 384, kernel_size=3, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, kernel_size=3, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),  # 13 -> 6
        )
        self.classifier = nn.Sequential(
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        check_image(x, 3, 227, "AlexNet2012", exact=True)
        return self.classifier(self.features(x).flatten(1))


def alexnet_2012(num_classes: int = 1000) -> AlexNet2012:
    """2012 年的 AlexNet，60965224 个参数（1000 类）。"""
    return AlexNet2012(num_classes)


# ---------------------------------------------------------------- 小图


class AlexNetSmall(nn.Module):
    """小图的 AlexNet，``(B, in_channels, H, W) -> (B, num_classes)``，``H, W ≥ 15``。

    五个卷积与三次重叠池化不变：32 -> 15 -> 7 -> 3。

    参数:
        width: 第一个卷积的通道数；其余按 torchvision 的比例 1 : 3 : 6 : 4 : 4。
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 3, width: int = 32, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        layers: list[nn.Module] = []
        channels = in_channels
        for multiple, kernel, pool in ((1, 3, 1), (3, 5, 1), (6, 3, 0), (4, 3, 0), (4, 3, 1)):
            layers += [
                nn.Conv2d(channels, multiple * width, kernel, padding=kernel // 2),
                nn.ReLU(inplace=True),
            ]
            channels = multiple * width
            if pool:
                layers.append(nn.MaxPool2d(kernel_size=3, stride=2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((3, 3))
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(channels * 9, 8 * width),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(8 * width, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        check_image(x, self.in_channels, 15, "小图 AlexNet")
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def alexnet_small(num_classes: int = 10, in_channels: int = 3, width: int = 32) -> AlexNetSmall:
    """28/32 像素的 AlexNet。"""
    return AlexNetSmall(num_classes, in_channels, width)
