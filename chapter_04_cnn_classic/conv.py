"""二维卷积的三种写法，以及不靠 autograd 推出的反向传播。

- ``conv2d_naive``：照着公式的六重循环，是其余两种的参照。
- ``conv2d_im2col``：把每个窗口摊成一列，卷积变成一次矩阵乘法；反向由手推的 ``col2im`` 完成。
- ``conv2d_fft``：频域里逐点相乘；核越大越划算。

三种都支持步幅、填充（含 ``"same"``）、空洞与分组，都不调用 ``F.conv*`` 或 ``F.unfold``，
数值与 ``F.conv2d`` 相同。转置卷积见 ``conv_transpose.py``，模块见 ``layers.py``。

深度学习里所说的卷积其实是互相关（cross-correlation）：核不翻转。数学意义上的卷积见
``true_conv2d``。

不处理：一维与三维、``padding_mode`` 不是零填充的情形、二阶导数（im2col 一种）。

维度约定：``B`` 批量，``C`` 输入通道，``O`` 输出通道，``G`` 组数，``H W`` 输入高宽，
``P Q`` 输出高宽，``R S`` 核的高宽，``K = (C/G)·R·S`` 一个窗口的元素数，``L = P·Q`` 窗口数。

参考: LeCun et al., 1998, Gradient-Based Learning Applied to Document Recognition；
Chellapilla et al., 2006, High Performance Convolutional Neural Networks for Document Processing
（im2col）；Mathieu et al., 2013, arXiv:1312.5851（FFT）；Dumoulin 与 Visin, 2016,
arXiv:1603.07285（尺寸公式）。README「卷积的三种写法」「反向传播」。
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Size = int | tuple[int, int]

# ---------------------------------------------------------------- 几何：尺寸、步幅、填充


def as_pair(value: Size, name: str, at_least: int = 1) -> tuple[int, int]:
    """``3`` -> ``(3, 3)``；不是整数、个数不对或太小则报错。"""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, int) and v >= at_least for v in pair):
        raise ValueError(f"{name}={value!r} 应为一个或两个不小于 {at_least} 的整数")
    return pair


class Geometry(NamedTuple):
    """一次卷积的几何，各项都是 (竖直, 水平)。

    ``pads`` 为 (左, 右, 上, 下)，与 ``F.pad`` 的次序相同；核是偶数时 ``"same"`` 的两侧不相等。
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pads: tuple[int, int, int, int]
    groups: int = 1

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """``P = ⌊(H + 上 + 下 − d(R−1) − 1) / s⌋ + 1``，宽同理。

        异常:
            ValueError: 加上填充之后仍放不下一个核。
        """
        left, right, top, bottom = self.pads
        sizes = []
        for size, pad, kernel, stride, dilation in zip(
            (height, width),
            (top + bottom, left + right),
            self.kernel,
            self.stride,
            self.dilation,
            strict=True,
        ):
            reach = dilation * (kernel - 1) + 1  # 核张开之后覆盖的长度
            if size + pad < reach:
                raise ValueError(
                    f"输入 {height}×{width} 加上填充 {pad} 仍放不下张开后长 {reach} 的核："
                    "请用更大的图、更小的核，或增大 padding"
                )
            sizes.append((size + pad - reach) // stride + 1)
        return sizes[0], sizes[1]


def make_geometry(
    kernel: tuple[int, int],
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Geometry:
    """检查并展开 ``F.conv2d`` 的参数；``padding`` 可为 ``"same"``（步幅须为 1）或 ``"valid"``。"""
    kernel = as_pair(kernel, "核的高宽")
    stride, dilation = as_pair(stride, "stride"), as_pair(dilation, "dilation")
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f'padding="same" 只用于步幅 1，实为 {stride}')
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        # 总量为奇数时，多的一个放在右（下）侧
        pads = (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2)
    elif padding == "valid":
        pads = (0, 0, 0, 0)
    elif isinstance(padding, str):
        raise ValueError(f'padding={padding!r} 应为整数、"same" 或 "valid"')
    else:
        vertical, horizontal = as_pair(padding, "padding", at_least=0)
        pads = (horizontal, horizontal, vertical, vertical)
    return Geometry(kernel, stride, dilation, pads, groups)


def check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    """输入 ``(B, C, H, W)`` 与核 ``(O, C/G, R, S)`` 是否相配。"""
    if x.ndim != 4 or weight.ndim != 4:
        raise ValueError(
            f"输入应为 (B, C, H, W)，核应为 (O, C/G, R, S)，实为 {tuple(x.shape)} 与 "
            f"{tuple(weight.shape)}"
        )
    if groups < 1 or weight.shape[0] % groups or x.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"通道不相配：输入有 {x.shape[1]} 个，核 {tuple(weight.shape)} 分 {groups} 组，"
            f"应有 {weight.shape[1] * max(groups, 1)} 个，且输出通道数须被组数整除"
        )
    check_bias(bias, weight.shape[0])


