"""每个入口脚本都以子进程真跑一遍 ``--smoke``：各自的文件夹、仓库根目录、别处、``python -m``。

子进程两个一组并行，各用一个线程：导入 torch 的两秒是大头，两核正好用满。
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import run_python
from tests.repo import entry_scripts, is_generated, load, module_name, parse
from utils.file_io_util import REPO_ROOT, load_json

pytestmark = pytest.mark.script


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


def run(case: Case, folder: Path):
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


@pytest.fixture(scope="session")
def runs(request, tmp_path_factory) -> Iterator[dict[Case, Future]]:
    """本次选中的全部运行，在后台两个一组地进行。"""
    selected = {
        item.callspec.params["case"]
        for item in request.session.items
        if "case" in getattr(getattr(item, "callspec", None), "params", {})
    }
    folder = tmp_path_factory.mktemp("smoke")
    before = repo_state()
    with ThreadPoolExecutor(max_workers=2) as pool:
        futures = {}
        for index, case in enumerate(case for case in all_cases() if case in selected):
            place = folder / str(index)
            futures[case] = pool.submit(lambda c=case, p=place: (run(c, p), p))
        yield futures
    changed = {p for p, state in repo_state().items() if before.get(p) != state}
    assert not changed, f"运行脚本改动了仓库：{sorted(map(str, changed))}"


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_smoke_run(case: Case, runs: dict[Case, Future]) -> None:
    done, folder = runs[case].result()
    if case.script.name == "benchmark.py" and "torchvision 不可用" in done.stderr:
        # 以 torchvision 为比较对象的测速离不开它；其余脚本用内置数据，必须照常运行
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr
    assert done.stdout.strip(), "脚本应打印它在做什么"
    results = load_json(folder / "out" / "metrics.json")["results"]
    assert results
    for record in results:
        assert isinstance(record["metric"], str) and len(record["band"]) == 2
        assert math.isfinite(record["value"]) and math.isfinite(record["chance"])
        assert record["learned"] is None  # --smoke 不作判定
    assert list((folder / "cwd").iterdir()) == []  # 不往当前目录里写东西


# ---------------------------------------------------------------- 用户的失误


@pytest.mark.parametrize("script", entry_scripts(), ids=str)
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--device", "cuda:99"], "本机没有设备 'cuda:99'"),
        (["--seed", "-1"], "'-1' 不合要求"),
        (["--no-such-flag"], "不认识的参数 --no-such-flag"),
    ],
    ids=["device", "seed", "flag"],
)
def test_user_errors_are_one_line(
    script: Path, argv: list[str], words: str, tmp_path, capsys
) -> None:
    from utils.cli import run_main

    module = load(script)
    if "--device" in argv and not has_device(script):
        pytest.skip("这个脚本没有 --device")
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: module.main([*argv, "--smoke", "--out-dir", str(tmp_path / "out")]))
    err = capsys.readouterr().err
    assert caught.value.code == 2
    assert words in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("script", entry_scripts(), ids=str)
def test_unwritable_out_dir_fails_before_any_work(script: Path, tmp_path: Path, capsys) -> None:
    from utils.cli import UserError

    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="无法写入输出文件夹（--out-dir）"):
        load(script).main(["--smoke", "--out-dir", str(tmp_path / "file" / "out")])
    assert len(capsys.readouterr().out.splitlines()) <= 1  # 训练还没有开始
