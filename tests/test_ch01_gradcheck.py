"""第 1 章的数值检查：差分各有各的阶；对的梯度放行，各种写错的梯度都抓得到。"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from chapter_01_tensor_autograd import functional as F
from chapter_01_tensor_autograd.engine import Tensor
from chapter_01_tensor_autograd.gradcheck import (
    GradientError,
    best_step,
    central_difference,
    complex_step,
    directional_check,
    forward_difference,
    gradcheck,
    numeric_gradient,
)
from chapter_01_tensor_autograd.graph import record

POINTS = np.array([0.7, -0.4, 1.9])
CHECKS = [gradcheck, directional_check]


def wave(x: np.ndarray) -> np.ndarray:
    return np.exp(x) * np.sin(x)


def wave_slope(x: np.ndarray) -> np.ndarray:
    return np.exp(x) * (np.sin(x) + np.cos(x))


def error_of(difference: Callable[..., np.ndarray], h: float, dtype: type = np.float64) -> float:
    """最大绝对误差；真值用 float64。"""
    estimate = difference(wave, POINTS.astype(dtype), h)
    assert estimate.dtype == dtype
    return float(np.abs(estimate - wave_slope(POINTS.astype(dtype).astype(np.float64))).max())


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# ---------------------------------------------------------------- 差分本身


@pytest.mark.parametrize(
    ("difference", "order", "constant"),
    [
        # 误差 ≈ 常数 · h^阶；f″ = 2eˣcos x，f‴ = 2eˣ(cos x − sin x)
        (forward_difference, 1, lambda x: 2 * np.exp(x) * np.cos(x) / 2),
        (central_difference, 2, lambda x: 2 * np.exp(x) * (np.cos(x) - np.sin(x)) / 6),
        (complex_step, 2, lambda x: 2 * np.exp(x) * (np.cos(x) - np.sin(x)) / 6),
    ],
)
def test_truncation_error(
    difference: Callable[..., np.ndarray], order: int, constant: Callable[..., np.ndarray]
) -> None:
    wide, narrow = error_of(difference, 1e-2), error_of(difference, 1e-3)
    assert math.log10(wide / narrow) == pytest.approx(order, abs=0.01)
    assert narrow == pytest.approx(np.abs(constant(POINTS)).max() * 1e-3**order, rel=0.01)


def test_rounding_error_grows_again_but_not_for_the_complex_step() -> None:
    for order, difference in enumerate((forward_difference, central_difference), start=1):
        bottom = error_of(difference, best_step(np.float64, order))
        assert error_of(difference, 1e-12) > 1e4 * bottom
    flat = [error_of(complex_step, h) for h in (1e-9, 1e-20, 1e-100, 1e-200)]
    assert max(flat) < 4e-15


@pytest.mark.parametrize(
    ("difference", "order"), [(forward_difference, 1), (central_difference, 2)]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_best_step_is_near_the_bottom(
    difference: Callable[..., np.ndarray], order: int, dtype: type
) -> None:
    h, eps = best_step(dtype, order), float(np.finfo(dtype).eps)
    bottom = error_of(difference, h, dtype)
    assert bottom < 10 * eps ** (order / (order + 1))  # 最低点的高度
    assert error_of(difference, 100 * h, dtype) > 20 * bottom
    assert error_of(difference, h / 1000, dtype) > 20 * bottom


def test_best_step_values() -> None:
    assert best_step(np.float64, 1) == 2.0**-26  # ε = 2⁻⁵²
    assert best_step(np.float64, 2) == pytest.approx(6.0555e-6, rel=1e-4)
    assert best_step(np.float32, 2) == pytest.approx(2 ** (-23 / 3))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (0,)])
def test_numeric_gradient(shape: tuple[int, ...]) -> None:
    x, weight, seen = normal(*shape), normal(*shape, seed=1), []

    def f(probe: np.ndarray) -> float:
        seen.append(probe.copy())
        return float((np.sin(probe) * weight).sum())

    before = x.copy()
    gradient = numeric_gradient(f, x, 1e-5)
    np.testing.assert_allclose(gradient, np.cos(x) * weight, rtol=0, atol=1e-9)
    assert gradient.shape == shape and np.array_equal(x, before)
    assert len(seen) == 2 * x.size
    moved = [np.flatnonzero(probe != x).tolist() for probe in seen]
    assert moved == [[i] for i in range(x.size) for _ in range(2)]  # 每次只动一个元素


# ---------------------------------------------------------------- 对的梯度

ROWS, MASK = np.array([2, 0, 2]), np.array([[True, False], [False, True], [True, True]])

RIGHT: dict[str, tuple[Callable[..., Tensor], list[np.ndarray]]] = {
    "scalar": (lambda a: a.exp(), [np.array(0.3)]),
    "broadcast": (lambda a, b: a * b + a / (b * b + 1), [normal(3, 1), normal(2, seed=1)]),
    "matmul": (lambda a, b: (a @ b).tanh(), [normal(4, 3), normal(3, 2, seed=1)]),
    "power": (lambda a: (a * a + 1) ** -1.5, [normal(3, 2)]),
    "elementary": (lambda a: a.sin() * a.cos() + (a * a + 1).log() + a.sigmoid(), [normal(5)]),
    "erf": (lambda a: F.gelu(a) + F.silu(a), [normal(4)]),
    "softmax": (lambda a: a.softmax(1) * a, [normal(3, 4)]),
    "logsumexp": (lambda a: a.logsumexp(0), [normal(3, 4)]),
    "variance": (lambda a: a.var(1) + a.mean(1), [normal(3, 4)]),
    "indexing": (lambda a: a[ROWS] ** 2, [normal(3, 2)]),
    "masking": (lambda a: F.where(MASK, a**2, a.exp()), [normal(3, 2)]),
    "shapes": (lambda a: a.permute(1, 0).reshape(2, 1, 3).expand(2, 4, 3) ** 2, [normal(3, 2)]),
    "concat": (lambda a, b: F.concat([a, b, a], 0).cumsum(0), [normal(2, 3), normal(1, 3)]),
    "conv2d": (F.conv2d, [normal(1, 2, 4, 4), normal(3, 2, 2, 2, seed=1), normal(3, seed=2)]),
    "loss": (lambda a: F.cross_entropy(a, np.array([1, 0, 3])), [normal(3, 4)]),
    "reused": (lambda a: a * a.exp() + a / (1 + a * a), [normal(3)]),
    "second unused": (lambda a, b: a**2, [normal(3), normal(2, seed=1)]),
    "empty": (lambda a, b: (a**2).sum() + b**2, [np.zeros((0, 3)), np.array(0.5)]),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", RIGHT)
def test_right_gradients_pass(check: Callable[..., float], name: str) -> None:
    function, inputs = RIGHT[name]
    before = [x.copy() for x in inputs]
    assert 0 <= check(function, inputs) < 1e-7
    assert all(np.array_equal(x, b) for x, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("check", CHECKS)
def test_returned_error_is_reproducible_and_depends_on_the_seed(
    check: Callable[..., float],
) -> None:
    function, inputs = RIGHT["matmul"]
    errors = [check(function, inputs, seed=seed) for seed in (0, 0, 1)]
    assert errors[0] == errors[1] != errors[2] and min(errors) > 0


# ---------------------------------------------------------------- 写错的梯度


def one_wrong_element(g: Tensor) -> Tensor:
    """只有第 (17, 33) 个元素错了千分之一。"""
    factor = np.ones(g.shape)
    factor[17, 33] = 1.001
    return g * factor


def wrong_rows(x: Tensor) -> Tensor:
    """取行：同一行取两次，反向却只赋值，不累加。"""

    def vjp(g: Tensor) -> Tensor:
        gx = np.zeros(x.shape)
        gx[ROWS] = g.numpy()
        return Tensor(gx)

    return record("rows", x.data[ROWS], (x, vjp))


def wrong_second(a: Tensor, b: Tensor) -> Tensor:
    y = a.data * b.data
    return record("mul", y, (a, lambda g: g * b), (b, lambda g: g * b))


WRONG: dict[str, tuple[Callable[..., Tensor], list[np.ndarray]]] = {
    "sign": (lambda x: record("cos", np.cos(x.data), (x, lambda g: g * x.sin())), [normal(4)]),
    "factor": (lambda x: record("square", x.data**2, (x, lambda g: g * x)), [normal(3, 2)]),
    "mean": (lambda x: record("mean", x.data.mean(), (x, lambda g: g.expand(5))), [normal(5)]),
    "slope": (
        lambda x: record("tanh", np.tanh(x.data), (x, lambda g, y: g * (1 - y)), save_output=True),
        [normal(3)],
    ),
    "one branch": (lambda x: x * x.detach(), [normal(3)]),
    "assigned, not added": (wrong_rows, [normal(3, 2)]),
    # 梯度的总和没有错，只是放错了位置：随机的权重才看得出来
    "misplaced": (lambda x: record("flip", x.data[::-1].copy(), (x, lambda g: g * 1)), [normal(4)]),
    "one element": (
        lambda x: record("exp", np.exp(x.data), (x, lambda g: one_wrong_element(g * x.exp()))),
        [np.sin(np.arange(40.0 * 50)).reshape(40, 50)],
    ),
    "second input": (wrong_second, [normal(3), normal(3, seed=1)]),
    "forgotten input": (lambda a, b: a * b.detach(), [normal(3), normal(3, seed=1)]),
    "broadcast": (
        lambda a, b: record("add", a.data + b.data, (a, lambda g: g * 1), (b, lambda g: g[0])),
        [normal(3, 2), normal(2, seed=1)],
    ),
    "nan": (lambda x: record("exp", np.exp(x.data), (x, lambda g: g * np.nan)), [normal(2)]),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_gradients_are_caught(check: Callable[..., float], name: str) -> None:
    with pytest.raises(GradientError, match="相对误差"):
        check(*WRONG[name])
    assert issubclass(GradientError, AssertionError)


def test_message_says_which_element() -> None:
    function, (x,) = WRONG["one element"]
    with pytest.raises(GradientError, match=r"第 0 个输入 \(40, 50\) .*最大处在 \(17, 33\)"):
        gradcheck(function, [x])
    for name in ("second input", "forgotten input", "broadcast"):
        with pytest.raises(GradientError, match="第 1 个输入"):
            gradcheck(*WRONG[name])


def test_message_shows_both_values() -> None:
    """``x²`` 在 3 处的导数写成了 3；权重 w 同乘两边。"""
    with pytest.raises(GradientError) as caught:
        gradcheck(WRONG["factor"][0], [np.array([3.0])])
    analytic, numeric = (float(text.split()[-1]) for text in str(caught.value).split("，")[-2:])
    assert numeric / analytic == pytest.approx(2, rel=1e-4)
    assert "相对误差 5.0e-01" in str(caught.value)


@pytest.mark.parametrize("check", CHECKS)
def test_tolerance_is_relative(check: Callable[..., float]) -> None:
    def slightly_wrong(x: Tensor) -> Tensor:
        return record("exp", np.exp(x.data), (x, lambda g: g * x.exp() * 1.0001))

    for scale in (1e-3, 1.0, 1e3):  # 与函数的单位无关
        inputs = [np.full(3, math.log(scale))]
        assert check(slightly_wrong, inputs, tolerance=2e-4) == pytest.approx(1e-4, rel=0.01)
        with pytest.raises(GradientError):
            check(slightly_wrong, inputs, tolerance=5e-5)


def test_step_is_used() -> None:
    """``h = 0.5`` 时中心差分把 eˣ 的导数放大 sinh(0.5)/0.5 倍。"""
    expected = 1 - 0.5 / math.sinh(0.5)
    error = gradcheck(lambda x: x.exp(), [np.array(0.3)], tolerance=1.0, h=0.5)
    assert error == pytest.approx(expected, rel=1e-9)


# ---------------------------------------------------------------- 代价与输入


def calls(check: Callable[..., float], size: int, **options: Any) -> int:
    """检查一个 ``size`` 个元素的函数时，函数被调用了几次。"""
    count = 0

    def f(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return x * x

    check(f, [normal(size)], **options)
    return count


def test_cost() -> None:
    assert calls(gradcheck, 30) - calls(gradcheck, 10) == 2 * 20
    assert calls(directional_check, 3000) == calls(directional_check, 3)
    more, fewer = (calls(directional_check, 30, directions=n) for n in (9, 4))
    assert more - fewer == 2 * 5


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    ("bad", "kind"),
    [(np.ones(2, np.float32), "float32"), (np.ones(2, int), "int64"), ([1.0, 2.0], "list")],
)
def test_only_float64_arrays(check: Callable[..., float], bad: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=f"第 1 个输入应为 float64 数组，实为 {kind}"):
        check(lambda a, b: a * b, [np.ones(2), bad])


@pytest.mark.parametrize("check", CHECKS)
def test_a_gradient_that_is_exactly_zero_is_no_false_alarm(check: Callable[..., float]) -> None:
    # softmax 之和恒为 1：差分只剩舍入误差
    x = np.array([0.3, -1.2, 2.0])
    assert check(lambda a: a.softmax(0).sum() * 50.0, [x]) < 1e-6
