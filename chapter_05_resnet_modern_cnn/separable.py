"""深度可分离卷积的代数：省多少乘加，等于怎样的普通卷积，一个普通的核又能被它逼近到什么程度。

    逐深度:  u_mj = D_mj ⋆ x_m          每个输入通道 m 有 r 个滤波器，j = 1..r
    1×1:     y_n = Σ_mj P_nmj u_mj
    合成:    y_n = Σ_m K_nm ⋆ x_m        K_nm = Σ_j P_nmj D_mj

固定输入通道 m，把 N 个核 ``K_nm`` 摊成 ``N × k²`` 的矩阵：最后一式说它的秩不超过 r。
因此最好的逼近就是逐输入通道的截断奇异值分解，r = min(N, k²) 时没有误差。

不处理: 逐深度卷积与 1×1 之间的 BatchNorm 与激活；中间有激活时，合成不再成立。

维度约定：M 个输入通道，N 个输出通道，核 k×k，输出 P×Q。

参考: Howard et al., 2017, MobileNets, arXiv:1704.04861，第 3.1 节；
Eckart, Young, 1936, The approximation of one matrix by another of lower rank, Psychometrika 1。
页面 efficient.md「深度可分离卷积」。
"""

from __future__ import annotations

import torch
from torch import Tensor

# ---------------------------------------------------------------- 乘加


def conv_macs(kernel: int, in_channels: int, out_channels: int, height: int, width: int) -> int:
    """普通卷积的乘加 ``k² M N P Q``；``height, width`` 是输出的大小。"""
    return kernel**2 * in_channels * out_channels * height * width


def separable_macs(
    kernel: int,
    in_channels: int,
    out_channels: int,
    height: int,
    width: int,
    multiplier: int = 1,
) -> int:
    """深度可分离卷积的乘加 ``r M (k² + N) P Q``，r 即 ``multiplier``。"""
    return multiplier * in_channels * (kernel**2 + out_channels) * height * width


def cost_ratio(kernel: int, out_channels: int, multiplier: int = 1) -> float:
    """两者之比 ``r (1/N + 1/k²)``：与输入通道数、图的大小无关。"""
    return multiplier * (1 / out_channels + 1 / kernel**2)


# ---------------------------------------------------------------- 合成与分解


def compose_kernel(depthwise: Tensor, pointwise: Tensor, in_channels: int) -> Tensor:
    """与「先逐深度、再 1×1」相等的普通卷积核 ``K_nm = Σ_j P_nmj D_mj``。

    参数:
        depthwise: ``(M·r, 1, k, k)``，同一输入通道的 r 个相邻，与 ``groups=M`` 的卷积相同。
        pointwise: ``(N, M·r, 1, 1)``。
        in_channels: M。

    返回:
        ``(N, M, k, k)``。

    异常:
        ValueError: 两个形状不相配。
    """
    filters = depthwise.shape[0]
    if filters % in_channels or pointwise.shape[1] != filters:
        raise ValueError(
            f"逐深度的核应有 M 的整数倍个，1×1 的输入通道数与之相等；M={in_channels}，"
            f"实为 {tuple(depthwise.shape)} 与 {tuple(pointwise.shape)}"
        )
    banks = depthwise.reshape(in_channels, -1, *depthwise.shape[2:])  # (M, r, k, k)
    mixing = pointwise.reshape(pointwise.shape[0], in_channels, -1)  # (N, M, r)
    return torch.einsum("nmj,mjab->nmab", mixing, banks)


def _spectra(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """每个输入通道的 ``N × k²`` 矩阵的奇异值分解：``(M, N, s)``、``(M, s)``、``(M, s, k²)``。"""
    return torch.linalg.svd(weight.flatten(2).transpose(0, 1), full_matrices=False)


def factorize_kernel(weight: Tensor, multiplier: int = 1) -> tuple[Tensor, Tensor]:
    """普通卷积核的最佳（平方误差最小）深度可分离逼近，``compose_kernel`` 的逆。

    误差的平方是逐通道丢掉的奇异值的平方和 ``Σ_m Σ_{j>r} σ²_mj``。

    参数:
        weight: ``(N, M, k, k)``。
        multiplier: 每个输入通道的滤波器数 r，1 到 ``min(N, k²)``。

    返回:
        (逐深度 ``(M·r, 1, k, k)``, 1×1 ``(N, M·r, 1, 1)``)。

    异常:
        ValueError: ``multiplier`` 越界。
    """
    out_channels, in_channels, kernel, _ = weight.shape
    most = min(out_channels, kernel**2)
    if not 1 <= multiplier <= most:
        raise ValueError(f"multiplier={multiplier} 应在 1 到 min(N, k²) = {most} 之间")
    left, values, right = _spectra(weight)
    mixing = left[..., :multiplier] * values[:, None, :multiplier]  # (M, N, r)
    depthwise = right[:, :multiplier].reshape(-1, 1, kernel, kernel)
    pointwise = mixing.transpose(0, 1).reshape(out_channels, in_channels * multiplier, 1, 1)
    return depthwise, pointwise


def rank_energy(weight: Tensor) -> Tensor:
    """前 r = 1, 2, ... 个奇异值占 ``‖K‖²`` 的份额，``(N, M, k, k) -> (min(N, k²),)``。"""
    energy = _spectra(weight)[1].square().sum(dim=0)
    return energy.cumsum(0) / energy.sum()
