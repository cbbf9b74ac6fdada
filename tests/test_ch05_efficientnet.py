"""第 5 章的 EfficientNet：与 torchvision 逐位对照，复合缩放，随机深度。"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from chapter_05_resnet_modern_cnn import efficientnet as module
from chapter_05_resnet_modern_cnn.efficientnet import (
    B0_STAGES,
    SCALES,
    FusedMBConv,
    MBConv,
    Stage,
    StochasticResidual,
    compound_scale,
    efficientnet_b0,
    efficientnet_cifar,
    macs_multiplier,
)
from chapter_05_resnet_modern_cnn.se import SqueezeExcitation
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
from utils import model_summary

needs_torchvision = pytest.mark.usefixtures("needs_torchvision")

COSTS = {  # 参数，乘加；分辨率见 SCALES，v2_s 是 384 像素
    "efficientnet_b0": (5288548, 385814752),
    "efficientnet_b1": (7794184, 686802832),
    "efficientnet_b2": (9109994, 993561872),
    "efficientnet_b3": (12233232, 1827141392),
    "efficientnet_b4": (19341616, 4393771024),
    "efficientnet_b5": (30389784, 10266384752),
    "efficientnet_b6": (43040704, 19067593536),
    "efficientnet_b7": (66347960, 37745884192),
    "efficientnet_v2_s": (21458488, 8365617152),
}


def resolution(name: str) -> int:
    return 384 if name.endswith("v2_s") else SCALES[name[-2:]].resolution


# ---------------------------------------------------------------- 复合缩放


def test_compound_scale() -> None:
    """φ = 0 不变；φ 加一，乘加约加倍；论文的系数 1.2、1.1、1.15。"""
    assert compound_scale(0) == (1, 1, 1)
    assert compound_scale(1) == (1.2, 1.1, 1.15)
    assert compound_scale(2) == pytest.approx((1.44, 1.21, 1.3225))
    assert macs_multiplier(*compound_scale(1)) == pytest.approx(1.920, abs=1e-3)
    for phi in (0.5, 3.0, 7.0):
        exact = macs_multiplier(*compound_scale(1)) ** phi
        assert macs_multiplier(*compound_scale(phi)) == pytest.approx(exact)
    balanced = compound_scale(4, 2.0, 1.0, 1.0)  # 只加深
    assert balanced == (16, 1, 1) and macs_multiplier(*balanced) == 16
    assert macs_multiplier(1, 3, 5) == 9 * 25


@pytest.mark.parametrize(("name", "cost"), COSTS.items())
def test_costs(name: str, cost: tuple[int, int]) -> None:
    """参数与乘加；B0 到 B7 的乘加与论文表 2 相差不到 5%。"""
    size = resolution(name)
    with torch.device("meta"):
        summary = model_summary(getattr(module, name)(), torch.empty(1, 3, size, size))
    assert (summary.total_params, summary.total_macs) == cost
    assert page_costs()[name] == (size, *cost)
    paper = dict(zip(SCALES, (0.39, 0.70, 1.0, 1.8, 4.2, 9.9, 19, 37), strict=True))
    if name[-2:] in paper:
        assert cost[1] / 1e9 == pytest.approx(paper[name[-2:]], rel=0.05)


def test_macs_grow_as_the_rule_says() -> None:
    """深度取实际的块数之比，``d w² r²`` 与乘加之比相差不到 13%。页面的表由此而来。"""
    blocks, macs = {}, {}
    for name, scale in SCALES.items():
        stages = [stage.scaled(scale.width, scale.depth) for stage in B0_STAGES]
        blocks[name] = sum(stage.repeats for stage in stages)
        macs[name] = COSTS[f"efficientnet_{name}"][1]
    assert list(blocks.values()) == [16, 23, 23, 26, 32, 39, 45, 55]
    for name, scale in SCALES.items():
        ratios = scale.width, scale.resolution / 224
        nominal, rule = (macs_multiplier(d, *ratios) for d in (scale.depth, blocks[name] / 16))
        actual = macs[name] / macs["b0"]
        assert actual == pytest.approx(rule, rel=0.13)
        row = [f"{v:.2f}" for v in (nominal, rule, actual)]
        row = [name.upper(), scale.depth, scale.width, scale.resolution, blocks[name], *row]
        assert f"| {' | '.join(map(str, row))} |" in PAGE.read_text("utf-8")


def test_shares_quoted_on_the_page() -> None:
    """普通 3×3 卷积占乘加的份额：V2-S 用 Fused-MBConv。"""
    with torch.device("meta"):
        b0, v2 = shares(efficientnet_b0(), 224), shares(module.efficientnet_v2_s(), 384)
    assert b0["full"][1] == pytest.approx(2.8, abs=0.05)
    assert v2["full"][1] == pytest.approx(49, abs=0.1)


def test_stage_scaling_by_hand() -> None:
    assert B0_STAGES[3].scaled(2.0, 3.1) == Stage(MBConv, 6, 3, 2, 160, 10)  # ⌈9.3⌉
    assert B0_STAGES[2].scaled(1.1, 1.0).channels == 48  # 44 与 40、48 等距，取大
    assert B0_STAGES[1].scaled(1.0, 1.0) == B0_STAGES[1]


# ---------------------------------------------------------------- 与 torchvision 对照


@pytest.mark.parametrize("name", COSTS)
@needs_torchvision
def test_structure_equals_torchvision(name: str) -> None:
    settings = [{}]
    if name[-2:] in ("b0", "_s"):
        settings.append({"num_classes": 7, "dropout": 0.1, "stochastic_depth_prob": 0.4})
    with torch.device("meta"):
        for options in settings:
            mine, theirs = getattr(module, name)(**options), official(name)(**options)
            assert_same_structure(mine, theirs)


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_v2_s"])
@needs_torchvision
def test_numbers_equal_torchvision(name: str) -> None:
    """训练时也相等：DropPath 与 torchvision 的 ``StochasticDepth(mode="row")`` 抽同样的随机数。"""
    options = {"num_classes": 10, "stochastic_depth_prob": 0.5}
    assert_same_numbers(getattr(module, name)(**options), official(name)(**options))


@needs_torchvision
def test_numbers_of_the_tensorflow_constants() -> None:
    """B5 的 eps 与 momentum：只跑开头几段。"""
    mine, theirs = (
        nn.Sequential(*make(num_classes=3).features[:3], nn.AdaptiveAvgPool2d(1), nn.Flatten())
        for make in (module.efficientnet_b5, official("efficientnet_b5"))
    )
    assert_same_numbers(mine, theirs, size=32)


@needs_torchvision
def test_initialisation_equals_torchvision() -> None:
    assert_same_initialisation(efficientnet_b0, "efficientnet_b0")


# ---------------------------------------------------------------- 块


def test_drop_path_grows_linearly() -> None:
    """第 l 块是 p·l/L：第一块从不丢，最后一块是 p·(L−1)/L。"""
    model = efficientnet_cifar()
    rates = [m.drop_path.p for m in model.modules() if isinstance(m, StochasticResidual)]
    assert len(rates) == 6
    assert rates == pytest.approx([0.1 * i / 6 for i in range(6)])


@pytest.mark.parametrize("kind", [MBConv, FusedMBConv])
def test_drop_path_keeps_whole_images(kind: type[StochasticResidual]) -> None:
    """训练时每张图要么只剩捷径，要么支路放大 1/(1−p)；评估时支路原样。"""
    block = kind(8, 8, 3, 1, 4, 0.25, nn.BatchNorm2d).double()
    x = torch.randn(64, 8, 6, 6, dtype=torch.float64)
    branch = block.block(x)
    y = block(x)
    dropped = (y == x).flatten(1).all(dim=1)
    assert 4 <= dropped.sum() <= 30
    torch.testing.assert_close(y[~dropped], (x + branch / 0.75)[~dropped])
    block.eval()
    torch.testing.assert_close(block(x), x + block.block(x))


def test_blocks_by_hand() -> None:
    """MBConv 的 SE 以输入通道数计；Fused 在展开 1 倍时只有一个卷积；没有捷径的两种情形。"""
    block = MBConv(24, 40, 5, 2, 6, 0.0, nn.BatchNorm2d)
    assert [type(m).__name__ for m in block.block][2] == "SqueezeExcitation"
    (excitation,) = [m for m in block.modules() if isinstance(m, SqueezeExcitation)]
    assert excitation.fc1.weight.shape == (6, 144, 1, 1)
    macs = 144 * 24 * 100 + 25 * 144 * 25 + 2 * 6 * 144 + 40 * 144 * 25  # 展开、5×5、SE、投影
    assert model_summary(block, torch.randn(1, 24, 10, 10)).total_macs == macs
    fused = FusedMBConv(24, 48, 3, 2, 4, 0.0, nn.BatchNorm2d)
    macs = 9 * 24 * 96 * 25 + 96 * 48 * 25
    assert model_summary(fused, torch.randn(1, 24, 10, 10)).total_macs == macs
    plain = FusedMBConv(8, 8, 3, 1, 1, 0.0, nn.BatchNorm2d)
    assert len(plain.block) == 1 and len(plain.block[0]) == 3 and plain.has_shortcut
    for options in ((24, 48, 3, 1), (24, 24, 3, 2)):
        for kind in (MBConv, FusedMBConv):
            assert not kind(*options, 4, 0.0, nn.BatchNorm2d).has_shortcut


# ---------------------------------------------------------------- 小图形式与错误


def test_cifar_form() -> None:
    with torch.device("meta"):
        model = efficientnet_cifar()
        summary = model_summary(model, torch.empty(1, 3, 32, 32))
        assert model.features(torch.empty(1, 3, 32, 32)).shape[2:] == (4, 4)
    cost = summary.total_params, summary.total_macs
    assert page_costs()["efficientnet_cifar"] == (32, *cost)
    assert_trains(efficientnet_cifar(num_classes=2, in_channels=1), 1, lr=3e-3, steps=15)


def test_classifier_initialisation() -> None:
    weight = efficientnet_b0(num_classes=25).classifier[1].weight
    assert 0.99 * 0.2 < weight.abs().max() <= 0.2
    assert weight.std().item() == pytest.approx(0.2 / math.sqrt(3), rel=0.02)


def test_wrong_input() -> None:
    for options in ({"alpha": 0.9}, {"beta": 0.5}, {"gamma": 0.99}):
        with pytest.raises(ValueError, match="不应小于 1"):
            compound_scale(1, **options)
    with pytest.raises(ValueError, match="dropout"):
        efficientnet_b0(stochastic_depth_prob=40.0)
    with torch.device("meta"):
        for model, least in ((efficientnet_b0(), 32), (efficientnet_cifar(), 8)):
            assert model(torch.empty(2, 3, least, least)).shape[0] == 2
            for shape in ((2, 1, 32, 32), (2, 3, least - 1, 64), (3, 32, 32)):
                with pytest.raises(ValueError, match=rf"\(B, 3, H, W\).*{least} 像素"):
                    model(torch.empty(shape))


def test_expected_depth_counts_only_blocks_with_a_shortcut() -> None:
    """efficient.md 的 15.0 块：没有捷径的块不能丢。"""
    with torch.device("meta"):
        blocks = [m for m in efficientnet_b0().modules() if isinstance(m, MBConv)]
    droppable = [0.2 * i / 16 for i, block in enumerate(blocks) if block.has_shortcut]
    assert (len(blocks), len(droppable)) == (16, 9)
    assert round(16 - sum(droppable), 1) == 15.0
