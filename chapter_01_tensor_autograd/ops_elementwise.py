"""逐元素的算子，各带自己的 VJP。

本文件教什么：一个算子只要写两行，前向用 NumPy 算出结果，每个输入配一个把上游梯度 ``g`` 变成
对它的梯度的函数。VJP 里的 ``g * b``、``g.where(...)`` 都是 ``Tensor`` 的运算而不是 NumPy 的，
所以反向也能建图，二阶、三阶导数不用另写。导数用输出 ``y`` 表示更省事的，写成 ``lambda g, y``。
广播不必在这里操心：形状不符的梯度由引擎的 ``sum_to`` 求和还原。
对应 README 的「算子与 VJP」一节。

不可导点的约定：relu 与 abs 在 0 处取 0，maximum 的并列者各得一半，与 PyTorch 相同；clip 的边界取 1
（PyTorch 各版本不一）。
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from chapter_01_tensor_autograd.graph import Variable, record

Tensor = Any  # engine.Tensor；这里不导入它，避免循环
Operand = Any  # Tensor、Python 数或数组


def operands(name: str, a: Operand, b: Operand) -> tuple[Tensor, Tensor]:
    """把二元算子的两个操作数都变成张量：Python 数与数组随另一个的 dtype。

    异常:
        TypeError: 操作数不是数；整数或布尔张量遇上小数；两个张量的 dtype 不同（从不悄悄提升）。
    """
    if not (isinstance(a, Variable) and isinstance(b, Variable)):
        tensor, other = (a, b) if isinstance(a, Variable) else (b, a)
        numeric = (np.ndarray, np.generic)
        if not isinstance(other, (float, int)) and not (
            isinstance(other, numeric) and other.dtype.kind in "biuf"
        ):
            what = getattr(other, "dtype", type(other).__name__)
            raise TypeError(f"{name}：操作数应为 Tensor、实数或实数数组，实为 {what}")
        constant = tensor.wrap(_constant(other, tensor.data.dtype))
        a, b = (a, constant) if isinstance(a, Variable) else (constant, b)
    if a.data.dtype != b.data.dtype:
        raise TypeError(
            f"{name}：dtype 不同，{a.data.dtype} {a.data.shape} 与 {b.data.dtype} {b.data.shape}；"
            "请先用 astype 转成同一种"
        )
    return a, b


def _constant(value: Any, dtype: np.dtype) -> np.ndarray:
    """数随张量的 dtype；放不进整数张量的（小数、太大的数）保持原样，由 ``operands`` 报错。"""
    if dtype.kind == "f":
        return np.asarray(value, dtype)
    array = np.asarray(value)
    narrowed = array if array.dtype.kind == "f" else array.astype(dtype)
    return narrowed if (narrowed == array).all() else array


def compute(name: str, function: Callable[..., Any], a: Tensor, b: Tensor) -> Any:
    """二元的 NumPy 运算；不能广播时说清算子、形状与规则。"""
    try:
        return function(a.data, b.data)
    except ValueError:
        raise ValueError(
            f"{name}：形状 {a.data.shape} 与 {b.data.shape} 不能广播：从最后一维往前对齐，"
            "每一维要么相等，要么有一个是 1"
        ) from None


def float_dtype(x: Tensor) -> Any:
    """``x`` 的 dtype；整数与布尔则为 float64。"""
    return x.data.dtype if x.data.dtype.kind == "f" else np.dtype(float)


def same(g: Tensor) -> Tensor:
    """梯度原样通过。"""
    return g


# ---------------------------------------------------------------- 四则与乘方


def add(a: Operand, b: Operand) -> Tensor:
    """``y = a + b``，``∂y/∂a = ∂y/∂b = 1``。"""
    a, b = operands("add", a, b)
    return record("add", compute("add", np.add, a, b), (a, same), (b, same))


def sub(a: Operand, b: Operand) -> Tensor:
    """``y = a − b``，``∂y/∂a = 1``，``∂y/∂b = −1``。"""
    a, b = operands("sub", a, b)
    return record("sub", compute("sub", np.subtract, a, b), (a, same), (b, neg))


def mul(a: Operand, b: Operand) -> Tensor:
    """``y = ab``，``∂y/∂a = b``，``∂y/∂b = a``：各要记住对方。"""
    a, b = operands("mul", a, b)
    y = compute("mul", np.multiply, a, b)
    return record("mul", y, (a, lambda g: g * b), (b, lambda g: g * a))


def div(a: Operand, b: Operand) -> Tensor:
    """``y = a/b``，``∂y/∂a = 1/b``，``∂y/∂b = −a/b²``。"""
    a, b = operands("div", a, b)
    y = compute("div", np.divide, a, b)
    return record("div", y, (a, lambda g: g / b), (b, lambda g: -g * a / (b * b)))


def power(a: Operand, b: Operand) -> Tensor:
    """``y = aᵇ``，``∂y/∂a = b aᵇ⁻¹``，``∂y/∂b = aᵇ ln a``。

    ``b = 0`` 时对 ``a`` 的导数恒为 0；``a = 0`` 时对 ``b`` 的导数取 0（``b ≥ 0`` 时的极限）。
    """
    if isinstance(a, Variable) and isinstance(b, int | float):
        return _power_constant(a, b)
    a, b = operands("pow", a, b)
    y = compute("pow", np.power, a, b)
    no_slope, no_base = b.data == 0, (a.data == 0) & (b.data >= 0)

    def base(g: Tensor) -> Tensor:
        lowered = a.where(~no_slope, 1.0) ** (b - 1)  # b = 0 处换成 1，免得 0⁻¹ = inf
        return masked(g * b * lowered, ~no_slope)

    def exponent(g: Tensor) -> Tensor:
        positive = a.where(~no_base, 1.0)
        return masked(g * a**b * positive.log(), ~no_base)

    return record("pow", y, (a, base), (b, exponent))


def _power_constant(a: Tensor, b: float) -> Tensor:
    y = np.multiply(a.data, a.data) if b == 2 else np.power(a.data, b)

    def base(g: Tensor) -> Tensor:
        return masked(g, np.False_) if b == 0 else g * a ** (b - 1) * b

    return record("pow", y, (a, base))


def neg(x: Tensor) -> Tensor:
    """``y = −x``。"""
    return record("neg", -x.data, (x, lambda g: -g))


# ---------------------------------------------------------------- 初等函数


def exp(x: Tensor) -> Tensor:
    """``y = eˣ``，``y′ = y``。"""
    return record("exp", np.exp(x.data), (x, lambda g, y: g * y), save_output=True)


def log(x: Tensor) -> Tensor:
    """``y = ln x``，``y′ = 1/x``。"""
    return record("log", np.log(x.data), (x, lambda g: g / x))


def sqrt(x: Tensor) -> Tensor:
    """``y = √x``，``y′ = 1/(2y)``。"""
    return record("sqrt", np.sqrt(x.data), (x, lambda g, y: g / (y * 2.0)), save_output=True)


def sin(x: Tensor) -> Tensor:
    """``y = sin x``，``y′ = cos x``。"""
    return record("sin", np.sin(x.data), (x, lambda g: g * x.cos()))


def cos(x: Tensor) -> Tensor:
    """``y = cos x``，``y′ = −sin x``。"""
    return record("cos", np.cos(x.data), (x, lambda g: -g * x.sin()))


def tanh(x: Tensor) -> Tensor:
    """``y = tanh x``，``y′ = 1 − y²``。"""
    return record("tanh", np.tanh(x.data), (x, lambda g, y: g * (1.0 - y * y)), save_output=True)


def sigmoid(x: Tensor) -> Tensor:
    """``y = 1/(1 + e⁻ˣ)``，``y′ = y(1 − y)``；指数只取非正数，两端都不溢出。"""
    small = np.exp(-np.abs(x.data))
    y = np.where(x.data >= 0, 1.0, small).astype(small.dtype, copy=False) / (1.0 + small)
    return record("sigmoid", y, (x, lambda g, y: g * y * (1.0 - y)), save_output=True)


_erf = np.frompyfunc(math.erf, 1, 1)  # NumPy 没有 erf，逐个用标准库的


def erf(x: Tensor) -> Tensor:
    """误差函数 ``y = (2/√π) ∫₀ˣ e^{−t²} dt``，``y′ = (2/√π) e^{−x²}``。"""
    y = np.asarray(_erf(x.data)).astype(float_dtype(x))
    return record("erf", y, (x, lambda g: g * (-(x * x)).exp() * (2 / math.sqrt(math.pi))))


# ---------------------------------------------------------------- 分段的函数


def masked(g: Tensor, mask: np.ndarray) -> Tensor:
    """``mask`` 为真处不变，其余为 0；下面各个分段函数的 VJP。

    乘以掩码比逐个挑选快几倍，只有 ``inf × 0 = nan`` 时不对：``relu(x).sqrt()`` 在 ``x < 0`` 处的
    ``g`` 就是无穷大。
    """
    with np.errstate(invalid="ignore"):
        y = g.data * mask
    if not np.isfinite(y).all():
        y = np.where(mask, g.data, 0)
    return record("masked", y, (g, lambda gg: masked(gg, mask)))


def where(condition: Any, a: Operand, b: Operand) -> Tensor:
    """``condition`` 为真处取 ``a``，否则取 ``b``；梯度也照此分流。"""
    mask = condition.data.copy() if isinstance(condition, Variable) else np.asarray(condition)
    if mask.dtype != bool:
        raise TypeError(f"where：条件应为布尔数组，实为 {mask.dtype} {mask.shape}")
    a, b = operands("where", a, b)
    y = compute("where", lambda p, q: np.where(mask, p, q), a, b)
    return record("where", y, (a, lambda g: masked(g, mask)), (b, lambda g: masked(g, ~mask)))


def relu(x: Tensor) -> Tensor:
    """``y = max(0, x)``，``y′ = 1[x > 0]``。"""
    passes = ~(x.data <= 0)  # 不写 > 0：nan 的梯度照传，不悄悄变成 0
    return record("relu", np.maximum(x.data, 0), (x, lambda g: masked(g, passes)))


def absolute(x: Tensor) -> Tensor:
    """``y = |x|``，``y′ = sign x``。"""
    sign = np.sign(x.data)
    return record("abs", np.abs(x.data), (x, lambda g: g * sign))


def maximum(a: Operand, b: Operand) -> Tensor:
    """逐元素取大者；梯度给胜者，并列则各半。"""
    return _extremum("maximum", np.maximum, np.less, a, b)


def minimum(a: Operand, b: Operand) -> Tensor:
    """逐元素取小者；梯度给胜者，并列则各半。"""
    return _extremum("minimum", np.minimum, np.greater, a, b)


def _extremum(
    name: str, function: Callable[..., Any], loses: Callable[..., Any], a: Operand, b: Operand
) -> Tensor:
    a, b = operands(name, a, b)
    y = compute(name, function, a, b)
    share = np.where(a.data == b.data, 0.5, 1.0).astype(y.dtype)
    a_stays, b_stays = ~loses(a.data, b.data), ~loses(b.data, a.data)
    return record(
        name,
        y,
        (a, lambda g: masked(g * share, a_stays)),
        (b, lambda g: masked(g * share, b_stays)),
    )


def clip(x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """截断到 ``[low, high]``；界内（含边界）导数为 1，界外为 0。"""
    if low is None and high is None:
        raise ValueError("clip：low 与 high 至少给出一个")
    inside = np.ones(x.data.shape, dtype=bool)
    if low is not None:
        inside &= x.data >= low
    if high is not None:
        inside &= x.data <= high
    return record("clip", np.clip(x.data, low, high), (x, lambda g: masked(g, inside)))
