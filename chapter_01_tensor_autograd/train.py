"""用本章的引擎训练 MLP，旁边放一个权重、批次都相同的 PyTorch 网络：两条损失曲线应当重合。

    python train.py                       # 双月
    python train.py --task spiral         # 双螺旋
    python train.py --task digits         # 合成数字
    python train.py --task digits --dataset mnist --download

``train_one_epoch`` 与 ``evaluate`` 对两方一字不改：引擎的接口与 PyTorch 相同。``--device`` 只管
PyTorch 一方，引擎总在 CPU 上。
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

if not __package__:  # 直接运行脚本时，把仓库根目录加入模块搜索路径
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chapter_01_tensor_autograd import engine, figures, optim
from chapter_01_tensor_autograd import functional as F
from chapter_01_tensor_autograd.data import TASKS, Task, make_task
from chapter_01_tensor_autograd.nn import ACTIVATIONS, MLP, TorchMLP
from utils import (
    Result,
    Timer,
    TorchDevice,
    add_common_args,
    conclude,
    get_device,
    make_generator,
    model_summary,
    prepare_out_dir,
    run_main,
    set_seed,
)
from utils.cli import ArgumentParser, int_list, positive_float, positive_int
from utils.datasets import IMAGE_DATASETS
from utils.topics import Check

HERE = Path(__file__).resolve().parent

Batches = Iterable[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Side:
    """训练的一方：本章的引擎，或 PyTorch。"""

    name: str
    model: Callable[[Any], Any]
    optimizer: Any
    loss_fn: Callable[[Any, Any], Any]
    wrap: Callable[[np.ndarray], Any]  # 数组 -> 这一方的张量
    unwrap: Callable[[Any], np.ndarray]  # 这一方的张量 -> 数组
    no_grad: Callable[[], Any]


def make_sides(
    sizes: Sequence[int], activation: str, lr: float, seed: int, device: TorchDevice, dtype: type
) -> tuple[Side, Side]:
    """两方：同样的结构、初始权重与优化器。"""
    ours = MLP(sizes, activation, make_generator(seed), dtype)
    twin = TorchMLP(sizes, activation).to(device.device, torch.from_numpy(np.empty(0, dtype)).dtype)
    twin.load_state_dict(ours.state_dict())
    return (
        Side(
            "engine",
            ours,
            optim.Adam(ours.parameters(), lr),
            F.cross_entropy,
            engine.as_tensor,
            engine.Tensor.numpy,
            engine.no_grad,
        ),
        Side(
            "PyTorch",
            twin,
            torch.optim.Adam(twin.parameters(), lr),
            nn.functional.cross_entropy,
            lambda array: torch.from_numpy(array).to(device.device),
            lambda tensor: tensor.cpu().numpy(),
            torch.no_grad,
        ),
    )


# ---------------------------------------------------------------- 训练循环


def train_one_epoch(side: Side, batches: Batches) -> list[float]:
    """把训练集过一遍，返回每一步的损失（nats）。"""
    losses = []
    for x, y in batches:
        side.optimizer.zero_grad()
        loss = side.loss_fn(side.model(side.wrap(x)), side.wrap(y))
        loss.backward()
        side.optimizer.step()
        losses.append(loss.item())
    return losses


def evaluate(side: Side, batches: Batches) -> tuple[float, float]:
    """(平均损失, 准确率)；都是总和除以总数，不是各批平均的平均。"""
    loss, correct, count = 0.0, 0, 0
    with side.no_grad():
        for x, y in batches:
            logits = side.model(side.wrap(x))
            loss += side.loss_fn(logits, side.wrap(y)).item() * len(y)
            correct += int((side.unwrap(logits).argmax(axis=1) == y).sum())
            count += len(y)
    return loss / count, correct / count


def fit(
    sides: Sequence[Side], task: Task, epochs: int, batch_size: int, seed: int
) -> dict[str, dict[str, list[float]]]:
    """两方轮流各训练一轮，数据的次序相同；返回每方每步的训练损失与每轮的验证损失、准确率。"""
    record = {side.name: {"loss": [], "val_loss": [], "val_accuracy": []} for side in sides}
    generators = {side.name: make_generator(seed) for side in sides}  # 各有一个，走同样的次序
    with tqdm(total=epochs, desc="训练", unit="轮") as bar:
        for _ in range(epochs):
            for side in sides:
                train = task.batches("train", batch_size, generators[side.name])
                record[side.name]["loss"] += train_one_epoch(side, train)
                loss, accuracy = evaluate(side, task.batches("val", 1000))
                record[side.name]["val_loss"].append(loss)
                record[side.name]["val_accuracy"].append(accuracy)
            ours = record[sides[0].name]
            bar.set_postfix_str(f"验证损失 {ours['val_loss'][-1]:.4f}")
            bar.update()
    return record


# ---------------------------------------------------------------- 入口


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description="用本章的引擎训练 MLP，与 PyTorch 逐步比较")
    add_common_args(parser, out_dir=HERE / "outputs", batch_size=64, datasets=IMAGE_DATASETS)
    add = parser.add_argument
    add("--task", choices=TASKS, default="moons", help="任务")
    add("--epochs", type=positive_int, metavar="N", help="训练轮数（默认 30，digits 为 10）")
    add("--lr", type=positive_float, metavar="X", help="学习率（默认 0.005，digits 为 0.001）")
    add("--hidden", type=int_list, default=(128, 64), metavar="N,N", help="各隐藏层的宽度")
    add("--activation", choices=ACTIVATIONS, default="relu", help="激活函数")
    args = parser.parse_args(argv)
    digits = args.task == "digits"
    args.epochs = args.epochs or (10 if digits else 30)
    args.lr = args.lr or (1e-3 if digits else 5e-3)
    if not digits and (args.dataset != IMAGE_DATASETS[0] or args.download):
        parser.error("--dataset 与 --download 只用于 --task digits，请加上它")
    if args.smoke:
        args.epochs = min(args.epochs, 2)
    if args.out_dir == HERE / "outputs":  # --smoke 另放一处，不冲掉真正的结果
        args.out_dir /= f"{args.task}_smoke" if args.smoke else args.task
    return args


def boundary(side: Side, grid: np.ndarray) -> np.ndarray:
    """网格点上类别 1 的概率。"""
    with side.no_grad():
        logits = side.unwrap(side.model(side.wrap(grid)))
    return 1 / (1 + np.exp(np.clip(logits[:, 0] - logits[:, 1], -50, 50)))


def main(argv: Sequence[str] | None = None) -> dict:
    """训练、评估、画图、下结论；返回写进 ``metrics.json`` 的内容。"""
    args = parse_args(argv)
    out_dir = prepare_out_dir(args.out_dir)
    set_seed(args.seed)
    device = get_device(args.device)
    torch.set_num_threads(1)  # 网络小，多线程的同步比运算还贵
    dtype = np.float32 if device.type == "mps" else np.float64  # MPS 没有 float64
    print(f"设备  引擎 NumPy，PyTorch {device.describe()}，{np.dtype(dtype)}")
    with Timer(device) as timer:
        task = make_task(
            args.task,
            dtype=dtype,
            dataset=args.dataset,
            data_dir=args.data_dir,
            download=args.download,
            smoke=args.smoke,
        )
        sizes = (task.features, *args.hidden, task.classes)
        print(model_summary(TorchMLP(sizes, args.activation), torch.zeros(1, task.features)))
        print(task.expectation.announce())
        sides = make_sides(sizes, args.activation, args.lr, args.seed, device, dtype)
        record = fit(sides, task, args.epochs, args.batch_size, args.seed)
    scores = {side.name: evaluate(side, task.batches("test", 1000))[1] for side in sides}
    ours, theirs = (np.array(record[side.name]["loss"]) for side in sides)
    gap = np.abs(ours - theirs)
    for name, score in scores.items():
        print(f"测试  {name:8s} {task.expectation.format(score)}")
    print(f"损失  {len(gap)} 步，与 PyTorch 之差至多 {gap.max():.1e}")
    drawing = {"curves.png": figures.curves_figure(record)}
    if task.posterior is not None:
        grid, extent = figures.plane_grid(task.splits["test"].inputs)
        panels = {side.name: boundary(side, grid.astype(dtype)) for side in sides}
        bayes = task.posterior(torch.from_numpy(grid)).numpy()
        drawing["boundary.png"] = figures.boundary_figure(
            panels, bayes, extent, *task.splits["test"]
        )
    tolerance = 1e-9 if dtype is np.float64 else 1e-2
    check = Check("每步损失与 PyTorch 之差的最大值", 1.0, (tolerance, 0.0))
    return conclude(
        out_dir,
        [Result(task.expectation, scores["engine"]), Result(check, float(gap.max()))],
        timer,
        smoke=args.smoke,
        figures=drawing,
        test_scores=scores,
        history=record,
    )


if __name__ == "__main__":
    run_main(main)
