"""速度：本章的引擎对 PyTorch，标量引擎与垃圾回收，很长的链。

    python benchmark.py                                        # 合成数字
    python benchmark.py --dataset mnist --data-dir 数据文件夹   # 真实的 MNIST，一轮 60000 张

1. MLP 784-256-10，批 128，SGD，float32，训练一轮：引擎与 PyTorch 轮流，权重与批次都相同。
2. 标量引擎上 MLP 2-16-16-1 的一步（缺省 100 个样本）：图里有环与无环，垃圾回收器开与关。
3. 引擎里一百万个结点的链：前向、反向的时间，每个结点的内存。

每一项都在自己的进程里、用 ``--threads`` 个线程（缺省 1）测量。
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

if not __package__:  # 直接运行脚本时，把仓库根目录加入模块搜索路径
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chapter_01_tensor_autograd import functional as F
from chapter_01_tensor_autograd import scalar_engine, scalar_mlp
from chapter_01_tensor_autograd.engine import Tensor, as_tensor
from chapter_01_tensor_autograd.nn import MLP, TorchMLP
from chapter_01_tensor_autograd.optim import SGD
from utils import (
    Result,
    Timer,
    add_common_args,
    conclude,
    make_generator,
    prepare_out_dir,
    run_main,
    set_seed,
)
from utils.cli import ArgumentParser, positive_int
from utils.datasets import load_images
from utils.device import peak_rss_mib
from utils.synth_points import two_moons
from utils.timer import alternate, run_isolated, seconds_of
from utils.topics import Check

HERE = Path(__file__).resolve().parent
BATCH, LR = 128, 0.1
MIN_CHAIN = 10_000

# ---------------------------------------------------------------- 一轮 MLP


def load_flat(dataset: str, data_dir: Path, download: bool, limit: int | None) -> tuple:
    """训练与验证两个划分合在一起（MNIST 正好 60000 张），另加测试集；float32，打乱一次。"""
    parts = [
        load_images(dataset, split, data_dir, download=download, limit=limit)
        for split in ("train", "val", "test")
    ]
    x, y = (
        [torch.cat([getattr(part, key) for part in group]) for group in (parts[:2], parts[2:])]
        for key in ("images", "labels")
    )
    order = torch.randperm(len(x[0]), generator=make_generator(0))
    train, test = (images.flatten(1).float().div(255).numpy() for images in (x[0][order], x[1]))
    return train, y[0][order].numpy(), test, y[1].numpy()


def measure_epoch(data: tuple, repeats: int, seed: int) -> dict[str, Any]:
    """引擎与 PyTorch 轮流训练一轮；返回各次的秒数，以及各训练一轮之后的测试准确率。"""
    x, y, x_test, y_test = data
    sizes = (784, 256, 10)
    ours = MLP(sizes, "relu", make_generator(seed), np.float32)
    twin = TorchMLP(sizes, "relu")
    twin.load_state_dict(ours.state_dict())
    optimizer, official = SGD(ours.parameters(), LR), torch.optim.SGD(twin.parameters(), LR)
    x_torch, y_torch = torch.from_numpy(x), torch.from_numpy(y)

    def engine_epoch() -> None:
        for start in range(0, len(x), BATCH):
            chosen = slice(start, start + BATCH)
            optimizer.zero_grad()
            F.cross_entropy(ours(as_tensor(x[chosen])), y[chosen]).backward()
            optimizer.step()

    def torch_epoch() -> None:
        for start in range(0, len(x), BATCH):
            chosen = slice(start, start + BATCH)
            official.zero_grad()
            torch.nn.functional.cross_entropy(twin(x_torch[chosen]), y_torch[chosen]).backward()
            official.step()

    engine_epoch()
    torch_epoch()
    with torch.no_grad():
        logits = {
            "engine": ours(as_tensor(x_test)).numpy(),
            "PyTorch": twin(torch.from_numpy(x_test)).numpy(),
        }
    accuracy = {name: float((z.argmax(1) == y_test).mean()) for name, z in logits.items()}
    contenders = {
        "engine": partial(seconds_of, engine_epoch),
        "PyTorch": partial(seconds_of, torch_epoch),
    }
    return {"seconds": alternate(contenders, repeats), "accuracy": accuracy}


# ---------------------------------------------------------------- 标量引擎与垃圾回收


def measure_scalar(repeats: int, samples: int) -> dict[str, list[float]]:
    """一步的秒数：结点无环与有环，垃圾回收器开与关。"""
    points, labels = two_moons(samples, make_generator(0), noise=0.1)
    xs, ys = points.tolist(), (2 * labels - 1).tolist()
    seconds: dict[str, list[float]] = {}
    for name, node, count in (
        ("acyclic (ours)", scalar_engine.Value, repeats),
        ("closures (cyclic)", scalar_mlp.ClosureValue, max(1, repeats // 5)),  # 慢得多，少测几次
    ):
        for collecting in (True, False):
            with (
                mock.patch.object(scalar_engine, "Value", node),
                mock.patch.object(scalar_mlp, "Value", node),
            ):
                model = scalar_mlp.ScalarMLP((2, 16, 16, 1), make_generator(0))
                step = partial(scalar_mlp.hinge_step, model, xs, ys, 0.1)
                gc.collect()
                if not collecting:
                    gc.disable()
                times = [seconds_of(step) for _ in range(count + 1)][1:]
                gc.enable()
            seconds[f"{name}, gc {'on' if collecting else 'off'}"] = times
    return seconds


# ---------------------------------------------------------------- 很长的链


def measure_chains(lengths: Sequence[int]) -> list[dict[str, float]]:
    """由短到长的几条链：前向与反向的秒数，内存的峰值（MiB），梯度的相对误差。"""
    rows = []
    for length in lengths:
        x, factor = Tensor(1.0, requires_grad=True), 1 + 1 / length
        with Timer() as timer:
            y = x
            for _ in range(length):
                y = y * factor
            timer.lap("forward")
            y.backward()
            timer.lap("backward")
        expected = factor**length
        error = abs(x.grad.item() - expected) / expected
        rows.append(timer.laps | {"length": length, "mib": peak_rss_mib(), "error": error})
    return rows


def bytes_per_node(chains: Sequence[dict[str, float]]) -> list[float]:
    """相邻两条链的内存之差除以结点数之差：进程本来占的内存就抵消了。"""
    pairs = zip(chains[:-1], chains[1:], strict=True)
    return [2**20 * (b["mib"] - a["mib"]) / (b["length"] - a["length"]) for a, b in pairs]


# ---------------------------------------------------------------- 入口


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description="本章引擎的速度")
    add_common_args(
        parser,
        out_dir=HERE / "outputs" / "benchmark",
        datasets=("synth-digits", "mnist", "fashion-mnist"),
        device=False,
    )
    add = parser.add_argument
    add("--repeats", type=positive_int, default=25, metavar="N", help="每项测几次")
    add("--threads", type=positive_int, default=1, metavar="N", help="线程数")
    add("--chain", type=positive_int, default=1_000_000, metavar="N", help="链有多长")
    add("--samples", type=positive_int, default=100, metavar="N", help="标量引擎的样本数")
    args = parser.parse_args(argv)
    if args.chain < MIN_CHAIN:
        parser.error(f"--chain {args.chain} 太短，量不出内存：至少 {MIN_CHAIN}")
    if args.smoke:
        args.repeats, args.chain, args.samples = 1, 40_000, 10
    return args


def main(argv: Sequence[str] | None = None) -> dict:
    """测量、画图、下结论；返回写进 ``metrics.json`` 的内容。"""
    from chapter_01_tensor_autograd import figures  # 测量的子进程会重新导入本文件，用不着画图

    args = parse_args(argv)
    out_dir = prepare_out_dir(args.out_dir)
    set_seed(args.seed)
    torch.set_num_threads(args.threads)
    limit = 256 if args.smoke else None
    data = load_flat(args.dataset, args.data_dir, args.download, limit)
    # 各项都在自己的进程里测；--smoke 只走一遍代码，不必等进程启动
    run = _directly if args.smoke else partial(run_isolated, threads=args.threads)
    with Timer() as timer:
        scalar = run(measure_scalar, args.repeats, args.samples)
        chains = run(measure_chains, [args.chain // 8, args.chain // 4, args.chain])
        epoch = run(measure_epoch, data, args.repeats, args.seed)
    report_epoch(epoch, len(data[0]))
    best = {name: statistics.median(values) for name, values in scalar.items()}
    for name, value in best.items():
        print(f"标量  一步 {name:26s} 中位数 {1e3 * value:7.1f} 毫秒")
    for chain in chains:
        print(
            f"链    {chain['length']:9,d} 个结点：前向 {chain['forward']:.2f} 秒，"
            f"反向 {chain['backward']:.2f} 秒，进程的内存峰值 {chain['mib']:.0f} MiB"
        )
    shorter, longer = bytes_per_node(chains)
    print(f"链    每个结点的内存：短链 {shorter:.0f} 字节，长链 {longer:.0f} 字节")
    ours, theirs = (statistics.median(values) for values in epoch["seconds"].values())
    acyclic, _, cyclic, _ = best.values()
    gap = abs(epoch["accuracy"]["engine"] - epoch["accuracy"]["PyTorch"])
    results = [
        Result(Check("MLP 训练一轮：引擎 ÷ PyTorch", 3.0, (1.1, 0.3)), ours / theirs),
        Result(Check("一轮之后测试准确率：引擎与 PyTorch 之差", 1.0, (2e-3, 0.0)), gap),
        Result(Check("标量引擎的一步，毫秒", 1e4, (1000.0, 5.0)), 1e3 * acyclic),
        Result(Check("标量引擎的一步：闭包成环 ÷ 无环", 1.0, (3.0, 30.0)), cyclic / acyclic),
        Result(Check("链的梯度的相对误差", 1.0, (1e-9, 0.0)), chains[-1]["error"]),
    ]  # fmt: skip
    if not math.isnan(longer):  # Windows 上无从得知
        check = Check("每结点内存：长链 ÷ 短链", 4.0, (1.25, 0.75))
        results.append(Result(check, longer / max(shorter, 1.0)))
    return conclude(
        out_dir,
        results,
        timer,
        smoke=args.smoke,
        figures={"speed.png": figures.speed_figure(epoch["seconds"], scalar, chains)},
        epoch=epoch,
        scalar=scalar,
        chains=chains,
    )


def _directly(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def report_epoch(epoch: dict[str, Any], images: int) -> None:
    """打印一轮的秒数与准确率。"""
    for name, values in epoch["seconds"].items():
        print(
            f"一轮  {name:8s} {images} 张，最小 {min(values):.3f} 秒，"
            f"中位数 {statistics.median(values):.3f} 秒，测试准确率 {epoch['accuracy'][name]:.4f}"
        )


if __name__ == "__main__":
    run_main(main)
