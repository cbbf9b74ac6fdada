"""多进程：派生、加入（torchrun）、返回值、出错时的善后；分批、汇总与各进程的设备。"""

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
from torch import nn

from tests.conftest import run_python
from utils import REPO_ROOT, cli, device, distributed, get_device
from utils.cli import ArgumentParser, UserError, run_main
from utils.distributed import (
    Shard,
    World,
    average_buffers,
    join_torchrun,
    launch,
    launched_by_torchrun,
    main_first,
    run_parallel,
    sum_over_processes,
    world,
)
from utils.timer import Timer

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """测试本身若由 torchrun 启动，也不受影响。"""
    for name in (*TORCHRUN, "LOCAL_RANK"):
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


# ---------------------------------------------------------------- 数据并行


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shards_of_every_batch_make_up_the_batch(size: int) -> None:
    """依次排好就是原来的一批：不重、不漏、不乱序；各段至多差一个；空的一段不产出。"""
    batches, start = [], 0
    for count in (6, 7, 1, 4):
        x = torch.arange(start, start + count)
        batches.append((x, -x))
        start += count
    shards = [list(Shard(batches, rank, size)) for rank in range(size)]
    assert all(torch.equal(x, -y) and len(x) for shard in shards for x, y in shard)
    for x, _ in batches:
        inside = set(x.tolist())
        parts = [part for shard in shards for part, _ in shard if inside & set(part.tolist())]
        assert torch.equal(torch.cat(parts), x)
        assert len(parts) == min(size, len(x))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    twice = Shard(batches, size - 1, size)
    assert len([*twice]) == len([*twice]) > 0  # 可以再走一遍


@pytest.mark.parametrize(("rank", "size"), [(-1, 2), (2, 2), (0, 0)])
def test_shard_refuses_a_rank_outside_the_world(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match=rf"rank={rank} 应在 \[0, size={size}\) 之内"):
        Shard([], rank, size)


def test_one_process_needs_no_group() -> None:
    assert world() == World(0, 1) and world().is_main and not World(1, 2).is_main
    values = torch.arange(3.0)
    assert torch.equal(sum_over_processes(values), torch.arange(3.0))
    norm = nn.BatchNorm1d(3)
    norm.running_mean.fill_(4.0)
    average_buffers(norm)
    assert norm.running_mean.tolist() == [4.0] * 3
    with main_first():
        pass
    with join_torchrun("cuda:7"):  # 没有 torchrun：不管设备，也不建组
        assert not dist.is_initialized()


class Counted(nn.Module):
    """一个 BatchNorm，另带不该被平均的：参数、整数缓冲区。"""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.norm.running_mean.copy_(torch.tensor([1.0, 10.0]) * (rank + 1))
        self.norm.running_var.fill_(2.0 + 4 * rank)
        self.norm.num_batches_tracked.fill_(7)
        nn.init.constant_(self.norm.weight, rank)


def collect() -> list[Any]:
    """各进程汇总之后的所见，由 0 号收集。"""
    rank = dist.get_rank()
    values = torch.tensor([rank + 1, 10 * rank])
    total = sum_over_processes(values)
    model = Counted(rank)
    average_buffers(model)
    with main_first():
        entered = time.time()
        time.sleep(0.2 if rank == 0 else 0)
        left = time.time()
    shard = [x.tolist() for x, _ in Shard([(torch.arange(5),) * 2, (torch.ones(1),) * 2], *world())]
    mine = {
        "world": tuple(world()),
        "main": world().is_main,
        "values": values.tolist(),
        "total": total.tolist(),
        "mean": model.norm.running_mean.tolist(),
        "var": model.norm.running_var.tolist(),
        "tracked": model.norm.num_batches_tracked.item(),
        "weight": model.norm.weight.tolist(),
        "shard": shard,
        "stay": (entered, left),
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def test_sums_and_averages_over_two_processes() -> None:
    found = launch(collect, 2)
    for rank, each in enumerate(found):
        assert each["world"] == (rank, 2) and each["main"] == (rank == 0)
        assert each["values"] == [rank + 1, 10 * rank]  # 原张量不变
        assert each["total"] == [3, 10]
        assert each["mean"] == [1.5, 15.0] and each["var"] == [4.0, 4.0]
        assert each["tracked"] == 7 and each["weight"] == [rank, rank]
    assert found[0]["stay"][1] <= found[1]["stay"][0]  # 0 号做完，1 号才开始
    assert [each["shard"] for each in found] == [[[0, 1]], [[2, 3, 4], [1.0]]]


# ---------------------------------------------------------------- 由 torchrun 启动的脚本


def test_join_torchrun_enters_and_leaves(one_process: None) -> None:
    with join_torchrun("cpu"):
        assert dist.get_backend() == "gloo" and torch.get_num_threads() == 1
        assert world() == World(0, 1)
        assert sum_over_processes(torch.ones(2)).tolist() == [1, 1]
    assert not dist.is_initialized()
    with pytest.raises(KeyError, match="坏了"), join_torchrun("cpu"):
        raise KeyError("坏了")
    assert dist.is_initialized()  # 出错时不拆组，理由同 launch
    dist.destroy_process_group()


@pytest.fixture
def gpus(one_process: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """扮作有两块 GPU 的机器上的 1 号进程；记下选了哪一块、用什么通信。"""
    chosen: dict[str, Any] = {}
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: chosen.update(index=index))
    monkeypatch.setattr(distributed, "_start", lambda backend: chosen.update(backend=backend))
    monkeypatch.setattr(distributed, "_stop", lambda: None)
    return chosen


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("auto", {"index": 1, "backend": "nccl"}),
        ("cuda", {"index": 1, "backend": "nccl"}),
        ("cpu", {"backend": "gloo"}),
    ],
)
def test_each_process_takes_its_own_gpu(
    name: str, expected: dict[str, Any], gpus: dict[str, Any]
) -> None:
    with join_torchrun(name):
        assert gpus == expected


