"""选择计算设备，并把 CPU、CUDA 与 MPS 的差别收在一个小类里。"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.cli import UserError

MIB = 2**20


@dataclass(frozen=True)
class TorchDevice:
    """一个选定的设备。``device.device`` 是可以传给 ``.to(...)`` 的 ``torch.device``。"""

    device: torch.device

    @property
    def type(self) -> str:
        """``cpu``、``cuda`` 或 ``mps``。"""
        return self.device.type

    def describe(self) -> str:
        """给人看的一行描述，如 ``CPU（x86_64，2 线程）``。"""
        if self.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
            return f"{self.device}（{name}，{self.total_memory_mib():.0f} MiB）"
        if self.type == "mps":
            return "mps（Apple GPU）"
        return f"CPU（{platform.machine()}，{torch.get_num_threads()} 线程）"

    def total_memory_mib(self) -> float:
        """设备的总内存，MiB；CPU 为物理内存，无从得知时为 nan。"""
        if self.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory / MIB
        if self.type == "mps":
            return torch.mps.recommended_max_memory() / MIB
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / MIB
        except (AttributeError, ValueError, OSError):  # Windows 没有 sysconf
            return float("nan")

    def peak_memory_mib(self) -> float:
        """本进程在设备上的内存峰值，MiB：CUDA 为张量峰值，MPS 为当前值，CPU 为进程的峰值 RSS。"""
        if self.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / MIB
        if self.type == "mps":
            return torch.mps.current_allocated_memory() / MIB
        return peak_rss_mib()

    def synchronize(self) -> None:
        """等待设备上已提交的工作全部完成（CPU 上无事可做）；计时前后必须调用。"""
        if self.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.type == "mps":
            torch.mps.synchronize()

    def autocast(self, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
        """混合精度上下文；``dtype`` 为 ``None`` 或 float32 时什么也不做。"""
        if dtype is None or dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.type, dtype=dtype)

    def compile(self, model: nn.Module) -> Callable[..., Tensor]:
        """``torch.compile(model)``；先试编译一个极小的函数，没有编译器就在开始训练之前说清楚。

        返回的与 ``model`` 共用参数；存盘与评估仍用 ``model``，因此检查点里没有 ``_orig_mod`` 前缀。

        异常:
            UserError: 这台机器上编译不了。
        """
        probe = torch.compile(lambda x: x.sin() + 1)
        try:
            probe(torch.zeros(8, device=self.device))
        except RuntimeError as error:  # 编译失败的各种异常都属于 RuntimeError
            raise UserError(
                "--compile 需要编译器而这里用不了（CPU 上要 C++ 编译器如 g++，GPU 上要 triton）："
                f"请安装，或去掉 --compile（{str(error).strip().splitlines()[0][:80]}）"
            ) from error
        return torch.compile(model)

    def __str__(self) -> str:
        return str(self.device)


def available_devices() -> list[str]:
    """本机可用的设备名。"""
    names = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return names + ["mps"] if torch.backends.mps.is_available() else names


def get_device(name: str = "auto") -> TorchDevice:
    """按名字选择设备；``auto`` 依次尝试 cuda、mps、cpu。

    参数:
        name: ``auto``、``cpu``、``cuda``、``cuda:N`` 或 ``mps``。

    异常:
        UserError: 名字写错，或本机没有这个设备；消息会列出可用的设备。
    """
    present = available_devices()
    choices = "、".join(present)
    if name == "auto":
        name = "cuda" if "cuda:0" in present else present[-1]
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"设备 {name!r} 写法不对：应为 auto、cpu、cuda、cuda:N 或 mps")
    # 由 torchrun 启动时每个进程占一块，编号在 LOCAL_RANK 里
    wanted = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    if wanted not in present:
        raise UserError(f"本机没有设备 {name!r}：可用的有 {choices}，请改 --device")
    return TorchDevice(torch.device(wanted))


def peak_rss_mib() -> float:
    """本进程到目前为止的常驻内存（RSS）峰值，MiB；Windows 上无从得知，为 nan。"""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        pass
    else:
        # VmHWM 属于本进程；getrusage 的 ru_maxrss 在 fork 之后会把父进程的峰值也算进来
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        if found:
            return int(found[1]) / 1024
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if platform.system() == "Darwin" else peak / 1024
