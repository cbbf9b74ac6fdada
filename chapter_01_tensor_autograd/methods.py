"""``Tensor`` 的运算符与方法：把 ops_*.py 里的算子挂到类上。

本文件教什么：``a + b`` 就是 ``a.__add__(b)``，``x.sum()`` 就是 ``sum(x)``；由别的方法拼成的（mean、
var、transpose……）不必再写 VJP。公式都在 ops_*.py。对应 README 的「Tensor 的用法」一节。
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from chapter_01_tensor_autograd import ops_elementwise as elementwise
from chapter_01_tensor_autograd import ops_structure as structure
from chapter_01_tensor_autograd.graph import Variable, record
from chapter_01_tensor_autograd.ops_elementwise import Operand
from chapter_01_tensor_autograd.ops_structure import Dims

Tensor = Any  # engine.Tensor；这里不导入它，避免循环


def _comparison(sign: str, function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def compare(self: Tensor, other: Operand) -> np.ndarray:
        other = other if isinstance(other, Variable) else self.wrap(other)
        return elementwise.compute(sign, function, self, other)

    return compare


class Operators(Variable):
    """运算符与方法；``engine.Tensor`` 由它而来。"""

    __slots__ = ()
    __array_ufunc__ = None  # 数组 * Tensor 交给 Tensor 处理

    shape = property(lambda self: self.data.shape, doc="各维的大小。")
    ndim = property(lambda self: self.data.ndim, doc="维数。")
    dtype = property(lambda self: self.data.dtype, doc="数据类型。")

    # ------------------------------------------------------------ 运算符

    __add__ = __radd__ = elementwise.add
    __mul__ = __rmul__ = elementwise.mul
    __sub__, __truediv__, __pow__ = elementwise.sub, elementwise.div, elementwise.power
    __neg__, __matmul__, __getitem__ = elementwise.neg, structure.matmul, structure.getitem
    __abs__ = elementwise.absolute

    def __rsub__(self, other: Operand) -> Tensor:
        return elementwise.sub(other, self)

    def __rtruediv__(self, other: Operand) -> Tensor:
        return elementwise.div(other, self)

    def __rpow__(self, other: Operand) -> Tensor:
        return elementwise.power(other, self)

    def __rmatmul__(self, other: Operand) -> Tensor:
        return structure.matmul(other, self)

    # 逐元素比较，不可导，结果是布尔数组；作字典的键、放进集合时仍认对象本身
    __lt__, __le__ = _comparison("<", np.less), _comparison("<=", np.less_equal)
    __gt__, __ge__ = _comparison(">", np.greater), _comparison(">=", np.greater_equal)
    __eq__, __ne__ = _comparison("==", np.equal), _comparison("!=", np.not_equal)
    __hash__ = object.__hash__

    # ------------------------------------------------------------ 方法

    exp, log, sqrt = elementwise.exp, elementwise.log, elementwise.sqrt
    sin, cos, erf = elementwise.sin, elementwise.cos, elementwise.erf
    tanh, sigmoid, relu = elementwise.tanh, elementwise.sigmoid, elementwise.relu
    abs, pow, clip = elementwise.absolute, elementwise.power, elementwise.clip
    maximum, minimum = elementwise.maximum, elementwise.minimum
    sum, cumsum, sum_to = structure.summation, structure.cumsum, structure.sum_to
    softmax, logsumexp = structure.softmax, structure.logsumexp

    def where(self, condition: Any, other: Operand) -> Tensor:
        """条件为真处取自己，否则取 ``other``。"""
        return elementwise.where(condition, self, other)

    def mean(self, dim: Dims = None, keepdim: bool = False) -> Tensor:
        """平均。"""
        dims = structure.normalize_dims("mean", self, dim)
        count = int(np.prod([self.shape[d] for d in dims]))
        return self.sum(dims, keepdim) / count

    def var(self, dim: Dims = None, correction: int = 1, keepdim: bool = False) -> Tensor:
        """方差 ``Σ(x − x̄)²/(n − correction)``；缺省为无偏估计，同 ``torch.var``。"""
        dims = structure.normalize_dims("var", self, dim)
        count = int(np.prod([self.shape[d] for d in dims]))
        squares = (self - self.mean(dims, keepdim=True)) ** 2
        return squares.sum(dims, keepdim) / max(count - correction, 0)

    def max(self, dim: Dims = None, keepdim: bool = False) -> Tensor:
        """最大值；并列者平分梯度，同 ``torch.amax``。"""
        return structure.extremum("max", self, dim, keepdim)

    def min(self, dim: Dims = None, keepdim: bool = False) -> Tensor:
        """最小值；并列者平分梯度，同 ``torch.amin``。"""
        return structure.extremum("min", self, dim, keepdim)

    def log_softmax(self, dim: int) -> Tensor:
        """``x − logsumexp(x)``。"""
        return self - self.logsumexp(dim, keepdim=True)

    def reshape(self, *shape: Any) -> Tensor:
        """``reshape(2, 3)`` 或 ``reshape((2, 3))``；一维可写 −1。"""
        return structure.reshape(self, _flat(shape))

    def permute(self, *dims: Any) -> Tensor:
        """重排各维。"""
        return structure.permute(self, _flat(dims))

    def expand(self, *shape: Any) -> Tensor:
        """广播到 ``shape``，不占内存。"""
        return structure.expand(self, _flat(shape))

    def transpose(self, dim0: int, dim1: int) -> Tensor:
        """互换两维。"""
        dim0, dim1 = structure.normalize_dims("transpose", self, (dim0, dim1))
        order = list(range(self.ndim))
        order[dim0], order[dim1] = dim1, dim0
        return self.permute(*order)

    @property
    def T(self) -> Tensor:
        """全部维倒序；二维就是转置。"""
        return self.permute(*reversed(range(self.ndim)))

    @property
    def mT(self) -> Tensor:
        """最后两维互换。"""
        return self.transpose(-1, -2)

    def flatten(self, start: int = 0) -> Tensor:
        """从第 ``start`` 维起压成一维；标量成为一个元素。"""
        if not 0 <= start < max(self.ndim, 1):
            raise ValueError(f"flatten：start={start} 超出范围：形状 {self.shape}")
        return self.reshape(*self.shape[:start], math.prod(self.shape[start:]))

    def squeeze(self, dim: int) -> Tensor:
        """去掉长为 1 的第 ``dim`` 维。"""
        (dim,) = structure.normalize_dims("squeeze", self, dim)
        if self.shape[dim] != 1:
            raise ValueError(f"squeeze：形状 {self.shape} 的第 {dim} 维不是 1")
        return self.reshape(*self.shape[:dim], *self.shape[dim + 1 :])

    def unsqueeze(self, dim: int) -> Tensor:
        """在第 ``dim`` 维处插入长为 1 的一维。"""
        if not -self.ndim - 1 <= dim <= self.ndim:
            raise ValueError(f"unsqueeze：dim={dim} 超出范围：形状 {self.shape}")
        dim = dim % (self.ndim + 1)
        return self.reshape(*self.shape[:dim], 1, *self.shape[dim:])

    def flip(self, dim: int) -> Tensor:
        """沿第 ``dim`` 维倒序。"""
        (dim,) = structure.normalize_dims("flip", self, dim)
        return self[(slice(None),) * dim + (slice(None, None, -1),)]

    def gather(self, dim: int, index: Any) -> Tensor:
        """``y[i, j] = x[i, index[i, j]]``（``dim = 1`` 时），同 ``torch.gather``。"""
        return self[structure.take_along("gather", self, dim, index)]

    def scatter_add(self, dim: int, index: Any, source: Tensor) -> Tensor:
        """``y = x``，再 ``y[i, index[i, j]] += source[i, j]``，同 ``torch.scatter_add``。"""
        where = structure.take_along("scatter_add", self, dim, index)
        return self + structure.scatter(source, where, self.shape)

    def astype(self, dtype: Any) -> Tensor:
        """换一种 dtype；梯度换回来，换成整数、布尔则不再有梯度。"""
        old = self.dtype
        y = self.data.astype(dtype)
        if y.dtype.kind != "f":  # 取整不可导，到此为止
            return self.wrap(y)
        return record("astype", y, (self, lambda g: g.astype(old)), dtype=y.dtype)


def _flat(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    """``f(2, 3)`` 与 ``f((2, 3))`` 两种写法都接受。"""
    if len(arguments) == 1 and isinstance(arguments[0], Sequence):
        return tuple(arguments[0])
    return arguments
