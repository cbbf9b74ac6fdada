"""迁移：把训练好的网络当作特征提取器，用很少的标签学会新的任务。

    图像 -> 主干（backbone）-> 特征 f ∈ R^C -> 头（head）-> 得分

由省到费的几种做法，共用一份特征：

- ``knn_predict``：不训练，新图的类别由最相近的几张有标签的图投票。
- ``fit_probe``：线性探针（linear probe），在缓存的特征上解到收敛的多类逻辑回归。
- ``freeze`` 与 ``train_mode``：冻结主干，只训练头。
- ``parameter_groups``：整体微调（fine-tuning），主干用较小的学习率。

另有 ``pca``：把特征投影到平面上来看。

不处理：低秩适配与提示微调、自监督的预训练、类别不均衡。

维度约定：``B, C, H, W``；``N`` 个样本，``C`` 维特征，``K`` 个类别，``Q`` 个待分类的样本。

参考: Cover 与 Hart, 1967（样本趋于无穷时，最近邻的错误率至多为贝叶斯错误率的两倍）；
Yosinski et al., 2014, arXiv:1411.1792（特征由浅到深，由通用到专门）；
Kornblith, Shlens, Le, 2018, arXiv:1805.08974；
Kumar et al., 2022, arXiv:2202.10054（微调会扭曲特征）。
transfer.md。
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------- 主干与特征


def head_of(model: nn.Module) -> tuple[str, nn.Linear]:
    """分类头：最后一个全连接层，返回 (名字, 层)。

    异常:
        ValueError: 网络里没有全连接层。
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not layers or not layers[-1][0]:
        raise ValueError(f"{type(model).__name__} 里没有全连接层，分不出主干与头")
    return layers[-1]


def split_head(model: nn.Module) -> tuple[nn.Module, int]:
    """去掉分类头的副本（输出就是特征），与特征的维数 ``C``；``model`` 不变。

    把最后一个全连接层换成恒等，于是不论叫 ``fc`` 还是 ``classifier``，哪一种网络都适用；
    对 ResNet，它与 ``forward_features`` 相同。
    """
    name, head = head_of(model)
    backbone = copy.deepcopy(model)
    parent, _, child = name.rpartition(".")
    setattr(backbone.get_submodule(parent), child, nn.Identity())
    return backbone, head.in_features


def attach_head(backbone: nn.Module, channels: int, num_classes: int) -> nn.Sequential:
    """主干的副本接上一个全零的新头；子模块名为 ``backbone`` 与 ``head``。

    头从零开始：各类的概率一样，损失恰为 ``ln K``，传回主干的梯度也从零开始。
    """
    model = nn.Sequential()
    model.add_module("backbone", copy.deepcopy(backbone))
    model.add_module("head", nn.Linear(channels, num_classes))
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    return model


