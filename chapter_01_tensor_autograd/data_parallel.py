"""数据并行：几个进程各算一部分样本的梯度，加起来与一个进程算全部样本相同。

    python data_parallel.py                                   # 自己派生两个进程
    python data_parallel.py --processes 4 --bucket-mib 0.25
    torchrun --standalone --nproc_per_node=2 data_parallel.py # 由 torchrun 启动

先核对（梯度、训练若干步之后的权重、环形与官方的 all-reduce），再测速（一个进程、一个进程多线程、
多个进程）。算法在 all_reduce.py。对应 README 的「分布式训练：梯度相加」一节。
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if not __package__:  # 直接运行脚本时，把仓库根目录加入模块搜索路径
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chapter_01_tensor_autograd.all_reduce import (
    BucketedReducer,
    backward_on,
    ring_all_reduce,
    shard,
)
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
from utils.cli import ArgumentParser, UserError, positive_float, positive_int
from utils.datasets import load_images
from utils.distributed import launch
from utils.timer import seconds_of
from utils.topics import Check

HERE = Path(__file__).resolve().parent
MIB = 2**20


# ---------------------------------------------------------------- 每个进程的工作


def make_model(seed: int, width: int, dtype: torch.dtype) -> nn.Sequential:
    """784-width-width-10 的 MLP；各进程用同一个种子，起点就相同，不必广播。"""
    set_seed(seed)
    layers = [nn.Flatten(), nn.Linear(784, width), nn.ReLU()]
    layers += [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    return nn.Sequential(*layers).to(dtype)


def gradients(model: nn.Module) -> Tensor:
    """全部梯度拼成一条。"""
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def relative(actual: Tensor, expected: Tensor) -> float:
    """最大绝对误差除以最大的数。"""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def compare(args: argparse.Namespace, x: Tensor, y: Tensor) -> dict[str, float]:
    """并行与单进程（每个进程都自己算一遍全部样本）比较：梯度，以及训练若干步之后的权重。"""
    errors = {}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        parallel, single = (make_model(args.seed, args.width, dtype) for _ in range(2))
        reducer = BucketedReducer(list(parallel.parameters()), int(args.bucket_mib * MIB))
        pixels, learn = x.to(dtype), partial(torch.optim.SGD, lr=0.1)
        optimizers = [learn(model.parameters()) for model in (parallel, single)]
        for step in range(args.steps):
            start = step * args.batch_size % (len(x) - args.batch_size + 1)
            batch = slice(start, start + args.batch_size)
            backward_on(parallel, shard(pixels[batch]), shard(y[batch]), args.batch_size)
            reducer.finish()
            backward_on(single, pixels[batch], y[batch], args.batch_size)
            if step == 0:
                errors[f"gradient {name}"] = relative(gradients(parallel), gradients(single))
            for optimizer in optimizers:
                optimizer.step()
        weights = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in
                   (parallel, single)]  # fmt: skip
        errors[f"weights {name}"] = relative(*weights)
        reducer.detach()
    flat = torch.randn(10_007, generator=make_generator(dist.get_rank()), dtype=torch.float64)
    ours, official = flat.clone(), flat.clone()
    ring_all_reduce(ours)
    dist.all_reduce(official)
    errors["ring float64"] = relative(ours, official)
    return errors


def measure(args: argparse.Namespace, x: Tensor, y: Tensor, batch_size: int) -> dict[str, float]:
    """交替测量一步（前向、反向、归约、更新）的秒数（中位数）：一个进程、一个进程多线程、多个进程。

    轮到单进程时其余进程停在 barrier 上，不占 CPU。
    """
    model = make_model(args.seed, args.width, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batch, labels = x[:batch_size].float(), y[:batch_size]
    mine, my_labels = shard(batch), shard(labels)

    def single(threads: int) -> None:
        if dist.get_rank() == 0:
            torch.set_num_threads(threads)
            backward_on(model, batch, labels, batch_size)
            optimizer.step()
            torch.set_num_threads(1)

    def parallel(reduce: Callable[[], None]) -> None:
        backward_on(model, mine, my_labels, batch_size)
        reduce()
        optimizer.step()

    processes = dist.get_world_size()
    contenders: dict[str, Callable[[], None]] = {
        "1 process, 1 thread": partial(single, 1),
        f"1 process, {processes} threads": partial(single, processes),
        f"{processes} processes, compute only": partial(parallel, lambda: None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    full = f"{processes} processes, with all-reduce"
    seconds[full] = []
    for round_number in range(args.repeats + 1):
        for name, work in contenders.items():
            dist.barrier()
            seconds[name].append(seconds_of(work))
        reducer = BucketedReducer(list(model.parameters()), int(args.bucket_mib * MIB))
        dist.barrier()
        seconds[full].append(seconds_of(partial(parallel, reducer.finish)))
        reducer.detach()
        if round_number == 0:  # 预热，不计
            seconds = {name: [] for name in seconds}
    dist.barrier()
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_all_reduce(args: argparse.Namespace) -> list[dict[str, float]]:
    """不同大小的 all-reduce：环形与官方的秒数（最小值），以及环形发出的字节数。"""
    rows = []
    for mib in (1 / 64, 1 / 16, 1 / 4, 1, 4):
        flat = torch.ones(int(mib * MIB) // 4)
        times: dict[str, list[float]] = {"ring": [], "official": []}
        for _ in range(args.repeats):
            for name, reduce in (("ring", ring_all_reduce), ("official", dist.all_reduce)):
                dist.barrier()
                times[name].append(seconds_of(partial(reduce, flat.clone())))
        row = {name: min(values) for name, values in times.items()}
        rows.append(row | {"mib": mib, "sent": ring_all_reduce(flat.clone())})
    return rows


def work(args: argparse.Namespace, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """一个进程的全部工作；各进程运行同样的代码。"""
    x = images.double() / 255
    sizes = sorted({max(dist.get_world_size(), args.batch_size // k) for k in (16, 4, 1)})
    return {
        "errors": compare(args, x, labels),
        "steps": [
            {"batch_size": size, "seconds": measure(args, x, labels, size)} for size in sizes
        ],
        "all_reduce": measure_all_reduce(args),
        "processes": dist.get_world_size(),
        "rank": dist.get_rank(),
    }


# ---------------------------------------------------------------- 入口


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description="数据并行：多进程的梯度等于单进程的大批")
    add_common_args(
        parser, out_dir=HERE / "outputs" / "data_parallel", batch_size=2047, device=False
    )
    add = parser.add_argument
    add(
        "--processes", type=positive_int, default=2, metavar="N", help="进程数（torchrun 以它为准）"
    )
    add("--width", type=positive_int, default=512, metavar="N", help="隐藏层的宽度")
    add("--steps", type=positive_int, default=10, metavar="N", help="比较权重之前训练几步")
    add("--repeats", type=positive_int, default=25, metavar="N", help="每种设置测几次")
    add("--bucket-mib", type=positive_float, default=1.0, metavar="X", help="每桶的大小，MiB")
    args = parser.parse_args(argv)
    if args.smoke:
        args.width, args.steps, args.repeats, args.batch_size = 16, 2, 2, 63
    if args.batch_size < args.processes:
        parser.error(f"--batch-size {args.batch_size} 应不小于进程数 {args.processes}")
    return args


def main(argv: Sequence[str] | None = None) -> dict:
    """派生（或加入）进程组，比较、测速、下结论；返回写进 ``metrics.json`` 的内容。"""
    from chapter_01_tensor_autograd import figures  # 派生的进程会重新导入本文件，用不着画图

    args = parse_args(argv)
    out_dir = prepare_out_dir(args.out_dir)
    set_seed(args.seed)
    torch.set_num_threads(1)
    with Timer() as timer:
        images, labels, _ = load_images("synth-digits", "train", limit=2 * args.batch_size)
        if len(images) < args.batch_size:
            raise UserError(f"--batch-size {args.batch_size} 超过了训练集的 {len(images)} 张")
        found = launch(work, args.processes, (args, images, labels))
    if found.pop("rank") != 0:  # 由 torchrun 启动的其余进程，到此为止
        return {}
    for name, error in found["errors"].items():
        print(f"误差  {name:18s} {error:.1e}")
    for step in found["steps"]:
        single, threads, compute, full = (1e3 * value for value in step["seconds"].values())
        print(
            f"一步  批 {step['batch_size']:4d}：单进程 {single:.1f} 毫秒，多线程 {threads:.1f}，"
            f"多进程 {full:.1f}（其中计算 {compute:.1f}）；"
            f"加速 {single / full:.2f} 倍，多线程 {single / threads:.2f} 倍"
        )
    speedup = single / full
    results = [
        Result(
            Check("梯度的相对误差，float32", 1.0, (1e-6, 0.0)), found["errors"]["gradient float32"]
        ),
        Result(
            Check("梯度的相对误差，float64", 1.0, (1e-13, 0.0)), found["errors"]["gradient float64"]
        ),
        Result(
            Check("环形与官方 all-reduce 之差，float64", 1.0, (1e-13, 0.0)),
            found["errors"]["ring float64"],
        ),
        Result(
            Check("一步的加速：单进程 ÷ 多进程", 0.0, (0.5, 1.1 * found["processes"])),
            speedup,
        ),
    ]
    return conclude(
        out_dir,
        results,
        timer,
        smoke=args.smoke,
        figures={
            "data_parallel.png": figures.data_parallel_figure(found["steps"], found["all_reduce"])
        },
        **found,
    )


if __name__ == "__main__":
    run_main(main)
