"""第 1 章的自定义算子：取值、各阶导数与官方一致（float64），保存的字节数与手算一致。"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from chapter_01_tensor_autograd.custom_function import (
    binarize,
    fused_cross_entropy,
    saved_bytes,
    silu,
)
from tests.parity import assert_equal, autograd, normal
from utils import make_generator
from utils.memory import TensorMemory

Function = Callable[..., Tensor]

# ---------------------------------------------------------------- 输入


def laid_out(layout: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    """标准正态的 ``(rows, columns)``：连续、转置得来的，或隔列取的。"""
    if layout == "transposed":
        return normal(columns, rows, seed=seed).mT
    if layout == "strided":
        return normal(rows, 2 * columns, seed=seed)[:, ::2]
    return normal(rows, columns, seed=seed)


LAYOUTS = ["contiguous", "transposed", "strided"]
SIZES = [(1, 1), (1, 7), (5, 3), (7, 1)]


def labels(rows: int, columns: int) -> Tensor:
    """首尾两类都出现的标签。"""
    return torch.arange(rows - 1, -1, -1) % columns


def derivatives(function: Function, x: Tensor, upstream: Tensor, direction: Tensor) -> list[Tensor]:
    """取值；一阶导数；一阶导数沿 ``direction`` 的投影对 ``x`` 与对上游梯度的导数。"""
    x, g = x.detach().requires_grad_(), upstream.detach().requires_grad_()
    y = function(x)
    (gx,) = torch.autograd.grad(y, x, g, create_graph=True)
    return [y.detach(), gx.detach(), *torch.autograd.grad(gx, (x, g), direction)]


# ---------------------------------------------------------------- 交叉熵与 SiLU


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_fused_cross_entropy_and_both_derivatives(layout: str, rows: int, columns: int) -> None:
    z, direction = 3 * laid_out(layout, rows, columns), laid_out(layout, rows, columns, seed=1)
    target, upstream = labels(rows, columns), torch.tensor(-1.7, dtype=torch.float64)
    if layout == "strided":
        target = target.repeat_interleave(2)[::2]
    ours = derivatives(lambda z: fused_cross_entropy(z, target), z, upstream, direction)
    official = derivatives(lambda z: F.cross_entropy(z, target), z, upstream, direction)
    for a, b in zip(ours, official, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)  # 单类时导数为零，只能看绝对误差


def test_fused_cross_entropy_by_hand() -> None:
    z = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]], dtype=torch.float64).requires_grad_()
    loss = fused_cross_entropy(z, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((math.log(4) + math.log(2)) / 2, rel=1e-15)
    (2 * loss).backward()
    expected = torch.tensor([[-0.75, 0.75], [0.5, -0.5]], dtype=torch.float64)
    assert_equal(z.grad, expected)  # 2 (softmax − e_t) / B


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_silu_and_both_derivatives(layout: str, rows: int, columns: int) -> None:
    x, upstream, direction = (laid_out(layout, rows, columns, seed=s) for s in range(3))
    x = 4 * x
    for a, b in zip(
        derivatives(silu, x, upstream, direction),
        derivatives(F.silu, x, upstream, direction),
        strict=True,
    ):
        assert_equal(a, b, 1e-14)


def test_silu_takes_expanded_upstream_gradients_and_any_dimension() -> None:
    for shape in [(), (3,), (2, 3, 4), (0,)]:
        x = normal(*shape).requires_grad_()
        silu(x).sum().backward()  # 上游梯度是展开的，步长为 0
        (expected,) = autograd(F.silu, torch.ones(shape, dtype=torch.float64), x)
        torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-15)


def test_silu_third_derivative() -> None:
    def third(function: Function) -> Tensor:
        x = normal(5).requires_grad_()
        y = function(x)
        for _ in range(3):
            (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y.detach()

    assert_equal(third(silu), third(lambda x: x * torch.sigmoid(x)), 1e-14)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck_and_gradgradcheck(layout: str) -> None:
    for rows, columns in [(1, 5), (3, 4)]:
        x = laid_out(layout, rows, columns).requires_grad_()
        target = labels(rows, columns)
        for function in (silu, lambda z, target=target: fused_cross_entropy(z, target)):
            assert gradcheck(function, (x,))
            assert gradgradcheck(function, (x,))


def test_single_precision_stays_single() -> None:
    x, target = normal(5, 3).float(), labels(5, 3)
    for ours, official in [
        (silu, F.silu),
        (lambda z: fused_cross_entropy(z, target), lambda z: F.cross_entropy(z, target)),
    ]:
        y, expected = ours(x), official(x)
        assert_equal(y, expected, 1e-6)
        for a, b in zip(
            autograd(ours, torch.ones_like(y), x),
            autograd(official, torch.ones_like(y), x),
            strict=True,
        ):
            assert_equal(a, b, 1e-6)


def test_extreme_inputs_do_not_overflow() -> None:
    z = torch.tensor([[1e4, -1e4, 0.0], [1e30, 0.0, -1e30]], requires_grad=True)  # float32
    loss = fused_cross_entropy(z, torch.tensor([1, 0]))
    assert loss.item() == 1e4  # (2e4 + 0) / 2
    loss.backward()
    assert z.grad.tolist() == [[0.5, -0.5, 0.0], [0.0, 0.0, 0.0]]
    x = torch.tensor([-1e4, -200.0, 200.0, 1e4], requires_grad=True)
    y = silu(x)
    assert y.tolist() == [0.0, 0.0, 200.0, 1e4]
    (gx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert gx.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert torch.autograd.grad(gx.sum(), x)[0].tolist() == [0.0] * 4


@pytest.mark.parametrize("function", [silu, lambda z: fused_cross_entropy(z, torch.tensor([1, 0]))])
def test_input_changed_before_backward_is_noticed(function: Function) -> None:
    x = normal(2, 3).requires_grad_() * 1
    y = function(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("logits", "target"), [((3,), (3,)), ((3, 4), (4,)), ((3, 4), (3, 1)), ((2, 3, 4), (2,))]
)
def test_fused_cross_entropy_names_the_wrong_shapes(
    logits: tuple[int, ...], target: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"应为 \(B, C\)，target 应为 \(B,\)，实为") as error:
        fused_cross_entropy(torch.zeros(logits), torch.zeros(target, dtype=torch.long))
    assert f"{logits} 与 {target}" in str(error.value)


# ---------------------------------------------------------------- 直通估计

TINY = 5e-324
JUST_ABOVE = math.nextafter(1.0, 2.0)
POINTS = [-3.0, -JUST_ABOVE, -1.0, -0.5, -TINY, -0.0, 0.0, TINY, 0.5, 1.0, JUST_ABOVE, 3.0]


def test_binarize_values() -> None:
    for dtype in (torch.float64, torch.float32):
        y = binarize(torch.tensor(POINTS, dtype=torch.float64).to(dtype))
        assert y.dtype == dtype
        signs = [-1.0] * 5 + [1.0] * 7 if dtype == torch.float64 else [-1.0] * 4 + [1.0] * 8
        assert y.tolist() == signs  # 正负零都取 +1；float32 里 −TINY 就是零


def test_binarize_backward_is_straight_through() -> None:
    x = torch.tensor(POINTS, dtype=torch.float64)
    upstream = normal(len(x))
    (gx,) = autograd(binarize, upstream, x)
    inside = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0], dtype=torch.float64)
    assert torch.equal(gx, upstream * inside)
    edge = x.abs() == 1  # ±1 处也当作恒等，官方的 hardtanh 在这两点取 0
    (official,) = autograd(F.hardtanh, upstream, x)
    assert edge.sum() == 2 and torch.equal(gx[~edge], official[~edge])


def test_binarize_second_derivatives() -> None:
    x, g = normal(3, 5).requires_grad_(), normal(3, 5, seed=1).requires_grad_()
    (gx,) = torch.autograd.grad(binarize(x), x, g, create_graph=True)
    gg, xx = torch.autograd.grad(gx, (g, x), torch.ones_like(g), allow_unused=True)
    assert torch.equal(gg, (x.abs() <= 1).double())
    assert xx is None  # 对 x 是常数


def test_binarize_fails_gradcheck_but_passes_gradgradcheck() -> None:
    x = torch.tensor([-1.5, -0.6, 0.4, 1.3], dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        gradcheck(binarize, (x,))
    assert gradcheck(binarize, (x.detach()[[0, 3]].requires_grad_(),))  # 区间之外两者都是 0
    assert gradgradcheck(binarize, (x,))


# ---------------------------------------------------------------- torch.func


def test_all_three_work_under_torch_func_grad() -> None:
    x, weight = normal(3, 5), normal(3, 5, seed=1)
    target = labels(3, 5)
    for function in (silu, binarize, lambda z: fused_cross_entropy(z, target)):
        by_func = torch.func.grad(lambda x, f=function: (f(x) * weight).sum())(x)
        leaf = x.clone().requires_grad_()
        (function(leaf) * weight).sum().backward()
        assert torch.equal(by_func, leaf.grad) and by_func.any()


def test_silu_nested_torch_func_grad() -> None:
    x = torch.tensor(0.7, dtype=torch.float64)
    s = 1 / (1 + math.exp(-0.7))
    second = torch.func.grad(torch.func.grad(silu))(x)
    assert second.item() == pytest.approx(s * (1 - s) * (2 + 0.7 * (1 - 2 * s)), rel=1e-14)


# ---------------------------------------------------------------- 保存的字节数


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.float64, 8)])
def test_saved_bytes_of_silu(dtype: torch.dtype, width: int) -> None:
    x = torch.randn(10, 10, dtype=dtype, requires_grad=True)
    assert saved_bytes(silu, x) == 100 * width  # 只有输入
    assert saved_bytes(binarize, x) == 100 * width
    assert saved_bytes(lambda x: x * torch.sigmoid(x), x) == 2 * 100 * width  # 另有 σ(x)
    assert saved_bytes(silu, x.detach()) == 0  # 不求导就什么也不存


def test_saved_bytes_of_cross_entropy() -> None:
    z, target = torch.randn(7, 5, requires_grad=True), labels(7, 5)

    def literal(z: Tensor) -> Tensor:
        p = z.exp() / z.exp().sum(1, keepdim=True)
        return -p.log().gather(1, target[:, None]).mean()

    assert saved_bytes(fused_cross_entropy, z, target) == 4 * 7 * 5 + 8 * 7
    # exp(z) 算了两遍、存了两份，p 与 −log p（gather 存输入）各一份；另有行和与标签
    assert saved_bytes(literal, z) == 4 * (4 * 7 * 5) + 4 * 7 + 8 * 7


def test_saved_bytes_counts_shared_storage_once() -> None:
    x = torch.randn(6, requires_grad=True)
    assert saved_bytes(lambda x: x * x, x) == 24  # 同一个张量存了两次
    assert saved_bytes(lambda x: x[:3] * x[3:], x) == 24  # 两个视图
    assert saved_bytes(lambda x: silu(x) + silu(x), x) == 24
    assert saved_bytes(lambda x, y: x * y, x, torch.randn(6, requires_grad=True)) == 48
    wide = torch.randn(3, 8, requires_grad=True)
    assert saved_bytes(silu, wide[:, ::2]) == 96  # 视图留住的是整块存储
    assert saved_bytes(lambda x: x + 1, x) == 0


def test_saved_bytes_leaves_the_function_usable() -> None:
    """钩子只在函数之内生效；张量原样交回，反向照常。"""
    kept: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        kept.append(silu(x))
        return kept[-1]

    x = normal(4).requires_grad_()
    saved_bytes(function, x)
    kept[0].sum().backward()
    assert_equal(x.grad, autograd(F.silu, torch.ones(4, dtype=torch.float64), x)[0])


def test_saved_bytes_releases_everything() -> None:
    with TensorMemory() as memory:
        x = torch.randn(1000, generator=make_generator(0)).requires_grad_()
        for function in (torch.sigmoid, torch.exp, silu):  # 前两个保存自己的输出
            saved_bytes(function, x)
        assert memory.live == 4000  # 只剩 x
