"""第 1 章 data_parallel.py 的命令行与小函数；多进程的部分见 test_ch01_all_reduce.py。"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from chapter_01_tensor_autograd.data_parallel import (
    gradients,
    main,
    make_model,
    parse_args,
    relative,
)
from utils.cli import UserError


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch-size", "3", "--processes", "4"], "--batch-size 3 应不小于进程数 4"),
        (["--batch-size", "1"], "--batch-size 1 应不小于进程数 2"),
        (["--processes", "0"], "--processes：'0' 不合要求：应为正整数"),
        (["--bucket-mib", "0"], "--bucket-mib：'0' 不合要求：应为正数"),
        (["--device", "cpu"], "不认识的参数 --device"),
    ],
)
def test_bad_arguments_are_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_args(argv)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("错误：") and message in err


def test_batch_larger_than_the_training_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--batch-size 20000 超过了训练集的 \d+ 张"):
        main(["--batch-size", "20000", "--out-dir", str(tmp_path)])


def test_one_sample_per_process_is_enough() -> None:
    args = parse_args(["--batch-size", "4", "--processes", "4", "--bucket-mib", "0.25"])
    assert (args.batch_size, args.processes, args.bucket_mib) == (4, 4, 0.25)
    assert args.out_dir.parts[-2:] == ("outputs", "data_parallel")


def test_smoke_is_small_and_uneven() -> None:
    args = parse_args(["--smoke", "--batch-size", "2047"])
    assert (args.batch_size, args.width, args.steps, args.repeats) == (63, 16, 2, 2)
    assert args.batch_size % args.processes == 1  # 各份不等，正是要核对的情形


def test_models_of_the_same_seed_are_equal() -> None:
    first, again, other = (make_model(seed, 5, torch.float64) for seed in (3, 3, 4))
    for p, q, r in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert p.dtype == torch.float64
        assert torch.equal(p, q) and not torch.equal(p, r)
    assert [tuple(p.shape) for p in first.parameters() if p.ndim == 2] == [
        (5, 784),
        (5, 5),
        (10, 5),
    ]
    assert first(torch.zeros(2, 28, 28, dtype=torch.float64)).shape == (2, 10)


def test_gradients_are_joined_in_order() -> None:
    model = nn.Linear(2, 1)
    (3 * model(torch.tensor([[1.0, 2.0]]))).sum().backward()
    assert gradients(model).tolist() == [3.0, 6.0, 3.0]


def test_relative_error_by_hand() -> None:
    assert relative(torch.tensor([1.0, -3.5]), torch.tensor([2.0, -4.0])) == 0.25
    assert relative(torch.tensor([2.0, -4.0]), torch.tensor([2.0, -4.0])) == 0.0