@torch.no_grad()
def extract(backbone: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """逐批算出特征，``(B, C, H, W) 的若干批 -> (N, C)``，在 CPU 上。

    其间主干处于评估模式，之后每个模块的模式照旧。主干不再变，所以每张图只算这一次；以后的探针、
    最近邻、选超参数都在这张 ``N×C`` 的表上进行，每一轮省下的是 ``N`` 次整个网络的前向。
    """
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        return torch.cat([backbone(x).cpu() for x in batches])
    finally:
        for module, training in modes.items():
            module.training = training


# ---------------------------------------------------------------- 最近邻


def check_labels(features: Tensor, labels: Tensor) -> None:
    """``features`` 须为 ``(N, C)``，``labels`` 为 ``(N,)``，N 至少为 1。"""
    if features.ndim != 2 or labels.shape != features.shape[:1] or len(labels) == 0:
        raise ValueError(
            "特征应为 (N, C)，标签应为 (N,)，N 至少为 1，实为 "
            f"{tuple(features.shape)} 与 {tuple(labels.shape)}"
        )


def knn_votes(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    k: int,
    num_classes: int,
    temperature: float = 0.1,
    chunk: int = 1024,
) -> Tensor:
    """k 近邻（k-nearest neighbours）的加权投票。

        v_c = Σ_{i ∈ 近邻, y_i = c} exp((cos(f, f_i) − 1) / τ)

    单位化之后 ``‖f − f_i‖² = 2 − 2cos``，于是余弦最大就是距离最小。减 1 使最大的权重为 1：各类同乘
    一个数，名次不变，而 ``τ`` 很小时不会溢出。全部的余弦是一次矩阵乘法，但要 ``4QN`` 字节；
    每次只算 ``chunk`` 个查询，内存便是 ``4·chunk·N``，结果不变。

    参数:
        features, labels: 有标签的样本，``(N, C)`` 与 int64 ``(N,)``。
        queries: ``(Q, C)``。
        k: 近邻数；超过 ``N`` 时用全部。
        temperature: ``τ``，越小越只听最近的那一个。

    返回:
        ``(Q, K)``，非负；取最大的一列就是预测。

    异常:
        ValueError: 形状不合，或 ``k``、``temperature``、``chunk`` 不是正数。
    """
    check_labels(features, labels)
    if k < 1 or chunk < 1 or not temperature > 0:
        raise ValueError(f"k={k}、chunk={chunk}、temperature={temperature} 都应为正数")
    keys = F.normalize(features, dim=1)
    votes = []
    for part in queries.split(chunk):
        cosine, index = (F.normalize(part, dim=1) @ keys.T).topk(min(k, len(keys)), dim=1)
        weight = ((cosine - 1) / temperature).exp()  # (chunk, k)
        empty = weight.new_zeros(len(part), num_classes)
        votes.append(empty.scatter_add(1, labels[index], weight))
    return torch.cat(votes)


def knn_predict(features: Tensor, labels: Tensor, queries: Tensor, **options: int) -> Tensor:
    """k 近邻的预测，int64 ``(Q,)``；参数同 ``knn_votes``。"""
    return knn_votes(features, labels, queries, **options).argmax(dim=1)


# ---------------------------------------------------------------- 线性探针


def probe_loss(weight: Tensor, features: Tensor, labels: Tensor, l2: float) -> Tensor:
    """``L = −(1/N) Σ_i ln p_{i,y_i} + (λ/2)‖W‖²``，``p_i = softmax(W f_i)``，nats。

    参数:
        weight: ``(K, C+1)``，最后一列是偏置，不受惩罚。
        features: ``(N, C+1)``，最后一列全是 1。
        l2: ``λ``。
    """
    penalty = weight[:, :-1].square().sum()
    return F.cross_entropy(features @ weight.T, labels) + l2 / 2 * penalty


def probe_gradient(weight: Tensor, features: Tensor, labels: Tensor, l2: float) -> Tensor:
    """``∂L/∂W = (1/N) (P − Y)ᵀ F + λW``：预测与标签之差，按特征汇总；形状同 ``weight``。"""
    residual = (features @ weight.T).softmax(dim=1)
    residual -= F.one_hot(labels, len(weight)).to(residual)
    gradient = residual.T @ features / len(features)
    gradient[:, :-1] += l2 * weight[:, :-1]
    return gradient


def probe_hessian(weight: Tensor, features: Tensor, l2: float) -> Tensor:
    """海森矩阵 ``(1/N) Σ_i (diag(p_i) − p_i p_iᵀ) ⊗ f_i f_iᵀ + λI``，``(KD, KD)``，``D = C+1``。

    讲解与核对用：``(KD)²`` 个数，``O(N K² D²)`` 次乘加，而 ``fit_probe`` 用不着它。
    """
    p = (features @ weight.T).softmax(dim=1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]  # (N, K, K)
    blocks = torch.einsum("nkl,nc,nd->kcld", curvature, features, features) / len(features)
    penalty = torch.full_like(weight, l2)
    penalty[:, -1] = 0
    return blocks.reshape(weight.numel(), -1) + torch.diag(penalty.flatten())


class Probe(NamedTuple):
    """线性探针：先把特征标准化，再乘以权重。"""

    weight: Tensor  # float64 (K, C+1)，最后一列是偏置
    mean: Tensor  # float64 (C,)
    std: Tensor  # float64 (C,)

    def __call__(self, features: Tensor) -> Tensor:
        """得分，``(Q, C) -> (Q, K)``。"""
        return with_ones((features.double() - self.mean) / self.std) @ self.weight.T


def with_ones(features: Tensor) -> Tensor:
    """末尾添一列 1，偏置便是权重的最后一列，``(N, C) -> (N, C+1)``。"""
    return torch.cat([features, torch.ones_like(features[:, :1])], dim=1)


def fit_probe(
    features: Tensor, labels: Tensor, num_classes: int, l2: float, start: Probe | None = None
) -> Probe:
    """线性探针：在缓存的特征上，用 L-BFGS 把带 L2 的多类逻辑回归解到收敛。

    目标是凸的，``λ > 0`` 时权重唯一，所以结果与初值、学习率、批的次序都无关；``start`` 只省时间
    （由大到小试 ``λ`` 时，从上一个解出发）。

    参数:
        features, labels: ``(N, C)`` 与 int64 ``(N,)``。
        l2: 标准化之后的特征上的 ``λ``，正数；为零而类别线性可分时，最优解在无穷远处。

    异常:
        ValueError: 形状不合，或 ``l2`` 不是正数。
    """
    check_labels(features, labels)
    if not l2 > 0:
        raise ValueError(f"l2={l2} 应为正数：类别线性可分时，没有惩罚的权重趋于无穷")
    features = features.double()
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0)
    std = torch.where(std > 1e-6 * (1 + mean.abs()), std, 1.0)  # 从不变化的特征不放大
    inputs = with_ones((features - mean) / std)
    weight = inputs.new_zeros(num_classes, inputs.shape[1]) if start is None else start.weight
    weight = weight.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [weight],
        max_iter=500,
        tolerance_grad=1e-5,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def closure() -> Tensor:
        weight.grad = probe_gradient(weight, inputs, labels, l2)
        return probe_loss(weight, inputs, labels, l2)

    solver.step(closure)
    return Probe(weight.detach(), mean, std)


