"""本章的数据：训练样本少、标签有错、最佳可能的错误率算得出来，好让每种正则化都有事可做。

``noisy_moons`` 在双月的两个坐标之外添上许多与类别无关的坐标，再随机改掉一部分标签；任何分类器的
错误率都不低于 ``noisy_moons_error`` 算出的贝叶斯错误率。数字图像由 ``utils.datasets`` 读入，也可以
只留少量、改掉一部分标签。

维度约定：``N`` 样本数；点 ``(N, 2 + extra)``，图像 uint8 ``(N, C, H, W)``，类别 int64 ``(N,)``。
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from utils import make_generator
from utils.datasets import SPLITS, ImageBatches, ImageSet, TensorBatches, load_images
from utils.synth_points import moon_bayes, two_moons

EXTRA = 8  # 与类别无关的坐标的个数
FLIP = 0.1  # 标签改错的概率
DATA_SEED = 3  # 验证集与测试集的种子；训练集随训练的种子而变


def flip_labels(labels: Tensor, rate: float, classes: int, generator: torch.Generator) -> Tensor:
    """每个标签以概率 ``rate`` 换成另一个类（其余各类等可能）。"""
    flipped = torch.rand(labels.shape, generator=generator) < rate
    shift = torch.randint(1, classes, labels.shape, generator=generator)
    return torch.where(flipped, (labels + shift) % classes, labels)


def noisy_moons(
    count: int, generator: torch.Generator, extra: int = EXTRA, flip: float = FLIP
) -> tuple[Tensor, Tensor]:
    """双月，外加 ``extra`` 个标准正态的无关坐标；标签以概率 ``flip`` 是错的。"""
    points, labels = two_moons(count, generator)
    noise = torch.randn(count, extra, generator=generator)
    return torch.cat([points, noise], dim=1), flip_labels(labels, flip, 2, generator)


def noisy_moons_error(points: Tensor, flip: float = FLIP) -> float:
    """贝叶斯错误率 ``E[min(q, 1 − q)]``，``q = (1 − 2·flip) η + flip``，``η`` 是干净标签的后验。

    无关坐标与标签独立，不影响后验。
    """
    posterior = (1 - 2 * flip) * moon_bayes(points[:, :2]) + flip
    return torch.minimum(posterior, 1 - posterior).mean().item()


def small_digits(count: int, pool: int = 2) -> tuple[Tensor, Tensor]:
    """``count`` 张归一化的合成数字，按 ``pool × pool`` 平均，展平：``(N, D)`` 与 ``(N,)``。"""
    data = load_images("synth-digits", "train", limit=count)
    x, y = next(iter(ImageBatches(*data[:2], count)))
    return nn.functional.avg_pool2d(x, pool).flatten(1), y


# ---------------------------------------------------------------- 任务


@dataclass(frozen=True)
class Task:
    """一份数据：三个划分的批迭代器，加上机会线与极限（都是错误率）。

    ``batches(split, batch_size, generator)``；``generator`` 为 ``None`` 时不打乱（评估）。
    """

    batches: Callable[..., TensorBatches]
    in_features: int
    classes: int
    chance: float
    floor: float | None


def points_task(
    seed: int, train_size: int, smoke: bool = False, device: torch.device | str = "cpu"
) -> Task:
    """带噪双月：``train_size`` 个训练样本（随 ``seed`` 而变），验证集与测试集固定。"""
    held_out = make_generator(DATA_SEED)
    sizes = (200, 200) if smoke else (2_000, 20_000)
    splits = {
        "val": noisy_moons(sizes[0], held_out),
        "test": noisy_moons(sizes[1], held_out),
        "train": noisy_moons(train_size, make_generator(DATA_SEED + 1 + seed)),
    }

    def batches(
        split: str, batch_size: int, generator: torch.Generator | None = None
    ) -> TensorBatches:
        return TensorBatches(*splits[split], batch_size, generator=generator, device=device)

    return Task(batches, 2 + EXTRA, 2, 0.5, noisy_moons_error(splits["test"][0]))


def load_digits(
    name: str, data_dir: Path, *, download: bool = False, smoke: bool = False
) -> dict[str, ImageSet]:
    """读入图像数据集的三个划分。"""
    limit = 256 if smoke else None
    return {s: load_images(name, s, data_dir, download=download, limit=limit) for s in SPLITS}


def images_task(
    splits: dict[str, ImageSet],
    seed: int = 0,
    train_size: int | None = None,
    flip: float = 0.0,
    device: torch.device | str = "cpu",
) -> Task:
    """图像分类；``train_size`` 给出时随机只留这么多训练图像，并以概率 ``flip`` 改错它们的标签。

    验证集与测试集的标签是干净的，所以极限不因 ``flip`` 而变。
    """
    train = splits["train"]
    classes = len(train.class_names)
    if train_size is not None:
        generator = make_generator(DATA_SEED + seed)
        kept = torch.randperm(len(train.labels), generator=generator)[:train_size]
        labels = flip_labels(train.labels[kept], flip, classes, generator)
        splits = splits | {"train": ImageSet(train.images[kept], labels, train.class_names)}
    reference = ImageBatches(*splits["train"][:2], 1)

    def batches(
        split: str, batch_size: int, generator: torch.Generator | None = None
    ) -> TensorBatches:
        return ImageBatches(
            *splits[split][:2],
            batch_size,
            generator=generator,
            device=device,
            mean=reference.mean,
            std=reference.std,
        )

    counts = splits["test"].labels.bincount()
    chance = 1 - counts.max().item() / counts.sum().item()
    return Task(batches, train.images[0].numel(), classes, chance, None)
