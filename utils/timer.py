"""与设备同步的计时器：``with`` 语句、装饰器、分段（lap）、内存峰值。"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, TypeVar

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
