"""第 1 章的引擎：随机的计算图与 PyTorch 比较；图的释放、保留、钩子、开关；原地修改的版本检查。"""

from __future__ import annotations

import gc
import threading
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from chapter_01_tensor_autograd import functional as F
from chapter_01_tensor_autograd.engine import Tensor, as_tensor, grad, grad_mode, no_grad
from chapter_01_tensor_autograd.graph import Node, is_grad_enabled, record, topological_order

# ---------------------------------------------------------------- 随机的有向无环图

N = 4
MASK = np.tril(np.ones((N, N), dtype=bool))
ORDER = np.array([2, 0, 0, 3])

# 每个算子：(几个操作数, 我们的写法, PyTorch 的写法)；形状都由 (N, N) 广播而来，取值有界
Pair = tuple[int, Callable[..., Any], Callable[..., Any]]


def both(arity: int, function: Callable[..., Any]) -> Pair:
    return arity, function, function


DAG_OPERATORS: list[Pair] = [
    both(2, lambda a, b: a + b),
    both(2, lambda a, b: a - b * 0.5),
    both(2, lambda a, b: a.tanh() * b.sigmoid()),
    both(2, lambda a, b: a / (1.5 + b * b)),
    both(2, lambda a, b: (a @ b).tanh()),
    both(1, lambda a: a.sin()),
    both(1, lambda a: (-a * a).exp()),
    both(1, lambda a: (a * a + 1.0).log()),
    both(1, lambda a: (a * a + 0.5).sqrt()),
    both(1, lambda a: a.softmax(1)),
    both(1, lambda a: a.sum(0, True) + a.mT),
    both(1, lambda a: a.mean(1, True) * a),
    both(1, lambda a: a.reshape(2, 2 * N).sum(0).reshape(2, N).transpose(0, 1) @ a[:2]),
    both(1, lambda a: a.logsumexp(0) + a),
    (1, lambda a: a[ORDER] * 0.7, lambda a: a[torch.from_numpy(ORDER)] * 0.7),
    (1, lambda a: a.where(MASK, 0.3), lambda a: torch.where(torch.from_numpy(MASK), a, 0.3)),
    (2, lambda a, b: F.concat([a[:1], b[1:]]), lambda a, b: torch.cat([a[:1], b[1:]])),
    (2, lambda a, b: F.maximum(a, b), torch.maximum),
    (1, lambda a: F.gelu(a), lambda a: torch.nn.functional.gelu(a)),
]


def build(program: list[tuple[int, list[int]]], leaves: list[Any], side: int) -> Any:
    """按程序搭图：每一步从已有的量里取操作数；最后全部量的加权和，用过与没用过的都有。"""
    values = list(leaves)
    for operator, chosen in program:
        values.append(DAG_OPERATORS[operator][side](*(values[i] for i in chosen)))
    total = values[-1].sum()
    for k, value in enumerate(values[len(leaves) :: 3], start=1):
        total = total + (value * value).sum() * (0.1 / k)
    return total


def random_program(rng: np.random.Generator, leaves: int) -> list[tuple[int, list[int]]]:
    program = []
    for size in range(leaves, leaves + int(rng.integers(3, 14))):
        operator = int(rng.integers(len(DAG_OPERATORS)))
        arity = DAG_OPERATORS[operator][0]
        program.append((operator, rng.integers(0, size, arity).tolist()))
    return program


def relative(actual: np.ndarray, expected: torch.Tensor) -> float:
    truth = expected.detach().numpy()
    return float(np.abs(actual - truth).max() / max(np.abs(truth).max(), 1e-3))


@pytest.mark.parametrize("block", range(10))
def test_200_random_graphs_equal_torch_in_both_derivatives(block: int) -> None:
    for seed in range(20 * block, 20 * block + 20):
        rng = np.random.default_rng(seed)
        shapes = [(N, N), (N, N), (1, N)][: int(rng.integers(1, 4))]
        arrays = [np.broadcast_to(rng.normal(size=s), (N, N)).copy() for s in shapes]
        ours = [Tensor(a, requires_grad=True) for a in arrays]
        theirs = [torch.tensor(a, requires_grad=True) for a in arrays]
        program = random_program(rng, len(arrays))
        y, t = build(program, ours, 1), build(program, theirs, 2)
        assert y.item() == pytest.approx(t.item(), rel=1e-10)
        first = grad(y, ours, create_graph=True, allow_unused=True)
        truth = torch.autograd.grad(t, theirs, create_graph=True, allow_unused=True)
        pairs = [(g, r) for g, r in zip(first, truth, strict=True) if r is not None]
        assert [g is None for g in first] == [r is None for r in truth]
        for g, r in pairs:
            assert relative(g.numpy(), r) < 1e-10, seed
        z = sum(((g * g).sum() for g, _ in pairs), Tensor(0.0))
        s = sum((r * r).sum() for _, r in pairs)
        if not s.requires_grad:  # 整张图都是线性的
            continue
        second = grad(z, ours, allow_unused=True)
        for g, r in zip(second, torch.autograd.grad(s, theirs, allow_unused=True), strict=True):
            if r is not None:
                assert relative(g.numpy(), r) < 1e-10, seed


