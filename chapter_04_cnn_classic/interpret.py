"""解释一个图像分类网络：它看了哪里，学到了什么，又怎样被骗。

- ``saliency``：得分对每个像素的导数有多大（Simonyan 等 2013）。
- ``occlusion``：盖住一块，得分降多少（Zeiler 与 Fergus 2013）。
- ``grad_cam``：最后的特征图按对得分的贡献加权（Selvaraju 等 2016）。
- ``feature_maps``：各层的输出。
- ``fgsm``：每个像素只改一点点，就让网络认错（Goodfellow 等 2014）。

都是 ``(model, x, target)`` 的纯函数：在评估模式下计算，之后每个模块的训练/评估模式、参数的
``.grad``、钩子都与调用之前一样，出错时也一样；``x`` 不会被改动。

不处理：引导反向传播、积分梯度、SHAP；迭代的攻击（PGD）。

维度约定：``B, C, H, W``；``target`` 是每张图要解释的类别，int64 ``(B,)``；热图都是 ``(B, H, W)``。

参考: Simonyan, Vedaldi, Zisserman, 2013, arXiv:1312.6034；Zeiler 与 Fergus, 2013, arXiv:1311.2901；
Zhou 等, 2015, arXiv:1512.04150（CAM）；Selvaraju 等, 2016, arXiv:1610.02391；Goodfellow, Shlens,
Szegedy, 2014, arXiv:1412.6572；Adebayo 等, 2018, arXiv:1810.03292。
visualization.md「网络看了哪里」「对抗样本」。
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def _inspected(model: nn.Module) -> Iterator[list]:
    """其间处于评估模式；离开时摘掉列表里的钩子，恢复每个模块的模式。"""
    modes = {module: module.training for module in model.modules()}
    handles: list = []
    model.eval()
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training


def _check(x: Tensor, target: Tensor) -> None:
    if x.ndim != 4 or target.shape != x.shape[:1]:
        raise ValueError(
            f"x 应为 (B, C, H, W)，target 应为 (B,)，实为 {tuple(x.shape)} 与 {tuple(target.shape)}"
        )


def _scores(logits: Tensor, target: Tensor) -> Tensor:
    """每张图在它的 ``target`` 类上的得分，``(B, K) -> (B,)``。"""
    return logits.gather(1, target[:, None])[:, 0]


# ---------------------------------------------------------------- 看了哪里


def saliency(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """显著图：``max_c |∂s_t / ∂x_c|``，``s_t`` 是 softmax 之前的得分。

    得分在 ``x`` 附近的一阶近似 ``s(x + δ) ≈ s(x) + g·δ``：``|g|`` 大的像素，动一点得分就变。
    用 softmax 之前的得分：概率还会因为别的类变低而升高，那不是这一类的证据。

    参数:
        model: ``(B, C, H, W) -> (B, K)``。
        x, target: 见本文件开头。

    返回:
        ``(B, H, W)``，非负；单位是得分每单位 ``x``。
    """
    _check(x, target)
    x = x.detach().clone().requires_grad_()
    with _inspected(model), torch.enable_grad():
        score = _scores(model(x), target).sum()  # 各图互不相干，和的梯度就是各自的梯度
        (gradient,) = torch.autograd.grad(score, x)
    return gradient.abs().amax(dim=1)


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """一个方向上各窗口的起点；末尾补上紧贴边缘的一个，使每个像素都被盖到。"""
    if not 1 <= window <= size or stride < 1:
        raise ValueError(f"窗口 {window} 应在 1 到图像边长 {size} 之间，步幅 {stride} 应至少为 1")
    starts = list(range(0, size - window + 1, stride))
    return starts if starts[-1] == size - window else [*starts, size - window]


@torch.no_grad()
def occlusion(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    window: int = 7,
    stride: int = 2,
    fill: float | Tensor = 0.0,
    probability: bool = False,
) -> Tensor:
    """遮挡图：用 ``fill`` 盖住一个窗口，``target`` 的得分降多少；每个像素取盖住它的各窗口的平均。

    不用梯度，问的是一个真实的改动；代价是每个窗口一次前向，``28×28``、窗口 7、步幅 2 时
    144 次，另有一次不遮。

    参数:
        window, stride: 窗口的边长与移动的步幅，像素。
        fill: 盖上去的值，与 ``x`` 同一单位；一个数，或能广播成 ``x`` 的形状的张量，例如每张图
            自己的底色 ``(B, C, 1, 1)``。归一化之后的 0 是平均的灰，不是黑；用哪一个会改变结果。
        probability: 比较概率（论文的做法）还是 softmax 之前的得分。

    返回:
        ``(B, H, W)``；正的地方支持这一类，负的地方反对。
    """
    _check(x, target)
    cover = torch.as_tensor(fill, dtype=x.dtype, device=x.device).expand_as(x)
    heat = torch.zeros_like(x[:, 0])
    count = torch.zeros_like(x[0, 0])
    with _inspected(model):

        def score(images: Tensor) -> Tensor:
            logits = model(images)
            return _scores(logits.softmax(dim=1) if probability else logits, target)

        before = score(x)
        for top in window_starts(x.shape[2], window, stride):
            for left in window_starts(x.shape[3], window, stride):
                area = (..., slice(top, top + window), slice(left, left + window))
                covered = x.clone()
                covered[area] = cover[area]
                heat[area] += (before - score(covered))[:, None, None]
                count[area] += 1
    return heat / count


def grad_cam(model: nn.Module, x: Tensor, target: Tensor, layer: nn.Module) -> Tensor:
    """Grad-CAM：``ReLU(Σ_k α_k A_k)``，``α_k = (1/PQ) Σ_{ij} ∂s_t/∂A_{k,ij}``，双线性放大到输入。

    ``A_k`` 是 ``layer`` 的第 ``k`` 个输出通道，``P×Q``；``α_k`` 是它平均每格对得分的影响。网络末尾
    是「全局平均池化 -> 线性」时，``∂s/∂A_{k,ij} = w_k/PQ``，``α_k = w_k/PQ``，于是就是类激活图
    CAM ``Σ_k w_k A_k`` 的正部除以 ``PQ``。

    参数:
        layer: ``model`` 里的一个模块，输出 ``(B, K, P, Q)``；通常取最后一个卷积块。

    返回:
        ``(B, H, W)``，非负，没有缩放到 0 与 1 之间。

    异常:
        ValueError: 前向没有经过 ``layer``，或它的输出不是四维。
    """
    _check(x, target)
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        kept.append(output)
        return output.clone()  # 交给后面的是副本：就地的 ReLU 不会改掉留下的这份

    with _inspected(model) as handles, torch.enable_grad():
        handles.append(layer.register_forward_hook(keep))
        score = _scores(model(x.detach().clone().requires_grad_()), target).sum()
        if not kept or kept[-1].ndim != 4:
            raise ValueError("前向没有经过 layer，或它的输出不是 (B, K, P, Q)：应是卷积部分的一层")
        (gradient,) = torch.autograd.grad(score, kept[-1])
    alpha = gradient.mean(dim=(2, 3), keepdim=True)  # (B, K, 1, 1)
    cam = F.relu((alpha * kept[-1].detach()).sum(dim=1, keepdim=True))
    return F.interpolate(cam, size=x.shape[2:], mode="bilinear", align_corners=False)[:, 0]


@torch.no_grad()
def feature_maps(model: nn.Module, x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
    """一次前向中各层的输出（副本）。

    参数:
        layers: 要看的模块。

    返回:
        与 ``layers`` 等长、次序相同的列表。

    异常:
        ValueError: 前向没有经过其中某一层。
    """
    found: dict[nn.Module, Tensor] = {}
    with _inspected(model) as handles:
        for layer in layers:
            # 立刻复制：后面就地的 ReLU 会改掉它
            handles.append(
                layer.register_forward_hook(lambda m, a, out: found.update({m: out.clone()}))
            )
        model(x)
    missing = [type(layer).__name__ for layer in layers if layer not in found]
    if missing:
        raise ValueError(f"前向没有经过这些层：{missing}")
    return [found[layer] for layer in layers]


# ---------------------------------------------------------------- 解释得对不对


def best_window(heat: Tensor, window: int) -> Tensor:
    """热图之和最大的 ``window×window`` 的左上角，int64 ``(B, 2)``。"""
    sums = F.avg_pool2d(heat[:, None], window, stride=1)[:, 0]  # (B, P, Q)
    index = sums.flatten(1).argmax(dim=1)
    return torch.stack([index // sums.shape[2], index % sums.shape[2]], dim=1)


def random_window(
    count: int, size: tuple[int, int], window: int, generator: torch.Generator
) -> Tensor:
    """``count`` 个随机的左上角，int64 ``(count, 2)``。"""
    rows, columns = (
        torch.randint(side - window + 1, (count,), generator=generator) for side in size
    )
    return torch.stack([rows, columns], dim=1)


@torch.no_grad()
def deletion_drop(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    corners: Tensor,
    window: int,
    fill: float | Tensor = 0.0,
) -> Tensor:
    """盖住每张图自己的那个窗口之后，``target`` 的概率降了多少，``(B,)``。

    解释若忠实，盖住它说重要的地方，概率就应比盖住随机的地方降得多：这是不靠人眼的检验。
    """
    _check(x, target)
    cover = torch.as_tensor(fill, dtype=x.dtype, device=x.device).expand_as(x)
    covered = x.clone()
    for index, (top, left) in enumerate(corners.tolist()):
        area = (index, slice(None), slice(top, top + window), slice(left, left + window))
        covered[area] = cover[area]
    with _inspected(model):
        before, after = (_scores(model(v).softmax(dim=1), target) for v in (x, covered))
    return before - after


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """每张图两幅热图的斯皮尔曼秩相关，``(B, H, W)`` 两个 -> ``(B,)``。

    把权重换成随机的，热图若几乎不变，它显示的就只是图像的边缘，与学到的东西无关
    （Adebayo 等 2018 的理智检验）。并列的值按出现的次序排。
    """
    ranks = [v.flatten(1).argsort(dim=1).argsort(dim=1).double() for v in (a, b)]
    centred = [r - r.mean(dim=1, keepdim=True) for r in ranks]
    return F.cosine_similarity(*centred, dim=1)


# ---------------------------------------------------------------- 对抗样本

Loss = Callable[[Tensor, Tensor], Tensor]  # (得分 (B, K), 类别 (B,)) -> 标量，各图之和


def _total_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="sum")


def fgsm(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    epsilon: float,
    mean: Tensor,
    std: Tensor,
    loss: Loss = _total_cross_entropy,
) -> Tensor:
    """快速梯度符号法：``x' = clip(x + ε·sign(∂L/∂x))``，使 ``target`` 的损失上升。

    每个像素至多动 ``ε`` 时，线性近似 ``L + g·δ`` 的最大值在 ``δ = ε·sign(g)`` 取到，增加
    ``ε‖g‖₁``；维数越多，``‖g‖₁`` 越大，每个像素要动的就越少。

    ``ε`` 以像素值为单位（0 是黑、1 是白；``8/255`` 就是 8 级灰度），而网络的输入已经归一化：
    ``x = (v − mean)/std``。``v`` 动 ``ε``，``x`` 动 ``ε/std``；``v`` 还要留在 0 与 1 之间。
    忘了除以 ``std``，实际的扰动就差一个 ``std`` 倍，不同数据集的 ``ε`` 便不能相比。

    参数:
        x: 归一化之后的图像 ``(B, C, H, W)``。
        target: 真实的类别 ``(B,)``。
        epsilon: 每个像素至多改动多少，像素值单位，0 到 1。
        mean, std: 归一化所用的每通道均值与标准差，``(C,)``。
        loss: 要抬高的损失；各图之和，这样梯度与批的大小无关。

    返回:
        归一化之后的对抗样本，形状同 ``x``。

    异常:
        ValueError: ``epsilon`` 不在 0 与 1 之间。
    """
    _check(x, target)
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon={epsilon} 应在 0 与 1 之间：它以像素值为单位，8 级灰度写 8/255")
    mean, std = mean.view(-1, 1, 1).to(x), std.view(-1, 1, 1).to(x)
    leaf = x.detach().clone().requires_grad_()
    with _inspected(model), torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss(model(leaf), target), leaf)
    moved = x.detach() + epsilon / std * gradient.sign()
    return moved.clamp((0 - mean) / std, (1 - mean) / std)
