"""第 1 章的计算图：两个引擎的图逐点逐边数得清，分层与布局的性质，mermaid 文字与画出的图。"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from chapter_01_tensor_autograd.engine import Tensor, no_grad
from chapter_01_tensor_autograd.graph_viz import (
    HALF,
    MAX_NODES,
    Graph,
    draw_graphs,
    layout,
    levels,
    mermaid,
    trace,
)
from utils.plot import MAX_BYTES, PALETTE, save_figure


def engine_leaf(*shape: int) -> Tensor:
    return Tensor(np.ones(shape), requires_grad=True)


def torch_leaf(*shape: int) -> torch.Tensor:
    return torch.ones(shape, requires_grad=True)


LEAVES: list[Callable[..., Any]] = [engine_leaf, torch_leaf]


def random_graph(seed: int, leaf: Callable[..., Any], operations: int = 12) -> Graph:
    """随机的表达式：任取已有的张量，于是有重用，也有跨过好几层的边。"""
    rng = np.random.default_rng(seed)
    pool = [leaf(2) for _ in range(3)]
    for _ in range(operations):
        i, j = rng.integers(0, len(pool), 2)
        pool.append([pool[i] * pool[j], pool[i] + pool[j], pool[i].tanh()][rng.integers(3)])
    return trace((pool[-1] * pool[-2] + pool[0]).sum())


GRAPHS = [random_graph(seed, leaf) for seed in range(10) for leaf in LEAVES]


# ---------------------------------------------------------------- 找出图


def test_trace_engine_by_hand() -> None:
    """x 用了三次：两条边进 mul，一条边进 add；常数不在图里。"""
    x, w = engine_leaf(2, 3), engine_leaf(3)
    y = (x * x + x * 2.0 * w).sum()
    graph = trace(y, {"x": x, "w": w})
    assert graph.labels == ["x 2×3", "mul", "mul", "w 3", "mul", "add", "sum", "output"]
    assert graph.is_leaf == [label[0] in "xw" for label in graph.labels]
    assert sorted(graph.edges) == [
        (0, 1, "2×3"), (0, 1, "2×3"), (0, 2, "2×3"), (1, 5, "2×3"), (2, 4, "2×3"),
        (3, 4, "3"), (4, 5, "2×3"), (5, 6, "2×3"), (6, 7, ""),
    ]  # fmt: skip


def test_trace_torch_by_hand() -> None:
    x, w = torch_leaf(2, 3), torch_leaf(3)
    y = (x * x + x * 2.0 * w).sum(0)
    graph = trace(y, {"x": x, "w": w})
    assert graph.labels == ["x 2×3", "Mul", "Mul", "w 3", "Mul", "Add", "Sum", "output 3"]
    assert graph.is_leaf == [label[0] in "xw" for label in graph.labels]
    assert sorted((source, target) for source, target, _ in graph.edges) == [
        (0, 1), (0, 1), (0, 2), (1, 5), (2, 4), (3, 4), (4, 5), (5, 6), (6, 7),
    ]  # fmt: skip
    assert all(shape == "" for _, _, shape in graph.edges)  # PyTorch 不公开


@pytest.mark.parametrize("leaf", LEAVES)
def test_labels(leaf: Callable[..., Any]) -> None:
    a, b = leaf(), leaf(4)
    graph = trace(a * b, {"a": a})
    assert [graph.labels[i] for i in (0, 1, 3)] == ["a", "leaf 4", "output 4"]  # 标量没有形状可写


def test_custom_torch_function_keeps_its_name() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return g * 2

    assert trace(Twice.apply(torch_leaf(2))).labels == ["leaf 2", "Twice", "output 2"]


@pytest.mark.parametrize("leaf", LEAVES)
def test_backward_leaves_the_skeleton(leaf: Callable[..., Any]) -> None:
    """反向释放的是保存的张量；图的骨架还在，画出来的不变。"""
    x = leaf(3)
    y = (x * x).sum()
    before = trace(y)
    y.backward()
    assert trace(y) == before and len(before.edges) == 4


@pytest.mark.parametrize("index", range(len(GRAPHS)))
def test_inputs_come_first(index: int) -> None:
    graph = GRAPHS[index]
    count = len(graph.labels)
    assert len(graph.is_leaf) == count and graph.labels[-1].startswith("output")
    assert all(0 <= source < target < count for source, target, _ in graph.edges)
    targets, sources = ({edge[k] for edge in graph.edges} for k in (1, 0))
    assert targets == {i for i in range(count) if not graph.is_leaf[i]}  # 叶子没有输入
    assert sources == set(range(count - 1))  # 每个顶点都通向输出


@pytest.mark.parametrize("seed", range(10))
def test_both_engines_draw_the_same_graph(seed: int) -> None:
    ours, theirs = (random_graph(seed, leaf) for leaf in LEAVES)
    assert len(ours.labels) == len(theirs.labels)
    kinds = [sorted(label.lower() for label in graph.labels) for graph in (ours, theirs)]
    assert kinds[0] == kinds[1] and len(ours.edges) == len(theirs.edges)


def test_errors() -> None:
    for bad, kind in ((np.ones(3), "ndarray"), (2.0, "float"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"实为 {kind}"):
            trace(bad)
    with no_grad():
        untracked = engine_leaf(2, 3) * 2
    for x in (engine_leaf(2, 3), torch_leaf(2, 3), untracked, torch.ones(2, 3)):
        with pytest.raises(ValueError, match=r"形状 \(2, 3\) 的张量没有 grad_fn"):
            trace(x)


@pytest.mark.parametrize("leaf", LEAVES)
def test_too_many_vertices(leaf: Callable[..., Any]) -> None:
    y = leaf(1)
    for _ in range(MAX_NODES - 2):  # 加上叶子与输出，正好到上限
        y = y * 2.0
    assert len(trace(y).labels) == MAX_NODES
    with pytest.raises(ValueError, match=f"图有 {MAX_NODES + 1} 个顶点，至多画 {MAX_NODES} 个"):
        trace(y * 2.0)


# ---------------------------------------------------------------- 布局

# a -> p -> q -> out，b -> q，c -> p：b 晚用到，应紧挨着 q
SMALL = Graph(
    ["a", "b", "c", "p", "q", "output"],
    [True, True, True, False, False, False],
    [(0, 3, ""), (2, 3, ""), (3, 4, ""), (1, 4, ""), (4, 5, "")],
)


def test_levels_by_hand() -> None:
    assert levels(SMALL) == [0, 1, 0, 1, 2, 3]
    x = engine_leaf(2)  # 叶子早用一次、晚用一次：挨着早的
    assert levels(trace(x.exp().tanh() * x)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("index", range(len(GRAPHS)))
def test_levels_go_right(index: int) -> None:
    graph = GRAPHS[index]
    level = levels(graph)
    for i, leaf in enumerate(graph.is_leaf):
        users = [level[target] for source, target, _ in graph.edges if source == i]
        inputs = [level[source] for source, target, _ in graph.edges if target == i]
        if leaf:
            assert level[i] == min(users) - 1
        else:
            assert level[i] == max(inputs) + 1
    assert min(level) == 0


@pytest.mark.parametrize("index", range(len(GRAPHS)))
def test_layout(index: int) -> None:
    """每条边逐列向右，首尾是它的两个顶点；顶点与途经的占位点互不重叠。"""
    graph = GRAPHS[index]
    points, routes = layout(graph)
    assert [x for x, _ in points] == levels(graph) and len(routes) == len(graph.edges)
    taken = list(points)
    for route, (source, target, _) in zip(routes, graph.edges, strict=True):
        assert route[0] == points[source] and route[-1] == points[target]
        columns = [x for x, _ in route]
        assert columns == list(range(int(columns[0]), int(columns[-1]) + 1))
        taken += route[1:-1]
    assert len(set(taken)) == len(taken)
    for column in {x for x, _ in taken}:  # 每一列居中，行距为 1
        rows = sorted(y for x, y in taken if x == column)
        assert np.allclose(rows, np.arange(len(rows)) - (len(rows) - 1) / 2)


def test_some_routes_are_long() -> None:
    assert max(len(route) for graph in GRAPHS for route in layout(graph)[1]) > 4


def test_sweeps_remove_crossings() -> None:
    """按编号排会交叉两次：a 通向下面的 q，b 通向上面的 p；排序之后没有交叉。"""
    graph = Graph(
        ["a", "b", "c", "d", "p", "q", "r", "output"],
        [True, True, True, True, False, False, False, False],
        [(3, 4, ""), (2, 4, ""), (1, 5, ""), (0, 5, ""), (4, 6, ""), (5, 6, ""), (6, 7, "")],
    )
    _, routes = layout(graph)
    segments = [pair for route in routes for pair in zip(route[:-1], route[1:], strict=True)]
    crossings = [
        (first, second)
        for first in segments
        for second in segments
        if first[0][0] == second[0][0] and first[0][1] < second[0][1] and first[1][1] > second[1][1]
    ]
    assert crossings == []


# ---------------------------------------------------------------- 输出


def test_mermaid_text() -> None:
    x, w = engine_leaf(2), engine_leaf(2)
    assert mermaid(trace((x * w + x).sum(), {"x": x, "w": w})) == "\n".join(
        [
            "flowchart LR",
            '    n0(["x 2"])',
            '    n1(["w 2"])',
            '    n2["mul"]',
            '    n3["add"]',
            '    n4["sum"]',
            '    n5["output"]',
            '    n0 -- "2" --> n2',
            '    n1 -- "2" --> n2',
            '    n2 -- "2" --> n3',
            '    n0 -- "2" --> n3',
            '    n3 -- "2" --> n4',
            "    n4 --> n5",
        ]
    )


def test_draw_graphs(tmp_path: Path) -> None:
    graphs = {"small": SMALL, "engine": GRAPHS[0], "torch": GRAPHS[1]}
    figure = draw_graphs(graphs)
    assert isinstance(figure, Figure) and len(figure.axes) == 3
    for axes, (title, graph) in zip(figure.axes, graphs.items(), strict=True):
        assert axes.get_title() == title
        boxes = [p for p in axes.patches if isinstance(p, FancyBboxPatch)]
        arrows = [p for p in axes.patches if isinstance(p, FancyArrowPatch)]
        assert len(boxes) == len(graph.labels) and len(arrows) == len(graph.edges)
        written = [text.get_text().replace("\n", " ") for text in axes.texts]
        assert all(label in written for label in graph.labels)
        points, _ = layout(graph)
        colors = [PALETTE[4 if leaf else 5] for leaf in graph.is_leaf[:-1]] + ["#E0E0E0"]
        for box, (x, y), color in zip(boxes, points, colors, strict=True):
            assert box.get_x() + HALF == pytest.approx(x)
            assert box.get_y() + box.get_height() / 2 == pytest.approx(y)
            assert to_hex(box.get_facecolor()).upper() == color
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        assert all(left < x < right and bottom < y < top for x, y in points)
    path = save_figure(figure, tmp_path / "graphs.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert 5_000 < path.stat().st_size <= MAX_BYTES


def test_edges_carry_the_shape_unless_the_leaf_already_says_it() -> None:
    x = engine_leaf(2, 3)
    (axes,) = draw_graphs({"": trace((x.exp()).sum(), {"x": x})}).axes
    written = sorted(text.get_text() for text in axes.texts)
    assert written == sorted(["x\n2×3", "exp", "sum", "output", "", "2×3", ""])


def test_arrows_run_between_box_edges() -> None:
    (axes,) = draw_graphs({"": SMALL}).axes
    arrows = [p for p in axes.patches if isinstance(p, FancyArrowPatch)]
    points, _ = layout(SMALL)
    for arrow, (source, target, _) in zip(arrows, SMALL.edges, strict=True):
        vertices = arrow.get_path().vertices
        assert tuple(vertices[0]) == pytest.approx((points[source][0] + HALF, points[source][1]))
        tip = vertices[vertices[:, 0].argmax()]
        assert tuple(tip) == pytest.approx((points[target][0] - HALF, points[target][1]), abs=0.02)
