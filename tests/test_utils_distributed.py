"""多进程：派生、加入（torchrun）、返回值、出错时的善后。"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.conftest import run_python
from utils import REPO_ROOT
from utils.cli import UserError
from utils.distributed import launch, launched_by_torchrun
from utils.timer import Timer

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """测试本身若由 torchrun 启动，也不受影响。"""
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """``launch`` 的临时文件夹建在这里面，因此查得出是否留下了东西。"""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """扮作由 torchrun 启动的唯一一个进程。"""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    for name, value in zip(TORCHRUN, ("0", "1", "127.0.0.1", str(port)), strict=True):
        monkeypatch.setenv(name, value)


# ---------------------------------------------------------------- 派生


def describe(offset: int, size: int) -> dict[str, Any]:
    """各进程的情况，由 0 号汇总；另带一块 ``size`` 字节、每个进程不同的数据。"""
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    mine = {
        "rank": dist.get_rank(),
        "world": dist.get_world_size(),
        "backend": dist.get_backend(),
        "threads": torch.get_num_threads(),
        "pid": os.getpid(),
        "total": total.item(),
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {"everyone": everyone, "blob": bytes([65 + dist.get_rank()]) * size}


def test_launch_spawns_and_returns_what_rank_zero_returned(temporary: Path) -> None:
    torch.set_num_threads(2)
    found = launch(describe, 2, (10, 2**20))
    assert found["blob"] == b"A" * 2**20  # 0 号的，且远大于管道的缓冲区
    everyone = found["everyone"]
    assert [each["rank"] for each in everyone] == [0, 1]
    for each in everyone:
        assert each["world"] == 2 and each["backend"] == "gloo"
        assert each["threads"] == 1
        assert each["total"] == 10 + 11
    pids = {each["pid"] for each in everyone} | {os.getpid()}
    assert len(pids) == 3
    assert multiprocessing.active_children() == []
    assert torch.get_num_threads() == 2  # 父进程不变
    assert not dist.is_initialized()
    assert list(temporary.iterdir()) == []


def fail_on_rank_one() -> None:
    """1 号出错；0 号正等着它，只会看到连接断开。"""
    dist.barrier()
    if dist.get_rank() == 1:
        time.sleep(0.2)
        raise ValueError("一号进程坏了：值 42")
    dist.barrier()


def test_exception_reaches_the_parent_and_nothing_is_left(temporary: Path) -> None:
    with pytest.raises(Exception, match="ValueError: 一号进程坏了：值 42"), Timer() as timer:
        launch(fail_on_rank_one, 2)
    assert timer.elapsed < 30
    assert multiprocessing.active_children() == []
    assert not any(path.is_dir() for path in temporary.iterdir())  # torch 自己的错误文件除外


def test_without_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_available", lambda: False)
    with pytest.raises(UserError, match="没有编入 torch.distributed，无法多进程运行"):
        launch(describe, 2, (0, 1))


# ---------------------------------------------------------------- 加入已有的进程


def test_launched_by_torchrun_needs_all_four_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launched_by_torchrun()
    for name in TORCHRUN:
        monkeypatch.setenv(name, "0")
    assert launched_by_torchrun()
    for name in TORCHRUN:
        with monkeypatch.context() as context:
            context.delenv(name)
            assert not launched_by_torchrun()


def test_launch_joins_the_group_and_leaves_it(one_process: None) -> None:
    torch.set_num_threads(2)
    found = launch(describe, 7, (10, 3))  # 进程数以 torchrun 为准
    (only,) = found["everyone"]
    assert only == {
        "rank": 0,
        "world": 1,
        "backend": "gloo",
        "threads": 1,
        "pid": os.getpid(),
        "total": 10,
    }
    assert found["blob"] == b"AAA"
    assert not dist.is_initialized()


def test_an_error_is_not_masked_by_tearing_down(
    one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        assert dist.is_initialized()
        raise KeyError("坏了")

    with pytest.raises(KeyError, match="坏了"):
        launch(fail, 1)
    dist.destroy_process_group()  # 出错时不拆组，随进程一起结束
    with monkeypatch.context() as context:  # 建组就失败了，也没有组可拆
        context.delattr(dist, "init_process_group")
        with pytest.raises(AttributeError, match="init_process_group"):
            launch(dist.get_world_size, 1)
    assert launch(dist.get_world_size, 1) == 1  # 可以再来一次


def complain() -> None:
    raise UserError("批太大：至多 12000")


def test_user_error_stays_a_user_error(temporary: Path) -> None:
    with pytest.raises(UserError, match=r"^批太大：至多 12000$"):
        launch(complain, 2)
    assert multiprocessing.active_children() == []


SCRIPT = """
import json, os, sys
from pathlib import Path
from tests.test_utils_distributed import describe
from utils.distributed import launch

if __name__ == "__main__":
    found = launch(describe, 5, (10, 3))
    rank = os.environ["RANK"]
    text = json.dumps([os.getpid(), found["blob"].decode(), found["everyone"]])
    Path(sys.argv[1], f"{rank}.json").write_text(text)
"""


@pytest.mark.script
def test_launch_joins_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "joins.py"
    script.write_text(SCRIPT, encoding="utf-8")
    done = run_python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *(script, tmp_path),
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
    found = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(found) == {"0.json", "1.json"}  # 不是 5 个
    for rank in (0, 1):
        pid, blob, everyone = found[f"{rank}.json"]
        assert blob == "AB"[rank] * 3  # 各自的返回值
        assert [each["rank"] for each in everyone] == [0, 1]
        assert everyone[rank]["pid"] == pid  # 就在本进程里运行，没有再派生
        assert all(each["world"] == 2 and each["total"] == 21 for each in everyone)
        assert all(each["threads"] == 1 for each in everyone)
