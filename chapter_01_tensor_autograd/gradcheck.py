"""数值检查：用差分核对梯度，以及差分自己有多准。

本文件教什么：梯度写错了，训练往往照样收敛，只是差一些；唯一可靠的检查是与差分比较。差分的步长太大有
截断误差，太小有舍入误差，误差对步长的曲线是 U 形；最低点在哪里、有多低，由浮点格式决定。
对应 README 的「数值检查」一节。

参考: Squire, Trapp, 1998, SIAM Review 40(1)（复数步长）。
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from chapter_01_tensor_autograd.engine import Tensor, grad
from utils.seed import make_generator

Function = Callable[..., Tensor]  # 引擎张量 -> 引擎张量


class GradientError(AssertionError):
    """解析梯度与数值梯度不符。"""


def best_step(dtype: type, order: int) -> float:
    """误差 ``h^order + η/h`` 最小的步长的量级：``η^{1/(order+1)}``，η 为机器精度。"""
    return float(np.finfo(dtype).eps) ** (1 / (order + 1))


def forward_difference(f: Callable, x: np.ndarray, h: float) -> np.ndarray:
    """``(f(x + h) − f(x))/h``，``f`` 逐元素；截断误差 ``O(h)``。"""
    return (f(x + x.dtype.type(h)) - f(x)) / x.dtype.type(h)


def central_difference(f: Callable, x: np.ndarray, h: float) -> np.ndarray:
    """``(f(x + h) − f(x − h))/2h``，``f`` 逐元素；展开式的偶数次项抵消，截断误差 ``O(h²)``。"""
    step = x.dtype.type(h)
    return (f(x + step) - f(x - step)) / (2 * step)


def complex_step(f: Callable, x: np.ndarray, h: float) -> np.ndarray:
    """``Im f(x + ih)/h``：没有相减，就没有抵消，步长可以任意小；``f`` 须能接受复数。"""
    return np.imag(f(x + 1j * h)) / h


def numeric_gradient(f: Callable[[np.ndarray], float], x: np.ndarray, h: float) -> np.ndarray:
    """标量函数的梯度，逐个元素做中心差分：``2·x.size`` 次求值。"""
    gradient = np.empty_like(x)
    probe = x.copy()
    for index in np.ndindex(x.shape):
        probe[index] = x[index] + h
        above = f(probe)
        probe[index] = x[index] - h
        gradient[index] = (above - f(probe)) / (2 * h)
        probe[index] = x[index]
    return gradient


def gradcheck(
    function: Function,
    inputs: Sequence[np.ndarray],
    seed: int = 0,
    tolerance: float = 1e-6,
    h: float | None = None,
) -> float:
    """核对引擎对 ``function`` 的每个输入的梯度，返回最大相对误差。

    输出先与一个随机的张量作内积，变成标量：一次反向就同时查了雅可比矩阵的每一行（的随机组合）。

    参数:
        function: 引擎张量 -> 引擎张量。
        inputs: float64 的数组，量级在 1 左右；点要避开不可导处。
        tolerance: 允许的误差，相对于这个输入的梯度中最大的一个：各元素的梯度悬殊时，小的查不准。
        h: 差分的步长，缺省 ``best_step(float64, 2)`` ≈ 6e-6。

    异常:
        TypeError: 输入不是 float64（float32 的差分只有四五位有效数字，查不出什么）。
        GradientError: 误差超出允许的范围。
    """
    leaves, y, weight = _prepare(function, inputs, seed)
    h = best_step(np.float64, 2) if h is None else h
    gradients = _gradients(y, leaves, weight)
    floor, worst = _noise(y.numpy() * weight, h) / tolerance, 0.0
    for index, (x, g) in enumerate(zip(inputs, gradients, strict=True)):

        def scalar(probe: np.ndarray, index: int = index) -> float:
            return _weighted(function, inputs, {index: probe}, weight)

        expected = numeric_gradient(scalar, x, h)
        actual = np.zeros_like(x) if g is None else g.numpy()
        error = _relative(actual, expected, floor)
        worst = max(worst, error)
        if not error <= tolerance:
            place = np.unravel_index(np.abs(actual - expected).argmax(), x.shape)
            raise GradientError(
                f"第 {index} 个输入 {x.shape} 的梯度不对：相对误差 {error:.1e}，最大处在 "
                f"{tuple(map(int, place))}，解析 {actual[place]:.6g}，数值 {expected[place]:.6g}"
            )
    return worst


def directional_check(
    function: Function,
    inputs: Sequence[np.ndarray],
    directions: int = 5,
    seed: int = 0,
    tolerance: float = 1e-6,
) -> float:
    """大输入的检查：只沿几个随机方向 ``v`` 比较 ``⟨∇f, v⟩`` 与差分，每个方向两次求值。

    梯度有错而 ``⟨错误, v⟩ = 0`` 的概率为零，所以一个方向就能发现错误；代价与输入的大小无关。
    返回最大相对误差；不符时抛出 ``GradientError``。
    """
    leaves, y, weight = _prepare(function, inputs, seed)
    gradients = _gradients(y, leaves, weight)
    h = best_step(np.float64, 2)  # v 的每个分量约为 1，所以每个元素都走约一个最佳步长
    floor, worst = _noise(y.numpy() * weight, h) / tolerance, 0.0
    generator = make_generator(seed + 1)
    for _ in range(directions):
        vs = [_normal(x.shape, generator) for x in inputs]
        pairs = list(zip(inputs, vs, strict=True))
        up, down = (
            _weighted(function, inputs, {i: x + s * v for i, (x, v) in enumerate(pairs)}, weight)
            for s in (h, -h)
        )
        expected = np.array((up - down) / (2 * h))
        slopes = zip(gradients, vs, strict=True)
        actual = np.array(sum((g.numpy() * v).sum() for g, v in slopes if g is not None))
        error = _relative(actual, expected, floor)
        worst = max(worst, error)
        if not error <= tolerance:
            raise GradientError(
                f"方向导数不对：相对误差 {error:.1e}，解析 {actual:.6g}，数值 {expected:.6g}"
            )
    return worst


# ---------------------------------------------------------------- 公共部分


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> np.ndarray:
    return torch.randn(shape, generator=generator, dtype=torch.float64).numpy()


def _prepare(
    function: Function, inputs: Sequence[np.ndarray], seed: int
) -> tuple[list[Tensor], Tensor, np.ndarray]:
    """叶子、输出，以及与输出同形的随机权重。"""
    for index, x in enumerate(inputs):
        if not isinstance(x, np.ndarray) or x.dtype != np.float64:
            kind = getattr(x, "dtype", type(x).__name__)
            raise TypeError(f"第 {index} 个输入应为 float64 数组，实为 {kind}")
    leaves = [Tensor(x, requires_grad=True) for x in inputs]
    y = function(*leaves)
    return leaves, y, _normal(y.shape, make_generator(seed))


def _gradients(y: Tensor, leaves: list[Tensor], weight: np.ndarray) -> Sequence[Tensor | None]:
    """输出与 ``weight`` 的内积对各个叶子的梯度；无关的为 ``None``。"""
    if not y.requires_grad:
        return [None] * len(leaves)
    return grad(y, leaves, weight, allow_unused=True)


def _weighted(
    function: Function,
    inputs: Sequence[np.ndarray],
    replaced: dict[int, np.ndarray],
    weight: np.ndarray,
) -> float:
    """换掉若干输入，求输出与 ``weight`` 的内积。"""
    values = [Tensor(replaced.get(i, x)) for i, x in enumerate(inputs)]
    return float((function(*values).numpy() * weight).sum())


def _noise(terms: np.ndarray, h: float) -> float:
    """差分的舍入误差：``f`` 是 ``terms`` 之和，每项有相对误差 ε，除以步长 ``h``；留一个数量级。"""
    return 10 * float(np.finfo(np.float64).eps * np.abs(terms).sum()) / h


def _relative(actual: np.ndarray, expected: np.ndarray, floor: float) -> float:
    """最大的误差除以最大的数；分母至少为 ``floor``，因为梯度为零时差分也只是舍入误差。"""
    scale = max(float(np.abs(x).max(initial=0)) for x in (actual, expected))
    return float(np.abs(actual - expected).max(initial=0)) / max(scale, floor, 1e-300)
