"""本章几个训练脚本共用的一步一步：优化器与调度、走一轮、评估。

维度约定：``B, C, H, W``；``K`` 个类别。
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from chapter_03_optimization_regularization.averaging import EMA, update_bn
from chapter_03_optimization_regularization.schedulers import WarmupCosineLR
from chapter_05_resnet_modern_cnn.data import Data
from chapter_05_resnet_modern_cnn.models import Recipe
from utils import TorchDevice, make_generator
from utils.distributed import sum_over_processes

Batches = Iterable[tuple[Tensor, Tensor]]
BN_BATCHES = 20  # 权重平均之后，用多少批训练数据重算 BatchNorm 的统计量


def make_optimizer(
    model: nn.Module, name: str, lr: float, weight_decay: float, total_steps: int
) -> tuple[torch.optim.Optimizer, WarmupCosineLR]:
    """优化器，与每步调用一次的调度：前 1/20 的步数预热，其余沿余弦降到零。

    只衰减卷积核与矩阵：偏置与归一化的缩放、平移不衰减。

    参数:
        name: ``sgd``（Nesterov 动量 0.9）或 ``adamw``。
        lr: 峰值学习率。
        total_steps: 总步数。
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=lr)
    return optimizer, WarmupCosineLR(optimizer, total_steps // 20, total_steps)


def train_one_epoch(
    run: Callable[[Tensor], Tensor],
    model: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    schedule: WarmupCosineLR,
    device: TorchDevice,
    *,
    amp: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    label_smoothing: float = 0.0,
    average: EMA | None = None,
) -> float:
    """把训练集过一遍，返回平均损失（nats；训练过程中的，权重一直在变；多进程时是全局的）。

    参数:
        run: 前向所调用的：``model`` 本身，或套上 DDP、编译之后的；与 ``model`` 共用参数。
        amp: 卷积与矩阵乘法所用的半精度；权重仍是 float32。
        average: 给出时，每步之后并入权重的指数移动平均。
    """
    model.train()
    total, count = torch.zeros((), device=device.device), 0
    for x, y in batches:
        optimizer.zero_grad()
        x = x.contiguous(memory_format=memory_format)
        with device.autocast(amp):
            loss = F.cross_entropy(run(x), y, label_smoothing=label_smoothing)
        loss.backward()
        optimizer.step()
        schedule.step()
        if average is not None:
            average.update_parameters(model)
        total += loss.detach() * len(y)
        count += len(y)
    # 每轮只取一次数值：.item() 会让 GPU 停下来等
    total, count = sum_over_processes(torch.stack([total, torch.full_like(total, count)])).tolist()
    return total / count


def train_epochs(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    epochs: int,
    batch_size: int,
    seed: int,
    device: TorchDevice,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> nn.Module:
    """按 ``recipe`` 训练几轮，带增强，不混合，不挑轮次；小实验共用，完整的循环见 train.py。"""
    batches, steps = data.training(
        batch_size, make_generator(seed), augmented=True, mixup=0, cutmix=0, device=device.device
    )
    settings = (recipe.optimizer, recipe.lr, recipe.weight_decay, epochs * steps)
    optimizer, schedule = make_optimizer(model, *settings)
    layout = {"memory_format": memory_format}
    quiet = multiprocessing.parent_process() is not None  # 几个进程的进度条会搅在一起
    for _ in tqdm(range(epochs), desc="训练", unit="轮", leave=False, disable=quiet):
        train_one_epoch(model, model, batches, optimizer, schedule, device, **layout)
    return model


def refresh_statistics(average: EMA, batches: Batches) -> nn.Module:
    """用头 ``BN_BATCHES`` 批重算平均权重的 BatchNorm 统计量，返回这个网络；评估之前调用。"""
    update_bn(itertools.islice(batches, BN_BATCHES), average.module)
    return average.module


class Score(NamedTuple):
    """一个划分上的得分。"""

    loss: float  # 平均交叉熵，nats
    accuracy: float
    confusion: Tensor  # int64 (K, K)，行为真实类别，列为预测


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Batches,
    num_classes: int,
    device: TorchDevice,
    *,
    amp: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Score:
    """评估；多进程时各算自己的一份，汇总的是和与计数，所以与进程数无关。"""
    model.eval()
    loss = torch.zeros((), device=device.device)
    cells = torch.zeros(num_classes**2, dtype=torch.int64, device=device.device)
    for x, y in batches:
        x = x.contiguous(memory_format=memory_format)
        with device.autocast(amp):
            output = model(x).float()
        loss += F.cross_entropy(output, y, reduction="sum")
        cells += (y * num_classes + output.argmax(dim=1)).bincount(minlength=num_classes**2)
    cells = sum_over_processes(cells).view(num_classes, num_classes).cpu()
    total = int(cells.sum())
    mean = sum_over_processes(loss).item() / total
    return Score(mean, cells.trace().item() / total, cells)
