"""正则化：范数惩罚与近端算子、Dropout 与 DropPath、标签平滑、mixup 与 cutmix、梯度裁剪。

本文件教什么：各种正则化落到张量上各是哪几行；随机的几种（丢弃、混合）在期望上等于什么。
不涉及：优化器里的权重衰减（``optimizers.py`` 与 ``optimizers_adam.py``），早停与权重平均
（``averaging.py``）。对应 regularization.md。

与论文的差别：Dropout 用倒置的缩放（训练时除以 1−p），评估时什么也不做；DropPath 逐样本丢弃，
同样倒置缩放；cutmix 的方框按整数像素取，λ 随之改成精确的面积比。

维度约定：``B`` 批大小，``C`` 类别数；图像 ``(B, 通道, H, W)``。
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from chapter_02_nn_basics_mlp.activations import softmax
from chapter_02_nn_basics_mlp.losses import log_sum_exp

# ---------------------------------------------------------------- 范数惩罚


def l1_penalty(params: Iterable[Tensor]) -> Tensor:
    """``Σ|w|``，标量。梯度 ``sign(w)`` 大小恒定，所以能把小权重一路推到 0。"""
    return torch.stack([p.abs().sum() for p in params]).sum()


def l2_penalty(params: Iterable[Tensor]) -> Tensor:
    """``½ Σ w²``，标量。系数 ½ 使梯度恰为 ``w``，与 ``torch.optim`` 的 weight_decay 一致。"""
    return torch.stack([p.square().sum() for p in params]).sum() / 2


def elastic_net_penalty(params: Iterable[Tensor], l1: float, l2: float) -> Tensor:
    """弹性网 ``l1 · Σ|w| + l2 · ½ Σ w²``。

    参考: Zou 与 Hastie, 2005（那里的 L2 项没有 ½）。
    """
    params = list(params)  # 要遍历两次，生成器只能走一次
    return l1 * l1_penalty(params) + l2 * l2_penalty(params)


def soft_threshold(x: Tensor, threshold: float) -> Tensor:
    """软阈值 ``S_t(x) = argmin_w ½(w − x)² + t|w| = sign(x) · max(|x| − t, 0)``。

    推导：目标的次梯度含 0，即 ``x − w ∈ t ∂|w|``。``w > 0`` 时 ``w = x − t``，须 ``x > t``；
    ``w < 0`` 时 ``w = x + t``，须 ``x < −t``；``w = 0`` 时 ``∂|0| = [−1, 1]``，恰是 ``|x| ≤ t``。
    三种情形合起来就是 x 减去它在 ``[−t, t]`` 上的投影，投影等于自身之处得到精确的 0。

    参数:
        x: 任意形状。
        threshold: 阈值 t ≥ 0。

    返回:
        与 ``x`` 同形；与 ``F.softshrink`` 相同。

    异常:
        ValueError: 阈值为负或不是数。
    """
    if not threshold >= 0:
        raise ValueError(f"threshold={threshold} 应不小于 0：它等于 学习率 × L1 系数")
    return x - x.clamp(-threshold, threshold)


@torch.no_grad()
def prox_l1_(params: Iterable[Tensor], threshold: float) -> None:
    """优化器走完一步之后，对每个参数原地取软阈值（近端梯度法，ISTA）。

    ``w ← S_{lr·l1}(w − lr ∇L(w))``：损失的梯度由优化器走，不可导的 ``l1·|w|`` 由近端算子走。
    ``threshold`` 应取 ``lr · l1``。

    参考: Daubechies, Defrise 与 De Mol, 2004, arXiv:math/0307152。
    """
    for p in params:
        p.copy_(soft_threshold(p, threshold))


@torch.no_grad()
def prox_elastic_net_(params: Iterable[Tensor], lr: float, l1: float, l2: float) -> None:
    """弹性网的近端一步，原地：``w ← S_{lr·l1}(w) / (1 + lr·l2)``。

    推导：``argmin_w ½(w − x)² + lr·(l1|w| + l2 w²/2)``。w ≠ 0 时令导数为 0，
    ``w(1 + lr·l2) = x − lr·l1·sign(w)``：先软阈值，再除以 ``1 + lr·l2``；w = 0 的条件与 L1 相同。

    异常:
        ValueError: 有系数为负。
    """
    if not min(lr, l1, l2) >= 0:
        raise ValueError(f"lr={lr}、l1={l1}、l2={l2} 都应不小于 0")
    for p in params:
        p.copy_(soft_threshold(p, lr * l1) / (1 + lr * l2))


# ---------------------------------------------------------------- Dropout 与 DropPath


def _survivors(
    x: Tensor, shape: tuple[int, ...], p: float, generator: torch.Generator | None
) -> Tensor:
    """以概率 1−p 为 ``1/(1−p)``、否则为 0 的掩码；p = 1 时全零，不耗随机数。"""
    mask = torch.empty(shape, dtype=x.dtype, device=x.device)
    if p == 1:
        return mask.zero_()
    return mask.bernoulli_(1 - p, generator=generator).div_(1 - p)


def _check_probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"dropout 概率应在 0 到 1 之间，实为 p={p}：它是丢弃（不是保留）的概率")


def dropout(
    x: Tensor, p: float, training: bool, generator: torch.Generator | None = None
) -> Tensor:
    """倒置的 Dropout ``y = m ⊙ x / (1−p)``，``m ~ Bernoulli(1−p)`` 逐元素独立。

    ``E[y] = x``，``Var[y] = x² p/(1−p)``。训练时就除以 1−p，评估时便是恒等映射。

    参数:
        x: 任意形状，浮点。
        p: 丢弃的概率。
        training: 为假时原样返回。
        generator: 随机数生成器；``None`` 用全局的，那时与 ``F.dropout`` 逐位相同。

    异常:
        ValueError: p 不在 0 到 1 之间。

    参考: Srivastava 等, 2014, JMLR 15。
    """
    _check_probability(p)
    if not training or p == 0:
        return x
    return x * _survivors(x, x.shape, p, generator)


def drop_path(
    x: Tensor, p: float, training: bool, generator: torch.Generator | None = None
) -> Tensor:
    """随机深度：逐样本整个丢弃，``y_b = m_b x_b / (1−p)``，同一样本共用一个掩码。

    用在残差支路上：``h + drop_path(f(h))``，被丢弃的样本这一层就是恒等映射。
    参数同 ``dropout``，``x`` 为 ``(B, ...)``；与 ``torchvision.ops.stochastic_depth(mode="row")``
    相同。

    参考: Huang 等, 2016, arXiv:1603.09382（那里整个批共用一个掩码）。
    """
    _check_probability(p)
    if not training or p == 0:
        return x
    return x * _survivors(x, (x.shape[0],) + (1,) * (x.ndim - 1), p, generator)


class Dropout(nn.Module):
    """``dropout`` 的模块；与 ``nn.Dropout`` 相同，多一个可选的随机数生成器。"""

    def __init__(self, p: float = 0.5, generator: torch.Generator | None = None) -> None:
        super().__init__()
        _check_probability(p)
        self.p, self.generator = p, generator

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training, self.generator)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class DropPath(nn.Module):
    """``drop_path`` 的模块，放在残差支路的末尾。"""

    def __init__(self, p: float, generator: torch.Generator | None = None) -> None:
        super().__init__()
        _check_probability(p)
        self.p, self.generator = p, generator

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.p, self.training, self.generator)

    def extra_repr(self) -> str:
        return f"p={self.p}"


# ---------------------------------------------------------------- 软标签


def soft_cross_entropy(logits: Tensor, probabilities: Tensor) -> Tensor:
    """目标是分布的交叉熵 ``mean_b Σ_j q_j (logsumexp(x) − x_j)``。

    参数:
        logits: ``(B, C)``。
        probabilities: 目标分布 q ``(B, C)``，每行非负、和为 1。
    """
    surprise = log_sum_exp(logits).unsqueeze(-1) - logits  # −log softmax
    return (probabilities * surprise).sum(dim=-1).mean()


def _check_smoothing(smoothing: float) -> None:
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing={smoothing} 应在 0 到 1 之间：它是分给均匀分布的那一份")


def label_smoothing_cross_entropy(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """目标换成 ``q = (1−ε) onehot(t) + ε/C`` 的交叉熵，ε 即 ``smoothing``。

    代入 ``Σ_j q_j (LSE − x_j)``，因 ``Σ q_j = 1``，得 ``LSE(x) − (1−ε) x_t − ε · mean_j x_j``。

    参数:
        logits: ``(B, C)``。
        target: int64 ``(B,)``。

    异常:
        ValueError: smoothing 不在 0 到 1 之间。

    参考: Szegedy 等, 2015, arXiv:1512.00567, 第 7 节。
    """
    _check_smoothing(smoothing)
    chosen = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)  # (B, C) -> (B,)
    expected = (1 - smoothing) * chosen  # Σ_j q_j x_j
    if smoothing:  # 被遮住的类 x_j = −∞，0 · (−∞) 是 nan
        expected = expected + smoothing * logits.mean(dim=-1)
    return (log_sum_exp(logits) - expected).mean()


def label_smoothing_cross_entropy_grad(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """``(softmax(x) − q) / B``：正确类的概率一旦超过 ``1 − ε + ε/C``，梯度就往回拉。"""
    _check_smoothing(smoothing)
    classes = logits.shape[-1]
    onehot = nn.functional.one_hot(target, classes).to(logits.dtype)
    smoothed = (1 - smoothing) * onehot + smoothing / classes
    return (softmax(logits) - smoothed) / len(target)


# ---------------------------------------------------------------- mixup 与 cutmix


def sample_beta(alpha: float, generator: torch.Generator | None) -> float:
    """从 ``Beta(α, α)`` 取一个数：两个独立的 ``Gamma(α)`` 之比 ``G₁ / (G₁ + G₂)``。

    全程用对数，``λ = σ(log G₁ − log G₂)``：α 很小时两个 G 都会下溢成 0，直接相除得 0/0。

    异常:
        ValueError: alpha 不是正数。
    """
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha={alpha} 应为有限的正数：它是 Beta 分布的参数")
    gap = _log_gamma_sample(alpha, generator) - _log_gamma_sample(alpha, generator)
    return 1 / (1 + math.exp(-gap)) if gap > -700 else 0.0


def _log_gamma_sample(alpha: float, generator: torch.Generator | None) -> float:
    """``log G``，``G ~ Gamma(α)``。

    先以 Marsaglia 与 Tsang (2000) 的拒绝法取 ``Gamma(α + 1)``（接受率超过 95%），再乘 ``U^{1/α}``
    降回 α；两步都对任意 α > 0 成立。
    """

    def uniform() -> float:
        return 1 - torch.rand((), generator=generator, dtype=torch.float64).item()  # (0, 1]

    d = alpha + 1 - 1 / 3
    while True:
        z = torch.randn((), generator=generator, dtype=torch.float64).item()
        v = (1 + z / math.sqrt(9 * d)) ** 3
        if v > 0 and math.log(uniform()) < z * z / 2 + d - d * v + d * math.log(v):
            return math.log(d * v) + math.log(uniform()) / alpha


def _mix(a: Tensor, order: Tensor, weight: float) -> Tensor:
    """``λ a + (1−λ) a[π]``。"""
    return weight * a + (1 - weight) * a[order]


def mixup(
    x: Tensor, y: Tensor, num_classes: int, alpha: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """``x̃ = λ x + (1−λ) x[π]``，标签也同样混合；``λ ~ Beta(α, α)``，整批一个，π 是随机置换。

    参数:
        x: 浮点 ``(B, ...)``。
        y: 类别下标 int64 ``(B,)``。
        num_classes: 类别数 C。
        alpha: Beta 分布的参数；越小越接近不混合。
        generator: CPU 上的随机数生成器。

    返回:
        (混合的输入，形状同 ``x``；软标签 ``(B, C)``，交给 ``soft_cross_entropy``)。

    异常:
        ValueError: ``x`` 不是浮点，或 alpha 不是正数。

    参考: Zhang 等, 2017, arXiv:1710.09412。
    """
    if not x.is_floating_point():
        raise ValueError(f"mixup 的输入应为浮点数，实为 {x.dtype}：请先归一化")
    weight = sample_beta(alpha, generator)
    order = torch.randperm(len(x), generator=generator).to(x.device)
    onehot = nn.functional.one_hot(y, num_classes).to(x.dtype)
    return _mix(x, order, weight), _mix(onehot, order, weight)


def cutmix_box(
    height: int, width: int, weight: float, generator: torch.Generator | None
) -> tuple[int, int, int, int]:
    """面积约占 ``1 − λ`` 的方框 ``(上, 下, 左, 右)``，中心均匀，越界的部分裁掉。"""
    half_h, half_w = (int(size * math.sqrt(1 - weight) / 2) for size in (height, width))
    row = torch.randint(height, (), generator=generator).item()
    column = torch.randint(width, (), generator=generator).item()
    top, bottom = max(row - half_h, 0), min(row + half_h, height)
    return top, bottom, max(column - half_w, 0), min(column + half_w, width)


def cutmix(
    images: Tensor, y: Tensor, num_classes: int, alpha: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """把另一张图的一个方框贴过来，标签按面积混合；参数与返回同 ``mixup``。

    方框边长是图像的 ``√(1−λ)`` 倍；取整与裁边之后，λ 改成没有被盖住的面积的精确比例。
    ``images`` 为浮点 ``(B, 通道, H, W)``。

    参考: Yun 等, 2019, arXiv:1905.04899, 式 (1)、(2)。
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"cutmix 的输入应为浮点 (B, 通道, H, W)，实为 {images.dtype} {tuple(images.shape)}"
        )
    height, width = images.shape[-2:]
    weight = sample_beta(alpha, generator)
    order = torch.randperm(len(images), generator=generator).to(images.device)
    top, bottom, left, right = cutmix_box(height, width, weight, generator)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[order, :, top:bottom, left:right]
    weight = 1 - (bottom - top) * (right - left) / (height * width)
    onehot = nn.functional.one_hot(y, num_classes).to(images.dtype)
    return mixed, _mix(onehot, order, weight)


