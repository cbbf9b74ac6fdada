"""命令行的规矩：公共参数、取值检查、一行式错误。

全部入口脚本共用同一套参数名与含义。用户的失误（参数写错、文件缺失、磁盘写满……）以
``UserError`` 表示，由 ``run_main`` 变成标准错误上的一行中文，退出码 2，没有 traceback；
程序自身的错误不在此列，照常保留 traceback。
"""

from __future__ import annotations

import argparse
import difflib
import io
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT，shell 的惯例
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


class UserError(ValueError):
    """用户可以自己改正的错误；消息是一行中文，说清数值、规则与改法。"""


# ---------------------------------------------------------------- 取值检查（argparse 的 type=）


def _number(text: str, convert: Callable[[str], Any], rule: str, ok: Callable[[Any], bool]) -> Any:
    try:
        value = convert(text)
    except ValueError:
        value = None
    if value is None or not ok(value):
        raise argparse.ArgumentTypeError(f"{text!r} 不合要求：应为{rule}")
    return value


def positive_int(text: str) -> int:
    """正整数。"""
    return _number(text, int, "正整数（≥ 1）", lambda v: v >= 1)


def non_negative_int(text: str) -> int:
    """非负整数。"""
    return _number(text, int, "非负整数（≥ 0）", lambda v: v >= 0)


def seed_int(text: str) -> int:
    """随机种子：NumPy 只接受 32 位无符号整数。"""
    return _number(text, int, "0 到 2**32-1 之间的整数", lambda v: 0 <= v < 2**32)


def positive_float(text: str) -> float:
    """有限的正数。"""
    return _number(text, float, "正数（> 0，有限）", lambda v: math.isfinite(v) and v > 0)


def non_negative_float(text: str) -> float:
    """有限的非负数。"""
    return _number(text, float, "非负数（≥ 0，有限）", lambda v: math.isfinite(v) and v >= 0)


def fraction(text: str) -> float:
    """0 与 1 之间的比例（含两端）。"""
    return _number(text, float, "0 到 1 之间的数", lambda v: 0 <= v <= 1)


def int_list(text: str) -> tuple[int, ...]:
    """逗号分隔的正整数，如 ``256,128``。"""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} 不合要求：应为逗号分隔的正整数，如 256,128")
    return values


def existing_file(text: str) -> Path:
    """已存在的文件。"""
    path = Path(text).expanduser()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"找不到文件 {text!r}：请检查路径（相对于当前目录）")
    return path


def existing_dir(text: str) -> Path:
    """已存在的文件夹。"""
    path = Path(text).expanduser()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"找不到文件夹 {text!r}：请检查路径（相对于当前目录）")
    return path


# ---------------------------------------------------------------- 解析器


class _HelpFormatter(argparse.HelpFormatter):
    """在每条说明末尾写出默认值。"""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        # 用 is 比较：0 == False，而默认值 0 应当写出来
        shown = not any(action.default is hidden for hidden in (None, False, argparse.SUPPRESS))
        return text + "（默认 %(default)s）" if shown and "默认" not in text else text


# argparse 的英文错误（3.10 至 3.13 的措辞）-> 一行中文
_TRANSLATIONS: tuple[tuple[str, str], ...] = (
    (r"unrecognized arguments: (.+)", r"不认识的参数 \1"),
    (r"the following arguments are required: (.+)", r"缺少必需的参数 \1"),
    (r"argument (\S+): expected one argument", r"参数 \1 后面需要一个值"),
    (r"argument (\S+): expected (?:at least one|\d+) arguments?", r"参数 \1 后面的值个数不对"),
    (r"argument (\S+): not allowed with argument (\S+)", r"参数 \1 与 \2 不能同时使用"),
    (r"argument (\S+): ignored explicit argument (.+)", r"参数 \1 是开关，不接受值 \2"),
    (
        r"argument (\S+): invalid choice: (.+?) \(choose from (.+)\)",
        r"参数 \1 没有 \2 这个选项，可选：\3",
    ),
    (r"argument (\S+): (.+)", r"参数 \1：\2"),
)


