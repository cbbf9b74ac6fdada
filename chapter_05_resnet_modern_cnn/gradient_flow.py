"""深度怎样改变梯度：各层相差几个数量级，邻近的输入还像不像，直路传回多少。

    没有捷径:  往前每一层，梯度平方乘 π/(π-1)：指数增长
    有捷径:    ∂L/∂x_l = ∂L/∂x_L + (∂ΣF/∂x_l)ᵀ ∂L/∂x_L，第一项不经过任何权重：幂次增长

都是纯粹的测量：网络先复制一份，权重与 BatchNorm 的滑动统计量一概不变。不处理：训练，见
``degradation.py``；逐路径的分解，见 ``lesions.py``。

维度约定：``B, C, H, W``。

参考: Balduzzi et al., 2017, The Shattered Gradients Problem, arXiv:1702.08591；
Yang et al., 2019, A Mean Field Theory of Batch Normalization, arXiv:1902.08129；
He et al., 2016, Identity Mappings in Deep Residual Networks, arXiv:1603.05027，式 (4)(5)。
degradation.md「梯度没有消失」与「恒等的直路」。
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_03_optimization_regularization.averaging import update_bn
from chapter_05_resnet_modern_cnn.resnet_cifar import CifarBlock

# 宽网络里，一层「线性、BatchNorm、ReLU」使反向传播的梯度平方放大的倍数；推导见 degradation.md
GAIN = math.pi / (math.pi - 1)


def plain_growth(layers: int) -> float:
    """没有捷径时，梯度平方往前 ``layers`` 层的放大倍数：``GAIN^layers``，指数增长。"""
    return GAIN**layers


def residual_growth(blocks: int, variance: float = 1.0) -> float:
    """预激活的残差网络里，梯度平方往前 ``blocks`` 个两层的块的放大倍数，幂次增长。

        Π (1 + GAIN / v_l),    v_l = variance + l / GAIN

    直路上的方差 ``v_l`` 逐块累加，分支入口的 BatchNorm 除以它，所以越深的块添得越少。

    参数:
        variance: 第一个块的输入在一批之内的方差。
    """
    return math.prod(1 + GAIN / (variance + index / GAIN) for index in range(blocks))


def relative_gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    """每个卷积的 ``‖∂L/∂W‖ / ‖W‖``，由浅到深。

    卷积之后是 BatchNorm，``W`` 乘以任何正数输出都不变，所以梯度与 ``W`` 垂直，一步 SGD 只转动
    ``W`` 的方向，转过的角度约是学习率乘以这个比值（弧度）。

    参数:
        model: 分类网络；以训练模式、批统计量测量。
        x: ``(B, C, H, W)``。
        y: 标签，int64 ``(B,)``。
    """
    model = copy.deepcopy(model).train()  # 训练模式的前向会改滑动统计量，不能动原来的
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), weights)
    ratios = [g.norm() / w.detach().norm() for g, w in zip(grads, weights, strict=True)]
    return torch.stack(ratios).tolist()


def gradient_similarity(
    model: nn.Module, x: Tensor, noise: float, generator: torch.Generator
) -> float:
    """输入移动一点，损失面的坡向变了多少：两处 ``∂z/∂x`` 的平均余弦，1 不变，0 毫不相干。

    ``z`` 是各类得分的一个固定的组合，系数由 −1 到 1 等距。先用这一批校准 BatchNorm，再以推理模式求
    梯度，因此网络是一个确定的函数，各张图互不牵连。

    参数:
        x: ``(B, C, H, W)``，归一化过的图像。
        noise: 每个像素加上的高斯噪声的标准差，以 ``x`` 的标准差为单位。
        generator: CPU 上的生成器。
    """
    model = copy.deepcopy(model)
    update_bn([(x, x)], model)
    model.eval()
    shift = torch.randn(x.shape, generator=generator).to(x) * (noise * x.std())
    here, there = (_input_gradient(model, point) for point in (x, x + shift))
    return F.cosine_similarity(here.flatten(1), there.flatten(1)).mean().item()


def _input_gradient(model: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    scores = model(x)
    direction = torch.linspace(-1, 1, scores.shape[1], device=x.device, dtype=x.dtype)
    return torch.autograd.grad(scores @ direction, x, torch.ones_like(scores[:, 0]))[0]


def branch_gradient(blocks: Iterable[CifarBlock], x: Tensor, grad: Tensor) -> Tensor:
    """一串恒等捷径的预激活块里，经过残差分支传回的那一份梯度；另一份就是 ``grad`` 自己。

        x_L = x_l + Σ F(x_i)    =>    ∂L/∂x_l = ∂L/∂x_L + (∂ΣF/∂x_l)ᵀ ∂L/∂x_L

    参数:
        blocks: 形状不变的 ``PreActBlock``。
        x: 这一串的输入 ``x_l``，``(B, C, H, W)``。
        grad: ``∂L/∂x_L``，形状同 ``x``。
    """
    start = x.detach().requires_grad_()
    state, total = start, torch.zeros_like(x)
    for block in blocks:
        residual = block.residual(state)
        state, total = state + residual, total + residual
    return torch.autograd.grad(total, start, grad)[0]


@torch.no_grad()
def open_path(blocks: Iterable[CifarBlock], x: Tensor) -> Tensor:
    """一串恒等捷径的后激活块里，直路上各个 ReLU 都放行的位置，bool，形状同 ``x``。

    ``x_{l+1} = ReLU(x_l + F(x_l))``，直路传回的于是不是 ``∂L/∂x_L`` 而是它乘以这个掩码。
    """
    path = torch.ones_like(x, dtype=torch.bool)
    for block in blocks:
        x = block(x)
        path &= x > 0
    return path
