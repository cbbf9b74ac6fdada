"""本章的数据：读入三个划分，配好归一化、增强与混合，装成批迭代器，再分给各个进程。

    uint8 图像 -> 归一化 -> 裁剪、翻转 -> mixup / CutMix -> 本进程的一份

前三步对全局的一批进行，随机数与进程数无关，所以一个进程与八个进程看到的数据逐位相同。

维度约定：``B, C, H, W``。
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from chapter_03_optimization_regularization.regularization import cutmix, mixup
from chapter_04_cnn_classic.augment import Augment
from utils import UserError
from utils.datasets import ImageBatches, ImageSet, channel_stats, load_splits
from utils.distributed import Shard, world

DATASETS = ("synth-objects", "cifar10", "folder", "synth-digits", "fashion-mnist", "mnist")

# 物体可以左右翻转，但箭头与 L 形翻转之后就不是它自己了，数字更不行
AUGMENTS: dict[str, Augment] = {
    "synth-objects": Augment(shift=2),
    "synth-digits": Augment(shift=1),
    "mnist": Augment(shift=2, degrees=10),
    "fashion-mnist": Augment(hflip=0.5, shift=2),
    "cifar10": Augment(hflip=0.5, shift=4),
    "folder": Augment(hflip=0.5, shift=4),
}
EVAL_BATCH = 500


@dataclass(frozen=True)
class Mix:
    """每一批随机选用 mixup 或 CutMix（两者都给出时各一半），标签随之变成软标签 ``(B, 类别数)``。

    参数:
        batches: 产出 ``(x, y)``，``y`` 为 int64 ``(B,)``。
        num_classes: 类别数。
        mixup, cutmix: 各自的 Beta 分布参数；0 表示不用。
        generator: CPU 上的生成器。
    """

    batches: Iterable[tuple[Tensor, Tensor]]
    num_classes: int
    mixup: float
    cutmix: float
    generator: torch.Generator

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        choices = [(mixup, self.mixup), (cutmix, self.cutmix)]
        choices = [(mix, alpha) for mix, alpha in choices if alpha > 0]
        for x, y in self.batches:
            index = int(torch.randint(len(choices), (), generator=self.generator))
            mix, alpha = choices[index]
            yield mix(x, y, self.num_classes, alpha, self.generator)


@dataclass(frozen=True)
class Data:
    """三个划分，与训练集的每通道均值、标准差（验证与测试用同一组）。"""

    splits: dict[str, ImageSet]
    mean: Tensor
    std: Tensor
    augment: Augment

    @property
    def class_names(self) -> tuple[str, ...]:
        """类别的名字。"""
        return self.splits["train"].class_names

    @property
    def shape(self) -> tuple[int, ...]:
        """一张图的形状 ``(C, H, W)``。"""
        return tuple(self.splits["train"].images.shape[1:])

    @property
    def chance(self) -> float:
        """机会线：总猜测试集里最多的一类。"""
        labels = self.splits["test"].labels
        return labels.bincount().max().item() / len(labels)

    def batches(
        self,
        split: str,
        batch_size: int = EVAL_BATCH,
        generator: torch.Generator | None = None,
        *,
        augmented: bool = False,
        device: torch.device | str = "cpu",
    ) -> ImageBatches:
        """一个划分的批迭代器；给出 ``generator`` 时打乱并丢掉零头，``augmented`` 时增强。"""
        black = -self.mean / self.std  # 归一化之后的黑色
        images, labels, _ = self.splits[split]
        return ImageBatches(
            images,
            labels,
            batch_size,
            mean=self.mean,
            std=self.std,
            generator=generator,
            drop_last=generator is not None,
            transform=replace(self.augment, fill=black) if augmented else None,
            device=device,
        )

    def steps(self, batch_size: int) -> int:
        """训练一轮的批数；``batch_size`` 是全局的。

        异常:
            UserError: 训练集不足一批，或 ``batch_size`` 不能由各进程平分。
        """
        count, size = len(self.splits["train"].labels), world().size
        if batch_size > count:
            raise UserError(f"--batch-size {batch_size} 超过训练集的 {count} 张：请减小")
        if batch_size % size:
            raise UserError(
                f"--batch-size {batch_size} 不能由 {size} 个进程平分：应为 {size} 的倍数，"
                f"如 {batch_size // size * size or size}"
            )
        return count // batch_size

    def training(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        augmented: bool,
        mixup: float,
        cutmix: float,
        device: torch.device | str,
    ) -> tuple[Shard, int]:
        """训练用的批（本进程的一份）与一轮的批数；参数与异常见 ``steps``、``Mix``。"""
        steps = self.steps(batch_size)
        images = self.batches("train", batch_size, generator, augmented=augmented, device=device)
        mixed = Mix(images, len(self.class_names), mixup, cutmix, generator)
        return Shard(mixed if mixup or cutmix else images, *world()), steps

    def evaluation(self, split: str, device: torch.device | str) -> Shard:
        """一个划分里本进程的一份；各进程的合起来不重不漏。"""
        return Shard(self.batches(split, device=device), *world())


def load_data(
    dataset: str,
    data_dir: Path = Path("data"),
    *,
    download: bool = False,
    limit: int | None = None,
    image_size: int = 32,
) -> Data:
    """读入一个数据集。

    参数:
        dataset: ``DATASETS`` 之一。
        data_dir: 真实数据所在的文件夹。
        download: 缺失时是否下载。
        limit: 每个划分至多取多少张（``--smoke`` 用）。
        image_size: ``folder`` 的图片缩放到的边长，像素。

    异常:
        UserError: 文件缺失或损坏，或只有一个类别。
    """
    splits = load_splits(dataset, data_dir, download=download, limit=limit, image_size=image_size)
    mean, std = channel_stats(splits["train"].images)
    return Data(splits, mean, std, AUGMENTS[dataset])
