"""训练配方的消融：每次只改一处，各值多少？

    python ablation.py                       # 每种一个种子，3 轮
    python ablation.py --seeds 3

在合成物体上训练 resnet20。各种做法的初始权重与数据的次序由种子决定，逐一相同，所以比较时相减的是
同一个种子的两次训练。两个两个地并行，各用一个线程。
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

if not __package__:  # 直接运行脚本时，把仓库根目录加入模块搜索路径
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chapter_03_optimization_regularization.averaging import EMA
from chapter_03_optimization_regularization.schedulers import ConstantLR
from chapter_05_resnet_modern_cnn.data import load_data
from chapter_05_resnet_modern_cnn.figures import ablation_figure
from chapter_05_resnet_modern_cnn.models import build_model, usual_stem_stride
from chapter_05_resnet_modern_cnn.recipe import (
    evaluate,
    make_optimizer,
    refresh_statistics,
    train_one_epoch,
)
from utils import (
    Expectation,
    Result,
    Timer,
    add_common_args,
    conclude,
    get_device,
    make_generator,
    prepare_out_dir,
    run_main,
    set_seed,
)
from utils.cli import ArgumentParser, positive_int
from utils.distributed import run_parallel

HERE = Path(__file__).resolve().parent
DATASET, MODEL, BATCH = "synth-objects", "resnet20", 128
LIMIT = 256  # 张，--smoke 时每个划分的图数


class Arm(NamedTuple):
    """一种做法；缺省就是 ``train.py`` 的配方。"""

    optimizer: str = "sgd"
    lr: float = 0.1
    weight_decay: float = 5e-4
    constant_rate: bool = False
    augmented: bool = True
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    ema: float = 0.0


ARMS = {
    "baseline": Arm(),
    "constant rate": Arm(constant_rate=True),
    "no augmentation": Arm(augmented=False),
    "no weight decay": Arm(weight_decay=0.0),
    "AdamW": Arm(optimizer="adamw", lr=2e-3, weight_decay=0.05),
    "label smoothing 0.1": Arm(label_smoothing=0.1),
    "mixup 0.2": Arm(mixup=0.2),
    "CutMix 1.0": Arm(cutmix=1.0),
    "EMA 0.99": Arm(ema=0.99),
    "constant rate + EMA": Arm(constant_rate=True, ema=0.99),
}


def train(arm: Arm, epochs: int, seed: int, limit: int | None) -> float:
    """按一种做法训练一遍，返回最后一轮的验证准确率；在子进程里运行。"""
    data, device = load_data(DATASET, limit=limit), get_device("cpu")
    set_seed(seed)
    model = build_model(MODEL, len(data.class_names), data.shape, usual_stem_stride(DATASET))
    options = {"augmented": arm.augmented, "mixup": arm.mixup, "cutmix": arm.cutmix}
    batches, steps = data.training(BATCH, make_generator(seed), device="cpu", **options)
    settings = (arm.optimizer, arm.lr, arm.weight_decay, epochs * steps)
    optimizer, schedule = make_optimizer(model, *settings)
    if arm.constant_rate:
        schedule = ConstantLR(optimizer)
    average = EMA(model, arm.ema) if arm.ema else None
    for _ in range(epochs):
        extras = {"label_smoothing": arm.label_smoothing, "average": average}
        train_one_epoch(model, model, batches, optimizer, schedule, device, **extras)
    if average is not None:
        model = refresh_statistics(average, data.batches("train", BATCH))
    return evaluate(model, data.evaluation("val", "cpu"), len(data.class_names), device).accuracy


def differences(scores: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """同一种子相减之后的平均与样本标准差（一个种子时为 0）。"""
    gaps = [a - b for a, b in zip(scores, base, strict=True)]
    return statistics.fmean(gaps), statistics.stdev(gaps) if len(gaps) > 1 else 0.0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description="训练配方的消融")
    add_common_args(parser, out_dir=HERE / "outputs" / "ablation", epochs=3, device=False)
    add = parser.add_argument
    add("--seeds", type=positive_int, default=1, metavar="N", help="几个种子，从 --seed 起")
    add("--jobs", type=positive_int, default=2, metavar="N", help="同时训练几个，各用一个线程")
    args = parser.parse_args(argv)
    if args.smoke:
        args.epochs, args.seeds, args.jobs = 1, 1, 1
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """训练、比较、画图；返回写进 ``metrics.json`` 的内容。"""
    args = parse_args(argv)
    out_dir = prepare_out_dir(args.out_dir)
    torch.set_num_threads(1)  # 与各个任务相同，账本如实记录
    limit = LIMIT if args.smoke else None
    seeds = range(args.seed, args.seed + args.seeds)
    scores: dict[str, list[float]] = {}
    tasks = [(arm, args.epochs, seed, limit) for arm in ARMS.values() for seed in seeds]
    with Timer() as timer:
        found = run_parallel(train, tasks, args.jobs)
        for name in ARMS:
            scores[name] = [next(found) for _ in seeds]
            gap, spread = differences(scores[name], scores["baseline"])
            mean = statistics.fmean(scores[name])
            print(
                f"{name:20s} 验证准确率 {100 * mean:5.2f}%，"
                f"比 baseline {100 * gap:+6.2f} ± {100 * spread:.2f} 个百分点",
                flush=True,
            )
    expected = Expectation("baseline 的验证准确率", 0.1, (0.5, 0.9), percent=True)
    mean = statistics.fmean(scores["baseline"])
    std = statistics.stdev(scores["baseline"]) if args.seeds > 1 else None
    return conclude(
        out_dir,
        [Result(expected, mean, std)],
        timer,
        smoke=args.smoke,
        figures={"ablation.png": ablation_figure(scores)},
        scores=scores,
    )


if __name__ == "__main__":
    run_main(main)
