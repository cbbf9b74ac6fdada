"""第 1 章的两种模式：对偶数逐条规则、雅可比、海森、牛顿法，与 torch.func 或手算的数比较。"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from chapter_01_tensor_autograd import modes
from chapter_01_tensor_autograd.engine import Tensor
from chapter_01_tensor_autograd.graph import is_grad_enabled
from chapter_01_tensor_autograd.modes import Dual
from utils import make_generator

# torch.func 的前向模式会间接用到已弃用的 torch.jit
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

Pair = tuple[np.ndarray, np.ndarray]
CONSTANTS: list[tuple[int, ...]] = [(2, 3), (3,), (2, 1), (), (4, 2, 3)]  # 后几种要广播


def uniform(*shape: int, seed: int = 0) -> np.ndarray:
    """0.3 到 2 之间：对数、除法、乘方都有定义。"""
    return np.asarray(np.random.default_rng(seed).uniform(0.3, 2, shape))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).normal(size=shape))


def torch_jvp(f: Callable[[Any], Any], x: np.ndarray, v: np.ndarray) -> Pair:
    y, tangent = torch.func.jvp(f, (torch.tensor(x),), (torch.tensor(v),))
    return y.numpy(), tangent.numpy()


def assert_close(actual: Any, expected: Any) -> None:
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- 对偶数的每条规则

RULES: dict[str, Callable[[Any], Any]] = {
    "add": lambda x: x + x.exp(),
    "sub": lambda x: x - x.sin(),
    "mul": lambda x: x * x.cos(),
    "div": lambda x: x.exp() / x,
    "matmul": lambda x: x @ x.reshape(3, 2),
    "neg": lambda x: -x,
    "square": lambda x: x**2,
    "root": lambda x: x**0.5,
    "reciprocal": lambda x: x**-1,
    "exp": lambda x: x.exp(),
    "log": lambda x: x.log(),
    "sin": lambda x: x.sin(),
    "cos": lambda x: x.cos(),
    "tanh": lambda x: x.tanh(),
    "relu": lambda x: (x - 1.0).relu(),
    "sum": lambda x: x.sum(),
    "sum dim": lambda x: x.sum(0),
    "sum keepdim": lambda x: x.sum(1, True) * x,
    "sum keyword": lambda x: x.sum(dim=-1, keepdim=True),
    "reshape": lambda x: x.reshape(3, 2),
    "flatten": lambda x: x.reshape(-1),
    "row": lambda x: x[1],
    "element": lambda x: x[1, 2] * x,
    "slice": lambda x: x[:, ::2],
    "number right": lambda x: ((x + 2.5) * 3 - 1) / 4,
    "number left": lambda x: 2.5 + 3 * x - (1 - x) + 4 / x,
    "composed": lambda x: ((x * x).sin() / (1 + x.exp())).tanh() @ (x.log() - x).reshape(3, 2),
}


@pytest.mark.parametrize("name", RULES)
def test_rule_equals_torch(name: str) -> None:
    f, x, v = RULES[name], uniform(2, 3), normal(2, 3, seed=1)
    assert (x < 1).any() and (x > 1).any()  # relu 的两侧都有
    for actual, expected in zip(modes.jvp(f, x, v), torch_jvp(f, x, v), strict=True):
        assert_close(actual, expected)


WITH_CONSTANT: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda x, c: x + c,
    "sub": lambda x, c: x - c,
    "mul": lambda x, c: x * c,
    "div": lambda x, c: x / c,
    "radd": lambda x, c: c + x,
    "rsub": lambda x, c: c - x,
    "rmul": lambda x, c: c * x,
    "rdiv": lambda x, c: c / x,
}


@pytest.mark.parametrize("shape", CONSTANTS)
@pytest.mark.parametrize("name", WITH_CONSTANT)
def test_array_constants_on_both_sides(name: str, shape: tuple[int, ...]) -> None:
    f, c = WITH_CONSTANT[name], uniform(*shape, seed=2)
    x, v = uniform(2, 3), normal(2, 3, seed=1)
    expected = torch_jvp(lambda t: f(t, torch.tensor(c)), x, v)
    constants = [c] if name.startswith("r") else [c, Tensor(c)]
    for constant in constants:
        actual = modes.jvp(lambda d, constant=constant: f(d, constant), x, v)
        assert_close(actual[0], expected[0])
        assert_close(actual[1], expected[1])


def test_matrix_constant() -> None:
    x, v, c = uniform(2, 3), normal(2, 3, seed=1), normal(3, 4, seed=2)
    expected = torch_jvp(lambda t: t @ torch.tensor(c), x, v)
    for constant in (c, Tensor(c)):
        y, tangent = modes.jvp(lambda d, constant=constant: d @ constant, x, v)
        assert_close(y, expected[0])
        assert_close(tangent, v @ c)


def test_dual_by_hand() -> None:
    x, y = Dual(Tensor(3.0), Tensor(1.0)), Dual(Tensor(2.0), Tensor(0.0))
    product, quotient = x * x * y, y / x
    assert (product.value.item(), product.tangent.item()) == (18.0, 12.0)  # ∂(x²y)/∂x = 2xy
    assert quotient.tangent.item() == pytest.approx(-2 / 9)
    assert product.shape == ()
    at_zero = Dual(Tensor([0.0, -1.0, 1.0]), Tensor([5.0, 6.0, 7.0])).relu()
    assert at_zero.tangent.numpy().tolist() == [0.0, 0.0, 7.0]


def test_dual_keeps_float32() -> None:
    x = Dual(Tensor(np.ones(2, np.float32)), Tensor(np.ones(2, np.float32)))
    y = (2 * x + 1) / (x.exp() - 3)
    assert y.value.dtype == y.tangent.dtype == np.float32


def test_mismatched_shapes() -> None:
    with pytest.raises(ValueError, match=r"取值 \(2,\) 与切向量 \(3,\) 的形状应相同"):
        Dual(Tensor(np.ones(2)), Tensor(np.ones(3)))
    with pytest.raises(ValueError, match=r"取值 \(2,\) 与切向量 \(1,\)"):
        modes.jvp(lambda x: x, np.ones(2), np.ones(1))
    with pytest.raises(ValueError, match="上游梯度"):
        modes.vjp(lambda x: x * x, np.ones(2), np.ones(3))


# ---------------------------------------------------------------- 一趟


@pytest.mark.parametrize("name", RULES)
def test_inner_product_identity(name: str) -> None:
    """⟨u, Jv⟩ = ⟨uᵀJ, v⟩：两种模式算的是同一个矩阵。"""
    f, x, v = RULES[name], uniform(2, 3), normal(2, 3, seed=1)
    y, forward = modes.jvp(f, x, v)
    u = normal(*y.shape, seed=2)
    again, backward = modes.vjp(f, x, u)
    assert_close(again, y)
    assert (u * forward).sum() == pytest.approx((backward * v).sum(), rel=1e-12)


def test_jvp_builds_no_graph() -> None:
    weight, seen = Tensor(normal(3, 3), requires_grad=True), []

    def f(x: Any) -> Any:
        assert not is_grad_enabled()
        seen.append((x @ weight).tanh())
        return seen[-1]

    modes.jvp(f, normal(2, 3, seed=1), normal(2, 3, seed=2))
    (y,) = seen
    assert y.value.grad_fn is None and y.tangent.grad_fn is None
    assert not (y.value.requires_grad or y.tangent.requires_grad)
    assert is_grad_enabled()
    with pytest.raises(ValueError, match="matmul"):  # 出错之后也恢复
        modes.jvp(f, normal(2, 5), normal(2, 5))
    assert is_grad_enabled()


# ---------------------------------------------------------------- 雅可比矩阵

VECTOR: dict[str, tuple[Callable[[Any, Any], Any], int, tuple[int, int]]] = {
    # (f(x, A), 输出宽度, A 的形状)，输入都是 (3,)
    "linear": (lambda x, a: x @ a, 4, (3, 4)),
    "tall": (lambda x, a: (x @ a).tanh() * (x * x).sum(), 5, (3, 5)),
    "wide": (lambda x, a: (x.exp() @ a) / x[0], 1, (3, 1)),
    "square": (lambda x, a: (x @ a).sin() * x - x**3, 3, (3, 3)),
}


@pytest.mark.parametrize("name", VECTOR)
def test_jacobians_equal_torch(name: str) -> None:
    f, width, shape = VECTOR[name]
    x, a = uniform(3), normal(*shape, seed=1)
    expected = torch.func.jacrev(lambda t: f(t, torch.tensor(a)))(torch.tensor(x)).numpy()
    assert expected.shape == (width, 3)
    for jacobian in (modes.jacobian_by_rows, modes.jacobian_by_columns):
        assert_close(jacobian(lambda t: f(t, Tensor(a)), x), expected)


def test_jacobians_need_vectors() -> None:
    x = np.ones(2)
    for jacobian in (modes.jacobian_by_rows, modes.jacobian_by_columns):
        with pytest.raises(ValueError, match=r"应为一维，实为形状 \(\)"):
            jacobian(lambda a: a.sum(), x)
        with pytest.raises(ValueError, match=r"应为一维，实为形状 \(1, 2\)"):
            jacobian(lambda a: a * 2.0, x[None])


def test_random_network() -> None:
    f = modes.random_network(3, 2, 7, make_generator(0))
    generator, x = make_generator(0), normal(3)
    first, second = (
        torch.randn(shape, generator=generator, dtype=torch.float64).numpy() / shape[0] ** 0.5
        for shape in ((3, 7), (7, 2))
    )
    assert_close(f(Tensor(x)).numpy(), np.tanh(x @ first) @ second)
    by_hand = (first * (1 - np.tanh(x @ first) ** 2) @ second).T
    assert_close(modes.jacobian_by_rows(f, x), by_hand)
    assert_close(modes.jacobian_by_columns(f, x), by_hand)


# ---------------------------------------------------------------- 二阶

SCALAR: dict[str, Callable[[Any, Any], Any]] = {
    "rosenbrock": lambda x, a: modes.rosenbrock(x),
    "quadratic": lambda x, a: (x * (x @ a)).sum(),
    "network": lambda x, a: ((x @ a).tanh() ** 2).sum(),
    "elementary": lambda x, a: (x.sin() * x.exp() / (1 + x * x)).sum() + x[0].log() * x[2],
}


@pytest.mark.parametrize("name", SCALAR)
def test_second_derivatives_equal_torch(name: str) -> None:
    f, x, v, a = SCALAR[name], uniform(3), normal(3, seed=1), normal(3, 3, seed=2)
    expected = torch.func.hessian(lambda t: f(t, torch.tensor(a)))(torch.tensor(x)).numpy()

    def ours(x: Any) -> Any:
        return f(x, Tensor(a))

    full = modes.hessian(ours, x)
    assert_close(full, expected)
    assert_close(full, full.T)
    assert_close(modes.hvp(ours, x, v), expected @ v)
    assert_close(modes.hvp_reverse_over_forward(ours, x, v), expected @ v)


# ---------------------------------------------------------------- 牛顿法与梯度下降


def test_rosenbrock_by_hand() -> None:
    x = np.array([-1.2, 1.0])
    value, gradient = modes.vjp(modes.rosenbrock, x, np.array(1.0))
    assert value == pytest.approx(24.2) and gradient == pytest.approx([-215.6, -88.0])
    assert modes.hessian(modes.rosenbrock, x) == pytest.approx(
        np.array([[1330.0, 480.0], [480.0, 200.0]])
    )
    assert modes.vjp(modes.rosenbrock, np.ones(2), np.array(1.0))[1].tolist() == [0.0, 0.0]


def test_newton_converges_quadratically() -> None:
    path = modes.newton(modes.rosenbrock, np.array([-1.2, 1.0]), 8)
    assert path.shape == (9, 2) and path[0].tolist() == [-1.2, 1.0]
    assert path[1] == pytest.approx([-1.17528, 1.38067], abs=1e-5)
    errors = np.linalg.norm(path - 1, axis=1)
    assert errors[-1] < 1e-12
    last = [(e, n) for e, n in zip(errors[:-1], errors[1:], strict=True) if 1e-7 < e < 0.2]
    assert len(last) >= 2 and all(after < 3 * before**2 for before, after in last), errors


def test_newton_needs_one_step_on_a_quadratic() -> None:
    root, b = normal(4, 4), normal(4, seed=1)
    a = root @ root.T + np.eye(4)
    path = modes.newton(lambda x: (x * (x @ a)).sum() * 0.5 - (x * b).sum(), normal(4, seed=2), 2)
    np.testing.assert_allclose(path[1], np.linalg.solve(a, b), rtol=1e-10)
    np.testing.assert_allclose(path[2], path[1], rtol=1e-10)


def test_gradient_descent_by_hand() -> None:
    start = np.array([5.0, -2.0])
    path = modes.gradient_descent(lambda x: x[0] ** 2 + x[1] ** 2 * 2, start, 3, lr=0.1)
    expected = [[5 * 0.8**k, -2 * 0.6**k] for k in range(4)]  # x ← (1 − 2η)x，y ← (1 − 4η)y
    np.testing.assert_allclose(path, expected, rtol=1e-14)
    assert start.tolist() == [5.0, -2.0]


def test_functions_without_curvature_or_without_input() -> None:
    x, v = np.array([0.0, 1.0]), np.array([1.0, 2.0])
    zero = np.zeros(2)
    for product in (modes.hvp, modes.hvp_reverse_over_forward):
        assert np.array_equal(product(lambda a: a.sum(), x, v), zero)  # 线性：没有二阶
    assert np.array_equal(modes.hessian(lambda a: a.sum() * 3.0, x), np.zeros((2, 2)))
    constant = Tensor([1.0, 2.0])
    assert np.array_equal(modes.jvp(lambda _: constant, x, v)[1], zero)
    assert np.array_equal(modes.vjp(lambda _: constant, x, v)[1], zero)
    assert np.array_equal(modes.jacobian_by_rows(lambda _: constant, x), np.zeros((2, 2)))
    value, tangent = modes.jvp(lambda a: a**0, x, v)
    assert value.tolist() == [1.0, 1.0] and tangent.tolist() == [0.0, 0.0]
