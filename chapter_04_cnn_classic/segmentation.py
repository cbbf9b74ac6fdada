"""训练 U-Net 做语义分割：生成的场景里，每个像素属于哪一类物体。

    python segmentation.py                 # U-Net
    python segmentation.py --no-skips      # 去掉跳跃连接的对照
    python segmentation.py --loss ce       # 只用交叉熵（或 dice）

训练集用来求梯度，验证集用来挑选轮次，测试集只在最后看一次。被杀掉之后加 ``--resume``
再次运行，最终权重与没有中断时逐位相同（CPU 上）。
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

if not __package__:  # 直接运行脚本时，把仓库根目录加入模块搜索路径
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chapter_04_cnn_classic.augment import draw_symmetry, turn
from chapter_04_cnn_classic.figures_segmentation import segmentation_figure
from chapter_04_cnn_classic.recipe import adamw_with_cosine
from chapter_04_cnn_classic.scenes import CLASS_NAMES, Scenes, load_scenes
from chapter_04_cnn_classic.unet import UNet, class_iou, confusion_counts, dice_loss, mean_iou
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
from utils.cli import ArgumentParser
from utils.datasets import SPLITS, ImageBatches, channel_stats
from utils.file_io_util import save_checkpoint
from utils.resume import TrainingState

HERE = Path(__file__).resolve().parent
NAMES = ("background", *CLASS_NAMES)
EVAL_BATCH = 100
SHOWN = 6  # 图里画几个场景
WEIGHT_DECAY = 0.05
LOSSES = ("ce+dice", "ce", "dice")

# ---------------------------------------------------------------- 数据


class Data(NamedTuple):
    """三个划分，与训练集的每通道均值、标准差。"""

    splits: dict[str, Scenes]
    mean: Tensor
    std: Tensor

    def batches(
        self, split: str, size: int, device: TorchDevice, generator: torch.Generator | None = None
    ) -> ImageBatches:
        """一个划分的批迭代器；给出 ``generator`` 时打乱。"""
        scenes = self.splits[split]
        options = {"mean": self.mean, "std": self.std, "device": device.device}
        return ImageBatches(scenes.images, scenes.masks, size, generator=generator, **options)


def load_data(limit: int | None = None) -> Data:
    """生成三个划分；``limit`` 限制每个划分的场景数（``--smoke`` 用）。"""
    splits = {split: load_scenes(split, limit=limit) for split in SPLITS}
    return Data(splits, *channel_stats(splits["train"].images))


def random_symmetry(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """每张图随机取正方形的八种对称之一；掩码必须与图像做同一件事。

    参数:
        x: ``(B, C, S, S)``。
        y: ``(B, S, S)``。
    """
    flags = draw_symmetry(len(x), generator, x.device)
    return turn(x, *flags), turn(y.unsqueeze(1), *flags).squeeze(1)


# ---------------------------------------------------------------- 训练循环


def segmentation_loss(logits: Tensor, y: Tensor, kind: str) -> Tensor:
    """交叉熵、Dice，或两者之和。"""
    loss = logits.new_zeros(())
    if "ce" in kind.split("+"):
        loss = loss + F.cross_entropy(logits, y)
    if "dice" in kind.split("+"):
        loss = loss + dice_loss(logits, y)
    return loss


def train_one_epoch(
    model: nn.Module,
    batches: ImageBatches,
    loss_kind: str,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    """把训练集过一遍，返回平均损失（训练过程中的，权重一直在变）。"""
    model.train()
    total, count = 0.0, 0
    for x, y in batches:
        x, y = random_symmetry(x, y, batches.generator)
        optimizer.zero_grad()
        # 通道放在内存的最里层：CPU 上的卷积快两三成
        logits = model(x.contiguous(memory_format=torch.channels_last))
        loss = segmentation_loss(logits, y, loss_kind)
        loss.backward()
        optimizer.step()
        schedule.step()
        total = total + loss.detach() * len(y)
        count += len(y)
    return (total / count).item()


@torch.no_grad()
def evaluate(model: nn.Module, batches: ImageBatches, loss_kind: str) -> tuple[float, Tensor]:
    """一个划分上的 (平均损失, 混淆矩阵 ``(K, K)``)；矩阵逐批相加，不平均各批的 mIoU。"""
    model.eval()
    total, count = 0.0, 0
    counts = torch.zeros(len(NAMES), len(NAMES), dtype=torch.int64)
    for x, y in batches:
        logits = model(x.contiguous(memory_format=torch.channels_last))
        total = total + segmentation_loss(logits, y, loss_kind) * len(y)
        count += len(y)
        counts += confusion_counts(logits.argmax(dim=1), y, len(NAMES)).cpu()
    return (total / count).item(), counts


def fit(
    model: nn.Module, data: Data, args: argparse.Namespace, device: TorchDevice, folder: Path
) -> TrainingState:
    """训练；返回逐轮记录与验证集上最好的一轮的权重，模型停在最后一轮。"""
    generator = make_generator(args.seed)  # 打乱与翻转的随机性
    train = data.batches("train", args.batch_size, device, generator)
    val = data.batches("val", EVAL_BATCH, device)
    steps = args.epochs * len(train)
    optimizer, schedule = adamw_with_cosine(model, args.lr, WEIGHT_DECAY, steps, parts=5)
    config = {key: getattr(args, key) for key in CONFIG_KEYS}
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    state = TrainingState(folder, config, generator, resume=args.resume, **parts)
    with tqdm(total=args.epochs, initial=state.epoch, desc="U-Net", unit="轮") as bar:
        while state.epoch < args.epochs:
            train_loss = train_one_epoch(model, train, args.loss, optimizer, schedule)
            val_loss, counts = evaluate(model, val, args.loss)
            score = mean_iou(counts)
            row = {"train_loss": train_loss, "val_loss": val_loss, "val_miou": score}
            state.record(row, score)
            bar.set_postfix_str(f"训练损失 {train_loss:.4f} 验证 mIoU {score:.4f}")
            bar.update()
    return state


# 这些参数不同，就不是同一次训练，不能续
CONFIG_KEYS = ("no_skips", "loss", "smoke", "epochs", "batch_size", "lr", "seed")


# ---------------------------------------------------------------- 入口


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description="训练 U-Net 做语义分割")
    add_common_args(parser, out_dir=HERE / "outputs", epochs=6, batch_size=16, lr=3e-3, resume=True)
    add = parser.add_argument
    add("--no-skips", action="store_true", help="去掉跳跃连接（对照）")
    add("--loss", choices=LOSSES, default=LOSSES[0], help="训练的损失")
    args = parser.parse_args(argv)
    if args.smoke:
        args.epochs = 2
    if args.out_dir == HERE / "outputs":  # 各次运行各放一处，互不冲掉
        name = "segmentation" + ("_no_skips" if args.no_skips else "")
        name += "" if args.loss == LOSSES[0] else f"_{args.loss}"
        args.out_dir /= f"{name}_smoke" if args.smoke else name
    return args


BAND = (0.87, 0.93)  # 缺省的设置，三个种子
BAND_CONTROL = (0.75, 0.92)  # 各个对照（--no-skips、--loss），各一个种子


def background_miou(masks: Tensor) -> float:
    """机会线：全部猜背景的 mIoU。"""
    return mean_iou(confusion_counts(torch.zeros_like(masks), masks, len(NAMES)))


@torch.no_grad()
def predict(model: nn.Module, batches: ImageBatches, count: int) -> Tensor:
    """前 ``count`` 个场景的预测，int64 ``(count, S, S)``，在 CPU 上。"""
    model.eval()
    return model(batches.prepare(batches.inputs[:count])).argmax(dim=1).cpu()


def main(argv: Sequence[str] | None = None) -> dict:
    """训练、评估、画图、下结论；返回写进 ``metrics.json`` 的内容。"""
    args = parse_args(argv)
    out_dir = prepare_out_dir(args.out_dir)
    set_seed(args.seed)
    device = get_device(args.device)
    torch.set_num_threads(1)  # 两个线程只快四成；一个线程的结果不随核的多少而变
    print(f"设备  {device.describe()}")
    with Timer(device) as timer:
        data = load_data(limit=64 if args.smoke else None)
        timer.lap("数据")
        model = UNet(len(NAMES), skips=not args.no_skips).to(device.device)
        model = model.to(memory_format=torch.channels_last)
        size = data.mean.shape[0], *data.splits["train"].images.shape[2:]
        print(model_summary(model, torch.zeros(1, *size, device=device.device)))
        chance = background_miou(data.splits["test"].masks)
        control = args.no_skips or args.loss != LOSSES[0]
        band = BAND_CONTROL if control else BAND
        expectation = Expectation("测试 mIoU", chance, band)
        print(expectation.announce())
        state = fit(model, data, args, device, out_dir / "checkpoints")
        model.load_state_dict(state.best_weights)
        timer.lap("训练")
        test = data.batches("test", EVAL_BATCH, device)
        test_loss, counts = evaluate(model, test, args.loss)
        timer.lap("测试")
    score, ious = mean_iou(counts), class_iou(counts).tolist()
    listed = "，".join(f"{name} {iou:.4f}" for name, iou in zip(NAMES, ious, strict=True))
    print(f"测试  损失 {test_loss:.4f}，各类 IoU：{listed}")
    save_checkpoint(out_dir / "best.pt", state.best_weights)
    scenes = data.splits["test"]
    guesses = predict(model, test, SHOWN)
    figure = segmentation_figure(
        scenes.images, scenes.masks, guesses, ious, state.history, NAMES, chance, score
    )
    return conclude(
        out_dir,
        [Result(expectation, score)],
        timer,
        smoke=args.smoke,
        figures={"segmentation.png": figure},
        test_loss=test_loss,
        class_iou=dict(zip(NAMES, ious, strict=True)),
        confusion=counts.tolist(),
        history=state.history,
        laps=timer.laps,
    )


if __name__ == "__main__":
    run_main(main)