def check_bias(bias: Tensor | None, channels: int) -> None:
    """``bias`` 应为 ``(channels,)``；长为 1 时若不查，会被悄悄广播到各通道。"""
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias 应为 ({channels},)，实为 {tuple(bias.shape)}")


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """每个输出通道加上自己的偏置；``None`` 则原样返回。"""
    return y if bias is None else y + bias.view(1, -1, 1, 1)


# ---------------------------------------------------------------- 一、六重循环


def conv2d_naive(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """照公式写的卷积：``y[o,p,q] = b[o] + Σ_c Σ_u Σ_v w[o,c,u,v] · x[c, p·s + u·d, q·s + v·d]``。

    ``s`` 是步幅，``d`` 是空洞率（竖直与水平可以不同），``x`` 已填充，``c`` 只取同一组的通道。

    参数:
        x: ``(B, C, H, W)``。
        weight: ``(O, C/G, R, S)``。
        bias: ``(O,)``。
        stride, padding, dilation, groups: 同 ``F.conv2d``。

    返回:
        ``(B, O, P, Q)``。乘加 ``B·O·P·Q·K`` 次，与另两种相同，但一次只算每个样本的一项，
        小题上也慢百倍以上。
    """
    check_shapes(x, weight, bias, groups)
    geometry = make_geometry(tuple(weight.shape[2:]), stride, padding, dilation, groups)
    height, width = geometry.output_size(*x.shape[2:])
    (step_h, step_w), (gap_h, gap_w) = geometry.stride, geometry.dilation
    channels_out, channels_in, rows, columns = weight.shape
    x = F.pad(x, geometry.pads)
    y = x.new_zeros(len(x), channels_out, height, width)
    for o in range(channels_out):
        first = o // (channels_out // groups) * channels_in  # 这一组的第一个输入通道
        for p in range(height):
            for q in range(width):
                for c in range(channels_in):
                    for u in range(rows):
                        for v in range(columns):
                            pixel = x[:, first + c, p * step_h + u * gap_h, q * step_w + v * gap_w]
                            y[:, o, p, q] += weight[o, c, u, v] * pixel
    return add_bias(y, bias)


# ---------------------------------------------------------------- 二、im2col


def im2col(padded: Tensor, geometry: Geometry, size: tuple[int, int]) -> Tensor:
    """把每个窗口摊成一列，``(B, C, H', W') -> (B, G, K, L)``。

    靠改步长（``as_strided``）得到六维的窗口视图，不复制；最后的 ``reshape`` 才真正搬运一次，
    步幅 1 时把每个像素抄写约 ``R·S`` 份：这是用内存换一次大矩阵乘法。

    参数:
        padded: 已填充的输入。
        geometry: 卷积的几何。
        size: 输出的 ``(P, Q)``。
    """
    (rows, columns), (step_h, step_w), (gap_h, gap_w) = geometry[:3]
    batch, channels = padded.shape[:2]
    s_b, s_c, s_h, s_w = padded.stride()
    windows = padded.as_strided(
        (batch, channels, rows, columns, *size),
        (s_b, s_c, s_h * gap_h, s_w * gap_w, s_h * step_h, s_w * step_w),
    )
    return windows.reshape(batch, geometry.groups, -1, size[0] * size[1])


def col2im(columns: Tensor, geometry: Geometry, padded: Tensor) -> None:
    """``im2col`` 的转置：每一列的 ``K`` 个数加回它们在图上的位置，重叠处相加。

    参数:
        columns: ``(B, C, R, S, P, Q)``。
        geometry: 卷积的几何。
        padded: ``(B, C, H', W')``，就地累加。
    """
    (rows, cols), (step_h, step_w), (gap_h, gap_w) = geometry[:3]
    height, width = columns.shape[-2:]
    for r, s in product(range(rows), range(cols)):  # 同一个 (r, s) 的各窗口互不重叠，可整片相加
        top, left = r * gap_h, s * gap_w
        bottom, right = top + step_h * (height - 1) + 1, left + step_w * (width - 1) + 1
        padded[:, :, top:bottom:step_h, left:right:step_w] += columns[:, :, r, s]


CHUNK_BYTES = 2**21  # 一块的列矩阵约 2 MiB：留在二级缓存里，比一次摊开整批快（改大这个数便知）


def _chunks(x: Tensor, geometry: Geometry, size: tuple[int, int]) -> list[slice]:
    """把一批样本切成若干块，使每块的列矩阵不超过 ``CHUNK_BYTES``。"""
    area = geometry.kernel[0] * geometry.kernel[1] * size[0] * size[1]
    each = max(1, CHUNK_BYTES // max(1, x.shape[1] * area * x.element_size()))
    return [slice(start, start + each) for start in range(0, len(x), each)]


def conv_forward(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """``y = w · im2col(x)``，``(B, C, H, W) -> (B, O, P, Q)``。"""
    size = geometry.output_size(*x.shape[2:])
    padded = F.pad(x, geometry.pads)
    kernel = weight.reshape(geometry.groups, -1, weight[0].numel())  # (G, O/G, K)
    y = x.new_empty(len(x), len(weight), *size)
    for part in _chunks(x, geometry, size):
        y[part] = (kernel @ im2col(padded[part], geometry, size)).view_as(y[part])
    return y


def conv_grad_input(
    grad: Tensor, weight: Tensor, geometry: Geometry, size: tuple[int, int]
) -> Tensor:
    """``∂L/∂x = col2im(wᵀ · ∂L/∂y)``，``(B, O, P, Q) -> (B, C, H, W)``；``size`` 为 ``(H, W)``。"""
    groups, channels = geometry.groups, weight.shape[1] * geometry.groups
    left, right, top, bottom = geometry.pads
    height, width = size
    padded = grad.new_zeros(len(grad), channels, height + top + bottom, width + left + right)
    transposed = weight.reshape(groups, -1, weight[0].numel()).transpose(1, 2)  # (G, K, O/G)
    for part in _chunks(padded, geometry, tuple(grad.shape[2:])):
        rows = grad[part].flatten(2).unflatten(1, (groups, -1))  # (b, G, O/G, L)
        columns = (transposed @ rows).view(-1, channels, *geometry.kernel, *grad.shape[2:])
        col2im(columns, geometry, padded[part])
    return padded[:, :, top : top + height, left : left + width]


def conv_grad_weight(x: Tensor, grad: Tensor, geometry: Geometry) -> Tensor:
    """``∂L/∂w = Σ_b ∂L/∂y · im2col(x)ᵀ``，返回 ``(O, C/G, R, S)``。"""
    groups, size = geometry.groups, tuple(grad.shape[2:])
    padded = F.pad(x, geometry.pads)
    per_group = grad.shape[1] // groups, x.shape[1] // groups * math.prod(geometry.kernel)
    total = grad.new_zeros(groups, *per_group)  # (G, O/G, K)；批量为 0 时梯度就是零
    for part in _chunks(x, geometry, size):
        rows = grad[part].flatten(2).unflatten(1, (groups, -1))  # (b, G, O/G, L)
        columns = im2col(padded[part], geometry, size)  # (b, G, K, L)：重算比存着省 R·S 倍内存
        total += (rows @ columns.transpose(2, 3)).sum(dim=0)
    return total.view(grad.shape[1], -1, *geometry.kernel)


class _Conv2d(torch.autograd.Function):
    """im2col 卷积；反向是上面两个手推的公式。"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return conv_forward(x, weight, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        size = tuple(x.shape[2:])
        grad = grad.contiguous()
        gx = conv_grad_input(grad, weight, ctx.geometry, size) if need_x else None
        gw = conv_grad_weight(x, grad, ctx.geometry) if need_weight else None
        return gx, gw, None


def conv2d_im2col(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """im2col 加矩阵乘法的卷积，参数与返回同 ``conv2d_naive``。

    前向乘加 ``B·O·L·K`` 次，反向两倍于此；列矩阵按块生成，至多占用约 2 MiB 或一个样本的大小。

    参考: Chellapilla et al., 2006。
    """
    check_shapes(x, weight, bias, groups)
    geometry = make_geometry(tuple(weight.shape[2:]), stride, padding, dilation, groups)
    return add_bias(_Conv2d.apply(x, weight, geometry), bias)


# ---------------------------------------------------------------- 三、FFT


def conv2d_fft(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """频域里的卷积：``y = F⁻¹( F(x) · conj F(w) )``，参数与返回同 ``conv2d_naive``。

    互相关对应核的频谱取共轭（卷积定理里没有共轭）。循环的部分落在最后 ``d(R−1)`` 行与
    ``d(S−1)`` 列，切去即可，不必再补零。乘法次数与核的大小无关，但步幅大于 1 时仍要算出全部位置，
    小核下不如 im2col。

    参考: Mathieu et al., 2013, arXiv:1312.5851。
    """
    check_shapes(x, weight, bias, groups)
    geometry = make_geometry(tuple(weight.shape[2:]), stride, padding, dilation, groups)
    height, width = geometry.output_size(*x.shape[2:])
    padded = F.pad(x, geometry.pads)
    size = padded.shape[2:]
    gap_h, gap_w = geometry.dilation
    spread = weight.new_zeros(  # 核按空洞率张开，中间是零
        *weight.shape[:2], gap_h * (weight.shape[2] - 1) + 1, gap_w * (weight.shape[3] - 1) + 1
    )
    spread[:, :, ::gap_h, ::gap_w] = weight
    x_freq = torch.fft.rfft2(padded).unflatten(1, (groups, -1))  # (B, G, C/G, H', W'/2+1)
    w_freq = torch.fft.rfft2(spread, s=tuple(size)).unflatten(0, (groups, -1)).conj()
    y_freq = torch.einsum("bgchw,gochw->bgohw", x_freq, w_freq).flatten(1, 2)
    y = torch.fft.irfft2(y_freq, s=tuple(size))
    step_h, step_w = geometry.stride
    y = y[:, :, : step_h * (height - 1) + 1 : step_h, : step_w * (width - 1) + 1 : step_w]
    return add_bias(y.contiguous(), bias)


def true_conv2d(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """数学意义上的卷积：先把核转 180°，再作互相关。满足交换律与结合律；互相关不满足。"""
    return conv2d_im2col(x, weight.flip(-2, -1), **options)