def test_the_check_above_can_fail() -> None:
    x = Tensor(np.ones(3), requires_grad=True)
    wrong = record("wrong", x.numpy() ** 2, (x, lambda g: g * x))  # 少乘了 2
    (g,) = grad(wrong.sum(), x)
    assert relative(g.numpy(), torch.full((3,), 2.0)) == 0.5


# ---------------------------------------------------------------- 图的寿命


def test_a_long_chain_needs_no_recursion() -> None:
    x = Tensor(1.0, requires_grad=True)
    y = x
    for _ in range(200_000):
        y = y * 1.00001
    y.backward()
    assert x.grad.item() == pytest.approx(1.00001**200_000, rel=1e-9)
    del y  # 骨架也不能递归着释放
    z = x
    for _ in range(200_000):
        z = z + 1.0
    del z  # 没有反向过的图也一样


def test_graphs_die_by_reference_counting() -> None:
    gc.collect()
    gc.disable()
    try:
        x = Tensor(np.ones(3), requires_grad=True)
        h = (x * 2.0).exp().tanh().softmax(0)  # 后三个都保存自己的输出
        watched = weakref.ref(h)
        loss = (h * h).sum()
        del h, loss
        assert watched() is None
        loss = (x.sigmoid() * x).sum()
        (g,) = grad(loss, x, create_graph=True)
        watched = weakref.ref(g)
        del g, loss
        assert watched() is None
        assert not any(type(o) is Node for o in gc.get_objects())
    finally:
        gc.enable()


def test_backward_frees_what_it_has_used() -> None:
    size = 1_000_000
    x = Tensor(np.zeros(size // 8), requires_grad=True)

    def peak(retain: bool) -> tuple[float, float]:
        """反向的峰值与反向之后剩下的，以一个数组为单位（x.grad 也算一个）。"""
        x.grad = None
        y = x
        for _ in range(20):
            y = y.sin()
        y = y.sum()
        base, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        y.backward(retain_graph=retain)
        after, top = tracemalloc.get_traced_memory()
        return (top - base) / size, (after - base) / size

    tracemalloc.start()
    try:
        freeing, left = peak(False)
        keeping, kept = peak(True)
    finally:
        tracemalloc.stop()
    assert freeing < 5 and keeping < 5  # 只多出几个临时的数组
    assert left < -17  # 20 层保存的输入几乎都已释放，虽然 y 还在
    assert 0.9 < kept < 1.1  # 保留图时，只多了 x.grad


def test_second_backward_and_retain_graph() -> None:
    x = Tensor([1.0, 2.0], requires_grad=True)
    y = (x * x).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert x.grad.numpy().tolist() == [4.0, 8.0]  # 累加了两次
    with pytest.raises(RuntimeError, match=r"sum 的计算图已经释放.*retain_graph=True"):
        y.backward()
    assert x.grad.numpy().tolist() == [4.0, 8.0]


def test_sharing_a_freed_part_says_so() -> None:
    x = Tensor([1.0, 2.0], requires_grad=True)
    h = x.exp()
    first, second = h.sum(), (h * h).sum()
    first.backward()
    with pytest.raises(RuntimeError, match="exp 的计算图已经释放"):
        second.backward()
    h = x.exp()
    first, second = h.sum(), (h * h).sum()
    first.backward()
    with pytest.raises(RuntimeError, match="exp 的计算图已经释放"):
        grad(second, x)


def test_grad_stops_at_its_targets() -> None:
    x = Tensor([1.0, 2.0], requires_grad=True)
    h = x.exp()
    (gh,) = grad((h * 3.0).sum(), h)  # 目标之前的部分没有经过，也就没有释放
    assert gh.numpy().tolist() == [3.0, 3.0] and x.grad is None
    h.sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), np.exp([1.0, 2.0]))


def test_grad_of_leaf_intermediate_and_self() -> None:
    x = Tensor([1.0, 2.0], requires_grad=True)
    h = x * 2.0
    y = (h * h).sum()
    gx, gh, gy = grad(y, [x, h, y])
    assert gx.numpy().tolist() == [8.0, 16.0]
    assert gh.numpy().tolist() == [4.0, 8.0] and gy.item() == 1.0
    x.backward(np.array([5.0, 6.0]))  # 叶子自己也可以反向
    assert x.grad.numpy().tolist() == [5.0, 6.0]


