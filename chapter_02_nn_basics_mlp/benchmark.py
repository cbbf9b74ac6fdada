"""数据管线的代价：同一个 MLP，驻留内存的批迭代器对 torchvision + DataLoader。

在同一次运行里交替测量一轮训练（784-256-10，SGD），打印各自的最小值、中位数与比值::

    python benchmark.py                                        # 合成数字
    python benchmark.py --dataset mnist --data-dir 数据文件夹   # 真实的 MNIST

DataLoader 一侧是 torchvision 文档里的通行写法：逐张取出 PIL 图像，``ToTensor`` 再
``Normalize``，``num_workers=0``。两侧的模型、优化器、批大小完全相同。
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

if not __package__:  # 直接运行脚本时，把仓库根目录加入模块搜索路径
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chapter_02_nn_basics_mlp import figures
from chapter_02_nn_basics_mlp.losses import cross_entropy
from chapter_02_nn_basics_mlp.mlp import MLP
from utils import (
    Expectation,
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

HERE = Path(__file__).resolve().parent


class PILDataset(torch.utils.data.Dataset):
    """像 ``torchvision.datasets.MNIST`` 那样，逐张做成 PIL 图像再变换。"""

    def __init__(self, data: ImageSet, transform: Callable) -> None:
        self.images, self.labels = data.images, data.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def train_epoch(batches: Iterable[tuple[Tensor, Tensor]], device: TorchDevice, seed: int) -> float:
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
        batch_size=64,
        datasets=("synth-digits", "mnist", "fashion-mnist"),
    )
    parser.add_argument("--repeats", type=positive_int, default=5, metavar="N", help="重复次数")
    parser.add_argument("--threads", type=positive_int, default=1, metavar="N", help="线程数")
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
        transforms.ToPILImage(),
        transforms.ToTensor(),
        transforms.Normalize(ours.mean.tolist(), ours.std.tolist()),
    ]
    theirs = torch.utils.data.DataLoader(
        PILDataset(data, transforms.Compose(steps)), args.batch_size, shuffle=True
    )
    check_same_pixels(ours, theirs)

    contenders = {"in-memory": ours, "DataLoader": theirs}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    rounds = [-1, *range(args.repeats)]  # 第一轮预热，不计
    with Timer() as timer, tqdm(total=len(rounds) * 2, desc="测量", unit="轮") as bar:
        for round_number in rounds:
            for name, batches in contenders.items():
                elapsed = train_epoch(batches, device, args.seed)
                if round_number >= 0:
                    seconds[name].append(elapsed)
                bar.update()
    for name, values in seconds.items():
        print(f"{name:12s} 最小 {min(values):.3f} 秒，中位数 {statistics.median(values):.3f} 秒")
    ratio = min(seconds["DataLoader"]) / min(seconds["in-memory"])
    expectation = Expectation(
        "DataLoader ÷ 驻留内存，一轮的最短时间", 1.0, (5.0, 20.0), learning=False
    )
    return conclude(
        out_dir,
        [(expectation, ratio, None)],
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
