"""第 1 章引擎的边角：每一条都曾是悄悄算错的地方，一律与 PyTorch（float64）逐个比较。"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from chapter_01_tensor_autograd import functional as F
from chapter_01_tensor_autograd import modes
from chapter_01_tensor_autograd.engine import Tensor, grad, no_grad
from chapter_01_tensor_autograd.gradcheck import gradcheck
from chapter_01_tensor_autograd.nn import MLP
from chapter_01_tensor_autograd.optim import Adam
from utils import make_generator

Make = Callable[..., Any]


def engine_leaf(values: Any, requires_grad: bool = True) -> Tensor:
    return Tensor(np.array(values, dtype=float), requires_grad)


def torch_leaf(values: Any, requires_grad: bool = True) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=requires_grad)


def both(program: Callable[[Make], tuple[Any, ...]]) -> tuple[list[Any], list[Any]]:
    """在两个引擎里各运行一遍同样的程序，结果都化成嵌套列表。"""
    found = []
    for make in (engine_leaf, torch_leaf):
        results = program(make)
        found.append([None if r is None else np.asarray(r.detach()).tolist() for r in results])
    return found[0], found[1]


def agree(program: Callable[[Make], tuple[Any, ...]]) -> None:
    ours, theirs = both(program)
    np.testing.assert_equal(ours, theirs)


# ---------------------------------------------------------------- 通过视图写入


def test_writing_through_a_view_of_a_constant_is_refused() -> None:
    for write in (
        lambda buffer, w: buffer[0].add_(w),
        lambda buffer, w: buffer.T.__setitem__((slice(None), 0), w),
        lambda buffer, w: buffer[0].__setitem__(1, w.sum()),
    ):
        w, buffer = engine_leaf([1.0, 2.0]), engine_leaf([[0.0, 0.0], [5.0, 5.0]], False)
        write(buffer, w)
        with pytest.raises(RuntimeError, match=r"没有来历.*写成 x\[下标\] = 值"):
            (buffer * buffer).sum()  # 若放行，w 的梯度就悄悄丢了
    with no_grad():
        assert float((buffer * 1.0).sum()) > 0  # 不求导时，内容本来就是对的


def test_writing_by_index_into_a_constant_is_tracked() -> None:
    def program(make: Make) -> tuple[Any, ...]:
        w, buffer = make([1.0, 2.0]), make([[0.0, 3.0], [5.0, 5.0]], False)
        buffer[0] += w
        buffer[1] = w * 2.0
        buffer[0, 1] = w.sum()
        (buffer * buffer).sum().backward()
        return buffer, w.grad

    agree(program)


def test_random_programs_on_a_constant_base_agree_or_refuse() -> None:
    def program(make: Make, seed: int) -> tuple[Any, ...]:
        rng = np.random.default_rng(seed)
        w, base = make(rng.normal(size=3)), make(rng.normal(size=(2, 3)), False)
        pool = [base]
        for _ in range(rng.integers(1, 6)):
            t, choice = pool[rng.integers(len(pool))], rng.integers(6)
            if choice == 0 and t.ndim > 1:
                pool.append(t[int(rng.integers(2))])
            elif choice == 1:
                pool.append(t[..., 1:] * 1.0 if t.ndim > 1 else t[1:])
            elif choice == 2:
                t.mul_(1.5)
            elif choice == 3 and t.shape[-1] == 3:
                t.add_(w)
            elif choice == 4:
                t[0] = w.sum()
            elif t.shape[-1] == 3:
                t[-1] *= w if t.ndim > 1 else w[0]
        loss = (w * w).sum()
        for t in pool:
            loss = loss + (t * t).sum()
        loss.backward()
        return loss, w.grad

    refused = 0
    for seed in range(300):
        try:
            ours = program(engine_leaf, seed)
        except RuntimeError as error:
            assert "来历不再成立" in str(error)
            refused += 1
            continue
        theirs = program(torch_leaf, seed)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a.numpy(), b.detach().numpy(), rtol=1e-10)
    assert 20 < refused < 150


def test_no_grad_does_not_wash_a_stale_history() -> None:
    x, w = engine_leaf([1.0, 2.0]), engine_leaf([5.0])
    y = x * 2.0
    y[:1].add_(w)
    with no_grad():
        y.add_(0.0)
    with pytest.raises(RuntimeError, match="来历不再成立"):
        y.sum()


def test_detached_memory_may_be_changed_freely() -> None:
    def program(make: Make) -> tuple[Any, ...]:
        x, w = make([1.0, 2.0]), make([3.0, 4.0])
        y = x * 2.0
        constant = y.detach()
        head = constant[:1]
        y.add_(w)
        loss = (constant * w).sum() + head.sum() + y.sum()  # constant 的新内容当作常数
        loss.backward()
        return loss, x.grad, w.grad

    agree(program)


# ---------------------------------------------------------------- 下标


@pytest.mark.parametrize(
    "index",
    [
        torch.tensor([0, 0, 2]),
        ((0, 0, 1),),
        (torch.tensor([0, 0]), torch.tensor([1, 1])),
        [],
        ([0, 0], slice(None)),
        (np.int64(1), [0, 0]),
        np.array([[True, False, True], [False] * 3, [True] * 3]),
        (np.array([True, False, True]), 1),
        (1, 2),
        (..., 0, None),
    ],
    ids=str,
)
def test_every_kind_of_index(index: Any) -> None:
    values = np.arange(9.0).reshape(3, 3)
    x = engine_leaf(values)
    y = x[index]
    positions = np.arange(9).reshape(3, 3)[
        tuple(np.asarray(p) if isinstance(p, torch.Tensor) else p for p in index)
        if isinstance(index, tuple)
        else np.asarray(index).astype(int)
        if isinstance(index, list | torch.Tensor)
        else index
    ]
    assert y.numpy().tolist() == values.reshape(-1)[positions].tolist()
    (y * y).sum().backward()
    expected = np.zeros(9)
    np.add.at(expected, np.ravel(positions), 2 * values.reshape(-1)[np.ravel(positions)])
    assert x.grad.numpy().reshape(-1).tolist() == expected.tolist()  # 取过几次就加几次


def test_one_element_is_a_view_too() -> None:
    def program(make: Make) -> tuple[Any, ...]:
        x, w = make([1.0, 2.0, 3.0]), make(7.0)
        y = x * 1.0
        y[1] *= w
        with torch.no_grad(), no_grad():
            first = y[0]
            first += 5.0
        return (y,)

    agree(program)


def test_the_last_of_repeated_writes_counts() -> None:
    x, v = engine_leaf([1.0, 2.0, 3.0]), engine_leaf([5.0, 7.0])
    y = x * 1.0
    y[[0, 0]] = v
    assert y.numpy().tolist() == [7.0, 2.0, 3.0]
    (y * y).sum().backward()
    assert v.grad.numpy().tolist() == [0.0, 14.0] and x.grad.numpy().tolist() == [0.0, 4.0, 6.0]
    z = x * 1.0
    z[[0, 0]] += 10.0
    assert z.numpy().tolist() == [11.0, 2.0, 3.0]


# ---------------------------------------------------------------- 无穷大与 nan


@pytest.mark.parametrize(
    "guard",
    [
        lambda x: x.relu().sqrt(),
        lambda x: x.relu().log(),
        lambda x: x.clip(0.0, 2.0).sqrt(),
        lambda x: (x**0 - 1.0).sqrt(),
        lambda x: x.maximum(x * 0.0).sqrt(),
        lambda x: (-((-x).minimum(x * 0.0))).sqrt(),
    ],
)
def test_a_blocked_branch_has_zero_gradient_even_times_infinity(
    guard: Callable[[Any], Any],
) -> None:
    def program(make: Make) -> tuple[Any, ...]:
        x = make([-1.0, 0.5, 4.0])
        guard(x).sum().backward()
        return (x.grad,)

    with np.errstate(all="ignore"):
        agree(program)


def test_nan_is_not_hidden() -> None:
    def program(make: Make) -> tuple[Any, ...]:
        x, y = make([np.nan, 1.0, 2.0]), make([0.0, 1.0, np.nan])
        z = x.relu() * 2.0 + x.maximum(y) + x.minimum(y) * 3.0
        z.sum().backward()
        return z, x.grad, y.grad

    agree(program)


# ---------------------------------------------------------------- 没有元素


@pytest.mark.parametrize(
    "program",
    [
        lambda a, b: a * b[:0],
        lambda a, b: a.expand(0),
        lambda a, b: b[:0].var(0),
        lambda a, b: b[:0].reshape(2, 0).logsumexp(1).exp(),
        lambda a, b: b[:0].reshape(2, 0).softmax(1),
        lambda a, b: b[:0].reshape(0, 3).flatten(1),
        lambda a, b: b.reshape(3, 1).expand(3, 0).sum(1),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_empty_tensors(program: Callable[[Any, Any], Any]) -> None:
    def run(make: Make) -> tuple[Any, ...]:
        a, b = make([2.0]), make([1.0, 2.0, 3.0])
        y = program(a, b)
        (y.sum() + a.sum() + b.sum()).backward()
        return y, a.grad, b.grad

    with np.errstate(all="ignore"):
        agree(run)


def test_convolution_of_an_empty_batch() -> None:
    y = F.conv2d(Tensor(np.ones((0, 2, 4, 4))), Tensor(np.ones((3, 2, 2, 2))))
    assert y.shape == (0, 3, 3, 3)


# ---------------------------------------------------------------- 整数与 dtype


def test_integers_are_never_rounded_silently() -> None:
    whole = Tensor([-1, 0, 2])
    for name in ("sigmoid", "erf", "exp", "tanh", "softmax"):
        arguments = (0,) if name == "softmax" else ()
        ours = getattr(whole, name)(*arguments).numpy()
        expected = getattr(Tensor([-1.0, 0.0, 2.0]), name)(*arguments).numpy()
        np.testing.assert_allclose(ours, expected, rtol=1e-15)
    assert whole.max().item() == 2 and (whole * 3).numpy().tolist() == [-3, 0, 6]
    with pytest.raises(TypeError, match="add：dtype 不同，uint8"):
        Tensor(np.array([1], np.uint8)) + 300
    x = engine_leaf([1.5])
    assert not x.astype(np.int64).requires_grad and x.astype(np.float32).requires_grad


def test_dtypes_are_not_mixed_behind_the_back() -> None:
    single, double = Tensor(np.ones((1, 2), np.float32)), Tensor(np.ones((1, 2)))
    with pytest.raises(TypeError, match="concat：dtype 不同，float32.*float64"):
        F.concat([single, double])
    with pytest.raises(TypeError, match="linear：dtype 不同"):
        F.linear(single, double)
    with pytest.raises(TypeError, match="linear：dtype 不同"):
        F.linear(single, single, Tensor([1.0]))
    for shape in ((2,), (1, 1), ()):
        with pytest.raises(ValueError, match=r"linear：bias 应为 \(1,\)，实为"):
            F.linear(double, double, Tensor(np.ones(shape)))


# ---------------------------------------------------------------- 原地与 retain_grad


def test_every_in_place_operator() -> None:
    def program(make: Make) -> tuple[Any, ...]:
        x, w = make([1.0, 2.0]), make([3.0, 0.5])
        y = x * 1.0
        same = y
        y += w
        y -= 0.5
        y *= w
        y /= w + 1.0
        y **= 3.0
        assert y is same
        y.sum().backward()
        return y, x.grad, w.grad

    ours, theirs = both(program)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-14)
    parameter = engine_leaf([2.0])
    with no_grad():
        parameter /= 4.0
    assert parameter.item() == 0.5 and parameter.requires_grad and parameter.is_leaf


def test_retained_gradients() -> None:
    def program(make: Make) -> tuple[Any, ...]:
        x = make([1.0, 2.0])
        y = x * 2.0
        y.retain_grad()
        y.retain_grad()
        y.mul_(3.0)  # 之后的 y 才是留梯度的那个
        z = y.exp()
        z.retain_grad()
        loss = z.sum() + y.sum()
        loss.backward(retain_graph=True)
        loss.backward()  # 累加
        return y.grad, z.grad, x.grad

    agree(program)
    y = engine_leaf([1.0]) * 1.0
    y.retain_grad()
    seed = Tensor([1.0])
    y.backward(seed)
    y.grad.mul_(9.0)
    assert seed.item() == 1.0  # 留下的梯度是自己的一份
    x = engine_leaf([1.0])
    assert grad(x, x, seed)[0] is not seed


def test_detached_alias_does_not_unlock_a_leaf() -> None:
    p = engine_leaf([1.0])
    p.detach().requires_grad_(False)
    with pytest.raises(RuntimeError, match="要求梯度的叶子"):
        p += 1.0


def test_loading_parameters_counts_as_a_change() -> None:
    model = MLP((2, 3, 1), "tanh", make_generator(0), np.float64)
    state = model.state_dict()
    loss = model(Tensor([[1.0, 2.0]])).sum()
    model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="又被原地修改"):
        loss.backward()


def test_where_keeps_its_own_mask() -> None:
    x, mask = engine_leaf([1.0, 2.0]), Tensor([True, False])
    y = F.where(mask, x, 0.0)
    mask.copy_(False)
    y.sum().backward()
    assert x.grad.numpy().tolist() == [1.0, 0.0]


# ---------------------------------------------------------------- 优化器、模式、检查


def test_adam_counts_steps_per_parameter() -> None:
    ours, theirs = [engine_leaf([1.0]) for _ in "ab"], [torch_leaf([1.0]) for _ in "ab"]
    adam, official = Adam(ours, 0.1), torch.optim.Adam(theirs, 0.1)
    for step in range(5):
        for parameters, optimizer in ((ours, adam), (theirs, official)):
            optimizer.zero_grad()
            a, b = parameters
            loss = (a * a * a).sum() if step < 2 else (a * a * a + b * b).sum()  # b 第三步才用到
            loss.backward()
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-12)


def test_constant_functions_have_zero_derivatives() -> None:
    x, v = np.array([1.0, 2.0]), np.array([1.0, -1.0])

    def constant(_: Any) -> Tensor:
        return Tensor(3.0)

    assert modes.hvp(constant, x, v).tolist() == [0.0, 0.0]
    assert modes.hvp_reverse_over_forward(constant, x, v).tolist() == [0.0, 0.0]
    assert modes.hessian(constant, x).tolist() == [[0.0, 0.0]] * 2
    assert gradcheck(lambda a: Tensor([1.0, 2.0]), [x]) == 0.0
    single = x.astype(np.float32)
    columns = modes.jacobian_by_columns(lambda a: a * a, single)
    assert columns.tolist() == [[2.0, 0.0], [0.0, 4.0]] and columns.dtype == np.float32
