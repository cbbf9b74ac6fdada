"""归一化的模块：BatchNorm、InstanceNorm、GroupNorm、LayerNorm、RMSNorm，以及 DyT 与权重标准化。

本文件教什么：数学都在 ``normalization_functions.py``，这里只有状态：``γ, β``，BatchNorm 为推理
另存的滑动统计量，训练与推理的切换。名字、参数与 ``state_dict`` 同 ``torch.nn``，可以互相装载。
不涉及：``device``、``dtype`` 等构造参数（请用 ``.to()``），多进程同步统计量（SyncBatchNorm）。
对应 normalization.md。

维度约定：``B`` 批大小，``C`` 通道数，``L`` 序列长度，``H, W`` 图像的高与宽。
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from chapter_02_nn_basics_mlp.layers import Linear, linear
from chapter_03_optimization_regularization.normalization_functions import (
    batch_norm,
    batch_statistics,
    dynamic_tanh,
    group_norm,
    instance_norm,
    layer_norm,
    moments,
    rms_norm,
    standardize_weight,
)

# ---------------------------------------------------------------- BatchNorm 与 InstanceNorm


class _ChannelNorm(nn.Module):
    """``(C,)`` 的 ``γ, β`` 与滑动统计量，由 BatchNorm 与 InstanceNorm 共用。

    参数:
        num_features: 通道数 ``C``。
        eps: 加在方差上的 ``ε``。
        momentum: 新统计量所占的份额 ``m``：``r ← (1 − m) r + m s``；注意它与优化器的动量相反。
        affine: 是否有 ``γ, β``。
        track_running_stats: 是否记滑动统计量；不记时推理也用当前输入的统计量。
    """

    spatial_dims: tuple[int, ...]  # 子类允许的空间维数

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        zeros, ones, count = torch.zeros(num_features), torch.ones(num_features), torch.tensor(0)
        for name, start in [
            ("running_mean", zeros),
            ("running_var", ones),
            ("num_batches_tracked", count),
        ]:
            self.register_buffer(name, start if track_running_stats else None)

    def reset_running_stats(self) -> None:
        """滑动统计量回到初值：均值 0，方差 1，步数 0。"""
        if self.running_mean is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def _check(self, x: Tensor, spatial_dims: Sequence[int], channel_dim: int) -> None:
        if x.ndim - 2 not in spatial_dims:
            allowed = " 或 ".join(str(d + 2) for d in spatial_dims)
            raise ValueError(
                f"{type(self).__name__} 的输入应为 {allowed} 维，实为 {x.ndim} 维："
                f"形状 {tuple(x.shape)}"
            )
        if x.shape[channel_dim] != self.num_features:
            raise ValueError(
                f"输入的第 {channel_dim} 维应等于 num_features={self.num_features}，"
                f"实为 {x.shape[channel_dim]}：形状 {tuple(x.shape)}"
            )

    @torch.no_grad()
    def _update_running_stats(self, mean: Tensor, var: Tensor, count: int, factor: float) -> None:
        """``r ← (1 − m) r + m s``；方差先乘 ``n/(n − 1)`` 变成无偏估计。

        参数:
            mean, var: 这一批的均值与有偏方差，各为 ``(C,)``。
            count: 求统计量的元素个数 ``n``。
            factor: ``m``。
        """
        unbiased = var * (count / (count - 1))
        self.running_mean.mul_(1 - factor).add_(factor * mean)
        self.running_var.mul_(1 - factor).add_(factor * unbiased)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.weight is not None}, "
            f"track_running_stats={self.running_mean is not None}"
        )


class _BatchNorm(_ChannelNorm):
    """训练时用这一批的统计量并更新滑动平均，``eval()`` 时用滑动平均。"""

    def forward(self, x: Tensor) -> Tensor:
        self._check(x, self.spatial_dims, channel_dim=1)
        tracked = self.running_mean is not None
        if tracked and not self.training:
            mean, var = self.running_mean, self.running_var
        else:
            count = x.numel() // self.num_features
            if count < 2:
                raise ValueError(
                    f"训练时每个通道应不止一个值，实为 {tuple(x.shape)}（方差恒为零）："
                    "请加大批、丢掉落单的末批，或改用 LayerNorm、GroupNorm"
                )
            mean, var = batch_statistics(x)
            if tracked:
                self.num_batches_tracked += 1
                # momentum=None：第 t 批占 1/t，结果是全部批的简单平均
                steps = self.num_batches_tracked
                factor = 1 / steps.item() if self.momentum is None else self.momentum
                self._update_running_stats(mean, var, count, factor)
        return batch_norm(x, mean, var, self.weight, self.bias, self.eps)


class BatchNorm1d(_BatchNorm):
    """``(B, C)`` 或 ``(B, C, L)`` 的批归一化，与 ``nn.BatchNorm1d`` 相同。"""

    spatial_dims = (0, 1)


class BatchNorm2d(_BatchNorm):
    """``(B, C, H, W)`` 的批归一化，与 ``nn.BatchNorm2d`` 相同。"""

    spatial_dims = (2,)


class _InstanceNorm(_ChannelNorm):
    """缺省没有 ``γ, β``，也不记统计量，训练与推理的运算相同。

    记统计量时存的是各样本统计量的平均；与 torch 相同，``num_batches_tracked`` 不动。
    与 torch 不同：通道数不符一律报错（torch 在 ``affine=False`` 时只警告）。
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)

    def forward(self, x: Tensor) -> Tensor:
        (spatial,) = self.spatial_dims
        self._check(x, (spatial - 1, spatial), channel_dim=x.ndim - spatial - 1)
        if x.ndim == spatial + 1:  # 单个样本，没有批这一维
            return self.forward(x.unsqueeze(0)).squeeze(0)
        tracked = self.running_mean is not None
        if tracked and not self.training:
            running = self.running_mean, self.running_var
            return batch_norm(x, *running, self.weight, self.bias, self.eps)
        count = math.prod(x.shape[2:])
        if count < 2:
            raise ValueError(
                f"每个通道应不止一个空间位置，实为 {tuple(x.shape)}（方差恒为零）："
                "请改用 LayerNorm 或 GroupNorm"
            )
        if tracked:
            mean, var = (s.mean(dim=0).flatten() for s in moments(x, range(2, x.ndim)))
            self._update_running_stats(mean, var, count, self.momentum)
        return instance_norm(x, self.weight, self.bias, self.eps)


