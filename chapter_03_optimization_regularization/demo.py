"""本章的小实验：每个专题回答一个问题，打印数字，多数还画一张图。

    python demo.py                       # 全部专题
    python demo.py --topic edge          # 只看一个

专题按所讲的页分组，README 的「小实验」一节列出了每一个。
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # 直接运行脚本时，把仓库根目录加入模块搜索路径
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chapter_03_optimization_regularization import (
    topics_averaging,
    topics_landscapes,
    topics_normalization,
    topics_precision,
    topics_regularization,
)
from utils import run_main
from utils.topics import run_topics, topic_parser

HERE = Path(__file__).resolve().parent
TOPICS = (
    topics_landscapes.TOPICS
    | topics_precision.TOPICS
    | topics_normalization.TOPICS
    | topics_regularization.TOPICS
    | topics_averaging.TOPICS
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return topic_parser(TOPICS, HERE / "outputs" / "demo").parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict:
    """依次运行所选的专题；返回写进 ``metrics.json`` 的内容。"""
    return run_topics(TOPICS, parse_args(argv))


if __name__ == "__main__":
    run_main(main)