def test_unused_inputs() -> None:
    x, z = Tensor(1.0, requires_grad=True), Tensor(1.0, requires_grad=True)
    with pytest.raises(ValueError, match="输出与形状 .* 的输入无关"):
        grad(x * 2.0, [x, z])
    assert grad(x * 2.0, [x, z], allow_unused=True)[1] is None


def test_third_derivative_through_backward() -> None:
    x = Tensor([0.3, -1.2], requires_grad=True)
    t = torch.tensor([0.3, -1.2], dtype=torch.float64, requires_grad=True)
    (x.sin() * x).sum().backward(create_graph=True)
    first = x.grad
    x.grad = None
    (first * first).sum().backward(create_graph=True)
    second = x.grad
    x.grad = None
    second.sum().backward()
    (a,) = torch.autograd.grad((t.sin() * t).sum(), t, create_graph=True)
    (b,) = torch.autograd.grad((a * a).sum(), t, create_graph=True)
    (c,) = torch.autograd.grad(b.sum(), t)
    np.testing.assert_allclose(x.grad.numpy(), c.numpy(), rtol=1e-12)


# ---------------------------------------------------------------- 叶子、开关、钩子


def test_gradients_do_not_share_memory() -> None:
    x, z = (Tensor([1.0, 2.0], requires_grad=True) for _ in range(2))
    seed = np.array([1.0, 1.0])
    (x + z).backward(seed)
    x.grad.mul_(10.0)
    assert z.grad.numpy().tolist() == [1.0, 1.0] and seed.tolist() == [1.0, 1.0]
    w = Tensor(np.ones((2, 3)), requires_grad=True)
    w.sum().backward()
    w.grad.add_(1.0)  # 广播出来的梯度是只读的视图，交出来之前要复制
    assert w.grad.numpy().tolist() == [[2.0] * 3] * 2


def test_no_grad_and_detach_cut_the_graph() -> None:
    x = Tensor([1.0, 2.0], requires_grad=True)
    with no_grad():
        quiet = x * 2.0
        with grad_mode(True):
            loud = x * 2.0
        assert not is_grad_enabled()
    assert is_grad_enabled()
    assert not quiet.requires_grad and quiet.is_leaf and loud.requires_grad
    (x * x.detach()).sum().backward()
    assert x.grad.numpy().tolist() == [1.0, 2.0]
    assert np.shares_memory(x.detach().numpy(), x.numpy())

    @no_grad()
    def evaluate(depth: int) -> Tensor:
        return evaluate(depth - 1) if depth else x * 2.0

    assert not evaluate(2).requires_grad and is_grad_enabled()


def test_no_grad_ends_when_an_error_escapes_and_is_per_thread() -> None:
    with pytest.raises(ZeroDivisionError), no_grad():
        raise ZeroDivisionError
    assert is_grad_enabled()
    seen: list[bool] = []
    with no_grad():
        thread = threading.Thread(target=lambda: seen.append(is_grad_enabled()))
        thread.start()
        thread.join()
    assert seen == [True]


def test_hooks_and_retain_grad() -> None:
    x = Tensor([1.0, 2.0], requires_grad=True)
    y = x * 3.0
    y.retain_grad()
    y.register_hook(lambda g: g * 2.0)
    seen: list[list[float]] = []
    x.register_hook(lambda g: seen.append(g.numpy().tolist()))
    (y * y).sum().backward()
    assert y.grad.numpy().tolist() == [6.0, 12.0]  # 2y，在加倍的钩子之前登记
    assert x.grad.numpy().tolist() == [36.0, 72.0] and seen == [[36.0, 72.0]]
    with pytest.raises(RuntimeError, match="register_hook"):
        Tensor(1.0).register_hook(print)


def test_intermediate_results_have_no_grad_unless_asked() -> None:
    x = Tensor([1.0], requires_grad=True)
    y = x * 2.0
    y.sum().backward()
    assert y.grad is None and not y.is_leaf and x.is_leaf
    assert [v is x for v in topological_order(y.grad_fn)] == [True, False]


# ---------------------------------------------------------------- 原地修改


def test_in_place_values_and_gradients_equal_torch() -> None:
    arrays = [np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([5.0, 6.0])]

    def run(make: Callable[[np.ndarray], Any]) -> list[np.ndarray]:
        a, b = (make(array) for array in arrays)
        y = a * 1.0
        y += b
        y.mul_(b)
        y -= a
        y[0] = b * 2.0
        y[:, 1] += b
        y[1, :1] *= a[0, 1]
        (y * y).sum().backward()
        return [np.asarray(y.detach()), np.asarray(a.grad), np.asarray(b.grad)]

    ours = run(lambda array: Tensor(array, requires_grad=True))
    theirs = run(lambda array: torch.tensor(array, requires_grad=True))
    for mine, official in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, official, rtol=1e-14)


