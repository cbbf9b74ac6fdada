"""结论与实测账本：好坏分明；账本、README 与命令的输出三者一致。"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from utils import report
from utils.cli import UserError
from utils.file_io_util import load_json, save_json
from utils.plot import new_figure
from utils.timer import Timer
from utils.verdict import Expectation, Result, conclude

ACCURACY = Expectation(
    "准确率", chance=0.1, band=(0.9, 0.95), floor=0.98, tolerance=0.01, percent=True
)
LOSS = Expectation("均方误差", chance=1.0, band=(0.2, 0.1), floor=0.04, tolerance=0.01)

# ---------------------------------------------------------------- 结论


@pytest.mark.parametrize(
    ("expectation", "value", "mark"),
    [
        (ACCURACY, 0.90, "学会了"),  # 恰好达到较差端
        (ACCURACY, 0.985, "学会了"),  # 略优于极限，在余量之内
        (ACCURACY, 0.8999, "没学会"),
        (ACCURACY, 0.1, "没学会"),
        (ACCURACY, 0.995, "没学会：优于理论极限，请查数据泄漏或指标算错"),
        (ACCURACY, math.nan, "没学会"),
        (ACCURACY, math.inf, "没学会"),
        (LOSS, 0.2, "学会了"),
        (LOSS, 0.035, "学会了"),
        (LOSS, 0.21, "没学会"),
        (LOSS, 0.02, "没学会：优于理论极限，请查数据泄漏或指标算错"),
        (LOSS, math.nan, "没学会"),
        (LOSS, -math.inf, "没学会"),
    ],
)
def test_verdict(expectation: Expectation, value: float, mark: str) -> None:
    assert expectation.mark(value) == mark
    assert expectation.learned(value) == (mark == "学会了")


def test_without_a_floor_any_finite_score_can_be_learned() -> None:
    loss = Expectation("x", chance=1.0, band=(0.2, 0.1))
    assert loss.learned(0.0) and not loss.learned(-math.inf) and not loss.learned(math.nan)


def test_lines_are_formatted_in_the_metrics_unit() -> None:
    assert ACCURACY.announce() == (
        "预期  准确率：机会线 10.00%，理论极限 98.00%，预期区间 90.00% ~ 95.00%"
    )
    assert (LOSS.format(0.12345), LOSS.format(None)) == ("0.1235", "未知")
    assert "理论极限 未知" in Expectation("x", 1.0, (0.2, 0.1)).announce()


def test_a_check_is_not_called_learning() -> None:
    check = Expectation("误差", chance=1.0, band=(0.2, 0.1), learning=False)
    assert (check.mark(0.1), check.mark(0.3)) == ("符合预期", "不符合预期")
    assert check.mark(0.05) == "不符合预期"  # 核对是双侧的：好过头也不行


def test_record_holds_everything() -> None:
    assert LOSS.record(0.15, std=0.01) == {
        "metric": "均方误差",
        "value": 0.15,
        "std": 0.01,
        "baseline": None,
        "chance": 1.0,
        "floor": 0.04,
        "band": [0.2, 0.1],
        "percent": False,
        "learned": True,
        "mark": "学会了",
    }
    assert LOSS.record(0.9)["learned"] is False


def test_conclude_writes_figures_and_metrics_and_prints_the_verdict(tmp_path: Path, capsys) -> None:
    figure, _ = new_figure()
    with Timer() as timer:
        timer.lap("训练")
    results = [Result(LOSS, 0.15, 0.01), Result(ACCURACY, 0.5, baseline=0.4)]
    figures = {"fit.png": figure}
    metrics = conclude(tmp_path, results, timer, figures=figures, curve=[1, math.nan])
    saved = load_json(tmp_path / "metrics.json")
    assert saved["results"] == [LOSS.record(0.15, 0.01), ACCURACY.record(0.5, baseline=0.4)]
    assert saved["results"] == metrics["results"]
    assert saved["curve"] == [1, None] and saved["seconds"] == timer.elapsed
    assert saved["peak_rss_mib"] == pytest.approx(timer.peak_rss_mib, rel=0.1)
    assert (tmp_path / "fit.png").read_bytes()[:4] == b"\x89PNG"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["图", str(tmp_path / "fit.png")]
    assert lines[-2:] == ["结论  均方误差 0.15 -> 学会了", "结论  准确率 50.00% -> 没学会"]


def test_smoke_is_never_judged(tmp_path: Path, capsys) -> None:
    with Timer() as timer:
        pass
    conclude(tmp_path, [Result(LOSS, 0.15)], timer, smoke=True)
    (record,) = load_json(tmp_path / "metrics.json")["results"]
    assert (record["learned"], record["mark"]) == (None, "未判定")
    out = capsys.readouterr().out
    assert "不作判定" in out and "学会" not in out


def test_nan_result_is_recorded_as_null_and_not_learned(tmp_path: Path) -> None:
    save_json(tmp_path / "metrics.json", {"results": [LOSS.record(math.nan)]})
    record = load_json(tmp_path / "metrics.json")["results"][0]
    assert record["value"] is None and record["learned"] is False


# ---------------------------------------------------------------- 一个假的仓库

SCRIPT = """
import argparse, json, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("--value", type=float, default=0.15)
parser.add_argument("--fail", action="store_true")
parser.add_argument("--data-dir")
parser.add_argument("--out-dir", type=pathlib.Path)
args = parser.parse_args()
if args.fail:
    sys.exit(3)
