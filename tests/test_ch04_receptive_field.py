"""感受野：递推等于已知的数值，公式等于梯度（逐个像素，含边界与空隙），有效感受野等于随机游走。"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from chapter_04_cnn_classic import layers as handmade
from chapter_04_cnn_classic.alexnet import alexnet, alexnet_small
from chapter_04_cnn_classic.layers import use_handmade
from chapter_04_cnn_classic.lenet import lenet5
from chapter_04_cnn_classic.receptive_field import (
    LayerSpec,
    conv_stack,
    effective_receptive_field,
    gradient_support,
    layer_specs,
    positive_copy,
    random_walk_std,
    receptive_fields,
    spread,
    support,
)
from chapter_04_cnn_classic.vgg import vgg16, vgg16_bn, vgg_small
from utils import make_generator


def on_meta(make):
    with torch.device("meta"):
        return make()


def by_name(make, size: int) -> dict[str, tuple[int, ...]]:
    fields = receptive_fields(layer_specs(on_meta(make).features), size)
    return {f.name: (f.size, f.jump, f.field, f.start) for f in fields}


# ---------------------------------------------------------------- 递推


def test_published_fields() -> None:
    vgg, alex, lenet = by_name(vgg16, 224), by_name(alexnet, 224), by_name(lenet5, 28)
    assert vgg["conv13"] == (14, 16, 196, -90) and vgg["pool5"] == (7, 32, 212, -90)
    assert alex["conv1"] == (55, 4, 11, -2) and alex["pool3"] == (6, 32, 195, -66)
    assert lenet["conv2"] == (10, 2, 14, -2) and lenet["pool2"] == (5, 4, 16, -2)
    assert by_name(vgg16_bn, 224) == vgg  # 逐元素的层不改变感受野


@pytest.mark.parametrize(("kernel", "depth", "same_as"), [(3, 2, 5), (3, 3, 7)])
def test_stacked_small_kernels_equal_one_large(kernel: int, depth: int, same_as: int) -> None:
    stack = receptive_fields([LayerSpec("c", kernel)] * depth, 20)[-1]
    one = receptive_fields([LayerSpec("c", same_as)], 20)[-1]
    assert stack[1:] == one[1:]


def test_hand_worked_example() -> None:
    # 核 3 步幅 2 填充 1，再核 3 空洞 2：r = 1 + 2 = 3，j = 2；r = 3 + 4·2 = 11；起点 −1
    specs = [LayerSpec("a", 3, 2, 1), LayerSpec("b", 3, 1, 0, 2)]
    first, second = receptive_fields(specs, 17)
    assert first[1:] == (9, 2, 3, -1) and second[1:] == (5, 2, 11, -1)


def test_sizes_are_the_network_s_own() -> None:
    for make, size in ((lenet5, 28), (lambda: alexnet_small(10, 1, 4), 32)):
        features, x = make().features, torch.zeros(1, 1, size, size)
        sizes = []
        for layer in features:
            x = layer(x)
            if isinstance(layer, (nn.Conv2d, nn.MaxPool2d)):
                sizes.append(x.shape[2])
        assert [f.size for f in receptive_fields(layer_specs(features), size)] == sizes


# ---------------------------------------------------------------- 公式与梯度


def check_everywhere(features: nn.Module, size: tuple[int, int]) -> None:
    """每一个输出位置，公式与梯度的像素都相同。"""
    specs = [layer_specs(features, axis) for axis in (0, 1)]
    last = [receptive_fields(s, n)[-1] for s, n in zip(specs, size, strict=True)]
    for row in range(last[0].size):
        for column in range(last[1].size):
            formula = torch.outer(
                support(specs[0], size[0], row), support(specs[1], size[1], column)
            )
            assert torch.equal(gradient_support(features, size, (row, column)), formula)


CASES = {
    "plain": (nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)), (9, 8)),
    "rectangular": (nn.Sequential(nn.Conv2d(3, 2, (1, 5), (2, 1), (0, 2)), nn.Tanh()), (7, 9)),
    "dilated gaps": (nn.Sequential(nn.Conv2d(1, 1, 3, dilation=3), nn.Conv2d(1, 1, 2)), (12, 11)),
    "stride skips": (nn.Sequential(nn.Conv2d(1, 1, 2, stride=4), nn.AvgPool2d(2, 1)), (15, 14)),
    "floor drops": (
        nn.Sequential(nn.MaxPool2d(3, 2), nn.Conv2d(1, 1, 3, padding=1), nn.AvgPool2d(2)),
        (16, 14),
    ),
    "same": (nn.Sequential(nn.Conv2d(1, 1, 3, padding="same", dilation=2)), (6, 7)),
    "nested": (
        nn.Sequential(nn.Sequential(nn.Conv2d(1, 1, 3)), nn.Dropout(), nn.BatchNorm2d(1)),
        (6, 5),
    ),
    "handmade": (
        nn.Sequential(
            handmade.Conv2d(1, 2, 3, padding=1), handmade.MaxPool2d(2), handmade.AvgPool2d(3, 1, 1)
        ),
        (9, 10),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_formula_equals_gradient(name: str) -> None:
    check_everywhere(*CASES[name])


def test_lenet_everywhere() -> None:
    check_everywhere(lenet5().features, (28, 28))


@pytest.mark.parametrize("make", [alexnet, vgg16], ids=["alexnet", "vgg16"])
def test_imagenet_forms_at_corners_and_centre(make) -> None:
    features = on_meta(make).features
    specs = layer_specs(features)
    field = receptive_fields(specs, 224)[-1]
    for i in (0, field.size // 2, field.size - 1):
        line = support(specs, 224, i)
        low, high = field.start + i * field.jump, field.start + i * field.jump + field.field
        expected = torch.zeros(224, dtype=torch.bool)
        expected[max(low, 0) : high] = True
        assert torch.equal(line, expected)  # 没有空隙时，就是公式的一段裁到图内
        assert torch.equal(gradient_support(features, (224, 224), (i, 0))[:, 0], line)


def test_field_formula_can_overreach_what_floor_drops() -> None:
    # 16 -> 池化 3/2 只读到第 14 个像素；公式的一段裁到图内会多算最后一个，逐层推回去的不会
    features, size = CASES["floor drops"]
    specs = layer_specs(features[:2])
    field = receptive_fields(specs, size[0])[-1]
    last = field.size - 1
    assert field.start + last * field.jump + field.field > 15
    assert not support(specs, size[0], last)[15]


def test_real_network_with_positive_weights_sees_the_same_pixels() -> None:
    features = vgg_small(11, 10, 1, 4, batch_norm=False).features.double().eval()
    with torch.no_grad():
        for layer in features:
            if isinstance(layer, nn.Conv2d):
                layer.weight.abs_()
                layer.bias.zero_()
    pooled = nn.Sequential(
        *(nn.AvgPool2d(2) if isinstance(layer, nn.MaxPool2d) else layer for layer in features)
    )[:8]  # 原来的通道数与权重，只把池化换成平均
    x = torch.ones(1, 1, 20, 20, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(pooled(x)[0, :, 1, 2].sum(), x)
    assert torch.equal(gradient[0, 0] != 0, gradient_support(features[:8], (20, 20), (1, 2)))


def test_handmade_layers_read_alike() -> None:
    for axis in (0, 1):
        assert layer_specs(use_handmade(lenet5().features), axis) == layer_specs(
            lenet5().features, axis
        )


def test_positive_copy_leaves_the_network_alone() -> None:
    features = lenet5().features
    before = [p.clone() for p in features.parameters()]
    positive_copy(features)
    assert all(torch.equal(a, b) for a, b in zip(before, features.parameters(), strict=True))


# ---------------------------------------------------------------- 有效感受野


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("kernel", [3, 5])
def test_effective_field_follows_the_random_walk(relu: bool, kernel: int) -> None:
    stack = conv_stack(6, kernel, channels=16, relu=relu)
    before = [p.clone() for p in stack.parameters()]
    size = 6 * (kernel - 1) + 5
    energy = effective_receptive_field(stack, size, 60, make_generator(0))
    assert energy.shape == (size, size) and energy.sum().item() == pytest.approx(1)
    theory = math.sqrt(6 * (kernel**2 - 1) / 12)
    assert random_walk_std(layer_specs(stack)) == pytest.approx(theory)
    assert spread(energy) == pytest.approx(theory, rel=0.06)
    assert all(torch.equal(a, b) for a, b in zip(before, stack.parameters(), strict=True))


def test_effective_field_of_strided_layers() -> None:
    stack = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.Conv2d(16, 16, 3, 1, 2, dilation=2, bias=False)
    )
    # 第二层的抽头相距 d·j = 4 像素：方差 (1 + 16)·(9 − 1)/12
    assert random_walk_std(layer_specs(stack)) == pytest.approx(math.sqrt(17 * 8 / 12))
    energy = effective_receptive_field(stack, 33, 200, make_generator(1))
    assert spread(energy) == pytest.approx(math.sqrt(17 * 8 / 12), rel=0.06)


def test_effective_field_is_gaussian_in_profile() -> None:
    energy = effective_receptive_field(conv_stack(16), 35, 60, make_generator(2))
    profile, sigma = energy.sum(dim=0), math.sqrt(16 * 2 / 3)
    offsets = torch.arange(35) - 17
    normal = torch.exp(-(offsets**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    assert (profile - normal).abs().max() < 0.2 * normal.max()


def test_spread_by_hand() -> None:
    energy = torch.tensor([[1.0, 0, 1.0], [0, 0, 0], [1.0, 0, 1.0]])
    assert spread(energy) == pytest.approx(1.0)
    assert spread(7 * energy) == pytest.approx(1.0)


def test_depth_grows_the_effective_field_by_its_root() -> None:
    widths = [random_walk_std([LayerSpec("c", 3)] * n) for n in (4, 16, 64)]
    assert all(b / a == pytest.approx(2) for a, b in pairwise(widths))


# ---------------------------------------------------------------- 错误


def test_errors_name_the_rule() -> None:
    with pytest.raises(ValueError, match="conv1 的核张开 11"):
        receptive_fields(layer_specs(on_meta(alexnet).features), 5)
    with pytest.raises(ValueError, match="应在 0 到 4 之间"):
        support(layer_specs(lenet5().features), 28, 5)
    with pytest.raises(ValueError, match="不认识的层 AdaptiveAvgPool2d"):
        layer_specs(nn.Sequential(nn.AdaptiveAvgPool2d(1)))
    with pytest.raises(ValueError, match="ceil_mode"):
        layer_specs(nn.Sequential(nn.MaxPool2d(2, ceil_mode=True)))
    with pytest.raises(ValueError, match="左右不等"):
        layer_specs(nn.Sequential(nn.Conv2d(1, 1, 2, padding="same")))
    dead = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Threshold(1e9, 0.0))
    with pytest.raises(ValueError, match="梯度处处为零"):
        effective_receptive_field(dead, 5, 1, make_generator(0))
