"""int8 的卷积与全连接，与整个网络的训练后量化（post-training quantization）。

    x ≈ s_x (q_x - z_x),  w ≈ s_w q_w
    Σ w x + b ≈ s_w s_x [ Σ q_w q_x  +  (q_b - z_x Σ q_w) ],    q_b = round(b / (s_w s_x))

方括号里全是整数：int8 × int8 的积累加在 int32 里；圆括号里的与输入无关，事先算好，存成一个 int32
偏置。层与层之间仍传浮点数：累加和乘以 ``s_w s_x`` 还原，激活函数、残差相加、池化都在浮点数里做，
到下一个卷积再量化。没有浮点单元的芯片用 ``forward_integer``，int8 进、int8 出。

本文件不处理：不足 8 位时的紧凑存放（4 位也占一个字节）、把激活函数并进卷积、量化的反向传播。

维度约定：``B, C, H, W``。

参考: Jacob et al., 2018, arXiv:1712.05877，第 2.2 至 2.4 节。deploy.md「整数卷积」。
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_05_resnet_modern_cnn.folding import replace_modules
from chapter_05_resnet_modern_cnn.quantization import (
    Grid,
    Observer,
    fixed_point,
    quantize_tensor,
    requantize,
    symmetric_grid,
)

# ---------------------------------------------------------------- int8 × int8 -> int32 的卷积

# (x 已补边, weight, stride, dilation, groups) -> int32 累加和
Convolve = Callable[[Tensor, Tensor, tuple[int, int], tuple[int, int], int], Tensor]


def _int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``(g, M, K) @ (g, K, N)``，int8 -> int32，就是整数的矩阵乘法。"""
    return torch.bmm(a.int(), b.int())


def _kernel_matmul(a: Tensor, b: Tensor) -> Tensor:
    """同上；不分组时用 PyTorch 的 int8 矩阵乘法。CPU 若有 VNNI 指令，它比 float32 的还快。"""
    return torch._int_mm(a[0], b[0])[None] if len(a) == 1 else _int_matmul(a, b)


def integer_conv2d(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    matmul: Callable[[Tensor, Tensor], Tensor] = _int_matmul,
) -> Tensor:
    """整数的卷积：摊成矩阵（im2col，第 4 章），再做整数的矩阵乘法。

    参数:
        x: int8 ``(B, C, H, W)``，已经补好边。
        weight: int8 ``(O, C/g, kh, kw)``。

    返回:
        int32 ``(B, O, H', W')``，没有任何舍入。
    """
    out_channels, width, kh, kw = weight.shape
    windows = x.permute(0, 2, 3, 1)  # 通道放在最里层：摊平时整段整段地复制
    for axis, k in ((1, kh), (2, kw)):
        span = dilation[axis - 1] * (k - 1) + 1
        windows = windows.unfold(axis, span, stride[axis - 1])
    windows = windows[..., :: dilation[0], :: dilation[1]]  # (B, H', W', C, kh, kw)
    batch, height, length = windows.shape[:3]
    windows = windows.unflatten(3, (groups, width)).permute(3, 0, 1, 2, 5, 6, 4)
    rows = windows.reshape(groups, -1, kh * kw * width)  # (g, B·H'·W', kh·kw·C/g)
    columns = weight.unflatten(0, (groups, -1)).permute(0, 3, 4, 2, 1)
    columns = columns.reshape(groups, kh * kw * width, -1)  # (g, kh·kw·C/g, O/g)
    out = matmul(rows, columns).transpose(0, 1)  # (B·H'·W', g, O/g)
    return out.reshape(batch, height, length, out_channels).permute(0, 3, 1, 2)


