"""``demo.py`` 的公共部分：若干专题，每个回答一个问题，打印数字，画一张图，作若干核对。"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from utils.cli import ArgumentParser, add_common_args
from utils.file_io_util import prepare_out_dir
from utils.seed import set_seed
from utils.timer import Timer
from utils.verdict import Expectation, Result, conclude

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Check = partial(Expectation, learning=False)  # 专题里是核对，不是学习


class Outcome(NamedTuple):
    """一个专题的结果：图（可无）与若干 ``(预期, 实测)``。"""

    figure: Figure | None
    results: list[tuple[Expectation, float]]


Topic = Callable[[int, bool], Outcome]  # (种子, 是否 --smoke)；说明的第一行是它要回答的问题


def topic_parser(topics: Mapping[str, Topic], out_dir: Path) -> ArgumentParser:
    """``demo.py`` 的解析器：公共参数，加上 ``--topic``。"""
    parser = ArgumentParser(description="本章的实验")
    add_common_args(parser, out_dir=out_dir, device=False)
    parser.add_argument("--topic", choices=["all", *topics], default="all", help="专题")
    return parser


def run_topics(topics: Mapping[str, Topic], args: argparse.Namespace) -> dict[str, Any]:
    """依次运行所选的专题；返回写进 ``metrics.json`` 的内容。"""
    out_dir = prepare_out_dir(args.out_dir)
    torch.set_num_threads(1)  # 都是很小的矩阵，多线程的同步比运算还贵
    chosen = list(topics) if args.topic == "all" else [args.topic]
    drawn, results = {}, []
    with Timer() as timer:
        for name in chosen:
            set_seed(args.seed)  # 每个专题单独运行与一起运行，结果相同
            print(f"[{name}] {topics[name].__doc__.splitlines()[0]}")
            outcome = topics[name](args.seed, args.smoke)
            if outcome.figure is not None:
                drawn[f"{name}.png"] = outcome.figure
            for expectation, value in outcome.results:
                results.append(Result(expectation, float(value)))  # NumPy 的标量存不进 JSON
            timer.lap(name)
    return conclude(out_dir, results, timer, smoke=args.smoke, figures=drawn, laps=timer.laps)
