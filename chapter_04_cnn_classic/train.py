"""训练经典的 CNN：LeNet、AlexNet、NiN、VGG。

    python train.py                                       # LeNet 识别生成的手写数字
    python train.py --model lenet1998                     # 1998 年的原貌
    python train.py --dataset mnist --data-dir 文件夹      # 真实的 MNIST
    python train.py --model vgg11_bn --dataset cifar10 --data-dir 文件夹 --download
    python train.py --dataset folder --data-dir 文件夹     # 自己的图片，每类一个文件夹
    python train.py --handmade                            # 卷积与池化全用本章手写的

训练集用来求梯度，验证集用来挑选轮次，测试集只在最后看一次。被杀掉之后加 ``--resume``
再次运行，最终权重与没有中断时逐位相同（CPU 上）。
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

if not __package__:  # 直接运行脚本时，把仓库根目录加入模块搜索路径
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chapter_04_cnn_classic import figures
from chapter_04_cnn_classic.data import Data, load_data
from chapter_04_cnn_classic.layers import use_handmade
from chapter_04_cnn_classic.models import MODELS, build_model
from chapter_04_cnn_classic.recipe import adamw_with_cosine
from utils import (
    Expectation,
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
from utils.cli import ArgumentParser, non_negative_float, positive_float, positive_int
from utils.datasets import IMAGE_DATASETS, TensorBatches
from utils.file_io_util import save_checkpoint
from utils.resume import TrainingState

HERE = Path(__file__).resolve().parent

# ---------------------------------------------------------------- 训练循环


def train_one_epoch(
    model: nn.Module,
    batches: TensorBatches,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    device: TorchDevice,
    amp: torch.dtype | None,
) -> float:
    """把训练集过一遍，返回平均交叉熵（nats；训练过程中的，权重一直在变）。"""
    model.train()  # Dropout 随机置零，BatchNorm 用本批的统计量
    total, count = 0.0, 0
    for x, y in batches:
        optimizer.zero_grad()
        with device.autocast(amp):  # 只把卷积与矩阵乘法换成半精度；权重仍是 float32
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
        total = total + loss.detach() * len(y)
        count += len(y)
    return (total / count).item()  # 每轮只取一次数值：.item() 会让 GPU 停下来等


@torch.no_grad()
def evaluate(model: nn.Module, batches: TensorBatches) -> tuple[float, Tensor]:
    """一个划分上的 (平均交叉熵, 逐个样本的得分 ``(N, 类别数)``)；后者留在 CPU 上。"""
    model.eval()
    total, count, outputs = 0.0, 0, []
    for x, y in batches:
        output = model(x).float()
        total = total + F.cross_entropy(output, y, reduction="sum")
        count += len(y)
        outputs.append(output.cpu())
    return (total / count).item(), torch.cat(outputs)


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """分对的比例。"""
    return (outputs.argmax(dim=1) == labels).float().mean().item()


def fit(
    model: nn.Module, data: Data, args: argparse.Namespace, device: TorchDevice, folder: Path
) -> TrainingState:
    """训练；返回逐轮记录与验证集上最好的一轮的权重，模型停在最后一轮。"""
    generator = make_generator(args.seed)  # 打乱与增强的随机性
    where = device.device
    train = data.batches(
        "train", args.batch_size, generator, augmented=args.augment == "standard", device=where
    )
    val = data.batches("val", device=where)
    val_labels = data.splits["val"].labels
    amp = torch.bfloat16 if device.type == "cuda" and not args.handmade else None
    optimizer, schedule = adamw_with_cosine(
        model, args.lr, args.weight_decay, args.epochs * len(train)
    )
    config = {key: getattr(args, key) for key in CONFIG_KEYS}
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    state = TrainingState(folder, config, generator, resume=args.resume, **parts)
    with tqdm(total=args.epochs, initial=state.epoch, desc=args.model, unit="轮") as bar:
        while state.epoch < args.epochs:
            train_loss = train_one_epoch(model, train, optimizer, schedule, device, amp)
            val_loss, outputs = evaluate(model, val)
            score = accuracy(outputs, val_labels)
            row = {"train_loss": train_loss, "val_loss": val_loss, "val_accuracy": score}
            state.record(row, score)
            bar.set_postfix_str(f"训练损失 {train_loss:.4f} 验证准确率 {100 * score:.2f}%")
            bar.update()
    return state


# 这些参数不同，就不是同一次训练，不能续
CONFIG_KEYS = (
    "model", "dataset", "data_dir", "image_size", "augment", "handmade", "smoke",
    "epochs", "batch_size", "lr", "weight_decay", "seed",
)  # fmt: skip


# ---------------------------------------------------------------- 入口

EPOCHS = {"synth-digits": 20}  # 生成的训练集只有 MNIST 的五分之一，多走几轮；其余 12 轮


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description="训练经典的 CNN")
    add_common_args(
        parser,
        out_dir=HERE / "outputs",
        batch_size=128,
        datasets=IMAGE_DATASETS,
        resume=True,
    )
    add = parser.add_argument
    add("--epochs", type=positive_int, metavar="N", help="训练轮数（默认 由 --dataset 决定）")
    add("--lr", type=positive_float, metavar="X", help="峰值学习率（默认 由 --model 决定）")
    add("--model", choices=list(MODELS), default="lenet", help="网络，都是小图形式")
    add("--augment", choices=["standard", "none"], default="standard", help="训练时的随机增强")
    add("--weight-decay", type=non_negative_float, default=0.05, metavar="X", help="权重衰减")
    add("--image-size", type=positive_int, default=32, metavar="N", help="folder 的边长，像素")
    add("--handmade", action="store_true", help="卷积与池化换成本章手写的")
    args = parser.parse_args(argv)
    args.epochs = EPOCHS.get(args.dataset, 12) if args.epochs is None else args.epochs
    args.lr = MODELS[args.model].lr if args.lr is None else args.lr
    if args.smoke:
        args.epochs = 2
    if args.out_dir == HERE / "outputs":  # 各次运行各放一处，互不冲掉
        name = f"{args.model}_{args.dataset}" + ("_handmade" if args.handmade else "")
        args.out_dir /= f"{name}_smoke" if args.smoke else name
    return args


# 实测过的测试准确率区间；没有测过的只按机会线给出宽松的下限
BANDS = {
    ("lenet", "synth-digits"): (0.985, 0.995),
    ("lenet", "mnist"): (0.99, 0.996),
    ("lenet1998", "synth-digits"): (0.965, 0.985),
    ("vgg11_bn", "cifar10"): (0.8, 0.87),  # 在同样图片的 JPEG 副本上测得 83.4%
}


def expect(args: argparse.Namespace, data: Data) -> Expectation:
    """这个网络在这个数据集上的预期。"""
    chance = data.chance
    loose = (min(3 * chance, (1 + chance) / 2), 1.0)
    band = BANDS.get((args.model, args.dataset), loose)
    return Expectation("测试准确率", chance, band, percent=True)


def main(argv: Sequence[str] | None = None) -> dict:
    """训练、评估、画图、下结论；返回写进 ``metrics.json`` 的内容。"""
    args = parse_args(argv)
    out_dir = prepare_out_dir(args.out_dir)
    set_seed(args.seed)
    device = get_device(args.device)
    if threads := MODELS[args.model].threads:
        torch.set_num_threads(threads)
    print(f"设备  {device.describe()}")
    with Timer(device) as timer:
        data = load_data(
            args.dataset,
            args.data_dir,
            download=args.download,
            limit=256 if args.smoke else None,
            image_size=args.image_size,
        )
        timer.lap("数据")
        shape = (data.in_channels, data.image_size, data.image_size)
        model = build_model(args.model, len(data.class_names), *shape[:2])
        model = (use_handmade(model) if args.handmade else model).to(device.device)
        print(model_summary(model, torch.zeros(1, *shape, device=device.device)))
        expectation = expect(args, data)
        print(expectation.announce())
        state = fit(model, data, args, device, out_dir / "checkpoints")
        model.load_state_dict(state.best_weights)
        timer.lap("训练")
        test = data.batches("test", device=device.device)
        test_loss, outputs = evaluate(model, test)
        timer.lap("测试")
    score = accuracy(outputs, test.labels.cpu())
    print(f"测试  交叉熵 {test_loss:.4f} nats，准确率 {expectation.format(score)}")
    save_checkpoint(out_dir / "best.pt", state.best_weights)
    return conclude(
        out_dir,
        [Result(expectation, score)],
        timer,
        smoke=args.smoke,
        figures=figures.training_figures(state.history, expectation.chance, outputs, data),
        test_loss=test_loss,
        history=state.history,
        laps=timer.laps,
    )


if __name__ == "__main__":
    run_main(main)