def kernel_conv2d(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """同 ``integer_conv2d``，矩阵乘法交给 PyTorch 的 int8 内核（不分组时）。"""
    return integer_conv2d(x, weight, stride, dilation, groups, _kernel_matmul)


def simulated_conv2d(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """同 ``integer_conv2d``，借浮点的卷积来算，结果逐位相同。

    float32 能准确表示绝对值不超过 2^24 的整数。积不超过 2^14，所以 1024 项以内的任何部分和都
    准确，与相加的次序无关；更长的和，或在 GPU 上（那里的 float32 卷积可能用 TF32 或 Winograd
    变换），用 float64。
    """
    short = weight[0].numel() <= 2**10 and not x.is_cuda
    dtype = torch.float32 if short else torch.float64
    return F.conv2d(x.to(dtype), weight.to(dtype), None, stride, 0, dilation, groups).int()


# ---------------------------------------------------------------- 层


class QuantConv2d(nn.Module):
    """int8 权重的卷积，``(B, C, H, W) -> (B, O, H', W')``，浮点进、浮点出。

    参数:
        conv: 要量化的卷积，BatchNorm 已折进去；补零的方式只能是 ``zeros``。
        grid: 输入的格点，逐张量。
        bits, per_channel: 权重的位数，是否逐通道。
        convolve: 用哪一种算法，三种的结果逐位相同。

    异常:
        ValueError: 补边的方式不支持，或求和的项数使 int32 可能溢出。
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        grid: Grid,
        bits: int = 8,
        per_channel: bool = True,
        convolve: Convolve = integer_conv2d,
    ) -> None:
        super().__init__()
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(f"只支持以数字给出的补零，实为 {conv.padding} {conv.padding_mode}")
        terms = conv.weight[0].numel()
        if terms >= 2**15:  # |Σ q_w (q_x - z_x)| < 2^15·2^15 = 2^30，再加偏置的 2^30
            raise ValueError(f"每个输出求和 {terms} 项，int32 可能溢出：应少于 {2**15} 项")
        self.padding = [p for p in reversed(conv.padding) for _ in range(2)]
        self.stride, self.dilation, self.groups = conv.stride, conv.dilation, conv.groups
        self.convolve = convolve
        self.low, self.high = grid.low, grid.high
        weight = conv.weight.detach()
        bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach()
        # 权重极小而偏置不小的通道（γ≈0 的 BatchNorm 折出来的）：q_b 会超出 int32，把刻度放宽
        weights = symmetric_grid(weight, bits, per_channel, bias.abs() / (2**30 * grid.scale))
        q_weight = quantize_tensor(weight, weights)
        scale = weights.scale.flatten().expand(len(weight)) * grid.scale  # s_w s_x, (O,)
        q_bias = torch.round(bias.double() / scale)
        shift = q_weight.flatten(1).sum(dim=1) * grid.zero_point  # z_x Σ q_w
        self.register_buffer("weight", q_weight)
        self.register_buffer("bias", (q_bias - shift).int())
        self.register_buffer("scale", scale.clone())
        self.register_buffer("input_scale", grid.scale.clone())
        self.register_buffer("input_zero_point", grid.zero_point.clone())

    @property
    def input_grid(self) -> Grid:
        """输入的格点。"""
        return Grid(self.input_scale, self.input_zero_point, self.low, self.high)

    def accumulate(self, q: Tensor) -> Tensor:
        """补好边的 int8 输入 -> int32 累加和（含偏置与零点的修正）。"""
        acc = self.convolve(q, self.weight, self.stride, self.dilation, self.groups)
        return acc + self.bias[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        # 先补零再量化：补上的零于是成为「0 的编号」z_x，而不是编号 0
        q = quantize_tensor(F.pad(x, self.padding), self.input_grid)
        return self.accumulate(q) * self.scale[:, None, None]

    def forward_integer(self, q: Tensor, output: Grid) -> Tensor:
        """int8 进、int8 出，一个浮点数也不碰；``output`` 从 0 起则顺带做了 ReLU。

        乘数 ``s_w s_x / s_y`` 只与权重有关，芯片上事先算好。
        """
        multiplier, shift = fixed_point(self.scale[:, None, None] / output.scale)
        q = F.pad(q, self.padding, value=self.input_zero_point.item())
        return requantize(self.accumulate(q), multiplier, shift, output)


class QuantLinear(QuantConv2d):
    """int8 权重的全连接，``(..., C) -> (..., O)``：就是 1×1 图像上的 1×1 卷积。"""

    def __init__(
        self,
        linear: nn.Linear,
        grid: Grid,
        bits: int = 8,
        per_channel: bool = True,
        convolve: Convolve = integer_conv2d,
    ) -> None:
        conv = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=linear.bias is not None)
        conv.weight = nn.Parameter(linear.weight.detach()[:, :, None, None])
        conv.bias = linear.bias
        super().__init__(conv, grid, bits, per_channel, convolve)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x.reshape(-1, x.shape[-1], 1, 1))
        return out.reshape(*x.shape[:-1], -1)


# ---------------------------------------------------------------- 整个网络

QUANTIZED: dict[type[nn.Module], type[QuantConv2d]] = {
    nn.Conv2d: QuantConv2d,
    nn.Linear: QuantLinear,
}


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Observer]:
    """以若干批图像观察每个卷积与全连接的输入，返回 名字 -> ``Observer``。

    ``model`` 应在 eval 模式。校准一次，可以用于各种位数、各种定范围的办法。
    """
    observers, hooks = {}, []
    for name, layer in model.named_modules():
        if type(layer) in QUANTIZED:
            observer = observers[name] = Observer()
            hooks.append(
                layer.register_forward_pre_hook(lambda _, x, observer=observer: observer.update(*x))
            )
    try:
        for x in batches:
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return observers


def quantize(
    model: nn.Module,
    observers: Mapping[str, Observer],
    weight_bits: int = 8,
    activation_bits: int = 8,
    per_channel: bool = True,
    method: str = "mse",
    convolve: Convolve = integer_conv2d,
) -> nn.Module:
    """把全部卷积与全连接换成 int8 的，返回新的网络；``model`` 不变，应已折叠、在 eval 模式。

    参数:
        observers: ``calibrate`` 的结果。
        per_channel: 权重的刻度是否逐通道；激活总是逐张量（逐通道就提不出求和号了）。
        method: 激活的范围怎样定，见 ``Observer.grid``。

    异常:
        ValueError: 有的层没有校准过，或位数、``method`` 不对。
    """
    copied = copy.deepcopy(model)
    replacement: dict[nn.Module, nn.Module] = {}
    for name, layer in copied.named_modules():
        if type(layer) in QUANTIZED:
            if name not in observers:
                raise ValueError(f"{name} 没有校准过：请用同一个网络校准")
            grid = observers[name].grid(method, activation_bits)
            kind = QUANTIZED[type(layer)]
            replacement[layer] = kind(layer, grid, weight_bits, per_channel, convolve)
    return replace_modules(copied, replacement).eval()
