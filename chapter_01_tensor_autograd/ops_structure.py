"""改变形状、取下标、求和与矩阵乘法的算子，各带自己的 VJP。

本文件教什么：这些算子成对出现，互为对方的 VJP。复制（expand）对求和（sum_to），
取出（getitem）对放回（scatter），滑窗（windows）对叠加（fold），转置对转置。理由只有一个：
它们都是线性映射，VJP 就是转置的那个矩阵。对应 README 的「算子与 VJP」一节。

参数名随 PyTorch：``dim``、``keepdim``。
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from chapter_01_tensor_autograd.graph import Variable, record
from chapter_01_tensor_autograd.ops_elementwise import float_dtype, operands, same

Tensor = Any  # engine.Tensor；这里不导入它，避免循环
Dims = int | tuple[int, ...] | None


def normalize_dims(name: str, x: Tensor, dim: Dims) -> tuple[int, ...]:
    """把 ``dim``（负数、元组或 ``None`` 表示全部）变成非负、不重复的元组。"""
    dims = tuple(range(x.ndim)) if dim is None else (dim,) if np.ndim(dim) == 0 else tuple(dim)
    if any(not -x.ndim <= d < x.ndim for d in dims):
        raise ValueError(f"{name}：dim={dim} 超出范围：形状 {x.shape} 只有 {x.ndim} 维")
    dims = tuple(d % x.ndim for d in dims)
    if len(set(dims)) != len(dims):
        raise ValueError(f"{name}：dim={dim} 有重复的维：形状 {x.shape}")
    return dims


def view(name: str, y: np.ndarray, x: Tensor, vjp: Any) -> Tensor:
    """与 ``record`` 相同，但结果可能与 ``x`` 共用内存，那时也共用版本号。"""
    out = record(name, y, (x, vjp))
    if np.may_share_memory(out.data, x.data):
        out.storage, out.recorded_at = x.storage, x.recorded_at
    return out


# ---------------------------------------------------------------- 形状


def reshape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """换个形状看同一串数；能不复制就不复制。"""
    old = x.shape
    try:
        y = x.data.reshape(shape)
    except ValueError:
        raise ValueError(f"reshape：形状 {old} 有 {x.data.size} 个元素，排不成 {shape}") from None
    return view("reshape", y, x, lambda g: g.reshape(old))


def permute(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """重排各维；VJP 是逆排列。"""
    if len(dims) != x.ndim:
        raise ValueError(f"permute：{dims} 应是 0 到 {x.ndim - 1} 的一个排列：形状 {x.shape}")
    dims = normalize_dims("permute", x, dims)
    inverse = tuple(int(d) for d in np.argsort(dims))
    return view("permute", x.data.transpose(dims), x, lambda g: g.permute(inverse))


def expand(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """广播到 ``shape``（只读的视图，不占内存）；VJP 是求和。"""
    try:
        y = np.broadcast_to(x.data, shape)
    except ValueError:
        raise ValueError(f"expand：形状 {x.shape} 不能广播成 {shape}") from None
    return view("expand", y, x, same)  # 形状不符的梯度由引擎求和


def sum_to(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """广播的逆：把被复制出来的各份加回去，得到形状 ``shape``。"""
    extra = x.ndim - len(shape)
    ones = tuple(d + extra for d, size in enumerate(shape) if size == 1 and x.shape[d + extra] != 1)
    y = x.data.sum(axis=(*range(extra), *ones), keepdims=True).reshape(shape)
    old = x.shape
    return record("sum_to", y, (x, lambda g: g.expand(old)))


def concat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """沿已有的一维首尾相接；VJP 是各自切回去。"""
    if not tensors:
        raise ValueError("concat：至少要一个张量")
    (dim,) = normalize_dims("concat", tensors[0], dim)
    for x in tensors[1:]:
        operands("concat", tensors[0], x)  # 都是张量，dtype 相同
    try:
        y = np.concatenate([x.data for x in tensors], axis=dim)
    except ValueError:
        shapes = "、".join(str(x.shape) for x in tensors)
        raise ValueError(f"concat：形状 {shapes} 除第 {dim} 维外应全部相同") from None
    edges, start = [], 0
    for x in tensors:
        window = (slice(None),) * dim + (slice(start, start + x.shape[dim]),)
        edges.append((x, lambda g, window=window: g[window]))
        start += x.shape[dim]
    return record("concat", y, *edges)


def pad(x: Tensor, widths: Sequence[tuple[int, int]]) -> Tensor:
    """四周补零：``widths`` 是每一维 (前, 后) 各补几个；VJP 是切掉补上的。"""
    if len(widths) != x.ndim or min(min(pair) for pair in widths) < 0:
        raise ValueError(f"pad：{list(widths)} 应为形状 {x.shape} 的每一维给出两个非负整数")
    inner = tuple(slice(before, before + n) for (before, _), n in zip(widths, x.shape, strict=True))
    return record("pad", np.pad(x.data, widths), (x, lambda g: g[inner]))


# ---------------------------------------------------------------- 下标


def plain_index(index: Any) -> tuple[Any, ...]:
    """下标化为元组，其中整数、切片、``None``、``...`` 之外的（列表、张量）都复制成数组。"""
    parts = index if isinstance(index, tuple) else (index,)
    return tuple(_plain_part(part) for part in parts)


def _plain_part(part: Any) -> Any:
    if part is None or part is Ellipsis or isinstance(part, int | slice):
        return part
    if isinstance(part, np.integer):
        return int(part)
    array = np.asarray(part).copy()
    return array if array.size else array.astype(bool if array.dtype == bool else int)


def take(name: str, data: np.ndarray, index: tuple[Any, ...]) -> np.ndarray:
    """``data[index]``；取出单个元素时也是 0 维的视图，而不是一个数。"""
    try:
        part = data[index]
    except IndexError as error:
        shown = index[0] if len(index) == 1 else index
        raise IndexError(f"{name}：形状 {data.shape} 的张量没有下标 {shown!r}（{error}）") from None
    return part if isinstance(part, np.ndarray) else data[(*index, ...)]


def getitem(x: Tensor, index: Any) -> Tensor:
    """``x[index]``，下标同 NumPy；VJP 是放回原处，其余为 0。"""
    index, shape = plain_index(index), x.shape
    y = take("getitem", x.data, index)
    return view("getitem", y, x, lambda g: scatter(g, index, shape))


def scatter(g: Tensor, index: tuple[Any, ...], shape: tuple[int, ...]) -> Tensor:
    """造一个 ``shape`` 的零张量，把 ``g`` 加到 ``index`` 处；同一处取过几次就加几次。"""
    y = np.zeros(shape, dtype=g.data.dtype)
    if any(isinstance(part, np.ndarray) and part.dtype != bool for part in index):
        np.add.at(y, index, g.data)
    else:
        y[index] = g.data  # 切片与掩码取出的位置互不相同
    return record("scatter", y, (g, lambda gg: gg[index]))


def take_along(name: str, x: Tensor, dim: int, index: Any) -> tuple[Any, ...]:
    """``gather`` 与 ``scatter_add`` 的下标：除 ``dim`` 之外各维取自己的坐标。"""
    index = index.data if isinstance(index, Variable) else np.asarray(index)
    (dim,) = normalize_dims(name, x, dim)
    if index.dtype.kind not in "iu" or index.ndim != x.ndim:
        raise TypeError(f"{name}：下标应为 {x.ndim} 维的整数数组，实为 {index.dtype} {index.shape}")
    grid = list(np.indices(index.shape, sparse=True))
    grid[dim] = index
    return tuple(grid)


# ---------------------------------------------------------------- 归约


def _restored(y: Tensor, dims: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """给归约的结果补回长为 1 的维，于是可以与原张量广播。"""
    return y.reshape(tuple(1 if d in dims else n for d, n in enumerate(shape)))


def summation(x: Tensor, dim: Dims = None, keepdim: bool = False) -> Tensor:
    """求和；VJP 是复制。"""
    dims, shape = normalize_dims("sum", x, dim), x.shape
    y = x.data.sum(axis=dims, keepdims=keepdim)
    return record("sum", y, (x, lambda g: _restored(g, dims, shape).expand(shape)))


def extremum(name: str, x: Tensor, dim: Dims, keepdim: bool) -> Tensor:
    """``name`` 为 max 或 min；梯度给取到最值的元素，并列者平分。"""
    dims, shape = normalize_dims(name, x, dim), x.shape
    if math.prod(shape[d] for d in dims) == 0:
        raise ValueError(f"{name}：形状 {shape} 沿 {dims} 没有元素，最值没有定义")
    y = (np.max if name == "max" else np.min)(x.data, axis=dims, keepdims=True)
    share = (x.data == y).astype(float_dtype(x))
    share /= share.sum(axis=dims, keepdims=True)
    y = y if keepdim else y.squeeze(dims)
    return record(name, y, (x, lambda g: _restored(g, dims, shape) * share))


def logsumexp(x: Tensor, dim: Dims = None, keepdim: bool = False) -> Tensor:
    """``y = ln Σ eˣ``，先减去最大值，因此不溢出；``∂y/∂x = e^{x−y}`` 正是 softmax。"""
    dims, shape = normalize_dims("logsumexp", x, dim), x.shape
    top = x.data.max(axis=dims, keepdims=True) if x.data.size else 0.0
    top = np.where(np.isfinite(top), top, 0)  # 全是 -inf 时，-inf - (-inf) 没有意义
    y = np.log(np.exp(x.data - top).sum(axis=dims, keepdims=True)) + top
    y = y if keepdim else y.squeeze(dims)

    def vjp(g: Tensor, y: Tensor) -> Tensor:
        return _restored(g, dims, shape) * (x - _restored(y, dims, shape)).exp()

    return record("logsumexp", y, (x, vjp), save_output=True)


def softmax(x: Tensor, dim: int) -> Tensor:
    """``y_i = e^{x_i} / Σ_j e^{x_j}``；VJP 为 ``y ⊙ (g − Σ_i g_i y_i)``，不必造出雅可比矩阵。"""
    (dim,) = normalize_dims("softmax", x, dim)
    y = np.exp(x.data - (x.data.max(axis=dim, keepdims=True) if x.data.size else 0.0))
    y /= y.sum(axis=dim, keepdims=True)
    return record(
        "softmax", y, (x, lambda g, y: y * (g - (g * y).sum(dim, True))), save_output=True
    )


def cumsum(x: Tensor, dim: int) -> Tensor:
    """沿 ``dim`` 的前缀和；VJP 是后缀和。"""
    (dim,) = normalize_dims("cumsum", x, dim)
    y = x.data.cumsum(axis=dim)
    return record("cumsum", y, (x, lambda g: g.flip(dim).cumsum(dim).flip(dim)))


# ---------------------------------------------------------------- 矩阵乘法与滑窗


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``y = ab``，批维可广播；``∂L/∂a = g bᵀ``，``∂L/∂b = aᵀ g``。一维的当作行、列向量。"""
    a, b = operands("matmul", a, b)
    if a.ndim == 0 or b.ndim == 0:
        raise ValueError(f"matmul：操作数不能是标量：形状 {a.shape} 与 {b.shape}")
    if a.ndim == 1:
        return (a.reshape(1, -1) @ b).squeeze(-2 if b.ndim > 1 else 0)
    if b.ndim == 1:
        return (a @ b.reshape(-1, 1)).squeeze(-1)
    try:
        y = a.data @ b.data
    except ValueError:
        raise ValueError(
            f"matmul：形状 {a.shape} 与 {b.shape} 不能相乘：前者的最后一维应等于后者的倒数第二维，"
            "其余各维可以广播"
        ) from None
    return record("matmul", y, (a, lambda g: g @ b.mT), (b, lambda g: a.mT @ g))


