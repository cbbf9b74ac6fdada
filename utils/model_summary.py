"""模型摘要：逐模块的输出形状、参数量、乘加次数（MACs）与激活内存。

乘加次数取自 PyTorch 的 ``FlopCounterMode``：它在算子一级计数，因此手写的 ``x @ weight.T``、
einsum 与官方的 ``nn.Linear`` 一视同仁；逐元素运算不计。
"""

from __future__ import annotations

import contextlib
import math
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.flop_counter import FlopCounterMode

MIB = 2**20


def count_parameters(model: nn.Module, trainable_only: bool = False) -> int:
    """参数总数；共享的参数只计一次。"""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


# ---------------------------------------------------------------- 运行一次前向而不留痕迹


@contextlib.contextmanager
def _inspection(model: nn.Module, inputs: tuple[Any, ...]) -> Iterator[tuple[list, tuple]]:
    """评估模式、无梯度、不动随机数；退出时（包括出错时）恢复每个模块的模式并摘掉钩子。

    产出 (待摘的钩子列表, 移到模型所在设备的输入)。
    """
    modes = {module: module.training for module in model.modules()}
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    moved = tuple(x.to(device) if isinstance(x, Tensor) else x for x in inputs)
    cuda = [device] if device.type == "cuda" else []
    handles: list[Any] = []
    model.eval()  # BatchNorm 的滑动统计量与 Dropout 都不应被"看一眼"改变
    try:
        with torch.random.fork_rng(devices=cuda), torch.no_grad():
            yield handles, moved
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """由形状算注意力的浮点运算次数：``(B, H, T, D) @ (B, H, D, S) @ (B, H, S, D')``。"""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


@contextlib.contextmanager
def _countable() -> Iterator[FlopCounterMode]:
    """算子一级的计数器。

    有些核一次做完整层的矩阵乘，计数器看不进去：cuDNN 与 oneDNN 的 LSTM、官方多头注意力的
    快速路径暂时关掉；CPU 的 flash 注意力不能关（朴素实现要存 T×T 的矩阵），改为告诉它公式。
    """
    backends = torch.backends
    saved = backends.cudnn.enabled, backends.mkldnn.enabled, backends.mha.get_fastpath_enabled()
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    try:
        backends.cudnn.enabled = backends.mkldnn.enabled = False
        backends.mha.set_fastpath_enabled(False)
        with FlopCounterMode(display=False, custom_mapping={flash: _attention_flops}) as counter:
            yield counter
    finally:
        backends.cudnn.enabled, backends.mkldnn.enabled = saved[:2]
        backends.mha.set_fastpath_enabled(saved[2])


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _shape_text(value: Any) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in _tensors(value)) or "—"


# ---------------------------------------------------------------- 摘要表


@dataclass
class LayerRow:
    """摘要表的一行。``params`` 只含模块自己直接持有、且前面的行没有计过的参数。"""

    path: str
    type: str
    depth: int
    shape: str = "未调用"
    params: int = 0
    macs: int = 0
    activation_bytes: int = 0
    calls: int = 0


@dataclass
class ModelSummary:
    """``model_summary`` 的结果；``print`` 它就得到表格。"""

    rows: list[LayerRow]
    total_params: int
    trainable_params: int
    total_macs: int
    input_shapes: list[str] = field(default_factory=list)

    @property
    def activation_mib(self) -> float:
        """全部叶模块的输出所占的内存，MiB（训练时为反向传播保存的大致数量）。"""
        return sum(row.activation_bytes for row in self.rows) / MIB

    def collapsed(self, depth: int) -> ModelSummary:
        """只留 ``depth`` 层以内的行，更深的并入所属的那一行；合计不变。上百层的网络用得着。"""
        rows: list[LayerRow] = []
        for row in self.rows:
            if row.depth <= depth:
                rows.append(replace(row))
            else:  # 各行按定义的顺序，所以最后留下的一行就是它的祖先
                rows[-1].params += row.params
                rows[-1].activation_bytes += row.activation_bytes
        return replace(self, rows=rows)

    def __str__(self) -> str:
        header = ["模块", "类型", "输出形状", "参数", "乘加", "激活 MiB"]
        body = [
            [
                "  " * row.depth + (row.path.rpartition(".")[2] or "（整个模型）"),
                row.type + (f" ×{row.calls}" if row.calls > 1 else ""),
                row.shape,
                f"{row.params:,}" if row.params else "—",
                f"{row.macs:,}" if row.macs else "—",
                f"{row.activation_bytes / MIB:.3g}" if row.activation_bytes else "—",
            ]
            for row in self.rows
        ]
        table = format_table(header, body, right=(3, 4, 5))
        rule = "─" * max(map(display_width, table.splitlines()))
        frozen = self.total_params - self.trainable_params
        total = (
            f"合计：参数 {self.total_params:,}"
            + (f"（冻结 {frozen:,}）" if frozen else "")
            + f"，乘加 {self.total_macs:,}，激活 {self.activation_mib:.3g} MiB"
            + f"，输入 {'、'.join(self.input_shapes)}"
        )
        return f"{rule}\n{table}\n{rule}\n{total}\n{rule}"


