"""归一化的数学：前向与手推的反向，都是纯函数。

本文件教什么：BatchNorm、LayerNorm、InstanceNorm、GroupNorm 是同一个公式
``γ (x − μ)/√(σ² + ε) + β``，差别只在 ``μ``、``σ²`` 对哪些维求；它们的反向也是同一个公式。
不涉及：参数、滑动统计量、训练与推理的切换（``normalization.py``），半精度输入时以 float32 累加。
对应 normalization.md。

维度约定：``B`` 批大小，``C`` 通道数，``L`` 序列长度，``H, W`` 图像的高与宽，``G`` 组数，
``O, I`` 权重的输出与输入宽度，``n`` 共用一份统计量的元素个数。
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# ---------------------------------------------------------------- 共同的三步


def moments(x: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``μ = mean(x)``，``σ² = mean((x − μ)²)``（有偏，除以 n），保留被求和的维。

    两遍算法：先减均值再平方。``mean(x²) − μ²`` 只要一遍，但均值远大于标准差时，两个大数相减，
    有效数字全部丢光，甚至得到负的方差。
    """
    dims = tuple(dims)
    mean = x.mean(dims, keepdim=True)
    return mean, (x - mean).square().mean(dims, keepdim=True)


def normalize(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """``x̂ = (x − μ) / √(σ² + ε)``。"""
    return (x - mean) * (var + eps).rsqrt()


def scale_and_shift(x_hat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``y = γ x̂ + β``；``weight``、``bias`` 的形状须能广播到 ``x̂``，``None`` 表示没有。"""
    y = x_hat if weight is None else x_hat * weight
    return y if bias is None else y + bias


def per_channel(values: Tensor | None, spatial_dims: int) -> Tensor | None:
    """``(C,) -> (C, 1, ..., 1)``，与 ``(B, C, 空间维...)`` 对齐。"""
    return None if values is None else values.view(-1, *[1] * spatial_dims)


# ---------------------------------------------------------------- 前向


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """每个通道在批与全部空间位置上的均值与有偏方差：``(B, C, ...) -> (C,), (C,)``。"""
    mean, var = moments(x, (0, *range(2, x.ndim)))
    return mean.flatten(), var.flatten()


def batch_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """批归一化：每个通道用一份 ``μ_c, σ_c²``。

    训练时 ``mean, var`` 来自 ``batch_statistics(x)``，它们是 ``x`` 的函数，梯度要经过它们；
    推理时是存下来的常数，整层退化为每个通道一个线性函数。

    参数:
        x: ``(B, C, ...)``。
        mean, var: ``μ, σ²``，各为 ``(C,)``。
        weight, bias: ``γ, β``，各为 ``(C,)``。
        eps: 加在方差上的 ``ε``。

    返回:
        形状同 ``x``。

    参考: Ioffe, Szegedy, 2015, arXiv:1502.03167, 算法 1 与 2。
    """
    mean, var, weight, bias = (per_channel(v, x.ndim - 2) for v in (mean, var, weight, bias))
    return scale_and_shift(normalize(x, mean, var, eps), weight, bias)


def instance_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """实例归一化：每个样本的每个通道各用自己的 ``μ_bc, σ_bc²``，只对空间维求。

    ``x`` 为 ``(B, C, ...)``，``weight, bias`` 为 ``(C,)``。

    参考: Ulyanov, Vedaldi, Lempitsky, 2016, arXiv:1607.08022。
    """
    spatial = x.ndim - 2
    x_hat = normalize(x, *moments(x, range(2, x.ndim)), eps)
    return scale_and_shift(x_hat, per_channel(weight, spatial), per_channel(bias, spatial))


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """组归一化：通道分成 ``G`` 组，每个样本的每组共用一份统计量。

    ``G = 1`` 时统计范围与 ``LayerNorm((C, ...))`` 相同，``G = C`` 时就是 InstanceNorm。
    ``x`` 为 ``(B, C, ...)``，``weight, bias`` 为 ``(C,)``。

    参考: Wu, He, 2018, arXiv:1803.08494, 式 (7)。
    """
    grouped = x.unflatten(1, (num_groups, -1))  # (B, C, ...) -> (B, G, C/G, ...)
    x_hat = normalize(grouped, *moments(grouped, range(2, grouped.ndim)), eps).flatten(1, 2)
    spatial = x.ndim - 2
    return scale_and_shift(x_hat, per_channel(weight, spatial), per_channel(bias, spatial))


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """层归一化：每个样本（每个词元）对自己末尾的 ``normalized_shape`` 各维求统计量。

    ``x`` 为 ``(..., *normalized_shape)``，``weight, bias`` 为 ``normalized_shape``。

    参考: Ba, Kiros, Hinton, 2016, arXiv:1607.06450, 式 (3)。
    """
    dims = range(-len(normalized_shape), 0)
    return scale_and_shift(normalize(x, *moments(x, dims), eps), weight, bias)


def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """``γ x / √(mean(x²) + ε)``：LayerNorm 去掉减均值与 ``β``。

    ``eps`` 缺省为 ``x`` 的数据类型的机器精度，与 ``nn.RMSNorm`` 相同。

    参考: Zhang, Sennrich, 2019, arXiv:1910.07467, 式 (4)。
    """
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    dims = tuple(range(-len(normalized_shape), 0))
    mean_square = x.square().mean(dims, keepdim=True)
    return scale_and_shift(x * (mean_square + eps).rsqrt(), weight, None)


def dynamic_tanh(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``γ tanh(α x) + β``：不求任何统计量，只把大数压扁；``α`` 是标量，``γ, β`` 为 ``(C,)``。

    参考: Zhu, Chen, He, LeCun, Liu, 2025, arXiv:2503.10622, 式 (1)。
    """
    return scale_and_shift((alpha * x).tanh(), weight, bias)


def standardize_weight(weight: Tensor, eps: float = 1e-5) -> Tensor:
    """权重标准化 ``Ŵ_o = (W_o − μ_o) / √(σ_o² + ε)``，每个输出单元对自己的全部输入权重求。

    ``weight`` 为 ``(O, I)`` 或 ``(O, I, kH, kW)``。``ε`` 放在根号之内，与其余归一化一致；作者的
    代码用无偏的标准差，``ε`` 加在标准差上。

    参考: Qiao, Wang, Liu, Shen, Yuille, 2019, arXiv:1903.10520。
    """
    return normalize(weight, *moments(weight, range(1, weight.ndim)), eps)


# ---------------------------------------------------------------- 手推的反向


def normalize_backward(g_hat: Tensor, x: Tensor, dims: Sequence[int], eps: float) -> Tensor:
    """由 ``ĝ = ∂ℓ/∂x̂`` 求 ``∂ℓ/∂x``，其中 ``x̂ = (x − μ)/s``，``s = √(σ² + ε)``，均由 ``x`` 算出。

    ``∂ℓ/∂x = (ĝ − mean(ĝ) − x̂ mean(ĝ x̂)) / s``：从 ``ĝ`` 中减去两项，一项是经 ``μ`` 流回的
    梯度，一项是经 ``σ²`` 流回的。``mean`` 与 ``μ``、``σ²`` 对同样的 ``dims`` 求。
    """
    mean, var = moments(x, dims)
    x_hat = normalize(x, mean, var, eps)
    through_mean = g_hat.mean(dims, keepdim=True)
    through_var = x_hat * (g_hat * x_hat).mean(dims, keepdim=True)
    return (g_hat - through_mean - through_var) * (var + eps).rsqrt()


def batch_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """训练时 BatchNorm 的反向：由 ``g = ∂ℓ/∂y`` 求 ``(∂ℓ/∂x, ∂ℓ/∂γ, ∂ℓ/∂β)``。

    ``∂ℓ/∂β = Σ g``，``∂ℓ/∂γ = Σ g x̂``，对批与空间求和；``ĝ = γ g``，
    ``∂ℓ/∂x = (ĝ − mean(ĝ) − x̂ mean(ĝ x̂)) / s``，对批与空间取平均。

    参数:
        grad: ``(B, C, ...)``，2、3、4 维均可。
        x: 前向的输入，形状同 ``grad``。
        weight: ``γ``，``(C,)``。
        eps: 前向所用的 ``ε``。

    返回:
        形状分别同 ``x``、``(C,)``、``(C,)``。

    参考: Ioffe, Szegedy, 2015, arXiv:1502.03167, 第 3 节。
    """
    dims = (0, *range(2, x.ndim))
    x_hat = normalize(x, *moments(x, dims), eps)
    gx = normalize_backward(grad * per_channel(weight, x.ndim - 2), x, dims, eps)
    return gx, (grad * x_hat).sum(dims), grad.sum(dims)


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm 的反向：与 BatchNorm 同一个公式，取平均的维换成末尾各维，求和的维换成其余各维。

    参数:
        grad: ``(..., *normalized_shape)``。
        x: 前向的输入，形状同 ``grad``。
        weight: ``γ``，形状 ``normalized_shape``。
        eps: 前向所用的 ``ε``。

    返回:
        ``(∂ℓ/∂x, ∂ℓ/∂γ, ∂ℓ/∂β)``，形状分别同 ``x``、``weight``、``weight``。
    """
    dims = tuple(range(-weight.ndim, 0))
    x_hat = normalize(x, *moments(x, dims), eps)
    gx = normalize_backward(grad * weight, x, dims, eps)
    rows = -1, *weight.shape  # 前导各维合成一维再求和；没有前导维时它是 1
    return gx, (grad * x_hat).reshape(rows).sum(dim=0), grad.reshape(rows).sum(dim=0)
