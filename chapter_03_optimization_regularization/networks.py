"""本章实验用的网络：一个可以换归一化、初始化、Dropout 与残差的多层感知机。

本文件教什么：归一化放在线性层与激活之间；Dropout 在激活之后；DropPath 丢的是整个残差分支。
其余的零件来自第 2 章（``Linear``、初始化）与本章的 ``normalization``、``regularization``。

维度约定：``B`` 批大小；输入 ``(B, ...)`` 先展平，输出 logits ``(B, classes)``。
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from chapter_02_nn_basics_mlp.initialization import kaiming_normal_, xavier_normal_
from chapter_02_nn_basics_mlp.layers import Linear
from chapter_03_optimization_regularization.normalization import (
    BatchNorm1d,
    DyT,
    GroupNorm,
    LayerNorm,
    RMSNorm,
    WSLinear,
)
from chapter_03_optimization_regularization.regularization import Dropout, DropPath

# 名字 -> 给定宽度的归一化层；``group + ws`` 另把权重标准化，它只管权重，激活仍要 GroupNorm
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda width: nn.Identity(),
    "batch": BatchNorm1d,
    "layer": LayerNorm,
    "rms": RMSNorm,
    "group": lambda width: GroupNorm(8, width),
    "dyt": DyT,
    "group + ws": lambda width: GroupNorm(8, width),
}

# 名字 -> 就地初始化一个权重
INITS: dict[str, Callable[[Tensor, torch.Generator | None], Tensor]] = {
    "0.01": lambda w, g: w.normal_(0, 0.01, generator=g),
    "xavier": lambda w, g: xavier_normal_(w, generator=g),
    "kaiming": lambda w, g: kaiming_normal_(w, "relu", g),
    "1.0": lambda w, g: w.normal_(0, 1.0, generator=g),
}


class BlockMLP(nn.Module):
    """``depth`` 个「线性、归一化、ReLU、Dropout」块，宽度都是 ``width``，最后是线性的输出层。

    参数:
        in_features, width, depth, classes: 输入宽度、块的宽度、块数、类别数。
        norm: ``NORMS`` 中的名字。
        init: ``INITS`` 中的名字，用于各块的权重；输出层总是 Kaiming 的十分之一。
        dropout: 每块末尾的丢弃率。
        residual: 从第二块起加上块的输入，``x + DropPath(block(x))``。
        drop_path: 丢掉整个残差分支的概率；要求 ``residual``。
        generator: 初始化用的生成器。
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        depth: int,
        classes: int,
        *,
        norm: str = "none",
        init: str = "kaiming",
        dropout: float = 0.0,
        residual: bool = False,
        drop_path: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if drop_path and not residual:
            raise ValueError(f"drop_path={drop_path} 要求 residual=True：没有残差就没有分支可丢")
        linear = WSLinear if norm == "group + ws" else Linear
        self.residual = residual
        self.blocks = nn.ModuleList()
        for fan_in in [in_features] + [width] * (depth - 1):
            layer = linear(fan_in, width, generator=generator)
            with torch.no_grad():
                INITS[init](layer.weight, generator)
                layer.bias.zero_()
            self.blocks.append(
                nn.Sequential(layer, NORMS[norm](width), nn.ReLU(), Dropout(dropout))
            )
        self.drop_path = DropPath(drop_path)
        self.head = Linear(width, classes, generator=generator)
        with torch.no_grad():
            kaiming_normal_(self.head.weight, "relu", generator).mul_(0.1)
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x.flatten(1))  # (B, ...) -> (B, width)
        for block in self.blocks[1:]:
            x = x + self.drop_path(block(x)) if self.residual else block(x)
        return self.head(x)
