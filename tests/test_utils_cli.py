"""命令行：每种取值、每种错误都是一行中文；退出码 2、130、141；程序错误保留 traceback。"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import run_python
from utils import cli
from utils.cli import ArgumentParser, UserError, add_common_args, run_main
from utils.file_io_util import REPO_ROOT

# ---------------------------------------------------------------- 取值


@pytest.mark.parametrize(
    ("convert", "text", "value"),
    [
        (cli.positive_int, "1", 1),
        (cli.non_negative_int, "0", 0),
        (cli.seed_int, "4294967295", 2**32 - 1),
        (cli.positive_float, "1e-3", 0.001),
        (cli.non_negative_float, "0", 0.0),
        (cli.fraction, "0", 0.0),
        (cli.fraction, "1", 1.0),
        (cli.int_list, "256,128", (256, 128)),
        (cli.int_list, "7", (7,)),
    ],
)
def test_valid_values(convert, text: str, value) -> None:
    result = convert(text)
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    ("convert", "texts", "rule"),
    [
        (cli.positive_int, ["0", "-3", "1.5", "1e3", "abc", ""], "应为正整数（≥ 1）"),
        (cli.non_negative_int, ["-1", "0.0"], "应为非负整数（≥ 0）"),
        (cli.seed_int, ["-1", "4294967296", "x"], "应为0 到 2**32-1 之间的整数"),
        (cli.positive_float, ["0", "-1", "nan", "inf", "1e999", "x"], "应为正数（> 0，有限）"),
        (cli.non_negative_float, ["-0.1", "nan", "inf"], "应为非负数（≥ 0，有限）"),
        (cli.fraction, ["-0.1", "1.01", "nan", "50%"], "应为0 到 1 之间的数"),
        (cli.int_list, ["", "1,", "1,0", "1;2", "1,x"], "应为逗号分隔的正整数，如 256,128"),
    ],
)
def test_invalid_values_quote_the_value_and_the_rule(convert, texts: list[str], rule: str) -> None:
    for text in texts:
        with pytest.raises(cli.argparse.ArgumentTypeError) as caught:
            convert(text)
        assert str(caught.value) == f"{text!r} 不合要求：{rule}"


def test_existing_paths(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("")
    assert cli.existing_file(str(file)) == file
    assert cli.existing_dir(str(tmp_path)) == tmp_path
    for convert, path in ((cli.existing_file, tmp_path), (cli.existing_dir, file)):
        with pytest.raises(cli.argparse.ArgumentTypeError, match=f"找不到文件.*{path}"):
            convert(str(path))


# ---------------------------------------------------------------- 解析错误


def make_parser(**common) -> ArgumentParser:
    parser = ArgumentParser(prog="train.py")
    defaults = {"epochs": 5, "batch_size": 64, "lr": 0.01}
    add_common_args(parser, out_dir=Path("/x/outputs"), **(defaults | common))
    return parser


def error_of(parser: ArgumentParser, argv: list[str], capsys) -> str:
    """解析应失败：退出码 2，标准错误恰好一行，标准输出为空；返回那一行。"""
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(argv)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert err.endswith("\n") and len(err.splitlines()) == 1
    return err.rstrip("\n")


HELP = "（train.py --help 列出全部参数）"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epoch", "5"], "不认识的参数 --epoch 5，是否想写 --epochs"),
        (["--batchsize=5"], "不认识的参数 --batchsize=5，是否想写 --batch-size"),
        (["--zzzzzz"], "不认识的参数 --zzzzzz"),
        (["stray"], "不认识的参数 stray"),
        (["--epochs"], "参数 --epochs 后面需要一个值"),
        (["--epochs", "0"], "参数 --epochs：'0' 不合要求：应为正整数（≥ 1）"),
        (["--epochs", "-3"], "参数 --epochs：'-3' 不合要求：应为正整数（≥ 1）"),
        (["--lr", "nan"], "参数 --lr：'nan' 不合要求：应为正数（> 0，有限）"),
        (["--smoke=yes"], "参数 --smoke 是开关，不接受值 'yes'"),
        (["--lr", "1\n2"], r"参数 --lr：'1\n2' 不合要求：应为正数（> 0，有限）"),
    ],
)
def test_parse_errors_are_one_chinese_line(argv: list[str], message: str, capsys) -> None:
    assert error_of(make_parser(), argv, capsys) == f"错误：{message}{HELP}"


def test_choice_error_lists_the_choices(capsys) -> None:
    parser = make_parser(datasets=("synth-digits", "mnist"))
    line = error_of(parser, ["--dataset", "minst"], capsys)
    assert line.startswith("错误：参数 --dataset 没有 'minst' 这个选项，可选：")
    assert "synth-digits" in line and "mnist" in line.partition("可选")[2]
    assert "choose" not in line and "invalid" not in line


def test_remaining_argparse_errors_are_translated(capsys) -> None:
    parser = ArgumentParser(prog="train.py")
    parser.add_argument("corpus")
    parser.add_argument("--pairs", nargs=2)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--a", action="store_true")
    group.add_argument("--b", action="store_true")
    for argv, message in [
        ([], "缺少必需的参数 corpus"),
        (["x", "--pairs", "1"], "参数 --pairs 后面的值个数不对"),
        (["x", "--a", "--b"], "参数 --b 与 --a 不能同时使用"),
    ]:
        assert error_of(parser, argv, capsys) == f"错误：{message}{HELP}"


# ---------------------------------------------------------------- 公共参数


def test_common_defaults_and_values() -> None:
    args = make_parser().parse_args([])
    assert vars(args) == {
        "epochs": 5,
        "batch_size": 64,
        "lr": 0.01,
        "seed": 0,
        "device": "auto",
        "out_dir": Path("/x/outputs"),
        "smoke": False,
    }
    command = "--epochs 2 --batch-size 8 --lr 1e-4 --seed 3 --device cuda:1 --out-dir o --smoke"
    args = make_parser().parse_args(shlex.split(command))
    assert (args.epochs, args.batch_size, args.lr, args.seed) == (2, 8, 1e-4, 3)
    assert (args.device, args.out_dir, args.smoke) == ("cuda:1", Path("o"), True)


def test_optional_groups_are_added_only_when_asked() -> None:
    bare = ArgumentParser(prog="demo.py")
    add_common_args(bare, out_dir=Path("o"))
    assert set(vars(bare.parse_args([]))) == {"seed", "device", "out_dir", "smoke"}
    full = make_parser(datasets=("synth-digits", "mnist"), resume=True).parse_args(["--resume"])
    assert (full.dataset, full.data_dir, full.download) == ("synth-digits", Path("data"), False)
    assert full.resume is True


def test_help_shows_chinese_texts_with_defaults(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        make_parser(datasets=("synth-digits", "mnist"), resume=True).parse_args(["--help"])
    text = "".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for shown in (
        "训练轮数（默认5）",
        "学习率（默认0.01）",
        "随机种子（默认0）",
        "默认本章的outputs/",
    ):
        assert shown in text
    assert "/x/outputs" not in text  # 默认输出文件夹因机器而异，不印出来
    assert "默认False" not in text


# ---------------------------------------------------------------- 入口


def exit_of(main, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        run_main(main)
    return caught.value.code, capsys.readouterr().err


def raising(error: BaseException):
    def main() -> None:
        raise error

    return main


def test_success_exits_zero_silently(capsys) -> None:
    assert exit_of(lambda: {"result": 1}, capsys) == (0, "")


def test_user_error_is_flattened_to_one_line(capsys) -> None:
    code, err = exit_of(raising(UserError("第一行\n  第二行")), capsys)
    assert (code, err) == (2, "错误：第一行 第二行\n")


def test_out_of_memory_on_gpu_suggests_a_cure(capsys) -> None:
    code, err = exit_of(raising(torch.OutOfMemoryError("CUDA out of memory")), capsys)
    assert code == 2
    assert err == "错误：显存不足：请减小 --batch-size，或改用 --device cpu\n"


@pytest.mark.parametrize(
    "error", [RuntimeError("x"), ValueError("x"), KeyError("x"), OSError("x"), AssertionError("x")]
)
def test_programming_errors_pass_through(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        run_main(raising(error))
    assert caught.value is error


def test_exit_code_of_the_parser_passes_through(capsys) -> None:
    code, err = exit_of(lambda: make_parser().parse_args(["--epochs", "x"]), capsys)
    assert code == 2 and len(err.splitlines()) == 1


# utils/cli.py 只用标准库；绕过 utils 包，子进程就不必花两秒导入 torch
PRELUDE = "import sys\nsys.path.insert(0, 'utils')\nfrom cli import run_main\n"


def test_programming_error_keeps_its_traceback_in_a_real_process() -> None:
    done = run_python("-c", PRELUDE + "run_main(lambda: 1 / 0)", cwd=REPO_ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and "ZeroDivisionError" in done.stderr


def test_chinese_survives_a_redirected_foreign_code_page() -> None:
    code = PRELUDE + "run_main(lambda: print('学会了 → ─'))"
    done = run_python("-c", code, cwd=REPO_ROOT, env={"PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and done.stdout == "学会了 → ─\n"


def start(code: str) -> subprocess.Popen[str]:
    """启动 ``python -c``，接住它的输出；标准输出照常有缓冲。"""
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code],
        cwd=REPO_ROOT,
        env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows 没有 SIGINT 与 SIGPIPE 的这套约定")
def test_ctrl_c_ends_with_one_line_and_130() -> None:
    code = "import time\nrun_main(lambda: (print('ready', flush=True), time.sleep(60)))"
    with start(code) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.startswith("\n已中断：此前写好的文件与检查点都完好") and err.count("\n") == 2


@pytest.mark.skipif(os.name == "nt", reason="Windows 没有 SIGINT 与 SIGPIPE 的这套约定")
@pytest.mark.parametrize(("lines", "code"), [(1, 0), (100_000, 141)])
def test_closed_pipe_ends_quietly(lines: int, code: int) -> None:
    """``python train.py | head``：读者先走，无论断在途中还是最后一次刷新，都没有 traceback。"""
    with start(f"run_main(lambda: [print('x' * 99) for _ in range({lines})])") as process:
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (code, "")
