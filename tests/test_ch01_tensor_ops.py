"""第 1 章的内存布局：在随机形状、随机视图上与 PyTorch 的步幅、视图、广播、下标、einsum 比较。"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from chapter_01_tensor_autograd.tensor_ops import (
    broadcast_shapes,
    broadcast_strides,
    contiguous_strides,
    einsum_by_hand,
    gather_by_hand,
    parse_einsum,
    scatter_add_by_hand,
    strided_index,
    view_strides,
)
from tests.parity import assert_equal, normal

Rng = np.random.Generator
Shape = tuple[int, ...]


# ---------------------------------------------------------------- 随机的形状与视图


def random_shape(rng: Rng, low: int = 1, high: int = 4, dims: int = 4) -> Shape:
    return tuple(rng.integers(low, high + 1, rng.integers(0, dims + 1)).tolist())


def permuted(x: Tensor, rng: Rng) -> Tensor:
    return x.permute(rng.permutation(x.ndim).tolist())


def sliced(x: Tensor, rng: Rng) -> Tensor:
    if x.ndim == 0:
        return x
    dim = int(rng.integers(x.ndim))
    start = int(rng.integers(x.shape[dim]))
    return x[(slice(None),) * dim + (slice(start, None, int(rng.integers(1, 3))),)]


def expanded(x: Tensor, rng: Rng) -> Tensor:
    dim = int(rng.integers(x.ndim + 1))
    y = x.unsqueeze(dim)
    return y.expand(*y.shape[:dim], int(rng.integers(1, 4)), *y.shape[dim + 1 :])


def random_view(rng: Rng) -> tuple[list[float], Tensor]:
    """一条互不相同的数，以及它的一个随机视图（起点不为零，至多变换三次）。"""
    shape, offset = random_shape(rng), int(rng.integers(1, 4))
    storage = torch.arange(100.0, 100.0 + offset + math.prod(shape))
    view = storage[offset:].view(shape)
    for _ in range(rng.integers(0, 4)):
        view = (permuted, sliced, expanded)[rng.integers(3)](view, rng)
    return storage.tolist(), view


def regrouped(shape: Shape, rng: Rng) -> Shape:
    """元素个数相同的另一个形状：随机合并相邻的维、拆开能拆的维、插入 1。"""
    sizes = list(shape)
    for _ in range(rng.integers(1, 6)):
        kind, place = rng.integers(4), int(rng.integers(len(sizes) + 1))
        if kind == 0:
            sizes.insert(place, 1)
        elif kind == 1 and place < len(sizes):
            divisors = [d for d in range(1, sizes[place] + 1) if sizes[place] % d == 0]
            first = int(rng.choice(divisors))
            sizes[place : place + 1] = [first, sizes[place] // first]
        elif place + 1 < len(sizes):
            sizes[place : place + 2] = [sizes[place] * sizes[place + 1]]
    return tuple(sizes)


def matters(shape: Shape, strides: Shape) -> list[int]:
    """只有大小超过 1 的维，步幅才有意义。"""
    return [stride for size, stride in zip(shape, strides, strict=True) if size > 1]


# ---------------------------------------------------------------- 步幅与视图


def test_contiguous_strides_equal_torch() -> None:
    rng = np.random.default_rng(0)
    shapes = [random_shape(rng, low=0, dims=5) for _ in range(200)]
    assert any(0 in shape for shape in shapes) and any(1 in shape for shape in shapes)
    for shape in shapes:
        assert contiguous_strides(shape) == torch.empty(shape).stride(), shape
    assert contiguous_strides((2, 3, 4)) == (12, 4, 1)


def test_strided_index_reads_any_view() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        storage, view = random_view(rng)
        read = strided_index(storage, view.shape, view.stride(), view.storage_offset())
        assert read == view.flatten().tolist()


def test_strided_index_by_hand() -> None:
    storage = [10.0, 11.0, 12.0, 13.0, 14.0, 15.0]
    assert strided_index(storage, (3, 2), (1, 3)) == [10, 13, 11, 14, 12, 15]  # 转置
    assert strided_index(storage, (2,), (-2,), 5) == [15, 13]  # 负的步幅：倒序
    assert strided_index(storage, (), (), 4) == [14]
    assert strided_index(storage, (2, 0), (1, 1)) == []
    with pytest.raises(IndexError, match=r"下标 \(1, 2\) 落在 6，而存储只有 6 个元素"):
        strided_index(storage, (2, 3), (3, 1), 1)
    with pytest.raises(IndexError, match=r"下标 \(0,\) 落在 -1"):
        strided_index(storage, (2,), (1,), -1)


def test_view_strides_agree_with_torch_view() -> None:
    rng = np.random.default_rng(2)
    possible = {True: 0, False: 0}
    for _ in range(2000):
        _, view = random_view(rng)
        shape = regrouped(tuple(view.shape), rng)
        strides = view_strides(view.shape, view.stride(), shape)
        try:
            expected = view.view(shape)
        except RuntimeError:
            expected = None
        case = f"{tuple(view.shape)} {view.stride()} -> {shape}"
        assert (strides is None) == (expected is None), case
        possible[strides is not None] += 1
        if strides is not None:
            assert matters(shape, strides) == matters(shape, expected.stride()), case
            ours = torch.as_strided(view, shape, strides, view.storage_offset())
            assert torch.equal(ours, expected), case
    assert min(possible.values()) > 150  # 两种情形都多次遇到


@pytest.mark.parametrize(
    ("shape", "strides", "new_shape", "expected"),
    [
        ((2, 3), (3, 1), (6,), (1,)),
        ((3, 2), (1, 3), (6,), None),  # 转置之后不能压平
        ((3, 2), (1, 3), (3, 1, 2), (1, 6, 3)),
        ((4, 3), (6, 1), (2, 2, 3), (12, 6, 1)),  # 切掉了后一半列：拆行可以
        ((4, 3), (6, 1), (2, 6), None),
        ((2, 3), (0, 0), (6,), (0,)),  # 全是同一个数
        ((1, 1), (7, 9), (), ()),
        ((0, 3), (3, 1), (5, 0), (1, 1)),
    ],
)
def test_view_strides_by_hand(
    shape: Shape, strides: Shape, new_shape: Shape, expected: Shape | None
) -> None:
    assert view_strides(shape, strides, new_shape) == expected


def test_view_strides_without_or_with_other_elements() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        old, new = (0, *random_shape(rng, low=0)), (*random_shape(rng, low=0), 0)
        strides = view_strides(old, contiguous_strides(old), new)
        assert strides == torch.empty(old).view(new).stride()
    with pytest.raises(ValueError, match=r"\(2, 3\) 与 \(4,\) 的元素个数不同"):
        view_strides((2, 3), (3, 1), (4,))


# ---------------------------------------------------------------- 广播


def thinned(shape: Shape, rng: Rng) -> Shape:
    """能广播成 ``shape`` 的形状：缺几维，若干维换成 1。"""
    kept = shape[rng.integers(0, len(shape) + 1) :]
    return tuple(1 if rng.random() < 0.4 else size for size in kept)


def test_broadcast_shapes_agree_with_torch() -> None:
    rng = np.random.default_rng(4)
    refused = 0
    for round_ in range(400):
        if round_ % 2:
            shapes = [random_shape(rng, low=0, high=3, dims=3) for _ in range(2)]
        else:
            full = random_shape(rng, low=0)
            shapes = [thinned(full, rng) for _ in range(rng.integers(1, 4))]
        try:
            expected = tuple(torch.broadcast_shapes(*shapes))
        except RuntimeError:
            refused += 1
            with pytest.raises(ValueError, match="不能广播"):
                broadcast_shapes(*shapes)
        else:
            assert broadcast_shapes(*shapes) == expected, shapes
    assert refused > 50


def test_broadcast_strides_copy_nothing() -> None:
    rng = np.random.default_rng(5)
    for _ in range(300):
        storage, view = random_view(rng)
        ones = [size if rng.random() < 0.6 else 1 for size in view.shape]
        view = view[tuple(slice(n) for n in ones)]  # 把若干维切到只剩 1
        wider = [int(rng.integers(1, 4)) if n == 1 else n for n in ones]
        target = (*random_shape(rng, high=3, dims=2), *wider)
        strides = broadcast_strides(view.shape, view.stride(), target)
        expected = torch.broadcast_to(view, target)
        assert matters(target, strides) == matters(target, expected.stride())
        read = strided_index(storage, target, strides, view.storage_offset())
        assert read == expected.flatten().tolist()
    assert broadcast_strides((3, 1), (1, 1), (2, 3, 4)) == (0, 1, 0)


def test_broadcast_errors_name_the_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\)、\(4, 3\) 不能广播：.*\[2, 4\]"):
        broadcast_shapes((2, 3), (4, 3))
    for shape, target in [((2, 3), (3,)), ((3,), (1,)), ((1, 3), (3,))]:
        with pytest.raises(ValueError, match=r"不能广播成 \("):
            broadcast_strides(shape, contiguous_strides(shape), target)
    with pytest.raises(ValueError, match=r"\(2,\)、\(3,\) 不能广播"):
        broadcast_strides((2,), (1,), (3,))


# ---------------------------------------------------------------- 取与放


def test_gather_and_scatter_add_equal_torch() -> None:
    rng = np.random.default_rng(6)
    for round_ in range(60):
        shape = (int(rng.integers(1, 4)), *random_shape(rng, high=3, dims=2))
        dim = int(rng.integers(-len(shape), len(shape)))
        smaller = [int(rng.integers(1, size + 1)) for size in shape]
        smaller[dim] = int(rng.integers(1, 7))  # 沿 dim 可以更长，于是必有重复
        index = torch.from_numpy(rng.integers(0, shape[dim], smaller))
        x, source = normal(*shape, seed=round_), normal(*smaller, seed=round_ + 1000)
        before, gathered = x.clone(), gather_by_hand(x, dim, index)
        added = scatter_add_by_hand(x, dim, index, source)
        assert torch.equal(gathered, x.gather(dim, index))
        assert_equal(added, x.scatter_add(dim, index, source))
        assert torch.equal(x, before)
        # 互为转置：⟨gather(x), s⟩ = ⟨x, scatter_add(0, s)⟩
        assert torch.allclose((gathered * source).sum(), (x * (added - x)).sum())


def test_gather_and_scatter_add_by_hand() -> None:
    x, index = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2, 0, 2, 2]])
    assert gather_by_hand(x, 1, index).tolist() == [[3.0, 1.0, 3.0, 3.0]]
    source = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    assert scatter_add_by_hand(x, 1, index, source).tolist() == [[11.0, 2.0, 1104.0]]


# ---------------------------------------------------------------- einsum


def test_einsum_equals_torch_on_random_equations() -> None:
    rng = np.random.default_rng(7)
    repeated = scalar = only_one = 0
    for _ in range(300):
        sizes = dict(zip("ijkl", rng.integers(1, 4, 4).tolist(), strict=True))
        a, b = ("".join(rng.choice(list("ijkl"), rng.integers(n, 4))) for n in (1, 0))
        letters = rng.permutation(sorted(set(a + b))).tolist()
        output = "".join(letters[: rng.integers(0, len(letters) + 1)])
        equation = f"{a},{b}->{output}"
        # 逆序存放再转回来：操作数不连续
        x, y = (
            torch.from_numpy(np.asarray(rng.normal(size=[sizes[c] for c in names[::-1]])).T)
            for names in (a, b)
        )
        actual, expected = einsum_by_hand(equation, x, y), torch.einsum(equation, x, y)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
        repeated += len(set(a)) < len(a)
        scalar += not output
        only_one += any((c in a) != (c in b) and c not in output for c in a + b)
    assert min(repeated, scalar, only_one) > 50


def test_einsum_by_hand() -> None:
    a, b = torch.arange(-1.0, 5.0).view(3, 2)[1:], torch.tensor([5.0, 6.0])  # a 的起点不为零
    assert einsum_by_hand("ij, j -> i", a, b).tolist() == [17.0, 39.0]
    assert einsum_by_hand("ii,i->i", a, b).tolist() == [5.0, 24.0]  # 对角线
    assert einsum_by_hand("ij,k->", a, b).item() == 110.0  # 10 · 11
    assert parse_einsum("bi, oi -> bo") == ("bi", "oi", "bo")


@pytest.mark.parametrize(
    ("equation", "message"),
    [
        *((bad, f"{bad!r} 应形如") for bad in ("ij,jk", "ij->i", "i,j,k->i", "i1,j->j", "->")),
        ("i,j->ii", "输出 'ii' 里的字母不能重复"),
        ("i,j->k", "输出 'k' 里的字母不能重复，且都要在输入里出现"),
    ],
)
def test_einsum_rejects_bad_equations(equation: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_einsum(equation)


def test_einsum_rejects_operands_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"'ij' 有 2 个字母，张量是 \(3,\)"):
        einsum_by_hand("ij,j->i", torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match="字母 'j' 的大小不一致：3 与 4"):
        einsum_by_hand("ij,j->i", torch.ones(2, 3), torch.ones(4))


def test_a_comma_is_no_letter_and_indices_do_not_wrap_around() -> None:
    with pytest.raises(ValueError, match="应形如"):
        einsum_by_hand("i,j->i,j", torch.ones(2), torch.ones(3))
    x, index = torch.ones(2, 2), torch.tensor([[-1, 0]])
    for action in (
        lambda: gather_by_hand(x, 0, index),
        lambda: scatter_add_by_hand(x, 0, index, torch.ones(1, 2)),
    ):
        with pytest.raises(IndexError, match="下标 -1 超出第 0 维的范围 0 到 1"):
            action()