def windows(x: Tensor, kernel: tuple[int, int], stride: int, dilation: int) -> Tensor:
    """滑窗 ``(B, C, H, W) -> (B, C, OH, OW, KH, KW)``：只改步幅的只读视图，一个数也不复制。"""
    reach = tuple(dilation * (k - 1) + 1 for k in kernel)
    if min(stride, dilation) < 1:
        raise ValueError(f"windows：步幅 {stride} 与膨胀 {dilation} 应为正整数")
    if x.ndim != 4 or x.shape[2] < reach[0] or x.shape[3] < reach[1]:
        raise ValueError(f"windows：形状 {x.shape} 应为四维，且不小于窗口 {reach}")
    y = sliding_window_view(x.data, reach, axis=(2, 3))
    y, shape = y[:, :, ::stride, ::stride, ::dilation, ::dilation], x.shape
    return view("windows", y, x, lambda g: fold(g, shape, stride, dilation))


def fold(g: Tensor, shape: tuple[int, ...], stride: int, dilation: int) -> Tensor:
    """``windows`` 的转置：把每个窗口加回它所在的位置，重叠处相加。"""
    y = np.zeros(shape, dtype=g.data.dtype)
    rows, columns, height, width = g.shape[2:]
    for i in range(height):
        for j in range(width):
            top, left = i * dilation, j * dilation
            bottom, right = top + stride * (rows - 1) + 1, left + stride * (columns - 1) + 1
            y[:, :, top:bottom:stride, left:right:stride] += g.data[..., i, j]
    kernel = (height, width)
    return record("fold", y, (g, lambda gg: windows(gg, kernel, stride, dilation)))
