"""第 5 章的 ConvNeXt：与 torchvision 逐位对照（推理、训练、梯度、初值），各个零件的手算。"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chapter_05_resnet_modern_cnn.convnext import (
    ConvNeXt,
    ConvNeXtBlock,
    LayerNorm2d,
    convnext_cifar,
    convnext_tiny,
)
from tests.parity import assert_equal, normal
from utils import count_parameters

needs_torchvision = pytest.mark.usefixtures("needs_torchvision")


def shake(model: nn.Module) -> nn.Module:
    """一维的参数（偏置、LayerNorm）与 γ 换成随机数：γ 的初值 1e-6 会把整个支路藏起来。"""
    for parameter in model.parameters():
        if parameter.ndim in (1, 3):
            nn.init.uniform_(parameter, 0.2, 1.2)
    return model


# ---------------------------------------------------------------- 与 torchvision 对照


@needs_torchvision
def test_structure_equals_torchvision() -> None:
    """键、次序、形状、参数量，以及各块的随机深度概率（torchvision 的「row」）。"""
    import torchvision

    with torch.device("meta"):
        for options in ({}, {"num_classes": 7}):
            mine, theirs = convnext_tiny(**options), torchvision.models.convnext_tiny(**options)
            shapes = [
                [(key, value.shape, value.dtype) for key, value in model.state_dict().items()]
                for model in (mine, theirs)
            ]
            assert shapes[0] == shapes[1]
    assert count_parameters(theirs) != count_parameters(convnext_cifar())
    with torch.device("meta"):
        assert count_parameters(convnext_tiny()) == 28589128
    rates = [m.drop_path.p for m in mine.modules() if isinstance(m, ConvNeXtBlock)]
    official = [m for m in theirs.modules() if type(m).__name__ == "StochasticDepth"]
    assert rates == [m.p for m in official] and {m.mode for m in official} == {"row"}


@needs_torchvision
def test_tiny_outputs_equal_torchvision() -> None:
    import torchvision

    with torch.device("meta"):
        mine, theirs = convnext_tiny(5), torchvision.models.convnext_tiny(num_classes=5)
    pattern = torch.randn(65537)
    state = {
        key: pattern.roll(index).repeat(-(-value.numel() // 65537))[: value.numel()]
        for index, (key, value) in enumerate(theirs.state_dict().items())
    }
    for key, value in theirs.state_dict().items():
        fan_in = value[0].numel() if value.ndim in (2, 4) else 1
        state[key] = state[key].view(value.shape) / fan_in**0.5
    for model in (mine, theirs):
        model.load_state_dict(state, assign=True)
    x = normal(2, 3, 64, 77).float()
    with torch.no_grad():
        y = mine.eval()(x)
        assert torch.equal(y, theirs.eval()(x))
    assert y.isfinite().all() and (y[0] - y[1]).abs().max() > 1e-3


@needs_torchvision
def test_initial_weights_training_outputs_and_gradients_equal_torchvision() -> None:
    """三级的小网络：同一颗种子初值相同；随机深度 0.5，训练模式的输出与全部梯度逐位相同。"""
    from torchvision.models.convnext import CNBlockConfig
    from torchvision.models.convnext import ConvNeXt as Official

    torch.manual_seed(7)
    mine = ConvNeXt((2, 1, 3), (8, 12, 20), 4, 5, drop_path=0.5)
    torch.manual_seed(7)
    settings = [CNBlockConfig(8, 12, 2), CNBlockConfig(12, 20, 1), CNBlockConfig(20, None, 3)]
    theirs = Official(settings, stochastic_depth_prob=0.5, num_classes=5)
    for (name, a), (key, b) in zip(
        mine.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert name == key and torch.equal(a, b)
    mine.load_state_dict(shake(theirs).state_dict())
    x, outputs = normal(6, 3, 64, 45).float(), []
    for model in (mine, theirs):
        torch.manual_seed(3)
        outputs.append(model.train()(x))
        F.cross_entropy(outputs[-1], torch.arange(6) % 5).backward()
    assert torch.equal(*outputs) and not torch.equal(outputs[0], mine.eval()(x))
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert a.grad.abs().max() > 0 and torch.equal(a.grad, b.grad)


# ---------------------------------------------------------------- 零件


def test_layer_norm_is_over_the_channels_of_one_position() -> None:
    x, layer = normal(2, 5, 3, 4), shake(LayerNorm2d(5, eps=1e-6)).double()
    mean, var = x.mean(dim=1, keepdim=True), x.var(dim=1, keepdim=True, unbiased=False)
    weight, bias = (p[:, None, None] for p in (layer.weight, layer.bias))
    assert_equal(layer(x), (x - mean) / torch.sqrt(var + 1e-6) * weight + bias)
    moved = x.clone()
    moved[:, :, 0, 0] += 7 * normal(2, 5, seed=1)
    assert torch.equal(layer(moved)[..., 1:, 1:], layer(x)[..., 1:, 1:])  # 别的位置不受影响


def test_block_by_hand() -> None:
    """7×7 深度卷积，逐位置 C -> 4C -> C，γ，残差。"""
    block = shake(ConvNeXtBlock(4, 1e-6, 0.0)).double()
    conv, _, norm, up, _, down, _ = block.block
    assert (conv.groups, conv.kernel_size, up.out_features) == (4, (7, 7), 16)
    x = normal(2, 4, 5, 9)
    y = F.conv2d(x, conv.weight, conv.bias, padding=3, groups=4)
    y = y - y.mean(dim=1, keepdim=True)
    y = y / torch.sqrt(y.square().mean(dim=1, keepdim=True) + 1e-6)
    y = y * norm.weight[:, None, None] + norm.bias[:, None, None]
    y = F.conv2d(y, up.weight[..., None, None], up.bias)  # Linear 就是 1×1 卷积
    y = y * (1 + torch.erf(y / 2**0.5)) / 2
    y = F.conv2d(y, down.weight[..., None, None], down.bias)
    assert_equal(block(x), x + block.layer_scale * y)


def test_dropped_samples_pass_unchanged() -> None:
    """训练时整个样本或者原样通过，或者支路放大 1/(1−p)；推理时期望不变。"""
    block = shake(ConvNeXtBlock(3, 1.0, 0.75)).double()
    x = normal(64, 3, 4, 4)
    branch = block.eval()(x) - x
    change = block.train()(x) - x
    dropped = (change == 0).flatten(1).all(dim=1)
    assert 0 < (~dropped).sum() < 32
    assert_equal(change[~dropped], 4 * branch[~dropped])


def test_stem_is_a_linear_map_of_patches() -> None:
    """核等于步幅的卷积 = 切成小块、展平、乘同一个矩阵；ViT 的 patch embedding 就是这样。"""
    stem = ConvNeXt((1,), (6,), 4, 3).double().features[0][0]
    x = normal(2, 3, 8, 12)
    patches = x.view(2, 3, 2, 4, 3, 4).permute(0, 2, 4, 1, 3, 5).reshape(2, 6, 48)
    tokens = patches @ stem.weight.view(6, 48).T + stem.bias  # (B, T, C)
    assert_equal(stem(x).flatten(2).transpose(1, 2), tokens)


def test_starts_as_nearly_the_identity() -> None:
    torch.manual_seed(0)
    stage = ConvNeXt((9,), (16,), 4, 3).features[1]
    x = normal(2, 16, 8, 8).float()
    assert 0 < (stage(x) - x).abs().max() < 1e-4


# ---------------------------------------------------------------- 小图与出错


def test_small_form_memorises_a_batch() -> None:
    torch.manual_seed(0)
    model = convnext_cifar()
    assert count_parameters(model) == 908890
    x, y = normal(8, 3, 32, 32).float(), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3
    assert convnext_cifar(7, 1)(torch.randn(2, 1, 28, 30)).shape == (2, 7)


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)，边长至少 8 像素，实为 \(2, 1, 9, 9\)"):
        convnext_cifar()(torch.randn(2, 1, 9, 9))
    with torch.device("meta"), pytest.raises(ValueError, match="边长至少 32 像素"):
        convnext_tiny()(torch.empty(1, 3, 31, 64))
    for depths, widths, patch in [((1,), (2, 3), 2), ((0,), (2,), 2), ((1,), (2,), 0)]:
        with pytest.raises(ValueError, match="应一样长"):
            ConvNeXt(depths, widths, patch, 3)
    with pytest.raises(ValueError, match="dropout 概率"):
        convnext_tiny(3, drop_path=1.5)
