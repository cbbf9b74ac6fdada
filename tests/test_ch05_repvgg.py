"""第 5 章的 RepVGG：折叠之后与折叠之前相等（float64、float32），折叠的每一步手算，论文的参数量。"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_05_resnet_modern_cnn.repvgg import (
    RepVGG,
    RepVGGBlock,
    fold_batch_norm,
    identity_kernel,
    pad_to_3x3,
    repvgg_a0,
    repvgg_cifar,
)
from tests.parity import assert_equal, normal
from utils import count_parameters, model_summary


def shake(model: nn.Module) -> nn.Module:
    """给每个 BatchNorm 换上随机的参数与统计量：缺省值下折叠错了也看不出来。"""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.2)
            nn.init.normal_(layer.running_mean, 0, 0.2)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return model


def kernel(conv: nn.Conv2d) -> Tensor:
    """分组卷积的核写成不分组的 ``(C_out, C_in, 3, 3)``，组外为零。"""
    weight, groups = conv.weight.detach(), conv.groups
    dense = weight.new_zeros(conv.out_channels, conv.in_channels, 3, 3)
    rows, columns = conv.out_channels // groups, conv.in_channels // groups
    for g in range(groups):
        block = slice(g * rows, (g + 1) * rows), slice(g * columns, (g + 1) * columns)
        dense[block] = weight[block[0]]
    return dense


# ---------------------------------------------------------------- 折叠的每一步


def test_fold_batch_norm_by_hand() -> None:
    """γ=3，β=1，μ=2，σ²+ε=4：s = 1.5，W' = 1.5 W，b' = 1 − 1.5·2 = −2。"""
    norm = nn.BatchNorm2d(1, eps=0.5).double()
    norm.weight.data.fill_(3.0)
    norm.bias.data.fill_(1.0)
    norm.running_mean.fill_(2.0)
    norm.running_var.fill_(3.5)
    weight, bias = fold_batch_norm(torch.full((1, 2, 1, 1), 4.0).double(), norm)
    assert weight.flatten().tolist() == [6, 6] and bias.tolist() == [-2]


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [(6, 7), (1, 5)])
def test_padded_kernel_is_the_same_convolution(stride: int, size: tuple[int, int]) -> None:
    x, weight = normal(2, 3, *size), normal(4, 3, 1, 1, seed=1)
    expected = F.conv2d(x, weight, stride=stride)
    assert_equal(F.conv2d(x, pad_to_3x3(weight), stride=stride, padding=1), expected)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_identity_is_a_convolution(groups: int) -> None:
    x = normal(2, 6, 4, 5)
    weight = identity_kernel(6, groups, x)
    assert weight.shape == (6, 6 // groups, 3, 3) and weight.sum() == 6
    assert torch.equal(F.conv2d(x, weight, padding=1, groups=groups), x)


@pytest.mark.parametrize(
    ("widths", "stride", "groups"), [((6, 6), 1, 1), ((6, 6), 1, 3), ((4, 6), 1, 2), ((6, 6), 2, 6)]
)
def test_block_and_its_convolution(widths: tuple[int, int], stride: int, groups: int) -> None:
    torch.manual_seed(0)
    block = shake(RepVGGBlock(*widths, stride, groups)).double().eval()
    x = normal(2, widths[0], 7, 6)
    y = block.norm3(block.conv3(x)) + block.norm1(block.conv1(x))
    has_identity = widths[0] == widths[1] and stride == 1
    assert ("identity" in block.branches()) == has_identity == (block.norm0 is not None)
    if has_identity:
        y = y + block.norm0(x)
    assert_equal(block(x), y.clamp(min=0))
    conv = block.fuse()
    assert_equal(conv(x), y)
    assert_equal(F.conv2d(x, kernel(conv), conv.bias, stride, padding=1), y)
    parts = [F.conv2d(x, w, b, stride, 1, groups=groups) for w, b in block.branches().values()]
    assert_equal(sum(parts), y)


# ---------------------------------------------------------------- 整个网络


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_whole_network_is_the_same_function(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    for model, size in [(shake(repvgg_cifar()), (32, 29)), (shake(repvgg_a0(10)), (64, 47))]:
        before = {key: value.clone() for key, value in model.to(dtype).state_dict().items()}
        deployed = model.fuse()
        assert not deployed.training and model.training
        x = normal(2, 3, *size).to(dtype)
        with torch.no_grad():
            y = model.eval()(x)
            assert_equal(deployed(x), y, tolerance)
        assert (y[0] - y[1]).abs().max() > 1e-2 * y.abs().max()
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key])  # 原来的不动
        convs = [m for m in deployed.features.modules() if isinstance(m, nn.Conv2d)]
        assert {c.kernel_size for c in convs} == {(3, 3)} and len(convs) == len(model.features)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in deployed.modules())


def test_training_mode_is_another_function() -> None:
    """训练模式用的是这一批的统计量，不能折叠：先 ``fuse`` 再训练是常见的错误。"""
    torch.manual_seed(0)
    model = shake(repvgg_cifar())
    x = normal(4, 3, 16, 16).float()
    gap = (model.train()(x) - model.fuse()(x)).abs().max()
    assert gap > 0.1


def test_the_paper_parameters() -> None:
    """文献给出的 RepVGG-A0：训练时 9.11 M，折叠之后 8.30 M，乘加 1.4 G（224 像素）。"""
    with torch.device("meta"):
        model = repvgg_a0()
        deployed, image = model.fuse(), torch.empty(1, 3, 224, 224)
        assert count_parameters(model) == 9108968 and count_parameters(deployed) == 8309384
        assert model_summary(deployed, image).total_macs == 1361451008
    assert len(model.features) == 22 and model.at_least == 32
    widths = [block.conv3.out_channels for block in model.features]
    assert widths == [48] * 3 + [96] * 4 + [192] * 14 + [1280]
    sides = [block.norm0 is None for block in model.features]
    assert sum(sides) == 5  # 每级的第一块变形状，没有恒等分支


# ---------------------------------------------------------------- 同一个函数，不同的训练轨迹


def test_branches_speed_up_the_central_tap() -> None:
    """固定的尺度 a、b、c：合成核一步的改变，四周是 −η a² G，中央是 −η (a² + b²) G。"""
    x, target = normal(4, 3, 6, 6), normal(4, 3, 6, 6, seed=1)
    w3, w1 = normal(3, 3, 3, 3, seed=2), normal(3, 3, 1, 1, seed=3)
    a, b, c, lr = 0.7, 1.3, 0.9, 0.1

    def merged(three: Tensor, one: Tensor) -> Tensor:
        return a * three + b * pad_to_3x3(one) + c * identity_kernel(3, 1, x)

    def loss(weight: Tensor) -> Tensor:
        return (F.conv2d(x, weight, padding=1) - target).square().mean()

    leaf = merged(w3, w1).requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf)
    leaves = [w.clone().requires_grad_() for w in (w3, w1)]
    g3, g1 = torch.autograd.grad(loss(merged(*leaves)), leaves)
    change = merged(w3 - lr * g3, w1 - lr * g1) - merged(w3, w1)
    expected = -lr * a**2 * grad
    expected[..., 1, 1] = -lr * (a**2 + b**2) * grad[..., 1, 1]
    assert_equal(change, expected, 1e-11)


# ---------------------------------------------------------------- 小图与出错


def test_small_form_memorises_a_batch() -> None:
    torch.manual_seed(0)
    model = repvgg_cifar()
    assert count_parameters(model) == 553450 and count_parameters(model.fuse()) == 495778
    x, y = normal(8, 3, 16, 16).float(), torch.arange(8) % 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(10):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3
    assert repvgg_cifar(7, 1)(torch.randn(2, 1, 28, 30)).shape == (2, 7)


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)，边长至少 8 像素，实为 \(2, 1, 9, 9\)"):
        repvgg_cifar()(torch.randn(2, 1, 9, 9))
    for depths, widths, strides in [((1,), (2, 3), (1,)), ((0,), (2,), (1,)), ((1,), (2,), (0,))]:
        with pytest.raises(ValueError, match="应一样长"):
            RepVGG(depths, widths, strides, 3)
