"""设备、随机种子、计时器与隔离运行。"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from utils import REPO_ROOT
from utils import device as device_module
from utils.cli import UserError
from utils.device import TorchDevice, available_devices, get_device, peak_rss_mib
from utils.file_io_util import load_checkpoint, save_checkpoint
from utils.seed import capture_rng, make_generator, restore_rng, set_seed
from utils.timer import Timer, alternate, run_isolated, seconds_of

# ---------------------------------------------------------------- 设备


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        (["cpu"], "cpu"),
        (["cpu", "mps"], "mps"),
        (["cpu", "cuda:0", "cuda:1"], "cuda:0"),
        (["cpu", "cuda:0", "mps"], "cuda:0"),
    ],
)
def test_auto_prefers_cuda_then_mps_then_cpu(monkeypatch, present, expected) -> None:
    monkeypatch.setattr(device_module, "available_devices", lambda: present)
    assert get_device().device == torch.device(expected)
    assert get_device("cpu").device == torch.device("cpu")


def test_cuda_without_index_is_the_first_gpu(monkeypatch) -> None:
    monkeypatch.setattr(device_module, "available_devices", lambda: ["cpu", "cuda:0", "cuda:1"])
    assert get_device("cuda").device == torch.device("cuda:0")
    assert get_device("cuda:1").device == torch.device("cuda:1")
    with pytest.raises(UserError, match="本机没有设备 'cuda:2'：可用的有 cpu、cuda:0、cuda:1"):
        get_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CPU", "", "cpu:0", "mps:1"])
def test_misspelt_device_says_what_is_allowed(name: str) -> None:
    with pytest.raises(UserError, match="写法不对：应为 auto、cpu、cuda、cuda:N 或 mps"):
        get_device(name)


def test_missing_device_lists_present_ones(monkeypatch) -> None:
    monkeypatch.setattr(device_module, "available_devices", lambda: ["cpu"])
    for name in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"本机没有设备 '{name}'：可用的有 cpu"):
            get_device(name)


def test_cpu_is_always_available_and_described() -> None:
    cpu = get_device("cpu")
    assert available_devices()[0] == "cpu"
    assert (cpu.type, str(cpu)) == ("cpu", "cpu")
    assert (
        cpu.describe().startswith("CPU（") and f"{torch.get_num_threads()} 线程" in cpu.describe()
    )
    cpu.synchronize()  # 无事可做，但不能出错


def test_autocast_computes_matmul_in_bfloat16_only_when_asked() -> None:
    cpu, a = TorchDevice(torch.device("cpu")), torch.ones(2, 2)
    for dtype, expected in [
        (None, torch.float32),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ]:
        with cpu.autocast(dtype):
            assert (a @ a).dtype == expected


def test_memory_figures_are_in_mib_and_consistent() -> None:
    cpu = get_device("cpu")
    before = peak_rss_mib()
    block = torch.ones(64 * 2**20 // 4)  # 64 MiB，逐页写过
    after = peak_rss_mib()
    assert before <= after < cpu.total_memory_mib()
    assert 100 < after < 50_000  # 装着 torch 的进程：单位若是 KiB 或字节，就会出界
    assert cpu.peak_memory_mib() == pytest.approx(after, abs=8)
    assert block.sum() == len(block)


# ---------------------------------------------------------------- 种子


def draw() -> tuple[float, float, float]:
    """三个全局生成器各取一个数。"""
    return random.random(), float(np.random.random()), torch.rand(()).item()


def test_set_seed_fixes_all_three_generators() -> None:
    set_seed(7)
    first = draw()
    set_seed(7)
    assert draw() == first
    set_seed(8)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_numpy_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed={seed} 超出范围：应在 0 到 2\*\*32-1 之间"):
        set_seed(seed)


def test_largest_seed_is_accepted() -> None:
    set_seed(2**32 - 1)
    assert torch.initial_seed() == 2**32 - 1


def test_deterministic_switch(monkeypatch) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    try:
        set_seed(0, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_generators_are_independent_of_the_global_one() -> None:
    expected = torch.rand(3, generator=make_generator(5))
    set_seed(1)
    global_next = torch.rand(2)
    set_seed(1)
    assert torch.equal(torch.rand(3, generator=make_generator(5)), expected)
    assert torch.equal(torch.rand(2), global_next)


def test_captured_rng_survives_a_checkpoint_and_replays_exactly(tmp_path) -> None:
    set_seed(3)
    np.random.standard_normal()  # 留下一个缓存的高斯数，它也是状态的一部分
    random.gauss(0, 1)
    save_checkpoint(tmp_path / "rng.pt", {"rng": capture_rng()})
    expected = draw(), np.random.standard_normal(), random.gauss(0, 1)
    set_seed(99)
    restore_rng(load_checkpoint(tmp_path / "rng.pt")["rng"])
    assert (draw(), np.random.standard_normal(), random.gauss(0, 1)) == expected


# ---------------------------------------------------------------- 计时器


class Clock:
    """假的表：每次同步设备，时间就走 1 秒，因此能数清同步了几次。"""

    def __init__(self) -> None:
        self.now = 0.0

    def synchronize(self) -> None:
        self.now += 1


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def test_timer_synchronises_before_every_reading(clock: Clock) -> None:
    with Timer(clock) as timer:  # 读表：1
        clock.now += 10
        assert timer.lap("a") == 11  # 2
        clock.now += 20
        assert timer.lap("b") == 21  # 3
        clock.now += 30
        assert timer.lap("a") == 31  # 4
    assert timer.laps == {"a": 42, "b": 21}  # 同名累加
    assert timer.elapsed == 64
    clock.now += 100
    assert timer.elapsed == 64  # 结束之后固定不变


def test_timer_without_device_reads_wall_clock(clock: Clock) -> None:
    with Timer() as timer:
        clock.now += 2
        assert timer.elapsed == 2  # 进行之中也能读
        clock.now += 3
    assert timer.elapsed == 5


def test_timer_restarts_with_each_with(clock: Clock) -> None:
    timer = Timer()
    with timer:
        clock.now += 5
        timer.lap("old")
    with timer:
        clock.now += 2
    assert (timer.elapsed, timer.laps) == (2, {})


def test_timer_stops_when_the_block_raises(clock: Clock) -> None:
    timer = Timer()
    with pytest.raises(KeyError), timer:
        clock.now += 4
        raise KeyError
    clock.now += 9
    assert timer.elapsed == 4


def test_timer_misuse_is_reported() -> None:
    with pytest.raises(RuntimeError, match="还没有开始"):
        _ = Timer().elapsed
    with pytest.raises(RuntimeError, match="with 语句之内"):
        Timer().lap("x")
    with Timer() as timer:
        pass
    with pytest.raises(RuntimeError, match="with 语句之内"):
        timer.lap("x")


def test_timer_as_decorator_keeps_result_name_and_latest_time(clock: Clock) -> None:
    @Timer()
    def wait(seconds: float, depth: int = 0) -> float:
        """等。"""
        clock.now += seconds
        return wait(seconds, depth - 1) + seconds if depth else seconds

    assert (wait.__name__, wait.__doc__) == ("wait", "等。")
    assert wait(3) == 3 and wait.timer.elapsed == 3
    assert wait(5) == 5 and wait.timer.elapsed == 5  # 每次重新计时
    assert wait(1, depth=2) == 3  # 可重入


def test_timer_reports_process_peak_memory() -> None:
    with Timer() as timer:
        pass
    assert timer.peak_rss_mib == pytest.approx(peak_rss_mib(), rel=0.05)


# ---------------------------------------------------------------- 测量


def test_seconds_of_runs_once(clock: Clock) -> None:
    calls = []

    def work() -> str:
        clock.now += 5
        calls.append(1)
        return "不要的返回值"

    assert seconds_of(work) == 5
    assert seconds_of(work, clock) == 5 + 1  # 终点之前与设备同步
    assert len(calls) == 2


def test_alternate_takes_turns_and_drops_the_first_round(capsys) -> None:
    calls: list[str] = []

    def contender(name: str) -> Callable[[], float]:
        def measure() -> float:
            calls.append(name)
            return float(len(calls))

        return measure

    names = ["b", "a", "c"]
    found = alternate({name: contender(name) for name in names}, repeats=3)
    assert calls == names * 4  # 一轮预热，三轮计数
    assert found == {"b": [4.0, 7.0, 10.0], "a": [5.0, 8.0, 11.0], "c": [6.0, 9.0, 12.0]}
    assert list(found) == names
    assert capsys.readouterr().out == ""  # 进度条在标准错误上
    calls.clear()
    assert alternate({"a": contender("a")}, repeats=0) == {"a": []} and calls == ["a"]


# ---------------------------------------------------------------- 隔离运行

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


def describe_process(values: list[int]) -> dict[str, Any]:
    """在子进程里看到的一切。"""
    return {
        "sum": sum(values),
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
        "variables": [os.environ.get(name) for name in THREAD_VARIABLES],
    }


def fail_in_process(value: int) -> None:
    raise KeyError(f"值 {value}，{torch.get_num_threads()} 个线程")


@pytest.fixture
def variables(monkeypatch) -> dict[str, str | None]:
    """父进程的环境：一个已设，一个没有设。"""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    return {name: os.environ.get(name) for name in THREAD_VARIABLES}


def test_run_isolated_uses_another_process_and_its_own_threads(variables) -> None:
    found = run_isolated(describe_process, [1, 2, 4], threads=2)
    assert found["sum"] == 7 and found["pid"] != os.getpid()
    assert found["threads"] == 2 and found["variables"] == ["2"] * 4
    assert torch.get_num_threads() == 1  # 父进程不变
    assert {name: os.environ.get(name) for name in THREAD_VARIABLES} == variables


def test_run_isolated_restores_the_environment_when_the_function_raises(variables) -> None:
    with pytest.raises(KeyError, match="值 3，1 个线程"):
        run_isolated(fail_in_process, 3)
    assert {name: os.environ.get(name) for name in THREAD_VARIABLES} == variables


SLEEPER = """
import sys, time
from utils.timer import run_isolated

def announce_and_sleep(path):
    open(path, "w").close()
    time.sleep(60)

if __name__ == "__main__":
    run_isolated(announce_and_sleep, sys.argv[1])
"""


@pytest.mark.script
@pytest.mark.skipif(os.name == "nt", reason="Windows 没有 SIGINT 的这套约定")
def test_interrupting_the_parent_does_not_wait_for_the_child(tmp_path: Path) -> None:
    script, started = tmp_path / "sleeper.py", tmp_path / "started"
    script.write_text(SLEEPER, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(REPO_ROOT)}
    with subprocess.Popen(
        [sys.executable, script, started], env=environment, stderr=subprocess.PIPE
    ) as process:
        deadline = time.monotonic() + 60
        while not started.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)  # 只送给父进程，终端里的 Ctrl-C 则人人有份
        with Timer() as timer:
            process.communicate(timeout=50)
    assert started.exists() and process.returncode != 0 and timer.elapsed < 20
