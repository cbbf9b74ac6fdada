"""把 BatchNorm 折进它前面的卷积：推理时少一层运算，输出不变。

推理时 BatchNorm 的均值与方差是常数，它只是逐通道的一次函数；卷积后面接一次函数仍是卷积：

    γ·(W*x + b - μ)/√(σ²+ε) + β = (s·W)*x + s·(b - μ) + β,    s = γ/√(σ²+ε)

难处不在公式而在**哪两层可以合**：这里运行一次网络，看每个卷积的输出真正被谁读过，只折「唯一的
读者是 BatchNorm」的。按登记的先后配对，在预激活网络与 DenseNet 上会静悄悄地折错。

本文件不处理：BatchNorm 在卷积之前的（补零的边缘处不再是同一个卷积）、训练、SyncBatchNorm。

维度约定：``B, C, H, W``。

参考: Jacob et al., 2018, Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference, arXiv:1712.05877，第 3.2 节。deploy.md「折叠 BatchNorm」。
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# 能折的 (前一层, BatchNorm)
PAIRS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: nn.BatchNorm2d,
    nn.ConvTranspose2d: nn.BatchNorm2d,
    nn.Linear: nn.BatchNorm1d,
}

# ---------------------------------------------------------------- 公式


def scale_and_shift(bn: nn.Module) -> tuple[Tensor, Tensor]:
    """推理时 ``BN(x) = s x + t``：返回 ``s = γ/√(σ²+ε)`` 与 ``t = β − s μ``，各 ``(C,)``。"""
    gamma = torch.ones_like(bn.running_var) if bn.weight is None else bn.weight
    beta = torch.zeros_like(bn.running_mean) if bn.bias is None else bn.bias
    scale = gamma / (bn.running_var + bn.eps).sqrt()
    return scale, beta - scale * bn.running_mean


def fold_conv_bn(layer: nn.Module, bn: nn.Module) -> nn.Module:
    """``bn(layer(x))`` 合成的一层，类型同 ``layer``，总是带偏置；两个参数都不改动。

    参数:
        layer: ``nn.Conv2d``（任何分组、步幅、空洞）、``nn.ConvTranspose2d`` 或 ``nn.Linear``。
        bn: 相配的 BatchNorm，须有运行统计量；按推理的方式理解，不看它是否在训练模式。

    异常:
        TypeError: 两层的类型不相配。
        ValueError: 通道数不同，或 ``bn`` 没有运行统计量（推理时也用批的统计量，不是常数）。
    """
    if PAIRS.get(type(layer)) is not type(bn):
        raise TypeError(f"不能把 {type(bn).__name__} 折进 {type(layer).__name__}")
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if channels != bn.num_features:
        raise ValueError(f"卷积有 {channels} 个输出通道，BatchNorm 却有 {bn.num_features} 个")
    if bn.running_mean is None:
        raise ValueError("track_running_stats=False 的 BatchNorm 推理时也用批的统计量，折不进去")
    with torch.no_grad():
        scale, shift = scale_and_shift(bn)
        folded = copy.deepcopy(layer)
        folded.weight = nn.Parameter(layer.weight * _per_output(scale, layer))
        folded.bias = nn.Parameter(shift if layer.bias is None else scale * layer.bias + shift)
    return folded


def _per_output(scale: Tensor, layer: nn.Module) -> Tensor:
    """把 ``(C_out,)`` 摆成能与 ``layer.weight`` 逐元素相乘的形状。"""
    if not isinstance(layer, nn.ConvTranspose2d):
        return scale.view(-1, *[1] * (layer.weight.ndim - 1))
    # 转置卷积的核是 (C_in, C_out/g, kh, kw)：第 i 个输入通道属于第 i // (C_in/g) 组
    rows = scale.view(layer.groups, -1).repeat_interleave(layer.in_channels // layer.groups, dim=0)
    return rows[:, :, None, None]


# ---------------------------------------------------------------- 谁读了谁的输出


class _CountReads(TorchDispatchMode):
    """数每个张量被底层算子读过几次；取视图、原位修改也算一次。

    在算子这一层数，``F.relu(y)``、``y + x``、``torch.cat([y, …])`` 都逃不掉；模块的钩子看不见它们。
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[int] = Counter()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.reads.update(id(t) for t in _tensors((args, kwargs or {})))
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[Tensor]:
    """嵌套的元组、列表、字典里的全部张量。"""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


@torch.no_grad()
def find_pairs(model: nn.Module, *example: Tensor) -> list[tuple[nn.Module, nn.Module]]:
    """运行一次 ``model(*example)``，返回可以折叠的 (卷积, BatchNorm)，按运行的先后。

    条件：卷积与 BatchNorm 各恰好运行一次；BatchNorm 读的就是卷积的输出；此外没有谁读过那个输出，
    它也不是整个网络的输出；BatchNorm 有运行统计量。分支随输入而变的网络，只看得到这一次走过的路。
    """
    runs: Counter[nn.Module] = Counter()
    makers: dict[int, nn.Module] = {}
    readers: list[tuple[Tensor, nn.Module]] = []
    alive: list[Tensor] = []  # 留住卷积的输出：一旦释放，它的 id 会给别的张量用
    counter = _CountReads()

    def after(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        runs[module] += 1
        if type(module) in PAIRS:
            makers[id(output)] = module
            alive.append(output)
            counter.reads[id(output)] = 0  # 同一个 id 从前的主人读过几次，不算
        else:
            readers.append((inputs[0], module))

    kinds = {*PAIRS, *PAIRS.values()}
    hooks = [m.register_forward_hook(after) for m in model.modules() if type(m) in kinds]
    was_training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with counter:
            outputs = model(*example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in was_training.items():
            module.training = training
    counter.reads.update(id(t) for t in _tensors(outputs))
    return [
        (makers[id(x)], bn)
        for x, bn in readers
        if id(x) in makers
        and counter.reads[id(x)] == 1
        and runs[bn] == runs[makers[id(x)]] == 1
        and PAIRS[type(makers[id(x)])] is type(bn)
        and bn.running_mean is not None
    ]


def fold_batchnorm(model: nn.Module, *example: Tensor) -> nn.Module:
    """折叠全部折得了的 BatchNorm，返回 ``eval`` 模式的新网络；``model`` 不变。

    折掉的 BatchNorm 换成 ``nn.Identity``，模块的名字与 ``forward`` 都不用改。

    参数:
        example: 一份输入，用来看数据怎样流；批大小 1 就够。
    """
    folded = copy.deepcopy(model)
    replacement: dict[nn.Module, nn.Module] = {}
    for layer, bn in find_pairs(folded, *example):
        replacement |= {layer: fold_conv_bn(layer, bn), bn: nn.Identity()}
    return replace_modules(folded, replacement).eval()


def replace_modules(model: nn.Module, replacement: dict[nn.Module, nn.Module]) -> nn.Module:
    """把 ``model`` 里的若干子模块就地换掉（``model`` 自己也可以是其中之一），返回换过的。"""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacement:
                parent._modules[name] = replacement[child]
    return replacement.get(model, model)
