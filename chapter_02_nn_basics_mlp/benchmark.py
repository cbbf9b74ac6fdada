"""数据管线的代价：同一个 MLP，驻留内存的批迭代器对 torchvision + DataLoader。

在同一次运行里交替测量：只取一遍数据，以及训练一轮（784-256-10，SGD）；打印各自的最小值、
中位数与比值。两个线程的数字只在空闲的机器上可信，机器忙时用 ``--threads 1``::

    python benchmark.py                                        # 合成数字
    python benchmark.py --dataset mnist --data-dir 数据文件夹   # 真实的 MNIST

DataLoader 一侧是通行的写法：``torchvision.datasets.MNIST`` 逐张取出 PIL 图像，``ToTensor``
再 ``Normalize``，``num_workers=0``。两侧的模型、优化器、批大小完全相同。
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

if not __package__:  # 直接运行脚本时，把仓库根目录加入模块搜索路径
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chapter_02_nn_basics_mlp import figures
from chapter_02_nn_basics_mlp.losses import cross_entropy
from chapter_02_nn_basics_mlp.mlp import MLP
from utils import (
    Expectation,
    Result,
    Timer,
    TorchDevice,
    add_common_args,
    conclude,
    get_device,
    make_generator,
    prepare_out_dir,
    run_main,
    set_seed,
)
from utils.cli import ArgumentParser, positive_int
from utils.datasets import ImageBatches, ImageSet, import_torchvision, load_images
from utils.timer import alternate

HERE = Path(__file__).resolve().parent


def torchvision_dataset(data: ImageSet, transform: Callable) -> torch.utils.data.Dataset:
    """把已在内存里的图像交给 ``torchvision.datasets.MNIST``：逐张取图用的就是它的代码。"""
    kind = import_torchvision().datasets.MNIST
    dataset = kind.__new__(kind)  # 跳过读文件的 __init__
    dataset.data, dataset.targets = data.images[:, 0], data.labels
    dataset.transform, dataset.target_transform = transform, None
    return dataset


Batches = Iterable[tuple[Tensor, Tensor]]


def read_epoch(batches: Batches, device: TorchDevice, seed: int) -> float:
    """只把数据取一遍，不训练，返回秒数。"""
    with Timer(device) as timer:
        for _ in batches:
            pass
    return timer.elapsed


def train_epoch(batches: Batches, device: TorchDevice, seed: int) -> float:
    """训练一轮，返回秒数。"""
    model = MLP(784, (256,), 10, "relu", make_generator(seed)).to(device.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Timer(device) as timer:
        for x, y in batches:
            optimizer.zero_grad()
            cross_entropy(model(x.to(device.device)), y.to(device.device)).backward()
            optimizer.step()
    return timer.elapsed


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description="数据管线的代价")
    add_common_args(
        parser,
        out_dir=HERE / "outputs" / "benchmark",
        batch_size=256,
        datasets=("synth-digits", "mnist", "fashion-mnist"),
    )
    parser.add_argument("--repeats", type=positive_int, default=5, metavar="N", help="重复次数")
    threads = min(2, os.cpu_count() or 1)
    parser.add_argument("--threads", type=positive_int, default=threads, metavar="N", help="线程数")
    args = parser.parse_args(argv)
    if args.smoke:
        args.repeats = 1
    return args


def main(argv: Sequence[str] | None = None) -> dict:
    """交替测量两种管线；返回写进 ``metrics.json`` 的内容。"""
    args = parse_args(argv)
    out_dir = prepare_out_dir(args.out_dir)
    set_seed(args.seed)
    torch.set_num_threads(args.threads)
    limit = 256 if args.smoke else None
    device = get_device(args.device)
    print(f"设备  {device.describe()}")
    data = load_images(args.dataset, "train", args.data_dir, download=args.download, limit=limit)
    shuffler = make_generator(args.seed)
    ours = ImageBatches(*data[:2], args.batch_size, generator=shuffler, device=device.device)
    transforms = import_torchvision().transforms
    steps = [
        transforms.ToTensor(),
        transforms.Normalize(ours.mean.tolist(), ours.std.tolist()),
    ]
    theirs = torch.utils.data.DataLoader(
        torchvision_dataset(data, transforms.Compose(steps)), args.batch_size, shuffle=True
    )
    check_same_pixels(ours, theirs)

    contenders = {
        f"{pipeline}, {work}": partial(measure, batches, device, args.seed)
        for work, measure in (("data only", read_epoch), ("training", train_epoch))
        for pipeline, batches in (("in-memory", ours), ("DataLoader", theirs))
    }
    with Timer() as timer:
        seconds = alternate(contenders, args.repeats)
    for name, values in seconds.items():
        print(f"{name:22s} 最小 {min(values):.3f} 秒，中位数 {statistics.median(values):.3f} 秒")
    best = {name: min(values) for name, values in seconds.items()}
    data_ratio = best["DataLoader, data only"] / best["in-memory, data only"]
    ratio = best["DataLoader, training"] / best["in-memory, training"]
    data_expectation = Expectation(
        "DataLoader ÷ 驻留内存，只取数据", 1.0, (20.0, 200.0), learning=False
    )
    expectation = Expectation("DataLoader ÷ 驻留内存，训练一轮", 1.0, (4.0, 20.0), learning=False)
    return conclude(
        out_dir,
        [Result(expectation, ratio), Result(data_expectation, data_ratio)],
        timer,
        smoke=args.smoke,
        figures={"pipelines.png": figures.pipelines_figure(seconds)},
        epoch_seconds=seconds,
        images=len(data.images),
        threads=args.threads,
    )


def check_same_pixels(ours: ImageBatches, theirs: torch.utils.data.DataLoader) -> None:
    """两条管线交出的像素必须相同，比较才公平。"""
    expected = torch.stack([theirs.dataset[i][0] for i in range(8)])
    assert torch.allclose(ours.prepare(ours.inputs[:8]).cpu(), expected, atol=1e-5), "归一化不一致"


if __name__ == "__main__":
    run_main(main)
