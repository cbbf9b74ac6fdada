"""与 torchvision 逐个比较：同样的权重，输出、梯度与用时；以及两个进程对一个进程。

    python benchmark.py                    # 全部
    python benchmark.py --part parity      # 23 个 ImageNet 形式：参数量、输出、一步的梯度
    python benchmark.py --part speed       # 前向加反向的用时，224 像素，批 4，交替测量
    python benchmark.py --part processes   # 数据并行：损失曲线之差与吞吐量

缺省一个线程：机器忙的时候，多线程的数字不可信。
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

if not __package__:  # 直接运行脚本时，把仓库根目录加入模块搜索路径
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chapter_03_optimization_regularization.averaging import update_bn
from chapter_05_resnet_modern_cnn.data import load_data
from chapter_05_resnet_modern_cnn.models import OFFICIAL, build_model
from chapter_05_resnet_modern_cnn.recipe import make_optimizer, train_one_epoch
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
from utils.datasets import import_torchvision
from utils.distributed import launch, world
from utils.model_summary import count_parameters
from utils.timer import alternate, run_isolated, seconds_of

HERE = Path(__file__).resolve().parent
PARTS = ("parity", "speed", "processes")

TIMED = ("resnet18", "resnet50", "densenet121", "mobilenet_v2", "efficientnet_b0")
SIZE = 224  # 像素


def pair(name: str, pixels: int, generator: torch.Generator) -> tuple[nn.Module, nn.Module]:
    """我们的与 torchvision 的，同样的随机权重与 BatchNorm 统计量。

    统计量由一批随机图像得出（其间关掉随机深度）：起步时的 0 与 1 错了也看不出，随便取的又会使上百层
    的输出爆掉。
    """
    torchvision = import_torchvision()
    theirs = getattr(torchvision.models, name)(weights=None)
    drops = [m for m in theirs.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
    rates = [drop.p for drop in drops]
    for drop in drops:
        drop.p = 0.0
    update_bn([batch(2, pixels, generator)], theirs)
    for drop, rate in zip(drops, rates, strict=True):
        drop.p = rate
    ours = OFFICIAL[name]()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """一次前向与反向。"""
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()


def batch(size: int, pixels: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """一批随机图像与标签。"""
    x = torch.randn(size, 3, pixels, pixels, generator=generator)
    return x, torch.randint(0, 1000, (size,), generator=generator)


def worst(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """逐个张量最大的绝对差里最大的。"""
    return max((p - q).abs().max().item() for p, q in zip(a, b, strict=True))


# ---------------------------------------------------------------- 相等


def parity_part(args: argparse.Namespace) -> tuple[list[Result], dict[str, Any]]:
    """每个 ImageNet 形式：参数量、评估模式的输出、一步的梯度，与 torchvision 之差。"""
    generator = make_generator(args.seed)
    pixels = 64 if args.smoke else SIZE
    x, y = batch(2, pixels, generator)
    names = TIMED[:1] if args.smoke else OFFICIAL
    rows = {}
    for name in tqdm(names, desc="相等", leave=False):
        models = [model.eval() for model in pair(name, pixels, generator)]
        with torch.no_grad():
            outputs = [model(x) for model in models]
        for model in models:
            step(model, x, y)
        gradients = [[p.grad for p in model.parameters()] for model in models]
        counts = [count_parameters(model) for model in models]
        assert 1e-3 < outputs[0].std() < 1e3, f"{name} 的输出不正常，比较没有意义"
        rows[name] = {
            "params": counts[0],
            "params_difference": abs(counts[0] - counts[1]),
            "output": worst(*[[output] for output in outputs]),
            "gradient": worst(*gradients),
        }
    for name, row in rows.items():
        print(
            f"{name:20s} 参数 {row['params']:>11,}，相差 {row['params_difference']}；"
            f"输出相差 {row['output']:.1e}，梯度相差 {row['gradient']:.1e}"
        )

    def largest(key: str) -> float:
        return max(row[key] for row in rows.values())

    exact = partial(Expectation, chance=1.0, band=(0.0, 0.0), learning=False)
    return [
        Result(exact(f"{len(rows)} 个网络的参数量之差"), largest("params_difference")),
        Result(exact("评估模式输出的最大差"), largest("output")),
        Result(exact("一步梯度的最大差"), largest("gradient")),
    ], {"parity": rows}


# ---------------------------------------------------------------- 用时


def speed_part(args: argparse.Namespace) -> tuple[list[Result], dict[str, Any]]:
    """训练模式下前向加反向的用时，我们的 ÷ torchvision 的。"""
    generator = make_generator(args.seed)
    pixels = 64 if args.smoke else SIZE
    x, y = batch(4, pixels, generator)
    results, seconds = [], {}
    for name in TIMED[:1] if args.smoke else TIMED:
        models = dict(zip(("ours", "torchvision"), pair(name, pixels, generator), strict=True))
        contenders = {
            who: partial(seconds_of, partial(step, model.train(), x, y))
            for who, model in models.items()
        }
        found = seconds[name] = alternate(contenders, args.repeats)
        low, middle = (
            measure(found["ours"]) / measure(found["torchvision"])
            for measure in (min, statistics.median)
        )
        print(
            f"{name:16s} 最小 {1e3 * min(found['ours']):7.1f} 毫秒，"
            f"÷ torchvision：最小之比 {low:.3f}，中位数之比 {middle:.3f}"
        )
        expected = Expectation(f"{name} 用时 ÷ torchvision", 2.0, (0.9, 1.03), learning=False)
        results.append(Result(expected, low))
    return results, {"seconds": seconds}


# ---------------------------------------------------------------- 多个进程


def train_steps(name: str, batch_size: int, limit: int, epochs: int) -> dict[str, Any]:
    """在当前的进程组里训练几轮，返回逐轮的损失与吞吐量（第一轮预热，不计）。"""
    set_seed(0)
    data = load_data("synth-objects", limit=limit)
    model = build_model(name, len(data.class_names), data.shape, stem_stride=2)
    options = {"augmented": True, "mixup": 0.2, "cutmix": 0.0, "device": "cpu"}
    train, steps = data.training(batch_size, make_generator(0), **options)
    optimizer, schedule = make_optimizer(model, "sgd", 0.05, 5e-4, epochs * steps)
    run = DistributedDataParallel(model) if world().size > 1 else model
    losses, seconds = [], []
    for _ in range(epochs):
        with Timer() as timer:
            work = (run, model, train, optimizer, schedule, get_device("cpu"))
            losses.append(train_one_epoch(*work))
        seconds.append(timer.elapsed)
    return {"losses": losses, "images_per_second": steps * batch_size / min(seconds[1:])}


def processes_part(args: argparse.Namespace) -> tuple[list[Result], dict[str, Any]]:
    """同样的全局批：一个进程（一个、两个线程）对两个进程（各一个线程）。"""
    work = (128, 256 if args.smoke else 4000, 2 if args.smoke else 4)
    found: dict[str, dict[str, Any]] = {}
    smooth, normed = ("convnext", "convnext" if args.smoke else "resnet20")
    for name in dict.fromkeys((smooth, normed)):
        runs = found[name] = {
            "one process, one thread": run_isolated(train_steps, name, *work),
            "one process, two threads": run_isolated(train_steps, name, *work, threads=2),
            "two processes": launch(train_steps, 2, (name, *work)),
        }
        for who, run in runs.items():
            print(f"{name:9s} {who:25s} {run['images_per_second']:7.0f} 张/秒", end="")
            print("，逐轮损失 " + "、".join(f"{loss:.6f}" for loss in run["losses"]))

    def apart(name: str) -> float:
        one, two = (found[name][who]["losses"] for who in list(found[name])[::2])
        return max(abs(a - b) for a, b in zip(one, two, strict=True))

    def ratio(name: str) -> float:
        one, two = (found[name][who]["images_per_second"] for who in list(found[name])[::2])
        return two / one

    same = Expectation("两个进程与一个的损失之差，无 BatchNorm", 1.0, (0.0, 1e-5), learning=False)
    other = Expectation("两个进程与一个的损失之差，有 BatchNorm", 1.0, (0.0, 0.2), learning=False)
    faster = Expectation("两个进程的吞吐量 ÷ 一个（各一线程）", 1.0, (1.2, 2.2), learning=False)
    return [
        Result(same, apart(smooth)),
        Result(other, apart(normed)),
        Result(faster, ratio(normed)),
    ], {"processes": found}


# ---------------------------------------------------------------- 入口


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description="与 torchvision 比较，以及多进程的吞吐量")
    add_common_args(parser, out_dir=HERE / "outputs" / "benchmark", device=False)
    add = parser.add_argument
    add("--part", choices=["all", *PARTS], default="all", help="测哪一部分")
    add("--repeats", type=positive_int, default=25, metavar="N", help="用时的重复次数")
    add("--threads", type=positive_int, default=1, metavar="N", help="线程数")
    args = parser.parse_args(argv)
    if args.smoke:
        args.repeats = 1
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """测量所选的部分；返回写进 ``metrics.json`` 的内容。"""
    args = parse_args(argv)
    out_dir = prepare_out_dir(args.out_dir)
    set_seed(args.seed)
    torch.set_num_threads(args.threads)
    parts = {"parity": parity_part, "speed": speed_part, "processes": processes_part}
    chosen = PARTS if args.part == "all" else (args.part,)
    if set(chosen) & {"parity", "speed"}:
        import_torchvision()  # 不可用就在测量之前说，--part processes 不需要它
    results, details = [], {}
    with Timer() as timer:
        for name in chosen:
            found, numbers = parts[name](args)
            results += found
            details |= numbers
    return conclude(out_dir, results, timer, smoke=args.smoke, **details)


if __name__ == "__main__":
    run_main(main)
