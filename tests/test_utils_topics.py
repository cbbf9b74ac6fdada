"""专题的公共部分：用几个假专题核对次序、文件与判定。"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from utils.file_io_util import load_json
from utils.plot import new_figure
from utils.topics import Check, Outcome, Topic, run_topics, topic_parser

calls: list[tuple[str, int, bool, float]] = []  # (专题, 种子, smoke, 当时的随机数)


@pytest.fixture(autouse=True)
def no_calls() -> None:
    calls.clear()


def with_figure(seed: int, smoke: bool) -> Outcome:
    """有图的专题？

    说明的其余部分不打印。
    """
    calls.append(("curve", seed, smoke, torch.rand(()).item()))
    figure, axes = new_figure()
    axes[0, 0].plot([0, 1])
    return Outcome(figure, [(Check("误差", 1.0, (0.1, 0.0)), 0.05)])


def without_figure(seed: int, smoke: bool) -> Outcome:
    """没有图，两项核对？"""
    calls.append(("numbers", seed, smoke, torch.rand(()).item()))
    results = [(Check("倍数", 0.0, (2.0, 4.0)), 5.0), (Check("倍数二", 0.0, (2.0, 4.0)), 2.0)]
    return Outcome(None, results)


def empty(seed: int, smoke: bool) -> Outcome:
    """什么核对也没有？"""
    calls.append(("empty", seed, smoke, torch.rand(()).item()))
    return Outcome(None, [])


TOPICS: dict[str, Topic] = {"curve": with_figure, "numbers": without_figure, "empty": empty}


def run(out_dir: Path, *argv: str, topics: Mapping[str, Topic] = TOPICS) -> dict[str, Any]:
    args = topic_parser(topics, Path("不会用到")).parse_args([*argv, "--out-dir", str(out_dir)])
    return run_topics(topics, args)


# ---------------------------------------------------------------- 解析器


def test_parser_defaults(tmp_path: Path) -> None:
    args = topic_parser(TOPICS, tmp_path / "demo").parse_args([])
    assert vars(args) == {
        "seed": 0,
        "out_dir": tmp_path / "demo",
        "smoke": False,
        "topic": "all",
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--topic", "curves"], "没有 'curves' 这个选项"),
        (["--device", "cpu"], "不认识的参数 --device"),  # 小实验只在 CPU 上做
    ],
)
def test_parser_errors_are_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        topic_parser(TOPICS, Path("x")).parse_args(argv)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err
    if "--topic" in argv:
        assert all(name in err for name in ("all", *TOPICS))  # 列出可选的


# ---------------------------------------------------------------- 运行


def test_all_topics_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(2)
    out_dir = tmp_path.resolve() / "new" / "folder"
    metrics = run(out_dir, "--seed", "7")
    assert [call[:3] for call in calls] == [
        ("curve", 7, False),
        ("numbers", 7, False),
        ("empty", 7, False),
    ]
    torch.manual_seed(7)
    first = torch.rand(()).item()
    assert [call[3] for call in calls] == [first] * 3  # 每个专题之前都固定了种子
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["[curve] 有图的专题？", "[numbers] 没有图，两项核对？",
                         "[empty] 什么核对也没有？"]  # fmt: skip
    assert lines[3] == f"图    {out_dir / 'curve.png'}"
    assert lines[5:] == [
        "结论  误差 0.05 -> 符合预期",
        "结论  倍数 5 -> 不符合预期",  # 太好也不行
        "结论  倍数二 2 -> 符合预期",
    ]
    assert list(metrics["laps"]) == ["curve", "numbers", "empty"]
    assert metrics["threads"] == torch.get_num_threads() == 1


def test_files_and_metrics(tmp_path: Path) -> None:
    metrics = run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.png", "metrics.json"]
    assert (tmp_path / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert load_json(tmp_path / "metrics.json") == metrics
    rows = metrics["results"]
    assert [(row["metric"], row["value"], row["learned"]) for row in rows] == [
        ("误差", 0.05, True),
        ("倍数", 5.0, False),
        ("倍数二", 2.0, True),
    ]
    assert [row["mark"] for row in rows] == ["符合预期", "不符合预期", "符合预期"]
    assert 0 <= sum(metrics["laps"].values()) <= metrics["seconds"]


def test_one_topic(tmp_path: Path) -> None:
    metrics = run(tmp_path, "--topic", "numbers")
    assert [call[0] for call in calls] == ["numbers"]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]  # 没有图
    assert [row["metric"] for row in metrics["results"]] == ["倍数", "倍数二"]
    assert list(metrics["laps"]) == ["numbers"]


def test_smoke_judges_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = run(tmp_path, "--smoke")
    assert [call[2] for call in calls] == [True] * 3
    assert [row["value"] for row in metrics["results"]] == [0.05, 5.0, 2.0]
    for row in metrics["results"]:
        assert row["learned"] is None and row["mark"] == "未判定"
    out = capsys.readouterr().out
    assert "符合预期" not in out and "--smoke 只检查代码路径，不作判定" in out
    assert (tmp_path / "curve.png").exists()


def test_topic_without_any_check(tmp_path: Path) -> None:
    metrics = run(tmp_path, "--topic", "empty")
    assert metrics["results"] == [] and list(metrics["laps"]) == ["empty"]


def test_error_in_a_topic_is_not_swallowed(tmp_path: Path) -> None:
    def broken(seed: int, smoke: bool) -> Outcome:
        """会出错？"""
        raise KeyError("坏了")

    with pytest.raises(KeyError, match="坏了"):
        run(tmp_path, topics={"broken": broken})
    assert list(tmp_path.iterdir()) == []


def test_numpy_scalars_reach_the_record(tmp_path: Path) -> None:
    def measured(seed: int, smoke: bool) -> Outcome:
        """NumPy 算出来的？"""
        return Outcome(None, [(Check("误差", 1.0, (0.0, 1.0)), np.float32(0.5))])

    metrics = run(tmp_path, topics={"measured": measured})
    assert load_json(tmp_path / "metrics.json")["results"][0]["value"] == 0.5
    assert type(metrics["results"][0]["value"]) is float
