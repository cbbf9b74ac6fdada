"""第 4 章的卷积：三种写法与转置卷积，在 float64 下与 PyTorch 对照前向与梯度；反向的种种边界。"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chapter_04_cnn_classic import conv
from chapter_04_cnn_classic.conv import (
    as_pair,
    conv2d_fft,
    conv2d_im2col,
    conv2d_naive,
    make_geometry,
)
from chapter_04_cnn_classic.conv_transpose import conv_transpose2d
from tests.parity import assert_equal, autograd, normal

# 核是偶数的 "same"：官方提醒可能多复制一次
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

FORMS = [conv2d_naive, conv2d_im2col, conv2d_fft]
ids = [form.__name__ for form in FORMS]
Setting = tuple[tuple[int, ...], tuple[int, ...], bool, dict]  # 输入与核的形状、有无偏置、其余参数


def draw_channels(rng: random.Random) -> tuple[int, int, int]:
    """``(C, O, G)``：四分之一是逐通道（depthwise）的。"""
    if rng.random() < 0.25:
        groups = rng.randint(2, 4)
        return groups, groups * rng.randint(1, 2), groups
    groups = rng.choice([1, 1, 2, 3])
    return groups * rng.randint(1, 3), groups * rng.randint(1, 3), groups


def pick(rng: random.Random, low: int, high: int) -> int | tuple[int, int]:
    """一个数，或两个（多半不同的）数。"""
    if rng.random() < 0.4:
        return rng.randint(low, high)
    return rng.randint(low, high), rng.randint(low, high)


def conv_settings(count: int) -> list[Setting]:
    """随机的卷积设置；图的大小从刚好放下一个核起，奇偶都有。"""
    rng, settings = random.Random(4), []
    for index in range(count):
        channels, out, groups = draw_channels(rng)
        kernel = rng.randint(1, 4), rng.randint(1, 5)
        dilation = pick(rng, 1, 3)
        padding = pick(rng, 0, 3)
        if index % 4 == 0:
            padding = "same"
        elif index % 9 == 1:
            padding = "valid"
        stride = 1 if padding == "same" else pick(rng, 1, 3)
        size = []
        for axis in (0, 1):
            reach = as_pair(dilation, "")[axis] * (kernel[axis] - 1) + 1
            pad = 0 if isinstance(padding, str) else as_pair(padding, "", 0)[axis]
            smallest = 1 if padding == "same" else max(1, reach - 2 * pad)
            size.append(smallest + rng.randint(0, 6))
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        x = rng.randint(1, 3), channels, *size
        settings.append((x, (out, channels // groups, *kernel), rng.random() < 0.6, options))
    return settings


def transpose_settings(count: int) -> list[Setting]:
    """随机的转置卷积设置；``output_padding`` 只须小于步幅与空洞率中大的一个。"""
    rng, settings = random.Random(40), []
    while len(settings) < count:
        channels, out, groups = draw_channels(rng)
        kernel = rng.randint(1, 4), rng.randint(1, 4)
        stride, dilation = as_pair(pick(rng, 1, 3), ""), as_pair(pick(rng, 1, 4), "")
        padding = as_pair(pick(rng, 0, 2), "", 0)
        extra = tuple(rng.randrange(max(s, d)) for s, d in zip(stride, dilation, strict=True))
        size = rng.randint(1, 5), rng.randint(1, 5)
        produced = [
            (n - 1) * s - 2 * p + d * (k - 1) + e + 1
            for n, s, p, d, k, e in zip(size, stride, padding, dilation, kernel, extra, strict=True)
        ]
        if min(produced) < 1:
            continue
        options = {"stride": stride, "padding": padding, "output_padding": extra}
        options |= {"groups": groups, "dilation": dilation}
        x = rng.randint(1, 3), channels, *size
        settings.append((x, (channels, out // groups, *kernel), rng.random() < 0.6, options))
    return settings


CONV = conv_settings(56)
TRANSPOSE = transpose_settings(48)


def make_inputs(setting: Setting, out: int) -> list[Tensor]:
    x, weight, bias, _ = setting
    return [normal(*x), normal(*weight, seed=1), *([normal(out, seed=2)] if bias else [])]


def multiplications(setting: Setting) -> int:
    """naive 写法的循环次数 ``O·P·Q·K``。"""
    x, weight, _, options = setting
    y = F.conv2d(torch.empty(x, device="meta"), torch.empty(weight, device="meta"), **options)
    return math.prod(y.shape[1:]) * math.prod(weight[1:])


def compare(
    ours: Callable[..., Tensor],
    official: Callable[..., Tensor],
    inputs: list[Tensor],
    options: dict,
    gradients: bool = True,
) -> None:
    """输出与对每个输入的梯度都在 1e-12 之内；窗口全落在填充里时答案恰为 0，所以不用相对误差。"""
    expected = official(*inputs, **options)
    results = [(ours(*inputs, **options), expected)]
    if gradients:
        grad = normal(*expected.shape, seed=3)
        hand = autograd(lambda *a: ours(*a, **options), grad, *inputs)
        truth = autograd(lambda *a: official(*a, **options), grad, *inputs)
        results += zip(hand, truth, strict=True)
    for actual, expected in results:
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * scale)


# ---------------------------------------------------------------- 与官方对照


def test_random_settings_cover_what_they_should() -> None:
    groups = [s[3]["groups"] for s in CONV]
    assert len(CONV) >= 40 and sum(g > 1 for g in groups) >= 12 and groups.count(1) >= 12
    assert sum(s[0][1] == g > 1 for s, g in zip(CONV, groups, strict=True)) >= 8  # 逐通道
    for kind in (CONV, TRANSPOSE):
        assert {s[2] for s in kind} == {True, False} and {s[0][0] for s in kind} == {1, 2, 3}
        pairs = [as_pair(s[3][key], "") for s in kind for key in ("stride", "dilation")]
        assert sum(a != b for a, b in pairs) >= 20  # 竖直与水平不同，弄反了才看得出
    same = [s[1][2:] for s in CONV if s[3]["padding"] == "same"]
    assert any(k[0] % 2 == 0 for k in same) and any(k[1] % 2 == 0 for k in same)
    assert sum(multiplications(s) <= 500 for s in CONV) >= 12
    excess = [
        extra >= step
        for setting in TRANSPOSE
        for extra, step in zip(setting[3]["output_padding"], setting[3]["stride"], strict=True)
    ]
    assert sum(excess) >= 10


@pytest.mark.parametrize("setting", CONV)
def test_three_forms_equal_torch(setting: Setting) -> None:
    inputs, options = make_inputs(setting, setting[1][0]), setting[3]
    compare(conv2d_im2col, F.conv2d, inputs, options)
    compare(conv2d_fft, F.conv2d, inputs, options)
    work = multiplications(setting)
    if work <= 6000:
        compare(conv2d_naive, F.conv2d, inputs, options, gradients=work <= 500)


@pytest.mark.parametrize("setting", TRANSPOSE)
def test_transposed_convolution_equals_torch(setting: Setting) -> None:
    out = setting[1][1] * setting[3]["groups"]
    compare(conv_transpose2d, F.conv_transpose2d, make_inputs(setting, out), setting[3])


@pytest.mark.parametrize("form", [*FORMS, conv_transpose2d], ids=lambda f: f.__name__)
def test_positional_arguments_and_float32(form: Callable[..., Tensor]) -> None:
    x, weight, bias = normal(2, 4, 5, 6).float(), normal(4, 2, 3, 2).float(), normal(4).float()
    official, last = F.conv2d, ((2, 1), (1, 0), (1, 2), 2)
    if form is conv_transpose2d:
        official, last = F.conv_transpose2d, ((2, 1), (1, 0), (1, 0), 2, (1, 2))
    y = form(x, weight, bias, *last)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, official(x, weight, bias, *last), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [*FORMS, conv_transpose2d], ids=lambda f: f.__name__)
def test_memory_layout_does_not_matter(form: Callable[..., Tensor]) -> None:
    """输入、核与上游梯度都不连续：转置、切片（起点不为 0）、channels_last、expand。"""
    official = F.conv_transpose2d if form is conv_transpose2d else F.conv2d
    base = normal(3, 9, 8, 2)
    weight = normal(2, 3, 2, 2).permute(3, 0, 2, 1)[:, :, :, 1:]  # (2, 2, 2, 2)
    layouts = [
        base.permute(0, 3, 2, 1),
        base.permute(0, 3, 1, 2)[1:, :, 2::2, 1:-1:2],
        normal(3, 2, 4, 5).to(memory_format=torch.channels_last),
        normal(1, 2, 4, 1).expand(3, 2, 4, 5),
    ]
    for x in layouts:
        before = x.clone(), weight.clone()
        expected = official(x, weight, None, 2, 1)
        grads = [normal(*expected.shape[::-1]).permute(3, 2, 1, 0), normal(1, 1, 1, 1)]
        for grad in grads:
            grad = grad.expand_as(expected)
            results = []
            for function in (form, official):
                leaves = [t.detach().requires_grad_() for t in (x, weight)]  # 不复制，保住步长
                y = function(*leaves, None, 2, 1)
                results.append((y.detach(), *torch.autograd.grad(y, leaves, grad)))
            for a, b in zip(*results, strict=True):
                assert_equal(a, b)
        assert torch.equal(x, before[0]) and torch.equal(weight, before[1])  # 输入没有被改动


@pytest.mark.parametrize("form", [*FORMS, conv_transpose2d], ids=lambda f: f.__name__)
@pytest.mark.parametrize("padding", [0, 1])
def test_output_is_an_ordinary_tensor(form: Callable[..., Tensor], padding: int) -> None:
    """没有偏置时输出也能就地修改、能 view，不是什么东西的视图。"""
    x, weight = normal(2, 3, 4, 4).requires_grad_(), normal(3, 3, 2, 2)
    y = form(x, weight, None, 2, padding)
    assert y.is_contiguous() and y.view(2, -1).shape[0] == 2
    F.relu(y, inplace=True).sum().backward()
    official = F.conv_transpose2d if form is conv_transpose2d else F.conv2d
    grad = torch.ones_like(y)
    (truth,) = autograd(lambda x: official(x, weight, None, 2, padding).relu(), grad, x)
    assert_equal(x.grad, truth)


@pytest.mark.parametrize("form", [conv2d_naive, conv2d_im2col, conv_transpose2d])
def test_empty_batch(form: Callable[..., Tensor]) -> None:
    x, weight = normal(0, 4, 5, 5).requires_grad_(), normal(4, 2, 3, 3).requires_grad_()
    y = form(x, weight, groups=2)
    y.sum().backward()
    assert y.shape[0] == 0 and x.grad.shape == x.shape
    assert weight.grad.shape == weight.shape and not weight.grad.any()


# ---------------------------------------------------------------- 反向：冻结、分块、数值梯度


@pytest.mark.parametrize("form", [conv2d_im2col, conv_transpose2d])
@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_input_costs_nothing(
    form: Callable[..., Tensor], frozen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """第一层的输入、冻结的骨干：不需要的那一半梯度根本不算。"""
    tensors = [normal(2, 2, 5, 5), normal(2, 2, 3, 3, seed=1)]
    tensors[1 - frozen].requires_grad_()
    y = form(*tensors)
    skipped = {
        (conv2d_im2col, 0): "conv_grad_input",
        (conv_transpose2d, 0): "conv_forward",
        (conv2d_im2col, 1): "conv_grad_weight",
        (conv_transpose2d, 1): "conv_grad_weight",
    }[form, frozen]
    monkeypatch.setitem(form.__globals__, skipped, None)  # 若被调用就是 TypeError
    y.square().sum().backward()
    official = F.conv_transpose2d if form is conv_transpose2d else F.conv2d
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    official(*leaves).square().sum().backward()
    assert_equal(tensors[1 - frozen].grad, leaves[1 - frozen].grad)
    assert tensors[frozen].grad is None


@pytest.mark.parametrize("samples", [0.3, 1, 2, 3, 7, 100])
def test_chunks_do_not_change_the_result(samples: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """每块 ``samples`` 个样本：整除、不整除、一块装下、连一个样本都装不下。"""
    x, weight, bias = normal(7, 4, 6, 5), normal(6, 2, 3, 2, seed=1), normal(6, seed=2)
    options = {"stride": (1, 2), "padding": (1, 0), "groups": 2}
    columns = 4 * 3 * 2 * (6 * 2) * x.element_size()  # C·R·S·P·Q 个 float64
    monkeypatch.setattr(conv, "CHUNK_BYTES", int(samples * columns))
    geometry = make_geometry((3, 2), **options)
    parts = [len(x[part]) for part in conv._chunks(x, geometry, geometry.output_size(6, 5))]
    assert parts[0] == min(7, max(1, int(samples))) and sum(parts) == 7 and min(parts) >= 1
    compare(conv2d_im2col, F.conv2d, [x, weight, bias], options)
    back, options = normal(4, 3, 3, 2, seed=1), {"stride": (1, 2), "padding": (1, 0), "groups": 2}
    compare(conv_transpose2d, F.conv_transpose2d, [x, back, bias], options)


def test_numerical_gradients() -> None:
    inputs = normal(2, 4, 5, 4), normal(4, 2, 2, 3), normal(4)
    x, weight, bias = (t.requires_grad_() for t in inputs)
    stepped = {"stride": (2, 1), "groups": 2}
    for form, options in [
        (conv2d_im2col, {"padding": (1, 2), "dilation": (1, 2)}),
        (conv2d_fft, {"padding": "valid"}),
        (conv_transpose2d, {"padding": 1, "dilation": (1, 3), "output_padding": (1, 2)}),
    ]:
        options |= stepped
        assert torch.autograd.gradcheck(lambda *a, f=form, o=options: f(*a, **o), (x, weight, bias))


@pytest.mark.parametrize("form", [conv2d_im2col, conv_transpose2d])
def test_second_derivative_is_refused_not_wrong(form: Callable[..., Tensor]) -> None:
    x, weight = normal(1, 1, 3, 3).requires_grad_(), normal(1, 1, 2, 2).requires_grad_()
    (gx,) = torch.autograd.grad(form(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gx.sum().backward()


@pytest.mark.parametrize("form", [conv2d_naive, conv2d_fft])
def test_second_derivative_of_the_differentiable_forms(form: Callable[..., Tensor]) -> None:
    x, weight = normal(1, 2, 4, 3), normal(2, 2, 2, 2, seed=1)

    def gradient_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def gradient(x: Tensor, weight: Tensor) -> Tensor:
            x = x if x.requires_grad else x.clone().requires_grad_()
            return torch.autograd.grad(function(x, weight).pow(3).sum(), x, create_graph=True)[0]

        return gradient

    compare(gradient_of(form), gradient_of(F.conv2d), [x, weight], {})
