"""与设备同步的计时器：``with`` 语句、装饰器、分段（lap）、内存峰值；交替测量，隔离运行。"""

from __future__ import annotations

import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch

from utils.device import TorchDevice, peak_rss_mib

P = ParamSpec("P")
R = TypeVar("R")


class Timer:
    """测量一段代码的墙钟时间，秒。

    GPU 上的算子是异步的：提交后立刻返回。因此起点、终点与每个分段都先等设备完工再读表。

    用法::

        with Timer(device) as timer:
            train()
            timer.lap("训练")
            test()
            timer.lap("测试")
        print(timer.elapsed, timer.laps, timer.peak_rss_mib)

        @Timer()          # 每次调用都重新计时，结果在 train.timer 里
        def train(): ...
    """

    def __init__(self, device: TorchDevice | None = None) -> None:
        self.device = device
        self.laps: dict[str, float] = {}
        self._start: float | None = None
        self._stop: float | None = None
        self._last_lap = 0.0

    def _now(self) -> float:
        if self.device is not None:
            self.device.synchronize()
        return time.perf_counter()

    def __enter__(self) -> Timer:
        self.laps = {}
        self._stop = None
        self._start = self._last_lap = self._now()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop = self._now()

    def lap(self, name: str) -> float:
        """记下自上一个分段（或起点）以来的秒数并返回；同名分段累加。"""
        if self._start is None or self._stop is not None:
            raise RuntimeError("Timer.lap 只能在 with 语句之内调用")
        now = self._now()
        seconds = now - self._last_lap
        self.laps[name] = self.laps.get(name, 0.0) + seconds
        self._last_lap = now
        return seconds

    @property
    def elapsed(self) -> float:
        """自起点以来的秒数；``with`` 结束之后固定不变。"""
        if self._start is None:
            raise RuntimeError("Timer 还没有开始：请写 `with Timer() as timer:`")
        return (self._now() if self._stop is None else self._stop) - self._start

    @property
    def peak_rss_mib(self) -> float:
        """本进程常驻内存的峰值，MiB。"""
        return peak_rss_mib()

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """作装饰器用：每次调用都在一个新的计时器里进行，可重入；最近一次在 ``.timer``。"""

        @functools.wraps(function)
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            with Timer(self.device) as timed.timer:
                return function(*args, **kwargs)

        timed.timer = Timer(self.device)
        return timed


def seconds_of(work: Callable[[], Any], device: TorchDevice | None = None) -> float:
    """运行一次 ``work``，返回秒数。"""
    with Timer(device) as timer:
        work()
    return timer.elapsed


def alternate(
    contenders: Mapping[str, Callable[[], float]], repeats: int
) -> dict[str, list[float]]:
    """轮流运行各个 ``contenders``，使机器忽快忽慢时谁也不吃亏；第一轮预热，不计。

    参数:
        contenders: 名字 -> 运行一次并返回秒数的函数（准备工作不计时的，自己量；否则用
            ``seconds_of``）。
        repeats: 每个计多少次。

    返回:
        名字 -> ``repeats`` 个秒数。
    """
    from tqdm import tqdm

    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with tqdm(total=(repeats + 1) * len(contenders), desc="测量", leave=False) as bar:
        for round_number in range(repeats + 1):
            for name, measure in contenders.items():
                elapsed = measure()
                if round_number > 0:
                    seconds[name].append(elapsed)
                bar.update()
    return seconds


# 各家 BLAS 与 OpenMP 的线程数，都在库加载时读环境变量
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


def run_isolated(function: Callable[..., R], *args: Any, threads: int = 1) -> R:
    """在新的进程里运行 ``function(*args)`` 并返回结果，NumPy 与 PyTorch 都用 ``threads`` 个线程。

    NumPy 的线程数在导入时就定了，之后改不了，所以要换进程；内存峰值也因此互不影响。

    参数:
        function: 模块最外层的函数；参数与返回值须能序列化。
        threads: 线程数。
    """
    previous = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
            try:
                return pool.submit(_with_threads, threads, function, args).result()
            except KeyboardInterrupt:  # 不等它做完
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
    finally:
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _with_threads(threads: int, function: Callable[..., R], args: tuple[Any, ...]) -> R:
    torch.set_num_threads(threads)
    return function(*args)