record = dict(metric="均方误差", value=args.value, baseline=None, chance=1.0, floor=0.04,
              band=[0.2, 0.1], percent=False, learned=args.value <= 0.2,
              mark="学会了" if args.value <= 0.2 else "没学会")
metrics = dict(results=[record], peak_rss_mib=123.6, threads=1, data_dir=args.data_dir)
(args.out_dir / "metrics.json").write_text(json.dumps(metrics))
(args.out_dir / "fit.png").write_bytes(b"figure %r" % args.value)
"""
BLOCK = f"前文\n\n{report.BEGIN}\n\n旧表\n\n{report.END}\n\n后文\n"


def entry(ident: str, command: str, requires: str | None = None, **more) -> dict:
    return {"id": ident, "command": command, "requires": requires, "figures": {}} | more


def measured(value: float, **more) -> dict:
    """已有的记录。"""
    made = {"seconds": 9.0, "peak_rss_mib": 100, "torch": "2.4.0", "machine": "旧机器"}
    record = LOSS.record(value)
    return made | {"date": "2026-01-01", "kept": False, "results": [record]} | more


@pytest.fixture
def chapter(tmp_path: Path, monkeypatch) -> Path:
    """假仓库里的一章：一项默认命令（带图），一项需要真实数据、已有记录。"""
    folder = tmp_path / "chapter_02_fake"
    folder.mkdir()
    (folder / "train.py").write_text(SCRIPT, "utf-8")
    entries = [
        entry("fit", "python train.py", figures={"fit.png": "images/fit.png"}),
        entry("real", "python train.py --value 0.3", "data", **measured(0.18)),
    ]
    save_json(folder / "results.json", {"entries": entries})
    (folder / "README.md").write_text(BLOCK, "utf-8")
    (tmp_path / "README.md").write_text(BLOCK, "utf-8")
    monkeypatch.setattr(report, "REPO_ROOT", tmp_path)
    return folder


def ledger(chapter: Path) -> dict[str, dict]:
    return {e["id"]: e for e in load_json(chapter / "results.json")["entries"]}


# ---------------------------------------------------------------- 重测


def test_report_runs_records_and_rewrites_both_readmes(chapter: Path, capfd) -> None:
    report.main([chapter.name])
    fit = ledger(chapter)["fit"]
    assert fit["results"][0]["value"] == 0.15 and fit["kept"] is False
    assert fit["peak_rss_mib"] == 124 and 0 <= fit["seconds"] < 60
    assert (chapter / "images" / "fit.png").read_bytes() == b"figure 0.15"
    text = (chapter / "README.md").read_text("utf-8")
    assert text.startswith("前文\n") and text.endswith("后文\n") and "旧表" not in text
    seconds = f"{fit['seconds']:.1f}"
    row = "| `python train.py` | 均方误差 | **0.15** | 1 | — | 0.04 | 0.1 ~ 0.2 | 学会了"
    assert f"{row} | {seconds} | 124 |" in text
    root = (chapter.parent / "README.md").read_text("utf-8")
    link = "[chapter_02_fake](chapter_02_fake/README.md)"
    assert (
        f"| {link} | `python chapter_02_fake/train.py` | 均方误差 | **0.15** | 1 | {seconds} |"
        in root
    )
    assert report.outdated() == []


def test_entry_without_its_data_is_kept_and_marked(chapter: Path) -> None:
    report.main([chapter.name])
    real = ledger(chapter)["real"]
    assert real["kept"] is True
    assert (real["results"][0]["value"], real["machine"]) == (0.18, "旧机器")
    text = (chapter / "README.md").read_text("utf-8")
    assert "`python train.py --value 0.3` † | 均方误差 | **0.18**" in text
    assert "† 依赖真实数据或 GPU，本次未重测" in text


def test_entry_with_its_data_is_measured_again(chapter: Path, tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    report.main([chapter.name, "--data-dir", str(tmp_path / "sets")])
    real = ledger(chapter)["real"]
    assert real["kept"] is False
    assert (real["results"][0]["value"], real["results"][0]["learned"]) == (0.3, False)
    text = (chapter / "README.md").read_text("utf-8")
    assert "没学会" in text and "†" not in text


def test_data_dir_reaches_the_command_as_absolute_path_and_download_is_dropped(
    chapter: Path, tmp_path: Path, monkeypatch
) -> None:
    seen = []

    def run(words: list[str], cwd: Path):
        seen.append((words, cwd))
        save_json(
            Path(words[-1]) / "metrics.json", {"results": [], "peak_rss_mib": None, "threads": 1}
        )
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(report.subprocess, "run", run)
    monkeypatch.chdir(tmp_path)
    made = entry("x", "python train.py --dataset mnist --download", "data")
    new = report.run_entry(chapter, made, Path())
    (words, cwd), out_dir = seen[0], seen[0][0][-1]
    assert words[1:] == [
        *["train.py", "--dataset", "mnist"],
        *["--data-dir", str(tmp_path.resolve()), "--out-dir", out_dir],
    ]
    assert words[0] == report.sys.executable and cwd == chapter
    assert new["peak_rss_mib"] is None and not Path(out_dir).exists()


def test_only_one_entry_can_be_measured(chapter: Path, monkeypatch) -> None:
    report.main([chapter.name])
    before = ledger(chapter)
    report.main([chapter.name, "--only", "fit"])
    assert ledger(chapter)["real"] == before["real"]
    with pytest.raises(UserError, match="--only nothing 不在账本里：可选 fit、real"):
        report.main([chapter.name, "--only", "nothing"])


def test_failing_command_changes_nothing(chapter: Path) -> None:
    report.main([chapter.name])
    save_json(
        chapter / "results.json",
        {"entries": [entry("fit", "python train.py --fail", **measured(0.15))]},
    )
    paths = [chapter / "results.json", chapter / "README.md", chapter.parent / "README.md"]
    before = [path.read_bytes() for path in paths]
    with pytest.raises(
        UserError, match="chapter_02_fake 的命令 'python train.py --fail' 失败，退出码 3"
    ):
        report.main([chapter.name])
    assert [path.read_bytes() for path in paths] == before


def test_never_measured_entries_are_reported(chapter: Path) -> None:
    entries = [entry("fit", "python train.py"), entry("real", "python train.py", "data")]
    save_json(chapter / "results.json", {"entries": entries})
    with pytest.raises(UserError, match="real 还没有记录，而本机缺少它的依赖 data"):
        report.main([chapter.name])
    with pytest.raises(UserError, match="账本里 real 还没有记录"):  # fit 已在上面测过
        report.main(["--check"])


# ---------------------------------------------------------------- 核对


def test_check_accepts_a_fresh_readme_and_detects_any_changed_number(chapter: Path, capsys) -> None:
    report.main([chapter.name])
    report.main(["--check"])
    assert "README 与 results.json 一致" in capsys.readouterr().out
    for readme, old, new in [
        (chapter / "README.md", "**0.15**", "**0.14**"),
        (chapter.parent / "README.md", "**0.15**", "**0.16**"),
    ]:
        good = readme.read_text("utf-8")
        readme.write_text(good.replace(old, new), "utf-8")
        assert report.outdated() == [readme]
        name = readme.relative_to(chapter.parent)
        with pytest.raises(UserError, match=rf"{name} 与 results.json 不一致"):
            report.main(["--check"])
        readme.write_text(good, "utf-8")


def test_check_detects_a_changed_ledger(chapter: Path) -> None:
    report.main([chapter.name])
    content = load_json(chapter / "results.json")
    content["entries"][0]["results"][0]["value"] = 0.149
    save_json(chapter / "results.json", content)
    assert report.outdated() == [chapter / "README.md", chapter.parent / "README.md"]


@pytest.mark.parametrize("text", ["没有标记", BLOCK + BLOCK, BLOCK.replace(report.END, "")])
def test_splice_needs_exactly_one_pair_of_markers(text: str) -> None:
    with pytest.raises(UserError, match="README.md 应恰有一对"):
        report.splice(text, "新表", Path("README.md"))


def test_splice_replaces_only_what_is_between_and_is_idempotent() -> None:
    once = report.splice(BLOCK, r"新\1表", Path("README.md"))
    assert once == BLOCK.replace("旧表", r"新\1表")
    assert report.splice(once, r"新\1表", Path("README.md")) == once


def test_render_shows_spread_and_several_metrics_under_one_command() -> None:
    records = [ACCURACY.record(0.9231, 0.0042, 0.85), LOSS.record(0.5)]
    table = report.render(
        {"entries": [entry("a", "python train.py", **measured(0, results=records))]}
    )
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert rows == [
        "| `python train.py` | 准确率 | **92.31% ± 0.42%** | 10.00% | 85.00%"
        " | 98.00% | 90.00% ~ 95.00% | 学会了 | 9.0 | 100 |",
        "|  | 均方误差 | **0.5** | 1 | — | 0.04 | 0.1 ~ 0.2 | 没学会 |  |  |",
    ]
    assert "测于 旧机器，torch 2.4.0，2026-01-01" in table


def test_render_says_what_the_spread_and_the_baseline_are() -> None:
    """对照是什么由账本说明，没有写就是线性模型；没有 ± 与对照时不提它们。"""
    entries = [entry("a", "x", **measured(0, results=[ACCURACY.record(0.92, 0.01, 0.85)]))]
    assert "± 是各种子的标准差；对照是同一任务上的线性模型；" in report.render({"entries": entries})
    ours = {"baseline": "没有动量的 SGD", "entries": entries}
    assert "对照是没有动量的 SGD；核对项" in report.render(ours)
    plain = report.render({"entries": [entry("a", "x", **measured(0.15))]})
    assert "标准差" not in plain and "对照是" not in plain


def test_chapter_or_check_is_required(chapter: Path, capsys) -> None:
    for argv, message in [
        ([], "错误：缺少章文件夹名（或 --check）"),
        (["chapter_99"], "错误：参数 CHAPTER 没有 'chapter_99' 这个选项"),
        (
            [chapter.name, "--data-dir", "/nowhere"],
            "错误：参数 --data-dir：找不到文件夹 '/nowhere'",
        ),
    ]:
        with pytest.raises(SystemExit) as caught:
            report.main(argv)
        err = capsys.readouterr().err
        assert caught.value.code == 2 and err.startswith(message) and len(err.splitlines()) == 1


def test_ledger_is_valid_json_with_chinese_text_readable(chapter: Path) -> None:
    report.main([chapter.name])
    text = (chapter / "results.json").read_text("utf-8")
    assert json.loads(text) and "均方误差" in text
