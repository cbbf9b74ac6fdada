"""本章的数据：读入三个划分，配好归一化与增强，装成批迭代器。

数据集（``synth-digits``、``mnist``、``fashion-mnist``、``cifar10``、``folder``）由
``utils.datasets`` 读成 uint8 张量；增强的运算在 ``augment.py``，这里只决定哪个数据集用哪些。

维度约定：``B, C, H, W``。
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from chapter_04_cnn_classic.augment import Augment
from utils.datasets import ImageBatches, ImageSet, channel_stats, load_splits

# 数字不能翻转；自然图像左右翻转后仍是同一类
AUGMENTS: dict[str, Augment] = {
    "synth-digits": Augment(shift=1),
    "mnist": Augment(shift=2, degrees=10),
    "fashion-mnist": Augment(hflip=0.5, shift=2),
    "cifar10": Augment(hflip=0.5, shift=4),
    "folder": Augment(hflip=0.5, shift=4),
}
EVAL_BATCH = 500


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
    def in_channels(self) -> int:
        """图像的通道数。"""
        return self.splits["train"].images.shape[1]

    @property
    def image_size(self) -> int:
        """图像的边长，像素。"""
        return self.splits["train"].images.shape[2]

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
        """一个划分的批迭代器；给出 ``generator`` 时打乱，``augmented`` 时增强。"""
        black = -self.mean / self.std  # 归一化之后的黑色
        return ImageBatches(
            self.splits[split].images,
            self.splits[split].labels,
            batch_size,
            mean=self.mean,
            std=self.std,
            generator=generator,
            transform=replace(self.augment, fill=black) if augmented else None,
            device=device,
        )


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
        dataset: ``utils.datasets.IMAGE_DATASETS`` 之一。
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
