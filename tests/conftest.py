"""全部测试共用的设置与夹具：固定种子、运行入口脚本、按真实格式生成小数据集。

测试不联网，也不依赖任何下载好的数据：需要"真实数据"的测试都在 ``tmp_path`` 里按真实格式现造。
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from utils.cli import UserError
from utils.seed import set_seed


@pytest.fixture(autouse=True)
def fixed_state() -> None:
    """每个测试都从同一个全局状态开始，因此结果与测试的先后、取舍无关。

    一个线程：测试里的矩阵都很小，多线程只添乱；各脚本自己也会改线程数。
    """
    set_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def needs_torchvision() -> None:
    """需要 torchvision 的测试引用它；torchvision 不可用时跳过，并写明原因。"""
    from utils.datasets import import_torchvision

    try:
        import_torchvision()
    except UserError as error:
        pytest.skip(str(error))


# ---------------------------------------------------------------- 子进程


def run_python(
    *args: str | Path,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """以当前解释器运行 ``python *args``；环境里没有 PYTHONPATH，与学习者的终端一样。"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": "1"} | (env or {})
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout,
    )


@pytest.fixture
def run_script(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """以子进程运行入口脚本：``run_script(script, *args, cwd=..., env=...)``。

    ``cwd`` 缺省为空的临时文件夹，即与仓库无关的当前目录。
    """

    def run(
        script: Path, *args: str | Path, cwd: Path | None = None, **options: object
    ) -> subprocess.CompletedProcess[str]:
        return run_python(script, *args, cwd=cwd or tmp_path, **options)

    return run


# ---------------------------------------------------------------- 入口脚本的烟雾运行


@pytest.fixture(scope="session", autouse=True)
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Any, Any]]:
    """本次选中的全部烟雾运行，从第一个测试起就在后台进行：``运行 -> Future``。"""
    from tests.smoke import Case, all_cases, in_background

    selected = {
        case
        for item in request.session.items
        if isinstance(
            case := getattr(getattr(item, "callspec", None), "params", {}).get("case"), Case
        )
    }
    if not selected:
        yield {}
        return
    chosen = [case for case in all_cases() if case in selected]
    with in_background(chosen, tmp_path_factory.mktemp("smoke")) as futures:
        yield futures


# ---------------------------------------------------------------- 真实格式的小数据集


def write_idx(path: Path, array: np.ndarray) -> None:
    """写一个 IDX 文件：2 字节零、类型（8 表示 uint8）、维数、各维大端 int32、数据。"""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{array.ndim}i", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def write_mnist() -> Callable[..., dict[str, tuple[np.ndarray, np.ndarray]]]:
    """在 ``root`` 下按 torchvision 的布局生成 MNIST 或 FashionMNIST。

    返回 ``{"train": (images, labels), "test": ...}``。每张图的前两个像素写着它的序号，
    因此任意两张图都不同，可以追踪每张图的去向。
    """

    def write(
        root: Path, n_train: int, n_test: int, kind: str = "MNIST"
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        rng = np.random.default_rng(0)
        made = {}
        for split, prefix, count in (("train", "train", n_train), ("test", "t10k", n_test)):
            images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
            images[:, 0, 0], images[:, 0, 1] = np.divmod(np.arange(count), 256)
            images[:, 0, 2] = split == "test"
            labels = np.arange(count, dtype=np.uint8) % 10
            raw = root / kind / "raw"
            write_idx(raw / f"{prefix}-images-idx3-ubyte", images)
            write_idx(raw / f"{prefix}-labels-idx1-ubyte", labels)
            made[split] = images, labels
        return made

    return write


@pytest.fixture
def write_class_folders() -> Callable[..., None]:
    """在 ``root`` 下每类建一个文件夹，各含若干张纯色 PNG。

    第 k 类的第 i 张图颜色为 (50k, i, 7)，因此由像素就能认出是哪一张。
    """
    from PIL import Image

    def write(root: Path, counts: dict[str, int], size: tuple[int, int] = (8, 8)) -> None:
        for k, (name, count) in enumerate(counts.items()):
            (root / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.new("RGB", size, (50 * k, i, 7)).save(root / name / f"{i:03d}.png")

    return write
