"""随机性的总开关：固定种子、显式生成器、保存与恢复全部随机状态。"""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch


def set_seed(seed: int, deterministic: bool = False) -> None:
    """固定 python、NumPy、PyTorch（CPU 与全部加速器）的全局随机数生成器。

    参数:
        seed: 0 到 2**32-1 的整数（NumPy 的范围）。
        deterministic: 为真时还要求 PyTorch 只用确定性算法（GPU 上更慢；没有确定性实现的
            算子会报错），并关闭 cuDNN 的自动调优。

    异常:
        ValueError: 种子超出范围。
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} 超出范围：应在 0 到 2**32-1 之间")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # 同时覆盖 CUDA 与 MPS
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS 确定性的前提
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)


def make_generator(seed: int, device: str | torch.device = "cpu") -> torch.Generator:
    """返回一个独立的、以 ``seed`` 起始的生成器；划分、合成数据、打乱与采样都应显式地用它。"""
    return torch.Generator(device=device).manual_seed(seed)


def capture_rng() -> dict[str, Any]:
    """记下 python、NumPy、PyTorch CPU 与每个加速器的随机状态。

    返回的字典只含张量、数字与元组，因此可以随检查点保存，并以 ``weights_only=True`` 读回。
    """
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        # NumPy 数组不在 weights_only 的白名单里，换成张量
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """恢复 ``capture_rng`` 记下的随机状态；本机没有的加速器略过。"""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        for index, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state, index)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
