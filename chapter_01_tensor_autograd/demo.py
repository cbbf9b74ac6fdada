"""本章的实验：每个专题回答一个问题，打印数字，多数还画一张图。

    python demo.py                       # 全部专题
    python demo.py --topic tensors       # 只看一个

专题与 README 各节的对应：
``tensors`` 张量的布局，``scalar`` 标量引擎，``graph`` 看见计算图，``gradcheck`` 数值检查，
``modes`` 两种模式，``newton`` 与 ``higher`` 高阶导数，``manual`` 手推一遍，``leaf`` 叶子与开关，
``errors`` 经典错误，``custom`` 自定义算子，``checkpoint`` 激活检查点，``accumulate`` 梯度累积，
``trace`` 动态图与静态图。
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # 直接运行脚本时，把仓库根目录加入模块搜索路径
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chapter_01_tensor_autograd import topics_engine, topics_torch
from utils import run_main
from utils.topics import run_topics, topic_parser

HERE = Path(__file__).resolve().parent
TOPICS = topics_engine.TOPICS | topics_torch.TOPICS


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return topic_parser(TOPICS, HERE / "outputs" / "demo").parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict:
    """依次运行所选的专题；返回写进 ``metrics.json`` 的内容。"""
    return run_topics(TOPICS, parse_args(argv))


if __name__ == "__main__":
    run_main(main)
