"""张量内存的实测：字节数都可以手算，逐一核对。"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from utils.memory import TensorMemory

KB = 4000  # 1000 个 float32


def vector(requires_grad: bool = False) -> Tensor:
    """1000 个 float32。"""
    return torch.ones(1000, requires_grad=requires_grad)


# ---------------------------------------------------------------- 新的张量


@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        (torch.bool, 1),
        (torch.int8, 1),
        (torch.float16, 2),
        (torch.bfloat16, 2),
        (torch.float32, 4),
        (torch.int64, 8),
        (torch.float64, 8),
        (torch.complex64, 8),
    ],
)
def test_bytes_follow_the_dtype(dtype: torch.dtype, width: int) -> None:
    with TensorMemory() as memory:
        made = torch.zeros(3, 7, dtype=dtype)
        assert (memory.live, memory.peak) == (21 * width, 21 * width)
        del made
        assert (memory.live, memory.peak) == (0, 21 * width)


def test_every_way_of_making_a_tensor_counts() -> None:
    x = vector()
    makers = {
        "empty": lambda: torch.empty(1000),
        "arange": lambda: torch.arange(500),
        "clone": x.clone,
        "cast": x.half().float,
        "like": lambda: torch.randn_like(x),
        "operator": lambda: x + 1,
        "matmul": lambda: x[:, None] @ torch.ones_like(x)[:1, None],
        "cat": lambda: torch.cat([x[:400], x[400:]]),
        "with gaps": lambda: torch.empty_strided((334,), (3,)),  # 存储里有空隙
        "copy": x.view(10, 100).mT.contiguous,
    }
    for name, make in makers.items():
        with TensorMemory() as memory:
            kept = make()
            assert memory.live == KB, name
        del kept
        assert memory.live == 0, name


def test_all_outputs_of_one_operator_count() -> None:
    x = vector()
    with TensorMemory() as memory:
        values, indices = x.sort()
        assert memory.live == KB + 2 * KB  # float32 与 int64
        del indices
        assert memory.live == KB
        parts = values.split(300)  # 四个视图
        assert len(parts) == 4 and memory.live == KB


def test_empty_tensors_and_scalars() -> None:
    with TensorMemory() as memory:
        nothing = [torch.empty(0), torch.zeros(3, 0), torch.cat([torch.empty(0)] * 2)]
        assert (memory.live, memory.peak) == (0, 0)
        one = torch.zeros(())
        assert memory.live == 4
        expanded = one.expand(1000)  # 步长为 0
        assert memory.live == 4
    assert len(nothing) == 3 and expanded.sum() == 0


# ---------------------------------------------------------------- 不占新内存的


def test_views_and_in_place_operations_are_free() -> None:
    with TensorMemory() as memory:
        x = vector()
        views = [x.view(10, 100), x[::2], x.view(10, 100).mT, x.detach(), x[None], x.unbind()[3]]
        x.add_(1).mul_(2)
        x[5:10] = 0
        torch.exp(x, out=x)
        assert (memory.live, memory.peak) == (KB, KB)
        del x
        assert memory.live == KB  # 视图还留着这块存储
        views.pop()
        assert memory.live == KB
        views.clear()
        assert memory.live == 0


def test_earlier_tensors_do_not_count_even_when_returned() -> None:
    x, hidden = vector(), vector()
    with TensorMemory() as memory:
        kept = [x.float(), x.contiguous(), x.view(-1), x[3:], x.add_(1), x.detach(), x.to("cpu")]
        kept.append(hidden[::2])
        assert (memory.live, memory.peak) == (0, 0)
        total = x + hidden
        assert memory.live == KB
        del x, hidden, total
        assert memory.live == 0
        kept.clear()  # 以前的张量在里面释放，不该减成负数
        assert memory.live == 0
        again = vector()  # 很可能分到同一个地址
        assert memory.live == KB
    assert again.sum() == 1000


def test_freed_memory_is_forgotten_exactly() -> None:
    with TensorMemory() as memory:
        for i in range(50):  # 地址反复重用
            x = torch.full((1000,), float(i))
            assert memory.live == KB
            del x
            assert memory.live == 0
        assert memory.peak == KB


# ---------------------------------------------------------------- 峰值


def test_peak_includes_temporaries() -> None:
    x = vector()
    with TensorMemory() as memory:
        y = ((x + 1) * 2).sum()
        assert (memory.live, memory.peak) == (4, 2 * KB)  # 求和时第一个已经释放
        a, b = x + 1, x + 2
        assert (memory.live, memory.peak) == (4 + 2 * KB, 4 + 2 * KB)
        del a
        c = x + 3
        assert memory.peak == 4 + 2 * KB
    assert y + b.sum() + c.sum() == 4000 + 3000 + 4000


def test_reset_peak_starts_from_what_is_alive() -> None:
    with TensorMemory() as memory:
        kept, gone = vector(), torch.ones(5000)
        del gone
        assert memory.peak == 6 * KB
        memory.reset_peak()
        assert (memory.live, memory.peak) == (KB, KB)
        more = kept * 2
        del more
        assert (memory.live, memory.peak) == (KB, 2 * KB)


def test_mebibytes() -> None:
    with TensorMemory() as memory:
        big = torch.zeros(2**19)
        del big
        small = torch.zeros(2**17)
    assert (memory.live_mib, memory.peak_mib) == (0.5, 2.0)
    del small
    assert memory.live_mib == 0


# ---------------------------------------------------------------- 自动求导


def test_saved_activations_live_until_backward() -> None:
    w = vector(requires_grad=True)
    with TensorMemory() as memory:
        y = w.exp()  # 保存输出
        z = y * y
        loss = z.sum()
        assert memory.live == 2 * KB + 4
        del z  # 求和只记形状
        assert memory.live == KB + 4
        del y  # 图还留着它
        assert memory.live == KB + 4
        loss.backward()
        assert memory.live == KB + 4  # 换成了 w.grad
        assert memory.peak >= 3 * KB
        del loss
        assert memory.live == KB
        w.grad = None
        assert memory.live == 0


def test_activations_are_freed_with_the_graph() -> None:
    w = vector(requires_grad=True)
    with TensorMemory() as memory:
        loss = w.exp().sin().sum()
        assert memory.live == KB + 4  # sin 的输入就是 exp 的输出
        del loss
        assert memory.live == 0
        with torch.no_grad():
            total = w.exp().sin().sum()
        assert memory.live == 4
    assert total > 0


def test_gradients_accumulate_in_place() -> None:
    w = vector(requires_grad=True)
    with TensorMemory() as memory:
        for _ in range(3):
            (w * 2).sum().backward()
            assert memory.live == KB
        w.grad.zero_()
        assert memory.live == KB
    with TensorMemory() as later:
        (w * 2).sum().backward()  # 梯度早已分配好
        assert later.live == 0 < later.peak
    w.grad = None
    assert memory.live == later.live == 0


# ---------------------------------------------------------------- with 的边界


def test_tensors_freed_after_the_block() -> None:
    with TensorMemory() as memory:
        a, b = vector(), torch.zeros(10)
    assert memory.live == KB + 40
    outside = vector()  # 块外的不计
    assert (memory.live, memory.peak) == (KB + 40, KB + 40)
    del a
    assert memory.live == 40
    del b, outside
    assert (memory.live, memory.peak) == (0, KB + 40)


def test_nested_blocks_count_for_themselves() -> None:
    with TensorMemory() as outer:
        a = torch.zeros(10)
        with TensorMemory() as inner:
            b, c = a + 1, a.view(2, 5)  # a 对里面来说是以前的
            assert (inner.live, outer.live) == (40, 80)
        d = torch.zeros(5)
        assert (inner.live, outer.live) == (40, 100)
        del b
        assert (inner.live, outer.live) == (0, 60)
        del a, d
        assert (inner.live, outer.live) == (0, 40)
        del c
        assert (inner.live, outer.live) == (0, 0)
    assert (inner.peak, outer.peak) == (40, 100)


def test_an_exception_ends_the_measurement() -> None:
    memory = TensorMemory()
    with pytest.raises(KeyError), memory:
        a = torch.zeros(10)
        raise KeyError
    b = torch.zeros(10)
    assert memory.live == 40
    del a, b
    assert memory.live == 0


def test_the_same_instance_can_be_entered_again() -> None:
    memory = TensorMemory()
    with memory:
        a = torch.zeros(10)
    with memory:
        b = a + 1
        assert memory.live == 80  # 接着数
    del a, b
    assert memory.live == 0


def test_sparse_tensors_are_ignored() -> None:
    with TensorMemory() as memory:
        sparse = torch.eye(4).to_sparse()
        assert (sparse @ torch.ones(4, 1)).sum() == 4
    assert memory.peak > 0
