"""把数据、损失、评分与预期绑成一个任务，使 ``train.py`` 的循环对三个任务完全相同。

任务：``spiral`` 双螺旋分类（贝叶斯准确率可算）、``digits`` 图像分类、``regression`` Friedman
回归（噪声方差已知）或用户自己的 CSV。
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from chapter_02_nn_basics_mlp.data import FRIEDMAN_NOISE, friedman, random_shift, read_csv
from chapter_02_nn_basics_mlp.losses import cross_entropy, mse
from utils import Expectation, UserError, make_generator
from utils.datasets import SPLITS, ImageBatches, TensorBatches, load_images
from utils.synth_points import spiral_bayes, two_spirals


def correct(output: Tensor, target: Tensor) -> Tensor:
    """每个样本是否分对，0/1，``(B, C), (B,) -> (B,)``。"""
    return (output.argmax(dim=-1) == target).float()


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """每个样本的平方误差，``(B, 1), (B, 1) -> (B,)``。"""
    return (output - target).square().squeeze(-1)


@dataclass(frozen=True)
class Task:
    """一个任务的数据与评分方式；``train.py`` 的循环对三个任务完全相同。

    ``batches(split, batch_size, generator)`` 返回批迭代器；``score`` 给出每个样本的得分，
    取平均就是 ``expectation.metric``。
    """

    batches: Callable[..., TensorBatches]
    in_features: int
    out_features: int
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]
    expectation: Expectation
    baseline: str  # 没有隐藏层的对照模型叫什么
    class_names: tuple[str, ...] = ()
    baseline_lr: float = 1.0  # 对照模型的学习率是 --lr 的几倍


def make_task(
    name: str,
    *,
    smoke: bool = False,
    device: torch.device | str = "cpu",
    dataset: str = "synth-digits",
    data_dir: Path = Path("data"),
    download: bool = False,
    csv_file: Path | None = None,
    column: str | None = None,
) -> Task:
    """按名字准备任务：``spiral``、``digits`` 或 ``regression``。"""
    if name == "digits":
        limit = 256 if smoke else None
        return _digits_task(dataset, Path(data_dir), download, limit, device)
    sizes = {"train": 256, "val": 128, "test": 128} if smoke else POINT_SIZES
    if name == "spiral":
        return _spiral_task(sizes, device)
    if csv_file is not None:
        return _csv_task(csv_file, column or "", device)
    return _friedman_task(sizes, device)


POINT_SIZES = {"train": 12_000, "val": 2_000, "test": 2_000}
MIN_EPOCH = 12_000  # 用户的表格每轮至少训练这么多样本次
DATA_SEED = 2  # 数据本身的种子，与训练的种子无关


def _point_batches(
    splits: dict[str, tuple[Tensor, Tensor]],
    device: torch.device | str,
    split: str,
    batch_size: int,
    generator: torch.Generator | None = None,
) -> TensorBatches:
    return TensorBatches(*splits[split], batch_size, generator=generator, device=device)


def _draw(
    make: Callable[[int, torch.Generator], tuple[Tensor, Tensor]], sizes: dict[str, int]
) -> dict[str, tuple[Tensor, Tensor]]:
    generator = make_generator(DATA_SEED)
    return {split: make(sizes[split], generator) for split in SPLITS}


def _spiral_task(sizes: dict[str, int], device: torch.device | str) -> Task:
    splits = _draw(two_spirals, sizes)
    points, labels = splits["test"]
    bayes = ((spiral_bayes(points) > 0.5) == labels).float().mean().item()
    expectation = Expectation(
        "测试准确率", 0.5, (0.97, bayes), floor=bayes, tolerance=0.004, percent=True
    )
    batches = partial(_point_batches, splits, device)
    return Task(
        batches, 2, 2, cross_entropy, correct, expectation, "logistic", ("spiral 0", "spiral 1")
    )


def _regression_task(
    splits: dict[str, tuple[Tensor, Tensor]],
    expect: Callable[[float, float], Expectation],
    device: torch.device | str,
    repeats: int = 1,
) -> Task:
    """回归任务：输入与目标都按训练集标准化，得分换算回目标原来的单位。

    ``expect`` 由机会线（总报训练集均值的 MSE）与最小二乘线性回归的测试 MSE 给出预期；
    ``repeats`` 是每轮把训练集过几遍。
    """
    inputs, targets = splits["train"]
    scale = targets.std()
    x_std = inputs.std(dim=0)
    x_std = torch.where(x_std > 0, x_std, 1.0)  # 常数列
    standardized = {
        name: ((x - inputs.mean(dim=0)) / x_std, (y - targets.mean()) / scale)
        for name, (x, y) in splits.items()
    }

    def score(output: Tensor, target: Tensor) -> Tensor:
        return squared_error(output, target) * scale.to(output.device) ** 2

    def with_bias(x: Tensor) -> Tensor:
        return torch.cat([x, torch.ones(len(x), 1)], dim=1).double()

    (x, y), (x_test, y_test) = standardized["train"], standardized["test"]
    weights = torch.linalg.lstsq(with_bias(x), y.double(), driver="gelsd").solution
    linear = score(with_bias(x_test) @ weights, y_test).mean().item()
    chance = (splits["test"][1] - targets.mean()).square().mean().item()
    standardized["train"] = (x.repeat(repeats, 1), y.repeat(repeats, 1))
    batches = partial(_point_batches, standardized, device)
    return Task(
        batches, inputs.shape[1], 1, mse, score, expect(chance, linear), "linear", baseline_lr=10.0
    )


def _friedman_task(sizes: dict[str, int], device: torch.device | str) -> Task:
    floor = FRIEDMAN_NOISE**2

    def expect(chance: float, linear: float) -> Expectation:
        return Expectation("测试 MSE", chance, (1.6, 1.2), floor=floor, tolerance=0.1)

    return _regression_task(_draw(friedman, sizes), expect, device)


def _csv_task(path: Path, column: str, device: torch.device | str) -> Task:
    """用户自己的表格：随机划分 70/15/15。"""
    inputs, targets = read_csv(path, column)
    order = torch.randperm(len(inputs), generator=make_generator(DATA_SEED))
    cut = [round(0.7 * len(order)), round(0.85 * len(order))]
    parts = zip(SPLITS, order.tensor_split(cut), strict=True)

    def expect(chance: float, linear: float) -> Expectation:
        # 至少不比最小二乘的线性回归差三成，才算学会
        worse = min(0.9 * chance, 1.3 * linear)
        return Expectation(f"测试 MSE（最小二乘线性回归 {linear:.4g}）", chance, (worse, 0.0))

    splits = {name: (inputs[index], targets[index]) for name, index in parts}
    repeats = -(-MIN_EPOCH // len(splits["train"][0]))  # 小表格每轮重复若干遍，步数才够
    known = splits["train"][1]
    if (known == known[0]).all():  # 不看标准差：舍入会使常数列的标准差不恰为零
        raise UserError(f"{path} 的 {column!r} 列在训练集里是常数，没有可预测的东西")
    return _regression_task(splits, expect, device, repeats)


# 实测过的测试准确率区间；没有测过的数据集只按机会线给出宽松的下限
DIGITS_BANDS = {
    "synth-digits": (0.96, 0.985),
    "mnist": (0.983, 0.989),
}


def _digits_task(
    dataset: str, data_dir: Path, download: bool, limit: int | None, device: torch.device | str
) -> Task:
    splits = {
        split: load_images(dataset, split, data_dir, download=download, limit=limit)
        for split in SPLITS
    }
    train = splits["train"]
    reference = ImageBatches(train.images, train.labels, 1)

    def batches(
        split: str, batch_size: int, generator: torch.Generator | None = None
    ) -> ImageBatches:
        return ImageBatches(
            splits[split].images,
            splits[split].labels,
            batch_size,
            generator=generator,
            device=device,
            mean=reference.mean,
            std=reference.std,
            transform=random_shift if generator is not None else None,
        )

    classes = len(train.class_names)
    # 机会线：总猜最多的一类
    chance = splits["test"].labels.bincount().max().item() / len(splits["test"].labels)
    band = DIGITS_BANDS.get(dataset, (min(3 * chance, (1 + chance) / 2), 1.0))
    return Task(
        batches,
        train.images[0].numel(),
        classes,
        cross_entropy,
        correct,
        Expectation("测试准确率", chance, band, percent=True),
        "softmax",
        train.class_names,
    )
