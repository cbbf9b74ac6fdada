"""第 5 章的 DenseNet：与 torchvision 逐位对照，检查点不改变任何结果，拼接的内存逐字节相符。"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chapter_05_resnet_modern_cnn import densenet as module
from chapter_05_resnet_modern_cnn.densenet import (
    DenseBlock,
    DenseNet,
    Transition,
    borrowed_statistics,
    densenet121,
    densenet_cifar,
    rename_old_keys,
    stored_features,
)
from tests.parity import assert_equal, normal
from utils import count_parameters
from utils.memory import TensorMemory

needs_torchvision = pytest.mark.usefixtures("needs_torchvision")

COUNTS = {"densenet121": 7978856, "densenet169": 14149480, "densenet201": 20013928}


def official(name: str) -> Callable[..., nn.Module]:
    import torchvision

    return getattr(torchvision.models, name)


def shake(model: nn.Module) -> nn.Module:
    """给每个 BatchNorm 换上随机的参数与统计量，缺省的 1 与 0 看不出用错了哪个。"""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.2)
            nn.init.normal_(layer.running_mean, 0, 0.2)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return model


# ---------------------------------------------------------------- 与 torchvision 对照


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
@needs_torchvision
def test_structure_equals_torchvision(name: str, count: int) -> None:
    with torch.device("meta"):
        for options in ({}, {"num_classes": 7}):
            mine, theirs = getattr(module, name)(**options), official(name)(**options)
            shapes = [
                [(key, value.shape, value.dtype) for key, value in model.state_dict().items()]
                for model in (mine, theirs)
            ]
            assert shapes[0] == shapes[1]
            if not options:
                assert count_parameters(mine) == count == count_parameters(theirs)


@needs_torchvision
def test_initial_weights_outputs_and_gradients_equal_torchvision() -> None:
    """同一颗种子，初值逐位相同；推理与训练的输出、全部梯度、更新之后的统计量也是。"""
    models = []
    for make in (densenet121, official("densenet121")):
        torch.manual_seed(7)
        models.append(make(num_classes=5))
    mine, theirs = models
    for a, b in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    mine.load_state_dict(shake(theirs).state_dict())
    x = normal(2, 3, 64, 77).float()
    with torch.no_grad():
        y = mine.eval()(x)
        assert torch.equal(y, theirs.eval()(x)) and (y[0] - y[1]).abs().max() > 1e-3
    for model in models:
        F.cross_entropy(model.train()(x), torch.tensor([1, 3])).backward()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    for a, b in zip(mine.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("trailing", [True, False])
def test_rename_old_keys(trailing: bool) -> None:
    """旧文件：``norm.1`` 写法，没有 ``num_batches_tracked``；换名之后严格装入，值各就各位。"""
    model = shake(densenet_cifar())
    new = model.state_dict()
    old = {
        key.replace("norm1", "norm.1")
        .replace("norm2", "norm.2")
        .replace("conv1", "conv.1")
        .replace("conv2", "conv.2")
        if "denselayer" in key
        else key: value
        for key, value in new.items()
        if trailing or "num_batches" not in key
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    assert "features.transition1.norm.weight" in old  # 过渡层的名字里没有数字，不该动
    fresh = densenet_cifar()
    fresh.load_state_dict(rename_old_keys(old))
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, new[key]), key
    assert rename_old_keys(new).keys() == new.keys()


# ---------------------------------------------------------------- 结构


def test_dense_block_by_hand() -> None:
    """按定义重写一遍：每层的输入是前面全部特征的拼接，输出是全部特征的拼接。"""
    block = shake(DenseBlock(3, 5, 2, memory_efficient=False)).double().eval()
    x = normal(2, 5, 6, 4)
    y = block(x)
    assert y.shape == (2, 11, 6, 4) and torch.equal(y[:, :5], x)
    for index, layer in enumerate(block.children()):
        known = y[:, : 5 + 2 * index]
        z = layer.conv1(layer.norm1(known).clamp(min=0))
        z = layer.conv2(layer.norm2(z).clamp(min=0))
        assert_equal(z, y[:, 5 + 2 * index : 7 + 2 * index])
        assert layer.conv1.out_channels == 8  # 4k


def test_every_layer_reads_every_earlier_layer() -> None:
    """最后一层直接读前面的每一组特征：导数都不为零，不必穿过中间的层。"""
    *_, last = DenseBlock(4, 6, 3, memory_efficient=False).double().children()
    features = [normal(2, width, 4, 4, seed=width).requires_grad_() for width in (6, 3, 3, 3)]
    grads = torch.autograd.grad(last(features).square().sum(), features)
    assert all(g.abs().max() > 1e-3 for g in grads)


def test_transition_halves() -> None:
    layer = shake(Transition(6, 3)).double().eval()
    x = normal(2, 6, 4, 6)
    y = F.conv2d(layer.norm(x).clamp(min=0), layer.conv.weight)
    expected = (y[..., ::2, ::2] + y[..., 1::2, ::2] + y[..., ::2, 1::2] + y[..., 1::2, 1::2]) / 4
    assert_equal(layer(x), expected)


# ---------------------------------------------------------------- 检查点


def test_checkpointing_changes_nothing() -> None:
    """输出、梯度、滑动统计量与不设检查点的逐位相同，连做两步；推理模式也一样。"""
    torch.manual_seed(1)
    plain = shake(densenet_cifar())
    efficient = densenet_cifar(memory_efficient=True)
    efficient.load_state_dict(plain.state_dict())
    for step in range(2):
        x, y = normal(4, 3, 16, 20, seed=step).float(), torch.tensor([1, 3, 5, 0])
        outputs = []
        for model in (plain, efficient):
            model.zero_grad()
            outputs.append(model(x))
            F.cross_entropy(outputs[-1], y).backward()
            for parameter in model.parameters():
                parameter.data.sub_(parameter.grad, alpha=0.1)
        assert torch.equal(*outputs)
        for a, b in zip(plain.parameters(), efficient.parameters(), strict=True):
            assert a.grad.abs().max() > 0 and torch.equal(a.grad, b.grad) and torch.equal(a, b)
        for a, b in zip(plain.buffers(), efficient.buffers(), strict=True):
            assert torch.equal(a, b)
    counters = [b.item() for n, b in efficient.named_buffers() if "num_batches" in n]
    assert set(counters) == {2}
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), efficient.eval()(x))


def test_recomputation_without_care_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """不借出统计量，norm1 每步混入两次：running_mean 由 0.1 μ 变成 0.19 μ，梯度却看不出来。"""
    blocks = [DenseBlock(2, 4, 3, memory_efficient=True)]
    blocks.append(copy.deepcopy(blocks[0]))
    x = (normal(8, 4, 5, 5) + 3).float()
    for block, careless in zip(blocks, (False, True), strict=True):
        if careless:
            monkeypatch.setattr(module, "borrowed_statistics", lambda norm: nullcontext())
        block(x).square().sum().backward()
    mean = x.mean(dim=(0, 2, 3))
    for block, share in zip(blocks, (0.1, 0.19), strict=True):
        torch.testing.assert_close(block.denselayer1.norm1.running_mean, share * mean)
    for a, b in zip(*(block.parameters() for block in blocks), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_recomputation_stops_before_the_convolution() -> None:
    """重算两次的只有拼接、BatchNorm、ReLU：卷积的反向不需要它自己的输出。"""
    block = DenseBlock(2, 4, 3, memory_efficient=True)
    calls = {"relu1": 0, "conv1": 0}
    for name in calls:

        def count(*_: object, name: str = name) -> None:
            calls[name] += 1

        getattr(block.denselayer2, name).register_forward_hook(count)
    block(normal(2, 4, 3, 3).float()).sum().backward()
    assert calls == {"relu1": 2, "conv1": 1}


def test_borrowed_statistics_return_even_after_an_error() -> None:
    norm = nn.BatchNorm2d(3)
    own = dict(norm.named_buffers())
    with pytest.raises(KeyError), borrowed_statistics(norm):
        norm(normal(4, 3, 2, 2).float())
        assert norm.num_batches_tracked == 1
        raise KeyError
    assert all(value is own[name] for name, value in norm.named_buffers())
    assert norm.num_batches_tracked == 0 and not norm.running_mean.any()


# ---------------------------------------------------------------- 内存


@pytest.mark.parametrize("efficient", [False, True])
@pytest.mark.parametrize(("layers", "channels", "growth"), [(1, 5, 2), (6, 24, 12), (13, 7, 4)])
def test_stored_bytes_are_exactly_the_formula(
    layers: int, channels: int, growth: int, efficient: bool
) -> None:
    """前向之后活着的字节 = 4 字节 ×（留着的特征 + 块的输出）× 像素 + 各 BatchNorm 的均值与方差。"""
    block, x = DenseBlock(layers, channels, growth, efficient), torch.randn(2, channels, 8, 6)
    with TensorMemory() as memory:
        y = block(x)
        live = memory.live
    pixels = 2 * 8 * 6
    features = stored_features(layers, channels, growth, efficient) + y.shape[1]
    widths = [4 * growth] * layers  # norm2；norm1 的统计量在检查点之内
    widths += [] if efficient else [channels + i * growth for i in range(layers)]
    assert live == 4 * (features * pixels + 2 * sum(widths))


def test_checkpointing_turns_quadratic_into_linear() -> None:
    """层数加倍，二阶差分：朴素的是 2k 每层每层（抛物线），检查点的是零（直线）。"""
    for efficient, curvature in [(False, 2 * 12), (True, 0)]:
        stored = [stored_features(n, 24, 12, efficient) for n in (5, 6, 7)]
        assert stored[0] - 2 * stored[1] + stored[2] == curvature
    peaks = []
    for efficient in (False, True):
        block, x = DenseBlock(24, 24, 12, efficient), torch.randn(1, 24, 8, 8)
        with TensorMemory() as memory:
            block(x).sum().backward()
        peaks.append(memory.peak)
    assert peaks[1] < 0.5 * peaks[0]


# ---------------------------------------------------------------- 小图与出错


@pytest.mark.parametrize("efficient", [False, True])
def test_small_form_memorises_a_batch(efficient: bool) -> None:
    torch.manual_seed(0)
    model = densenet_cifar(memory_efficient=efficient)
    assert count_parameters(model) == 173962
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 40  # 论文的层数：卷积与全连接
    x, y = normal(8, 3, 16, 16).float(), torch.arange(8) % 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3
    assert model(torch.randn(2, 3, 4, 5)).shape == (2, 10)
    assert densenet_cifar(7, 1)(torch.randn(2, 1, 28, 28)).shape == (2, 7)


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)，边长至少 4 像素，实为 \(2, 1, 8, 8\)"):
        densenet_cifar()(torch.randn(2, 1, 8, 8))
    with torch.device("meta"), pytest.raises(ValueError, match="边长至少 32 像素"):
        densenet121()(torch.empty(1, 3, 31, 64))
    conv = {"conv0": nn.Conv2d(3, 8, 3)}
    for growth, blocks, classes in [(0, (2,), 3), (4, (2, 0), 3), (4, (2,), 0)]:
        with pytest.raises(ValueError, match="都至少为 1，实为"):
            DenseNet(growth, blocks, conv, 1, classes)
