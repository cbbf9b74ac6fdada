"""少量标签的实验：抽有标签的样本，把图像变成网络的输入，各种做法各跑一遍。

每一种做法都只看 ``n`` 个训练标签（每类）；要选超参数的（``k``、``λ``）另有同样多的验证标签。
测试集只在最后用来算准确率。

维度约定：``B, C, H, W``；``N`` 个样本，``C`` 维特征，``K`` 个类别。
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_03_optimization_regularization.schedulers import WarmupCosineLR
from chapter_05_resnet_modern_cnn.transfer import (
    attach_head,
    extract,
    fit_probe,
    freeze,
    knn_predict,
    parameter_groups,
    train_mode,
)
from utils import UserError, make_generator
from utils.datasets import ImageSet

NEIGHBOURS = (1, 3, 5, 10, 20)  # 试哪些 k
PENALTIES = (1.0, 0.1, 0.01, 0.001)  # 试哪些 λ，由大到小
BATCH = 32
EVAL_BATCH = 250
HEAD_LR, SCRATCH_LR = 0.1, 0.1
BACKBONE_SCALE = 0.3  # 微调时主干的学习率是头的几倍
WEIGHT_DECAY = 5e-4
PIXELS = 16  # 像素，「以像素为特征」的对照把图缩到多大

# ---------------------------------------------------------------- 数据


@dataclass(frozen=True)
class Inputs:
    """目标域的图像 -> 源域的网络认得的输入：通道、边长、归一化都照源域的。

    参数:
        mean, std: 源域训练集的，``(3,)``；用目标域自己的，特征就不是训练时的那一套了。
        size: 边长，像素。
    """

    mean: Tensor
    std: Tensor
    size: int
    device: torch.device | str = "cpu"

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 ``(B, 1 或 3, S, S)`` -> float32 ``(B, 3, size, size)``。"""
        x = images.to(self.device).float() / 255
        x = x.expand(-1, 3, -1, -1)
        margin = self.size - x.shape[2]
        if 0 < margin <= 4 and margin % 2 == 0:  # 28 -> 32：四周补黑，不必插值
            x = F.pad(x, [margin // 2] * 4)
        elif margin:
            size = (self.size, self.size)
            x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
        mean, std = (v.to(x).view(-1, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std

    def batches(self, images: Tensor) -> Iterator[Tensor]:
        """逐批产出网络的输入。"""
        return (self(part) for part in images.split(EVAL_BATCH))


def nested_order(labels: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """各类打乱之后的下标 ``(K, 最少一类的张数)``：前 ``n`` 列就是每类 ``n`` 张，大的包含小的。"""
    shuffled = torch.randperm(len(labels), generator=generator)
    rows = [shuffled[labels[shuffled] == c] for c in range(classes)]
    shortest = min(map(len, rows))
    return torch.stack([row[:shortest] for row in rows])


@dataclass(frozen=True)
class Task:
    """目标域的任务：图像、标签，与若干次抽样的次序。"""

    train: ImageSet
    val: ImageSet
    test: ImageSet
    orders: list[tuple[Tensor, Tensor]]  # 每次抽样：训练与验证各自的 nested_order

    @classmethod
    def draw(
        cls, splits: dict[str, ImageSet], budgets: Sequence[int], draws: int, seed: int
    ) -> Task:
        """抽 ``draws`` 次。

        异常:
            UserError: 某一类不够最大的标签数，或验证集里缺了某一类。
        """
        classes, orders = len(splits["train"].class_names), []
        for index in range(draws):
            generator = make_generator(seed + index)
            train, val = (
                nested_order(splits[s].labels, classes, generator) for s in ("train", "val")
            )
            if train.shape[1] < max(budgets) or val.shape[1] < 1:
                raise UserError(
                    f"--labels 要每类 {max(budgets)} 张训练图，而最少的一类只有 {train.shape[1]} "
                    f"张（验证 {val.shape[1]} 张，至少要 1 张）：请减小 --labels 或增加图片"
                )
            orders.append((train[:, : max(budgets)], val[:, : max(budgets)]))
        return cls(*(splits[s] for s in ("train", "val", "test")), orders)

    @property
    def classes(self) -> int:
        """类别数。"""
        return len(self.train.class_names)

    def chosen(self, index: int, count: int) -> tuple[Tensor, Tensor]:
        """第 ``index`` 次抽样里每类 ``count`` 张：训练与验证的下标。"""
        train, val = self.orders[index]
        return train[:, :count].flatten(), val[:, :count].flatten()


class Tables(NamedTuple):
    """一个特征提取器在三个划分上的特征表；没有抽到的行是零。"""

    train: Tensor
    val: Tensor
    test: Tensor


def tabulate(task: Task, features: Callable[[Tensor], Tensor]) -> Tables:
    """只算抽到的图；``features`` 把 uint8 图像变成 ``(N, C)``。"""
    tables = []
    for which, split in enumerate((task.train, task.val)):
        used = torch.cat([order[which].flatten() for order in task.orders]).unique()
        found = features(split.images[used])
        tables.append(found.new_zeros(len(split.labels), found.shape[1]).index_copy(0, used, found))
    return Tables(*tables, features(task.test.images))


def backbone_features(backbone: nn.Module, inputs: Inputs) -> Callable[[Tensor], Tensor]:
    """以网络的输出为特征。"""
    return lambda images: extract(backbone, inputs.batches(images))


def pixel_features(images: Tensor) -> Tensor:
    """以像素为特征：灰度，缩到 ``PIXELS`` 见方，``(N, PIXELS²)``；没有任何网络的对照。"""
    grey = images.float().mean(dim=1, keepdim=True) / 255
    return F.adaptive_avg_pool2d(grey, PIXELS).flatten(1)


# ---------------------------------------------------------------- 冻结的特征


def share_right(predicted: Tensor, labels: Tensor) -> float:
    """准确率。"""
    return (predicted == labels).double().mean().item()


def best_knn(task: Task, tables: Tables, index: int, count: int) -> float:
    """kNN：在验证集上选 ``k``，返回测试准确率。"""
    train, val = task.chosen(index, count)
    known = (tables.train[train], task.train.labels[train])

    def score(queries: Tensor, labels: Tensor, k: int) -> float:
        guess = knn_predict(*known, queries, k=k, num_classes=task.classes)
        return share_right(guess, labels)

    tried = [k for k in NEIGHBOURS if k <= len(train)]
    k = max(tried, key=lambda k: score(tables.val[val], task.val.labels[val], k))
    return score(tables.test, task.test.labels, k)


def best_probe(task: Task, tables: Tables, index: int, count: int) -> float:
    """线性探针：在验证集上选 ``λ``，返回测试准确率。"""
    train, val = task.chosen(index, count)
    best, kept, probe = -1.0, None, None
    for l2 in PENALTIES:
        probe = fit_probe(tables.train[train], task.train.labels[train], task.classes, l2, probe)
        score = share_right(probe(tables.val[val]).argmax(dim=1), task.val.labels[val])
        if score > best:
            best, kept = score, probe
    return share_right(kept(tables.test).argmax(dim=1), task.test.labels)


# ---------------------------------------------------------------- 梯度下降


def descend(
    model: nn.Module,
    samples: Tensor,
    labels: Tensor,
    groups: list[dict],
    steps: int,
    generator: torch.Generator,
    prepare: Callable[[Tensor], Tensor],
) -> None:
    """Nesterov 动量 SGD 走 ``steps`` 步，预热之后余弦下降；模型处于调用者设好的模式。

    参数:
        prepare: 取出的一批 -> 模型的输入。
    """
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY)
    schedule = WarmupCosineLR(optimizer, max(steps // 10, 1), steps)
    batch, queue = min(BATCH, len(samples)), torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(queue) < batch:  # 余下的不足一批：重新打乱
            queue = torch.randperm(len(samples), generator=generator)
        chosen, queue = queue[:batch], queue[batch:]
        optimizer.zero_grad()
        output = model(prepare(samples[chosen]))
        F.cross_entropy(output, labels[chosen].to(output.device)).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def measured_accuracy(model: nn.Module, task: Task, inputs: Inputs) -> float:
    """测试准确率，评估模式。"""
    model.eval()
    guess = torch.cat([model(x).argmax(dim=1).cpu() for x in inputs.batches(task.test.images)])
    return share_right(guess, task.test.labels)


def fit_head(task: Task, tables: Tables, index: int, count: int, steps: int) -> float:
    """只训练头（SGD），在缓存的特征上：主干冻结又处于评估模式，一张图的特征每一轮都相同。"""
    train, _ = task.chosen(index, count)
    head = nn.Linear(tables.test.shape[1], task.classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    groups = [{"params": list(head.parameters()), "lr": HEAD_LR}]
    generator = make_generator(index)
    features, labels = tables.train[train], task.train.labels[train]
    descend(head, features, labels, groups, steps, generator, lambda f: f)
    with torch.no_grad():
        return share_right(head(tables.test).argmax(dim=1), task.test.labels)


def fine_tune(
    backbone: nn.Module,
    channels: int,
    task: Task,
    inputs: Inputs,
    index: int,
    count: int,
    steps: int,
    pretrained: bool = True,
) -> nn.Module:
    """整个网络都训练；预训练过的主干用较小的学习率，从头训练的用同一个。返回训练好的网络。"""
    train, _ = task.chosen(index, count)
    model = attach_head(backbone, channels, task.classes).to(inputs.device)
    groups = (
        parameter_groups(model, HEAD_LR, BACKBONE_SCALE)
        if pretrained
        else parameter_groups(model, SCRATCH_LR, 1.0)
    )
    images, labels = task.train.images[train], task.train.labels[train]
    train_mode(model)
    descend(model, images, labels, groups, steps, make_generator(index), inputs)
    return model


class Drift(NamedTuple):
    """冻结的主干留在训练模式的后果。"""

    moved: float  # 特征的相对变化 ‖f' − f‖/‖f‖；参数一个也没有变
    wrong: float  # 主干处于训练模式训练出来的，测试准确率
    right: float  # 主干处于评估模式


def frozen_in_the_wrong_mode(
    backbone: nn.Module,
    channels: int,
    task: Task,
    inputs: Inputs,
    count: int,
    steps: int,
) -> Drift:
    """只训练头，主干不求梯度，但一次忘了 ``eval()``，一次没有忘。"""
    train, _ = task.chosen(0, count)
    images, labels = task.train.images[train], task.train.labels[train]
    scores, moved = [], 0.0
    for mode in (nn.Module.train, train_mode):
        model = attach_head(backbone, channels, task.classes).to(inputs.device)
        freeze(model.backbone)
        before = extract(model.backbone, inputs.batches(images))
        mode(model)
        groups = parameter_groups(model, HEAD_LR, 0.0)
        descend(model, images, labels, groups, steps, make_generator(0), inputs)
        after = extract(model.backbone, inputs.batches(images))
        moved = max(moved, ((after - before).norm() / before.norm()).item())
        scores.append(measured_accuracy(model, task, inputs))
    return Drift(moved, *scores)
