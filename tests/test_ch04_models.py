"""第 4 章的 LeNet、AlexNet、VGG：与 torchvision 逐位对照，1998 年 LeNet 的每个数，LRN。"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_04_cnn_classic import alexnet as alexnet_module
from chapter_04_cnn_classic import vgg as vgg_module
from chapter_04_cnn_classic.alexnet import (
    LocalResponseNorm,
    alexnet,
    alexnet_2012,
    local_response_norm,
)
from chapter_04_cnn_classic.lenet import (
    C3_TABLE,
    RBF,
    LeNet5,
    LeNet1998,
    ScaledTanh,
    Subsampling,
    digit_codes,
    lenet5,
)
from chapter_04_cnn_classic.vgg import VGGSmall
from tests.parity import assert_equal, normal
from utils import count_parameters, make_generator

needs_torchvision = pytest.mark.usefixtures("needs_torchvision")

# ImageNet 形式的参数量（1000 类），各论文与 torchvision 文档里的数
COUNTS = {
    "alexnet": 61100840,
    "vgg11": 132863336,
    "vgg11_bn": 132868840,
    "vgg13": 133047848,
    "vgg13_bn": 133053736,
    "vgg16": 138357544,
    "vgg16_bn": 138365992,
    "vgg19": 143667240,
    "vgg19_bn": 143678248,
}


def ours(name: str) -> Callable[..., nn.Module]:
    return getattr(alexnet_module if name == "alexnet" else vgg_module, name)


def official(name: str) -> Callable[..., nn.Module]:
    import torchvision

    models: ModuleType = torchvision.models
    return getattr(models, name)


def fill(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """给 meta 上的 ``model`` 造一份权重：一小段随机数反复抄写，比逐个抽样快十倍。"""
    pattern = torch.randn(65537, generator=make_generator(seed))
    state = {}
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            state[name] = torch.zeros(value.shape, dtype=value.dtype)
            continue
        flat = pattern.roll(len(state)).repeat(-(-value.numel() // len(pattern)))
        flat = flat[: value.numel()].view(value.shape)
        if value.ndim > 1:
            flat *= (2 / value[0].numel()) ** 0.5  # 各层输出的方差与输入相当
        elif name.endswith("bias") or "mean" in name:
            flat *= 0.1
        else:  # BatchNorm 的 weight 与 running_var：正数，1 附近
            flat = 1 + 0.1 * flat.clamp(-3, 3)
        state[name] = flat
    return state


# ---------------------------------------------------------------- 与 torchvision 对照


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
@needs_torchvision
def test_imagenet_forms_have_the_structure_of_torchvision(name: str, count: int) -> None:
    """键、次序、形状、dtype、参数量，没有参数的层（Dropout、池化、inplace）。"""
    with torch.device("meta"):
        for options in ({}, {"num_classes": 7, "dropout": 0.3}):
            mine, theirs = ours(name)(**options), official(name)(**options)
            shapes = [
                [(key, value.shape, value.dtype) for key, value in model.state_dict().items()]
                for model in (mine, theirs)
            ]
            assert shapes[0] == shapes[1]
            for part in ("features", "avgpool", "classifier"):
                assert repr(getattr(mine, part)) == repr(getattr(theirs, part))
            if not options:
                assert count_parameters(mine) == count_parameters(theirs) == count


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("alexnet", [(64, 64), (63, 95)]),
        ("vgg11", [(64, 64), (32, 47)]),
        ("vgg13_bn", [(64, 32)]),
    ],
)
@needs_torchvision
def test_outputs_equal_torchvision(name: str, sizes: list[tuple[int, int]]) -> None:
    """同一份权重：推理时输出逐位相同，训练时（同一颗种子）也相同。"""
    with torch.device("meta"):
        mine, theirs = ours(name)(num_classes=10), official(name)(num_classes=10)
    state = fill(theirs)
    for model in (mine, theirs):
        model.load_state_dict(state, assign=True)  # 共用一份，只占一份内存
    for height, width in sizes:
        x = normal(2, 3, height, width).float()
        with torch.no_grad():
            y = mine.eval()(x)
            assert torch.equal(y, theirs.eval()(x))
        assert y.isfinite().all() and (y[0] - y[1]).abs().max() > 1e-3
    outputs = []
    for model in (mine, theirs):
        torch.manual_seed(3)
        with torch.no_grad():
            outputs.append(model.train()(x))
    assert torch.equal(*outputs) and not torch.equal(outputs[0], y)


@pytest.mark.parametrize("name", ["vgg11_bn", "vgg13", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn"])
@needs_torchvision
def test_convolutional_part_equals_torchvision(name: str) -> None:
    """其余六种：分类器与上面的同构，只比较各不相同的卷积部分，逐位相等。"""
    with torch.device("meta"):
        mine, theirs = ours(name)().features, official(name)().features
    state = fill(theirs)
    for features in (mine, theirs):
        features.load_state_dict(state, assign=True)
        features.eval()
    x = normal(2, 3, 64, 47).float()
    with torch.no_grad():
        y = mine(x)
        assert torch.equal(y, theirs(x))
    assert y.isfinite().all() and (y[0] - y[1]).abs().max() > 0


@needs_torchvision
def test_alexnet_initialises_like_torchvision() -> None:
    states = []
    for make in (alexnet, official("alexnet")):
        torch.manual_seed(7)
        states.append(make(num_classes=3).features.state_dict().values())
    for a, b in zip(*states, strict=True):
        assert torch.equal(a, b)


def test_vgg_initialisation() -> None:
    """卷积 Kaiming（fan_out），全连接 N(0, 0.01²)，偏置为零。"""
    model = VGGSmall(11, width=64, num_classes=40)
    conv = model.features[4]  # 64 -> 128
    assert conv.weight.shape == (128, 64, 3, 3)
    assert conv.weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert model.classifier[1].weight.std().item() == pytest.approx(0.01, rel=0.02)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            assert not parameter.any()


# ---------------------------------------------------------------- AlexNet 2012 与 LRN


def test_alexnet_2012() -> None:
    with torch.device("meta"):
        model = alexnet_2012()
        assert count_parameters(model) == 60965224
        assert model(torch.empty(2, 3, 227, 227)).shape == (2, 1000)
        assert alexnet_2012(7).classifier[-1].out_features == 7
    convs = [m for m in model.features if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convs] == [96, 256, 384, 384, 256]
    assert [c.groups for c in convs] == [1, 2, 1, 2, 2]
    kinds = [type(m).__name__ for m in model.features]
    assert [i for i, k in enumerate(kinds) if k == "LocalResponseNorm"] == [2, 6]  # 在池化之前
    neurons = [55 * 55 * 96, 27 * 27 * 256, 13 * 13 * 384, 13 * 13 * 384, 13 * 13 * 256]
    assert sum(neurons) + 4096 + 4096 + 1000 == 659272  # 论文所说的约 65 万个神经元


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("channels", [1, 4, 7])
def test_lrn_equals_torch(size: int, channels: int) -> None:
    x, grad = 3 * normal(2, channels, 3, 2), normal(2, channels, 3, 2, seed=1)
    options = {"alpha": 0.2, "beta": 0.6, "k": 1.5}
    results = []
    for function, alpha in [(local_response_norm, 0.2), (F.local_response_norm, 0.2 * size)]:
        leaf = x.clone().requires_grad_()
        y = function(leaf, size, **(options | {"alpha": alpha}))
        results.append((y.detach(), torch.autograd.grad(y, leaf, grad)[0]))
    for a, b in zip(*results, strict=True):
        assert_equal(a, b)


def test_lrn_by_hand_and_its_defaults() -> None:
    x = torch.tensor([1.0, 2, 3]).double().view(1, 3, 1, 1)
    y = local_response_norm(x, size=3, alpha=1.0, beta=1.0, k=1.0)
    assert_equal(y.flatten(), torch.tensor([1 / 6, 2 / 15, 3 / 14], dtype=torch.float64))
    big = 100 * normal(1, 8, 2, 2)
    assert_equal(LocalResponseNorm()(big), F.local_response_norm(big, 5, 5e-4, 0.75, 2.0))


def test_lrn_keeps_its_digits_in_float32() -> None:
    """一个通道极大时，远处通道的窗口和不受影响；前缀和相减会在这里丢掉三位。"""
    x = normal(1, 96, 3, 3)
    x[:, 0] = 1e4
    y = local_response_norm(x.float())
    torch.testing.assert_close(y.double(), local_response_norm(x), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- LeNet


def test_lenet5() -> None:
    model = lenet5()
    assert count_parameters(model) == 61706
    sizes = [156, 2416, 48120, 10164, 850]
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert [count_parameters(m) for m in layers] == sizes
    assert lenet5(7, 3, 32)(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert LeNet5(image_size=12)(torch.randn(1, 1, 12, 12)).shape == (1, 10)
    assert LeNet5(image_size=29, widths=(2, 3, 4, 5))(torch.randn(1, 1, 29, 29)).shape == (1, 10)


def test_lenet1998_has_the_parameters_of_the_paper() -> None:
    """论文 II.B 节逐层给出的数；总和恰好 60000。"""
    model = LeNet1998()
    paper = {"c1": 156, "s2": 12, "c3": 1516, "s4": 32, "c5": 48120, "f6": 10164, "output": 0}
    assert {n: count_parameters(getattr(model, n)) for n in paper} == paper
    assert count_parameters(model) == sum(paper.values()) == 60000
    assert not [key for key in model.state_dict() if "codes" in key or "pairs" in key]
    # 论文也给出连接数：参数（含偏置）乘以位置数
    for name, area, connections in [("c1", 28 * 28, 122304), ("c3", 10 * 10, 151600)]:
        assert paper[name] * area == connections


def test_c3_reads_only_the_maps_of_table_one() -> None:
    """表 I：每个输出特征图的梯度只到达所列的输入特征图。"""
    assert [len(sources) for sources in C3_TABLE] == [3] * 6 + [4] * 9 + [6]
    assert [sum(m in s for s in C3_TABLE) for m in range(6)] == [10] * 6  # 每列 10 个
    assert len(set(C3_TABLE)) == 16
    model = LeNet1998().double()
    x = normal(1, 6, 14, 14).requires_grad_()
    y = model.c3(x)
    assert y.shape == (1, 16, 10, 10)
    for out, sources in enumerate(C3_TABLE):
        (gx,) = torch.autograd.grad(y[:, out].sum(), x, retain_graph=True)
        reached = gx.abs().sum(dim=(0, 2, 3)).nonzero().flatten().tolist()
        assert tuple(reached) == sources
    dense = torch.zeros(16, 6, 5, 5).double()
    kernels = iter(model.c3.weight.detach())
    for out, sources in enumerate(C3_TABLE):
        for source in sources:
            dense[out, source] = next(kernels)
    expected = F.conv2d(x.detach(), dense, model.c3.bias.detach())
    assert_equal(y.detach(), expected)


def test_the_pieces_of_1998_by_hand() -> None:
    assert ScaledTanh()(torch.tensor([1.0, -1.0])).tolist() == pytest.approx([1, -1], abs=1e-4)
    assert ScaledTanh()(torch.tensor([50.0])).item() == pytest.approx(1.7159)
    layer = Subsampling(2)
    with torch.no_grad():
        layer.coefficient.copy_(torch.tensor([0.5, -1.0]))
        layer.bias.copy_(torch.tensor([0.25, 1.0]))
    x = torch.arange(8.0).view(1, 2, 2, 2) / 10
    total = torch.tensor([0.5 * 0.6 + 0.25, -1.0 * 2.2 + 1.0])  # 2×2 之和 0.6 与 2.2
    torch.testing.assert_close(layer(x).flatten(), 1.7159 * torch.tanh(2 / 3 * total))
    rbf = RBF(torch.tensor([[1.0, -1], [1, 1], [-1, -1]]))
    assert rbf(torch.tensor([[0.5, -1], [2, 3]])).tolist() == [
        [-0.25, -4.25, -2.25],
        [-17, -5, -25],
    ]


def test_digit_codes() -> None:
    """±1，两两至少差三格；点亮的格子数与七段数码管的画法相同。"""
    codes = digit_codes()
    assert codes.shape == (10, 84) and set(codes.unique().tolist()) == {-1.0, 1.0}
    assert (torch.cdist(codes, codes, p=0) + 84 * torch.eye(10)).min() >= 3
    lit = codes.view(10, 12, 7) == 1
    assert lit[8].sum() == lit.any(dim=0).sum() == 29  # 8 点亮全部七段
    assert lit[1].nonzero()[:, 1].unique().tolist() == [5] and lit[1].sum() == 10  # 1 只有右侧
    bars = lit[:, (1, 5, 10), 3].int().tolist()  # 上、中、下三横
    expected = ["101", "000", "111", "111", "010", "111", "111", "100", "111", "111"]
    assert ["".join(map(str, bar)) for bar in bars] == expected
    sides = lit[:, (3, 3, 7, 7), (1, 5, 1, 5)].int().tolist()  # 左上、右上、左下、右下四竖
    expected = ["1111", "0101", "0110", "0101", "1101", "1001", "1011", "0101", "1111", "1101"]
    assert ["".join(map(str, side)) for side in sides] == expected


def test_lenet1998_forward() -> None:
    model = LeNet1998().double().eval()
    x = normal(3, 1, 28, 28) + 5
    y = model(x)
    assert y.shape == (3, 10) and (y <= 0).all()
    padded = F.pad(x, (2, 2, 2, 2), mode="replicate")
    assert torch.equal(model(padded), y)  # 28 像素就是边缘复制到 32 像素

    def squash(a: torch.Tensor) -> torch.Tensor:
        return 1.7159 * torch.tanh(2 / 3 * a)

    # 起初系数 1/4、偏置 0：下采样就是平均池化
    s2 = squash(F.avg_pool2d(squash(model.c1(padded)), 2))
    s4 = squash(F.avg_pool2d(squash(model.c3(s2)), 2))
    f6 = squash(model.f6(squash(model.c5(s4).flatten(1))))
    assert_equal(y, -(torch.cdist(f6, digit_codes().double()) ** 2), 1e-11)
    for name, fan_in in [("c1", 25), ("c5", 400), ("f6", 120)]:
        weight = getattr(LeNet1998(), name).weight
        assert 0.9 * 2.4 / fan_in < weight.abs().max() <= 2.4 / fan_in
    weight = LeNet1998().c3.weight
    assert 0.95 * 2.4 / 75 < weight[:18].abs().max() <= 2.4 / 75  # 前六个输出各连 3 个输入
    assert 0.95 * 2.4 / 150 < weight[-6:].abs().max() <= 2.4 / 150