def test_too_few_gpus_or_a_shared_one(
    gpus: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, local in (("auto", "2"), ("cuda", "5"), ("cuda:0", "0")):
        monkeypatch.setenv("LOCAL_RANK", local)
        with (
            pytest.raises(UserError, match="本机有 2 块，.*--nproc-per-node 不超过 2"),
            join_torchrun(name),
        ):
            pass
    assert gpus == {}  # 没有建组


def test_get_device_follows_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "available_devices", lambda: ["cpu", "cuda:0", "cuda:1"])
    assert [str(get_device(name)) for name in ("cuda", "auto", "cuda:1")] == [
        "cuda:0",
        "cuda:0",
        "cuda:1",
    ]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [str(get_device(name)) for name in ("cuda", "auto", "cuda:0", "cpu")] == [
        "cuda:1",
        "cuda:1",
        "cuda:0",
        "cpu",
    ]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="本机没有设备 'cuda'"):
        get_device("cuda")


def fail_with_user_error() -> None:
    raise UserError("批太大")


def fail_to_parse() -> None:
    ArgumentParser(prog="x.py").parse_args(["--epoch"])


@pytest.mark.parametrize("fail", [fail_with_user_error, fail_to_parse])
@pytest.mark.parametrize(("rank", "waited"), [(None, []), ("0", []), ("1", [10]), ("13", [10])])
def test_other_ranks_let_rank_zero_report_first(
    fail, rank: str | None, waited: list[int], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """0 号报错之后 torchrun 会结束其余进程，等在那里的就不再重复；只有它出错时仍然报告。"""
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        assert capsys.readouterr().err == ""
        naps.append(seconds)

    monkeypatch.setattr(cli.time, "sleep", sleep)
    with pytest.raises(SystemExit) as caught:
        run_main(fail)
    assert caught.value.code == 2 and naps == waited
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("错误：")


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("rank", "lines"), [(None, 1), ("0", 1), ("1", 0)])
def test_only_rank_zero_reports_the_interruption(
    rank: str | None, lines: int, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as caught:
        run_main(interrupt)
    assert caught.value.code == 130
    assert capsys.readouterr().err.count("已中断") == lines


# ---------------------------------------------------------------- 互不相干的任务


def square(x: int) -> tuple[int, int, int]:
    """平方，连同进程号与线程数。"""
    if x < 0:
        raise UserError(f"{x} 是负数")
    time.sleep(0.05 * (x == 1))  # 第一个做得慢，次序仍不变
    return x * x, os.getpid(), torch.get_num_threads()


def test_parallel_tasks_keep_their_order_and_use_one_thread_each() -> None:
    torch.set_num_threads(2)
    found = list(run_parallel(square, [(1,), (2,), (3,)], 2))
    assert [value for value, _, _ in found] == [1, 4, 9]
    assert all(pid != os.getpid() and threads == 1 for _, pid, threads in found)
    alone = list(run_parallel(square, [(1,), (2,)], 1))  # 一个进程就是本进程
    assert alone == [(1, os.getpid(), 1), (4, os.getpid(), 1)]


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_in_a_task_reaches_the_caller_and_leaves_no_process(jobs: int) -> None:
    found = run_parallel(square, [(2,), (-3,), (4,)], jobs)
    assert next(found)[0] == 4
    with pytest.raises(UserError, match="-3 是负数"):
        next(found)
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_workers_leave_with_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, time\n"
        f"sys.path.insert(0, {str(REPO_ROOT)!r})\n"
        "from utils.distributed import _leave_with\n"
        "if os.fork() == 0:\n"
        "    _leave_with(os.getppid())\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(0.2)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    start = time.monotonic()
    run_python("-c", code, cwd=tmp_path)  # 子进程握着标准输出：它不走，这里就一直等
    assert time.monotonic() - start < 30
