"""``Tensor``：NumPy 数组上的自动微分，用法与 PyTorch 相同。

本文件教什么：把计算图（graph.py）与算子（ops_*.py）装成一个好用的类：运算符、方法、原地修改的规矩。
激活、损失、卷积等由这些算子组合而成，在 functional.py。对应 README 的「Tensor 的用法」一节。

    from chapter_01_tensor_autograd.engine import Tensor, no_grad, grad

    x = Tensor([[1.0, 2.0]], requires_grad=True)
    y = (x @ x.T).exp().sum()
    y.backward()
    print(x.grad)

与 PyTorch 的差别：不同 dtype 的张量不能直接运算（没有隐式提升）；``max``、``min`` 的并列者平分梯度
（同 ``torch.amax``）；视图被原地修改之后，共用内存的其他中间结果再参与运算会报错（PyTorch 则改写
它们的来历）。
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from chapter_01_tensor_autograd import ops_elementwise as elementwise
from chapter_01_tensor_autograd import ops_structure as structure
from chapter_01_tensor_autograd.graph import (
    Variable,
    backpropagate,
    grad,
    grad_mode,
    is_grad_enabled,
    no_grad,
    record,
    seed_for,
)

__all__ = ["Tensor", "as_tensor", "grad", "grad_mode", "no_grad"]

Dims = int | tuple[int, ...] | None
Operand = Any  # Tensor、Python 数或数组


class Tensor(Variable):
    """会求导的 NumPy 数组。

    参数:
        array: 数、（嵌套）列表、数组或另一个 ``Tensor``；总是复制，不复制用 ``as_tensor``。
        requires_grad: 是否要对它求导；这样的张量是计算图的叶子。
        dtype: 缺省时保持 ``array`` 的 dtype（Python 浮点数是 float64）。

    异常:
        TypeError: ``array`` 不是数；或要求对整数、布尔数组求导。
    """

    __slots__ = ()
    __array_ufunc__ = None  # 数组 * Tensor 交给 Tensor 处理

    def __init__(self, array: Any, requires_grad: bool = False, dtype: Any = None) -> None:
        data = np.array(array, dtype=dtype)
        if data.dtype.kind not in "biuf":
            raise TypeError(f"Tensor：dtype 应为实数或布尔，实为 {data.dtype}")
        super().__init__(data)
        if requires_grad:
            self.requires_grad_()

    # ------------------------------------------------------------ 属性

    shape = property(lambda self: self.data.shape, doc="各维的大小。")
    ndim = property(lambda self: self.data.ndim, doc="维数。")
    dtype = property(lambda self: self.data.dtype, doc="数据类型。")
    is_leaf = property(lambda self: self.grad_fn is None, doc="是否叶子：没有来历的张量。")

    @property
    def T(self) -> Tensor:
        """全部维倒序；二维就是转置。"""
        return self.permute(*reversed(range(self.ndim)))

    @property
    def mT(self) -> Tensor:
        """最后两维互换。"""
        return self.transpose(-1, -2)

    def numpy(self) -> np.ndarray:
        """底下的数组，共用内存；梯度不会穿过它，改动它引擎也不知道。"""
        return self.data

    def item(self) -> float:
        """只有一个元素时，取出这个数。"""
        if self.data.size != 1:
            raise ValueError(f"item：形状 {self.shape} 不止一个元素")
        return self.data.item()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.data, dtype) if copy else np.asarray(self.data, dtype)

    def __len__(self) -> int:
        if self.ndim == 0:
            raise TypeError("标量没有长度")
        return len(self.data)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __bool__(self) -> bool:
        return bool(self.data)

    def __repr__(self) -> str:
        body = np.array2string(self.data, prefix="Tensor(", separator=", ")
        history = f", grad_fn={self.grad_fn.name}" if self.grad_fn is not None else ""
        leaf = ", requires_grad=True" if self.requires_grad and self.is_leaf else ""
        return f"Tensor({body}, dtype={self.dtype}{history}{leaf})"

    # ------------------------------------------------------------ 求导

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """把叶子设为（不）要求梯度，返回自己。"""
        if not self.is_leaf:
            raise RuntimeError(
                f"requires_grad_：{self.grad_fn.name} 的结果不是叶子；要切断请用 detach"
            )
        if requires_grad and self.dtype.kind != "f":
            raise TypeError(f"requires_grad_：只有浮点张量才能求导，实为 {self.dtype} {self.shape}")
        self.requires_grad = self.storage.is_leaf = requires_grad
        return self

    def backward(
        self, grad: Operand = None, retain_graph: bool | None = None, create_graph: bool = False
    ) -> None:
        """反向传播，把梯度累加到图中每个叶子的 ``.grad``。

        参数:
            grad: 对自己的上游梯度，同形状、同 dtype；标量缺省为 1。
            retain_graph: 是否保留计算图以便再次反向；缺省同 ``create_graph``。
            create_graph: 反向本身也建图，``.grad`` 可以再求导。

        异常:
            ValueError: 不是标量又没有给 ``grad``，或 ``grad`` 的形状、dtype 不符。
            RuntimeError: 不在图里；图已释放；反向要用的张量被原地改过。
        """
        seed = seed_for(self, grad, "backward")
        if self.is_leaf:
            seed = seed.clone()
        retain = create_graph if retain_graph is None else retain_graph
        backpropagate(self, seed, None, retain, create_graph)

    def detach(self) -> Tensor:
        """同一块内存，没有来历：梯度到此为止。"""
        return self.wrap(self.data, self.storage)

    def clone(self) -> Tensor:
        """复制一份内存，梯度照常通过。"""
        return record("clone", self.data.copy(), (self, elementwise.same))

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> None:
        """反向到达这里时调用 ``hook(梯度)``；返回非 ``None`` 则以它代替梯度。"""
        if not self.requires_grad:
            raise RuntimeError(f"register_hook：形状 {self.shape} 的张量不要求梯度")
        vertex = self.grad_fn or self
        vertex.hooks = [*(vertex.hooks or ()), hook]

    def retain_grad(self) -> None:
        """让中间结果也留下 ``.grad``（叶子本来就有）。"""
        reference = weakref.ref(self)  # 账目不该反过来延长张量的寿命

        def keep(g: Tensor) -> None:
            tensor = reference()
            if tensor is not None:
                tensor.grad = g

        if not self.is_leaf:
            self.register_hook(keep)

    # ------------------------------------------------------------ 原地修改

    def _replace(self, name: str, result: Tensor) -> Tensor:
        """一切原地运算的共同做法：先照常算出 ``result``，再把数写进自己的内存，并接管它的来历。"""
        if is_grad_enabled() and self.requires_grad and self.storage.is_leaf:
            raise RuntimeError(
                f"{name}：要求梯度的叶子（及其视图）不能原地修改：更新参数请放进 no_grad()"
            )
        if result.shape != self.shape:
            raise ValueError(f"{name}：结果的形状 {result.shape} 放不进 {self.shape}")
        if not self.data.flags.writeable:
            raise RuntimeError(
                f"{name}：形状 {self.shape} 是广播或滑窗得到的只读视图，请先 clone()"
            )
        self.data[...] = result.data
        self._touch()
        if is_grad_enabled():  # 不记账时，来历照旧
            self.grad_fn, self.requires_grad = result.grad_fn, result.requires_grad
        return self

    def _touch(self) -> None:
        """内容变了：版本号加一。"""
        self.storage.version += 1
        self.recorded_at = self.storage.version

    def add_(self, other: Operand) -> Tensor:
        """原地 ``self += other``。"""
        return self._replace("add_", self + other)

    def sub_(self, other: Operand) -> Tensor:
        """原地 ``self −= other``。"""
        return self._replace("sub_", self - other)

    def mul_(self, other: Operand) -> Tensor:
        """原地 ``self *= other``。"""
        # 对 other 的梯度要用到自己原来的值，而内存马上就要改写
        before = self.clone() if getattr(other, "requires_grad", False) else self
        return self._replace("mul_", before * other)

    def copy_(self, other: Operand) -> Tensor:
        """原地换成 ``other``（可广播）。"""
        other = elementwise.operands("copy_", self, other)[1]
        return self._replace("copy_", other.expand(*self.shape))

    def zero_(self) -> Tensor:
        """原地清零。"""
        return self.copy_(0.0)

    def __setitem__(self, index: Any, value: Operand) -> None:
        index = structure.plain_index(index)
        part = np.asarray(self.data[index])
        value = elementwise.operands("setitem", self, value)[1]
        written = _is_same_memory(value, part) and self.recorded_at == self.storage.version - 1
        value = value.expand(*part.shape)
        if not (is_grad_enabled() and (self.requires_grad or value.requires_grad)):
            self.data[index] = value.data
            self._touch()
            return
        if written:  # ``x[index] += v`` 已经通过视图写好了，只差来历：其余的元素没有变
            self.recorded_at = self.storage.version
        mask = np.zeros(self.shape, dtype=bool)
        mask[index] = True
        self._replace("setitem", structure.scatter(value, index, self.shape).where(mask, self))

    __iadd__, __isub__, __imul__ = add_, sub_, mul_

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

    # 比较不可导，结果是布尔数组
    def __lt__(self, other: Operand) -> np.ndarray:
        return self.data < np.asarray(other)

    def __le__(self, other: Operand) -> np.ndarray:
        return self.data <= np.asarray(other)

    def __gt__(self, other: Operand) -> np.ndarray:
        return self.data > np.asarray(other)

    def __ge__(self, other: Operand) -> np.ndarray:
        return self.data >= np.asarray(other)

    # ------------------------------------------------------------ 方法（公式见 ops_*.py）

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
        return squares.sum(dims, keepdim) / (count - correction)

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

    def flatten(self, start: int = 0) -> Tensor:
        """从第 ``start`` 维起压成一维。"""
        return self.reshape(*self.shape[:start], -1)

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
        """换一种 dtype；梯度换回来。"""
        old = self.dtype
        y = self.data.astype(dtype)
        return record("astype", y, (self, lambda g: g.astype(old)), dtype=y.dtype)


def _is_same_memory(x: Tensor, part: np.ndarray) -> bool:
    """``x`` 是否恰好就是 ``part`` 那块内存。"""
    places = [(a.ctypes.data, a.shape, a.strides) for a in (x.data, part)]
    return places[0] == places[1]


def _flat(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    """``f(2, 3)`` 与 ``f((2, 3))`` 两种写法都接受。"""
    if len(arguments) == 1 and isinstance(arguments[0], Sequence):
        return tuple(arguments[0])
    return arguments


def as_tensor(array: Any) -> Tensor:
    """不复制地把数组包成 ``Tensor``（不要求梯度）；已是 ``Tensor`` 的原样返回。"""
    return array if isinstance(array, Tensor) else Tensor.wrap(np.asarray(array))
