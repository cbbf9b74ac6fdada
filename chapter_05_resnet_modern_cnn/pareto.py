"""同样的数据与轮数，各个网络用多少参数、乘加与时间换来多少准确率：一张表，一张图。

    python pareto.py                        # 四个有代表性的网络
    python pareto.py --models all           # 全部
    python pareto.py --models resnet20,repvgg --epochs 3

乘加由钩子数出（``utils.model_summary``），延迟是一个线程、评估模式下的实测；RepVGG 先折叠成单路。
训练两个两个地并行，各用一个线程。
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
from torch import nn

if not __package__:  # 直接运行脚本时，把仓库根目录加入模块搜索路径
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chapter_05_resnet_modern_cnn import figures_pareto
from chapter_05_resnet_modern_cnn.data import Data, load_data
from chapter_05_resnet_modern_cnn.models import MODELS, build_model
from chapter_05_resnet_modern_cnn.recipe import evaluate, train_epochs
from chapter_05_resnet_modern_cnn.repvgg import RepVGG
from utils import (
    Expectation,
    Result,
    Timer,
    add_common_args,
    conclude,
    get_device,
    model_summary,
    prepare_out_dir,
    run_main,
    set_seed,
)
from utils.cli import ArgumentParser, positive_int
from utils.distributed import run_parallel
from utils.timer import alternate, seconds_of

HERE = Path(__file__).resolve().parent
FEW = ("resnet20", "mobilenet_v1", "mobilenet_v2", "efficientnet")
ALL = (
    "resnet20", "preact_resnet20", "se_resnet20", "resnet10", "densenet",
    "mobilenet_v1", "mobilenet_v2", "mobilenet_v3", "efficientnet", "repvgg", "convnext",
)  # fmt: skip
LAYOUT = torch.channels_last  # 逐通道卷积在这种布局下快得多
LIMIT = 512  # 张，--smoke 时每个划分的图数


def fresh(name: str, data: Data) -> nn.Module:
    """没有训练过的网络；起始卷积的步幅为 2，省去四分之三的运算。"""
    model = build_model(name, len(data.class_names), data.shape, stem_stride=2)
    return model.to(memory_format=LAYOUT)


def train(name: str, epochs: int, seed: int, limit: int | None) -> dict[str, Any]:
    """训练一个网络，返回测试准确率、训练秒数与权重；在子进程里运行。"""
    data, device = load_data("synth-objects", limit=limit), get_device("cpu")
    set_seed(seed)
    model = fresh(name, data)
    with Timer() as timer:
        train_epochs(model, data, MODELS[name], epochs, 128, seed, device, LAYOUT)
    test = data.evaluation("test", "cpu")
    score = evaluate(model, test, len(data.class_names), device, memory_format=LAYOUT)
    return {
        "accuracy": score.accuracy,
        "train_seconds": timer.elapsed,
        "weights": model.state_dict(),
    }


def measure_cost(models: dict[str, nn.Module], data: Data, repeats: int) -> dict[str, dict]:
    """参数、乘加，以及一张图与 32 张图的延迟（毫秒，中位数；各网络交替测量）。"""
    image = torch.zeros(1, *data.shape)
    rows: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        if isinstance(model, RepVGG):
            models[name] = model = model.fuse()
        summary = model_summary(model.eval(), image)
        rows[name] = {"params": summary.total_params, "macs": summary.total_macs}
    for size in (1, 32):
        x = torch.zeros(size, *data.shape).contiguous(memory_format=LAYOUT)
        work = {
            name: partial(seconds_of, partial(infer, model, x)) for name, model in models.items()
        }
        for name, seconds in alternate(work, repeats).items():
            rows[name][f"latency_{size}_ms"] = 1e3 * statistics.median(seconds)
    return rows


@torch.inference_mode()
def infer(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """一次前向。"""
    return model(x)


def model_list(text: str) -> tuple[str, ...]:
    """逗号分隔的网络名，或 ``all``。"""
    names = ALL if text == "all" else tuple(dict.fromkeys(text.split(",")))  # 重复的只训练一次
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"没有 {'、'.join(map(repr, unknown))} 这个网络：可选 all，"
            f"或逗号分隔的 {'、'.join(MODELS)}"
        )
    return names


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description="各个网络的准确率与代价")
    add_common_args(parser, out_dir=HERE / "outputs" / "pareto", epochs=5, device=False)
    add = parser.add_argument
    add(
        "--models",
        type=model_list,
        default=FEW,
        metavar="A,B",
        help=f"逗号分隔的网络名，或 all（默认 {','.join(FEW)}）",
    )
    add("--jobs", type=positive_int, default=2, metavar="N", help="同时训练几个，各用一个线程")
    args = parser.parse_args(argv)
    if args.smoke:
        args.models, args.epochs, args.jobs = ("repvgg",), 1, 1
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """训练、测量、画图；返回写进 ``metrics.json`` 的内容。"""
    args = parse_args(argv)
    out_dir = prepare_out_dir(args.out_dir)
    set_seed(args.seed)
    torch.set_num_threads(1)
    limit = LIMIT if args.smoke else None
    data = load_data("synth-objects", limit=limit)
    models, rows = {}, {}
    with Timer() as timer:
        tasks = [(name, args.epochs, args.seed, limit) for name in args.models]
        trainings = run_parallel(train, tasks, args.jobs)
        for name, trained in zip(args.models, trainings, strict=True):
            models[name] = fresh(name, data)
            models[name].load_state_dict(trained.pop("weights"))
            rows[name] = trained
            print(
                f"{name:16s} 测试准确率 {100 * trained['accuracy']:5.2f}%，"
                f"训练 {trained['train_seconds']:.0f} 秒",
                flush=True,
            )
        timer.lap("训练")
        for name, cost in measure_cost(models, data, 1 if args.smoke else 25).items():
            rows[name] |= cost
        timer.lap("测量")
    for name, row in rows.items():
        print(
            f"{name:16s} 参数 {row['params']:>9,}，乘加 {row['macs'] / 1e6:5.1f} M，"
            f"延迟 {row['latency_1_ms']:5.2f} 毫秒（1 张）{row['latency_32_ms']:6.2f}（32 张）"
        )
    scores = [row["accuracy"] for row in rows.values()]
    expected = partial(Expectation, chance=data.chance, percent=True)
    return conclude(
        out_dir,
        [
            Result(expected("最好的网络的测试准确率", band=(0.75, 0.95)), max(scores)),
            Result(expected("最差的网络的测试准确率", band=(0.25, 0.95)), min(scores)),
        ],
        timer,
        smoke=args.smoke,
        figures={"pareto.png": figures_pareto.pareto_figure(rows)},
        rows=rows,
        laps=timer.laps,
    )


if __name__ == "__main__":
    run_main(main)
