"""第 4 章的卷积与池化模块：初始化、state_dict 与 ``torch.nn`` 互通；网络换上手写的层，结果不变。"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from chapter_04_cnn_classic import layers as ours_module
from chapter_04_cnn_classic.alexnet import AlexNetSmall
from chapter_04_cnn_classic.layers import AvgPool2d, Conv2d, ConvTranspose2d, use_handmade
from chapter_04_cnn_classic.lenet import LeNet5, LeNet1998
from chapter_04_cnn_classic.vgg import VGGSmall
from tests.parity import assert_equal, normal
from utils import set_seed

# 核是偶数的 "same"：官方提醒可能多复制一次
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

# (类名, 位置参数, 关键字参数)
CASES = [
    ("Conv2d", (4, 6, 3), {}),
    ("Conv2d", (4, 6, (3, 2), (2, 1), (1, 0), (1, 2), 2, False), {}),
    ("Conv2d", (3, 5, 2), {"padding": "same", "dilation": 3}),
    ("Conv2d", (4, 4, 5), {"stride": 2, "padding": 2, "groups": 4}),
    ("ConvTranspose2d", (4, 6, 3), {}),
    ("ConvTranspose2d", (4, 6, (3, 2), (2, 1), (1, 0), (1, 0), 2, False, (1, 2)), {}),
    ("ConvTranspose2d", (3, 5, 4), {"stride": 2, "padding": 1, "output_padding": 1}),
    ("MaxPool2d", (3, 2, 1), {}),
    ("MaxPool2d", (2,), {"return_indices": True}),
    ("AvgPool2d", ((2, 3), 1, (1, 1)), {"count_include_pad": False}),
    ("AdaptiveAvgPool2d", ((3, 2),), {}),
]

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lenet5": (lambda: LeNet5(widths=(3, 4, 8, 6)), (3, 1, 28, 28)),
    "lenet1998": (LeNet1998, (2, 1, 28, 28)),  # C1、C5 换成手写；S2、S4 的平均池化是函数
    "alexnet_small": (lambda: AlexNetSmall(in_channels=1, width=4, dropout=0.3), (3, 1, 28, 28)),
    "vgg_small": (lambda: VGGSmall(11, width=4, dropout=0.3), (3, 3, 32, 32)),
    "vgg_small_plain": (lambda: VGGSmall(11, width=4, batch_norm=False), (2, 3, 16, 20)),
}


def tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


# ---------------------------------------------------------------- 单个模块


@pytest.mark.parametrize(("name", "args", "options"), CASES)
def test_module_equals_torch(name: str, args: tuple, options: dict) -> None:
    """同一颗种子给出同样的参数，同样的输入给出同样的输出；参数名、次序、形状、dtype 都相同。"""
    set_seed(3)
    mine = getattr(ours_module, name)(*args, **options)
    after = torch.get_rng_state()
    set_seed(3)
    official = getattr(nn, name)(*args, **options)
    assert torch.equal(after, torch.get_rng_state())
    assert [*mine.state_dict()] == [*official.state_dict()]
    for a, b in zip(mine.parameters(), official.parameters(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    x = normal(2, args[0] if "Conv" in name else 3, 7, 6)
    for a, b in zip(tensors(mine.double()(x)), tensors(official.double()(x)), strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize(("name", "args", "options"), [c for c in CASES if "Conv" in c[0]])
def test_state_dict_loads_both_ways(name: str, args: tuple, options: dict) -> None:
    mine = getattr(ours_module, name)(*args, **options)
    official = getattr(nn, name)(*args, **options)
    x = torch.randn(2, args[0], 7, 6)
    assert not torch.equal(mine(x), official(x))
    for source, target in [(official, mine), (mine, official)]:
        nn.init.normal_(source.weight)
        target.load_state_dict(source.state_dict())
        torch.testing.assert_close(mine(x), official(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [Conv2d, ConvTranspose2d])
@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((0, 4, 3), {}, "通道数 0 -> 4 应为正"),
        ((4, -1, 3), {}, "通道数 4 -> -1 应为正"),
        ((4, 6, 3), {"groups": 0}, "groups=0"),
        ((4, 6, 3), {"groups": 4}, "4 -> 6 .*被 groups=4 整除"),
        ((6, 4, 3), {"groups": 3}, "6 -> 4 .*被 groups=3 整除"),
        ((4, 6, 0), {}, "kernel_size=0 应为一个或两个不小于 1"),
        ((4, 6, (3, 3, 3)), {}, r"kernel_size=\(3, 3, 3\)"),
    ],
)
def test_rejects_nonsense(make: type[nn.Module], args: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make(*args, **options)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- 整个网络换上手写的层


def both(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """官方层的网络、换上手写层的副本，与一批输入。"""
    make, shape = NETWORKS[name]
    official = make().double()
    mine = copy.deepcopy(official)
    assert use_handmade(mine) is mine
    assert not [m for m in mine.modules() if type(m) in ours_module.HANDMADE]
    assert [m for m in mine.modules() if type(m).__module__ == ours_module.__name__]
    return official, mine, normal(*shape)


def forward_and_gradients(model: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """``[y, ∂ℓ/∂x, 各参数的梯度...]``；种子固定，Dropout 两次相同。"""
    x = x.clone().requires_grad_()
    set_seed(1)
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], grad)]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [True, False])
def test_network_on_handmade_layers_is_the_same_network(name: str, training: bool) -> None:
    official, mine, x = both(name)
    assert [*mine.state_dict()] == [*official.state_dict()]
    assert [n for n, _ in mine.named_parameters()] == [n for n, _ in official.named_parameters()]
    official.train(training), mine.train(training)
    grad = normal(len(x), 10, seed=5)
    results = [forward_and_gradients(model, x, grad) for model in (mine, official)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12 * b.abs().max().item())
    assert all(g.abs().max() > 0 for g in results[0])  # 每个参数都真的参与了
    for a, b in zip(mine.state_dict().values(), official.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # BatchNorm 的滑动统计量


@pytest.mark.parametrize("name", ["lenet5", "alexnet_small", "vgg_small"])
def test_one_optimiser_step_is_the_same(name: str) -> None:
    official, mine, x = both(name)
    labels = torch.arange(len(x))
    before = [p.detach().clone() for p in official.parameters()]
    for model in (official, mine):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(2):
            set_seed(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(x), labels).backward()
            optimizer.step()
    for a, b, old in zip(mine.parameters(), official.parameters(), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        assert not torch.equal(b, old)


def test_parameters_mode_and_random_state_are_kept() -> None:
    """参数还是同一个对象（优化器不必重建），训练或推理的模式、冻结与否、全局随机数都不变。"""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False), nn.Sequential(nn.ConvTranspose2d(2, 2, 3), nn.MaxPool2d(2))
    )
    model[0].eval()
    model[1][0].weight.requires_grad_(False)
    parameters, state = dict(model.named_parameters()), torch.get_rng_state()
    use_handmade(model)
    assert torch.equal(state, torch.get_rng_state())
    assert [type(m).__module__ for m in (model[0], *model[1])] == [ours_module.__name__] * 3
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
    assert len(parameters) == 3 and not model[1][0].weight.requires_grad and model[0].bias is None
    assert not model[0].training and model[1][0].training and model[1][1].training


def test_tied_and_shared_layers_stay_tied() -> None:
    shared = nn.Conv2d(2, 2, 3, padding=1)
    tied = nn.Conv2d(2, 2, 3, padding=1)
    tied.weight = shared.weight
    official = nn.Sequential(shared, nn.Tanh(), shared, tied).double()
    mine = use_handmade(copy.deepcopy(official))
    assert [type(mine[i]) for i in (0, 2, 3)] == [Conv2d] * 3  # 登记在两处的同一层，两处都换
    assert mine[0].weight is mine[2].weight is mine[3].weight and mine[0].bias is mine[2].bias
    assert len(list(mine.parameters())) == 3
    x, grad = normal(1, 2, 5, 5), normal(1, 2, 5, 5, seed=1)
    results = [forward_and_gradients(model, x, grad) for model in (mine, official)]
    for a, b in zip(*results, strict=True):
        assert_equal(a, b)


def test_a_single_layer_is_replaced_too() -> None:
    layer = nn.AvgPool2d(2).eval()
    mine = use_handmade(layer)
    assert type(mine) is AvgPool2d and not mine.training
    assert use_handmade(linear := nn.Linear(2, 2)) is linear


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), "padding_mode='zeros'.*'reflect'"),
        (nn.MaxPool2d(3, 2, ceil_mode=True), "ceil_mode=False，实为 True"),
        (nn.MaxPool2d(2, 1, dilation=2), "MaxPool2d 只支持 dilation=1，实为 2"),
        (nn.AvgPool2d(3, 2, ceil_mode=True), "AvgPool2d 只支持 ceil_mode=False"),
        (nn.AvgPool2d(2, divisor_override=3), "divisor_override=None，实为 3"),
    ],
)
def test_options_we_lack_are_refused_not_dropped(layer: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        use_handmade(nn.Sequential(nn.ReLU(), layer))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2), 2, bias=False),
        nn.Conv2d(4, 4, 2, padding="same"),
        nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), 2, dilation=(1, 2)),
        nn.MaxPool2d((3, 2), (2, 1), (1, 0), (1, 1)),
        nn.MaxPool2d(2, return_indices=True),
        nn.AvgPool2d((3, 2), (2, 1), (1, 0), count_include_pad=False),
        nn.AdaptiveAvgPool2d((3, 2)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_every_option_we_have_is_carried_over(layer: nn.Module) -> None:
    x, layer = normal(2, 4, 7, 6), layer.double()
    for a, b in zip(tensors(use_handmade(copy.deepcopy(layer))(x)), tensors(layer(x)), strict=True):
        assert_equal(a, b)
