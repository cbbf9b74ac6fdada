"""计算图与反向传播：引擎本身，与有哪些算子无关。

本文件教什么：反向模式自动微分只需要三样东西。``Variable`` 是会记账的数组；``Node`` 是一次运算的
账目，写着输入是谁、梯度怎样传回去（VJP）；``backpropagate`` 按拓扑序倒着走一遍，把账算清。
具体的算子及其 VJP 在 ops_elementwise.py 与 ops_structure.py，日常使用的 ``Tensor`` 在 engine.py。
对应 README 的「反向模式：两屏写完的引擎」一节。

图的形状：顶点是 ``Node`` 或叶子 ``Variable``，边由一次运算指向它的各个输入，从不指回来。没有环，
所以最后一个引用消失时，整张图立刻由引用计数释放，用不着垃圾回收器。VJP 用 ``Variable`` 自己的运算
写成，反向传播因此也能被记账，高阶导数就是这样来的。
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

Vjp = Callable[..., "Variable"]  # 上游梯度（以及需要时的输出） -> 对一个输入的梯度


class _Mode(threading.local):
    recording = True  # 每个线程各有一份


_mode = _Mode()


@contextmanager
def grad_mode(recording: bool) -> Iterator[None]:
    """在 ``with`` 之内记账（``True``）或不记账（``False``）。"""
    previous, _mode.recording = _mode.recording, recording
    try:
        yield
    finally:
        _mode.recording = previous


def no_grad() -> Any:
    """不建图：``with no_grad():`` 或 ``@no_grad()``。评估与更新参数时用。"""
    return grad_mode(False)


def is_grad_enabled() -> bool:
    """此刻是否在记账。"""
    return _mode.recording


class Storage:
    """一块内存的身份：视图与 ``detach`` 共用它。每次原地修改，版本号加一。"""

    version = 0
    tracked = 0  # 最近一次写入要求梯度的量之后的版本
    is_leaf = False  # 是否属于一个要求梯度的叶子


class Variable:
    """会记账的数组：数据 ``data``、梯度 ``grad``、来历 ``grad_fn``（叶子没有，为 ``None``）。"""

    __slots__ = (
        "__weakref__", "data", "grad", "grad_fn", "hooks", "recorded_at", "requires_grad",
        "storage",
    )  # fmt: skip
    inputs: tuple = ()  # 叶子是图的边界

    def __init__(self, data: Any, storage: Storage | None = None) -> None:
        self.data = data if type(data) is np.ndarray else np.asarray(data)
        self.requires_grad = False
        self.grad = self.grad_fn = self.hooks = None
        self.storage = storage or Storage()
        self.recorded_at = self.storage.version  # 来历与内容在这个版本上对得上

    @classmethod
    def wrap(cls, data: Any, storage: Storage | None = None) -> Any:
        """把数组包成不要求梯度的张量，不复制；``storage`` 给出时与别的张量共用一块内存。"""
        x = cls.__new__(cls)
        Variable.__init__(x, data, storage)
        return x


class Node:
    """一次运算的账目：``inputs`` 各输入所在的顶点，``shapes`` 它们的形状，``vjps`` 各一个 VJP。"""

    __slots__ = ("hooks", "inputs", "name", "output", "saved", "shapes", "vjps")

    def __init__(
        self, name: str, edges: Sequence[tuple[Variable, Vjp]], output: Variable | None
    ) -> None:
        self.name, self.output, self.hooks = name, output, None
        saved = [] if output is None else [output]
        for _, vjp in edges:
            # VJP 的闭包捉住的张量，就是为反向保存的张量
            for cell in vjp.__closure__ or ():
                if isinstance(cell.cell_contents, Variable):
                    saved.append(cell.cell_contents)
        self.saved = [(x.storage, x.storage.version, x.data.shape) for x in saved]
        self.inputs = tuple([x.grad_fn or x for x, _ in edges])
        self.shapes = tuple([x.data.shape for x, _ in edges])
        self.vjps = tuple([vjp for _, vjp in edges])

    def check(self) -> None:
        """反向经过之前：账目还在，保存的张量也没有被改过。"""
        if not self.vjps:
            raise RuntimeError(
                f"{self.name} 的计算图已经释放：第二次反向之前，第一次要写 retain_graph=True，"
                "或者重新做一遍前向"
            )
        for storage, version, shape in self.saved:
            if storage.version != version:
                raise RuntimeError(
                    f"{self.name} 的反向要用到形状 {shape} 的张量，它在前向之后又被原地修改："
                    f"保存时版本 {version}，现在版本 {storage.version}；请改用非原地的写法"
                )

    def free(self) -> None:
        """用过即弃：放掉 VJP 与它们捉住的张量；图的骨架不占多少内存，留着。"""
        self.vjps, self.saved, self.output = (), (), None


Vertex = Node | Variable


def record(
    name: str,
    data: Any,
    *edges: tuple[Variable, Vjp],
    save_output: bool = False,
    dtype: Any = None,
) -> Any:
    """算子的出口：把结果 ``data`` 包成张量，需要梯度时记下账目。

    参数:
        name: 算子的名字。
        data: 已经算好的结果。
        edges: 每个输入一对 ``(输入, VJP)``。前向若把输入广播过，VJP 不必管，求和由引擎来做。
        save_output: 导数用输出来表示更省事的算子（exp、tanh……）：VJP 改为接受 (梯度, 输出)。
        dtype: 结果的 dtype，缺省与第一个输入相同（浮点的话）。
    """
    first = edges[0][0]
    if dtype is None and first.data.dtype.kind == "f":
        dtype = first.data.dtype  # NumPy 1 会把 0 维的 float32 与 Python 数的结果升成 float64
    out = first.wrap(data if dtype is None else np.asarray(data, dtype))
    if _mode.recording:
        _check_history(name, edges)
        tracked = [edge for edge in edges if edge[0].requires_grad]
        if tracked:
            out.requires_grad = True
            # 保存的输出不带来历：不然就有了 张量 -> 账目 -> 张量 的环
            output = out.wrap(out.data, out.storage) if save_output else None
            out.grad_fn = Node(name, tracked, output)
    return out


def _check_history(name: str, edges: Sequence[tuple[Variable, Vjp]]) -> None:
    """输入的内容若已经由别的视图改写，它的来历（或没有来历）就不对了；悄悄用下去，梯度是错的。"""
    for x, _ in edges:
        if x.recorded_at != x.storage.version and (
            x.grad_fn is not None or x.storage.tracked > x.recorded_at
        ):
            origin = f"由 {x.grad_fn.name} 得到" if x.grad_fn else "没有来历"
            raise RuntimeError(
                f"{name}：形状 {x.data.shape} 的输入（{origin}）的内容已被另一个共用内存的张量"
                "原地修改，来历不再成立：请写成 x[下标] = 值，或先 clone() 再原地修改"
            )


def topological_order(root: Vertex) -> list[Vertex]:
    """从 ``root`` 能走到的全部顶点，输入总在前面；用自己的栈而不用递归，多深的图都行。"""
    order, visited, stack = [], {root}, [(root, iter(root.inputs))]
    while stack:
        vertex, remaining = stack[-1]
        for parent in remaining:
            if parent not in visited:
                visited.add(parent)
                stack.append((parent, iter(parent.inputs)))
                break
        else:  # 全部输入都已排好
            order.append(vertex)
            stack.pop()
    return order


def backpropagate(
    root: Variable,
    seed: Variable,
    targets: set[Vertex] | None,
    retain_graph: bool,
    create_graph: bool,
) -> dict[Vertex, Variable]:
    """反向传播：``seed`` 是对 ``root`` 的梯度。

    ``targets`` 为 ``None`` 时累加到每个叶子的 ``grad``；否则只走通向 ``targets`` 的边，并返回对
    它们的梯度，不碰任何 ``grad``。每个顶点等全部下游都到齐才处理一次；处理完就释放，内存随之下降。
    """
    start = root.grad_fn or root
    order = topological_order(start)
    needed = None if targets is None else _leading_to(targets, order)
    pending = {start: seed}  # 顶点 -> 已到的梯度之和
    found: dict[Vertex, Variable] = {}
    with grad_mode(create_graph):
        while order:
            vertex = order.pop()
            g = pending.pop(vertex, None)
            if g is None:
                continue
            for hook in vertex.hooks or ():
                changed = hook(g)
                g = g if changed is None else changed
            if targets is not None and vertex in targets:
                found[vertex] = g.clone() if g is seed else g
            if isinstance(vertex, Variable):
                if targets is None:
                    vertex.grad = g if vertex.grad is None else vertex.grad + g
                continue
            if needed is not None and needed.isdisjoint(vertex.inputs):
                continue  # 目标到了，不必再往前
            vertex.check()
            arguments = (g,) if vertex.output is None else (g, _with_history(vertex))
            for parent, shape, vjp in zip(vertex.inputs, vertex.shapes, vertex.vjps, strict=True):
                if needed is not None and parent not in needed:
                    continue
                part = vjp(*arguments)
                if part.data.shape != shape:  # 前向广播了它：复制的逆是求和
                    part = part.sum_to(shape)
                if parent in pending:
                    pending[parent] = pending[parent] + part  # 一个量用了几次，梯度就加几次
                elif isinstance(parent, Variable) and (part is g or part.data.base is not None):
                    pending[parent] = part.clone()  # 交到用户手里的 grad 不与别人共用内存
                else:
                    pending[parent] = part
            if not retain_graph:
                vertex.free()
    return found


def _leading_to(targets: set[Vertex], order: list[Vertex]) -> set[Vertex]:
    """``order`` 里能走到 ``targets`` 的顶点（含它们自己）。"""
    leading: set[Vertex] = set()
    for vertex in order:  # 输入在前，所以一趟就够
        if vertex in targets or not leading.isdisjoint(vertex.inputs):
            leading.add(vertex)
    return leading


def _with_history(node: Node) -> Variable:
    """保存的输出，接回它的来历。"""
    y = node.output.wrap(node.output.data, node.output.storage)
    y.requires_grad, y.grad_fn = True, node
    return y


def seed_for(output: Variable, grad: Any, caller: str) -> Variable:
    """核对并准备反向的起点：标量缺省为 1，其余必须给出同形状的梯度。"""
    if not isinstance(output, Variable):
        raise TypeError(f"{caller}：output 应为一个张量，实为 {type(output).__name__}")
    if not output.requires_grad:
        raise RuntimeError(
            f"{caller}：形状 {output.data.shape} 的张量不在计算图里：它的输入都没有 "
            "requires_grad=True，或者它是在 no_grad() 之内、detach() 之后算出来的"
        )
    if grad is None:
        if output.data.size != 1:
            raise ValueError(
                f"{caller}：输出的形状是 {output.data.shape}，不是标量：请先 sum() 或 mean()，"
                "或给出同形状的上游梯度 grad"
            )
        return output.wrap(np.ones_like(output.data))
    grad = grad if isinstance(grad, Variable) else output.wrap(np.array(grad, output.data.dtype))
    if grad.data.shape != output.data.shape or grad.data.dtype != output.data.dtype:
        raise ValueError(
            f"{caller}：上游梯度是 {grad.data.dtype} {grad.data.shape}，"
            f"应与输出 {output.data.dtype} {output.data.shape} 相同"
        )
    return grad


def grad(
    output: Any,
    inputs: Any,
    grad_output: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    allow_unused: bool = False,
) -> tuple[Any, ...]:
    """求 ``output`` 对各 ``inputs`` 的梯度并返回，不碰任何 ``.grad``；同 ``torch.autograd.grad``。

    参数:
        output: 一个张量；不是标量时须给出 ``grad_output``。
        inputs: 一个张量或若干张量，叶子与中间结果都可以。
        grad_output: 上游梯度，与 ``output`` 同形。
        retain_graph: 是否保留计算图；缺省同 ``create_graph``。
        create_graph: 反向本身也建图，于是梯度可以再求梯度。
        allow_unused: ``output`` 与某个输入无关时返回 ``None``，而不是报错。
    """
    inputs = (inputs,) if isinstance(inputs, Variable) else tuple(inputs)
    seed = seed_for(output, grad_output, "grad")
    for x in inputs:
        if not x.requires_grad:
            raise ValueError(f"grad：形状 {x.data.shape} 的输入没有 requires_grad=True")
    vertices = [x.grad_fn or x for x in inputs]
    retain = create_graph if retain_graph is None else retain_graph
    found = backpropagate(output, seed, set(vertices), retain, create_graph)
    for x, vertex in zip(inputs, vertices, strict=True):
        if vertex not in found and not allow_unused:
            raise ValueError(
                f"grad：输出与形状 {x.data.shape} 的输入无关；确实如此就加 allow_unused=True"
            )
    return tuple(found.get(vertex) for vertex in vertices)
