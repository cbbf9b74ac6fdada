"""本章几个训练脚本共用的配方：哪些参数衰减，学习率怎样变。推导与比较见第 3 章。"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """只衰减卷积核与矩阵；偏置与归一化的缩放、平移不衰减。"""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def warmup_cosine(step: int, total: int, parts: int = 20) -> float:
    """学习率的倍数：前 ``1/parts`` 的步数线性升到 1，然后按余弦降到 0。"""
    warmup = max(1, total // parts)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def adamw_with_cosine(
    model: nn.Module, lr: float, weight_decay: float, total: int, parts: int = 20
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW 与升温加余弦的调度；每步之后调用一次 ``schedule.step()``。

    参数:
        total: 总步数。
        parts: 前 ``1/parts`` 的步数用来升温。
    """
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, total, parts)
    )
    return optimizer, schedule
