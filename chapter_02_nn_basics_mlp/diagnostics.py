"""训练之前与训练之中的体检：信号逐层的尺度、死 ReLU、初始损失、过拟合一个批。

本文件教什么：网络"学不动"时先量什么。对应 README 的「初始化」与「排错阶梯」两节。

维度约定：``B`` 批大小，``C`` 类别数。
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from chapter_02_nn_basics_mlp.initialization import kaiming_normal_, xavier_normal_
from chapter_02_nn_basics_mlp.losses import cross_entropy
from chapter_02_nn_basics_mlp.mlp import MLP

# 名字 -> 初始化一个权重：(权重, 激活函数名, 生成器)
SCHEMES: dict[str, Callable[[Tensor, str, torch.Generator], Tensor]] = {
    "N(0, 0.01²)": lambda w, _, g: nn.init.normal_(w, 0.0, 0.01, generator=g),
    "N(0, 1)": lambda w, _, g: nn.init.normal_(w, 0.0, 1.0, generator=g),
    "Xavier": lambda w, _, g: xavier_normal_(w, 1.0, g),
    "Kaiming": kaiming_normal_,
}


def signal_by_layer(
    scheme: str, activation: str, generator: torch.Generator, depth: int = 12, width: int = 256
) -> tuple[list[float], list[float]]:
    """一个随机初始化的深网络里，信号与梯度逐层的尺度。

    返回:
        (各隐藏层激活的均方根, 损失对各隐藏层激活的梯度的均方根)，都从浅到深；
        输入与输出端的梯度都取标准正态，因此理想情形是一条水平线。
    """
    model = MLP(width, (width,) * depth, width, activation, generator)
    for layer in model.layers:
        SCHEMES[scheme](layer.weight, activation, generator)
    states = model.hidden_states(torch.randn(512, width, generator=generator))
    top = torch.randn(states[-1].shape, generator=generator)
    grads = torch.autograd.grad(states[-1], states, grad_outputs=top)

    def rms(values: Tensor) -> float:
        return values.double().square().mean().sqrt().item()

    return [rms(state.detach()) for state in states], [rms(grad) for grad in grads]


@torch.no_grad()
def dead_fraction(model: MLP, x: Tensor) -> float:
    """对 ``x`` 里每个样本都恰好输出 0 的隐藏神经元所占的比例：梯度恒为零，再也学不动。"""
    states = model.hidden_states(x)
    dead = sum(int((state == 0).all(dim=0).sum()) for state in states)
    return dead / sum(state.shape[1] for state in states)


def initial_loss(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """(未训练时的交叉熵, 应有的值 ``ln C``)：对 C 类一视同仁的预测，损失正是 ``ln C`` nats。"""
    with torch.no_grad():
        logits = model(x)
    return cross_entropy(logits, y).item(), math.log(logits.shape[-1])


def overfit_one_batch(
    model: nn.Module, x: Tensor, y: Tensor, steps: int = 200, lr: float = 1e-2
) -> tuple[list[float], list[float]]:
    """反复训练同一个批；返回每步的 (损失, 全部参数梯度的范数)。

    损失降不到接近零，问题一定在代码里（标签错位、忘了 ``zero_grad``、断开的计算图……），
    而不在数据或超参数。
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses, norms = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        squares = [p.grad.square().sum() for p in model.parameters()]
        norms.append(torch.stack(squares).sum().sqrt().item())
        losses.append(loss.item())
        optimizer.step()
    return losses, norms
