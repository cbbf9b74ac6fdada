"""高效网络共用的零件：通道数取整，「卷积 + 归一化 + 激活」，展开 - 逐深度 - 投影的支路。

    支路:  1×1 展开 C -> tC  →  k×k 逐深度卷积（可带步幅）  →  SE（可无）  →  1×1 投影 tC -> C'

MobileNetV3 与 EfficientNet 的块都是这一条支路，只是激活、SE 与归一化的常数不同，所以放在一处；
块与块之间的不同（捷径、随机深度）留在各自的文件里。

维度约定：``B, C, H, W``。

参考: Sandler et al., 2018, MobileNetV2, arXiv:1801.04381。
页面 efficient.md「倒残差与线性瓶颈」。
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

Norm = Callable[[int], nn.Module]  # 通道数 -> 归一化层
Activation = Callable[..., nn.Module]  # 以 inplace=True 构造


def make_divisible(value: float, divisor: int = 8) -> int:
    """取整到 ``divisor`` 的倍数：四舍五入，至少一倍，且不比 ``value`` 少一成以上。

    通道数是 8 的倍数时，向量指令与张量核心才用得满；「不少一成」防止小网络被取整削得太薄。

    异常:
        ValueError: ``value`` 不是正数，或 ``divisor`` 小于 1。
    """
    if value <= 0 or divisor < 1:
        raise ValueError(f"通道数应为正数，divisor 至少为 1，实为 {value} 与 {divisor}")
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * value else rounded + divisor


class ConvNormActivation(nn.Sequential):
    """卷积（无偏置）、归一化、激活，``(B, C_in, H, W) -> (B, C_out, ⌈H/stride⌉, ⌈W/stride⌉)``。

    子模块编号 0、1、2 与 torchvision 相同；``activation=None`` 时没有 2，就是「线性」的投影。
    归一化的 β 已是偏置，卷积再带一个是多余的。

    参数:
        kernel_size: 奇数；填充 ``(k−1)/2``，步幅为 1 时不改变大小。
        groups: 等于 ``in_channels`` 时是逐深度卷积。
        norm: 由通道数构造归一化层。
        activation: 由 ``inplace=True`` 构造激活层，或 ``None``。
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        norm: Norm = nn.BatchNorm2d,
        activation: Activation | None = nn.ReLU,
    ) -> None:
        if kernel_size % 2 == 0 or stride < 1:
            raise ValueError(f"卷积核边长应为奇数，步幅至少为 1，实为 {kernel_size} 与 {stride}")
        layers = [
            nn.Conv2d(
                in_channels,
                out_channels,
                kernel_size,
                stride,
                padding=kernel_size // 2,
                groups=groups,
                bias=False,
            ),
            norm(out_channels),
        ]
        if activation is not None:
            layers.append(activation(inplace=True))
        super().__init__(*layers)
        self.out_channels = out_channels


def inverted_branch(
    in_channels: int,
    expanded: int,
    out_channels: int,
    kernel_size: int,
    stride: int,
    norm: Norm,
    activation: Activation,
    excitation: nn.Module | None = None,
) -> nn.Sequential:
    """展开、逐深度卷积、SE、线性投影；``expanded == in_channels`` 时省去展开。

    参数:
        expanded: 中间的通道数。
        excitation: 放在逐深度卷积之后的 SE，``None`` 时没有。
    """
    layers: list[nn.Module] = []
    if expanded != in_channels:
        layers.append(ConvNormActivation(in_channels, expanded, 1, 1, 1, norm, activation))
    layers.append(
        ConvNormActivation(expanded, expanded, kernel_size, stride, expanded, norm, activation)
    )
    if excitation is not None:
        layers.append(excitation)
    layers.append(ConvNormActivation(expanded, out_channels, 1, 1, 1, norm, None))
    return nn.Sequential(*layers)


def initialize_convolutions(model: nn.Module) -> None:
    """卷积用 He 初始化（方差 ``2/fan_out``，反向不放大也不缩小），偏置为零；BatchNorm 为恒等。"""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


def initialize_linears(model: nn.Module, std: float = 0.01) -> None:
    """全连接 ``N(0, std²)``，偏置为零。"""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, std)
            nn.init.zeros_(layer.bias)
