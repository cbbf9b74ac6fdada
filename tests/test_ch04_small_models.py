"""第 4 章的小图形式：形状、批内独立、能过拟合一批；以及各网络对坏输入的一行错误。"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chapter_04_cnn_classic.alexnet import AlexNetSmall, alexnet, alexnet_2012, alexnet_small
from chapter_04_cnn_classic.lenet import LeNet5, LeNet1998, lenet5
from chapter_04_cnn_classic.vgg import CONFIGS, VGGSmall, vgg11, vgg_small
from tests.invariants import assert_batch_independent
from tests.parity import normal
from utils import count_parameters, make_generator

SMALL: dict[str, Callable[[int, int], nn.Module]] = {  # (通道数, 边长) -> 网络
    "lenet5": lambda channels, side: LeNet5(10, channels, side),
    "alexnet": lambda channels, side: AlexNetSmall(10, channels, width=8, dropout=0.0),
    "vgg11": lambda channels, side: VGGSmall(11, 10, channels, width=8),
    "vgg13_plain": lambda channels, side: VGGSmall(13, 10, channels, 8, batch_norm=False),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 32)])
def test_shapes_and_batch_independence(name: str, channels: int, side: int) -> None:
    model = SMALL[name](channels, side).double().eval()
    x = normal(3, channels, side, side, seed=1)
    assert model(x).shape == (3, 10) and model(x[:1]).shape == (1, 10)
    # 放大输出：初始化时 VGG 的 logits 很小，检查的绝对误差才有意义
    assert_batch_independent(lambda x: 1e3 * model(x), x)
    if name != "lenet5":  # 全局或自适应池化：长方形也行
        assert model(normal(2, channels, side, side + 5)).shape == (2, 10)


@pytest.mark.parametrize("name", SMALL)
def test_overfits_one_batch(name: str) -> None:
    """八张随机的图、八个标签，训练到全对：梯度流到了每一层。"""
    model = SMALL[name](1, 28)
    x = torch.randn(8, 1, 28, 28, generator=make_generator(1))
    labels = torch.arange(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        if loss < 0.02:
            break
    assert loss < 0.02
    for old, parameter in zip(before, model.parameters(), strict=True):
        assert not torch.equal(old, parameter)


def test_lenet1998_learns() -> None:
    """得分是负的 RBF 惩罚：交叉熵同样能把一批学到全对。"""
    model, labels = LeNet1998(), torch.arange(8)
    x = torch.randn(8, 1, 28, 28, generator=make_generator(1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    assert (model(x).argmax(dim=1) == labels).all()


@pytest.mark.parametrize("depth", CONFIGS)
def test_vgg_small_is_vgg_without_its_last_pooling(depth: int) -> None:
    """层数包括最后的全连接层：原来的三个换成一个，所以是 ``depth − 2``；四次减半，宽度按比例。"""
    model = vgg_small(depth, width=16)
    convs = [m for m in model.features if isinstance(m, nn.Conv2d)]
    assert len(convs) == depth - 3
    assert (convs[0].out_channels, convs[-1].out_channels) == (16, 128)
    assert sum(isinstance(m, nn.MaxPool2d) for m in model.features) == 4
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.features) == depth - 3
    assert not isinstance(model.features[-1], nn.MaxPool2d)
    assert model.features(torch.zeros(1, 3, 32, 32)).shape == (1, 128, 2, 2)


def test_alexnet_small_keeps_the_proportions() -> None:
    model = alexnet_small(7, 1, width=8)
    convs = [m for m in model.features if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convs] == [8, 24, 48, 32, 32]  # 1 : 3 : 6 : 4 : 4
    assert [c.kernel_size[0] for c in convs] == [3, 5, 3, 3, 3]
    x, sides = torch.zeros(1, 1, 32, 32), [32]
    for layer in model.features:
        x = layer(x)
        sides += [x.shape[-1]] if x.shape[-1] != sides[-1] else []
    assert sides == [32, 15, 7, 3] and model(torch.zeros(1, 1, 28, 28)).shape == (1, 7)
    assert [m.p for m in model.classifier if isinstance(m, nn.Dropout)] == [0.5, 0.5]
    assert count_parameters(model.classifier) == 32 * 9 * 64 + 64 + 64 * 7 + 7


# ---------------------------------------------------------------- 最小的图与一行的错误

SMALLEST = [
    (lambda: alexnet(10), 3, 63),
    (lambda: vgg11(10), 3, 32),
    (lambda: alexnet_small(10, 1), 1, 15),
    (lambda: vgg_small(11, 10, 1), 1, 16),
]


@pytest.mark.parametrize(("make", "channels", "side"), SMALLEST)
def test_smallest_image(make: Callable[[], nn.Module], channels: int, side: int) -> None:
    """恰好够大的图能算；小一个像素就报错，而那张图确实会在某次池化后一个像素都不剩。"""
    with torch.device("meta"):
        model = make().eval()
        assert model(torch.empty(1, channels, side, side)).shape == (1, 10)
        for height, width in [(side - 1, side), (side, side - 1)]:
            x = torch.empty(1, channels, height, width)
            rule = rf"{side} 像素，实为 \(1, {channels}, {height}, {width}\)"
            with pytest.raises(ValueError, match=rule) as error:
                model(x)
            assert "\n" not in str(error.value)
            with pytest.raises(RuntimeError, match="too small|greater than"):
                model.features(x)


ERRORS: list[tuple[Callable[[], nn.Module], tuple[int, ...], str]] = [
    (lambda: LeNet5(image_size=11), (), "边长至少 12 像素，实为 11"),
    (lenet5, (2, 1, 32, 32), r"LeNet-5 .*\(B, 1, H, W\)，28×28，实为 \(2, 1, 32, 32\)"),
    (lenet5, (2, 1, 28, 30), r"28×28，实为 \(2, 1, 28, 30\)"),
    (lenet5, (2, 1, 30, 28), r"28×28，实为 \(2, 1, 30, 28\)"),
    (lenet5, (2, 3, 28, 28), r"\(B, 1, H, W\).*实为 \(2, 3, 28, 28\)"),
    (lenet5, (28, 28), r"实为 \(28, 28\)"),
    (lambda: lenet5(in_channels=3), (1, 28, 28), r"\(B, 3, H, W\).*实为 \(1, 28, 28\)"),
    (LeNet1998, (2, 1, 28, 32), r"\(B, 1, 32, 32\)，实为 \(2, 1, 28, 32\)"),
    (LeNet1998, (2, 3, 28, 28), r"实为 \(2, 3, 28, 28\)"),
    (LeNet1998, (1, 28, 28), r"实为 \(1, 28, 28\)"),
    (alexnet, (2, 1, 224, 224), r"AlexNet .*\(B, 3, H, W\).*实为 \(2, 1, 224, 224\)"),
    (alexnet, (3, 224, 224), r"AlexNet .*实为 \(3, 224, 224\)"),
    (alexnet_2012, (1, 3, 224, 224), r"AlexNet2012 .*227×227，实为 \(1, 3, 224, 224\)"),
    (alexnet_2012, (1, 1, 227, 227), r"AlexNet2012 .*\(B, 3, H, W\)"),
    (vgg11, (2, 4, 224, 224), r"VGG .*\(B, 3, H, W\).*实为 \(2, 4, 224, 224\)"),
    (alexnet_small, (2, 1, 28, 28), r"小图 AlexNet .*\(B, 3, H, W\)"),
    (vgg_small, (2, 1, 28, 28), r"小图 VGG .*\(B, 3, H, W\)"),
    (lambda: vgg_small(12), (), r"depth 应为 \[11, 13, 16, 19\] 之一.*实为 12 与 32"),
    (lambda: vgg_small(11, width=0), (), "width 至少为 1，实为 11 与 0"),
]


@pytest.mark.parametrize(("make", "shape", "message"), ERRORS)
def test_rejects_nonsense(
    make: Callable[[], nn.Module], shape: tuple[int, ...], message: str
) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message) as error:
        make()(torch.empty(shape))
    assert "\n" not in str(error.value)
