"""损失函数：取值与手推的梯度，两者都在纯张量上。

本文件教什么：每个损失的公式、对预测的梯度，以及 log-sum-exp 为什么不溢出。
对应 README 的「损失函数」一节。

约定：每个 ``xxx(...)`` 返回全部元素（分类损失为全部样本）的平均，标量；``xxx_grad(...)``
返回该平均对第一个参数的梯度，形状与它相同。分类损失以 nats 计。

维度约定：``B`` 批大小，``C`` 类别数；回归与二分类的张量可为任意形状。
"""

from __future__ import annotations

import torch
from torch import Tensor

from chapter_02_nn_basics_mlp.activations import sigmoid, softmax

# ---------------------------------------------------------------- 回归


def mse(pred: Tensor, target: Tensor) -> Tensor:
    """均方误差 ``mean((p − t)²)``；最优常数预测是均值。"""
    return (pred - target).square().mean()


def mse_grad(pred: Tensor, target: Tensor) -> Tensor:
    """``2(p − t) / n``：离群点的影响与误差成正比。"""
    return 2 * (pred - target) / pred.numel()


def mae(pred: Tensor, target: Tensor) -> Tensor:
    """平均绝对误差 ``mean(|p − t|)``；最优常数预测是中位数。"""
    return (pred - target).abs().mean()


def mae_grad(pred: Tensor, target: Tensor) -> Tensor:
    """``sign(p − t) / n``：每个样本的影响相同；0 处取次梯度 0。"""
    return (pred - target).sign() / pred.numel()


def huber(pred: Tensor, target: Tensor, delta: float = 1.0) -> Tensor:
    """``r²/2`` (|r| ≤ δ) 或 ``δ(|r| − δ/2)``：小误差像 MSE，大误差像 MAE，处处可导。

    参考: Huber, 1964。
    """
    r = (pred - target).abs()
    return torch.where(r <= delta, 0.5 * r.square(), delta * (r - 0.5 * delta)).mean()


def huber_grad(pred: Tensor, target: Tensor, delta: float = 1.0) -> Tensor:
    """``clip(r, −δ, δ) / n``：就是把 MSE 的梯度截断。"""
    return (pred - target).clamp(-delta, delta) / pred.numel()


# ---------------------------------------------------------------- log-sum-exp 与 softmax 交叉熵


def log_sum_exp_naive(x: Tensor) -> Tensor:
    """``log Σ_j e^{x_j}`` 的字面写法：float32 下 x 超过 88.7 就溢出成 inf。仅供对照。"""
    return x.exp().sum(dim=-1).log()


def log_sum_exp(x: Tensor) -> Tensor:
    """``m + log Σ_j e^{x_j − m}``，``m = max_j x_j``：数学上相等，而指数不为正。

    ``(..., C) -> (...)``。
    """
    m = x.amax(dim=-1, keepdim=True).detach()  # 对结果的净贡献为零，不必求导
    return (x - m).exp().sum(dim=-1).log() + m.squeeze(-1)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """softmax 交叉熵 ``mean_b(logsumexp(x_b) − x_b[t_b])``。

    参数:
        logits: 未归一化的得分 ``(B, C)``，不要先做 softmax。
        target: 类别下标 int64 ``(B,)``，0 到 C−1。
    """
    chosen = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)  # (B, C) -> (B,)
    return (log_sum_exp(logits) - chosen).mean()


def cross_entropy_grad(logits: Tensor, target: Tensor) -> Tensor:
    """``(softmax(x) − onehot(t)) / B``：预测的分布减去真实的分布。"""
    grad = softmax(logits)
    grad[torch.arange(len(target), device=target.device), target] -= 1
    return grad / len(target)


# ---------------------------------------------------------------- 二分类


def softplus(x: Tensor) -> Tensor:
    """``log(1 + e^x)``，按符号分两支：``x + log1p(e^{−x})`` 或 ``log1p(e^x)``，指数不为正。

    ``log1p(u)`` 在 ``u`` 极小时仍准确，而 ``log(1 + u)`` 会得到 0。
    """
    zero = torch.zeros_like(x)
    positive = x + torch.log1p(torch.exp(-torch.where(x < 0, zero, x)))
    negative = torch.log1p(torch.exp(torch.where(x >= 0, zero, x)))
    return torch.where(x >= 0, positive, negative)


