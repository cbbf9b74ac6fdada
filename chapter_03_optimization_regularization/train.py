"""公平地比较：六个实验，每一方都有同样多的学习率（或强度）可挑，报告多个种子的均值与标准误。

    python train.py                                # 13 种优化器
    python train.py --experiment schedules         # 学习率调度
    python train.py --experiment normalization     # 归一化
    python train.py --experiment regularization    # 正则化，贝叶斯错误率已知
    python train.py --experiment generalization    # 批大小、学习率与锐度
    python train.py --experiment initialization    # 初始化 × 归一化 × 深度

都可以换成别的图像，如 ``--dataset mnist --data-dir 数据文件夹``；regularization 缺省用带噪的双月，
换成图像（包括 synth-digits）时，强度、样本数、轮数另有一套。缺省的输出文件夹以实验命名，数据集不是
缺省的，再加上数据集的名字。
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

if not __package__:  # 直接运行脚本时，把仓库根目录加入模块搜索路径
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chapter_02_nn_basics_mlp.losses import cross_entropy
from chapter_03_optimization_regularization.data import Task, images_task, load_digits, points_task
from chapter_03_optimization_regularization.experiments import (
    EXPERIMENTS,
    IMAGE_REGULARIZATION,
    POINTS,
    Experiment,
)
from chapter_03_optimization_regularization.optimizers import Optimizer
from chapter_03_optimization_regularization.recipes import Arm, Comparison, Recipe, Run, compare
from chapter_03_optimization_regularization.reports import REPORTS, Context, record, table
from chapter_03_optimization_regularization.schedulers import LRScheduler
from utils import (
    Timer,
    add_common_args,
    conclude,
    get_device,
    make_generator,
    model_summary,
    prepare_out_dir,
    run_main,
    set_seed,
)
from utils.cli import ArgumentParser, positive_float, positive_int
from utils.datasets import IMAGE_DATASETS, TensorBatches

HERE = Path(__file__).resolve().parent
CURVE_EVERY = 30  # 每隔多少步记一次验证损失


# ---------------------------------------------------------------- 训练循环


def train_one_epoch(
    model: nn.Module,
    batches: TensorBatches,
    loss_fn: Callable[[nn.Module, Tensor, Tensor], Tensor],
    optimizer: Optimizer,
    schedule: LRScheduler,
    after_step: Callable[[], None] | None = None,
) -> None:
    """把训练集过一遍。

    前向与反向写成 ``closure`` 交给优化器：多数优化器调用它一次，SAM 要在两个点上各调用一次。
    """
    for x, y in batches:
        model.train()
        optimizer.train()

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = loss_fn(model, x, y)
            loss.backward()
            return loss

        optimizer.step(closure)
        schedule.step()
        if after_step is not None:
            after_step()


@torch.no_grad()
def evaluate(model: nn.Module, batches: TensorBatches) -> tuple[float, float]:
    """(平均交叉熵 nats, 错误率)，都是总和除以总数。"""
    model.eval()
    loss, wrong, count = 0.0, 0, 0
    for x, y in batches:
        logits = model(x)
        loss = loss + cross_entropy(logits, y) * len(y)
        wrong = wrong + (logits.argmax(dim=-1) != y).sum()
        count += len(y)
    return (loss / count).item(), (wrong / count).item()


def fit(recipe: Recipe, task: Task, epochs: int, batch_size: int, seed: int) -> Run:
    """训练一次；每 ``CURVE_EVERY`` 步记一次验证损失，每轮末问一次早停。不看测试集。"""
    start = time.perf_counter()
    train = task.batches("train", batch_size, make_generator(seed))
    val = task.batches("val", 2_000)
    curve: list[tuple[int, float]] = []
    taken = 0

    def after_step() -> None:
        nonlocal taken
        taken += 1
        if recipe.after_step is not None:
            recipe.after_step()
        if taken % CURVE_EVERY == 0 and recipe.stopper is None:
            recipe.optimizer.eval()
            curve.append((taken, evaluate(recipe.watched, val)[0]))

    for _ in range(epochs):
        train_one_epoch(
            recipe.model, train, recipe.loss, recipe.optimizer, recipe.schedule, after_step
        )
        if recipe.stopper is not None:
            curve.append((taken, evaluate(recipe.watched, val)[0]))
            if recipe.stopper.step(curve[-1][1], recipe.model):
                break
        elif curve and not math.isfinite(curve[-1][1]):
            break  # 已经发散，不必走完
    recipe.optimizer.eval()
    if recipe.stopper is not None:
        recipe.stopper.restore(recipe.model)
    val_loss, val_error = evaluate(recipe.watched, val)
    if not curve or curve[-1][0] < taken:
        curve.append((taken, val_loss))
    seconds = time.perf_counter() - start  # 上面的评估把数取回了 CPU，设备已经完工
    return Run(math.nan, seed, recipe, curve, val_loss, val_error, seconds=seconds)


# ---------------------------------------------------------------- 入口


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description="公平地比较优化器、调度、归一化、正则化、批大小、初始化")
    add_common_args(parser, out_dir=HERE / "outputs", datasets=(POINTS, *IMAGE_DATASETS))
    add = parser.add_argument
    add("--experiment", choices=list(EXPERIMENTS), default="optimizers", help="实验")
    add("--epochs", type=positive_int, metavar="N", help="训练轮数（默认 各实验自定）")
    add("--batch-size", type=positive_int, metavar="N", help="每批样本数（默认 各实验自定）")
    add("--lr", type=positive_float, default=1.0, metavar="X", help="各学习率候选值整体的倍数")
    add("--seeds", type=positive_int, metavar="N", help="重复几个种子（默认 3，正则化 8 或 5）")
    parser.set_defaults(dataset=None)
    args = parser.parse_args(argv)
    experiment = EXPERIMENTS[args.experiment]
    args.dataset = args.dataset or experiment.dataset
    if args.experiment == "regularization" and args.dataset != POINTS:
        experiment = IMAGE_REGULARIZATION
    if args.dataset == POINTS and experiment.dataset != POINTS:
        parser.error(f"--dataset {POINTS} 只用于 --experiment regularization")
    if experiment.knob != "learning rate" and args.lr != 1.0:
        parser.error("--lr 只用于挑选学习率的实验；regularization 挑选的是强度")
    if args.batch_size is not None and any(arm.batch_size for arm in experiment.arms):
        parser.error("--batch-size 不用于 generalization：它自己改变批大小")
    args.plan = experiment
    args.epochs = args.epochs or experiment.epochs
    args.batch_size = args.batch_size or experiment.batch_size
    args.seeds = args.seeds or experiment.seeds
    if args.smoke:
        args.epochs, args.seeds = 1, 1
    if args.out_dir == HERE / "outputs":  # 换了数据集、--smoke 的另放一处，不冲掉缺省的结果
        default = EXPERIMENTS[args.experiment].dataset
        names = [args.experiment, args.dataset * (args.dataset != default), "smoke" * args.smoke]
        args.out_dir /= "_".join(filter(None, names))
    return args


def task_maker(args: argparse.Namespace, device: torch.device) -> Callable[[int], Task]:
    """``种子 -> Task``；每个种子的任务只造一次。"""
    plan: Experiment = args.plan
    if args.dataset == POINTS:
        size = 50 if args.smoke else plan.train_size
        return functools.cache(lambda seed: points_task(seed, size, args.smoke, device))
    splits = load_digits(args.dataset, args.data_dir, download=args.download, smoke=args.smoke)
    size = plan.train_size and min(plan.train_size, len(splits["train"].labels))
    return functools.cache(lambda seed: images_task(splits, seed, size, plan.flip, device))


def run_all(
    args: argparse.Namespace, task: Callable[[int], Task], device: torch.device
) -> list[Comparison]:
    """跑完一个实验的全部训练；最后才对选中的各次看一眼测试集。"""
    plan: Experiment = args.plan

    def run_once(arm: Arm, knob: float, seed: int) -> Run:
        set_seed(seed)  # Dropout 用全局的随机数；这样每一次都与先跑了什么无关
        data = task(seed)
        batch_size = arm.batch_size or args.batch_size
        steps = args.epochs * len(data.batches("train", batch_size))
        recipe = arm.build(data, knob, steps, seed, device)
        return dataclasses.replace(fit(recipe, data, args.epochs, batch_size, seed), knob=knob)

    arms = plan.arms
    if plan.knob == "learning rate":
        arms = [arm._replace(knobs=tuple(args.lr * lr for lr in arm.knobs)) for arm in arms]
    if args.smoke:
        arms = [arm._replace(knobs=arm.knobs[:2]) for arm in arms]
    seeds = range(args.seed, args.seed + args.seeds)
    comparisons = compare(arms, run_once, seeds, min(plan.tune_seeds, args.seeds), plan.key)
    for comparison in comparisons:
        for run in comparison.chosen:
            batches = task(run.seed).batches("test", 2_000)
            run.test_error = evaluate(run.recipe.watched, batches)[1]
    return comparisons


def main(argv: Sequence[str] | None = None) -> dict:
    """训练、挑选、画图、下结论；返回写进 ``metrics.json`` 的内容。"""
    args = parse_args(argv)
    out_dir = prepare_out_dir(args.out_dir)
    set_seed(args.seed)
    device = get_device(args.device)
    torch.set_num_threads(1)  # 网络小，多线程的同步比运算还贵
    print(f"设备  {device.describe()}")
    with Timer(device) as timer:
        task = task_maker(args, device.device)
        first = task(args.seed)
        example = args.plan.arms[0].build(first, args.plan.arms[0].knobs[0], 1, 0, device.device)
        print(model_summary(example.model.cpu(), torch.zeros(1, first.in_features)))
        print(f"问题  {args.plan.question}")
        expectation = args.plan.expectation(first, args.dataset)
        print(expectation.announce())
        timer.lap("数据")
        comparisons = run_all(args, task, device.device)
        timer.lap("训练")
        steps = args.epochs * len(first.batches("train", args.batch_size))
        seeds = range(args.seed, args.seed + args.seeds)
        context = Context(
            args.plan,
            expectation,
            args.dataset,
            task,
            seeds,
            steps,
            device.device,
            args.smoke,
        )
        report = REPORTS[args.experiment](comparisons, context)
        timer.lap("结论")
    print("\n".join([*table(comparisons, args.plan), *report.lines]))
    return conclude(
        out_dir,
        report.results,
        timer,
        smoke=args.smoke,
        figures={f"{args.experiment}.png": report.figure},
        comparisons={c.arm.name: record(c) for c in comparisons},
        run_seconds={c.arm.name: [run.seconds for run in c.chosen] for c in comparisons},
        laps=timer.laps,
        **report.details,
    )


if __name__ == "__main__":
    run_main(main)
