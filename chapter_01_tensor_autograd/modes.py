"""两种模式：前向（JVP）与反向（VJP），雅可比矩阵，海森向量积，牛顿法。

本文件教什么：同一个雅可比矩阵 ``J``，反向一趟得到各行的组合 ``uᵀJ``，前向一趟得到各列的组合
``Jv``；输出少用反向，输入少用前向。前向模式用对偶数写成，不建图，也不存中间结果。把两者套起来（或
反向两遍）就是海森矩阵乘向量，代价与一次梯度同阶，用不着造出矩阵。
对应 README 的「两种模式」与「高阶导数」两节。

函数 ``f`` 写成 ``Tensor`` 的方法与运算符（只用 ``Dual`` 也有的；常张量写在右边，如 ``x @ w``），
于是 ``Tensor`` 与 ``Dual`` 都能送进去。

维度约定：输入 ``(n,)``，输出 ``(m,)``，雅可比矩阵 ``(m, n)``。
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from chapter_01_tensor_autograd.engine import Tensor, grad, no_grad

Function = Callable[[Any], Any]  # Tensor -> Tensor，也接受 Dual


# ---------------------------------------------------------------- 对偶数


class Dual:
    """对偶数 ``a + bε``，``ε² = 0``：``f(a + bε) = f(a) + f′(a) b ε``。

    ``value`` 是取值，``tangent`` 是沿给定方向的导数，都是同形的 ``Tensor``；运算规则就是求导法则。
    """

    __array_ufunc__ = None

    def __init__(self, value: Tensor, tangent: Tensor) -> None:
        if value.shape != tangent.shape:
            raise ValueError(f"Dual：取值 {value.shape} 与切向量 {tangent.shape} 的形状应相同")
        self.value, self.tangent = value, tangent

    @property
    def shape(self) -> tuple[int, ...]:
        """取值的形状。"""
        return self.value.shape

    def _lift(self, other: Any) -> Dual:
        """常数的切向量是零。"""
        if isinstance(other, Dual):
            return other
        value = other if isinstance(other, Tensor) else Tensor(other, dtype=self.value.dtype)
        return Dual(value, Tensor(np.zeros(value.shape, self.value.dtype)))

    def _unary(self, y: Tensor, slope: Any) -> Dual:
        """``y = f(a)``，``slope = f′(a)``。"""
        return Dual(y, self.tangent * slope)

    def _linear(self, method: str, *args: Any) -> Dual:
        """线性映射：切向量照样变换。"""
        return Dual(getattr(self.value, method)(*args), getattr(self.tangent, method)(*args))

    def __add__(self, other: Any) -> Dual:
        other = self._lift(other)
        return Dual(self.value + other.value, self.tangent + other.tangent)

    def __mul__(self, other: Any) -> Dual:
        other = self._lift(other)
        tangent = self.tangent * other.value + self.value * other.tangent
        return Dual(self.value * other.value, tangent)

    def __truediv__(self, other: Any) -> Dual:
        other = self._lift(other)
        y = self.value / other.value
        return Dual(y, (self.tangent - y * other.tangent) / other.value)

    def __matmul__(self, other: Any) -> Dual:
        other = self._lift(other)
        tangent = self.tangent @ other.value + self.value @ other.tangent
        return Dual(self.value @ other.value, tangent)

    def __rmatmul__(self, other: Any) -> Dual:
        return self._lift(other) @ self

    def __pow__(self, power: float) -> Dual:
        slope = self.value ** (power - 1) * power if power else 0.0  # x⁰ 的导数处处为 0
        return self._unary(self.value**power, slope)

    def __neg__(self) -> Dual:
        return Dual(-self.value, -self.tangent)

    def __sub__(self, other: Any) -> Dual:
        return self + -self._lift(other)

    def __rsub__(self, other: Any) -> Dual:
        return -self + other

    def __rtruediv__(self, other: Any) -> Dual:
        return self._lift(other) / self

    __radd__, __rmul__ = __add__, __mul__

    def __getitem__(self, index: Any) -> Dual:
        return self._linear("__getitem__", index)

    def exp(self) -> Dual:
        """``eᵃ``。"""
        y = self.value.exp()
        return self._unary(y, y)

    def log(self) -> Dual:
        """``ln a``。"""
        return Dual(self.value.log(), self.tangent / self.value)

    def sin(self) -> Dual:
        """``sin a``。"""
        return self._unary(self.value.sin(), self.value.cos())

    def cos(self) -> Dual:
        """``cos a``。"""
        return self._unary(self.value.cos(), -self.value.sin())

    def tanh(self) -> Dual:
        """``tanh a``。"""
        y = self.value.tanh()
        return self._unary(y, 1.0 - y * y)

    def relu(self) -> Dual:
        """``max(0, a)``。"""
        mask = self.value.numpy() > 0
        return Dual(self.value.relu(), self.tangent.where(mask, 0.0))

    def sqrt(self) -> Dual:
        """``√a``。"""
        y = self.value.sqrt()
        return Dual(y, self.tangent / (y * 2.0))

    def sigmoid(self) -> Dual:
        """``1/(1 + e⁻ᵃ)``。"""
        y = self.value.sigmoid()
        return self._unary(y, y * (1.0 - y))

    def mean(self, dim: Any = None, keepdim: bool = False) -> Dual:
        """平均是线性的。"""
        return self._linear("mean", dim, keepdim)

    def sum(self, dim: Any = None, keepdim: bool = False) -> Dual:
        """求和是线性的。"""
        return self._linear("sum", dim, keepdim)

    def reshape(self, *shape: int) -> Dual:
        """形状变换是线性的。"""
        return self._linear("reshape", *shape)


# ---------------------------------------------------------------- 一趟


def jvp(f: Function, x: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """前向模式一趟：``(f(x), J v)``。代价约为求值的 2 至 3 倍，不存中间结果。"""
    with no_grad():
        y = f(Dual(Tensor(x), Tensor(v)))
    if not isinstance(y, Dual):  # 与输入无关的常数
        return y.numpy(), np.zeros_like(y.numpy())
    return y.value.numpy(), y.tangent.numpy()


def vjp(f: Function, x: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """反向模式一趟：``(f(x), uᵀ J)``。代价约为求值的 2 至 4 倍，要存下全部中间结果。"""
    leaf = Tensor(x, requires_grad=True)
    y = f(leaf)
    return y.numpy(), _pull_back(y, leaf, u)


def _pull_back(y: Tensor, leaf: Tensor, u: Any = None) -> np.ndarray:
    """``uᵀ ∂y/∂leaf``，保留计算图；``y`` 与 ``leaf`` 无关时为零。"""
    if not y.requires_grad:
        return np.zeros_like(leaf.numpy())
    (g,) = grad(y, leaf, u, retain_graph=True, allow_unused=True)
    return np.zeros_like(leaf.numpy()) if g is None else g.numpy()


# ---------------------------------------------------------------- 雅可比矩阵


def jacobian_by_rows(f: Function, x: np.ndarray) -> np.ndarray:
    """反向模式逐行：一次前向，m 次反向，每次给出 ``J`` 的一行。"""
    leaf = Tensor(x, requires_grad=True)
    y = f(leaf)
    _require_vectors(x, y)
    return np.stack([_pull_back(y, leaf, u) for u in np.eye(y.shape[0])])


def jacobian_by_columns(f: Function, x: np.ndarray) -> np.ndarray:
    """前向模式逐列：n 次前向，每次给出 ``J`` 的一列。"""
    _require_vectors(x)
    columns = [jvp(f, x, v)[1] for v in np.eye(x.shape[0], dtype=x.dtype)]
    _require_vectors(*columns)
    return np.stack(columns, axis=1)


def _require_vectors(*arrays: np.ndarray | Tensor) -> None:
    for array in arrays:
        if array.ndim != 1:
            raise ValueError(f"雅可比矩阵：输入与输出应为一维，实为形状 {array.shape}")


# ---------------------------------------------------------------- 二阶


def _gradient(f: Function, x: np.ndarray) -> tuple[Tensor, Tensor]:
    """叶子，以及还可以再求导的梯度；与 ``x`` 无关的 ``f`` 梯度为零。"""
    leaf = Tensor(x, requires_grad=True)
    y = f(leaf)
    g = None
    if y.requires_grad:
        (g,) = grad(y, leaf, create_graph=True, allow_unused=True)
    return leaf, Tensor(np.zeros_like(x)) if g is None else g


def hvp(f: Function, x: np.ndarray, v: np.ndarray) -> np.ndarray:
    """海森向量积 ``H v``，反向套反向：``∇(∇f · v) = H v``；``f`` 输出标量。"""
    leaf, g = _gradient(f, x)
    return _pull_back((g * Tensor(v)).sum(), leaf)


def hvp_reverse_over_forward(f: Function, x: np.ndarray, v: np.ndarray) -> np.ndarray:
    """海森向量积，反向套前向：先用对偶数得到方向导数 ``∇f · v``，再对它反向一次。"""
    leaf = Tensor(x, requires_grad=True)
    y = f(Dual(leaf, Tensor(v)))
    return _pull_back(y.tangent, leaf) if isinstance(y, Dual) else np.zeros_like(x)


def hessian(f: Function, x: np.ndarray) -> np.ndarray:
    """完整的海森矩阵 ``(n, n)``：梯度建一次图，再逐行反向。"""
    leaf, g = _gradient(f, x)
    return np.stack([_pull_back(g, leaf, e) for e in np.eye(x.shape[0])])


# ---------------------------------------------------------------- 牛顿法


def rosenbrock(x: Any) -> Any:
    """``(1 − x₀)² + 100 (x₁ − x₀²)²``：弯曲的窄谷，最小值 0 在 (1, 1)。"""
    return (1.0 - x[0]) ** 2 + (x[1] - x[0] ** 2) ** 2 * 100.0


def newton(f: Function, start: np.ndarray, steps: int) -> np.ndarray:
    """牛顿法 ``x ← x − H⁻¹ ∇f``，返回轨迹 ``(steps + 1, n)``；在极小值附近误差每步平方。"""
    path = [start]
    for _ in range(steps):
        x = path[-1]
        gradient = vjp(f, x, np.array(1.0))[1]
        path.append(x - np.linalg.solve(hessian(f, x), gradient))
    return np.stack(path)


def gradient_descent(f: Function, start: np.ndarray, steps: int, lr: float) -> np.ndarray:
    """梯度下降 ``x ← x − η ∇f``，返回轨迹 ``(steps + 1, n)``。"""
    path = [start]
    for _ in range(steps):
        path.append(path[-1] - lr * vjp(f, path[-1], np.array(1.0))[1])
    return np.stack(path)


def random_network(inputs: int, outputs: int, width: int, generator: torch.Generator) -> Function:
    """一个固定的两层 tanh 网络 ``(n,) -> (m,)``，用来比较两种模式的代价。"""

    def weight(rows: int, columns: int) -> Tensor:
        values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        return Tensor(values.numpy() / rows**0.5)

    first, second = weight(inputs, width), weight(width, outputs)
    return lambda x: (x @ first).tanh() @ second
