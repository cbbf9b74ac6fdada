"""文档与代码一致：链接都通，摘录逐字相同，命令都能解析，数字与账本相同。

检查的是每个 Markdown 文件；各项检查先在片段上证明抓得住错误。
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.repo import chapters, load, python_files, repo_files
from utils import report
from utils.file_io_util import REPO_ROOT, load_json

DOCUMENTS = [path for path in repo_files() if path.suffix == ".md"]


class Fence(NamedTuple):
    """一个代码围栏。"""

    language: str
    code: str
    is_example: bool  # 前面有 <!-- 示例 -->：是用法示例，不是摘录


FENCE = re.compile(
    r"^(?P<mark><!-- 示例 -->\n+)?(?P<pad> *)```(?P<lang>\w*)[^\n]*\n(?P<code>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)


def fences(text: str) -> list[Fence]:
    """全部代码围栏。"""
    return [
        Fence(m["lang"], textwrap.dedent(m["code"]), m["mark"] is not None)
        for m in FENCE.finditer(text)
    ]


def prose(text: str) -> str:
    """去掉代码围栏。"""
    return FENCE.sub("", text)


def test_fences_and_prose() -> None:
    text = "a\n```python\nx = 1\n```\nb\n<!-- 示例 -->\n```bash\nls\n```\nc\n"
    assert fences(text) == [Fence("python", "x = 1\n", False), Fence("bash", "ls\n", True)]
    assert prose(text) == "a\n\nb\n\nc\n"


# ---------------------------------------------------------------- 链接与图片

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")


def link_violations(text: str, folder: Path) -> list[str]:
    """相对链接与图片指向存在的文件，图片有替代文字。"""
    wrong = []
    for image, label, target in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(text))):
        if image and not label.strip():
            wrong.append(f"图片 {target} 没有替代文字")
        if re.match(r"[a-z]+:|#", target):
            continue
        path = (folder / target.partition("#")[0]).resolve()
        if not path.exists():
            wrong.append(f"{target} 不存在")
        elif not path.is_relative_to(REPO_ROOT):
            wrong.append(f"{target} 在仓库之外")
    return wrong


def test_link_rule() -> None:
    good = "[x](../utils/cli.py#L3) [y](https://a.b/c) [z](#节) ![图](../LICENSE) `[a](b)`"
    assert link_violations(good, REPO_ROOT / "utils") == []
    assert link_violations("[x](missing.py)", REPO_ROOT) == ["missing.py 不存在"]
    assert link_violations("![](LICENSE)", REPO_ROOT) == ["图片 LICENSE 没有替代文字"]
    assert link_violations("[x](../)", REPO_ROOT) == ["../ 在仓库之外"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_links_and_images_exist(path: Path) -> None:
    text = (REPO_ROOT / path).read_text("utf-8")
    assert link_violations(text, (REPO_ROOT / path).parent) == []


# ---------------------------------------------------------------- 代码摘录


def contains_excerpt(source: str, excerpt: str) -> bool:
    """``excerpt`` 是否是 ``source`` 里连续的若干行（不计共同的缩进与行尾空白）。"""
    wanted = [line.rstrip() for line in textwrap.dedent(excerpt).strip("\n").splitlines()]
    lines = [line.rstrip() for line in source.splitlines()]
    starts = [i for i, line in enumerate(lines) if line.strip() == wanted[0].strip()]
    return any(
        textwrap.dedent("\n".join(lines[i : i + len(wanted)])).splitlines() == wanted
        for i in starts
    )


def test_excerpt_rule() -> None:
    source = "class A:\n    def f(self):\n        x = 1\n\n        return x\n"
    assert contains_excerpt(source, "def f(self):\n    x = 1\n\n    return x\n")
    assert contains_excerpt(source, "x = 1\n\nreturn x")
    assert not contains_excerpt(source, "def f(self):\n    x = 2\n")
    assert not contains_excerpt(source, "def f(self):\n    return x\n")  # 略去了中间的行
    assert not contains_excerpt(source, "def f(self):\nx = 1\n")  # 缩进不同


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_python_blocks_are_verbatim_or_marked_as_examples(path: Path) -> None:
    tops = [path.parts[0], "utils"] if len(path.parts) > 1 else ["chapter_*", "utils"]
    sources = [(REPO_ROOT / file).read_text("utf-8") for file in python_files(*tops)]
    for fence in fences((REPO_ROOT / path).read_text("utf-8")):
        if fence.language != "python":
            continue
        if fence.is_example:
            compile(fence.code, str(path), "exec")
        else:
            assert any(contains_excerpt(source, fence.code) for source in sources), (
                f"{path} 的这段代码不是逐字摘录，也没有以 <!-- 示例 --> 标明是示例：\n{fence.code}"
            )


# ---------------------------------------------------------------- 命令

SHELLS = {"bash", "sh", "shell", "console"}
CLONED = "Deep-Learning-From-Scratch-PyTorch"
HARMLESS = {"pip", "git", "pytest", "ls", "tar", "mkdir", "source", "export", "nvidia-smi"}


def documented_commands(text: str) -> Iterator[list[str]]:
    """文档里的命令，逐段（一个围栏或一处行内代码为一段）拆成词。"""
    inline = re.findall(r"`((?:python|torchrun) [^`\n]*)`", prose(text))
    blocks = [fence.code for fence in fences(text) if fence.language in SHELLS]
    for block in [*blocks, *inline]:
        commands = []
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;|\|", line.removeprefix("$ ").split(" #")[0]):
                words = shlex.split(part, comments=True)
                while words and re.match(r"[A-Z_]+=", words[0]):  # 环境变量前缀
                    words.pop(0)
                if words:
                    commands.append(words)
        yield commands


def resolve_script(words: list[str], folder: Path) -> tuple[Path, list[str]]:
    """``python``、``python -m`` 或 ``torchrun`` 命令 -> (脚本的绝对路径, 它的参数)。"""
    if words[0] == "torchrun":
        at = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "-m")
        words = ["python", *words[at:]]
    if words[1] == "-m":
        return REPO_ROOT / (words[2].replace(".", "/") + ".py"), words[3:]
    for base in (folder, REPO_ROOT):
        if (base / words[1]).is_file():
            return base / words[1], words[2:]
    return folder / words[1], words[2:]


def command_violations(commands: list[list[str]], folder: Path, monkeypatch, capsys) -> list[str]:
    """一段命令：脚本存在，参数能被它自己的 ``parse_args`` 接受；``cd`` 改变当前目录。"""
    wrong = []
    for words in commands:
        shown = shlex.join(words)
        if words[0] == "cd":
            found = [base / words[1] for base in (folder, REPO_ROOT) if (base / words[1]).is_dir()]
            if words[1] == CLONED:  # 克隆下来的文件夹就是仓库根目录
                found = [REPO_ROOT]
            if not found:
                return [*wrong, f"{shown}：没有这个文件夹"]
            folder = found[0].resolve()
            continue
        if words[0] in HARMLESS or words[:3] == ["python", "-m", "pytest"]:
            continue
        if words[:3] == ["python", "-m", "venv"]:
            continue
        if words[0] not in ("python", "torchrun"):
            wrong.append(f"{shown}：不认识的命令")
            continue
        script, argv = resolve_script(words, folder)
        if not script.is_file() or not script.is_relative_to(REPO_ROOT):
            wrong.append(f"{shown}：没有脚本 {words[1]}")
            continue
        module = load(script.relative_to(REPO_ROOT))
        argv = [chapters()[0].name if word == "章名" else word for word in argv]
        for check in ("existing_file", "existing_dir"):  # 文档里的文件名只是示意
            if hasattr(module, check):
                monkeypatch.setattr(module, check, Path)
        try:
            module.parse_args(argv)
        except SystemExit as stop:
            if stop.code:
                wrong.append(f"{shown}：{capsys.readouterr().err.strip()}")
    return wrong


def test_documented_commands_are_found() -> None:
    text = (
        "`python a.py --x 1` 与 `b.py`\n```bash\n$ cd d && A=1 python c.py \\\n  --y  # 说明\n"
        "# 注释\npip install x\n```\n```python\npython()\n```\n"
    )
    assert list(documented_commands(text)) == [
        [["cd", "d"], ["python", "c.py", "--y"], ["pip", "install", "x"]],
        [["python", "a.py", "--x", "1"]],
    ]


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("python -m utils.report --check", None),
        ("python utils/report.py --check", None),
        ("torchrun --standalone --nproc_per_node=2 utils/report.py --check", None),
        ("cd utils && python report.py --check && cd .. && python utils/report.py 章名", None),
        ("git clone x && cd Deep-Learning-From-Scratch-PyTorch && pip install -r y", None),
        ("python -m utils.report --chekc", "不认识的参数 --chekc，是否想写 --check"),
        ("python missing.py", "没有脚本 missing.py"),
        ("python -m utils.missing", "没有脚本"),
        ("cd nowhere && python x.py", "没有这个文件夹"),
        ("rm -rf /", "不认识的命令"),
    ],
)
def test_command_rule(command: str, reason: str | None, monkeypatch, capsys) -> None:
    (commands,) = documented_commands(f"```bash\n{command}\n```\n")
    wrong = command_violations(commands, REPO_ROOT, monkeypatch, capsys)
    assert (wrong == []) if reason is None else (len(wrong) == 1 and reason in wrong[0])


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_documented_commands_parse(path: Path, monkeypatch, capsys) -> None:
    text = (REPO_ROOT / path).read_text("utf-8")
    wrong = [
        command_violations(commands, (REPO_ROOT / path).parent, monkeypatch, capsys)
        for commands in documented_commands(text)
    ]
    assert sum(wrong, []) == []


@pytest.mark.parametrize("chapter", chapters(), ids=lambda path: path.name)
def test_ledger_commands_parse(chapter: Path, monkeypatch, capsys) -> None:
    entries = load_json(chapter / "results.json")["entries"]
    commands = [shlex.split(entry["command"]) for entry in entries]
    assert commands and command_violations(commands, chapter, monkeypatch, capsys) == []


# ---------------------------------------------------------------- 实测结果


def test_result_tables_equal_the_ledgers() -> None:
    assert report.outdated() == [], "请运行 python -m utils.report CHAPTER"
