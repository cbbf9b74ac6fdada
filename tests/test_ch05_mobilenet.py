"""第 5 章的 MobileNet、SE、深度可分离卷积与线性瓶颈。"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chapter_05_resnet_modern_cnn import mobilenet as module
from chapter_05_resnet_modern_cnn.blocks import (
    ConvNormActivation,
    inverted_branch,
    make_divisible,
)
from chapter_05_resnet_modern_cnn.linear_bottleneck import (
    recover,
    recoverable_probability,
    recovered_share,
    relu_embedding,
    spiral,
    surviving_dimensions,
)
from chapter_05_resnet_modern_cnn.mobilenet import (
    V1_BLOCKS,
    DepthwiseSeparable,
    InvertedResidual,
    mobilenet_v1,
    mobilenet_v2,
)
from chapter_05_resnet_modern_cnn.mobilenet_v3 import RE, InvertedResidualV3, Row
from chapter_05_resnet_modern_cnn.se import SqueezeExcitation, hard_sigmoid, hard_swish, relu6
from chapter_05_resnet_modern_cnn.separable import (
    compose_kernel,
    conv_macs,
    cost_ratio,
    factorize_kernel,
    rank_energy,
    separable_macs,
)
from chapter_05_resnet_modern_cnn.topics_efficient import (
    accuracy,
    accuracy_by_rank,
    counted_ratio,
    two_layer_net,
)
from tests.official_models import (
    PAGE,
    assert_same_initialisation,
    assert_same_numbers,
    assert_same_structure,
    assert_trains,
    official,
    page_costs,
    shares,
)
from tests.parity import assert_equal, autograd, normal
from utils import count_parameters, model_summary

needs_torchvision = pytest.mark.usefixtures("needs_torchvision")

OFFICIAL = {
    "mobilenet_v2": 3504872,
    "mobilenet_v3_small": 2542856,
    "mobilenet_v3_large": 5483032,
}

# ---------------------------------------------------------------- 零件


def test_make_divisible_by_hand() -> None:
    """四舍五入到 8 的倍数；11 取 8 会少两成七，改取 16。"""
    values = {1: 8, 8: 8, 11: 16, 12: 16, 17: 16, 18: 24, 33: 32, 36: 40, 43: 40, 100: 104}
    assert {v: make_divisible(v) for v in values} == values
    assert make_divisible(13, divisor=4) == 12 and make_divisible(9, divisor=4) == 12
    for value in torch.rand(200, dtype=torch.float64).mul(300).add(0.1).tolist():
        rounded = make_divisible(value)
        assert rounded % 8 == 0 and 0.9 * value <= rounded <= max(8, value + 8)


def test_conv_norm_activation() -> None:
    layer = ConvNormActivation(6, 12, 5, 2, 3, activation=nn.ReLU6)
    shapes = {key: tuple(v.shape) for key, v in layer.state_dict().items() if v.ndim}
    norm = {f"1.{name}": (12,) for name in ("weight", "bias", "running_mean", "running_var")}
    assert shapes == {"0.weight": (12, 2, 5, 5)} | norm
    x = normal(2, 6, 7, 9)
    y = layer.double()(x)
    assert y.shape == (2, 12, 4, 5) and y.min() == 0
    expected = F.conv2d(x, layer[0].weight, stride=2, padding=2, groups=3)
    mean, var = expected.mean(dim=(0, 2, 3)), expected.var(dim=(0, 2, 3), unbiased=False)
    expected = (expected - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    assert_equal(y, expected.clamp(0, 6))
    assert [type(m) for m in ConvNormActivation(4, 8, 1, activation=None)] == [
        nn.Conv2d,
        nn.BatchNorm2d,
    ]


def test_inverted_branch_leaves_out_the_useless_expansion() -> None:
    kinds = []
    for expanded, excitation in ((8, None), (16, SqueezeExcitation(16, 4))):
        branch = inverted_branch(8, expanded, 12, 5, 2, nn.BatchNorm2d, nn.ReLU, excitation)
        kinds.append([type(m).__name__ for m in branch])
        assert branch(torch.randn(2, 8, 9, 9)).shape == (2, 12, 5, 5)
        assert len(branch[-1]) == 2  # 投影之后没有激活
    assert kinds == [
        ["ConvNormActivation"] * 2,
        ["ConvNormActivation"] * 2 + ["SqueezeExcitation", "ConvNormActivation"],
    ]


def test_hard_activations() -> None:
    x = torch.cat([normal(500) * 3, torch.tensor([-3.5, 0.0, 3.5]).double()])
    upstream = normal(len(x), seed=1)
    for mine, theirs in (
        (relu6, F.relu6),
        (hard_sigmoid, F.hardsigmoid),
        (hard_swish, F.hardswish),
    ):
        assert_equal(mine(x), theirs(x))
        inside = (x != 0) & (x != 6) & (x.abs() != 3)  # 折点上的次梯度各取所好
        (a,), (b,) = (autograd(f, upstream[inside], x[inside]) for f in (mine, theirs))
        assert_equal(a, b, 1e-7)  # 官方的反向把 1/6 存成单精度
        torch.autograd.gradcheck(mine, x[inside].requires_grad_())
    points = torch.tensor([-4.0, -3, -1.5, 0, 1, 3, 5])
    assert hard_sigmoid(points).tolist() == pytest.approx([0, 0, 0.25, 0.5, 4 / 6, 1, 1])
    assert hard_swish(points).tolist() == pytest.approx([0, 0, -0.375, 0, 4 / 6, 3, 5])
    assert (hard_swish(x) - F.silu(x)).abs().max() < 0.15


# ---------------------------------------------------------------- SE


def test_squeeze_excitation_is_the_formula_of_the_paper() -> None:
    layer = SqueezeExcitation(6, 2).double()
    assert count_parameters(layer) == 2 * 6 * 2 + 6 + 2
    x = normal(3, 6, 5, 4)
    w1, w2 = layer.fc1.weight[..., 0, 0], layer.fc2.weight[..., 0, 0]
    z = x.mean(dim=(2, 3))
    s = torch.sigmoid((z @ w1.T + layer.fc1.bias).relu() @ w2.T + layer.fc2.bias)
    assert_equal(layer.scale(x)[..., 0, 0], s)
    assert_equal(layer(x), s[:, :, None, None] * x)
    # 页面推导的反向：直接的一路，加上经过 s 的一路
    g = normal(3, 6, 5, 4, seed=1)
    open_gates = (z @ w1.T + layer.fc1.bias > 0).double()
    q = (g * x).sum(dim=(2, 3))
    indirect = (open_gates * ((s * (1 - s) * q) @ w2)) @ w1 / (5 * 4)
    expected = s[:, :, None, None] * g + indirect[:, :, None, None]
    assert_equal(autograd(layer, g, x)[0], expected)


@pytest.mark.parametrize(("activation", "gate"), [(nn.ReLU, nn.Sigmoid), (nn.SiLU, nn.Hardsigmoid)])
@needs_torchvision
def test_squeeze_excitation_equals_torchvision(activation: type, gate: type) -> None:
    from torchvision.ops import SqueezeExcitation as Official

    theirs = Official(8, 3, activation=activation, scale_activation=gate).double()
    mine = SqueezeExcitation(8, 3, activation, gate).double()
    mine.load_state_dict(theirs.state_dict())
    x, upstream = normal(2, 8, 3, 5), normal(2, 8, 3, 5, seed=1)
    assert torch.equal(mine(x), theirs(x))
    assert torch.equal(autograd(mine, upstream, x)[0], autograd(theirs, upstream, x)[0])


# ---------------------------------------------------------------- 深度可分离卷积


def test_costs_by_hand() -> None:
    """3×3，32 进 64 出，10×10 的图。"""
    assert conv_macs(3, 32, 64, 10, 10) == 1843200
    assert separable_macs(3, 32, 64, 10, 10) == 28800 + 204800
    assert separable_macs(3, 32, 64, 10, 10, multiplier=2) == 2 * 233600
    assert cost_ratio(3, 64) == pytest.approx(233600 / 1843200)
    assert cost_ratio(3, 10**9) == pytest.approx(1 / 9)
    with torch.device("meta"):
        block = DepthwiseSeparable(32, 64, stride=1)
        assert model_summary(block, torch.empty(1, 32, 10, 10)).total_macs == 233600


@pytest.mark.parametrize("multiplier", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_separable_convolution_is_one_convolution(multiplier: int, stride: int) -> None:
    """先逐深度、再 1×1，等于以合成的核卷一次；对输入与两组权重的梯度也相等。"""
    depthwise = normal(4 * multiplier, 1, 3, 3)
    pointwise = normal(5, 4 * multiplier, 1, 1, seed=1)
    x = normal(2, 4, 7, 8, seed=2)
    options = {"stride": stride, "padding": 1}

    def two_steps(x: torch.Tensor, d: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(x, d, groups=4, **options), p)

    def one_step(x: torch.Tensor, d: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, compose_kernel(d, p, in_channels=4), **options)

    y = two_steps(x, depthwise, pointwise)
    assert_equal(one_step(x, depthwise, pointwise), y)
    upstream = normal(*y.shape, seed=3)
    for a, b in zip(
        autograd(one_step, upstream, x, depthwise, pointwise),
        autograd(two_steps, upstream, x, depthwise, pointwise),
        strict=True,
    ):
        assert_equal(a, b)


def test_factorisation_is_the_best() -> None:
    """误差恰是丢掉的奇异值；在两组权重上梯度为零；满秩时没有误差。"""
    weight = normal(6, 4, 3, 3)
    energy = rank_energy(weight)
    assert len(energy) == 6 and energy[-1].item() == pytest.approx(1)
    for rank in range(1, 7):
        parts = [p.requires_grad_() for p in factorize_kernel(weight, rank)]
        assert parts[0].shape == (4 * rank, 1, 3, 3) and parts[1].shape == (6, 4 * rank, 1, 1)
        error = (compose_kernel(*parts, in_channels=4) - weight).square().sum()
        expected = (1 - energy[rank - 1]) * weight.square().sum()
        assert error.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-9)
        for gradient in torch.autograd.grad(error, parts):
            assert gradient.abs().max() < 1e-9
    values = torch.linalg.svdvals(weight[:, 2].flatten(1))  # 单独一个输入通道
    assert_equal(rank_energy(weight[:, 2:3]), values.square().cumsum(0) / values.square().sum())
    separable = compose_kernel(normal(4, 1, 3, 3), normal(6, 4, 1, 1), in_channels=4)
    assert rank_energy(separable)[0].item() == pytest.approx(1)


def test_accuracy_by_rank_puts_the_weights_back() -> None:
    model, x, y = two_layer_net(), torch.rand(60, 1, 28, 28), torch.arange(60) % 10
    before = model[3].weight.clone()
    scores = accuracy_by_rank(model, 3, x, y)
    assert torch.equal(model[3].weight, before)
    assert len(scores) == 25 and scores[-1] == accuracy(model, x, y)
    assert counted_ratio(5, 16) == pytest.approx(cost_ratio(5, 16), rel=1e-12)


# ---------------------------------------------------------------- 线性瓶颈


def test_recoverable_probability_by_hand() -> None:
    """d = 2：至少两行为正，``1 − (n + 1)/2ⁿ``；不展开时 ``2⁻ᵈ``。"""
    for width in (2, 3, 5, 15):
        assert recoverable_probability(2, width) == pytest.approx(1 - (width + 1) / 2**width)
    assert recoverable_probability(24, 24) == 2.0**-24
    assert recoverable_probability(3, 2) == 0
    assert surviving_dimensions(4, 4) == pytest.approx(0.5)
    assert surviving_dimensions(2, 3) == pytest.approx((3 * 1 + 3 * 2 + 1 * 2) / (8 * 2))


def test_recovery_fails_exactly_when_too_few_outputs_are_positive() -> None:
    x, matrix = normal(400, 3), normal(5, 3, seed=1)
    y = relu_embedding(x, matrix)
    assert_equal(y, torch.stack([(matrix @ v).clamp(min=0) for v in x]))
    enough = (y > 0).sum(dim=1) >= 3
    exact = (recover(y, matrix) - x).norm(dim=1) < 1e-9 * x.norm(dim=1)
    assert torch.equal(enough, exact) and 0.1 < exact.double().mean() < 0.9
    # 丢失的点：沿着不改变正分量的方向走一小步，输出一点不变
    lost = x[~enough][0]
    active = matrix[matrix @ lost > 0]
    direction = torch.linalg.svd(active, full_matrices=True)[2][-1]
    moved = torch.stack([lost, lost + 1e-6 * direction])
    assert_equal(*relu_embedding(moved, matrix), tolerance=1e-12)
    ranks = [
        torch.linalg.matrix_rank(torch.func.jacrev(lambda v: (matrix @ v).relu())(v)) for v in x
    ]
    assert torch.equal(torch.stack(ranks), (y > 0).sum(dim=1).clamp(max=3))


@pytest.mark.parametrize(("dimension", "width"), [(2, 3), (4, 4), (4, 8), (8, 48)])
def test_measured_share_agrees_with_the_formula(dimension: int, width: int) -> None:
    shares = [
        recovered_share(normal(5, dimension, seed=s), normal(width, dimension, seed=s + 1000))
        for s in range(200)
    ]
    assert sum(shares) / 200 == pytest.approx(
        recoverable_probability(dimension, width), abs=4 * 0.5 / 200**0.5
    )


def test_spiral() -> None:
    points = spiral(101)
    assert_equal(points.norm(dim=1), torch.linspace(0.1, 1, 101).double(), 1e-7)
    assert_equal(points[25], torch.tensor([-0.325, 0.0]).double(), 1e-7)  # 半圈
    assert math.isclose(points[-1, 0].item(), 1)


# ---------------------------------------------------------------- 论文里的数


@pytest.mark.parametrize(
    ("width", "size", "millions", "parameters"),
    [
        (1.0, 224, 569, 4.2),
        (0.75, 224, 325, 2.6),
        (0.5, 224, 149, 1.3),
        (0.25, 224, 41, 0.5),
        (1.0, 192, 418, 4.2),
        (1.0, 160, 290, 4.2),
        (1.0, 128, 186, 4.2),
    ],
)
def test_mobilenet_v1_has_the_costs_of_the_paper(
    width: float, size: int, millions: int, parameters: float
) -> None:
    """论文表 6、表 7：乘加（百万）与参数（百万）。"""
    with torch.device("meta"):
        summary = model_summary(mobilenet_v1(width_mult=width), torch.empty(1, 3, size, size))
    macs, count = summary.total_macs / 1e6, summary.total_params / 1e6
    assert macs == pytest.approx(millions, abs=0.7)
    assert count == pytest.approx(parameters, abs=0.06)
    row = f"| {width:g} | {size} | {macs:.1f} | {millions} | {count:.2f} | {parameters} |"
    assert row in PAGE.read_text("utf-8")


def test_v1_with_full_convolutions_has_the_costs_of_the_paper() -> None:
    """论文表 4：同样的网络换成普通 3×3 卷积，4866 百万次乘加，2930 万参数。"""
    side, width = 112, 32
    macs, parameters = conv_macs(3, 3, 32, side, side) + 1024 * 1000, 864 + 1024 * 1000
    small = macs
    for channels, stride in V1_BLOCKS:
        side //= stride
        macs += conv_macs(3, width, channels, side, side)
        small += separable_macs(3, width, channels, side, side)
        parameters += 9 * width * channels
        width = channels
    assert macs / 1e6 == pytest.approx(4866, abs=2) and small == 568740352
    assert parameters / 1e6 == pytest.approx(29.3, abs=0.05)


def test_the_table_of_the_page() -> None:
    """页面的总表：每一行重新数一遍。EfficientNet 各行在另一个文件里。"""
    rows = {name: row for name, row in page_costs().items() if name.startswith("mobilenet")}
    assert len(rows) == 7
    with torch.device("meta"):
        for name, (size, *cost) in rows.items():
            summary = model_summary(getattr(module, name)(), torch.empty(1, 3, size, size))
            assert [summary.total_params, summary.total_macs] == cost, name


def test_shares_quoted_on_the_page() -> None:
    with torch.device("meta"):
        v1, v3 = shares(mobilenet_v1(), 224), shares(module.mobilenet_v3_large(), 224)
    assert v1["pointwise"][1] == pytest.approx(94.9, abs=0.05)
    assert v1["depthwise"][1] == pytest.approx(3.1, abs=0.05)
    assert v3["se"] == pytest.approx((27.6, 0.7), abs=0.05)


# ---------------------------------------------------------------- 与 torchvision 对照


@pytest.mark.parametrize(("name", "count"), OFFICIAL.items())
@needs_torchvision
def test_structure_equals_torchvision(name: str, count: int) -> None:
    with torch.device("meta"):
        for options in ({}, {"num_classes": 7, "dropout": 0.3}, {"width_mult": 0.35}):
            options = options | {"num_classes": options.get("num_classes", 1000)}
            mine, theirs = getattr(module, name)(**options), official(name)(**options)
            assert_same_structure(mine, theirs)
        assert count_parameters(getattr(module, name)()) == count
        wide = {"width_mult": 1.4}  # 大于 1 时末尾的卷积也变宽
        assert_same_structure(getattr(module, name)(**wide), official(name)(**wide))


@pytest.mark.parametrize("name", OFFICIAL)
@needs_torchvision
def test_numbers_equal_torchvision(name: str) -> None:
    options = {"num_classes": 10, "width_mult": 0.5}
    assert_same_numbers(getattr(module, name)(**options), official(name)(**options))


@pytest.mark.parametrize("name", OFFICIAL)
@needs_torchvision
def test_initialisation_equals_torchvision(name: str) -> None:
    assert_same_initialisation(getattr(module, name), name)


def test_v1_initialisation_and_layers() -> None:
    model = mobilenet_v1(num_classes=40)
    assert model.features[-1][1][0].weight.std().item() == pytest.approx(
        (2 / 1024) ** 0.5, rel=0.01
    )
    assert model.classifier.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not model.classifier.bias.any()
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [c.groups for c in convs[1::2]] == [c.in_channels for c in convs[1::2]]
    assert sum(c.stride == (2, 2) for c in convs) == 5 and len(convs) == 27


# ---------------------------------------------------------------- 块


@pytest.mark.parametrize("block", [InvertedResidual(8, 8, 1, 6), "v3"])
def test_the_shortcut_is_the_identity(block: nn.Module | str) -> None:
    """末尾 BatchNorm 的 γ、β 置零，块就是恒等映射；可见捷径不经激活，也没有漏掉。"""
    if block == "v3":
        block = InvertedResidualV3(8, Row(5, 24, 8, True, RE, 1))
    last = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)][-1]
    nn.init.zeros_(last.weight)
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(block(x), x)
    assert not InvertedResidual(8, 8, 2, 6).has_shortcut
    assert not InvertedResidual(8, 16, 1, 6).has_shortcut
    assert not InvertedResidualV3(8, Row(3, 24, 16, False, RE, 1)).has_shortcut


# ---------------------------------------------------------------- 小图形式

CIFAR = ("mobilenet_v1_cifar", "mobilenet_v2_cifar", "mobilenet_v3_cifar")


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_forms_train(name: str) -> None:
    model = getattr(module, name)(num_classes=2, in_channels=1)
    assert model.features(torch.randn(2, 1, 32, 32)).shape[2:] == (4, 4)
    assert_trains(model, in_channels=1)


# ---------------------------------------------------------------- 错误


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="奇数"):
        ConvNormActivation(3, 8, kernel_size=4)
    with pytest.raises(ValueError, match="步幅"):
        ConvNormActivation(3, 8, stride=0)
    for make in (mobilenet_v1, mobilenet_v2, module.mobilenet_v3_small):
        with pytest.raises(ValueError, match="正数"):
            make(width_mult=0)
    with pytest.raises(ValueError, match="至少为 1"):
        SqueezeExcitation(8, 0)
    with pytest.raises(ValueError, match=r"1 到 min\(N, k²\) = 5"):
        factorize_kernel(torch.randn(5, 2, 3, 3), 6)
    with pytest.raises(ValueError, match="整数倍"):
        compose_kernel(torch.randn(5, 1, 3, 3), torch.randn(4, 5, 1, 1), in_channels=2)
    with pytest.raises(ValueError, match="相等"):
        compose_kernel(torch.randn(4, 1, 3, 3), torch.randn(4, 6, 1, 1), in_channels=2)


@pytest.mark.parametrize("name", ["mobilenet_v1", *OFFICIAL, *CIFAR])
def test_wrong_images(name: str) -> None:
    with torch.device("meta"):
        model = getattr(module, name)()
        least = 8 if name.endswith("cifar") else 32
        assert model(torch.empty(2, 3, least, least)).shape[0] == 2
        for shape in ((2, 1, 32, 32), (2, 3, least - 1, 64), (3, 32, 32)):
            with pytest.raises(ValueError, match=rf"\(B, 3, H, W\).*{least} 像素"):
                model(torch.empty(shape))
