"""导出：把网络录成一张与 Python 代码无关的计算图，存成 ``.pt2``，换一台机器也能运行。

``state_dict`` 只有权重，要有定义网络的代码才能用。``torch.export`` 运行一次网络，记下每一步的算子与
全部权重；读回的程序只依赖 PyTorch，不依赖本仓库。``run_elsewhere`` 就是证明：另起一个解释器，在空
文件夹里、看不见本仓库的情况下运行它。

批大小在图里是一个符号，别的尺寸都固定；随数据而变的 Python 分支也固定为录的时候走过的路。
录下的还有两样看不见的东西：例子本身，与每一步在源码里的位置（含本机的路径）。所以例子全用零，
源码的位置在存盘之前抹去。

本文件不处理：移动端的运行时（ExecuTorch、ONNX Runtime）、编译成原生代码（AOTInductor）。

维度约定：``B, C, H, W``。deploy.md「导出」。
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from utils.file_io_util import REPO_ROOT, atomic_write

# 在干净的解释器里运行的全部代码；末尾的检查：没有用到、也找不到本仓库的文件
RUNNER = """
import importlib.util
import sys
import torch
torch.set_num_threads(1)
repository, *paths = sys.argv[1:]
x = torch.load("input.pt", weights_only=True)
torch.save([torch.export.load(path).module()(x) for path in paths], "output.pt")
files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
used = [f for f in files if f.startswith(repository) and "site-packages" not in f]
assert not used, used
assert importlib.util.find_spec("chapter_05_resnet_modern_cnn") is None
"""


def export_program(model: nn.Module, shape: Sequence[int], path: Path) -> ExportedProgram:
    """把 ``model`` 录成批大小可变的程序，原子地存到 ``path``，并返回它。

    参数:
        model: CPU 上 eval 模式的网络，一个输入，一个输出。
        shape: 一张图的形状 ``(C, H, W)``。
        path: 以 ``.pt2`` 结尾。

    异常:
        ValueError: 网络还在训练模式（会把 Dropout 与批的统计量录进去），或文件名不对。
    """
    if any(module.training for module in model.modules()):
        raise ValueError("导出之前应先 model.eval()：否则 Dropout 与批的统计量也会录进去")
    if path.suffix != ".pt2":
        raise ValueError(f"导出的程序应以 .pt2 结尾，实为 {path.name}")
    batch = torch.export.Dim("batch", min=1, max=2**16)
    example = torch.zeros(2, *shape)  # 至少两张：一张的例子会让 1 被当成常数
    with torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    atomic_write(path, lambda stream: stream.write(buffer.getbuffer()))
    return program


def run_elsewhere(paths: Sequence[Path], x: Tensor) -> list[Tensor]:
    """在空文件夹里另起一个解释器，逐个读入程序，运行 ``x``，返回各自的输出。

    ``-I`` 使解释器不理会 ``PYTHONPATH``，当前目录也不在模块的搜索路径里。

    异常:
        RuntimeError: 有程序没有成功；消息是错误的最后一行。
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copies = [f"{i}.pt2" for i in range(len(paths))]
        for path, copied in zip(paths, copies, strict=True):
            shutil.copyfile(path, folder / copied)
        torch.save(x.clone(), folder / "input.pt")  # 视图会连同整个存储一起存下
        done = subprocess.run(
            [sys.executable, "-I", "-c", RUNNER, str(REPO_ROOT), *copies],
            cwd=folder,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:] or ["没有说明"]
            raise RuntimeError(f"导出的程序在别处运行失败：{reason[0]}")
        return torch.load(folder / "output.pt", weights_only=True)
