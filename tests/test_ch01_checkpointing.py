"""第 1 章的激活检查点：梯度、随机数与不设检查点时逐位相同；重算的次数与内存的峰值同公式相符。"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential as official_sequential

from chapter_01_tensor_autograd.checkpointing import (
    checkpoint,
    checkpoint_by_hooks,
    checkpoint_sequential,
)
from tests.parity import normal
from utils.memory import TensorMemory
from utils.seed import set_seed

Method = Callable[..., Tensor]


def plain(segment: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """不设检查点。"""
    return segment(*inputs)


METHODS = [checkpoint, checkpoint_by_hooks]
both_methods = pytest.mark.parametrize("method", METHODS)

# ---------------------------------------------------------------- 试验用的网络


class Layer(nn.Module):
    """Linear-Dropout-Tanh，记下前向了几次。"""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(6, 6).double(), nn.Dropout(0.3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.dropout(self.linear(x)).tanh()


class Mixer(nn.Module):
    """几个输入（其一是整数张量，其二不是张量）；三个全局的随机数生成器都要用到。"""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 3).double(), nn.Embedding(4, 3).double()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, index: Tensor, y: Tensor, scale: float, kind: str) -> Tensor:
        hidden = self.dropout(self.first(x)) * scale + self.second(index) * y
        mask = torch.from_numpy(np.random.random(hidden.shape))
        return getattr(torch, kind)(hidden) * mask * random.random()


def chain(depth: int) -> list[Layer]:
    """``depth`` 层，权重每次相同。"""
    set_seed(0)
    return [Layer() for _ in range(depth)]


def chain_with_leaves(depth: int, batch: int) -> tuple[list[Layer], Tensor, list[Tensor]]:
    """各层、要求梯度的输入、要比较梯度的全部张量。"""
    layers, x = chain(depth), normal(batch, 6).requires_grad_()
    return layers, x, [x, *nn.ModuleList(layers).parameters()]


def draw() -> tuple[float, float, float]:
    """三个全局生成器各取一个数：状态不同，取出的就不同。"""
    return random.random(), float(np.random.random()), torch.rand(()).item()


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    """逐位相同，且不全为零。"""
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b) and b.any()


def gradients(forward: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[list[Tensor], tuple]:
    """从同一个随机状态前向、反向：``([输出, 各梯度], 反向之后取出的随机数)``。"""
    for leaf in leaves:
        leaf.grad = None
    set_seed(1)
    out = forward()
    (out * torch.rand_like(out)).sum().backward()  # 段之后还要用随机数
    return [out.detach(), *(leaf.grad for leaf in leaves)], draw()


def assert_like(
    ours: Callable[[], Tensor], reference: Callable[[], Tensor], leaves: list[Tensor]
) -> None:
    """输出、梯度、此后的随机数都与 ``reference`` 相同。"""
    (expected, after), (actual, after_ours) = (gradients(f, leaves) for f in (reference, ours))
    assert_same(actual, expected)
    assert after_ours == after


# ---------------------------------------------------------------- 一段


@both_methods
@pytest.mark.parametrize("batch", [1, 4])
def test_several_inputs_with_dropout(method: Method, batch: int) -> None:
    mixer = Mixer()
    x, y = normal(batch, 5).requires_grad_(), normal(batch, 3, seed=1).requires_grad_()
    index, leaves = torch.arange(batch) % 4, [x, y, *mixer.parameters()]

    inputs = x, index, y, 0.7, "tanh"
    assert_like(lambda: method(mixer, *inputs), lambda: mixer(*inputs), leaves)


@both_methods
def test_only_some_inputs_require_grad(method: Method) -> None:
    x, y, seen = normal(3, 4).requires_grad_(), normal(3, 4, seed=1), []

    def product(x: Tensor, y: Tensor, same: Tensor) -> Tensor:
        seen.append((x.requires_grad, y.requires_grad))
        return x * y * same

    method(product, x, y, x).sum().backward()  # 同一个输入传了两次
    assert torch.equal(x.grad, 2 * (x * y).detach()) and y.grad is None
    assert seen == [(True, False)] * 2


@both_methods
def test_segment_runs_once_forward_and_once_backward(method: Method) -> None:
    (layer,), x, _ = chain_with_leaves(1, batch=2)
    out = method(layer, x)
    assert layer.calls == 1
    out.sum().backward()
    assert layer.calls == 2
    method(layer, x)  # 没有反向，就不重算
    assert layer.calls == 3
    with torch.no_grad():
        method(layer, x)
    assert layer.calls == 4


@both_methods
def test_backward_twice_with_retain_graph(method: Method) -> None:
    (layer,), x, leaves = chain_with_leaves(1, batch=2)
    set_seed(1)
    out = method(layer, x).sum()
    out.backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves]
    random.random(), np.random.random(), torch.rand(3)  # 重算不受此刻状态的影响
    out.backward(retain_graph=True)
    assert_same([leaf.grad for leaf in leaves], [2 * g for g in first])
    assert layer.calls == 3


@both_methods
def test_random_state_is_put_back_even_if_recomputation_fails(method: Method) -> None:
    (layer,) = chain(1)

    def segment(x: Tensor) -> Tensor:
        x = layer(x)
        if layer.calls == 2:  # 重算时
            raise KeyError(draw())
        return x

    out = method(segment, normal(2, 6).requires_grad_())
    set_seed(5)
    with pytest.raises(KeyError):
        out.sum().backward()
    now = draw()
    set_seed(5)
    assert now == draw()


@both_methods
def test_nested(method: Method) -> None:
    layers, x, leaves = chain_with_leaves(3, batch=2)

    def block(inner: Method, x: Tensor) -> Tensor:
        return inner(layers[2], inner(layers[1], inner(layers[0], x)) * 2)

    for outer, inner in [(method, checkpoint_by_hooks), (checkpoint_by_hooks, method)]:
        assert_like(partial(outer, block, inner, x), partial(block, plain, x), leaves)


def test_hooks_support_plain_inputs_autograd_grad_and_second_derivatives() -> None:
    layers, x, found = chain(2), normal(3, 6), []  # x 不要求梯度
    network = nn.Sequential(*layers)
    parameters = list(network.parameters())
    for method in (plain, checkpoint_by_hooks):
        set_seed(1)
        out = method(network, x)
        first = torch.autograd.grad(out.square().sum(), parameters, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), parameters)
        found.append([out, *first, *second])
    assert_same(*found)
    assert all(p.grad is None for p in parameters)
    assert layers[1].calls == 4  # 前向两次，一阶、二阶各重算一次


# ---------------------------------------------------------------- 逐段


@both_methods
@pytest.mark.parametrize("batch", [1, 3])
def test_sequential_equals_plain_for_every_number_of_segments(method: Method, batch: int) -> None:
    layers, x, leaves = chain_with_leaves(7, batch)
    for segments in range(1, 8):
        for layer in layers:
            layer.calls = -1  # 对照的那一次不算
        ours = partial(checkpoint_sequential, layers, segments, x, method)
        assert_like(ours, partial(nn.Sequential(*layers), x), leaves)
        calls = [layer.calls for layer in layers]
        last = calls.count(1)  # 最后一段不重算
        assert calls == [2] * (7 - last) + [1] * last
        assert last in (7 // segments, -(-7 // segments))


@pytest.mark.parametrize("depth", range(1, 14))
def test_sequential_splits_evenly(depth: int) -> None:
    for segments in range(1, depth + 1):
        sizes: list[int] = []

        def method(block: nn.Sequential, x: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(len(block))
            return block(x)

        checkpoint_sequential([nn.Identity()] * depth, segments, torch.zeros(1), method)
        sizes.append(depth - sum(sizes))  # 最后一段
        assert len(sizes) == segments
        assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_sequential_equals_official(reentrant: bool) -> None:
    layers, x, leaves = chain_with_leaves(5, batch=2)
    official = partial(official_sequential, layers, 3, x, use_reentrant=reentrant)
    for method in METHODS:
        assert_like(partial(checkpoint_sequential, layers, 3, x, method), official, leaves)


# ---------------------------------------------------------------- 内存


def peak_units(depth: int, segments: int, method: Method) -> float:
    """Linear-Tanh 的 ``depth`` 层前向加反向的峰值，以一层的激活为单位；梯度事先分配好。"""
    batch, width = 512, 8
    layers = [nn.Sequential(nn.Linear(width, width, bias=False), nn.Tanh()) for _ in range(depth)]
    x = torch.randn(batch, width, requires_grad=True)
    for p in [x, *nn.ModuleList(layers).parameters()]:
        p.grad = torch.zeros_like(p)
    with TensorMemory() as memory:
        checkpoint_sequential(layers, segments, x, method).sum().backward()
    assert memory.live == 0  # 反向之后什么也不留
    return memory.peak / (batch * width * 4)


def test_peak_follows_the_formula() -> None:
    depth, peaks = 36, {}
    for segments in (1, 2, 3, 4, 6, 9, 12, 18, 36):
        peaks[segments] = peak_units(depth, segments, checkpoint)
        assert 0 <= peaks[segments] - (segments + depth / segments) <= 1.1  # 临时的张量
    assert min(peaks, key=peaks.get) == 6  # √36
    for method in METHODS:
        assert peak_units(64, 8, method) <= 0.3 * peak_units(64, 1, method)


# ---------------------------------------------------------------- 错误


@pytest.mark.parametrize("inputs", [(), (3.0,), (torch.zeros(2, 6, dtype=torch.float64), "x")])
def test_checkpoint_needs_an_input_with_gradient(inputs: tuple) -> None:
    with pytest.raises(ValueError, match="至少要有一个 requires_grad=True 的输入"):
        checkpoint(chain(1)[0], *inputs)


@pytest.mark.parametrize("segments", [-1, 0, 4])
def test_segments_out_of_range(segments: int) -> None:
    with pytest.raises(ValueError, match=f"segments={segments} 应在 1 到层数 3 之间"):
        checkpoint_sequential(chain(3), segments, normal(2, 6).requires_grad_())


def test_segment_cut_from_the_graph() -> None:
    out = checkpoint(lambda x: x.detach() * 2, normal(2, 6).requires_grad_())
    with pytest.raises(RuntimeError, match="这一段的输出与任何要求梯度的张量都无关"):
        out.sum().backward()


def test_checkpoint_notices_an_input_changed_before_backward() -> None:
    x = normal(2, 6).requires_grad_() * 1
    out = checkpoint(torch.exp, x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="inplace operation"):
        out.sum().backward()


def test_hooks_notice_an_input_changed_before_backward() -> None:
    x = normal(3).requires_grad_()
    h = x * 1
    y = checkpoint_by_hooks(torch.exp, h)
    h.add_(1)
    with pytest.raises(RuntimeError, match="输入在前向之后被原地修改"):
        torch.autograd.grad(y.sum(), x)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_checkpoint_refuses_second_derivatives() -> None:
    x = normal(3).requires_grad_()
    loss = (checkpoint(lambda v: v**3, x) + x**2).sum()
    with pytest.raises(RuntimeError, match="不支持二阶导数"):
        loss.backward(create_graph=True)  # 若放行，x³ 的那一份就悄悄丢了


def test_hooks_notice_a_segment_that_cannot_be_repeated() -> None:
    x = normal(3).requires_grad_()
    y = checkpoint_by_hooks(lambda v: v.sigmoid().mul_(2.0), x)
    with pytest.raises(RuntimeError, match="段内保存的张量又被原地修改"):
        y.sum().backward()
    calls: list[int] = []

    def fickle(v: Tensor) -> Tensor:
        calls.append(1)
        return v.exp().sin() if len(calls) == 1 else v.exp()

    z = checkpoint_by_hooks(fickle, x)
    with pytest.raises(RuntimeError, match="存了 2 个，重算 1 个"):
        z.sum().backward()


def test_hooks_survive_a_partial_backward() -> None:
    segment = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = normal(5, 3).requires_grad_()
    y, official = checkpoint_by_hooks(segment, x), segment(x)
    for target in (segment[2].weight, x, segment[0].weight, x):
        (g,) = torch.autograd.grad(y.sum(), target, retain_graph=True)
        (expected,) = torch.autograd.grad(official.sum(), target, retain_graph=True)
        assert torch.equal(g, expected)


def test_evaluation_and_nesting_need_no_gradients() -> None:
    layers = chain(6)
    x = normal(2, 6)
    for layer in layers:
        layer.eval()
    with torch.no_grad():
        y = checkpoint_sequential(layers, 3, x)
        assert torch.equal(y, nn.Sequential(*layers)(x)) and not y.requires_grad
    inner = layers[0]
    leaf = x.clone().requires_grad_()
    nested = checkpoint(lambda t: checkpoint(inner, t).sin(), leaf)
    nested.sum().backward()
    (expected,) = torch.autograd.grad(inner(leaf).sin().sum(), leaf)
    assert torch.equal(leaf.grad, expected)
