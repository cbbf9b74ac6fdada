"""第 1 章的标量引擎与标量网络：逐个运算、随机表达式、训练几步都与 PyTorch 的双精度标量相同。"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chapter_01_tensor_autograd import benchmark, scalar_engine, scalar_mlp
from chapter_01_tensor_autograd.scalar_engine import Value
from chapter_01_tensor_autograd.scalar_mlp import ClosureValue, ScalarMLP, hinge_step
from utils import make_generator

POINTS, SIGNS = [[0.3, -1.2], [2.0, 0.7], [-0.4, 0.1], [1.1, -0.6]], [1, -1, -1, 1]

OPERATORS: list[Callable[[Any, Any], Any]] = [
    lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b, lambda a, b: a / b,
    lambda a, b: a + 2, lambda a, b: 2.5 + a, lambda a, b: a - 3, lambda a, b: 3.5 - a,
    lambda a, b: a * 4, lambda a, b: -1.5 * a, lambda a, b: a / 8, lambda a, b: 7 / a,
    lambda a, b: a**2, lambda a, b: b**3, lambda a, b: a**-1.5, lambda a, b: a**0.5 + b**0,
    lambda a, b: -a, lambda a, b: a.exp(), lambda a, b: a.log(), lambda a, b: b.sin(),
    lambda a, b: b.tanh(), lambda a, b: a.relu(), lambda a, b: b.relu() + a,
    lambda a, b: a * a, lambda a, b: b + b, lambda a, b: a / a - b,
]  # fmt: skip
BINARY: list[Callable[[Any, Any], Any]] = [*OPERATORS[:3], lambda a, b: a / (1 + b * b)]
UNARY: list[Callable[[Any], Any]] = [
    lambda a: a.tanh(), lambda a: a.sin(), lambda a: a.relu() - 0.3, lambda a: 2 - a,
    lambda a: (a * a + 1).log(), lambda a: a.tanh().exp(), lambda a: a**2 / 3,
]  # fmt: skip


def leaves(*numbers: float) -> tuple[list[Value], list[Tensor]]:
    official = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in numbers]
    return [Value(x) for x in numbers], official


def assert_same(y: Value, truth: Tensor, ours: list[Value], theirs: list[Tensor]) -> None:
    """取值与对每个叶子的导数都相同。"""
    y.backward()
    expected = torch.autograd.grad(truth, theirs, allow_unused=True, materialize_grads=True)
    numbers = [truth.item(), *(g.item() for g in expected)]
    assert [y.data, *(x.grad for x in ours)] == pytest.approx(numbers, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("index", range(len(OPERATORS)))
def test_operator_equals_torch(index: int) -> None:
    ours, theirs = leaves(1.7, -0.6)
    assert_same(OPERATORS[index](*ours), OPERATORS[index](*theirs), ours, theirs)


def test_random_expressions_equal_torch() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        ours, theirs = leaves(*(rng.uniform(-2, 2) for _ in range(3)))
        pools: tuple[list[Any], list[Any]] = list(ours), list(theirs)
        for step in range(30):  # 任取已有的结点，于是许多结点用了不止一次
            f, count = (rng.choice(BINARY), 2) if step % 2 else (rng.choice(UNARY), 1)
            places = [rng.randrange(len(pools[0])) for _ in range(count)]
            for pool in pools:
                pool.append(f(*(pool[k] for k in places)).tanh() * 1.5)
        assert_same(*(sum(pool[3:], pool[0]) for pool in pools), ours, theirs)


def test_engine_stays_short() -> None:
    source = Path(scalar_engine.__file__).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 150


def test_by_hand() -> None:
    a, b, c = Value(2.0), Value(-3.0), Value(10.0)
    d = a * b + c
    loss = d * d
    loss.backward()
    assert [x.data for x in (d, loss)] == [4.0, 16.0]
    assert [x.grad for x in (loss, d, a, b, c)] == [1.0, 8.0, -24.0, 16.0, 8.0]
    assert repr(a) == "Value(data=2, grad=-24)"
    zero = Value(0.0)
    (zero.relu() + zero**0).backward()
    assert zero.grad == 0.0


def test_grads_accumulate_until_cleared() -> None:
    x = Value(3.0)
    (x * x).backward()
    (x * 5).backward()
    assert x.grad == 6 + 5
    x.grad = 0.0
    (x + x).backward()
    assert x.grad == 2


def count_nodes() -> int:
    return sum(issubclass(type(x), Value) for x in gc.get_objects())


def test_very_long_chain() -> None:
    before, x, length = count_nodes(), Value(0.5), 200_000
    y = x
    for _ in range(length):
        y = x + y
    y.backward()
    assert (y.data, x.grad) == (0.5 * (length + 1), length + 1)
    del y  # 逐个释放也不能递归太深
    assert count_nodes() == before + 1


@pytest.mark.parametrize("node", [Value, ClosureValue])
def test_only_closures_leave_cycles(node: type[Value], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (scalar_engine, scalar_mlp):
        monkeypatch.setattr(module, "Value", node)
    gc.collect()
    gc.disable()  # 还能消失的对象，靠的就是引用计数
    try:
        model = ScalarMLP((2, 5, 1), make_generator(0))
        before, loss = count_nodes(), model(POINTS[0])[0]
        loss.backward()
        during = count_nodes()
        assert during > before + 30 and type(loss) is node
        del loss
        assert count_nodes() == (before if node is Value else during)
        gc.collect()
        assert count_nodes() == before
    finally:
        gc.enable()


def test_a_step_builds_645_nodes_per_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    built = 0

    class Counted(Value):
        __slots__ = ()

        def __init__(self, *arguments: Any) -> None:
            nonlocal built
            built += 1
            super().__init__(*arguments)

    for module in (scalar_engine, scalar_mlp):
        monkeypatch.setattr(module, "Value", Counted)
    model = ScalarMLP((2, 16, 16, 1), make_generator(0))
    built = 0
    hinge_step(model, POINTS, SIGNS, 0.1)
    assert built == 645 * len(POINTS)  # 正文里说的六万多个，就是一百个样本


def test_benchmark_refuses_a_chain_too_short_to_weigh(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse_args(["--chain", "7"])
    assert "--chain 7 太短，量不出内存：至少 10000" in capsys.readouterr().err


def test_closures_train_the_same_network(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    for node in (Value, ClosureValue):
        for module in (scalar_engine, scalar_mlp):
            monkeypatch.setattr(module, "Value", node)
        model = ScalarMLP((2, 5, 4, 1), make_generator(0))
        losses = [hinge_step(model, POINTS, SIGNS, 0.1) for _ in range(5)]
        assert losses[-1] < losses[0]
        trained.append([*losses, *(p.data for p in model.parameters())])
    assert trained[0] == pytest.approx(trained[1], rel=1e-12)


def test_closures_propagate_in_topological_order() -> None:
    a = ClosureValue(2.0)
    b = ClosureValue(3.0, a, 1.0)
    y = ClosureValue(5.0, a, 10.0, b, 100.0)  # a 既直接又经 b 用到
    ClosureValue(5.0, y, 1.0).backward()
    assert (y.grad, b.grad, a.grad) == (1.0, 100.0, 110.0)
    c = ClosureValue(2.0)
    d = ClosureValue(3.0, c, 1.0)
    ClosureValue(5.0, d, 100.0, c, 10.0).backward()  # 次序颠倒也一样
    assert (d.grad, c.grad) == (100.0, 110.0)


# ---------------------------------------------------------------- 标量网络


def tables(model: ScalarMLP) -> list[Tensor]:
    """每层一张表 ``(O, I + 1)``：权重，最后一列是偏置。"""
    rows = [[[p.data for p in (*row, bias)] for row, bias in layer] for layer in model.layers]
    return [torch.tensor(layer, dtype=torch.float64) for layer in rows]


def networks(*sizes: int) -> tuple[ScalarMLP, nn.Sequential]:
    """同样权重的标量网络与官方网络；偏置不留零，才查得出偏置的错。"""
    model, modules = ScalarMLP(sizes, make_generator(0)), []
    for k, (_, bias) in enumerate(neuron for layer in model.layers for neuron in layer):
        bias.data = 0.1 * k - 0.15
    for table in tables(model):
        linear = nn.Linear(table.shape[1] - 1, len(table)).double()
        linear.load_state_dict({"weight": table[:, :-1], "bias": table[:, -1]})
        modules += [linear, nn.ReLU()]
    return model, nn.Sequential(*modules[:-1])


@pytest.mark.parametrize("sizes", [(2, 1), (2, 5, 3), (2, 4, 4, 2)])
def test_network_equals_torch(sizes: tuple[int, ...]) -> None:
    model, official = networks(*sizes)
    expected = official(torch.tensor(POINTS, dtype=torch.float64)).detach().numpy()
    one_by_one = np.array([[value.data for value in model(point)] for point in POINTS])
    for actual in (one_by_one, model.scores(np.array(POINTS))):
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-14)


def test_initialization() -> None:
    model, again, other = (ScalarMLP((50, 40, 1), make_generator(s)) for s in (0, 0, 1))
    values, same, different = ([p.data for p in m.parameters()] for m in (model, again, other))
    assert values == same != different and len(values) == 40 * 51 + 41
    weights, biases = tables(model)[0][:, :-1], tables(model)[0][:, -1]
    assert 0.99 < weights.abs().max() / (3 / 50) ** 0.5 <= 1
    assert weights.var().item() == pytest.approx(1 / 50, rel=0.05) and not biases.any()


def test_hinge_step_equals_torch() -> None:
    model, official = networks(2, 5, 4, 1)
    optimizer, start = torch.optim.SGD(official.parameters(), lr=0.3), tables(model)
    x, y = torch.tensor(POINTS, dtype=torch.float64), torch.tensor(SIGNS)
    for _ in range(3):
        loss = torch.relu(1 - official(x)[:, 0] * y).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert hinge_step(model, POINTS, SIGNS, 0.3) == pytest.approx(loss.item(), rel=1e-12)
        for table, linear in zip(tables(model), official[::2], strict=True):
            expected = torch.cat([linear.weight, linear.bias[:, None]], 1).detach()
            torch.testing.assert_close(table, expected, rtol=1e-12, atol=1e-14)
    assert all((a != b).any() for a, b in zip(start, tables(model), strict=True))


def test_a_second_loss_over_a_shared_intermediate() -> None:
    x, t = Value(2.0), torch.tensor(2.0, requires_grad=True)
    for leaf in (x, t):
        a = leaf * 2
        first, second = a * a, a + 1
        if leaf is t:
            first.backward(retain_graph=True)
            first.backward(retain_graph=True)
        else:
            first.backward()
            first.backward()
        second.backward()
    assert x.grad == t.grad.item() == 34.0  # 16 + 16 + 2：中间结点的旧梯度不再传一遍
    with pytest.raises(ValueError, match="输入有 1 个数，应为 2 个"):
        ScalarMLP((2, 3, 1), make_generator(0))([1.0])
