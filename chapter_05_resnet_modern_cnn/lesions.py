"""拆掉几个块再测试：残差网络是许多条长短不一的路的和，没有捷径的网络只有一条路。

    y = (I + F_n)∘…∘(I + F_1)(x)      n 个块展开是 2ⁿ 条路，恰好经过 k 个分支的有 C(n, k) 条

拆掉一个块就是去掉它的 ``F``，只留捷径：路少了一半，其余的照旧。后激活形式里
``ReLU(捷径(x)) = 捷径(x)``，因为 ``x`` 是上一个 ReLU 的输出，没有负数。

不处理：训练时随机丢块，见第 3 章的 ``DropPath``。

维度约定：``B, C, H, W``。

参考: Veit et al., 2016, Residual Networks Behave Like Ensembles of Relatively Shallow Networks,
arXiv:1605.06431。degradation.md「拆掉一个块」。
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection

import torch
from torch import nn

from chapter_05_resnet_modern_cnn.resnet_cifar import CifarBlock, CifarResNet, PadShortcut


def bypass(block: CifarBlock) -> nn.Module:
    """去掉一个块的残差分支之后剩下的：恒等，形状改变之处为 ``PadShortcut``。

    孪生网络没有捷径，也补上这样一条，才能与后面的块接上。
    """
    conv = block.conv1
    if conv.stride == (1, 1) and conv.in_channels == conv.out_channels:
        return nn.Identity()
    return PadShortcut(conv.in_channels, conv.out_channels, conv.stride[0])


def without_blocks(model: CifarResNet, dropped: Collection[int]) -> CifarResNet:
    """拆掉若干块的一份复制，原来的网络不变；其余的权重与统计量照旧，不再训练。

    参数:
        dropped: 块的编号，从 0 起。

    异常:
        ValueError: 编号超出范围。
    """
    if not set(dropped) <= set(range(len(model.blocks))):
        raise ValueError(f"dropped={sorted(dropped)} 应在 0 与 {len(model.blocks) - 1} 之间")
    model = copy.deepcopy(model)
    for index in dropped:
        model.blocks[index] = bypass(model.blocks[index])
    return model


def removable(model: CifarResNet) -> list[int]:
    """输入输出形状相同的块的编号；另两块负责缩小与加宽，拆掉会连形状的变换一起丢掉。"""
    return [i for i, block in enumerate(model.blocks) if isinstance(bypass(block), nn.Identity)]


def random_lesions(model: CifarResNet, count: int, generator: torch.Generator) -> CifarResNet:
    """随机拆掉 ``count`` 个形状不变的块。

    异常:
        ValueError: 没有这么多块可拆。
    """
    candidates = removable(model)
    if not 0 <= count <= len(candidates):
        raise ValueError(f"count={count} 应在 0 与 {len(candidates)} 之间")
    order = torch.randperm(len(candidates), generator=generator)[:count].tolist()
    return without_blocks(model, [candidates[i] for i in order])


def path_counts(blocks: int) -> list[int]:
    """恰好经过 0、1、…、``blocks`` 个残差分支的路各有多少条；合计 ``2**blocks``。"""
    return [math.comb(blocks, length) for length in range(blocks + 1)]