# ---------------------------------------------------------------- 梯度裁剪


def _gradients(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    return [p.grad for p in parameters if p.grad is not None]


@torch.no_grad()
def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
    """每个分量截到 ``[−v, v]``，原地。方向会变：大的分量被削平，小的不动。"""
    for grad in _gradients(parameters):
        grad.clamp_(-clip_value, clip_value)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """全部梯度看作一个向量，范数超过 ``max_norm`` 就等比例缩回来：``g ← g · min(1, c/‖g‖)``。

    参数:
        parameters: 一个或一组参数；没有梯度的略过。
        max_norm: 上限 c。
        norm_type: 范数的阶，可为 ``math.inf``。
        error_if_nonfinite: 范数是 nan 或 inf 时报错，而不是照乘（那会毁掉全部梯度）。

    返回:
        裁剪之前的总范数，标量；每步记下它，就能看见哪一步踩到了悬崖。

    异常:
        RuntimeError: ``error_if_nonfinite`` 且范数不是有限数。

    参考: Pascanu, Mikolov 与 Bengio, 2012, arXiv:1211.5063。
    """
    grads = _gradients(parameters)
    if not grads:
        return torch.tensor(0.0)
    norms = torch.stack([torch.linalg.vector_norm(grad, norm_type) for grad in grads])
    total = torch.linalg.vector_norm(norms, norm_type)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"梯度的 {norm_type} 阶范数为 {total.item()}，无法裁剪：先查损失与学习率"
        )
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)  # 1e-6 与 torch 相同，防止除以零
    for grad in grads:
        grad.mul_(scale)
    return total