def bce_with_logits(logits: Tensor, target: Tensor) -> Tensor:
    """二元交叉熵 ``mean(softplus(x) − x t)``，即 ``−t log σ(x) − (1 − t) log(1 − σ(x))``。

    ``target`` 取 0 到 1 的浮点数，形状与 ``logits`` 相同。
    """
    return (softplus(logits) - logits * target).mean()


def bce_with_logits_grad(logits: Tensor, target: Tensor) -> Tensor:
    """``(σ(x) − t) / n``。"""
    return (sigmoid(logits) - target) / logits.numel()


def focal(logits: Tensor, target: Tensor, gamma: float = 2.0, alpha: float = 0.25) -> Tensor:
    """二元 focal loss ``mean(−α_t (1 − p_t)^γ log p_t)``：压低已经分对的容易样本的权重。

    ``p_t`` 是正确答案的概率；``α_t`` 对正例取 α，对负例取 1 − α。``target`` 为 0 或 1。

    参考: Lin 等, 2017, arXiv:1708.02002, 式 (5)。
    """
    margin = logits * (2 * target - 1)  # 正例取 x，负例取 −x，于是 p_t = σ(margin)
    weight = alpha * target + (1 - alpha) * (1 - target)
    return (weight * sigmoid(-margin) ** gamma * softplus(-margin)).mean()


def focal_grad(logits: Tensor, target: Tensor, gamma: float = 2.0, alpha: float = 0.25) -> Tensor:
    """``−α_t s q^γ (γ p_t softplus(−m) + q) / n``，其中 ``s = ±1``，``m = s x``，``q = 1 − p_t``。

    推导：``d/dm [q^γ softplus(−m)]``，用 ``dq/dm = −p q`` 与 ``d softplus(−m)/dm = −q``。
    """
    sign = 2 * target - 1
    margin = logits * sign
    weight = alpha * target + (1 - alpha) * (1 - target)
    p, q = sigmoid(margin), sigmoid(-margin)
    slope = -(q**gamma) * (gamma * p * softplus(-margin) + q)
    return weight * sign * slope / logits.numel()


# ---------------------------------------------------------------- 分布与间隔


def kl_divergence(log_q: Tensor, p: Tensor) -> Tensor:
    """``KL(p‖q) = Σ_j p_j (log p_j − log q_j)``，对样本取平均。

    ``p_j = 0`` 而 ``q_j > 0`` 的项为 0。

    参数:
        log_q: 预测的对数概率 ``(B, C)``。
        p: 目标概率 ``(B, C)``。
    """
    return (torch.xlogy(p, p) - p * log_q).sum(dim=-1).mean()


def kl_divergence_grad(log_q: Tensor, p: Tensor) -> Tensor:
    """``−p / B``：对 ``log_q`` 的梯度与预测无关。"""
    return -p / len(log_q)


def hinge(scores: Tensor, target: Tensor, margin: float = 1.0) -> Tensor:
    """多类合页损失 ``mean_b(Σ_{j≠t} max(0, margin − x_t + x_j) / C)``。

    参数:
        scores: ``(B, C)``。
        target: int64 ``(B,)``。

    参考: Weston 与 Watkins, 1999；除以 C 是 ``F.multi_margin_loss`` 的约定。
    """
    return _violations(scores, target, margin).clamp(min=0).sum(dim=-1).mean() / scores.shape[-1]


def hinge_grad(scores: Tensor, target: Tensor, margin: float = 1.0) -> Tensor:
    """每个越过间隔的错误类得 ``+1/(BC)``，正确类得其个数的相反数。"""
    active = (_violations(scores, target, margin) > 0).to(scores.dtype)
    grad = active.scatter(-1, target.unsqueeze(-1), -active.sum(dim=-1, keepdim=True))
    return grad / scores.numel()


def _violations(scores: Tensor, target: Tensor, margin: float) -> Tensor:
    """``margin − x_t + x_j``，正确类处为 0，``(B, C)``。"""
    index = target.unsqueeze(-1)
    return (margin - scores.gather(-1, index) + scores).scatter(-1, index, 0.0)
