"""导出：把网络录成一张与 Python 代码无关的计算图，存成 ``.pt2``，换一台机器也能运行。

``state_dict`` 只有权重，要有定义网络的代码才能用。``torch.export`` 运行一次网络，记下每一步的算子与
全部权重；读回的程序只依赖 PyTorch，不依赖本仓库。``run_elsewhere`` 就是证明：另起一个解释器，在空
文件夹里、看不见本仓库的情况下运行它。

批大小在图里是一个符号，别的尺寸都固定为例子的尺寸；随数据而变的 Python 分支也固定为例子走过的路。

本文件不处理：移动端的运行时（ExecuTorch、ONNX Runtime）、编译成原生代码（AOTInductor）。

维度约定：``B, C, H, W``。deploy.md「导出」。
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from utils.file_io_util import REPO_ROOT, atomic_write

# 在干净的解释器里运行的全部代码；最后一道检查：它确实没有用到本仓库的任何文件
RUNNER = """
import sys
import torch
torch.set_num_threads(1)
program = torch.export.load("model.pt2").module()
torch.save(program(torch.load("input.pt", weights_only=True)), "output.pt")
files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
used = [f for f in [*files, *sys.path] if f.startswith(sys.argv[1]) and "site-packages" not in f]
assert not used, used
"""


def export_program(model: nn.Module, example: Tensor, path: Path) -> ExportedProgram:
    """把 ``model`` 录成批大小可变的程序，原子地存到 ``path``，并返回它。

    参数:
        model: eval 模式的网络，一个输入，一个输出。
        example: ``(B, C, H, W)``，``B ≥ 2``：批大小为 1 的例子会让 1 被当成常数。
        path: 以 ``.pt2`` 结尾。

    异常:
        ValueError: 网络还在训练模式（会把 Dropout 与批的统计量录进去），或例子只有一张图。
    """
    if any(module.training for module in model.modules()):
        raise ValueError("导出之前应先 model.eval()：否则 Dropout 与批的统计量也会录进去")
    if len(example) < 2:
        raise ValueError(f"例子至少要两张图，实为 {len(example)} 张：1 会被当成常数")
    batch = torch.export.Dim("batch", min=1, max=2**16)
    with torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    atomic_write(path, lambda stream: stream.write(buffer.getbuffer()))
    return program


def run_elsewhere(path: Path, x: Tensor) -> Tensor:
    """在空文件夹里另起一个解释器，读 ``path`` 的程序，运行 ``x``，返回结果。

    ``-I`` 使解释器不理会 ``PYTHONPATH``，当前目录与脚本所在的目录也不在模块的搜索路径里。

    异常:
        RuntimeError: 程序没有成功；消息是错误的最后一行。
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copyfile(path, folder / "model.pt2")
        torch.save(x, folder / "input.pt")
        done = subprocess.run(
            [sys.executable, "-I", "-c", RUNNER, str(REPO_ROOT)],
            cwd=folder,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
        if done.returncode:
            raise RuntimeError(f"{path} 在别处运行失败：{done.stderr.strip().splitlines()[-1]}")
        return torch.load(folder / "output.pt", weights_only=True)
