"""第 1 章引擎的坏输入：每种都说清是哪个算子、什么形状或 dtype、规则是什么；出错时什么也没有改。"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from chapter_01_tensor_autograd import functional as F
from chapter_01_tensor_autograd.engine import Tensor, grad, no_grad
from chapter_01_tensor_autograd.optim import SGD, Adam


def ones(*shape: int, dtype: type = np.float64) -> Tensor:
    return Tensor(np.ones(shape, dtype), requires_grad=dtype in (np.float64, np.float32))


A, B = ones(2, 3), ones(4, 3)
SINGLE, IMAGE = ones(2, 3, dtype=np.float32), ones(1, 2, 5, 5)
INT = Tensor([1, 2])

CASES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    # 形状
    (lambda: A + B, ValueError, r"add：形状 \(2, 3\) 与 \(4, 3\) 不能广播：从最后一维往前"),
    (lambda: A * ones(2), ValueError, r"mul：形状 \(2, 3\) 与 \(2,\) 不能广播"),
    (lambda: F.maximum(A, B), ValueError, r"maximum：形状 \(2, 3\) 与 \(4, 3\) 不能广播"),
    (lambda: A.where(np.ones((5, 5), bool), 0.0), ValueError, "where：形状"),
    (lambda: A @ B, ValueError, r"matmul：形状 \(2, 3\) 与 \(4, 3\) 不能相乘：前者的最后一维"),
    (lambda: A @ Tensor(1.0), ValueError, "matmul：操作数不能是标量"),
    (lambda: A.reshape(4, 2), ValueError, r"reshape：形状 \(2, 3\) 有 6 个元素，排不成 \(4, 2\)"),
    (lambda: A.permute(0), ValueError, r"permute：\(0,\) 应是 0 到 1 的一个排列：形状 \(2, 3\)"),
    (lambda: A.expand(4, 3), ValueError, r"expand：形状 \(2, 3\) 不能广播成 \(4, 3\)"),
    (lambda: A.squeeze(0), ValueError, r"squeeze：形状 \(2, 3\) 的第 0 维不是 1"),
    (lambda: A.unsqueeze(3), ValueError, r"unsqueeze：dim=3 超出范围：形状 \(2, 3\)"),
    (lambda: A.sum(2), ValueError, r"sum：dim=2 超出范围：形状 \(2, 3\) 只有 2 维"),
    (lambda: A.mean((0, 0)), ValueError, r"mean：dim=\(0, 0\) 有重复的维"),
    (lambda: A.softmax(5), ValueError, "softmax：dim=5 超出范围"),
    (lambda: ones(0, 3).max(0), ValueError, r"max：形状 \(0, 3\) 沿 \(0,\) 没有元素"),
    (lambda: A[2], IndexError, r"getitem：形状 \(2, 3\) 的张量没有下标 2"),
    (lambda: A[:, [0, 7]], IndexError, r"getitem：形状 \(2, 3\)"),
    (lambda: A.gather(0, [0, 1]), TypeError, r"gather：下标应为 2 维的整数数组，实为 int64 \(2,\)"),
    (lambda: F.concat([A, ones(2, 4)]), ValueError, r"concat：形状 \(2, 3\)、\(2, 4\) 除第 0 维"),
    (lambda: F.concat([]), ValueError, "concat：至少要一个张量"),
    (lambda: F.pad(A, (1, 2, 3)), ValueError, r"pad：\[1, 2, 3\] 应为成对的非负整数"),
    (lambda: F.pad(A, (-1, 0)), ValueError, "pad：.*非负整数"),
    (lambda: F.linear(A, ones(4, 5)), ValueError, r"linear：.*实为 \(2, 3\) 与 \(4, 5\)"),
    (lambda: F.conv2d(IMAGE, ones(1, 3, 2, 2)), ValueError, r"conv2d：.*\(1, 2, 5, 5\) 与 \(1, 3"),
    (lambda: F.conv2d(IMAGE, ones(1, 2, 6, 6)), ValueError, "windows：形状.*不小于窗口"),
    (lambda: F.mse_loss(ones(4, 1), np.ones(4)), ValueError, r"mse_loss：形状 \(4, 1\) 与 \(4,\)"),
    (lambda: A.item(), ValueError, r"item：形状 \(2, 3\) 不止一个元素"),
    (lambda: len(Tensor(1.0)), TypeError, "标量没有长度"),
    (lambda: A.clip(), ValueError, "clip：low 与 high 至少给出一个"),
    # dtype
    (lambda: A + SINGLE, TypeError, r"add：dtype 不同，float64 \(2, 3\) 与 float32.*astype"),
    (lambda: A @ SINGLE.T, TypeError, "matmul：dtype 不同"),
    (lambda: A * "2", TypeError, "mul：操作数应为 Tensor、实数或实数数组，实为 str"),
    (lambda: None - A, TypeError, "sub：操作数应为.*实为 NoneType"),
    (lambda: Tensor([1, 2]) + 0.5, TypeError, r"add：dtype 不同，int64 \(2,\) 与 float64 \(\)"),
    (lambda: Tensor([1, 2]) * 2.0, TypeError, "mul：dtype 不同，int64"),  # 恰好是整数的小数也一样
    (lambda: np.array([0.5]) * Tensor([True]), TypeError, "mul：dtype 不同，bool.*与 float64"),
    (lambda: ones(4) == A, ValueError, r"==：形状 \(4,\) 与 \(2, 3\) 不能广播"),
    (lambda: grad([A.sum()], A), TypeError, "grad：output 应为一个张量，实为 list"),
    (lambda: SGD([A], -1.0), ValueError, "学习率不为负：1 个，-1.0"),
    (lambda: Adam([], 0.1), ValueError, "至少一个参数"),
    (lambda: A * 1j, TypeError, "mul：操作数应为.*实为 complex"),
    (lambda: A + np.array(["x"]), TypeError, "add：操作数应为"),
    (lambda: Tensor(["x"]), TypeError, "Tensor：dtype 应为实数或布尔"),
    (lambda: Tensor([1, 2], requires_grad=True), TypeError, r"只有浮点张量才能求导，实为 int64"),
    (lambda: A.where(np.ones((2, 3)), 0.0), TypeError, "where：条件应为布尔数组，实为 float64"),
    (lambda: F.gelu(A, "erf"), ValueError, "gelu：approximate='erf'"),
    # 标签
    (lambda: F.cross_entropy(A, [0.0, 1.0]), ValueError, "cross_entropy：.*实为"),
    (lambda: F.cross_entropy(A, [0]), ValueError, r"cross_entropy：.*\(2, 3\) 与 int64 \(1,\)"),
    (lambda: F.cross_entropy(A, [0, 3]), ValueError, "cross_entropy：target 应非空，且在 0 到 2"),
    # 求导
    (lambda: (A * 2.0).backward(), ValueError, r"输出的形状是 \(2, 3\)，不是标量：请先 sum"),
    (lambda: (A * 2.0).backward(np.ones(3)), ValueError, r"上游梯度是 float64 \(3,\)，应与输出"),
    (lambda: (A * 2.0).backward(SINGLE), ValueError, "上游梯度是 float32"),
    (lambda: INT.sum().backward(), RuntimeError, r"backward：形状 \(\) 的张量不在计算图里"),
    (lambda: grad(A.sum(), INT), ValueError, "grad：形状 .* 的输入没有 requires_grad=True"),
    (lambda: (A * 2.0).requires_grad_(), RuntimeError, "requires_grad_：mul 的结果不是叶子"),
]  # fmt: skip


@pytest.mark.parametrize(("action", "kind", "message"), CASES, ids=[c[2][:24] for c in CASES])
def test_error_names_the_operator_and_the_rule(
    action: Callable[[], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        action()
    assert "\n" not in str(caught.value)  # 一行
    assert A.grad is None and A.numpy().tolist() == [[1.0] * 3] * 2


def test_no_grad_results_cannot_be_differentiated() -> None:
    with no_grad():
        y = A.sum()
    with pytest.raises(RuntimeError, match=r"不在计算图里.*no_grad\(\)"):
        y.backward()


def test_arrays_and_numbers_on_either_side() -> None:
    x = Tensor([1.0, 2.0])
    for result in (np.array([3.0, 4.0]) * x, x * np.array([3.0, 4.0]), np.float64(2.0) * x * 1.5):
        assert isinstance(result, Tensor)
    single = Tensor([1.0, 2.0], dtype=np.float32)
    for result in (single * 2, 1 - single, single / np.float64(3.0), single**0.5, single + True):
        assert result.dtype == np.float32  # 数随张量，不会悄悄升到 float64
    scalar = Tensor(0.7, dtype=np.float32, requires_grad=True)  # NumPy 1 最爱把 0 维的升级
    y = (scalar.sigmoid() + scalar**0.5 + scalar.relu() + F.gelu(scalar)).clip(0.0, 9.0)
    (y / 2.0).backward()
    assert y.dtype == scalar.grad.dtype == np.float32
    wide = (single * 1.0).astype(np.float64)
    assert wide.dtype == np.float64 and Tensor([1, 2]).mean().item() == 1.5
    assert (2.0**x).numpy().tolist() == [2.0, 4.0]
    assert (np.ones((3, 2)) @ x).numpy().tolist() == [3.0] * 3
    whole = Tensor([1, 2])
    assert (whole + True).dtype == (2 * whole).dtype == whole.zero_().dtype == np.int64
    assert x.sum(np.int64(0)).item() == 3.0


def test_comparisons_are_elementwise() -> None:
    x = Tensor([1.0, 2.0])
    assert (x > 1.5).tolist() == [False, True] and bool((x <= 2.0).all())
    assert (x == 1).tolist() == (x != Tensor([2.0, 2.0])).tolist() == [True, False]
    assert x.where(x == 2.0, 0.0).numpy().tolist() == [0.0, 2.0]
    assert {x: "x"}[x] == "x" and Tensor([1.0, 2.0]) not in {x}  # 作键时认对象本身


def test_repr_and_iteration() -> None:
    x = Tensor([1.0, 2.0], requires_grad=True)
    assert repr(x) == "Tensor([1., 2.], dtype=float64, requires_grad=True)"
    assert repr(x * 2.0) == "Tensor([2., 4.], dtype=float64, grad_fn=mul)"
    first, second = x
    (first * second).backward()
    assert x.grad.numpy().tolist() == [2.0, 1.0]