# ---------------------------------------------------------------- 冻结与微调


def freeze(module: nn.Module) -> nn.Module:
    """不再求 ``module`` 的参数的梯度。只管参数：BatchNorm 的滑动统计量由 ``train_mode`` 管。"""
    return module.requires_grad_(False)


def train_mode(model: nn.Module) -> nn.Module:
    """训练模式，但没有一个可训练参数的子模块留在评估模式。

    冻结的主干若处于训练模式，BatchNorm 就用这一批的统计量，而且每次前向都更新滑动统计量：
    参数一个没动，特征却变了。
    """
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()
    return model


def parameter_groups(model: nn.Sequential, lr: float, scale: float) -> list[dict]:
    """优化器的两组参数：头用 ``lr``，主干用 ``scale·lr``；冻结的不在其中。

    参数:
        model: ``attach_head`` 的结果。
        scale: 主干的学习率是头的几倍，``[0, 1]``；为 0 时主干不进优化器。
    """
    if not 0 <= scale <= 1:
        raise ValueError(f"scale={scale} 应在 0 与 1 之间：主干已经训练过，不该比头走得快")
    groups = [{"params": list(model.head.parameters()), "lr": lr}]
    if scale:
        groups.append({"params": list(model.backbone.parameters()), "lr": scale * lr})
    groups = [g | {"params": [p for p in g["params"] if p.requires_grad]} for g in groups]
    return [g for g in groups if g["params"]]


# ---------------------------------------------------------------- 看一看特征


def pca(features: Tensor, components: int = 2) -> tuple[Tensor, Tensor]:
    """主成分分析（PCA）：返回投影 ``(N, components)`` 与各主成分占总方差的比例。

    减去均值之后 ``F = U S Vᵀ``：``V`` 的前几列是方差最大的方向，投影 ``FV = US``，各方向的方差
    ``S²/N``。每个方向的正负号是任意的，取绝对值最大的系数为正，于是结果确定。

    异常:
        ValueError: ``components`` 超过 ``min(N, C)``。
    """
    if features.ndim != 2 or not 1 <= components <= min(features.shape):
        raise ValueError(f"components={components} 应在 1 与 min(N, C) 之间：{features.shape}")
    centred = features.double() - features.double().mean(dim=0)
    u, s, vt = torch.linalg.svd(centred, full_matrices=False)
    largest = vt.abs().argmax(dim=1, keepdim=True)
    u = u * vt.gather(1, largest).sign().T
    total = s.square().sum().clamp_min(1e-300)
    return (u * s)[:, :components], s.square()[:components] / total