class ArgumentParser(argparse.ArgumentParser):
    """出错时只打印一行中文、退出码 2 的解析器；不接受缩写，拼错时给出最相近的参数。"""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)
        self._optionals.title = "参数"
        self._positionals.title = "位置参数"
        self._option_string_actions["--help"].help = "显示这份说明并退出"

    def error(self, message: str) -> NoReturn:
        """打印一行中文错误并以退出码 2 结束。"""
        for pattern, replacement in _TRANSLATIONS:
            translated, hits = re.subn(f"^{pattern}$", replacement, message)
            if hits:
                message = translated
                break
        wrong = re.search(r"^不认识的参数 (\S+)", message)
        if wrong:
            known = [name for action in self._actions for name in action.option_strings]
            close = difflib.get_close_matches(wrong[1].split("=")[0], known, n=1)
            if close:
                message += f"，是否想写 {close[0]}"
        _print_error(f"{message}（{self.prog} --help 列出全部参数）")
        raise SystemExit(EXIT_USER_ERROR)


def add_common_args(
    parser: argparse.ArgumentParser,
    *,
    out_dir: Path,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    datasets: Sequence[str] = (),
    resume: bool = False,
    device: bool = True,
) -> None:
    """加入全书统一的参数；取 ``None`` 的几项表示该脚本不需要它。

    参数:
        out_dir: 默认输出文件夹，应写成相对于脚本文件的绝对路径，与当前目录无关。
        epochs, batch_size, lr: 默认值。
        datasets: 非空时加入 ``--dataset --data-dir --download``，第一项为默认数据集。
        resume: 是否加入 ``--resume``。
        device: 是否加入 ``--device``；只在 CPU 上做小实验的脚本不需要。
    """
    add = parser.add_argument
    if epochs is not None:
        add("--epochs", type=positive_int, default=epochs, metavar="N", help="训练轮数")
    if batch_size is not None:
        add("--batch-size", type=positive_int, default=batch_size, metavar="N", help="每批样本数")
    if lr is not None:
        add("--lr", type=positive_float, default=lr, metavar="X", help="（峰值）学习率")
    add("--seed", type=seed_int, default=0, metavar="N", help="随机种子")
    if device:
        add("--device", default="auto", metavar="D", help="auto、cpu、cuda、cuda:N 或 mps")
    if datasets:
        add("--dataset", choices=datasets, default=datasets[0], help="数据集")
        add(
            "--data-dir",
            type=Path,
            default=Path("data"),
            metavar="DIR",
            help="真实数据所在的文件夹，相对于当前目录",
        )
        add("--download", action="store_true", help="数据缺失时下载到 --data-dir（需联网）")
    add(
        "--out-dir",
        type=Path,
        default=out_dir,
        metavar="DIR",
        help="图与 metrics.json 的去处（默认 本章的 outputs/ 之下）",
    )
    if resume:
        add("--resume", action="store_true", help="从上次中断处继续，结果与未中断时逐位相同")
    add("--smoke", action="store_true", help="只用极少数据把每条代码路径走一遍（10 秒内）")


# ---------------------------------------------------------------- 入口


def _print_error(message: str) -> None:
    if os.environ.get("RANK", "0") != "0":
        # 由 torchrun 启动：0 号有同样的错误时，它退出之后（忙时要几秒）torchrun 就会结束其余进程
        time.sleep(10)
    print("错误：" + " ".join(str(message).split()), file=sys.stderr)


def run_main(main: Callable[[], Any]) -> NoReturn:
    """运行入口函数并退出：0 成功，2 用户错误（一行中文），130 被 Ctrl-C 中断，141 管道断开。"""
    for stream in (sys.stdout, sys.stderr):  # Windows 上重定向到文件时，缺省的编码未必有汉字
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")
    try:
        main()
    except UserError as error:
        _print_error(str(error))
        code = EXIT_USER_ERROR
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # 由 torchrun 启动时，各进程都收到了信号
            print(
                "\n已中断：此前写好的文件与检查点都完好；支持 --resume 的脚本加上它即可继续",
                file=sys.stderr,
            )
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # 例如 `python train.py | head`：没有人再读输出，悄悄停下
        code = EXIT_BROKEN_PIPE
    except RuntimeError as error:
        # 不导入 torch 也能认出 torch.OutOfMemoryError；其余 RuntimeError 是程序错误，照常抛出
        if type(error).__name__ != "OutOfMemoryError":
            raise
        _print_error("显存不足：请减小 --batch-size，或改用 --device cpu")
        code = EXIT_USER_ERROR
    else:
        code = 0
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # 让解释器退出时的最后一次刷新写到空处
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
