"""第 4 章的卷积：手算的例子、恒等式（卷积定理、伴随、平移等变）、错误信息；没有借用官方的卷积。"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from chapter_04_cnn_classic import layers
from chapter_04_cnn_classic.conv import (
    col2im,
    conv2d_fft,
    conv2d_im2col,
    conv2d_naive,
    im2col,
    make_geometry,
    true_conv2d,
)
from chapter_04_cnn_classic.conv_transpose import conv_transpose2d
from chapter_04_cnn_classic.pooling import global_avg_pool2d
from tests.parity import assert_equal, normal
from tests.test_ch04_conv import CONV, FORMS, Setting
from utils import REPO_ROOT

# ---------------------------------------------------------------- 手算


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_by_hand(form: Callable[..., Tensor]) -> None:
    """3×3 的图，2×2 的核；梯度全为 1 时，核的梯度是窗口之和，图的梯度是盖住它的核元素之和。"""
    x = torch.arange(1.0, 10).double().view(1, 1, 3, 3).requires_grad_()
    weight = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]).double().requires_grad_()
    bias = torch.tensor([0.5]).double().requires_grad_()
    y = form(x, weight, bias)
    assert_equal(y.detach(), torch.tensor([[[[37.5, 47.5], [67.5, 77.5]]]]).double())
    y.sum().backward()
    assert_equal(weight.grad, torch.tensor([[[[12.0, 16.0], [24.0, 28.0]]]]).double())
    assert_equal(x.grad, torch.tensor([[[[1.0, 3, 2], [4, 10, 6], [3, 7, 4]]]]).double())
    assert_equal(bias.grad, torch.tensor([4.0]).double())


def test_true_convolution_and_transpose_by_hand() -> None:
    x, weight = torch.arange(1.0, 10).view(1, 1, 3, 3), torch.arange(1.0, 5).view(1, 1, 2, 2)
    assert true_conv2d(x, weight).tolist() == [[[[23, 33], [53, 63]]]]  # 核转 180°：4 3 / 2 1
    back = conv_transpose2d(weight, weight)
    assert back.tolist() == [[[[1, 4, 4], [6, 20, 16], [9, 24, 16]]]]


# ---------------------------------------------------------------- 恒等式


def full(a: Tensor, b: Tensor) -> Tensor:
    """两张单通道图的完整卷积，``(H + R − 1, W + S − 1)``。"""
    pads = b.shape[0] - 1, b.shape[1] - 1
    return true_conv2d(a[None, None], b[None, None], padding=pads)[0, 0]


def test_true_convolution_multiplies_polynomials() -> None:
    """系数表 ``a``、``b`` 是两个二元多项式：乘积的系数就是完整卷积；因此可交换、可结合。"""
    a, b, c = normal(4, 3), normal(2, 5, seed=1), normal(3, 2, seed=2)
    expected = torch.zeros(5, 7, dtype=torch.float64)
    for i, j, k, m in product(*map(range, (*a.shape, *b.shape))):
        expected[i + k, j + m] += a[i, j] * b[k, m]
    assert_equal(full(a, b), expected)
    assert_equal(full(b, a), full(a, b))
    assert_equal(full(full(a, b), c), full(a, full(b, c)))
    assert_equal(conv_transpose2d(a[None, None], b[None, None])[0, 0], expected)
    square, other = normal(3, 3), normal(3, 3, seed=1)  # 互相关：交换之后是倒过来的图

    def correlate(a: Tensor, b: Tensor) -> Tensor:
        return conv2d_im2col(a[None, None], b[None, None], padding=2)[0, 0]

    assert_equal(correlate(other, square), correlate(square, other).flip(0, 1))
    assert (correlate(other, square) - correlate(square, other)).abs().max() > 0.1


@pytest.mark.parametrize("setting", CONV[:24])
def test_adjoint_pairs(setting: Setting) -> None:
    """``⟨im2col x, c⟩ = ⟨x, col2im c⟩``，``⟨conv x, y⟩ = ⟨x, convᵀ y⟩``。"""
    shape, weight, _, options = setting
    geometry = make_geometry(weight[2:], **options)
    left, right, top, bottom = geometry.pads
    padded = F.pad(normal(*shape), geometry.pads)
    assert padded.shape[2:] == (shape[2] + top + bottom, shape[3] + left + right)
    size = geometry.output_size(*shape[2:])
    columns = im2col(padded, geometry, size)
    assert columns.shape == (shape[0], options["groups"], math.prod(weight[1:]), math.prod(size))
    other, back = normal(*columns.shape, seed=1), torch.zeros_like(padded)
    col2im(other.view(*shape[:2], *weight[2:], *size), geometry, back)
    inner = (columns * other).sum().item()
    assert inner == pytest.approx((padded * back).sum().item(), rel=1e-11, abs=1e-11)


def test_transpose_is_the_adjoint_and_undoes_the_shape() -> None:
    x, weight = normal(2, 4, 8, 7), normal(6, 2, 3, 2, seed=1)
    options = {"stride": (3, 2), "padding": 1, "dilation": (1, 2), "groups": 2}
    y = conv2d_im2col(x, weight, **options)
    for extra in product(range(3), range(2)):
        other = conv_transpose2d(y, weight, output_padding=extra, **options)
        fits = conv2d_im2col(other, weight, **options).shape == y.shape
        assert fits  # 这几种大小都卷积成 y 的大小，output_padding 选定其一
        if other.shape == x.shape:
            break
    assert other.shape == x.shape
    assert (y * y).sum().item() == pytest.approx((x * other).sum().item(), rel=1e-12)


def test_translation_equivariance() -> None:
    """图移两格，步幅 2 的输出移一格（远离边界处）。"""
    x, weight = normal(1, 2, 12, 12), normal(3, 2, 3, 3, seed=1)
    y, moved = (conv2d_im2col(t, weight, stride=2) for t in (x, x.roll((2, 4), (2, 3))))
    assert_equal(moved[:, :, 1:, 2:], y[:, :, :-1, :-2])


# ---------------------------------------------------------------- 错误

X, WEIGHT = (1, 4, 5, 6), (4, 2, 3, 3)
ERRORS: list[tuple[tuple[int, ...], tuple[int, ...], int | None, dict, str]] = [
    ((4, 5, 6), WEIGHT, None, {}, r"\(B, C, H, W\).*\(4, 5, 6\) 与 \(4, 2, 3, 3\)"),
    (X, (4, 2, 3), None, {}, r"实为 \(1, 4, 5, 6\) 与 \(4, 2, 3\)"),
    (X, WEIGHT, None, {}, r"输入有 4 个，核 \(4, 2, 3, 3\) 分 1 组，应有 2 个"),
    (X, WEIGHT, None, {"groups": 0}, "分 0 组"),
    (X, (3, 2, 3, 3), None, {"groups": 2}, r"输出通道数须被组数整除"),
    (X, WEIGHT, 1, {"groups": 2}, r"bias 应为 \(4,\)，实为 \(1,\)"),
    (X, WEIGHT, None, {"groups": 2, "stride": 0}, "stride=0 应为一个或两个不小于 1 的整数"),
    (X, WEIGHT, None, {"groups": 2, "stride": (1, 2, 3)}, r"stride=\(1, 2, 3\)"),
    (X, WEIGHT, None, {"groups": 2, "stride": 1.5}, "stride=1.5"),
    (X, WEIGHT, None, {"groups": 2, "stride": None}, "stride=None"),
    (X, WEIGHT, None, {"groups": 2, "dilation": (1, 0)}, r"dilation=\(1, 0\)"),
    (X, WEIGHT, None, {"groups": 2, "padding": -1}, "padding=-1 应为一个或两个不小于 0 的整数"),
    (X, WEIGHT, None, {"groups": 2, "padding": "full"}, "padding='full' 应为整数、\"same\""),
    (X, WEIGHT, None, {"groups": 2, "padding": "same", "stride": (1, 2)}, r"步幅 1，实为 \(1, 2\)"),
    (X, WEIGHT, None, {"groups": 2, "dilation": (3, 1)}, "输入 5×6 加上填充 0 仍放不下.*长 7 的核"),
    (X, WEIGHT, None, {"groups": 2, "dilation": (1, 4), "padding": (0, 1)}, "填充 2 .*长 9 的核"),
    (X, (4, 2, 0, 3), None, {"groups": 2}, r"\(0, 3\) 应为一个或两个不小于 1"),
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("x", "weight", "bias", "options", "message"), ERRORS)
def test_rejects_nonsense(
    form: Callable[..., Tensor],
    x: tuple[int, ...],
    weight: tuple[int, ...],
    bias: int | None,
    options: dict,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        form(normal(*x), normal(*weight), bias and normal(bias), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "options", "message"),
    [
        ((4, 5, 6), (4, 2, 3, 3), None, {}, r"实为 \(4, 5, 6\) 与 \(4, 2, 3, 3\)"),
        (X, (4, 2, 3), None, {}, r"实为 \(1, 4, 5, 6\) 与 \(4, 2, 3\)"),
        (X, (4, 2, 3, 3), None, {"groups": 3}, "被组数 3 整除"),
        (X, (4, 2, 3, 3), None, {"groups": 0}, "被组数 0 整除"),
        (X, (2, 4, 3, 3), None, {}, r"输入有 4 个，核 \(2, 4, 3, 3\) 的第一维"),
        (X, (4, 2, 3, 3), 1, {}, r"bias 应为 \(2,\)，实为 \(1,\)"),
        (X, (4, 2, 3, 3), 2, {"groups": 2}, r"bias 应为 \(4,\)，实为 \(2,\)"),
        (X, (4, 2, 3, 3), None, {"padding": "same"}, "padding='same' 应为整数"),
        (X, (4, 2, 3, 3), None, {"output_padding": -1}, "output_padding=-1"),
        (X, (4, 2, 3, 3), None, {"stride": (2, 3), "output_padding": 2}, "=2 应小于步幅 2 .*率 1"),
        (X, (4, 2, 3, 3), None, {"padding": 4}, r"输出大小 \(-1, 0\) 应为正"),
        (X, (4, 2, 3, 3), None, {"padding": (0, 4)}, r"输出大小 \(7, 0\) 应为正"),
    ],
)
def test_transposed_convolution_rejects_nonsense(
    x: tuple[int, ...], weight: tuple[int, ...], bias: int | None, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        conv_transpose2d(normal(*x), normal(*weight), bias and normal(bias), **options)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- 没有借用官方的卷积与池化

CHAPTER = REPO_ROOT / "chapter_04_cnn_classic"
FORBIDDEN = ("conv", "im2col", "col2im", "pool", "fold")


def borrowed(source: str) -> list[str]:
    """源码里借用的官方算子：``F`` 里只许用 ``pad``；其余凡是点号之后的名字像卷积、池化的调用。"""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "torch.nn.functional":
            found.append(ast.unparse(node))
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if owner in ("F", "nn.functional", "torch.nn.functional") and node.attr != "pad":
                found.append(ast.unparse(node))
        if isinstance(node, ast.Call):
            called = node.func.attr.lower() if isinstance(node.func, ast.Attribute) else ""
            if any(word in called for word in FORBIDDEN):
                found.append(ast.unparse(node.func))
    return found


@pytest.mark.parametrize(
    "line",
    [
        "F.conv2d(x, w)",
        "y = torch.nn.functional.unfold(x, 3)",
        "f = F.max_pool2d",
        "from torch.nn.functional import fold",
        "torch.conv2d(x, w)",
        "torch.ops.aten.convolution(x)",
        "x.unfold(2, 3, 1)",
        "nn.Conv2d(3, 4, 5)(x)",
        "nn.AdaptiveAvgPool2d(1)(x)",
    ],
)
def test_borrowing_rule_catches(line: str) -> None:
    assert borrowed(line)


@pytest.mark.parametrize("name", ["conv.py", "conv_transpose.py", "pooling.py", "layers.py"])
def test_source_borrows_nothing(name: str) -> None:
    assert borrowed((CHAPTER / name).read_text(encoding="utf-8")) == []


def test_borrowing_rule_accepts_what_is_our_own() -> None:
    source = "F.pad(x, p); type(x) is nn.Conv2d; col2im(x); _Conv2d.apply(x); x.unflatten(1, (2,))"
    assert borrowed(source) == []


class Recorder(TorchDispatchMode):
    """记下真正执行的每个底层算子的名字。"""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))

    def official(self) -> list[str]:
        return sorted(n for n in self.names if any(word in n for word in FORBIDDEN))


@pytest.mark.parametrize(
    "function",
    [
        layers.Conv2d(4, 4, 3, padding="same", groups=2),
        layers.ConvTranspose2d(4, 4, 3, stride=2),
        layers.MaxPool2d(3, 2, 1),
        layers.AvgPool2d(2),
        layers.AdaptiveAvgPool2d(3),
        global_avg_pool2d,
        lambda x: conv2d_naive(x, x[:1, :, :5, :5]),
        lambda x: conv2d_fft(x, x[:1, :, :5, :5]),
    ],
)
def test_no_official_kernel_runs(function: Callable[[Tensor], Tensor]) -> None:
    """源码看不出的间接借用也不行：前向与反向真正执行的算子里，没有一个官方的卷积或池化。"""
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    with Recorder() as recorder:
        function(x).sum().backward()
    assert len(recorder.names) >= 3 and recorder.official() == []
    with Recorder() as recorder:  # 记录本身有效
        F.max_pool2d(F.conv2d(x, x[:1, :, :3, :3]), 2)
    assert recorder.official() == ["convolution", "max_pool2d_with_indices"]


def test_one_by_one_convolution_is_a_linear_layer_at_each_pixel() -> None:
    x, weight, bias = normal(2, 5, 4, 3), normal(7, 5, 1, 1, seed=1), normal(7, seed=2)
    pixels = F.linear(x.movedim(1, -1), weight[:, :, 0, 0], bias).movedim(-1, 1)
    assert_equal(conv2d_im2col(x, weight, bias), pixels)