class InstanceNorm1d(_InstanceNorm):
    """``(B, C, L)`` 或 ``(C, L)`` 的实例归一化，与 ``nn.InstanceNorm1d`` 相同。"""

    spatial_dims = (1,)


class InstanceNorm2d(_InstanceNorm):
    """``(B, C, H, W)`` 或 ``(C, H, W)`` 的实例归一化，与 ``nn.InstanceNorm2d`` 相同。"""

    spatial_dims = (2,)


# ---------------------------------------------------------------- 与批无关的模块


class GroupNorm(nn.Module):
    """``(B, C, ...)`` 的组归一化，与 ``nn.GroupNorm`` 相同。

    异常:
        ValueError: 通道数不能被组数整除；输入的通道数不符；整个输入每组只有一个数。
    """

    def __init__(
        self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True
    ) -> None:
        super().__init__()
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(
                f"num_channels={num_channels} 应能被 num_groups={num_groups} 整除："
                "请改组数，使每组的通道数是整数"
            )
        self.num_groups, self.num_channels, self.eps = num_groups, num_channels, eps
        self.weight = nn.Parameter(torch.ones(num_channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] != self.num_channels:
            raise ValueError(
                f"输入应为 (B, {self.num_channels}, ...)，实为 {tuple(x.shape)}："
                f"第 1 维应等于 num_channels={self.num_channels}"
            )
        if x.numel() == self.num_groups:
            raise ValueError(
                f"每组应不止一个值，实为 {tuple(x.shape)} 分成 {self.num_groups} 组：请减少组数"
            )
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        affine = self.weight is not None
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={affine}"


class _ShapeNorm(nn.Module):
    """``normalized_shape`` 的检查与 ``γ, β``，由 LayerNorm 与 RMSNorm 共用。"""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None,
        elementwise_affine: bool,
        bias: bool,
    ) -> None:
        super().__init__()
        whole = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
        self.normalized_shape, self.eps = tuple(whole), eps
        if not self.normalized_shape:
            raise ValueError("normalized_shape=() 应至少有一维：请写要归一化的末尾各维，如 (C,)")
        shape, has_bias = self.normalized_shape, elementwise_affine and bias
        self.weight = nn.Parameter(torch.ones(shape)) if elementwise_affine else None
        self.register_parameter("bias", nn.Parameter(torch.zeros(shape)) if has_bias else None)

    def _check(self, x: Tensor) -> None:
        if x.shape[-len(self.normalized_shape) :] != self.normalized_shape:
            wanted = ", ".join(map(str, self.normalized_shape))
            raise ValueError(
                f"normalized_shape={self.normalized_shape} 要求输入为 (*, {wanted})，"
                f"实为 {tuple(x.shape)}：末尾各维应与它相同"
            )

    def extra_repr(self) -> str:
        affine = self.weight is not None
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={affine}"


class LayerNorm(_ShapeNorm):
    """``(..., *normalized_shape)`` 的层归一化，与 ``nn.LayerNorm`` 相同。"""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(_ShapeNorm):
    """``(..., *normalized_shape)`` 的均方根归一化，与 ``nn.RMSNorm`` 相同；没有 ``β``。"""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)


class DyT(nn.Module):
    """``(..., C)`` 的动态 tanh，放在 LayerNorm 的位置上；``α`` 的初值缺省 0.5。"""

    def __init__(self, num_features: int, alpha_init_value: float = 0.5) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), alpha_init_value))
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        return dynamic_tanh(x, self.alpha, self.weight, self.bias)


# ---------------------------------------------------------------- 权重标准化的层


class WSLinear(Linear):
    """全连接层，权重在每次前向时先标准化；参数与 ``Linear`` 相同。"""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, standardize_weight(self.weight), self.bias)


class WSConv2d(nn.Conv2d):
    """卷积层，权重在每次前向时先标准化；参数与 ``nn.Conv2d`` 相同。"""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, standardize_weight(self.weight), self.bias)
