"""优化器走一步的代价：一千万个参数的 MLP，我们的 Adam、AdamW 对 ``torch.optim``。

在同一次运行里交替测量，打印各种写法的最小值、中位数，以及与 ``torch.optim`` 缺省写法之比::

    python benchmark.py
    python benchmark.py --threads 2 --json 结果.json

- ``ours, naive``：照公式写，每个中间结果都新建张量（``adam_naive``）；
- ``ours``：同一个公式的原地写法（``Adam``、``AdamW``）；
- ``torch``、``torch foreach``、``torch fused``：``torch.optim`` 在 CPU 上的缺省写法与两种加速写法。

另外测一步 Muon（Newton-Schulz 迭代），以及只有前向与反向的一步；两者之比与按浮点运算数预计的对比。
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if not __package__:  # 直接运行脚本时，把仓库根目录加入模块搜索路径
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chapter_02_nn_basics_mlp.losses import cross_entropy
from chapter_02_nn_basics_mlp.mlp import MLP
from chapter_03_optimization_regularization import figures
from chapter_03_optimization_regularization.optimizers_adam import Adam, AdamW, adam_naive
from chapter_03_optimization_regularization.optimizers_modern import Muon, muon_groups
from utils import (
    Result,
    Timer,
    TorchDevice,
    add_common_args,
    conclude,
    count_parameters,
    get_device,
    make_generator,
    prepare_out_dir,
    run_main,
    save_json,
    set_seed,
)
from utils.cli import ArgumentParser, positive_int
from utils.timer import alternate, seconds_of
from utils.topics import Check

HERE = Path(__file__).resolve().parent
HIDDEN = (2048, 2048, 2048)  # 784-2048-2048-2048-10：约一千万个参数
BATCH = 128  # 前向与反向的批大小


class NaiveAdam:
    """``adam_naive`` 逐个参数调用；``weight_decay`` 大于零时先做解耦的衰减。"""

    def __init__(self, parameters: Sequence[Tensor], weight_decay: float = 0.0) -> None:
        self.parameters, self.weight_decay, self.taken = list(parameters), weight_decay, 0
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        """更新一次；学习率取缺省的 1e-3。"""
        self.taken += 1
        for index, p in enumerate(self.parameters):
            if self.weight_decay:
                p.copy_(p - 1e-3 * self.weight_decay * p)
            new, *moments = adam_naive(p, p.grad, *self.moments[index], self.taken)
            p.copy_(new)
            self.moments[index] = moments


def make_contender(make: Callable[[nn.Module], Any], width: int, device: TorchDevice) -> Any:
    """一个新的网络，随机的梯度，以及由 ``make`` 造出的优化器。"""
    hidden = tuple(min(width, size) for size in HIDDEN)
    model = MLP(784, hidden, 10, generator=make_generator(0)).to(device.device)
    generator = make_generator(1)
    for p in model.parameters():
        p.grad = 1e-2 * torch.randn(p.shape, generator=generator).to(device.device)
    return make(model)


WAYS: dict[str, dict[str, Callable[[nn.Module], Any]]] = {
    "Adam": {
        "ours": lambda m: Adam(m.parameters()),
        "ours, naive": lambda m: NaiveAdam(m.parameters()),
        "torch": lambda m: torch.optim.Adam(m.parameters(), foreach=False),
        "torch foreach": lambda m: torch.optim.Adam(m.parameters(), foreach=True),
        "torch fused": lambda m: torch.optim.Adam(m.parameters(), fused=True),
    },
    "AdamW": {
        "ours": lambda m: AdamW(m.parameters()),
        "ours, naive": lambda m: NaiveAdam(m.parameters(), weight_decay=1e-2),
        "torch": lambda m: torch.optim.AdamW(m.parameters(), foreach=False),
        "torch foreach": lambda m: torch.optim.AdamW(m.parameters(), foreach=True),
        "torch fused": lambda m: torch.optim.AdamW(m.parameters(), fused=True),
    },
}


def check_equal(width: int, device: TorchDevice) -> float:
    """各种写法各走 3 步之后，参数与 ``torch`` 的最大差（float32）。"""
    worst = 0.0
    for ways in WAYS.values():
        results = {}
        for name, make in ways.items():
            optimizer = make_contender(make, width, device)
            for _ in range(3):
                optimizer.step()
            groups = getattr(optimizer, "param_groups", None)
            params = groups[0]["params"] if groups else optimizer.parameters
            results[name] = torch.cat([p.detach().flatten() for p in params])
        gaps = [(r - results["torch"]).abs().max().item() for r in results.values()]
        worst = max(worst, *gaps)
    return worst


def muon_flops_ratio(width: int) -> float:
    """按浮点运算数预计的「Muon 一步 ÷ 前向与反向」。

    边长 ``k ≤ l`` 的隐藏层矩阵，Newton-Schulz 是 ``5 (4k²l + 2k³)``；线性层的前向、权重的梯度、
    输入的梯度各 ``2klB``，第一层不必求输入的梯度；输出层归 AdamW，只算它的前向与反向。
    """
    sizes = [784, *(min(width, size) for size in HIDDEN), 10]
    layers = list(pairwise(sizes))
    sides = [sorted(layer) for layer in layers[:-1]]
    muon = sum(5 * (4 * short**2 * long + 2 * short**3) for short, long in sides)
    products = [(2 if index == 0 else 3) * m * n for index, (m, n) in enumerate(layers)]
    return muon / (2 * BATCH * sum(products))


def training_step(width: int, device: TorchDevice) -> Callable[[], None]:
    """批大小 ``BATCH`` 的一次前向与反向，不更新。"""
    hidden = tuple(min(width, size) for size in HIDDEN)
    model = MLP(784, hidden, 10, generator=make_generator(0)).to(device.device)
    x = torch.randn(BATCH, 784, generator=make_generator(2)).to(device.device)
    y = torch.zeros(BATCH, dtype=torch.int64, device=device.device)
    return lambda: cross_entropy(model(x), y).backward()


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description="优化器走一步的代价")
    add_common_args(parser, out_dir=HERE / "outputs" / "benchmark")
    add = parser.add_argument
    add("--repeats", type=positive_int, default=25, metavar="N", help="每种写法测几次")
    add("--threads", type=positive_int, default=1, metavar="N", help="线程数")
    add("--json", type=Path, metavar="FILE", help="另把全部秒数写进这个文件")
    args = parser.parse_args(argv)
    args.width = 32 if args.smoke else max(HIDDEN)
    args.repeats = 2 if args.smoke else args.repeats
    return args


def main(argv: Sequence[str] | None = None) -> dict:
    """交替测量；返回写进 ``metrics.json`` 的内容。"""
    args = parse_args(argv)
    out_dir = prepare_out_dir(args.out_dir)
    set_seed(args.seed)
    torch.set_num_threads(args.threads)
    device = get_device(args.device)
    hidden = tuple(min(args.width, size) for size in HIDDEN)
    count = count_parameters(MLP(784, hidden, 10))
    print(f"设备  {device.describe()}；{count:,} 个参数")
    gap = check_equal(args.width, device)
    print(f"核对  各种写法走 3 步之后，参数与 torch 的最大差 {gap:.1e}（float32）")

    seconds: dict[str, dict[str, list[float]]] = {}
    with Timer(device) as timer:
        for kind, ways in WAYS.items():
            steppers = {
                name: make_contender(make, args.width, device) for name, make in ways.items()
            }
            measures = {n: partial(seconds_of, o.step, device) for n, o in steppers.items()}
            seconds[kind] = alternate(measures, args.repeats)
        muon = make_contender(lambda m: Muon(muon_groups(m, 0.02, 1e-3)), args.width, device)
        work = training_step(args.width, device)
        others = {
            "Muon": partial(seconds_of, muon.step, device),
            "forward + backward": partial(seconds_of, work, device),
        }
        seconds["scale"] = alternate(others, max(3, args.repeats // 8))
    ratios = report(seconds)
    checks = []
    for kind in WAYS:
        ours = Check(f"{kind}：ours ÷ torch 缺省", 3.0, (0.2, 1.2))
        naive = Check(f"{kind}：照公式写 ÷ torch 缺省（最小值）", 1.0, (1.5, 6.0))
        checks += [Result(ours, ratios[kind]), Result(naive, ratios[f"{kind}, naive"])]
    muon, expected = ratios["Muon"], muon_flops_ratio(args.width)
    print(f"Muon 一步 ÷ 前向与反向（最小值）：实测 {muon:.1f}，按浮点运算数预计 {expected:.1f}")
    checks.append(Result(Check("Muon 一步 ÷ 前向与反向（最小值）", 1.0, (30.0, 120.0)), muon))
    share = Check("其中实测 ÷ 按浮点运算数的预计", 0.1, (0.5, 1.5))
    checks.append(Result(share, muon / expected))
    checks.append(Result(Check("三步之后与 torch 的最大差", 1e-3, (0.0, 1e-6)), gap))
    if args.json is not None:
        save_json(args.json, seconds)
    drawn = {kind: seconds[kind] for kind in WAYS}
    return conclude(
        out_dir,
        checks,
        timer,
        smoke=args.smoke,
        figures={"step_time.png": figures.step_time_figure(drawn)},
        step_seconds=seconds,
        parameters=count,
    )


def report(seconds: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """打印一张表，返回几个比值。

    ``Adam``、``AdamW`` 是 ``ours`` 与 ``torch`` 缺省写法的中位数之比；``Adam, naive`` 之类是照公式
    写的与 ``torch`` 的最小值之比（它要反复分配内存，中位数随机器的忙闲变化很大）；``Muon`` 是它与
    前向、反向的最小值之比。
    """
    ratios = {}
    for kind, ways in seconds.items():
        torch_way = ways.get("torch")
        for name, values in ways.items():
            middle = statistics.median(values)
            line = f"{kind:6s} {name:20s} 最小 {1e3 * min(values):7.2f} ms"
            line += f"  中位数 {1e3 * middle:7.2f} ms"
            if torch_way is not None:
                line += f"  ÷ torch 最小 {min(values) / min(torch_way):.2f}"
                line += f"  中位数 {middle / statistics.median(torch_way):.2f}"
            print(line)
        if torch_way is not None:
            ratios[kind] = statistics.median(ways["ours"]) / statistics.median(torch_way)
            ratios[f"{kind}, naive"] = min(ways["ours, naive"]) / min(torch_way)
    scale = seconds["scale"]
    ratios["Muon"] = min(scale["Muon"]) / min(scale["forward + backward"])
    return ratios


if __name__ == "__main__":
    run_main(main)
