"""小实验共用的训练：几千张图、几秒钟；完整的训练循环见 train.py。

维度约定：``B, C, H, W``；``N`` 张图。
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.datasets import ImageBatches, channel_stats, load_images

Transform = Callable[[Tensor, torch.Generator], Tensor]


class Images(NamedTuple):
    """归一化之后的图像、标签，以及归一化所用的均值与标准差 ``(C,)``。"""

    x: Tensor  # float32 (N, C, H, W)
    y: Tensor  # int64 (N,)
    mean: Tensor
    std: Tensor


def normalized(
    name: str,
    split: str,
    limit: int,
    stats: tuple[Tensor, Tensor] | None = None,
    data_dir: Path = Path("data"),
    download: bool = False,
) -> Images:
    """一个数据集的一个划分，按 ``stats``（缺省为自己的）归一化；测试集应传入训练集的。"""
    images, labels, _ = load_images(name, split, data_dir, download=download, limit=limit)
    mean, std = channel_stats(images) if stats is None else stats
    x, y = next(iter(ImageBatches(images, labels, len(images), mean=mean, std=std)))
    return Images(x, y, mean, std)


def small_mlp(inputs: int, classes: int = 10) -> nn.Sequential:
    """对照用的两层 MLP，``(B, C, H, W) -> (B, classes)``。"""
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, classes))


def fit(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    epochs: int,
    generator: torch.Generator,
    *,
    lr: float = 2e-3,
    batch_size: int = 64,
    transform: Transform | None = None,
) -> nn.Module:
    """Adam，学习率线性降到零；``transform`` 是每批的增强。返回处于评估模式的 ``model``。"""
    x, y = data
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    steps = epochs * -(-len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for chosen in order.split(batch_size):
            batch = x[chosen] if transform is None else transform(x[chosen], generator)
            optimizer.zero_grad()
            F.cross_entropy(model(batch), y[chosen]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 500) -> float:
    """评估模式下的准确率；调用之后模型处于评估模式。"""
    model.eval()
    pairs = zip(x.split(batch_size), y.split(batch_size), strict=True)
    return sum((model(a).argmax(dim=1) == b).sum().item() for a, b in pairs) / len(x)
