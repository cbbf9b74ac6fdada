"""VGG：用连叠的 3×3 卷积代替大核；11、13、16、19 层，带或不带 BatchNorm，外加小图形式。

两个 3×3 的感受野等于一个 5×5，三个等于一个 7×7，而参数只有 18/25 与 27/49，还多出非线性。
ImageNet 形式的参数名、参数量与输出都与 torchvision 相同，官方权重可以直接装入。

维度约定：``B, C, H, W``。

参考: Simonyan 与 Zisserman, 2014, Very Deep Convolutional Networks for Large-Scale Image
Recognition, arXiv:1409.1556，表 1；Ioffe 与 Szegedy, 2015, arXiv:1502.03167（BatchNorm）。
README「VGG」。
"""

from __future__ import annotations

from torch import Tensor, nn

from chapter_04_cnn_classic.inputs import check_image

# 论文表 1 的 A、B、D、E 列：数字是 3×3 卷积的输出通道数，"M" 是 2×2 最大池化
CONFIGS: dict[int, tuple[int | str, ...]] = {
    11: (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    13: (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    16: (64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3, "M"),
    19: (64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M"),
}


def make_features(
    config: tuple[int | str, ...], in_channels: int = 3, batch_norm: bool = False
) -> nn.Sequential:
    """按配置表搭出卷积部分。"""
    layers: list[nn.Module] = []
    for item in config:
        if item == "M":
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
            continue
        layers.append(nn.Conv2d(in_channels, item, kernel_size=3, padding=1))
        if batch_norm:
            layers.append(nn.BatchNorm2d(item))
        layers.append(nn.ReLU(inplace=True))
        in_channels = item
    return nn.Sequential(*layers)


def initialize(model: nn.Module) -> None:
    """Kaiming 初始化卷积，``N(0, 0.01²)`` 初始化全连接：论文靠先训浅网络再加深，如今不必。"""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, 0.01)
            nn.init.zeros_(layer.bias)


class VGG(nn.Module):
    """ImageNet 形式的 VGG，``(B, 3, H, W) -> (B, num_classes)``，``H, W ≥ 32``，论文为 224。"""

    def __init__(self, features: nn.Sequential, num_classes: int = 1000, dropout: float = 0.5):
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        )
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        check_image(x, 3, 32, "VGG")
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def _vgg(depth: int, batch_norm: bool, num_classes: int, dropout: float) -> VGG:
    return VGG(make_features(CONFIGS[depth], batch_norm=batch_norm), num_classes, dropout)


def vgg11(num_classes: int = 1000, dropout: float = 0.5) -> VGG:
    """11 层，132863336 个参数（1000 类）。"""
    return _vgg(11, False, num_classes, dropout)


def vgg11_bn(num_classes: int = 1000, dropout: float = 0.5) -> VGG:
    """11 层，带 BatchNorm，132868840 个参数。"""
    return _vgg(11, True, num_classes, dropout)


def vgg13(num_classes: int = 1000, dropout: float = 0.5) -> VGG:
    """13 层，133047848 个参数。"""
    return _vgg(13, False, num_classes, dropout)


def vgg13_bn(num_classes: int = 1000, dropout: float = 0.5) -> VGG:
    """13 层，带 BatchNorm，133053736 个参数。"""
    return _vgg(13, True, num_classes, dropout)


def vgg16(num_classes: int = 1000, dropout: float = 0.5) -> VGG:
    """16 层，138357544 个参数。"""
    return _vgg(16, False, num_classes, dropout)


def vgg16_bn(num_classes: int = 1000, dropout: float = 0.5) -> VGG:
    """16 层，带 BatchNorm，138365992 个参数。"""
    return _vgg(16, True, num_classes, dropout)


def vgg19(num_classes: int = 1000, dropout: float = 0.5) -> VGG:
    """19 层，143667240 个参数。"""
    return _vgg(19, False, num_classes, dropout)


def vgg19_bn(num_classes: int = 1000, dropout: float = 0.5) -> VGG:
    """19 层，带 BatchNorm，143678248 个参数。"""
    return _vgg(19, True, num_classes, dropout)


# ---------------------------------------------------------------- 小图


class VGGSmall(nn.Module):
    """28/32 像素的 VGG，``(B, in_channels, H, W) -> (B, num_classes)``，``H, W ≥ 16``。

    去掉最后一次池化（32 像素只够减半五次，28 只够四次），以全局平均池化与一个全连接层代替
    占去九成参数的三个全连接层。

    参数:
        depth: 11、13、16 或 19。
        width: 第一个卷积的通道数，ImageNet 形式为 64；其余按比例。
        batch_norm: 是否带 BatchNorm。
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 32,
        batch_norm: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if depth not in CONFIGS or width < 1:
            raise ValueError(
                f"VGG 的 depth 应为 {sorted(CONFIGS)} 之一，width 至少为 1，实为 {depth} 与 {width}"
            )
        self.in_channels = in_channels
        config = tuple(c if c == "M" else c * width // 64 for c in CONFIGS[depth][:-1])
        self.features = make_features(config, in_channels, batch_norm)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(config[-1], num_classes))
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        check_image(x, self.in_channels, 16, "小图 VGG")
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def vgg_small(
    depth: int = 11,
    num_classes: int = 10,
    in_channels: int = 3,
    width: int = 32,
    batch_norm: bool = True,
) -> VGGSmall:
    """28/32 像素的 VGG。"""
    return VGGSmall(depth, num_classes, in_channels, width, batch_norm)