def test_overwriting_cuts_the_history() -> None:
    results = []
    for make in (Tensor, torch.tensor):
        x = make([1.0, 2.0], requires_grad=True)
        y, z = x * 3.0, x * 5.0
        y.zero_()
        z[0] = 7.0
        (y + z * z).sum().backward()
        results.append(np.asarray(x.grad).tolist())
    assert results[0] == results[1] == [0.0, 100.0]
    buffer = Tensor([0.0, 0.0])
    buffer.add_(Tensor([1.0, 2.0], requires_grad=True) * 2.0)  # 原来不要求梯度的，从此在图里
    assert buffer.requires_grad and buffer.numpy().tolist() == [2.0, 4.0]


@pytest.mark.parametrize(
    ("operation", "needed"),
    [
        (lambda y: y * y, True),
        (lambda y: y.exp(), False),
        (lambda y: y + y, False),
        (lambda y: y.sin(), True),
        (lambda y: y.sum(), False),
        (lambda y: y @ y, True),
        (lambda y: y / 2.0, False),
    ],
)
def test_version_check_only_when_the_value_is_needed(operation: Callable, needed: bool) -> None:
    # 与 PyTorch 逐个一致：反向要用到的量被改了才报错
    for make in (Tensor, lambda a, requires_grad: torch.tensor(a, requires_grad=requires_grad)):
        x = make(np.array([1.0, 2.0]), requires_grad=True)
        y = x * 1.0
        z = operation(y).sum()
        y.add_(1.0)
        if needed:
            with pytest.raises(RuntimeError):
                z.backward()
        else:
            z.backward()


def test_saved_outputs_are_checked_too() -> None:
    for function in (Tensor.exp, Tensor.tanh, Tensor.sigmoid, Tensor.sqrt):
        y = function(Tensor([1.0, 2.0], requires_grad=True))
        z = (y + 1.0).sum()
        y.mul_(2.0)
        with pytest.raises(RuntimeError, match="保存时版本 0，现在版本 1"):
            z.backward()


def test_views_share_one_version() -> None:
    x = Tensor(np.ones((2, 3)), requires_grad=True)
    y = x * 1.0
    z = (y * y).sum()
    view = y.T.reshape(3, 2)[1:]
    with no_grad():
        y.detach()[0].add_(1.0)  # 共用内存的任何一个改了，都算改了
    assert view.storage is not y.storage or view.storage.version == 1
    with pytest.raises(RuntimeError, match="原地修改"):
        z.backward()


def test_a_stale_view_cannot_be_used() -> None:
    x = Tensor(np.ones(4), requires_grad=True)
    y = x * 2.0
    view = y[:2]
    y.mul_(3.0)
    with pytest.raises(RuntimeError, match=r"由 getitem 得到.*先 clone"):
        view.sum()  # 再求导只会得到悄悄错了的梯度
    y.sum().backward()
    assert x.grad.numpy().tolist() == [6.0] * 4


def test_leaves_are_protected() -> None:
    w = Tensor(np.ones(3), requires_grad=True)
    for change in (lambda: w.add_(1.0), lambda: w[:2].mul_(2.0), lambda: w.zero_()):
        with pytest.raises(RuntimeError, match="要求梯度的叶子"):
            change()
    with no_grad():
        w.sub_(0.5)
        w[0] = 9.0
    assert w.numpy().tolist() == [9.0, 0.5, 0.5] and w.is_leaf and w.requires_grad
    (w * w).sum().backward()  # 修改之后照常求导
    assert w.grad.numpy().tolist() == [18.0, 1.0, 1.0]


def test_read_only_views_and_wrong_shapes() -> None:
    x = Tensor(np.ones((1, 3)))
    with pytest.raises(RuntimeError, match="只读视图"):
        x.expand(2, 3).add_(1.0)
    with pytest.raises(ValueError, match=r"add_：结果的形状 \(2, 3\) 放不进 \(1, 3\)"):
        x.add_(np.ones((2, 3)))
    assert x.numpy().tolist() == [[1.0, 1.0, 1.0]]


def test_tensor_copies_and_as_tensor_does_not() -> None:
    array = np.zeros(3)
    assert not np.shares_memory(Tensor(array).numpy(), array)
    assert np.shares_memory(as_tensor(array).numpy(), array)
    x = Tensor([1, 2], dtype=np.float32)
    assert as_tensor(x) is x and not np.shares_memory(Tensor(x).numpy(), x.numpy())
    assert np.asarray(x).tolist() == [1.0, 2.0] and x.dtype == np.float32
