"""第 4 章的池化：最大（值与下标）、平均、自适应、全局，与 PyTorch 对照；并列、nan、−∞ 与填充。"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chapter_04_cnn_classic.pooling import (
    adaptive_avg_pool2d,
    avg_pool2d,
    global_avg_pool2d,
    max_pool2d,
)
from tests.parity import assert_equal, autograd, normal
from utils import make_generator

Setting = tuple[tuple[int, ...], tuple[int, int], tuple[int, int] | None, tuple[int, int]]
LOWEST = -torch.inf


def pool_settings(count: int) -> list[Setting]:
    """(输入形状, 窗口, 步幅, 填充)：重叠与不重叠、步幅大于窗口、奇数大小、填充不超过窗口的一半。"""
    rng, settings = random.Random(5), []
    for _ in range(count):
        kernel = rng.randint(1, 4), rng.randint(1, 5)
        stride = None if rng.random() < 0.3 else (rng.randint(1, 4), rng.randint(1, 4))
        padding = rng.randint(0, kernel[0] // 2), rng.randint(0, kernel[1] // 2)
        size = [max(1, k - 2 * p) + rng.randint(0, 6) for k, p in zip(kernel, padding, strict=True)]
        settings.append(((rng.randint(1, 3), rng.randint(1, 3), *size), kernel, stride, padding))
    return settings


SETTINGS = pool_settings(36)


def official_max(x: Tensor, *options: object) -> tuple[Tensor, Tensor]:
    return F.max_pool2d(x, *options, return_indices=True)


def check_max(x: Tensor, *options: object) -> None:
    """值、下标、梯度都逐位相同（梯度的加法次序可能不同，所以放宽到 1e-13）。"""
    (values, indices), (expected, where) = max_pool2d(x, *options), official_max(x, *options)
    assert torch.equal(values.nan_to_num(7), expected.nan_to_num(7))
    assert indices.dtype == torch.int64 and torch.equal(indices, where)
    assert torch.equal(values.isnan(), expected.isnan())
    grad = normal(*expected.shape, seed=3)
    (hand,) = autograd(lambda x: max_pool2d(x, *options)[0], grad, x)
    (truth,) = autograd(lambda x: official_max(x, *options)[0], grad, x)
    torch.testing.assert_close(hand, truth, rtol=1e-13, atol=1e-13)


# ---------------------------------------------------------------- 最大池化


def test_random_settings_cover_what_they_should() -> None:
    steps = [(kernel, stride or kernel) for _, kernel, stride, _ in SETTINGS]
    assert any(s[0] < k[0] for k, s in steps) and any(s[0] > k[0] for k, s in steps)
    assert sum(p[0] != p[1] for *_, p in SETTINGS) >= 8 and sum(not any(p) for *_, p in SETTINGS)
    assert sum(stride is None for _, _, stride, _ in SETTINGS) >= 5


@pytest.mark.parametrize("setting", SETTINGS)
def test_max_pool_equals_torch(setting: Setting) -> None:
    shape, *options = setting
    check_max(normal(*shape), *options)


@pytest.mark.parametrize("setting", SETTINGS)
def test_max_pool_with_ties_and_special_values(setting: Setting) -> None:
    """只有五种值：并列处处都有，nan 与 ±∞ 也在其中；下标仍与官方相同。"""
    shape, *options = setting
    values = torch.tensor([0.0, 1.0, LOWEST, torch.inf, torch.nan]).double()
    for kinds in (2, 3, 4, 5):
        index = torch.randint(kinds, shape, generator=make_generator(kinds))
        check_max(values[index], *options)
    check_max(torch.full(shape, LOWEST).double(), *options)
    check_max(torch.full(shape, torch.nan).double(), *options)


def test_window_of_minus_infinity_at_the_border() -> None:
    """填充也是 −∞，却不能取胜：下标必须落在图里，梯度才有去处。"""
    x = torch.full((1, 1, 3, 3), LOWEST).double()
    values, indices = max_pool2d(x, 2, 2, 1)
    assert (values == LOWEST).all() and indices.tolist() == [[[[0, 1], [3, 4]]]]


def test_max_pool_by_hand() -> None:
    x = torch.tensor([[[[1.0, 5, 2], [5, 0, 3], [4, 6, 5]]]], requires_grad=True)
    values, indices = max_pool2d(x, 2, 1)
    assert values.tolist() == [[[[5, 5], [6, 6]]]]
    assert indices.tolist() == [[[[1, 1], [7, 7]]]]  # 两个 5 并列：取先遇到的
    values.backward(torch.tensor([[[[1.0, 2], [3, 4]]]]))
    assert x.grad.tolist() == [[[[0, 3, 0], [0, 0, 0], [0, 7, 0]]]]  # 两次取胜，梯度相加
    assert not indices.requires_grad


def test_indices_undo_the_pooling() -> None:
    x = normal(2, 3, 6, 8)
    values, indices = max_pool2d(x, (2, 4))
    restored = F.max_unpool2d(values, indices, (2, 4))
    assert torch.equal(restored[restored != 0].sort().values, values.flatten().sort().values)
    assert torch.equal(restored[restored != 0], x[restored != 0])


def test_max_pool_of_integers() -> None:
    x = torch.randint(-9, 9, (2, 2, 5, 6), generator=make_generator(0)) - 2**40
    for ours, official in zip(max_pool2d(x, 3, 2, 1), official_max(x, 3, 2, 1), strict=True):
        assert torch.equal(ours, official)


# ---------------------------------------------------------------- 平均池化


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("include", [True, False])
def test_avg_pool_equals_torch(setting: Setting, include: bool) -> None:
    shape, *options = setting
    x = normal(*shape)
    expected = F.avg_pool2d(x, *options, count_include_pad=include)
    assert_equal(avg_pool2d(x, *options, count_include_pad=include), expected)
    grad = normal(*expected.shape, seed=3)
    hand = autograd(lambda x: avg_pool2d(x, *options, count_include_pad=include), grad, x)
    truth = autograd(lambda x: F.avg_pool2d(x, *options, count_include_pad=include), grad, x)
    assert_equal(hand[0], truth[0])


def test_avg_pool_by_hand() -> None:
    x = torch.tensor([[[[4.0, 8]]]], requires_grad=True)
    assert avg_pool2d(x, (1, 2), 1, (0, 1)).tolist() == [[[[2, 6, 4]]]]
    y = avg_pool2d(x, (1, 2), 1, (0, 1), count_include_pad=False)
    assert y.tolist() == [[[[4, 6, 8]]]]
    y.backward(torch.tensor([[[[1.0, 10, 100]]]]))
    assert x.grad.tolist() == [[[[6, 105]]]]


# ---------------------------------------------------------------- 自适应与全局

ADAPTIVE = [
    ((2, 3, 7, 5), (3, 2)),  # 除不尽：窗口大小不等，相互重叠
    ((1, 1, 7, 9), (7, 9)),  # 原样
    ((2, 2, 3, 4), (5, 7)),  # 输出比输入大
    ((2, 2, 13, 13), 6),  # AlexNet
    ((1, 2, 1, 2), (7, 7)),  # VGG 的 32×64 输入
    ((2, 3, 5, 6), 1),
    ((2, 3, 8, 8), (4, 2)),
]


@pytest.mark.parametrize(("shape", "output"), ADAPTIVE)
def test_adaptive_avg_pool_equals_torch(
    shape: tuple[int, ...], output: int | tuple[int, int]
) -> None:
    x = normal(*shape)
    expected = F.adaptive_avg_pool2d(x, output)
    assert_equal(adaptive_avg_pool2d(x, output), expected)
    grad = normal(*expected.shape, seed=3)
    (hand,) = autograd(lambda x: adaptive_avg_pool2d(x, output), grad, x)
    (truth,) = autograd(lambda x: F.adaptive_avg_pool2d(x, output), grad, x)
    assert_equal(hand, truth)


def test_global_average() -> None:
    x, grad = normal(2, 3, 5, 6), normal(2, 3, seed=1)
    assert_equal(global_avg_pool2d(x), F.adaptive_avg_pool2d(x, 1).flatten(1))
    (gx,) = autograd(global_avg_pool2d, grad, x)
    assert_equal(gx, (grad / 30)[..., None, None].expand_as(x))


# ---------------------------------------------------------------- 三者共有的

POOLS: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = [
    (lambda x: max_pool2d(x, 3, 2, 1)[0], lambda x: F.max_pool2d(x, 3, 2, 1)),
    (lambda x: avg_pool2d(x, 3, 2, 1), lambda x: F.avg_pool2d(x, 3, 2, 1)),
    (lambda x: adaptive_avg_pool2d(x, (3, 2)), lambda x: F.adaptive_avg_pool2d(x, (3, 2))),
]
POOL_IDS = ["max", "avg", "adaptive"]


@pytest.mark.parametrize(("ours", "official"), POOLS, ids=POOL_IDS)
def test_layouts_expanded_gradients_and_float32(ours: Callable, official: Callable) -> None:
    layouts = [
        normal(3, 7, 6, 2).permute(0, 3, 2, 1),
        normal(3, 4, 9, 8)[1:, ::2, 1:, 1:-1],
        normal(2, 3, 5, 7).to(memory_format=torch.channels_last),
        normal(2, 1, 5, 7).expand(2, 3, 5, 7),
    ]
    for x in layouts:
        before, x = x.clone(), x.detach().requires_grad_()
        y = official(x)
        assert_equal(ours(x), y)
        spread = torch.ones(1, 1, 1, 1).double().expand_as(y)  # sum() 的梯度就是这样的
        for grad in (spread, normal(*y.shape[::-1]).permute(3, 2, 1, 0)):
            (hand,) = torch.autograd.grad(ours(x), x, grad)
            assert_equal(hand, torch.autograd.grad(official(x), x, grad)[0])
        assert torch.equal(x, before)
        single = ours(x.detach().float())
        assert single.dtype == torch.float32
        torch.testing.assert_close(single, official(x.detach().float()), rtol=1e-6, atol=1e-6)
    assert ours(normal(0, 2, 5, 5)).shape == official(normal(0, 2, 5, 5)).shape


@pytest.mark.parametrize(("ours", "official"), POOLS, ids=POOL_IDS)
def test_numerical_gradients(ours: Callable, official: Callable) -> None:
    assert torch.autograd.gradcheck(ours, (normal(2, 2, 5, 4).requires_grad_(),))


@pytest.mark.parametrize("ours", [pair[0] for pair in POOLS[:2]], ids=POOL_IDS[:2])
def test_second_derivative_is_refused_not_wrong(ours: Callable) -> None:
    x = normal(1, 1, 5, 5).requires_grad_()
    (gx,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gx.sum().backward()


@pytest.mark.parametrize("pool", [max_pool2d, avg_pool2d])
@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 5, 5), (2,), r"\(B, C, H, W\)，实为 \(3, 5, 5\)"),
        ((1, 3, 5, 5), (0,), "kernel_size=0 应为一个或两个不小于 1"),
        ((1, 3, 5, 5), ((2, 2, 2),), r"kernel_size=\(2, 2, 2\)"),
        ((1, 3, 5, 5), (2, 0), "stride=0"),
        ((1, 3, 5, 5), (2, 2, -1), "padding=-1 应为一个或两个不小于 0"),
        ((1, 3, 5, 5), (2, 1, "same"), "padding='same' 应为一个或两个"),
        ((1, 3, 5, 5), (3, 2, 2), r"padding=\(2, 2\) 至多为窗口 3 的一半"),
        ((1, 3, 5, 5), ((4, 3), 2, (1, 2)), r"padding=\(1, 2\) 至多为窗口 \(4, 3\) 的一半"),
        ((1, 3, 5, 5), ((3, 4), 2, (2, 1)), r"padding=\(2, 1\) 至多为窗口 \(3, 4\) 的一半"),
        ((1, 3, 5, 4), ((2, 6),), "输入 5×4 加上填充 0 仍放不下张开后长 6"),
    ],
)
def test_rejects_nonsense(
    pool: Callable, shape: tuple[int, ...], options: tuple, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        pool(normal(*shape), *options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("shape", "output", "message"),
    [
        ((3, 5, 5), 1, r"实为 \(3, 5, 5\)"),
        ((1, 3, 0, 5), 1, r"H、W 至少为 1，实为 \(1, 3, 0, 5\)"),
        ((1, 3, 5, 5), 0, "output_size=0"),
        ((1, 3, 5, 5), (None, 2), r"output_size=\(None, 2\)"),
    ],
)
def test_adaptive_rejects_nonsense(shape: tuple[int, ...], output: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        adaptive_avg_pool2d(normal(*shape), output)
    assert "\n" not in str(error.value)
