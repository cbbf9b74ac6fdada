"""标量引擎：一屏之内的完整自动微分。

本文件教什么：把每个数包成 ``Value``，运算时记下父结点与局部导数；反向时按拓扑序，把
``局部导数 × 上游梯度`` 加给父结点。其余的一切（张量、广播、高阶导数）都是在此之上的扩展，见
graph.py 与 engine.py。不涉及：向量化、高阶导数、``no_grad``。对应 README 的「标量引擎」一节。

父结点从不反过来记得子结点，图里没有环，于是损失一换成新的，旧图立刻由引用计数释放。若把反向写成
捉住自己输出的闭包（常见的写法），每个结点都在环上，只能等垃圾回收器一遍遍地找。
"""

from __future__ import annotations

import math

Number = float  # Python 的 int 与 float


class Value:
    """会求导的标量：``data`` 数值，``grad`` 损失对它的导数。

    至多两个父结点 ``left``、``right``，局部导数 ``d_left``、``d_right``。分成四个槽而不用元组，
    是因为每多一个容器，垃圾回收器就多扫描一个对象。
    """

    __slots__ = ("d_left", "d_right", "data", "grad", "left", "right")

    def __init__(
        self,
        data: Number,
        left: Value | None = None,
        d_left: Number = 0.0,
        right: Value | None = None,
        d_right: Number = 0.0,
    ) -> None:
        self.data, self.grad = data, 0.0
        self.left, self.d_left = left, d_left
        self.right, self.d_right = right, d_right

    # 三个原语与五个函数；其余的运算由它们组成

    def __add__(self, other: Value | Number) -> Value:
        if isinstance(other, Value):
            return Value(self.data + other.data, self, 1.0, other, 1.0)
        return Value(self.data + other, self, 1.0)

    def __mul__(self, other: Value | Number) -> Value:
        if isinstance(other, Value):
            return Value(self.data * other.data, self, other.data, other, self.data)
        return Value(self.data * other, self, other)

    def __pow__(self, power: Number) -> Value:
        slope = power * self.data ** (power - 1) if power else 0.0
        return Value(self.data**power, self, slope)

    def exp(self) -> Value:
        """``eˣ``，导数是它自己。"""
        y = math.exp(self.data)
        return Value(y, self, y)

    def log(self) -> Value:
        """``ln x``，导数 ``1/x``。"""
        return Value(math.log(self.data), self, 1 / self.data)

    def sin(self) -> Value:
        """``sin x``，导数 ``cos x``。"""
        return Value(math.sin(self.data), self, math.cos(self.data))

    def tanh(self) -> Value:
        """``y = tanh x``，导数 ``1 − y²``。"""
        y = math.tanh(self.data)
        return Value(y, self, 1 - y * y)

    def relu(self) -> Value:
        """``max(0, x)``，在 0 处导数取 0。"""
        return Value(max(self.data, 0.0), self, float(self.data > 0))

    def __neg__(self) -> Value:
        return self * -1.0

    def __sub__(self, other: Value | Number) -> Value:
        return self + (-other)

    def __rsub__(self, other: Number) -> Value:
        return -self + other

    def __truediv__(self, other: Value | Number) -> Value:
        return self * other**-1

    def __rtruediv__(self, other: Number) -> Value:
        return self**-1 * other

    __radd__, __rmul__ = __add__, __mul__

    def __repr__(self) -> str:
        return f"Value(data={self.data:.6g}, grad={self.grad:.6g})"

    def backward(self) -> None:
        """求 ``∂自己/∂x``：叶子的 ``grad`` 累加，中间结点的只是这一次的；不用递归，图多深都行。"""
        waiting: dict[Value, int] = {}  # 结点 -> 还有几条边的梯度没有到
        stack = [self]
        while stack:
            node = stack.pop()
            for parent in (node.left, node.right):
                if parent is not None:
                    if parent not in waiting:
                        waiting[parent] = 0
                        stack.append(parent)
                        if parent.left is not None:
                            parent.grad = 0.0  # 上一次反向留下的，不能再传一遍
                    waiting[parent] += 1
        self.grad = 1.0 if self.left is not None else self.grad + 1.0
        ready = [self]
        while ready:  # 下游都到齐的结点才轮到它：这就是拓扑序
            node = ready.pop()
            for parent, local in ((node.left, node.d_left), (node.right, node.d_right)):
                if parent is not None:
                    parent.grad += local * node.grad  # 用了几次就加几次
                    waiting[parent] -= 1
                    if not waiting[parent]:
                        ready.append(parent)
