"""实测账本：运行一章文档里的命令，把结果记进 ``results.json``，并刷新 README 里的结果表。

用法（在仓库根目录）::

    python -m utils.report chapter_02_nn_basics_mlp                 # 全部重测
    python -m utils.report chapter_02_nn_basics_mlp --only fit      # 只重测一项
    python -m utils.report chapter_02_nn_basics_mlp --data-dir DIR  # 连同真实数据的几项
    python -m utils.report --check                                  # 只核对，不运行

``results.json`` 的每一项写明命令 ``command``、依赖 ``requires``（``data`` 真实数据、``cuda``，
或 ``null``）、要收进 ``images/`` 的图 ``figures``，其余字段由本程序填写。依赖不在本机的项
沿用原有记录，并标明"沿用"。账本最外层的 ``baseline`` 说明「对照」一列是什么；没有写就是同一任务上的
线性模型。
"""

from __future__ import annotations

import argparse
import datetime
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from utils.cli import ArgumentParser, UserError, existing_dir, run_main
from utils.file_io_util import REPO_ROOT, load_json, save_json, save_text
from utils.verdict import Expectation

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def chapters() -> list[Path]:
    """仓库里已有结果账本的章。"""
    return sorted(path.parent for path in REPO_ROOT.glob("chapter_*/results.json"))


# ---------------------------------------------------------------- 运行


def machine(threads: int) -> str:
    """本机的一句话描述；``threads`` 是脚本自己用的线程数。"""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU，{threads} 线程"


def run_entry(chapter: Path, entry: dict[str, Any], data_dir: Path | None) -> dict[str, Any]:
    """运行一项的命令，返回填好的新记录。

    异常:
        UserError: 命令失败或没有写出 ``metrics.json``；此时账本不变。
    """
    words = [word for word in shlex.split(entry["command"]) if word != "--download"]
    words[0] = {"python": sys.executable}.get(words[0], words[0])
    if entry["requires"] == "data":
        words += ["--data-dir", str(data_dir.resolve())]
    with tempfile.TemporaryDirectory() as temporary:
        start = time.perf_counter()
        code = subprocess.run([*words, "--out-dir", temporary], cwd=chapter).returncode
        seconds = time.perf_counter() - start
        if code != 0:
            raise UserError(f"{chapter.name} 的命令 {entry['command']!r} 失败，退出码 {code}")
        metrics = load_json(Path(temporary) / "metrics.json")
        for source, target in entry["figures"].items():
            (chapter / target).parent.mkdir(exist_ok=True)
            shutil.copyfile(Path(temporary) / source, chapter / target)
    return entry | {
        "results": metrics["results"],
        "seconds": round(seconds, 1),
        "peak_rss_mib": metrics["peak_rss_mib"] and round(metrics["peak_rss_mib"]),
        "torch": torch.__version__.split("+")[0],
        "machine": machine(metrics["threads"]),
        "date": datetime.date.today().isoformat(),
        "kept": False,
    }


def refresh(chapter: Path, only: str | None, data_dir: Path | None) -> None:
    """重测一章；每测完一项就写一次账本，中途停下也不丢。"""
    ledger = load_json(chapter / "results.json")
    ids = [entry["id"] for entry in ledger["entries"]]
    if only is not None and only not in ids:
        raise UserError(f"--only {only} 不在账本里：可选 {'、'.join(ids)}")
    for index, entry in enumerate(ledger["entries"]):
        if only is not None and entry["id"] != only:
            continue
        absent = (entry["requires"] == "data" and data_dir is None) or (
            entry["requires"] == "cuda" and not torch.cuda.is_available()
        )
        if absent and "results" not in entry:
            raise UserError(f"{entry['id']} 还没有记录，而本机缺少它的依赖 {entry['requires']}")
        new = entry | {"kept": True} if absent else run_entry(chapter, entry, data_dir)
        ledger["entries"][index] = new
        save_json(chapter / "results.json", ledger)


# ---------------------------------------------------------------- 渲染与核对


def _result_cells(record: dict[str, Any]) -> list[str]:
    band = tuple(record["band"])
    expectation = Expectation(
        record["metric"], record["chance"], band, record["floor"], percent=record["percent"]
    )
    show = expectation.format
    value = show(record["value"])
    if record.get("std") is not None:
        value += f" ± {show(record['std'])}"
    return [
        record["metric"],
        f"**{value}**",
        show(record["chance"]),
        "—" if record["baseline"] is None else show(record["baseline"]),
        show(record["floor"]),
        expectation.format_band(),
        record["mark"],
    ]


