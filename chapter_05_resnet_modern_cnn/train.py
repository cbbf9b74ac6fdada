"""训练 ResNet 与现代 CNN；同一个脚本可在一个进程、几个进程、CPU 或 GPU 上运行。

    python train.py                                     # resnet32 与去掉捷径的孪生网络，合成物体
    python train.py --model resnet10 --dataset folder --data-dir DIR --amp --channels-last
    torchrun --nproc-per-node 2 train.py --model resnet20

多进程时 ``--batch-size`` 是各进程合计的；每个进程的 BatchNorm 用自己那一份的统计量，滑动统计量在
评估之前取各进程的平均。检查点与进程数无关：两个进程存下的，一个进程可以接着训练。
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

if not __package__:  # 直接运行脚本时，把仓库根目录加入模块搜索路径
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chapter_03_optimization_regularization.averaging import EMA
from chapter_05_resnet_modern_cnn import figures
from chapter_05_resnet_modern_cnn.data import DATASETS, Data, load_data
from chapter_05_resnet_modern_cnn.models import MODELS, build_model, twin, usual_stem_stride
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
from utils.cli import (
    ArgumentParser,
    fraction,
    non_negative_float,
    positive_float,
    positive_int,
)
from utils.distributed import average_buffers, join_torchrun, main_first, world
from utils.file_io_util import save_checkpoint
from utils.resume import TrainingState

HERE = Path(__file__).resolve().parent
LONG_TABLE = 40  # 行，更长的模型摘要只印到块
# 每次前向之前是否把 0 号的缓冲区发给大家；这个参数新旧版本的名字不同
SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)

# ---------------------------------------------------------------- 训练循环


def parallelize(
    model: nn.Module, device: TorchDevice, compiled: bool
) -> Callable[[Tensor], Tensor]:
    """训练时前向所调用的：按需套上 DDP 与编译；与 ``model`` 共用参数。"""
    run: Any = model
    if world().size > 1:  # 反向时各进程的梯度取平均；BatchNorm 的统计量另由 average_buffers 汇总
        run = DistributedDataParallel(run, **{SYNC_BUFFERS: False})
    return device.compile(run) if compiled else run


def fit(
    name: str,
    model: nn.Module,
    data: Data,
    args: argparse.Namespace,
    device: TorchDevice,
    folder: Path,
) -> TrainingState:
    """训练；返回逐轮记录与验证集上最好的一轮的权重，模型停在最后一轮。"""
    generator = make_generator(args.seed)  # 打乱、增强与混合的随机性，与进程数无关
    where, classes = device.device, len(data.class_names)
    mixing = {"mixup": args.mixup, "cutmix": args.cutmix}
    augmented = args.augment == "standard"
    train, steps = data.training(
        args.batch_size, generator, augmented=augmented, device=where, **mixing
    )
    val = data.evaluation("val", where)
    still = data.batches("train", args.batch_size, device=where)  # 不打乱、不增强
    options = {
        "amp": torch.bfloat16 if args.amp else None,
        "memory_format": torch.channels_last if args.channels_last else torch.contiguous_format,
    }
    recipe = MODELS[name]
    decay = recipe.weight_decay if args.weight_decay is None else args.weight_decay
    optimizer, schedule = make_optimizer(
        model, recipe.optimizer, args.lr or recipe.lr, decay, args.epochs * steps
    )
    average = EMA(model, args.ema) if args.ema else None
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if average is not None:
        parts["average"] = average
    config = {key: getattr(args, key) for key in CONFIG_KEYS} | {"model": name}
    main = world().is_main
    state = TrainingState(folder, config, generator, resume=args.resume, writes=main, **parts)
    scored = model if average is None else average.module
    run = parallelize(model, device, args.compile)
    with tqdm(
        total=args.epochs, initial=state.epoch, desc=name, unit="轮", disable=not main
    ) as bar:
        while state.epoch < args.epochs:
            set_seed(epoch_seed(args.seed, state.epoch))  # 随机深度等：各进程各不相同
            loss = train_one_epoch(
                run, model, train, optimizer, schedule, device,
                label_smoothing=args.label_smoothing, average=average, **options,
            )  # fmt: skip
            if average is not None:
                refresh_statistics(average, still)
            average_buffers(scored)
            score = evaluate(scored, val, classes, device, **options)
            row = {
                "train_loss": loss, "val_loss": score.loss, "val_accuracy": score.accuracy
            }  # fmt: skip
            state.record(row, score.accuracy, scored=scored)
            bar.set_postfix_str(f"训练损失 {loss:.4f} 验证准确率 {100 * score.accuracy:.2f}%")
            bar.update()
    return state


def epoch_seed(seed: int, epoch: int) -> int:
    """一轮之初的全局种子：由种子、轮次与进程号决定，因此续训时不必保存各进程的随机数状态。"""
    return (seed * 1_000_003 + epoch * 1_009 + world().rank) % 2**32


# 这些参数不同，就不是同一次训练，不能续；进程数、--compile 不在其中
CONFIG_KEYS = (
    "dataset", "data_dir", "image_size", "stem_stride", "augment", "mixup", "cutmix", "smoke",
    "label_smoothing", "ema", "amp", "channels_last", "epochs", "batch_size", "lr",
    "weight_decay", "seed",
)  # fmt: skip


def train_and_test(
    name: str, data: Data, args: argparse.Namespace, device: TorchDevice, out_dir: Path
) -> dict[str, Any]:
    """训练一个网络，取验证集上最好的一轮，测一次测试集，存下权重。"""
    set_seed(args.seed)
    model = build_model(name, len(data.class_names), data.shape, args.stem_stride)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = model.to(device.device, memory_format=layout)
    if world().is_main:
        summary = model_summary(model, torch.zeros(1, *data.shape, device=device.device))
        print(summary if len(summary.rows) < LONG_TABLE else summary.collapsed(2))
    with Timer(device) as timer:
        # 文件夹不以网络命名：换了网络又 --resume，应当得到错误，而不是悄悄从头开始
        folder = "checkpoints" if name == args.model else "checkpoints_against"
        state = fit(name, model, data, args, device, out_dir / folder)
        timer.lap("训练")
    model.load_state_dict(state.best_weights)
    test = data.evaluation("test", device.device)
    score = evaluate(model, test, len(data.class_names), device)
    if world().is_main:
        save_checkpoint(out_dir / f"{name}.pt", state.best_weights)
        print(f"测试  {name}：交叉熵 {score.loss:.4f} nats，准确率 {100 * score.accuracy:.2f}%")
    seen = len(data.splits["train"].labels) // args.batch_size * args.batch_size
    seen *= state.epoch - state.start  # 续训时只算这一次走的几轮
    return {
        "history": state.history,
        "test_loss": score.loss,
        "test_accuracy": score.accuracy,
        "confusion": score.confusion.tolist(),
        "seconds": timer.laps["训练"],
        "images_per_second": seen / timer.laps["训练"],
    }


# ---------------------------------------------------------------- 入口

EPOCHS = {"synth-objects": 5}  # 其余 18 轮


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description="训练 ResNet 与现代 CNN（也可由 torchrun 启动）")
    add_common_args(
        parser, out_dir=HERE / "outputs", batch_size=128, datasets=DATASETS, resume=True
    )
    add = parser.add_argument
    add("--model", choices=list(MODELS), default="resnet32", help="网络，都是小图形式")
    add(
        "--against",
        choices=["auto", "none", *MODELS],
        default="auto",
        help="另训练一个对照网络；auto：synth-objects 上的 resnetN 与 plainN 相比",
    )
    add("--epochs", type=positive_int, metavar="N", help="训练轮数（默认 由 --dataset 决定）")
    add("--lr", type=positive_float, metavar="X", help="峰值学习率（默认 由 --model 决定）")
    add("--weight-decay", type=non_negative_float, metavar="X", help="权重衰减（默认 同上）")
    add(
        "--stem-stride",
        type=int,
        choices=[1, 2],
        help="起始卷积的步幅（默认 synth-objects 为 2，其余为 1）",
    )
    add("--augment", choices=["standard", "none"], default="standard", help="裁剪与翻转")
    add("--mixup", type=non_negative_float, default=0.0, metavar="A", help="Beta 参数，0 不用")
    add("--cutmix", type=non_negative_float, default=0.0, metavar="A", help="Beta 参数，0 不用")
    add("--label-smoothing", type=fraction, default=0.0, metavar="E", help="标签平滑")
    add("--ema", type=fraction, default=0.0, metavar="B", help="权重平均的衰减，如 0.99；0 不用")
    add("--amp", action="store_true", help="卷积与矩阵乘法用 bfloat16")
    add("--compile", action="store_true", help="torch.compile（需要编译器）")
    add("--channels-last", action="store_true", help="通道放在最后的内存布局")
    add("--image-size", type=positive_int, metavar="N", help="folder 的边长，像素（默认 32）")
    args = parser.parse_args(argv)
    if args.image_size and args.dataset != "folder":
        parser.error(f"--image-size 只用于 --dataset folder：{args.dataset} 的图自有大小")
    for name in ("ema", "label_smoothing"):
        if getattr(args, name) == 1:
            parser.error(f"--{name.replace('_', '-')} 应小于 1：等于 1 就什么也学不到")
    args.image_size = args.image_size or 32
    synthetic = args.dataset == "synth-objects"
    args.epochs = args.epochs or EPOCHS.get(args.dataset, 18)
    args.stem_stride = args.stem_stride or usual_stem_stride(args.dataset)
    if args.against == "auto":
        args.against = (twin(args.model) if synthetic else None) or "none"
    if args.smoke:
        args.epochs = 2
    if args.out_dir == HERE / "outputs":  # 各次运行各放一处，互不冲掉
        name = f"{args.model}_{args.dataset}"
        args.out_dir /= f"{name}_smoke" if args.smoke else name
    return args


# 实测过的测试准确率区间；没有测过的只按机会线给出宽松的下限
BANDS = {
    ("resnet32", "synth-objects"): (0.6, 0.85),
    ("resnet10", "cifar10"): (0.83, 0.93),  # 在同样图片的 JPEG 副本上测得 86.2%
}
# 实测过的一对：领先孪生网络多少
LEADS = {("resnet32", "plain32", "synth-objects"): (0.1, 0.6)}


def expectations(args: argparse.Namespace, data: Data) -> list[Expectation]:
    """这个网络在这个数据集上的预期；与实测过的对照相比时，另有一项领先多少。"""
    chance = data.chance
    loose = (min(3 * chance, (1 + chance) / 2), 1.0)
    band = BANDS.get((args.model, args.dataset), loose)
    found = [Expectation("测试准确率", chance, band, percent=True)]
    if lead := LEADS.get((args.model, args.against, args.dataset)):
        found.append(Expectation(f"领先 {args.against}", 0.0, lead, percent=True))
    return found


def work(args: argparse.Namespace) -> dict[str, Any]:
    """一个进程做的全部事情；只有 0 号进程打印、存盘与画图。"""
    main = world().is_main
    out_dir = prepare_out_dir(args.out_dir)
    device = get_device(args.device)
    with Timer(device) as timer:
        with main_first() if args.download else nullcontext():
            data = load_data(
                args.dataset,
                args.data_dir,
                download=args.download,
                limit=256 if args.smoke else None,
                image_size=args.image_size,
            )
        timer.lap("数据")
        data.steps(args.batch_size)  # 批不合适，就在建网络之前说
        expected = expectations(args, data)
        names = [args.model, *([args.against] if args.against != "none" else [])]
        if main:
            print(f"设备  {device.describe()}，{world().size} 个进程")
            print("\n".join(e.announce() for e in expected))
        runs = {name: train_and_test(name, data, args, device, out_dir) for name in names}
        timer.lap("训练与测试")
    if not main:
        return {}
    reached = runs[args.model]["test_accuracy"]
    other = runs.get(args.against, {}).get("test_accuracy")
    results = [Result(expected[0], reached, baseline=other)]
    results += [Result(lead, reached - other) for lead in expected[1:]]
    return conclude(
        out_dir,
        results,
        timer,
        smoke=args.smoke,
        figures=figures.training_figures(runs, expected[0].chance, data.class_names),
        runs=runs,
        images_per_second=runs[args.model]["images_per_second"],
        processes=world().size,
        laps=timer.laps,
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """训练、评估、画图、下结论；返回写进 ``metrics.json`` 的内容（0 号以外的进程为空）。"""
    args = parse_args(argv)
    with join_torchrun(args.device):
        return work(args)


if __name__ == "__main__":
    run_main(main)
