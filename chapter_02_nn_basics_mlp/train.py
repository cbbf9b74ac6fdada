"""训练 MLP：全书各章都沿用的训练循环。

    python train.py --task spiral          # 双螺旋分类：决策边界与隐藏空间的变形
    python train.py --task digits          # 手写数字：softmax 回归对 MLP，三个种子
    python train.py --task digits --dataset mnist --download       # 真实的 MNIST
    python train.py --task regression      # Friedman 回归：噪声方差（极限）已知
    python train.py --task regression --csv 文件.csv --column 列名  # 自己的表格

训练集用来求梯度，验证集用来挑选轮次，测试集只在最后看一次。被杀掉之后加 ``--resume``
再次运行，最终权重与没有中断时逐位相同（CPU 上）。
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

if not __package__:  # 直接运行脚本时，把仓库根目录加入模块搜索路径
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chapter_02_nn_basics_mlp.activations import MODULES
from chapter_02_nn_basics_mlp.mlp import MLP
from chapter_02_nn_basics_mlp.showcase import draw
from chapter_02_nn_basics_mlp.tasks import Task, make_task
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
from utils.cli import ArgumentParser, existing_file, int_list, positive_int
from utils.datasets import IMAGE_DATASETS, TensorBatches
from utils.file_io_util import CheckpointManager, save_checkpoint
from utils.resume import TrainingState

HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------- 训练循环


def train_one_epoch(
    model: nn.Module,
    batches: TensorBatches,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    """把训练集过一遍，返回平均损失（训练过程中的，权重一直在变）。"""
    model.train()  # Dropout、BatchNorm 等层进入训练行为；本章没有，但养成习惯
    total, count = 0.0, 0
    for x, y in batches:
        optimizer.zero_grad()  # 梯度是累加的：不清零就会混入上一步的
        loss = loss_fn(model(x), y)  # 前向：建起计算图，得到这一批的平均损失
        loss.backward()  # 反向：沿图倒推，把梯度写进每个参数的 .grad
        optimizer.step()  # 更新：参数沿负梯度方向走一步
        schedule.step()  # 学习率：按余弦从峰值降到零，每步一次
        total = total + loss.detach() * len(y)  # 平均损失 × 样本数；最后一批较小，权重也小
        count += len(y)
    return (total / count).item()  # 每轮只取一次数值：.item() 会让 GPU 停下来等


@torch.no_grad()  # 评估不需要计算图：省内存，也快
def evaluate(
    model: nn.Module,
    batches: TensorBatches,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    score_fn: Callable[[Tensor, Tensor], Tensor],
) -> tuple[float, float]:
    """在一个划分上的 (平均损失, 平均得分)；都是总和除以总数，不是各批平均的平均。"""
    model.eval()
    loss, score, count = 0.0, 0.0, 0
    for x, y in batches:
        output = model(x)
        loss = loss + loss_fn(output, y) * len(y)
        score = score + score_fn(output, y).sum()
        count += len(y)
    return (loss / count).item(), (score / count).item()


def fit(
    model: nn.Module, task: Task, args: argparse.Namespace, seed: int, name: str, folder: Path
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """训练一个模型；返回 (逐轮记录, 验证集上最好的一轮的权重)，模型停在最后一轮。

    检查点里有继续训练所需的一切：权重、优化器、学习率、数据顺序的生成器、全局随机状态、
    逐轮记录与最好的权重；因此续训走的是同一条轨迹。
    """
    generator = make_generator(seed)  # 打乱与增强的随机性
    train = task.batches("train", args.batch_size, generator)
    val = task.batches("val", 1000)
    lr = args.lr * (task.baseline_lr if name == task.baseline else 1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(train))
    config = {key: getattr(args, key) for key in CONFIG_KEYS} | {"name": name, "seed": seed}
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    state = TrainingState(folder, config, generator, resume=args.resume, **parts)
    better = task.expectation.higher_is_better
    with tqdm(total=args.epochs, initial=state.epoch, desc=f"{name} 种子 {seed}", unit="轮") as bar:
        while state.epoch < args.epochs:
            train_loss = train_one_epoch(model, train, task.loss, optimizer, schedule)
            val_loss, val_score = evaluate(model, val, task.loss, task.score)
            row = {"train_loss": train_loss, "val_loss": val_loss, "val_score": val_score}
            state.record(row, val_score, higher_is_better=better)
            bar.set_postfix_str(f"训练损失 {train_loss:.4f} 验证得分 {val_score:.4f}")
            bar.update()
    return state.history, state.best_weights


# 这些参数不同，就不是同一次训练，不能续
_DATA_KEYS = ("task", "dataset", "data_dir", "csv", "column", "smoke")
CONFIG_KEYS = (*_DATA_KEYS, "epochs", "batch_size", "lr", "hidden", "activation")


# ---------------------------------------------------------------- 入口


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description="训练 MLP：双螺旋分类、数字识别、回归")
    add_common_args(
        parser,
        out_dir=HERE / "outputs",
        epochs=8,
        batch_size=128,
        lr=2e-3,
        datasets=IMAGE_DATASETS,
        resume=True,
    )
    add = parser.add_argument
    add("--task", choices=["spiral", "digits", "regression"], default="spiral", help="任务")
    add("--hidden", type=int_list, default=(256, 128), metavar="N,N", help="MLP 各隐藏层的宽度")
    add("--activation", choices=list(MODULES), default="relu", help="激活函数")
    add("--seeds", type=positive_int, default=3, metavar="N", help="重复几个种子，报告 mean ± std")
    add("--csv", type=existing_file, metavar="FILE", help="regression：自己的带表头的数值 CSV")
    add("--column", metavar="NAME", help="regression：CSV 中要预测的列")
    args = parser.parse_args(argv)
    if (args.csv is None) != (args.column is None):
        parser.error("--csv 与 --column 要一起给出")
    if args.csv is not None and args.task != "regression":
        parser.error("--csv 只用于 --task regression")
    if args.task != "digits" and (args.dataset != IMAGE_DATASETS[0] or args.download):
        parser.error("--dataset 与 --download 只用于 --task digits，请加上它")
    if args.smoke:
        args.epochs, args.seeds = 2, 1
    if args.out_dir == HERE / "outputs":  # --smoke 另放一处，不冲掉真正的结果
        args.out_dir /= f"{args.task}_smoke" if args.smoke else args.task
    return args


def run_seeds(
    task: Task, args: argparse.Namespace, device: TorchDevice, out_dir: Path
) -> tuple[dict[str, list], dict[str, list[float]], dict[str, nn.Module]]:
    """对照模型与 MLP 各训练 ``--seeds`` 次；返回 (逐轮记录, 测试得分, 第一个种子的模型)。"""
    histories: dict[str, list] = {}
    scores: dict[str, list[float]] = {}
    models: dict[str, nn.Module] = {}
    if args.resume and not any((out_dir / "checkpoints").glob("*/*.pt")):
        print(f"提示  {out_dir} 里没有检查点，从头训练")
    if not args.resume:  # 旧的一个不留：否则中断之后续训，会接上从前另一次训练的检查点
        for folder in (out_dir / "checkpoints").glob("*"):
            CheckpointManager(folder).clear()
    for name, hidden in ((task.baseline, ()), ("mlp", args.hidden)):
        for seed in range(args.seed, args.seed + args.seeds):
            set_seed(seed)
            sizes = (task.in_features, hidden, task.out_features)
            model = MLP(*sizes, args.activation, make_generator(seed)).to(device.device)
            folder = out_dir / "checkpoints" / f"{name}_seed{seed}"
            history, weights = fit(model, task, args, seed, name, folder)
            model.load_state_dict(weights)
            _, score = evaluate(model, task.batches("test", 1000), task.loss, task.score)
            histories.setdefault(name, []).append(history)
            scores.setdefault(name, []).append(score)
            models.setdefault(name, model)
    return histories, scores, models


def main(argv: Sequence[str] | None = None) -> dict:
    """训练、评估、画图、下结论；返回写进 ``metrics.json`` 的内容。"""
    args = parse_args(argv)
    out_dir = prepare_out_dir(args.out_dir)
    set_seed(args.seed)
    device = get_device(args.device)
    torch.set_num_threads(1)  # 网络小，多线程的同步比运算还贵；核忙的时候更要慢好几倍
    print(f"设备  {device.describe()}")
    with Timer(device) as timer:
        task = make_task(
            args.task,
            smoke=args.smoke,
            device=device.device,
            dataset=args.dataset,
            data_dir=args.data_dir,
            download=args.download,
            csv_file=args.csv,
            column=args.column,
        )
        timer.lap("数据")
        example = MLP(task.in_features, args.hidden, task.out_features, args.activation)
        print(model_summary(example, torch.zeros(1, task.in_features)))
        print(task.expectation.announce())
        histories, scores, models = run_seeds(task, args, device, out_dir)
        timer.lap("训练")
    results = []
    for name, values in scores.items():
        mean, std = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
        spread = "" if std is None else f" ± {task.expectation.format(std)}"
        print(f"测试  {name:10s} {task.expectation.format(mean)}{spread}（{len(values)} 个种子）")
        if name == "mlp":
            baseline = statistics.fmean(scores[task.baseline])
            results.append(Result(task.expectation, mean, std, baseline))
        save_checkpoint(out_dir / f"{name}.pt", models[name].state_dict())
    return conclude(
        out_dir,
        results,
        timer,
        smoke=args.smoke,
        figures=draw(task, models, histories),
        test_scores=scores,
        histories=histories,
        laps=timer.laps,
    )


if __name__ == "__main__":
    run_main(main)
