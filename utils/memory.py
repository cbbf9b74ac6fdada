"""张量内存的实测：一段代码之内，PyTorch 张量占用的字节数与峰值。

数的是算子产生的存储（storage），CPU 与 GPU 一样数；视图与原张量共用存储，只数一次。由 Python 数据
直接造的（``torch.tensor``、``from_numpy``）与稀疏张量不计。进程的 RSS 把解释器、库与分配器留着的
内存都算进去，量不出几 MiB 的差别，所以比较算法的内存要用这里的数。
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """``with`` 之内新产生的张量占多少内存；之前就有的（参数、数据）不计。

    用法::

        with TensorMemory() as memory:
            loss = model(x).sum()
            loss.backward()
        print(memory.peak_mib, memory.live_mib)

    属性（字节）:
        live: 此刻还活着的。
        peak: 到目前为止的峰值；``reset_peak`` 从此刻的 ``live`` 重新开始。
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()  # 活着的存储

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            self._note(value, size=0)  # 参数若是第一次见，就是以前已有的：认得它，但不计
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            self._note(value)
        return output

    def _note(self, value: Any, size: int | None = None) -> None:
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if size is None else size
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def reset_peak(self) -> None:
        """峰值从此刻重新算起。"""
        self.peak = self.live

    @property
    def peak_mib(self) -> float:
        """峰值，MiB。"""
        return self.peak / 2**20

    @property
    def live_mib(self) -> float:
        """此刻，MiB。"""
        return self.live / 2**20
