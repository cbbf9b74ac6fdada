"""本章的数据与任务：双月、双螺旋、数字，一律是 NumPy 数组，引擎与 PyTorch 吃同样的批。

双月与双螺旋由 ``utils.synth_points`` 生成，贝叶斯准确率算得出来；图像由 ``utils.datasets`` 读入，
以 uint8 留在内存里，取出一批才换成浮点数并归一化。三个划分各自独立抽取，没有重叠。

维度约定：``N`` 样本数；输入 ``(N, F)``，类别 int64 ``(N,)``。
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils import Expectation, make_generator
from utils.datasets import SPLITS, channel_stats, load_images
from utils.synth_points import moon_bayes, spiral_bayes, two_moons, two_spirals

TASKS = ("moons", "spiral", "digits")
POINT_SIZES = {"train": 4_000, "val": 1_000, "test": 4_000}
DATA_SEED = 1  # 数据本身的种子，与训练的种子无关


class Split(NamedTuple):
    """一个划分：输入（图像为 uint8，尚未归一化）与类别。"""

    inputs: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Task:
    """一个分类任务的数据与预期；``normalize`` 把取出的一批输入变成浮点数 ``(B, F)``。"""

    splits: dict[str, Split]
    features: int
    classes: int
    expectation: Expectation
    normalize: Callable[[np.ndarray], np.ndarray]
    posterior: Callable[[Tensor], Tensor] | None = None  # 贝叶斯后验，算不出来的为 None

    def batches(
        self, split: str, batch_size: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """依次产出 ``(x, y)``；给出 ``generator`` 时打乱。最后一批可能不足。"""
        inputs, labels = self.splits[split]
        order = np.arange(len(labels))
        if generator is not None:
            order = torch.randperm(len(labels), generator=generator).numpy()
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            yield self.normalize(inputs[chosen]), labels[chosen]


def make_task(
    name: str,
    *,
    dtype: type = np.float64,
    dataset: str = "synth-digits",
    data_dir: Path = Path("data"),
    download: bool = False,
    smoke: bool = False,
) -> Task:
    """按名字准备任务：``moons``、``spiral`` 或 ``digits``；``smoke`` 时只取一小部分。"""
    if name == "digits":
        return _digits_task(dataset, data_dir, download, 128 if smoke else None, dtype)
    make, posterior = {"moons": (two_moons, moon_bayes), "spiral": (two_spirals, spiral_bayes)}[
        name
    ]
    generator = make_generator(DATA_SEED)
    sizes = dict.fromkeys(SPLITS, 128) if smoke else POINT_SIZES
    drawn = {split: make(sizes[split], generator) for split in SPLITS}
    points, labels = drawn["test"]
    bayes = ((posterior(points) > 0.5) == labels).float().mean().item()
    expectation = Expectation(
        "测试准确率", 0.5, (bayes - 0.015, bayes), floor=bayes, tolerance=0.004, percent=True
    )
    splits = {split: Split(x.numpy(), y.numpy()) for split, (x, y) in drawn.items()}
    return Task(splits, 2, 2, expectation, lambda x: x.astype(dtype), posterior)


# 实测过的测试准确率区间；没有测过的数据集只按机会线给出宽松的下限
DIGITS_BANDS = {"synth-digits": (0.925, 0.96), "mnist": (0.965, 0.985)}


def _digits_task(
    dataset: str, data_dir: Path, download: bool, limit: int | None, dtype: type
) -> Task:
    loaded = {
        split: load_images(dataset, split, data_dir, download=download, limit=limit)
        for split in SPLITS
    }
    train = loaded["train"]
    mean, std = (value.repeat_interleave(train.images[0, 0].numel()).numpy().astype(dtype) for
                 value in channel_stats(train.images))  # fmt: skip

    def normalize(pixels: np.ndarray) -> np.ndarray:
        return (pixels / dtype(255) - mean) / std

    splits = {
        split: Split(data.images.flatten(1).numpy(), data.labels.numpy())
        for split, data in loaded.items()
    }
    labels, classes = splits["test"].labels, len(train.class_names)
    chance = np.bincount(labels).max() / len(labels)  # 总猜最多的一类
    band = DIGITS_BANDS.get(dataset, (min(3 * chance, (1 + chance) / 2), 1.0))
    expectation = Expectation("测试准确率", float(chance), band, percent=True)
    return Task(splits, train.images[0].numel(), classes, expectation, normalize)