def display_width(text: str) -> int:
    """终端里的显示宽度：汉字与全角标点占两格。"""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def format_table(header: list[str], body: list[list[str]], right: tuple[int, ...] = ()) -> str:
    """把字符串表格对齐成多行文本；``right`` 里的列右对齐。"""
    rows = [header, *body]
    widths = [max(display_width(row[i]) for row in rows) for i in range(len(header))]

    def cell(text: str, column: int) -> str:
        pad = " " * (widths[column] - display_width(text))
        return pad + text if column in right else text + pad

    return "\n".join("  ".join(cell(t, i) for i, t in enumerate(row)).rstrip() for row in rows)


def model_summary(model: nn.Module, *inputs: Any) -> ModelSummary:
    """以 ``inputs`` 做一次前向传播，返回逐模块的摘要表。

    模型的训练/评估模式、滑动统计量、随机数状态在调用前后不变，前向出错时也一样。

    参数:
        model: 任意模块。
        inputs: 传给 ``model`` 的位置参数；张量会被移到模型所在的设备。

    返回:
        ``ModelSummary``；``macs`` 一列含子模块，``params`` 一列不含。
    """
    rows = _rows_of(model)
    with _inspection(model, inputs) as (handles, moved):
        started: dict[nn.Module, list[int]] = {module: [] for module in rows}

        def enter(module: nn.Module, args: Any) -> None:
            started[module].append(counter.get_total_flops())

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            row = rows[module]
            flops = counter.get_total_flops() - started[module].pop()
            row.macs += flops // 2  # 一次乘加记两次浮点运算
            row.calls += 1
            row.shape = _shape_text(output)
            leaf = next(module.children(), None) is None
            if leaf and not isinstance(module, nn.Identity):  # 恒等的输出就是输入，不另占内存
                row.activation_bytes += sum(t.numel() * t.element_size() for t in _tensors(output))

        for module in rows:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
        with _countable() as counter:
            model(*moved)
    return ModelSummary(
        rows=list(rows.values()),
        total_params=count_parameters(model),
        trainable_params=count_parameters(model, trainable_only=True),
        total_macs=rows[model].macs,
        input_shapes=[_shape_text(x) for x in inputs],
    )


def _rows_of(model: nn.Module) -> dict[nn.Module, LayerRow]:
    """每个模块一行，按定义的顺序；共享的模块与共享的参数只出现（计）一次。"""
    rows, seen = {}, set()
    for path, module in model.named_modules():
        depth = path.count(".") + 1 if path else 0
        row = rows[module] = LayerRow(path=path, type=type(module).__name__, depth=depth)
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            row.shape = "—"  # 容器本身从不被调用
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                row.params += parameter.numel()
    return rows


# ---------------------------------------------------------------- 形状追踪


@dataclass(frozen=True)
class ShapeStep:
    """前向传播中的一步：在哪个模块里、哪个算子、产生了什么形状。"""

    module: str
    op: str
    shape: str

    def __str__(self) -> str:
        return f"{self.module or '（模型）'}: {self.op} -> {self.shape}"


class _ShapeRecorder(TorchFunctionMode):
    """记录每个返回张量的 torch 函数，包括 ``@``、``view`` 这类方法与手写公式里的每一步。"""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[ShapeStep] = []
        self.where: list[str] = [""]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = (resolve_name(func) or getattr(func, "__name__", str(func))).removeprefix("torch.")
        # 读属性（.grad、.data 之类）不是计算，转置 .T / .mT 除外
        if _tensors(output) and (not name.endswith("__get__") or "T.__get__" in name):
            name = name.removesuffix(".__get__").replace("Tensor.", "").replace("__", "")
            self.steps.append(ShapeStep(self.where[-1], name, _shape_text(output)))
        return output


def trace_shapes(model: nn.Module, *inputs: Any) -> list[ShapeStep]:
    """以 ``inputs`` 做一次前向传播，返回每个中间结果的形状，用于讲解与排错。

    不止模块的输出：函数式的 ``F.relu``、``q @ k.transpose(-2, -1)`` 等每一步都在内。
    模型状态的保护与 ``model_summary`` 相同。
    """
    with _inspection(model, inputs) as (handles, moved):
        recorder = _ShapeRecorder()
        for path, module in model.named_modules():

            def enter(module: nn.Module, args: Any, path: str = path) -> None:
                recorder.where.append(path)

            def leave(module: nn.Module, args: Any, output: Any) -> None:
                recorder.where.pop()

            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
        with recorder:
            model(*moved)
    return recorder.steps
