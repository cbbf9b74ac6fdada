"""画出计算图：本章引擎的与 PyTorch 的，画成图或写成 mermaid 文字，不需要 graphviz。

本文件教什么：两个引擎的图是同一种东西，顶点是一次运算或一个叶子，边由输入指向输出。画图就是两步：
分层（每个顶点排在它所有输入的右边），以及层内排序（让边少交叉）。
不涉及：很大的图（超过 ``MAX_NODES`` 个顶点会报错）。对应 README 的「看见计算图」一节。

参考: Sugiyama, Tagawa, Toda, 1981, IEEE Transactions on SMC 11(2)（分层画法）。
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

from chapter_01_tensor_autograd.engine import Tensor
from chapter_01_tensor_autograd.graph import Variable, topological_order
from utils.plot import MUTED, PALETTE, new_figure

MAX_NODES = 120


@dataclass
class Graph:
    """一张计算图；顶点按拓扑序，输入总在前面。"""

    labels: list[str] = field(default_factory=list)
    is_leaf: list[bool] = field(default_factory=list)
    edges: list[tuple[int, int, str]] = field(default_factory=list)  # (从, 到, 边上的形状)


def trace(output: Any, names: Mapping[str, Any] | None = None) -> Graph:
    """由一个结果倒着找出它的计算图。

    参数:
        output: 本章的 ``Tensor`` 或 ``torch.Tensor``；反向之后也可以，图的骨架还在。
        names: 叶子的名字 -> 张量，用作标签。

    异常:
        TypeError: 不是张量。
        ValueError: 不在计算图里，或顶点太多。
    """
    if not isinstance(output, Variable | torch.Tensor):
        raise TypeError(f"trace：应为本章的 Tensor 或 torch.Tensor，实为 {type(output).__name__}")
    if output.grad_fn is None:
        raise ValueError(f"trace：形状 {tuple(output.shape)} 的张量没有 grad_fn，不在计算图里")
    by_id = {id(x): name for name, x in (names or {}).items()}
    graph = (
        _trace_engine(output, by_id)
        if isinstance(output, Variable)
        else _trace_torch(output, by_id)
    )
    graph.labels.append(f"output {_shape(output.shape)}".rstrip())
    graph.is_leaf.append(False)
    graph.edges.append((len(graph.labels) - 2, len(graph.labels) - 1, ""))
    if len(graph.labels) > MAX_NODES:
        raise ValueError(f"图有 {len(graph.labels)} 个顶点，至多画 {MAX_NODES} 个：请缩小网络")
    return graph


def _shape(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))


def _leaf_label(x: Any, by_id: Mapping[int, str]) -> str:
    return f"{by_id.get(id(x), 'leaf')} {_shape(x.shape)}".rstrip()


def _trace_engine(output: Tensor, by_id: Mapping[int, str]) -> Graph:
    graph, number = Graph(), {}
    for vertex in topological_order(output.grad_fn):
        number[vertex] = len(graph.labels)
        leaf = isinstance(vertex, Variable)
        graph.labels.append(_leaf_label(vertex, by_id) if leaf else vertex.name)
        graph.is_leaf.append(leaf)
        for parent, shape in zip(vertex.inputs, getattr(vertex, "shapes", ()), strict=True):
            graph.edges.append((number[parent], number[vertex], _shape(shape)))
    return graph


def _trace_torch(output: torch.Tensor, by_id: Mapping[int, str]) -> Graph:
    """``grad_fn.next_functions`` 就是边；叶子是 ``AccumulateGrad``。边上的形状 PyTorch 不公开。"""
    graph, number = Graph(), {}
    stack = [(output.grad_fn, False)]
    while stack:
        node, ready = stack.pop()
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if node in number:
            continue
        if not ready:
            stack.append((node, True))
            stack.extend((parent, False) for parent in reversed(parents))
            continue
        number[node] = len(graph.labels)
        leaf = hasattr(node, "variable")
        short = re.sub(r"Backward\d*$", "", node.name().split("::")[-1])
        graph.labels.append(_leaf_label(node.variable, by_id) if leaf else short)
        graph.is_leaf.append(leaf)
        graph.edges.extend((number[parent], number[node], "") for parent in parents)
    return graph


# ---------------------------------------------------------------- 布局

Point = tuple[float, float]  # (列, 行)


def levels(graph: Graph) -> list[int]:
    """分层：运算在它最靠右的输入之后一层；叶子紧挨着最早用到它的运算。"""
    level = [0] * len(graph.labels)
    for source, target, _ in sorted(graph.edges, key=lambda edge: edge[1]):
        level[target] = max(level[target], level[source] + 1)
    for index, leaf in enumerate(graph.is_leaf):
        if leaf:
            users = [target for source, target, _ in graph.edges if source == index]
            level[index] = min(level[user] for user in users) - 1
    return level


def layout(graph: Graph) -> tuple[list[Point], list[list[Point]]]:
    """返回 (每个顶点的坐标, 每条边依次经过的点)。

    跨过好几层的边，在途中每一层放一个看不见的顶点占位，边就不会穿过别的顶点；然后各层按相邻层邻居的
    平均位置排序，来回扫几遍，交叉就少了。
    """
    level = levels(graph)
    chains: list[list[int]] = []  # 每条边经过的顶点，含占位的
    for source, target, _ in graph.edges:
        hidden = range(level[source] + 1, level[target])
        chains.append([source, *range(len(level), len(level) + len(hidden)), target])
        level.extend(hidden)
    neighbours: list[list[int]] = [[] for _ in level]
    for chain in chains:
        for left, right in zip(chain[:-1], chain[1:], strict=True):
            neighbours[left].append(right)
            neighbours[right].append(left)
    layers: list[list[int]] = [[] for _ in range(max(level) + 1)]
    for index, depth in enumerate(level):
        layers[depth].append(index)

    row = [0.0] * len(level)
    for sweep in range(9):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            if sweep:  # 第一遍只按原来的次序居中
                center = {i: sum(row[n] for n in neighbours[i]) / len(neighbours[i]) for i in layer}
                layer.sort(key=lambda i, center=center: (center[i], i))
            for rank, index in enumerate(layer):
                row[index] = rank - (len(layer) - 1) / 2
    points = [(float(level[i]), row[i]) for i in range(len(level))]
    return points[: len(graph.labels)], [[points[i] for i in chain] for chain in chains]


# ---------------------------------------------------------------- 输出

HALF = 0.38  # 方框宽度的一半，以列为单位


def draw_graphs(graphs: Mapping[str, Graph]) -> Figure:
    """画成图，标题 -> 图，上下排列：橙色是叶子，蓝色是运算，灰色是输出。

    数据由左往右流，梯度原路返回。
    """
    plans = {title: layout(graph) for title, graph in graphs.items()}
    columns = max(x for points, _ in plans.values() for x, _ in points) + 1
    spans = [[y for route in routes for _, y in route] for _, routes in plans.values()]
    heights = [max(span) - min(span) + 1.6 for span in spans]
    figure, grid = new_figure(
        len(graphs), 1, size=(1.35 * columns + 0.4, 0.72 * sum(heights)), height_ratios=heights
    )
    for axes, (title, graph), span in zip(grid[:, 0], graphs.items(), spans, strict=True):
        _draw_graph(axes, graph, *plans[title])
        axes.set(xlim=(-0.5, columns - 0.5), ylim=(min(span) - 0.5, max(span) + 0.5), title=title)
        axes.axis("off")
    return figure


def _draw_graph(axes: Axes, graph: Graph, points: list[Point], routes: list[list[Point]]) -> None:
    for route, (source, _, shape) in zip(routes, graph.edges, strict=True):
        _draw_edge(axes, route, "" if graph.is_leaf[source] else shape)
    colors = [PALETTE[4 if leaf else 5] for leaf in graph.is_leaf]
    colors[-1] = "0.88"  # 输出本身，不是运算
    for (x, y), label, color in zip(points, graph.labels, colors, strict=True):
        box = FancyBboxPatch(
            (x - HALF, y - 0.26),
            2 * HALF,
            0.52,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=color,
            edgecolor="none",
        )
        axes.add_patch(box)
        axes.text(x, y, label.replace(" ", "\n", 1), ha="center", va="center", fontsize=7.5)


def _draw_edge(axes: Axes, route: list[Point], label: str) -> None:
    """一条边：在每一层之间是一段弯曲的过渡，末端有箭头；形状写在起点旁。"""
    corners = [route[0], *(p for p in route[1:-1] for _ in (0, 1)), route[-1]]
    vertices, codes = [], []
    for left, right in zip(corners[::2], corners[1::2], strict=True):
        (x0, y0), (x1, y1) = (left[0] + HALF, left[1]), (right[0] - HALF, right[1])
        bend = (x1 - x0) / 2
        vertices += [(x0, y0), (x0 + bend, y0), (x1 - bend, y1), (x1, y1)]
        codes += [Path.LINETO if codes else Path.MOVETO, *[Path.CURVE4] * 3]
    arrow = FancyArrowPatch(
        path=Path(vertices, codes), arrowstyle="-|>", mutation_scale=9, color=MUTED, linewidth=1
    )
    axes.add_patch(arrow)
    (x, y), rising = route[0], route[1][1] > route[0][1]
    axes.text(x + HALF + 0.03, y + (-0.08 if rising else 0.08), label, fontsize=6, color=MUTED,
              va="top" if rising else "bottom")  # fmt: skip


def mermaid(graph: Graph) -> str:
    """写成 mermaid 文字，可以直接贴进 Markdown 的 ```` ```mermaid ```` 围栏。"""
    lines = ["flowchart LR"]
    for index, (label, leaf) in enumerate(zip(graph.labels, graph.is_leaf, strict=True)):
        shape = '(["{}"])' if leaf else '["{}"]'
        quoted = label.replace('"', "'")  # 双引号会使 mermaid 的文字提前结束
        lines.append(f"    n{index}{shape.format(quoted)}")
    for source, target, shape in graph.edges:
        arrow = f'-- "{shape}" -->' if shape else "-->"
        lines.append(f"    n{source} {arrow} n{target}")
    return "\n".join(lines)
