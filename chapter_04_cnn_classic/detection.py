"""训练目标检测器：在生成的场景里找出圆盘、正方形、三角形与十字。

    python detection.py                  # 训练，画图，报告测试集的 mAP@0.5
    python detection.py --seed 1
    python detection.py --resume         # 被杀掉之后接着训练

训练集用来求梯度，验证集用来挑选轮次，测试集只在最后看一次。机会线是不看图的猜测：每张图都在
每类物体平均的位置放一个平均大小的框，得分是这类的频率。被杀掉之后加 ``--resume`` 再次运行，
最终权重与没有中断时逐位相同（CPU 上）。
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

if not __package__:  # 直接运行脚本时，把仓库根目录加入模块搜索路径
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chapter_04_cnn_classic.augment import draw_symmetry, turn
from chapter_04_cnn_classic.boxes import Curve, Detections, Objects, mean_average_precision
from chapter_04_cnn_classic.detector import (
    STRIDE,
    Detector,
    assign_targets,
    decode,
    detection_loss,
    ideal_output,
    locations,
)
from chapter_04_cnn_classic.figures_detection import detection_figure
from chapter_04_cnn_classic.recipe import adamw_with_cosine
from chapter_04_cnn_classic.scenes import CLASS_NAMES, Scenes, load_scenes
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
from utils.cli import ArgumentParser, non_negative_float
from utils.datasets import SPLITS, ImageBatches, channel_stats
from utils.file_io_util import save_checkpoint
from utils.resume import TrainingState

HERE = Path(__file__).resolve().parent
EVAL_BATCH = 100
BAND = (0.90, 0.95)  # 多个种子实测的测试 mAP@0.5

# ---------------------------------------------------------------- 数据


def scene_batches(
    scenes: Scenes,
    batch_size: int,
    stats: tuple[Tensor, Tensor],
    device: torch.device | str,
    generator: torch.Generator | None = None,
) -> ImageBatches:
    """场景的批迭代器，产出 ``(x, 目标)``：目标 ``(B, M, 5)`` 是四个坐标与类别，不足处类别为 −1。"""
    targets = torch.cat([scenes.boxes, scenes.labels.unsqueeze(-1).float()], dim=-1)
    mean, std = stats
    return ImageBatches(
        scenes.images, targets, batch_size, mean=mean, std=std, generator=generator, device=device
    )


def real_objects(scenes: Scenes) -> list[Objects]:
    """每张图真实的物体，去掉凑数的。"""
    return [
        Objects(boxes[labels >= 0], labels[labels >= 0])
        for boxes, labels in zip(scenes.boxes, scenes.labels, strict=True)
    ]


def random_symmetry(x: Tensor, boxes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """每张图随机取正方形的八种对称之一（左右翻、上下翻、转置各一半的机会），框跟着变。

    参数:
        x: ``(B, C, S, S)``。
        boxes: ``(B, M, 4)``，像素。
    """
    size, flags = x.shape[-1], draw_symmetry(len(x), generator, x.device)
    for flag, (low, high) in zip(flags[:2], ((0, 2), (1, 3)), strict=True):
        moved = boxes.clone()
        moved[..., low], moved[..., high] = size - boxes[..., high], size - boxes[..., low]
        boxes = torch.where(flag.view(-1, 1, 1), moved, boxes)
    boxes = torch.where(flags[2].view(-1, 1, 1), boxes[..., [1, 0, 3, 2]], boxes)
    return turn(x, *flags), boxes


def blind_guess(train: Scenes, count: int) -> list[Detections]:
    """不看图的猜测：每类一个框，是训练集里这类的平均框，得分是它的频率；``count`` 张图都一样。"""
    known = [train.boxes[train.labels == k] for k in range(len(CLASS_NAMES))]
    total = sum(map(len, known))
    boxes = torch.stack([boxes.mean(dim=0) for boxes in known])
    scores = torch.tensor([len(boxes) / total for boxes in known])
    return [Detections(boxes, scores, torch.arange(len(known)))] * count


def describe_assignment(scenes: Scenes) -> str:
    """分配的一行统计：正样本的多少，有几个物体没有位置负责，照搬目标能得多少 mAP。"""
    size = scenes.images.shape[-1]
    points = locations(size // STRIDE, size // STRIDE)
    classes, owners = assign_targets(points, scenes.boxes, scenes.labels)
    positive = classes >= 0
    same = (owners.unsqueeze(2) == scenes.boxes.unsqueeze(1)).all(dim=-1)  # (N, L, M)
    real = scenes.labels >= 0
    missed = real & ~(same & positive.unsqueeze(2)).any(dim=1)
    ideal = ideal_output(points, scenes.boxes, scenes.labels, len(CLASS_NAMES))
    truths = real_objects(scenes)
    ceiling, _ = mean_average_precision(decode(ideal, (size, size)), truths, len(CLASS_NAMES))
    return (
        f"{len(points)} 个位置里平均 {positive.sum(dim=1).float().mean():.1f} 个正样本；"
        f"{real.sum()} 个物体里 {missed.sum()} 个没有位置负责；照搬目标 mAP {100 * ceiling:.2f}%"
    )


# ---------------------------------------------------------------- 训练循环


def train_one_epoch(
    model: nn.Module,
    batches: ImageBatches,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    generator: torch.Generator,
) -> tuple[float, float]:
    """把训练集过一遍，返回两项损失（分类、框）的平均。"""
    model.train()  # BatchNorm 用本批的统计量
    total, count = 0.0, 0
    for x, targets in batches:
        x, boxes = random_symmetry(x, targets[..., :4], generator)
        points = locations(x.shape[2] // STRIDE, x.shape[3] // STRIDE, x.device)
        optimizer.zero_grad()
        losses = detection_loss(model(x), points, boxes, targets[..., 4].long())
        (losses.classification + losses.box).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)  # 偶尔一批的梯度很大
        optimizer.step()
        schedule.step()
        total = total + len(x) * torch.stack(losses).detach()
        count += len(x)
    classification, box = (total / count).tolist()
    return classification, box


@torch.no_grad()
def evaluate(model: nn.Module, batches: ImageBatches) -> list[Detections]:
    """一个划分上的检出，每张图一项，留在 CPU 上。"""
    model.eval()
    found = []
    for x, _ in batches:
        decoded = decode(model(x), (x.shape[2], x.shape[3]))
        found += [Detections(*(part.cpu() for part in one)) for one in decoded]
    return found


def fit(
    model: nn.Module,
    splits: dict[str, Scenes],
    args: argparse.Namespace,
    device: TorchDevice,
    folder: Path,
) -> TrainingState:
    """训练；返回逐轮记录与验证集上最好的一轮的权重，模型停在最后一轮。"""
    generator = make_generator(args.seed)  # 打乱与增强的随机性
    stats = channel_stats(splits["train"].images)
    train = scene_batches(splits["train"], args.batch_size, stats, device.device, generator)
    val = scene_batches(splits["val"], EVAL_BATCH, stats, device.device)
    truths = real_objects(splits["val"])
    optimizer, schedule = adamw_with_cosine(
        model, args.lr, args.weight_decay, args.epochs * len(train)
    )
    config = {key: getattr(args, key) for key in CONFIG_KEYS}
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    state = TrainingState(folder, config, generator, resume=args.resume, **parts)
    with tqdm(total=args.epochs, initial=state.epoch, desc="检测", unit="轮") as bar:
        while state.epoch < args.epochs:
            class_loss, box_loss = train_one_epoch(model, train, optimizer, schedule, generator)
            score, _ = mean_average_precision(evaluate(model, val), truths, len(CLASS_NAMES))
            row = {"class_loss": class_loss, "box_loss": box_loss, "val_map": score}
            state.record(row, score)
            bar.set_postfix_str(f"损失 {class_loss:.3f} + {box_loss:.3f}，验证 mAP {score:.3f}")
            bar.update()
    return state


# 这些参数不同，就不是同一次训练，不能续
CONFIG_KEYS = ("smoke", "epochs", "batch_size", "lr", "weight_decay", "seed")


# ---------------------------------------------------------------- 入口


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description="训练目标检测器")
    out_dir = HERE / "outputs" / "detection"
    add_common_args(parser, out_dir=out_dir, epochs=10, batch_size=32, lr=3e-3, resume=True)
    parser.add_argument(
        "--weight-decay", type=non_negative_float, default=0.05, metavar="X", help="权重衰减"
    )
    args = parser.parse_args(argv)
    if args.smoke:
        args.epochs = 1
        if args.out_dir == out_dir:
            args.out_dir = out_dir.with_name("detection_smoke")
    return args


def describe(curves: Sequence[Curve]) -> str:
    """逐类的 AP。"""
    return "，".join(f"{name} {c.ap:.3f}" for name, c in zip(CLASS_NAMES, curves, strict=True))


def main(argv: Sequence[str] | None = None) -> dict:
    """训练、评估、画图、下结论；返回写进 ``metrics.json`` 的内容。"""
    args = parse_args(argv)
    out_dir = prepare_out_dir(args.out_dir)
    set_seed(args.seed)
    device = get_device(args.device)
    torch.set_num_threads(1)  # 网络很小，线程之间互相等待比多出的算力更费时
    print(f"设备  {device.describe()}")
    with Timer(device) as timer:
        splits = {name: load_scenes(name, limit=64 if args.smoke else None) for name in SPLITS}
        timer.lap("数据")
        test, truths = splits["test"], real_objects(splits["test"])
        model = Detector(len(CLASS_NAMES)).to(device.device)
        size = splits["train"].images.shape[1:]
        print(model_summary(model, torch.zeros(1, *size, device=device.device)))
        print(f"分配  验证集：{describe_assignment(splits['val'])}")
        guesses = blind_guess(splits["train"], len(truths))
        chance, _ = mean_average_precision(guesses, truths, len(CLASS_NAMES))
        expectation = Expectation("测试 mAP@0.5", chance, BAND, percent=True)
        print(expectation.announce())
        state = fit(model, splits, args, device, out_dir / "checkpoints")
        model.load_state_dict(state.best_weights)
        timer.lap("训练")
        stats = channel_stats(splits["train"].images)
        found = evaluate(model, scene_batches(test, EVAL_BATCH, stats, device.device))
        score, curves = mean_average_precision(found, truths, len(CLASS_NAMES))
        strict, _ = mean_average_precision(found, truths, len(CLASS_NAMES), iou_threshold=0.75)
        timer.lap("测试")
    print(f"测试  mAP@0.5 {expectation.format(score)}，mAP@0.75 {expectation.format(strict)}")
    print(f"各类  AP@0.5：{describe(curves)}")
    save_checkpoint(out_dir / "best.pt", state.best_weights)
    return conclude(
        out_dir,
        [Result(expectation, score)],
        timer,
        smoke=args.smoke,
        figures={"detection.png": detection_figure(test, found, curves, state.history)},
        map75=strict,
        class_ap={name: curve.ap for name, curve in zip(CLASS_NAMES, curves, strict=True)},
        history=state.history,
        laps=timer.laps,
    )


if __name__ == "__main__":
    run_main(main)
