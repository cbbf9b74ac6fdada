"""本章的小实验：每个专题回答一个问题，打印数字，画一张图。

    python demo.py                       # 全部专题
    python demo.py --topic separable     # 只看一个

``objects`` 的讲解见 README.md，``separable`` 与 ``bottleneck`` 的见 efficient.md，
``concat`` 与 ``reparam`` 的见 modern.md。
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # 直接运行脚本时，把仓库根目录加入模块搜索路径
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chapter_05_resnet_modern_cnn import topics_data, topics_efficient, topics_modern
from utils import run_main
from utils.topics import run_topics, topic_parser

HERE = Path(__file__).resolve().parent
TOPICS = topics_data.TOPICS | topics_efficient.TOPICS | topics_modern.TOPICS


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return topic_parser(TOPICS, HERE / "outputs" / "demo").parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict:
    """依次运行所选的专题；返回写进 ``metrics.json`` 的内容。"""
    return run_topics(TOPICS, parse_args(argv))


if __name__ == "__main__":
    run_main(main)
