"""``Tensor``：NumPy 数组上的自动微分，用法与 PyTorch 相同。

本文件教什么：把计算图（graph.py）与算子（ops_*.py）装成一个好用的类：求导的接口，原地修改的规矩。
运算符与方法在 methods.py；激活、损失、卷积等由这些算子组合而成，在 functional.py。
对应 README 的「Tensor 的用法」一节。

    from chapter_01_tensor_autograd.engine import Tensor, no_grad, grad

    x = Tensor([[1.0, 2.0]], requires_grad=True)
    y = (x @ x.T).exp().sum()
    y.backward()
    print(x.grad)

与 PyTorch 的差别：不同 dtype 的张量不能直接运算（没有隐式提升）；``max``、``min`` 的并列者平分梯度
（同 ``torch.amax``）；通过一个视图原地写入之后，共用内存的其他张量再参与运算会报错（PyTorch 则
改写它们的来历）。
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from chapter_01_tensor_autograd import ops_elementwise as elementwise
from chapter_01_tensor_autograd import ops_structure as structure
from chapter_01_tensor_autograd.graph import (
    backpropagate,
    grad,
    grad_mode,
    is_grad_enabled,
    no_grad,
    record,
    seed_for,
)
from chapter_01_tensor_autograd.methods import Operators
from chapter_01_tensor_autograd.ops_elementwise import Operand

__all__ = ["Tensor", "as_tensor", "grad", "grad_mode", "no_grad"]


def _in_place(name: str, operator: Callable[..., Tensor], doc: str) -> Callable[..., Tensor]:
    """由算子 ``operator`` 得到它的原地形式。"""
    linear = operator in (elementwise.add, elementwise.sub)

    def method(self: Tensor, other: Operand) -> Tensor:
        # 反向若要用到自己原来的值，先留一份：内存马上就要改写
        saved = getattr(other, "requires_grad", False) or operator is elementwise.power
        before = self.clone() if saved and not linear and is_grad_enabled() else self
        return self._replace(name, operator(before, other))

    method.__doc__ = doc
    return method


class Tensor(Operators):
    """会求导的 NumPy 数组。

    参数:
        array: 数、（嵌套）列表、数组或另一个 ``Tensor``；总是复制，不复制用 ``as_tensor``。
        requires_grad: 是否要对它求导；这样的张量是计算图的叶子。
        dtype: 缺省时保持 ``array`` 的 dtype（Python 浮点数是 float64）。

    异常:
        TypeError: ``array`` 不是数；或要求对整数、布尔数组求导。
    """

    __slots__ = ()

    def __init__(self, array: Any, requires_grad: bool = False, dtype: Any = None) -> None:
        data = np.array(array, dtype=dtype)
        if data.dtype.kind not in "biuf":
            raise TypeError(f"Tensor：dtype 应为实数或布尔，实为 {data.dtype}")
        super().__init__(data)
        if requires_grad:
            self.requires_grad_()

    # ------------------------------------------------------------ 属性

    is_leaf = property(lambda self: self.grad_fn is None, doc="是否叶子：没有来历的张量。")

    def numpy(self) -> np.ndarray:
        """底下的数组，共用内存；梯度不会穿过它，改动它引擎也不知道。"""
        return self.data

    def item(self) -> float:
        """只有一个元素时，取出这个数。"""
        if self.data.size != 1:
            raise ValueError(f"item：形状 {self.shape} 不止一个元素")
        return self.data.item()

    def __float__(self) -> float:
        return float(self.item())

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
        if requires_grad != self.requires_grad:
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
        """同一块内存，没有来历：梯度到此为止，内容以后怎样改都不必追究。"""
        x = self.wrap(self.data, self.storage)
        x.recorded_at = math.inf
        return x

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
                tensor.grad = g.clone() if tensor.grad is None else tensor.grad + g

        if not self.is_leaf and not self.hooks:
            self.hooks = [keep]  # 原地修改之后，要跟到新的来历上去
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
        self._check_writeable(name)
        self.data[...] = result.data
        self._touch()
        if is_grad_enabled():  # 不记账时，来历照旧
            kept = self.hooks if not self.is_leaf else None
            if kept:
                self.grad_fn.hooks = [hook for hook in self.grad_fn.hooks if hook not in kept]
            self.grad_fn, self.requires_grad = result.grad_fn, result.requires_grad
            self.recorded_at = self.storage.version
            if result.requires_grad:
                self.storage.tracked = self.storage.version
                if kept:
                    self.grad_fn.hooks = [*(self.grad_fn.hooks or ()), *kept]
        return self

    def _check_writeable(self, name: str) -> None:
        if not self.data.flags.writeable:
            raise RuntimeError(
                f"{name}：形状 {self.shape} 是广播或滑窗得到的只读视图，请先 clone()"
            )

    def _touch(self) -> None:
        """内容变了：版本号加一；来历本来就不对的，不会因此变对。"""
        in_step = self.recorded_at == self.storage.version
        self.storage.version += 1
        if in_step:
            self.recorded_at = self.storage.version

    add_ = _in_place("add_", elementwise.add, "原地 ``self += other``。")
    sub_ = _in_place("sub_", elementwise.sub, "原地 ``self −= other``。")
    mul_ = _in_place("mul_", elementwise.mul, "原地 ``self *= other``。")
    div_ = _in_place("div_", elementwise.div, "原地 ``self /= other``。")
    pow_ = _in_place("pow_", elementwise.power, "原地 ``self **= other``。")
    __iadd__, __isub__, __imul__, __itruediv__, __ipow__ = add_, sub_, mul_, div_, pow_

    def copy_(self, other: Operand) -> Tensor:
        """原地换成 ``other``（可广播）。"""
        other = elementwise.operands("copy_", self, other)[1]
        return self._replace("copy_", other.expand(*self.shape))

    def zero_(self) -> Tensor:
        """原地清零。"""
        return self.copy_(0)

    def __setitem__(self, index: Any, value: Operand) -> None:
        index = structure.plain_index(index)
        part = structure.take("setitem", self.data, index)
        value = elementwise.operands("setitem", self, value)[1]
        written = _is_same_memory(value, part) and self.recorded_at == self.storage.version - 1
        value = value.expand(*part.shape)
        self._check_writeable("setitem")
        if written:  # ``x[index] += v`` 已经通过视图写好了，只差来历：其余的元素没有变
            self.recorded_at = self.storage.version
        if not (is_grad_enabled() and (self.requires_grad or value.requires_grad)):
            self.data[index] = value.data
            self._touch()
            return
        written_by = np.full(self.shape, -1)  # 每处最后写入的是 value 的第几个；-1 是没有写
        written_by[index] = order = np.arange(part.size).reshape(part.shape)
        value = value.where(written_by[index] == order, 0.0)  # 写了几次的，只有最后一次算数
        scattered = structure.scatter(value, index, self.shape)
        self._replace("setitem", scattered.where(written_by >= 0, self))


def _is_same_memory(x: Tensor, part: np.ndarray) -> bool:
    """``x`` 是否恰好就是 ``part`` 那块内存。"""
    places = [(a.ctypes.data, a.shape, a.strides) for a in (x.data, part)]
    return places[0] == places[1]


def as_tensor(array: Any) -> Tensor:
    """不复制地把数组包成 ``Tensor``（不要求梯度）；已是 ``Tensor`` 的原样返回。"""
    return array if isinstance(array, Tensor) else Tensor.wrap(np.asarray(array))
