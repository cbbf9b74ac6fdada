"""LeNet-5：1998 年论文里的样子与今天的写法。

1998 年的 ``LeNet1998``：缩放的 tanh、带可训练系数的下采样、只连一部分通道的 C3、径向基（RBF）
输出层；恰好 60000 个可训练参数，与论文所述相同。今天的 ``LeNet5``：ReLU、最大池化、全连接输出，
61706 个参数。

与论文的差别：训练用交叉熵（以负的 RBF 惩罚为得分），相当于论文式 (9) 去掉「废类」常数 j；
RBF 的 7×12 字形用七段数码管的样式，论文用印刷体点阵；输入 28×28 时四周补 2 像素成 32×32。

维度约定：``B, C, H, W``。

参考: LeCun, Bottou, Bengio, Haffner, 1998, Gradient-Based Learning Applied to Document
Recognition, Proceedings of the IEEE 86(11)，II.B 节与表 I。README「LeNet」。
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_04_cnn_classic.inputs import check_image

# ---------------------------------------------------------------- 今天的写法


class LeNet5(nn.Module):
    """LeNet-5 的现代形式：两个「卷积 -> ReLU -> 最大池化」，三个全连接层。

    参数:
        num_classes: 类别数。
        in_channels: 输入通道数。
        image_size: 输入的边长，像素；至少 12，否则第二次池化之后一个像素都不剩。
        widths: 两个卷积与两个隐藏全连接层的宽度，论文的数值为 ``(6, 16, 120, 84)``。

    形状: ``(B, in_channels, image_size, image_size) -> (B, num_classes)``。
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        widths: tuple[int, int, int, int] = (6, 16, 120, 84),
    ) -> None:
        super().__init__()
        if image_size < 12:
            raise ValueError(f"LeNet-5 的输入边长至少 12 像素，实为 {image_size}")
        self.in_channels, self.image_size = in_channels, image_size
        first, second, third, fourth = widths
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, first, kernel_size=5, padding=2),  # 28 -> 28
            nn.ReLU(),
            nn.MaxPool2d(2),  # 28 -> 14
            nn.Conv2d(first, second, kernel_size=5),  # 14 -> 10
            nn.ReLU(),
            nn.MaxPool2d(2),  # 10 -> 5
        )
        side = (image_size // 2 - 4) // 2
        self.classifier = nn.Sequential(
            nn.Linear(second * side * side, third),
            nn.ReLU(),
            nn.Linear(third, fourth),
            nn.ReLU(),
            nn.Linear(fourth, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        check_image(x, self.in_channels, self.image_size, "LeNet-5", exact=True)
        return self.classifier(self.features(x).flatten(1))


def lenet5(num_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> LeNet5:
    """LeNet-5 的现代形式，61706 个参数（10 类、单通道、28×28）。"""
    return LeNet5(num_classes, in_channels, image_size)


# ---------------------------------------------------------------- 1998 年的原貌

# 论文表 I：C3 的 16 个特征图各自连接 S2 的哪几个（共 60 条连接，打破对称，也省运算）
C3_TABLE = (
    (0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5),
    (0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5),
    (0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5), (0, 1, 2, 3, 4, 5),
)  # fmt: skip


class ScaledTanh(nn.Module):
    """``A tanh(Sx)``，``A = 1.7159``，``S = 2/3``：使 ``f(±1) = ±1``，且那里的曲率最大。"""

    def forward(self, x: Tensor) -> Tensor:
        return 1.7159 * torch.tanh(2 / 3 * x)


class Subsampling(nn.Module):
    """S2 与 S4：2×2 求和，乘以每通道一个可训练的系数，加偏置，再过激活函数。"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.coefficient = nn.Parameter(torch.full((channels,), 0.25))  # 起初就是平均池化
        self.bias = nn.Parameter(torch.zeros(channels))
        self.activation = ScaledTanh()

    def forward(self, x: Tensor) -> Tensor:
        total = 4 * F.avg_pool2d(x, 2)  # 2×2 求和
        return self.activation(total * self.coefficient.view(-1, 1, 1) + self.bias.view(-1, 1, 1))


class SparseConv2d(nn.Module):
    """C3：每个输出通道只连输入通道的一部分，``(B, 6, 14, 14) -> (B, 16, 10, 10)``。

    只存实有的 60 个 5×5 核；前向时放进稠密的 ``(16, 6, 5, 5)``，不相连处为零。
    """

    def __init__(self, table: tuple[tuple[int, ...], ...], in_channels: int, kernel: int) -> None:
        super().__init__()
        pairs = [(out, source) for out, sources in enumerate(table) for source in sources]
        self.weight = nn.Parameter(torch.empty(len(pairs), kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(len(table)))
        self.register_buffer("pairs", torch.tensor(pairs).T, persistent=False)
        self.shape = (len(table), in_channels, kernel, kernel)
        for (out, _), weight in zip(pairs, self.weight, strict=True):
            bound = 2.4 / (len(table[out]) * kernel * kernel)  # 论文附录 A：±2.4 / fan_in
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.new_zeros(self.shape)
        weight[self.pairs[0], self.pairs[1]] = self.weight
        return F.conv2d(x, weight, self.bias)


SEGMENTS = ("abcdef", "bc", "abdeg", "abcdg", "bcfg", "acdfg", "acdefg", "abc", "abcdefg", "abcdfg")


def digit_codes() -> Tensor:
    """十个数字的 7×12 字形，``(10, 84)``，取值 ±1：F6 的 84 个单元因此而来。"""
    strokes = {  # 七段数码管：每段的 (行, 列)
        "a": (slice(1, 2), slice(1, 6)),
        "g": (slice(5, 6), slice(1, 6)),
        "d": (slice(10, 11), slice(1, 6)),
        "f": (slice(1, 6), slice(1, 2)),
        "b": (slice(1, 6), slice(5, 6)),
        "e": (slice(5, 11), slice(1, 2)),
        "c": (slice(5, 11), slice(5, 6)),
    }
    codes = -torch.ones(len(SEGMENTS), 12, 7)
    for code, names in zip(codes, SEGMENTS, strict=True):
        for name in names:
            code[strokes[name]] = 1.0
    return codes.flatten(1)


class RBF(nn.Module):
    """输出层：``y_i = Σ_j (x_j − c_ij)²``，``c_i`` 是第 ``i`` 类的固定编码；得分为 ``−y``。"""

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return -(x.unsqueeze(1) - self.codes).square().sum(dim=-1)  # (B, 84) -> (B, 10)


class LeNet1998(nn.Module):
    """1998 年的 LeNet-5，60000 个可训练参数。

    形状: ``(B, 1, 28, 28)`` 或 ``(B, 1, 32, 32) -> (B, 10)``，返回负的 RBF 惩罚。
    """

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(1, 6, kernel_size=5)  # 32 -> 28
        self.s2 = Subsampling(6)  # 28 -> 14
        self.c3 = SparseConv2d(C3_TABLE, 6, kernel=5)  # 14 -> 10
        self.s4 = Subsampling(16)  # 10 -> 5
        self.c5 = nn.Conv2d(16, 120, kernel_size=5)  # 5 -> 1
        self.f6 = nn.Linear(120, 84)
        self.output = RBF(digit_codes())
        self.activation = ScaledTanh()
        for layer in (self.c1, self.c5, self.f6):
            bound = 2.4 / math.prod(layer.weight.shape[1:])
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1:] not in ((1, 28, 28), (1, 32, 32)):
            raise ValueError(
                f"LeNet1998 的输入应为 (B, 1, 28, 28) 或 (B, 1, 32, 32)，实为 {tuple(x.shape)}"
            )
        if x.shape[-1] == 28:
            x = F.pad(x, (2, 2, 2, 2), mode="replicate")  # 补背景：归一化之后的黑不是零
        x = self.s2(self.activation(self.c1(x)))
        x = self.s4(self.activation(self.c3(x)))
        x = self.activation(self.c5(x).flatten(1))
        return self.output(self.activation(self.f6(x)))