def render(ledger: dict[str, Any]) -> str:
    """由账本生成 README 里的结果表。"""
    unmeasured = [entry["id"] for entry in ledger["entries"] if "results" not in entry]
    if unmeasured:
        raise UserError(f"账本里 {'、'.join(unmeasured)} 还没有记录：请先重测这一章")
    header = "命令 | 指标 | 实测 | 机会线 | 对照 | 理论极限 | 预期区间 | 判定 | 秒 | 内存峰值 MiB"
    lines = [f"| {header} |", "|" + "---|" * 10]
    kept = False
    for entry in ledger["entries"]:
        kept |= entry["kept"]
        command = f"`{entry['command']}`" + (" †" if entry["kept"] else "")
        memory = entry["peak_rss_mib"]
        cost = [f"{entry['seconds']:.1f}", "未知" if memory is None else f"{memory}"]
        for index, record in enumerate(entry["results"]):
            first = index == 0
            cells = [command if first else "", *_result_cells(record)]
            lines.append("| " + " | ".join([*cells, *(cost if first else ["", ""])]) + " |")
    setups = {(e["machine"], e["torch"], e["date"]) for e in ledger["entries"]}
    described = "；".join(f"{m}，torch {t}，{d}" for m, t, d in sorted(setups))
    records = [record for entry in ledger["entries"] for record in entry["results"]]
    notes = ["秒数为整个进程的墙钟时间，含启动与画图"]
    if any(record.get("std") is not None for record in records):
        notes.append("± 是各种子的标准差")
    if any(record["baseline"] is not None for record in records):
        notes.append(f"对照是{ledger.get('baseline', '同一任务上的线性模型')}")
    notes.append("核对项的机会线是出错时的量级")
    lines += ["", f"测于 {described}。{'；'.join(notes)}。"]
    if kept:
        lines += ["", "† 依赖真实数据或 GPU，本次未重测，沿用先前的记录。"]
    return "\n".join(lines)


def render_root() -> str:
    """由各章账本的第一项生成根目录 README 的结果表。"""
    lines = ["| 章 | 默认命令 | 指标 | 实测 | 机会线 | 秒 |", "|" + "---|" * 6]
    for chapter in chapters():
        entry = load_json(chapter / "results.json")["entries"][0]
        metric, value, chance, *_ = _result_cells(entry["results"][0])
        command = entry["command"].replace("python ", f"python {chapter.name}/", 1)
        cells = [f"[{chapter.name}]({chapter.name}/README.md)", f"`{command}`", metric, value]
        lines.append("| " + " | ".join([*cells, chance, f"{entry['seconds']:.1f}"]) + " |")
    return "\n".join(lines)


def splice(text: str, block: str, where: Path) -> str:
    """把 README 正文 ``text`` 里两个标记之间的内容换成 ``block``。"""
    pattern = re.compile(f"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)})", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise UserError(f"{where} 应恰有一对 {BEGIN} 与 {END}")
    return pattern.sub(lambda _: f"\n{block}\n\n", text)


def outdated() -> list[Path]:
    """与账本不一致的 README；``--check`` 与测试用它。"""
    return [path for path, text in _rendered().items() if path.read_text("utf-8") != text]


def _rendered() -> dict[Path, str]:
    blocks = {c / "README.md": render(load_json(c / "results.json")) for c in chapters()}
    blocks[REPO_ROOT / "README.md"] = render_root()
    return {path: splice(path.read_text("utf-8"), text, path) for path, text in blocks.items()}


# ---------------------------------------------------------------- 命令行


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m utils.report", description="重测一章并刷新 README")
    names = [chapter.name for chapter in chapters()]
    parser.add_argument("chapter", nargs="?", choices=names, metavar="CHAPTER", help="章文件夹名")
    parser.add_argument("--check", action="store_true", help="只核对 README 与账本是否一致")
    parser.add_argument("--only", metavar="ID", help="只重测 results.json 里的这一项")
    parser.add_argument("--data-dir", type=existing_dir, metavar="DIR", help="真实数据的文件夹")
    args = parser.parse_args(argv)
    if args.chapter is None and not args.check:
        parser.error("缺少章文件夹名（或 --check）")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if not args.check:
        refresh(REPO_ROOT / args.chapter, args.only, args.data_dir)
        for path, text in _rendered().items():
            save_text(path, text)
    stale = outdated()
    if stale:
        names = "、".join(str(path.relative_to(REPO_ROOT)) for path in stale)
        raise UserError(f"{names} 与 results.json 不一致：请运行 python -m utils.report CHAPTER")
    print("README 与 results.json 一致")


if __name__ == "__main__":
    run_main(main)
