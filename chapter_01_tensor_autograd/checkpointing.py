"""激活检查点：少存中间结果，反向时重算，用时间换内存。

本文件教什么：反向要用的中间结果（激活）占训练内存的大头。把网络切成几段，前向只留各段的输入，反向
走到某一段时再把它前向一遍，段内的激活用完就丢。两种写法：``checkpoint`` 用 ``autograd.Function``
从头写；``checkpoint_by_hooks`` 用保存张量的钩子，段的写法不受限制。
不涉及：选择性重算、卸载到磁盘。对应 README 的「优化显存：激活检查点」一节。

重算必须与第一次逐位相同，否则梯度就错了；段里有 dropout 时，要把随机数生成器退回当时的状态。

参考: Chen 等, 2016, arXiv:1604.06174；Griewank, Walther, 2000, ACM TOMS 26(1)。
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from utils.seed import capture_rng, restore_rng

Segment = Callable[..., Tensor]


class _Checkpoint(torch.autograd.Function):
    """前向不建图，只存输入；反向建图重算这一段，再对这一小段反向。"""

    @staticmethod
    def forward(ctx: Any, segment: Segment, *inputs: Any) -> Tensor:
        ctx.segment, ctx.rng = segment, capture_rng()
        # 张量交给 save_for_backward（版本号由它检查），其余的参数原样留着
        ctx.places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(*(inputs[i] for i in ctx.places))
        with torch.no_grad():
            return segment(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # 只在 create_graph=True 时
            raise RuntimeError("checkpoint：不支持二阶导数，请用 checkpoint_by_hooks")
        inputs = list(ctx.others)
        for i, x in zip(ctx.places, ctx.saved_tensors, strict=True):
            inputs[i] = x.detach().requires_grad_(x.requires_grad)
        now = capture_rng()
        restore_rng(ctx.rng)  # 同样的 dropout 掩码
        try:
            with torch.enable_grad():
                output = segment_output(ctx.segment, inputs)
        finally:
            restore_rng(now)  # 外面的随机数不受重算影响
        torch.autograd.backward(output, grad)  # 参数的梯度直接累加进 .grad
        grads = [x.grad if isinstance(x, Tensor) else None for x in inputs]
        return None, *grads


def segment_output(segment: Segment, inputs: Sequence[Any]) -> Tensor:
    """运行一段，确认输出在计算图里。"""
    output = segment(*inputs)
    if not output.requires_grad:
        raise RuntimeError("checkpoint：这一段的输出与任何要求梯度的张量都无关")
    return output


def checkpoint(segment: Segment, *inputs: Any) -> Tensor:
    """``segment(*inputs)``，但不保存中间结果；反向时重算一次前向。

    参数:
        segment: 返回一个张量的函数或模块，参数从闭包或模块里来。
        inputs: 传给它的参数；至少有一个张量 ``requires_grad=True``，否则整段不进计算图
            （网络的第一段正是这样：令输入 ``requires_grad_()`` 即可）。

    异常:
        ValueError: 没有要求梯度的输入。
        RuntimeError: 反向时 ``create_graph=True``：重算的那一段不在图里，二阶导数会少一份。

    局限: 梯度经 ``.backward()`` 累加，不支持 ``torch.autograd.grad``（``checkpoint_by_hooks``
    可以）；不保存 autocast 的状态，反向也须放在同样的 autocast 里。
    """
    if not torch.is_grad_enabled():  # 评估，或者外层的检查点正在前向：没有反向，无须检查点
        return segment(*inputs)
    if not any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        raise ValueError(
            "checkpoint：至少要有一个 requires_grad=True 的输入，否则段内的参数得不到梯度；"
            "第一段请令输入 requires_grad_()"
        )
    return _Checkpoint.apply(segment, *inputs)


def checkpoint_by_hooks(segment: Segment, *inputs: Any) -> Tensor:
    """第二种写法：照常建图，但把要保存的张量换成一张"取货单"，反向取货时才重算。

    ``saved_tensors_hooks`` 的 ``pack`` 在前向保存张量时被调用，``unpack`` 在反向取用时被调用。
    图由 PyTorch 自己建，所以 ``autograd.grad``、没有要求梯度的输入都不成问题。

    异常:
        RuntimeError: 反向之前输入被原地修改过；重算与第一次不同；段内保存的张量又被原地修改。

    局限: 不保存 autocast 的状态；只反向一部分时，没取走的要等到下一次。
    """
    rng, count = capture_rng(), 0
    shelf: list[tuple[Tensor, int] | None] = []  # 重算出来、还没有取走的：(张量, 当时的版本)
    versions = _versions(inputs)

    def pack(_: Tensor) -> int:
        nonlocal count
        count += 1
        return count - 1  # 取货单：这是段内第几个保存的张量

    def unpack(number: int) -> Tensor:
        if not shelf or shelf[number] is None:
            if _versions(inputs) != versions:
                raise RuntimeError("checkpoint_by_hooks：输入在前向之后被原地修改，无法重算")
            shelf[:] = _saved_tensors(segment, inputs, rng)
            if len(shelf) != count:
                raise RuntimeError(f"checkpoint_by_hooks：存了 {count} 个，重算 {len(shelf)} 个")
        (x, version), shelf[number] = shelf[number], None  # 交出去就不再留着
        if x._version != version:
            raise RuntimeError("checkpoint_by_hooks：段内保存的张量又被原地修改，反向会出错")
        if all(item is None for item in shelf):
            shelf.clear()
        return x

    with saved_tensors_hooks(pack, unpack):
        return segment(*inputs)


def _versions(inputs: Sequence[Any]) -> list[int]:
    """各个输入张量此刻的版本号，PyTorch 用它发现原地修改。"""
    return [x._version for x in inputs if isinstance(x, Tensor)]


def _saved_tensors(
    segment: Segment, inputs: Sequence[Any], rng: dict[str, Any]
) -> list[tuple[Tensor, int]]:
    """以同样的随机状态再前向一遍，收集保存的张量与版本号；次序与第一次相同。"""
    saved: list[tuple[Tensor, int]] = []
    now = capture_rng()
    restore_rng(rng)
    try:
        keep = saved_tensors_hooks(lambda x: saved.append((x.detach(), x._version)), lambda _: None)
        with torch.enable_grad(), keep:
            segment(*inputs)
    finally:
        restore_rng(now)
    return saved


def checkpoint_sequential(
    layers: Sequence[nn.Module],
    segments: int,
    x: Tensor,
    method: Callable[..., Tensor] = checkpoint,
) -> Tensor:
    """把 ``layers`` 尽量均匀地切成 ``segments`` 段，逐段设检查点；最后一段不设（马上就要用）。

    n 层、k 段时，峰值约为 k 个段输入（各占 b）加上 n/k 层的激活（每层 a），``k = √(na/b)`` 时最省，
    为 ``2√(nab)``；代价是多做将近一次前向。

    参数:
        layers: 依次相接的各层。
        segments: 段数，1（不设检查点）到层数。
        x: 第一层的输入。
        method: ``checkpoint`` 或 ``checkpoint_by_hooks``。

    异常:
        ValueError: 段数超出范围。
    """
    if not 1 <= segments <= len(layers):
        raise ValueError(f"segments={segments} 应在 1 到层数 {len(layers)} 之间")
    bounds = [round(i * len(layers) / segments) for i in range(segments + 1)]
    for index, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        block = nn.Sequential(*layers[start:stop])
        x = block(x) if index == segments - 1 else method(block, x)
    return x
