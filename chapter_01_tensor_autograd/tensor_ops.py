"""张量的内存布局：步幅、视图、广播、下标与 einsum，都从"一维数组加步幅"出发重写一遍。

本文件教什么：张量是一条连续的数加上形状、步幅与起点；转置、切片、广播只改后三样，不碰数据；
``reshape`` 能不能不复制，看步幅就知道。这些函数用循环或下标写成，慢而直白，与 PyTorch 逐个相等。
不涉及：求导（见 graph.py）。对应 README 的「张量：一条数与几个步幅」一节。

步幅（stride）以元素为单位：沿某一维前进一格，在内存里跳过几个元素。
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Shape = Sequence[int]


def contiguous_strides(shape: Shape) -> tuple[int, ...]:
    """按行连续存放时的步幅：最后一维为 1，往前逐个乘上后一维的大小。"""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def strided_index(
    storage: Sequence[float], shape: Shape, strides: Shape, offset: int = 0
) -> list[float]:
    """按形状与步幅从一维的 ``storage`` 里读出全部元素（最后一维变化最快）。

    下标 ``(i₀, i₁, …)`` 的元素在 ``offset + Σ_d i_d · strides_d`` 处。

    异常:
        IndexError: 某个元素落在 ``storage`` 之外。
    """
    values = []
    for index in itertools.product(*map(range, shape)):
        place = offset + sum(i * s for i, s in zip(index, strides, strict=True))
        if not 0 <= place < len(storage):
            raise IndexError(f"下标 {index} 落在 {place}，而存储只有 {len(storage)} 个元素")
        values.append(storage[place])
    return values


def view_strides(shape: Shape, strides: Shape, new_shape: Shape) -> tuple[int, ...] | None:
    """不复制能否把 ``(shape, strides)`` 看成 ``new_shape``：能则返回新步幅，不能返回 ``None``。

    旧的各维先并成若干"内部连续"的组（外层步幅 = 内层步幅 × 内层大小），新的每一维须整个落在一组里。
    """
    if _count(shape) != _count(new_shape):
        raise ValueError(f"形状 {tuple(shape)} 与 {tuple(new_shape)} 的元素个数不同")
    if _count(shape) == 0:
        return contiguous_strides(new_shape)
    groups: list[list[int]] = []  # 每组 [元素个数, 最内层的步幅]
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if groups and groups[-1][1] == stride * size:
            groups[-1] = [groups[-1][0] * size, stride]
        else:
            groups.append([size, stride])
    result, remaining = [], list(groups)
    room, step = 1, 1  # 当前组里还剩多少个元素没有分到维；下一维的步幅
    for size in reversed(new_shape):  # 由内向外分配
        if room == 1 and size != 1:
            room, step = remaining.pop()
        if room % size:
            return None
        result.append(step)
        room, step = room // size, step * size
    return tuple(reversed(result))


def _count(shape: Shape) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


# ---------------------------------------------------------------- 广播


def broadcast_shapes(*shapes: Shape) -> tuple[int, ...]:
    """广播之后的形状：从最后一维对齐，每一维要么相等，要么是 1（缺的维当作 1）。

    异常:
        ValueError: 某一维既不相等也不是 1。
    """
    result = []
    for sizes in itertools.zip_longest(*(tuple(shape)[::-1] for shape in shapes), fillvalue=1):
        wanted = {size for size in sizes if size != 1}
        if len(wanted) > 1:
            listed = "、".join(str(tuple(shape)) for shape in shapes)
            raise ValueError(f"形状 {listed} 不能广播：有一维同时要求 {sorted(wanted)}")
        result.append(wanted.pop() if wanted else 1)
    return tuple(reversed(result))


def broadcast_strides(shape: Shape, strides: Shape, target: Shape) -> tuple[int, ...]:
    """把 ``(shape, strides)`` 广播到 ``target``：被复制的维步幅为 0，于是一个数也不用复制。"""
    if broadcast_shapes(shape, target) != tuple(target):
        raise ValueError(f"形状 {tuple(shape)} 不能广播成 {tuple(target)}")
    extra = len(target) - len(shape)
    kept = [
        0 if size == 1 and wanted != 1 else stride
        for size, stride, wanted in zip(shape, strides, target[extra:], strict=True)
    ]
    return (0,) * extra + tuple(kept)


# ---------------------------------------------------------------- 取与放


def gather_by_hand(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """``y[…, i, …] = x[…, index[…, i, …], …]``：除 ``dim`` 之外各维取自己的坐标。"""
    y = x.new_empty(index.shape)
    for place in _indices(index.shape):
        y[place] = x[_moved(place, dim, int(index[place]), x.shape)]
    return y


def scatter_add_by_hand(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """``gather`` 的转置：把 ``source`` 的每个元素加到 ``index`` 指的地方；重复的地方相加。"""
    y = x.clone()
    for place in _indices(index.shape):
        y[_moved(place, dim, int(index[place]), x.shape)] += source[place]
    return y


def _moved(place: tuple[int, ...], dim: int, to: int, shape: Shape) -> tuple[int, ...]:
    """把坐标 ``place`` 的第 ``dim`` 维换成 ``to``。"""
    if not 0 <= to < shape[dim]:
        raise IndexError(f"下标 {to} 超出第 {dim} 维的范围 0 到 {shape[dim] - 1}")
    moved = list(place)
    moved[dim] = to
    return tuple(moved)


def _indices(shape: Shape) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, shape))


# ---------------------------------------------------------------- einsum


def parse_einsum(equation: str) -> tuple[str, str, str]:
    """``"bi,oi->bo"`` -> ``("bi", "oi", "bo")``。

    异常:
        ValueError: 不是两个操作数，没有写出 ``->``，输出里的字母重复或没有出现在输入里。
    """
    text = equation.replace(" ", "")
    left, arrow, output = text.partition("->")
    operands = left.split(",")
    letters = "".join(operands)
    if not arrow or len(operands) != 2 or not f"{letters}{output}".isalpha():
        raise ValueError(f"einsum 的式子 {equation!r} 应形如 'bi,oi->bo'：两个操作数，只用字母")
    if len(set(output)) != len(output) or not set(output) <= set(letters):
        raise ValueError(f"einsum 的输出 {output!r} 里的字母不能重复，且都要在输入里出现")
    return operands[0], operands[1], output


def einsum_by_hand(equation: str, a: Tensor, b: Tensor) -> Tensor:
    """两个操作数的 einsum：相同的字母对齐，输出里没有的字母求和。

    照字面做：每个字母占一维，两个操作数都广播到全部字母上，逐元素相乘，再把不在输出里的字母加掉。
    时间与内存都是各字母大小之积（``"bi,oi->bo"`` 为 ``B·I·O``）；PyTorch 会换成一次矩阵乘法。

    参数:
        equation: 如 ``"bi,oi->bo"``；同一个操作数里重复的字母取对角线（如 ``"ii,i->i"``）。
        a, b: 与式子对应的张量。
    """
    names_a, names_b, output = parse_einsum(equation)
    summed = sorted((set(names_a) | set(names_b)) - set(output))
    letters = [*output, *summed]
    sizes: dict[str, int] = {}
    aligned = []
    for names, x in ((names_a, a), (names_b, b)):
        if len(names) != x.ndim:
            raise ValueError(f"einsum：{names!r} 有 {len(names)} 个字母，张量是 {tuple(x.shape)}")
        for name, size in zip(names, x.shape, strict=True):
            if sizes.setdefault(name, size) != size:
                raise ValueError(f"einsum：字母 {name!r} 的大小不一致：{sizes[name]} 与 {size}")
        unique = "".join(dict.fromkeys(names))
        x = _diagonal(names, x)
        present = [name for name in letters if name in unique]
        x = x.permute([unique.index(name) for name in present])
        shape = iter(x.shape)
        aligned.append(x.reshape([next(shape) if name in unique else 1 for name in letters]))
    product = aligned[0] * aligned[1]  # 广播到每个字母一维
    return product.sum(dim=tuple(range(len(output), len(letters)))) if summed else product


def _diagonal(names: str, x: Tensor) -> Tensor:
    """重复的字母只留一维：步幅相加，就是沿对角线走。"""
    shape = dict(zip(names, x.shape, strict=True))
    strides = dict.fromkeys(names, 0)
    for name, stride in zip(names, x.stride(), strict=True):
        strides[name] += stride
    return torch.as_strided(x, list(shape.values()), list(strides.values()), x.storage_offset())
