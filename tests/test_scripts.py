"""每个入口脚本都以子进程真跑一遍 ``--smoke``：各自的文件夹、仓库根目录、别处、``python -m``。

子进程两个一组并行，各用一个线程。整个测试一开始它们就在后台运行（见 conftest.py 的 ``runs``），
与别的测试同时进行：别的测试几乎都只用一个核。
"""

from __future__ import annotations

import math
from concurrent.futures import Future
from pathlib import Path

import pytest

from tests.repo import entry_scripts, load
from tests.smoke import Case, all_cases, has_device
from utils.file_io_util import load_json

pytestmark = pytest.mark.script


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
