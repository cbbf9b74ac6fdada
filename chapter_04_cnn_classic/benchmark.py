"""卷积与数据管线的代价：我们的写法对官方的，在同一次运行里交替测量。

    python benchmark.py                                              # 全部，合成数字
    python benchmark.py --part data --dataset mnist --data-dir 文件夹  # 真实的 MNIST
    python benchmark.py --part conv --threads 2

- ``conv``：im2col 对 ``F.conv2d``，前向加反向，批 64、32×32 的图；以及三种写法随核的大小怎样变。
- ``data``：一轮数据，驻留内存的批迭代器对 torchvision 的 ``ToTensor`` + ``DataLoader``
  （``num_workers=0``）；以及取数据占 LeNet 一轮训练的几分之几。
- ``layout``：小图 VGG-11 训练一步，``channels_last`` 对缺省的内存次序。

缺省一个线程：机器忙的时候，多线程的数字不可信。
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if not __package__:  # 直接运行脚本时，把仓库根目录加入模块搜索路径
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chapter_04_cnn_classic import conv, figures
from chapter_04_cnn_classic.conv import conv2d_fft, conv2d_im2col, conv2d_naive
from chapter_04_cnn_classic.data import Data, load_data
from chapter_04_cnn_classic.lenet import lenet5
from chapter_04_cnn_classic.vgg import vgg_small
from utils import (
    Expectation,
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
from utils.datasets import import_torchvision
from utils.timer import alternate, seconds_of

HERE = Path(__file__).resolve().parent
PARTS = ("conv", "data", "layout")
Seconds = dict[str, list[float]]

# ---------------------------------------------------------------- 卷积

LAYERS = ((3, 32), (32, 64))  # 输入 -> 输出通道
KERNELS = (1, 3, 5, 7, 9, 11, 15)  # 核的边长，测三种写法的交叉点


def conv_step(function: Callable[..., Tensor], x: Tensor, weight: Tensor, grad: Tensor) -> None:
    """一次前向与反向；``x`` 要不要梯度由调用者决定。"""
    x.grad = weight.grad = None
    function(x, weight, padding=weight.shape[-1] // 2).backward(grad)


def conv_operands(
    channels: int, out: int, kernel: int, batch: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """随机的输入、核与输出的梯度；三通道的输入是图像，不求梯度，与真实的第一层相同。"""
    x = torch.randn(batch, channels, 32, 32, generator=generator).requires_grad_(channels > 3)
    weight = torch.randn(out, channels, kernel, kernel, generator=generator).requires_grad_()
    return x, weight, torch.randn(batch, out, 32, 32, generator=generator)


def whole_batch(step: Callable[[], None]) -> None:
    """不分块：一次摊开整批，作对照。"""
    size, conv.CHUNK_BYTES = conv.CHUNK_BYTES, 2**62
    try:
        step()
    finally:
        conv.CHUNK_BYTES = size


def compare_conv(repeats: int, batch: int, generator: torch.Generator) -> Seconds:
    """两种层上 im2col 与 ``F.conv2d`` 的前向加反向，秒；另有不分块的，与单独一次矩阵乘法。"""
    contenders = {}
    for channels, out in LAYERS:
        operands = conv_operands(channels, out, 3, batch, generator)
        theirs = F.conv2d(*operands[:2], padding=1)
        assert torch.allclose(conv2d_im2col(*operands[:2], padding=1), theirs, atol=1e-3)
        for name, function in (("im2col", conv2d_im2col), ("F.conv2d", F.conv2d)):
            step = partial(conv_step, function, *operands)
            contenders[f"{name}, {channels}->{out}"] = partial(seconds_of, step)
    whole = partial(whole_batch, partial(conv_step, conv2d_im2col, *operands))
    contenders[f"im2col unchunked, {channels}->{out}"] = partial(seconds_of, whole)
    kernel = operands[1].detach().flatten(1)  # (O, K)
    columns = torch.randn(kernel.shape[1], 32 * 32, generator=generator)  # 一个样本的列矩阵
    contenders["matmul, one sample"] = partial(seconds_of, partial(torch.mm, kernel, columns))
    return alternate(contenders, repeats)


def show_rates(seconds: Seconds, batch: int) -> None:
    """32->64 通道的各项合每秒多少亿次乘加：前向加反向是三次同样大的矩阵乘法。"""
    channels, out = LAYERS[-1]
    one = out * 32 * 32 * channels * 9
    for name, values in seconds.items():
        if name.endswith(f"{channels}->{out}"):
            print(f"{name:24s} 每秒 {3 * batch * one / min(values) / 1e8:5.0f} 亿次乘加")
    print(f"{'matmul':24s} 每秒 {one / min(seconds['matmul, one sample']) / 1e8:5.0f} 亿次乘加")


def sweep_kernels(repeats: int, batch: int, generator: torch.Generator) -> dict[str, list[float]]:
    """前向的毫秒数（最小值）随核的边长怎样变，32 -> 32 通道。"""
    curves: dict[str, list[float]] = {"im2col": [], "FFT": [], "F.conv2d": []}
    functions = {"im2col": conv2d_im2col, "FFT": conv2d_fft, "F.conv2d": F.conv2d}
    for kernel in KERNELS:
        x, weight, _ = conv_operands(32, 32, kernel, batch, generator)
        work = {
            name: partial(function, x.detach(), weight.detach(), padding=kernel // 2)
            for name, function in functions.items()
        }
        seconds = alternate({name: partial(seconds_of, f) for name, f in work.items()}, repeats)
        for name, values in seconds.items():
            curves[name].append(1e3 * min(values))
    return curves


def naive_rate(generator: torch.Generator) -> tuple[float, float]:
    """六重循环与 im2col 每秒作多少百万次乘加（单张 8×8 的图，4 -> 4 通道）。"""
    x = torch.randn(1, 4, 8, 8, generator=generator)
    weight = torch.randn(4, 4, 3, 3, generator=generator)
    work = {"naive": partial(conv2d_naive, x, weight), "im2col": partial(conv2d_im2col, x, weight)}
    seconds = alternate({name: partial(seconds_of, f) for name, f in work.items()}, 3)
    count = 4 * 6 * 6 * 4 * 9 / 1e6
    return count / min(seconds["naive"]), count / min(seconds["im2col"])


def conv_part(args: argparse.Namespace) -> tuple[list[Result], dict, dict]:
    """卷积的测速。"""
    generator = make_generator(args.seed)
    batch = 4 if args.smoke else 64
    seconds = compare_conv(args.repeats, batch, generator)
    show(seconds)
    show_rates(seconds, batch)
    results = []
    for channels, out in LAYERS:
        ratio = quotient(seconds, f"im2col, {channels}->{out}", f"F.conv2d, {channels}->{out}")
        metric = f"im2col ÷ F.conv2d，前向加反向，{channels}→{out} 通道"
        results.append(Result(Expectation(metric, 100.0, (0.1, 3.0), learning=False), ratio))
    curves = sweep_kernels(1 if args.smoke else 5, min(batch, 16), generator)
    for name, values in curves.items():
        row = "  ".join(f"{k}: {v:.1f}" for k, v in zip(KERNELS, values, strict=True))
        print(f"前向毫秒  {name:9s} 核 {row}")
    naive, im2col = naive_rate(generator)
    print(f"六重循环每秒 {naive:.3f} 百万次乘加，同一小题 im2col {im2col:.1f}")
    figure = figures.kernels_figure(KERNELS, curves)
    return results, {"kernels.png": figure}, {"conv_seconds": seconds, "kernel_ms": curves}


# ---------------------------------------------------------------- 数据

Batches = Iterable[tuple[Tensor, Tensor]]


def torchvision_loader(data: Data, batch_size: int) -> torch.utils.data.DataLoader:
    """通行的写法：torchvision 的 MNIST 逐张取出 PIL 图像，``ToTensor`` 再 ``Normalize``。"""
    torchvision = import_torchvision()
    kind = torchvision.datasets.MNIST
    dataset = kind.__new__(kind)  # 图像已在内存里：跳过读文件的 __init__
    train = data.splits["train"]
    dataset.data, dataset.targets, dataset.target_transform = train.images[:, 0], train.labels, None
    steps = [
        torchvision.transforms.ToTensor(),
        torchvision.transforms.Normalize(data.mean.tolist(), data.std.tolist()),
    ]
    dataset.transform = torchvision.transforms.Compose(steps)
    return torch.utils.data.DataLoader(dataset, batch_size, shuffle=True)


def read_epoch(batches: Batches) -> None:
    """只把数据取一遍。"""
    for _ in batches:
        pass


def train_epoch(batches: Batches, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """训练一轮。"""
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def data_part(args: argparse.Namespace) -> tuple[list[Result], dict, dict]:
    """数据管线的测速。"""
    data = load_data(
        args.dataset, args.data_dir, download=args.download, limit=256 if args.smoke else None
    )
    ours = data.batches("train", args.batch_size, make_generator(args.seed))
    theirs = torchvision_loader(data, args.batch_size)
    same = torch.stack([theirs.dataset[i][0] for i in range(8)])
    assert torch.allclose(ours.prepare(ours.inputs[:8]), same, atol=1e-5), "两条管线的像素不同"
    model = lenet5(len(data.class_names), data.in_channels, data.image_size)
    optimizer = torch.optim.AdamW(model.parameters())
    contenders = {
        "in-memory, data only": partial(read_epoch, ours),
        "DataLoader, data only": partial(read_epoch, theirs),
        "in-memory, training": partial(train_epoch, ours, model, optimizer),
    }
    seconds = alternate(
        {name: partial(seconds_of, work) for name, work in contenders.items()},
        1 if args.smoke else 5,
    )
    show(seconds)
    ratio = quotient(seconds, "DataLoader, data only", "in-memory, data only")
    share = quotient(seconds, "in-memory, data only", "in-memory, training")
    faster = Expectation("DataLoader ÷ 驻留内存，只取一轮数据", 1.0, (15.0, 200.0), learning=False)
    waiting = Expectation("取数据占 LeNet 一轮训练", 0.5, (0.0, 0.05), percent=True, learning=False)
    return [Result(faster, ratio), Result(waiting, share)], {}, {"epoch_seconds": seconds}


# ---------------------------------------------------------------- 内存次序


def vgg_step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """小图 VGG 的一次前向与反向。"""
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()


def layout_part(args: argparse.Namespace) -> tuple[list[Result], dict, dict]:
    """``channels_last``（B, H, W, C 的次序）对缺省次序，小图 VGG-11 的前向加反向。"""
    generator = make_generator(args.seed)
    batch = 4 if args.smoke else 64
    x = torch.randn(batch, 3, 32, 32, generator=generator)
    y = torch.randint(0, 10, (batch,), generator=generator)
    contenders = {}
    for name, order in (
        ("contiguous", torch.contiguous_format),
        ("channels_last", torch.channels_last),
    ):
        model = vgg_small(11).to(memory_format=order)
        step = partial(vgg_step, model, x.contiguous(memory_format=order), y)
        contenders[f"VGG-11, {name}"] = partial(seconds_of, step)
    seconds = alternate(contenders, min(args.repeats, 10))
    show(seconds)
    ratio = quotient(seconds, "VGG-11, channels_last", "VGG-11, contiguous")
    metric = Expectation("channels_last ÷ 缺省次序，小图 VGG-11", 10.0, (0.3, 2.0), learning=False)
    return [Result(metric, ratio)], {}, {"layout_seconds": seconds}


# ---------------------------------------------------------------- 入口


def show(seconds: Mapping[str, Sequence[float]]) -> None:
    """每个对手的最小值与中位数。"""
    for name, values in seconds.items():
        low, middle = 1e3 * min(values), 1e3 * statistics.median(values)
        print(f"{name:24s} 最小 {low:9.2f} 毫秒，中位数 {middle:9.2f} 毫秒")


def quotient(seconds: Mapping[str, Sequence[float]], above: str, below: str) -> float:
    """两个对手最小值之比。"""
    return min(seconds[above]) / min(seconds[below])


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description="卷积与数据管线的代价")
    add_common_args(
        parser,
        out_dir=HERE / "outputs" / "benchmark",
        batch_size=256,
        datasets=("synth-digits", "mnist", "fashion-mnist"),
        device=False,
    )
    add = parser.add_argument
    add("--part", choices=["all", *PARTS], default="all", help="测哪一部分")
    add("--repeats", type=positive_int, default=25, metavar="N", help="卷积的重复次数")
    add("--threads", type=positive_int, default=1, metavar="N", help="线程数")
    args = parser.parse_args(argv)
    if args.smoke:
        args.repeats = 1
    return args


def main(argv: Sequence[str] | None = None) -> dict:
    """测量所选的部分；返回写进 ``metrics.json`` 的内容。"""
    args = parse_args(argv)
    out_dir = prepare_out_dir(args.out_dir)
    set_seed(args.seed)
    torch.set_num_threads(args.threads)
    parts = {"conv": conv_part, "data": data_part, "layout": layout_part}
    chosen = PARTS if args.part == "all" else (args.part,)
    if "data" in chosen:
        import_torchvision()  # 不可用就在测量之前说，--part conv 与 layout 不需要它
    results, drawn, details = [], {}, {}
    with Timer() as timer:
        for name in chosen:
            found, pictures, numbers = parts[name](args)
            results += found
            drawn |= pictures
            details |= numbers
    return conclude(out_dir, results, timer, smoke=args.smoke, figures=drawn, **details)


if __name__ == "__main__":
    run_main(main)
