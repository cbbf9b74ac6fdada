"""感受野：一个输出看得见输入的哪些像素，又真正用了其中多少。

一层由 (核 k, 步幅 s, 填充 p, 空洞 d) 给定；横竖互不相干，各按一维算。这一层的输出 ``i`` 读上一层的

    i·s − p + d·t，   t = 0, 1, …, k − 1

即从 ``i·s − p`` 起、到 ``i·s − p + d(k−1)`` 止。设上一层的输出 ``m`` 看得见输入的一段，起点
``a + m·j``、长 ``r``（``j`` 是相邻两个输出的起点之差）。把最左与最右的 ``m`` 代入：

    起点  a + (i·s − p)·j                       =>  j' = j·s，  a' = a − p·j
    终点  a + (i·s − p + d(k−1))·j + r − 1      =>  r' = r + d(k−1)·j

输入自身是 ``j = r = 1``、``a = 0``。三个递推都只用到上一层的 ``j``：步幅在前，后面每一层的核就都
放大那么多倍。输出的大小 ``n' = ⌊(n + 2p − d(k−1) − 1)/s⌋ + 1``。

公式没有管边界：伸到图像外面的部分是填充，要裁掉；中间各层的填充也一样。``support`` 从输出往回逐层
推，得出确切的那些像素（空洞、步幅大于核时中间还有空隙），``gradient_support`` 用梯度量出来，
两者逐个像素相同。

理论上看得见，不等于用得上：``effective_receptive_field`` 量梯度的大小，它集中在中央，形如高斯。

不处理：分叉的网络、``ceil_mode``、左右不等的填充、自适应池化（它的核随输入大小而变）。

维度约定：``B, C, H, W``；位置与长度都以输入的像素为单位。

参考: Luo, Li, Urtasun, Zemel, 2016, arXiv:1701.04128。visualization.md「感受野」「有效感受野」。
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from chapter_04_cnn_classic import layers as handmade
from chapter_04_cnn_classic.conv import Size, as_pair


class LayerSpec(NamedTuple):
    """一层在一个方向上的几何：核、步幅、填充、空洞；``name`` 只用于显示。"""

    name: str
    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    @property
    def reach(self) -> int:
        """首尾两个抽头相距多少，``d(k−1)``。"""
        return self.dilation * (self.kernel - 1)

    def output_size(self, size: int) -> int:
        """``⌊(n + 2p − d(k−1) − 1)/s⌋ + 1``。"""
        room = size + 2 * self.padding - self.reach - 1
        if room < 0:
            raise ValueError(
                f"{self.name} 的核张开 {self.reach + 1}，而输入加上填充只有"
                f" {size + 2 * self.padding}：请用更大的图像"
            )
        return room // self.stride + 1


class Field(NamedTuple):
    """一层输出的感受野：输出 ``i`` 看得见输入的 ``[start + i·jump, start + i·jump + field)``。"""

    name: str
    size: int  # 输出的边长
    jump: int  # 相邻两个输出相距的输入像素数
    field: int  # 感受野的边长，像素
    start: int  # 第 0 个输出的感受野的起点，像素；负数表示伸进了填充


def receptive_fields(specs: Sequence[LayerSpec], size: int) -> list[Field]:
    """逐层的感受野，按本文件开头的递推。

    参数:
        specs: 各层的几何，由输入到输出。
        size: 输入的边长，像素。

    返回:
        每层一个 ``Field``。

    异常:
        ValueError: 某一层的核比它的输入还大。
    """
    jump, field, start, result = 1, 1, 0, []
    for spec in specs:
        size = spec.output_size(size)
        field += spec.reach * jump
        start -= spec.padding * jump
        jump *= spec.stride
        result.append(Field(spec.name, size, jump, field, start))
    return result


def support(specs: Sequence[LayerSpec], size: int, position: int) -> Tensor:
    """输出 ``position`` 确切看得见哪些像素：从输出往回，逐层标出被读到的位置。

    参数:
        specs, size: 同 ``receptive_fields``。
        position: 最后一层输出的下标，从 0 起。

    返回:
        bool ``(size,)``。两个方向各算一次，外积就是二维的。

    异常:
        ValueError: 下标超出输出的范围。
    """
    sizes = [size]
    for spec in specs:
        sizes.append(spec.output_size(sizes[-1]))
    if not 0 <= position < sizes[-1]:
        raise ValueError(f"position={position} 应在 0 到 {sizes[-1] - 1} 之间：输出只有这么大")
    seen = torch.zeros(sizes[-1], dtype=torch.bool)
    seen[position] = True
    for spec, below in zip(reversed(specs), reversed(sizes[:-1]), strict=True):
        taps = spec.dilation * torch.arange(spec.kernel)
        read = (seen.nonzero() * spec.stride - spec.padding + taps).flatten()
        read = read[(read >= 0) & (read < below)]  # 落在填充里的不是像素
        seen = torch.zeros(below, dtype=torch.bool)
        seen[read] = True
    return seen


# ---------------------------------------------------------------- 从网络读出几何

CONVS = (nn.Conv2d, handmade.Conv2d)
POOLS = (nn.MaxPool2d, nn.AvgPool2d, handmade.MaxPool2d, handmade.AvgPool2d)
POINTWISE = (
    nn.ReLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.LeakyReLU,
    nn.GELU,
    nn.SiLU,
    nn.BatchNorm2d,  # 评估模式下是逐元素的仿射；训练模式下统计量看得见整批图像
    nn.Dropout,
    nn.Dropout2d,
    nn.Identity,
)


def _flatten(features: nn.Module) -> Iterator[nn.Module]:
    """按次序展开嵌套的 ``Sequential``。"""
    if isinstance(features, nn.Sequential):
        for child in features:
            yield from _flatten(child)
    else:
        yield features


LayerShape = tuple[Size, Size, Size | str, Size]  # 核、步幅、填充、空洞


def _geometry(layer: nn.Module) -> LayerShape:
    if isinstance(layer, handmade.Conv2d):
        stride, padding, dilation, _ = layer.options
        return tuple(layer.weight.shape[2:]), stride, padding, dilation
    if isinstance(layer, (handmade.MaxPool2d, handmade.AvgPool2d)):
        kernel, stride, padding = layer.options
        return kernel, kernel if stride is None else stride, padding, 1
    if getattr(layer, "ceil_mode", False):
        raise ValueError(f"{layer} 用了 ceil_mode：这里的尺寸公式只管向下取整")
    return layer.kernel_size, layer.stride, layer.padding, getattr(layer, "dilation", 1)


def _spec(name: str, geometry: LayerShape, axis: int) -> LayerSpec:
    kernel, stride, padding, dilation = geometry
    k, s, d = (as_pair(v, name)[axis] for v in (kernel, stride, dilation))
    if padding == "valid":
        p = 0
    elif padding == "same":
        if d * (k - 1) % 2:
            raise ValueError(f"{name} 的 padding='same' 左右不等（核张开 {d * (k - 1) + 1}）")
        p = d * (k - 1) // 2
    else:
        p = as_pair(padding, name, at_least=0)[axis]
    return LayerSpec(name, k, s, p, d)


def layer_specs(features: nn.Module, axis: int = 0) -> list[LayerSpec]:
    """读出一个 ``Sequential`` 里每个卷积与池化层的几何；逐元素的层略过。

    参数:
        features: 如 ``model.features``；可以嵌套，官方的与本章手写的层都认得。
        axis: 0 为竖直方向，1 为水平方向。

    返回:
        各层的 ``LayerSpec``，名字是 ``conv1 pool1 conv2 …``。

    异常:
        ValueError: 有不认识的层，或几何不在本文件的范围之内。
    """
    specs, convs, pools = [], 0, 0
    for layer in _flatten(features):
        if isinstance(layer, CONVS):
            convs += 1
            specs.append(_spec(f"conv{convs}", _geometry(layer), axis))
        elif isinstance(layer, POOLS):
            pools += 1
            specs.append(_spec(f"pool{pools}", _geometry(layer), axis))
        elif not isinstance(layer, POINTWISE):
            raise ValueError(
                f"不认识的层 {type(layer).__name__}：只能是卷积、池化与逐元素的层组成的 Sequential"
            )
    return specs


# ---------------------------------------------------------------- 用梯度量


def positive_copy(features: nn.Module) -> nn.Sequential:
    """几何相同、但梯度不会消失的单通道网络：正权重的卷积与平均池化。

    直接对原来的网络求导，梯度为零的像素不一定看不见：ReLU 关着、最大池化没选中、正负权重恰好
    抵消，都会得到零。权重全正、池化取平均、去掉激活，输出对每个看得见的像素的导数就是若干正数之和，
    不为零；对看不见的像素恰为零。通道与位置无关，一个就够。
    """
    copy = nn.Sequential()
    for layer in _flatten(features):
        if not isinstance(layer, CONVS + POOLS):
            continue
        vertical, horizontal = (_spec("", _geometry(layer), axis) for axis in (0, 1))
        kernel, stride, padding, dilation = zip(vertical[1:], horizontal[1:], strict=True)
        # 平均池化就是权重相等的卷积；用卷积才能有空洞
        conv = nn.Conv2d(1, 1, kernel, stride, padding, dilation, bias=False, dtype=torch.float64)
        nn.init.constant_(conv.weight, 1 / math.prod(kernel))  # 平均：深了也不会溢出
        copy.append(conv)
    return copy


def gradient_support(
    features: nn.Module, size: tuple[int, int], position: tuple[int, int]
) -> Tensor:
    """用梯度量：输出 ``position`` 看得见输入的哪些像素。

    参数:
        features: 同 ``layer_specs``。
        size: 输入的 (高, 宽)，像素。
        position: 输出的 (行, 列)。

    返回:
        bool ``(H, W)``。
    """
    layer_specs(features)  # 先查有没有不认识的层
    x = torch.ones(1, 1, *size, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        y = positive_copy(features)(x)[0, 0, position[0], position[1]]
    return torch.autograd.grad(y, x)[0][0, 0] != 0


# ---------------------------------------------------------------- 有效感受野


def conv_stack(depth: int, kernel: int = 3, channels: int = 16, relu: bool = True) -> nn.Sequential:
    """``depth`` 层步幅 1、保持大小的卷积，单通道输入。"""
    stack = nn.Sequential()
    for index in range(depth):
        width = 1 if index == 0 else channels
        stack.append(nn.Conv2d(width, channels, kernel, padding=kernel // 2, bias=False))
        if relu:
            stack.append(nn.ReLU())
    return stack


def effective_receptive_field(
    features: nn.Sequential, size: int, draws: int, generator: torch.Generator
) -> Tensor:
    """随机权重与输入下，中央的输出对各像素的梯度平方的平均，归一到和为 1。

    权重独立、均值为零时，不同路径的贡献互不相关，交叉项的期望为零：``E[g²]`` 是各条路径上权重平方
    之积的期望对路径求和，于是正比于「``n`` 步、每步在核的各抽头里等可能地取一个」的随机游走
    落在该像素的概率。``n`` 个独立步子之和趋于高斯，一个方向上的标准差是 ``random_walk_std``。

    参数:
        features: 同 ``layer_specs``；权重不会被改动。输入通道数由第一个卷积得出。
        size: 输入的边长，像素；应大于理论感受野，免得碰到边界。
        draws: 独立地重取权重与输入的次数。
        generator: 随机数生成器。

    返回:
        float32 ``(size, size)``，非负，和为 1。

    异常:
        ValueError: 梯度处处为零（例如 ReLU 全部关着），没有形状可言。
    """
    convs = [layer for layer in features.modules() if isinstance(layer, CONVS)]
    names = [name for name, _ in features.named_parameters()]
    energy = torch.zeros(size, size)
    for _ in range(draws):
        weights = {}
        for name, parameter in zip(names, features.parameters(), strict=True):
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            spread = math.sqrt(2 / fan_in) if parameter.ndim > 1 else 0.0  # 偏置取零
            weights[name] = spread * torch.randn(parameter.shape, generator=generator)
        x = torch.randn(1, convs[0].weight.shape[1], size, size, generator=generator)
        x.requires_grad_()
        with torch.enable_grad():
            y = torch.func.functional_call(features, weights, (x,))
            centre = y[0, :, y.shape[2] // 2, y.shape[3] // 2]
            signs = torch.randn(centre.shape, generator=generator)
            (gradient,) = torch.autograd.grad((signs * centre).sum(), x)
        energy += gradient[0].square().sum(dim=0)
    if energy.sum() == 0:
        raise ValueError("梯度处处为零：请增加 draws 或通道数")
    return energy / energy.sum()


def random_walk_std(specs: Sequence[LayerSpec]) -> float:
    """有效感受野在一个方向上的标准差，像素：``√(Σ_l (d_l j_l)² (k_l² − 1)/12)``。

    第 ``l`` 层的一步在 ``k`` 个等距的抽头里等可能，间距 ``d·j`` 像素，方差 ``(dj)²(k²−1)/12``；
    独立步子的方差相加。全是 ``k`` 核、步幅 1 时就是 ``√(n(k²−1)/12)``，正比于 ``√n``。
    """
    jump, variance = 1, 0.0
    for spec in specs:
        variance += (spec.dilation * jump) ** 2 * (spec.kernel**2 - 1) / 12
        jump *= spec.stride
    return math.sqrt(variance)


def spread(energy: Tensor) -> float:
    """一张非负的 ``(H, W)`` 图在两个方向上的标准差的均方根，像素。"""
    total, variance = energy.sum(), 0.0
    for axis in (0, 1):
        profile = energy.sum(dim=1 - axis) / total
        where = torch.arange(len(profile), dtype=profile.dtype)
        mean = (profile * where).sum()
        variance += (profile * (where - mean).square()).sum().item() / 2
    return math.sqrt(variance)
