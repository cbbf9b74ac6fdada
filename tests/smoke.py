"""入口脚本的 ``--smoke``：有哪些运行，怎样运行一次。"""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.conftest import run_python
from tests.repo import entry_scripts, is_generated, load, module_name, parse
from utils.file_io_util import REPO_ROOT


class Case(NamedTuple):
    """一次运行：哪个脚本、什么参数、从哪里。"""

    script: Path  # 相对于仓库根目录
    argv: tuple[str, ...] = ()
    place: str = "own"  # own、root、foreign 或 module

    def __str__(self) -> str:
        return " ".join([str(self.script), *self.argv, f"@{self.place}"])


def task_choices(path: Path) -> list[tuple[str, str]]:
    """脚本的 ``--task``（或 ``--experiment``）有哪些选项，每项是两个词；没有这个参数则为空。"""
    for node in ast.walk(parse(path)):
        if (
            isinstance(node, ast.Call)
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and node.args[0].value in ("--task", "--experiment")
        ):
            (choices,) = [k.value for k in node.keywords if k.arg == "choices"]
            code = compile(ast.Expression(choices), str(path), "eval")
            flag = node.args[0].value
            return [(flag, choice) for choice in eval(code, vars(load(path)))]
    return []


def has_device(path: Path) -> bool:
    """脚本有没有 ``--device``；只在 CPU 上做的演示可以没有，有就要当真。"""
    return "device" in vars(load(path).parse_args([]))


def all_cases() -> list[Case]:
    """每个入口从自己的文件夹运行；各章的 train.py 另从三处运行，顺便轮换 ``--task``。"""
    cases = []
    for script in entry_scripts():
        places = ["own"]
        if script.name == "train.py":
            places += ["root", "foreign", "module"]
        tasks = task_choices(script) or [()]
        for i in range(max(len(places), len(tasks))):
            place = places[i] if i < len(places) else "own"
            cases.append(Case(script, tasks[i % len(tasks)], place))
    return cases


def run(case: Case, folder: Path) -> subprocess.CompletedProcess[str]:
    """运行一次；``folder`` 下的 ``cwd`` 是与仓库无关的当前目录，``out`` 是输出。"""
    (folder / "cwd").mkdir(parents=True)
    script, cwd = REPO_ROOT / case.script, REPO_ROOT
    if case.place == "own":
        script, cwd = Path(script.name), script.parent
    elif case.place == "root":
        script = case.script
    elif case.place == "foreign":
        cwd = folder / "cwd"
    command = ["-m", module_name(case.script)] if case.place == "module" else [script]
    argv = [*case.argv, "--smoke", "--out-dir", folder / "out"]
    if has_device(case.script):
        argv += ["--device", "cpu"]
    return run_python(*command, *argv, cwd=cwd, env={"OMP_NUM_THREADS": "1"})


def repo_state() -> dict[Path, tuple[int, int]]:
    """仓库里（outputs 等除外）每个文件的大小与修改时刻。"""
    paths = [p for p in REPO_ROOT.rglob("*") if not is_generated(p.relative_to(REPO_ROOT))]
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in paths if p.is_file()}


@contextmanager
def in_background(cases: Iterable[Case], folder: Path) -> Iterator[dict[Case, Future]]:
    """在后台两个一组地运行 ``cases``；离开时等它们做完，核对仓库没有被改动。"""
    before = repo_state()
    with ThreadPoolExecutor(max_workers=2) as pool:
        futures = {}
        for index, case in enumerate(cases):
            place = folder / str(index)
            futures[case] = pool.submit(lambda c=case, p=place: (run(c, p), p))
        yield futures
    changed = {p for p, state in repo_state().items() if before.get(p) != state}
    assert not changed, f"运行脚本改动了仓库：{sorted(map(str, changed))}"
