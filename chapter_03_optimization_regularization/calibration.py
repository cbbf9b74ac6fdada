"""校准与不确定性：模型说有九成把握时，是不是真有九成对。

本文件教什么：期望校准误差怎样数，温度缩放怎样用一个标量修好它，MC-dropout 怎样把 Dropout 变成
一个集成，预测熵与互信息各量的是什么。不涉及：训练。
对应 regularization.md 的「校准与不确定性」一节。

维度约定：``N`` 样本数，``C`` 类别数，``S`` 抽样次数，``K`` 直方图的格数。熵与损失以 nats 计。
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from chapter_03_optimization_regularization.regularization import Dropout

# ---------------------------------------------------------------- 校准误差


class ReliabilityBins(NamedTuple):
    """按置信度分成 K 格，各格的统计，均为 ``(K,)``；空格的平均记为 0。"""

    confidence: Tensor  # 平均置信度
    accuracy: Tensor  # 准确率
    count: Tensor  # 样本数，int64


def reliability_bins(probabilities: Tensor, labels: Tensor, bins: int = 15) -> ReliabilityBins:
    """把样本按置信度（最大的概率）分进 ``((k−1)/K, k/K]``，数每格的平均置信度与准确率。

    参数:
        probabilities: ``(N, C)``，每行和为 1。
        labels: int64 ``(N,)``。
        bins: 格数 K。

    异常:
        ValueError: 形状不符，没有样本，格数不是正数，或概率越出 0 到 1。
    """
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        shapes = tuple(probabilities.shape), tuple(labels.shape)
        raise ValueError(f"probabilities 与 labels 应为非空的 (N, C) 与 (N,)，实为 {shapes}")
    if bins < 1:
        raise ValueError(f"bins={bins} 应至少为 1")
    # 低精度里把几万个数相加，加到后来就加不进去了
    confidence, predicted = probabilities.double().max(dim=-1)
    if not (confidence >= 0).all() or not (confidence <= 1 + 1e-6).all():
        raise ValueError("probabilities 的最大值越出 0 到 1：是不是忘了 softmax？")
    edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device)
    index = torch.bucketize(confidence, edges[1:-1])  # 内部的 K−1 条边，右闭
    count = torch.bincount(index, minlength=bins)
    divisor = count.clamp(min=1)
    correct = (predicted == labels).to(confidence.dtype)
    total = torch.zeros_like(edges[1:])
    return ReliabilityBins(
        total.index_add(0, index, confidence) / divisor,
        total.index_add(0, index, correct) / divisor,
        count,
    )


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """``ECE = Σ_k (n_k / N) |acc_k − conf_k|``：0 为完全校准；与准确率高低无关。

    参数同 ``reliability_bins``。

    参考: Guo, Pleiss, Sun 与 Weinberger, 2017, arXiv:1706.04599, 式 (3)。
    """
    confidence, accuracy, count = reliability_bins(probabilities, labels, bins)
    return ((accuracy - confidence).abs() * count).sum().item() / len(labels)


def negative_log_likelihood(probabilities: Tensor, labels: Tensor) -> float:
    """``−mean log p(正确类)``，nats；给的是概率（如 MC-dropout 的平均），logits 用交叉熵。"""
    return -probabilities.gather(-1, labels.unsqueeze(-1)).log().mean().item()


# ---------------------------------------------------------------- 温度缩放


def fit_temperature(logits: Tensor, labels: Tensor, tolerance: float = 1e-10) -> float:
    """验证集上使 ``softmax(x / T)`` 的 NLL 最小的温度 T > 0；不改变预测的类别。

    记 β = 1/T，``NLL(β) = mean(LSE(βx) − β x_t)``，期望与方差都对 ``p = softmax(βx)`` 取::

        NLL'(β)  = mean(E_p[x] − x_t)
        NLL''(β) = mean(Var_p[x]) ≥ 0

    对 β 是凸的，所以只有一个极小。用牛顿法求 ``NLL' = 0``，越出已知的区间就改用二分。

    参数:
        logits: ``(N, C)``，验证集上的，不是训练集上的。
        labels: int64 ``(N,)``。
        tolerance: β 的相对精度。

    异常:
        ValueError: 没有有限的正温度：不比乱猜好（T → ∞），或没有一个错误（T → 0）。

    参考: Guo 等, 2017, arXiv:1706.04599, 第 4.2 节。
    """
    logits = logits.detach().double()
    chosen = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)  # (N,)

    def slopes(beta: float) -> tuple[float, float]:
        p = torch.softmax(beta * logits, dim=-1)
        mean = (p * logits).sum(dim=-1)
        variance = (p * (logits - mean.unsqueeze(-1)).square()).sum(dim=-1)
        return (mean - chosen).mean().item(), variance.mean().item()

    if not slopes(0.0)[0] < 0:
        raise ValueError("正确类的 logits 平均不高于各类的平均，温度会是无穷大：模型不比乱猜好")
    if torch.equal(chosen, logits.amax(dim=-1)):
        raise ValueError("验证集上没有一个错误，温度会是 0：请用更大的、没有训练过的集合")
    low, high, beta = 0.0, 1.0, 1.0
    while slopes(high)[0] < 0:
        low, high = high, 2 * high
    while high - low > tolerance * high:
        slope, curvature = slopes(beta)
        low, high = (beta, high) if slope < 0 else (low, beta)
        newton = beta - slope / curvature if curvature > 0 else high
        if abs(newton - beta) <= tolerance * beta:
            return 1 / newton
        beta = newton if low < newton < high else (low + high) / 2
    return 1 / beta


# ---------------------------------------------------------------- MC-dropout


@torch.no_grad()
def mc_dropout(model: nn.Module, x: Tensor, samples: int) -> Tensor:
    """评估时也开着 Dropout，前向 S 次：每次的掩码不同，相当于从一个集成里各抽一个网络。

    只打开 Dropout；批归一化等仍用评估模式，否则样本会互相影响。结束后各模块的开关恢复原样。

    参数:
        model: 输出 logits 的分类器。
        x: ``(N, ...)``。
        samples: S ≥ 1。

    返回:
        概率 ``(S, N, C)``；对第 0 维取平均就是预测。

    异常:
        ValueError: 模型里没有 Dropout，或次数不是正数。

    参考: Gal 与 Ghahramani, 2015, arXiv:1506.02142。
    """
    kinds = (Dropout, nn.modules.dropout._DropoutNd)
    active = [module for module in model.modules() if isinstance(module, kinds)]
    if not active:
        raise ValueError("mc_dropout 的模型里没有 Dropout，每次前向都会相同")
    if samples < 1:
        raise ValueError(f"samples={samples} 应至少为 1")
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    for module in active:
        module.training = True
    try:
        return torch.stack([torch.softmax(model(x), dim=-1) for _ in range(samples)])
    finally:
        for module, flag in training:
            module.training = flag


def predictive_entropy(draws: Tensor) -> Tensor:
    """总的不确定性 ``H[mean_s p_s]``，``(S, N, C) -> (N,)``，nats，至多 ``ln C``。"""
    return _entropy(draws.mean(dim=0))


def mutual_information(draws: Tensor) -> Tensor:
    """知识的不足 ``H[mean_s p_s] − mean_s H[p_s] ≥ 0``，``(S, N, C) -> (N,)``。

    各次意见一致则为 0，哪怕一致地拿不准（数据本身含糊）；各次都很确定却互相矛盾时最大。

    参考: Houlsby 等, 2011, arXiv:1112.5745。
    """
    return predictive_entropy(draws) - _entropy(draws).mean(dim=0)


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(dim=-1)  # xlogy(0, 0) = 0
