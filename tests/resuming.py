"""中断与续训的测试共用的工具：逐位比较，以及在第几次保存时打断。"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from utils.file_io_util import CheckpointManager


def flatten(value: Any) -> Any:
    """把张量换成字节，这样 ``==`` 就是逐位相同。"""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: flatten(item) for key, item in value.items()}
    return [flatten(item) for item in value] if isinstance(value, (list, tuple)) else value


def interrupt_after(monkeypatch: pytest.MonkeyPatch, saves: int) -> Callable[[], None]:
    """使第 ``saves + 1`` 次保存检查点之前被 Ctrl-C 打断；返回恢复原状的函数。"""
    original, done = CheckpointManager.save, 0

    def save(self: CheckpointManager, step: int, state: dict[str, Any]) -> Path:
        nonlocal done
        if done == saves:
            raise KeyboardInterrupt
        done += 1
        return original(self, step, state)

    monkeypatch.setattr(CheckpointManager, "save", save)
    return lambda: monkeypatch.setattr(CheckpointManager, "save", original)
