"""折叠 BatchNorm：公式对照官方，配对要看数据流，折不得的一定不折。"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_05_resnet_modern_cnn.folding import find_pairs, fold_batchnorm, fold_conv_bn
from tests.parity import assert_equal, normal
from utils import make_generator


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """BatchNorm 的四组数都取得不平凡；γ 有正有负。"""
    generator = make_generator(seed)
    for bn in model.modules():
        if isinstance(bn, nn.modules.batchnorm._BatchNorm):
            size = (bn.num_features,)
            bn.running_mean.copy_(torch.randn(size, generator=generator))
            bn.running_var.copy_(torch.rand(size, generator=generator) + 0.2)
            if bn.affine:
                nn.init.normal_(bn.weight, generator=generator)
                nn.init.normal_(bn.bias, generator=generator)
    return model.eval()


def count(model: nn.Module, kind: type[nn.Module] = nn.BatchNorm2d) -> int:
    return sum(isinstance(m, kind) for m in model.modules())


# ---------------------------------------------------------------- 公式


def test_fold_by_hand() -> None:
    # γ=6, σ²+ε=9, μ=1, β=5: s = 2；核 3 -> 6，偏置 2·(4-1)+5 = 11
    conv, bn = nn.Conv2d(1, 1, 1).double(), nn.BatchNorm2d(1, eps=1.0).double().eval()
    for parameter, value in ((conv.weight, 3), (conv.bias, 4), (bn.weight, 6), (bn.bias, 5)):
        nn.init.constant_(parameter, value)
    bn.running_mean.fill_(1)
    bn.running_var.fill_(8)
    folded = fold_conv_bn(conv, bn)
    assert (folded.weight.item(), folded.bias.item()) == (6, 11)
    assert conv.weight.item() == 3 and conv.bias.item() == 4  # 原来的没有动


CONVS = {
    "plain": {"bias": False, "padding": 1},
    "bias-stride": {"bias": True, "stride": 2},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "bias": False, "padding": 1},
    "dilation": {"dilation": 2, "padding": 2},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "same": {"padding": "same", "dilation": 2},
}


@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)
@pytest.mark.parametrize("affine", [True, False])
def test_conv_matches_the_two_layers_and_the_reference(options: dict, affine: bool) -> None:
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    pair = nn.Sequential(nn.Conv2d(4, 8, 3, **options), nn.BatchNorm2d(8, affine=affine))
    conv, bn = randomize(pair.double())
    folded, x = fold_conv_bn(conv, bn), normal(2, 4, 9, 7)
    assert_equal(folded(x), pair(x))
    if affine:
        reference = fuse_conv_bn_eval(conv, bn)
        assert_equal(folded.weight, reference.weight)
        assert_equal(folded.bias, reference.bias)


@pytest.mark.parametrize("groups", [1, 2])
def test_conv_transpose(groups: int) -> None:
    conv = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=groups)
    pair = randomize(nn.Sequential(conv, nn.BatchNorm2d(6)).double())
    x = normal(2, 4, 5, 4)
    assert_equal(fold_conv_bn(*pair)(x), pair(x))


def test_linear_matches_the_reference() -> None:
    from torch.nn.utils.fusion import fuse_linear_bn_eval

    pair = randomize(nn.Sequential(nn.Linear(5, 3, bias=False), nn.BatchNorm1d(3)).double())
    x = normal(7, 5)
    assert_equal(fold_conv_bn(*pair)(x), pair(x))
    assert_equal(fold_conv_bn(*pair).weight, fuse_linear_bn_eval(*pair).weight)


def test_wrong_pairs_are_refused() -> None:
    with pytest.raises(TypeError, match="BatchNorm1d 折进 Conv2d"):
        fold_conv_bn(nn.Conv2d(1, 2, 1), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match="2 个输出通道.*3 个"):
        fold_conv_bn(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="批的统计量"):
        fold_conv_bn(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, track_running_stats=False))


# ---------------------------------------------------------------- 数据流


class Net(nn.Module):
    """以一个函数作 ``forward`` 的小网络，两个卷积、两个 BatchNorm，全是 4 通道 1×1。"""

    def __init__(self, flow) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return self.flow(self, x)


FLOWS = {  # 名字: (数据流, 应折的对)
    "chain": (lambda n, x: n.bn2(n.conv2(F.relu(n.bn1(n.conv1(x))))), ["11", "22"]),
    # 预激活：登记的先后仍是 conv1、conv2、bn1、bn2，配对却只有 conv1 -> bn2
    "preact": (lambda n, x: x + n.conv2(F.relu(n.bn2(n.conv1(F.relu(n.bn1(x)))))), ["12"]),
    "crossed": (lambda n, x: n.bn1(n.conv2(x)) + n.bn2(n.conv1(x)), ["21", "12"]),
    "read twice": (lambda n, x: n.bn1(y := n.conv1(x)) + y, []),
    "concatenated": (lambda n, x: n.bn1(torch.cat([n.conv1(x)[:, :2], x[:, :2]], 1)), []),
    "relu between": (lambda n, x: n.bn1(F.relu(n.conv1(x))), []),
    "in-place relu between": (lambda n, x: n.bn1(F.relu_(n.conv1(x))), []),
    "in-place later": (lambda n, x: n.bn1(y := n.conv1(x)) * y.mul_(2), []),
    "also returned": (lambda n, x: (n.bn1(y := n.conv1(x)), {"features": [y]}), []),
    "shared conv": (lambda n, x: n.bn1(n.conv1(x)) + n.bn2(n.conv1(-x)), []),
    "shared bn": (lambda n, x: n.bn1(n.conv1(x)) + n.bn1(n.conv2(x)), []),
    "bn first": (lambda n, x: n.conv1(n.bn1(x)), []),
}


@pytest.mark.parametrize(("flow", "expected"), FLOWS.values(), ids=FLOWS)
def test_pairs_follow_the_data(flow, expected: list[str]) -> None:
    model = randomize(Net(flow).double())
    x = normal(2, 4, 3, 3)
    names = {module: name[-1:] for name, module in model.named_modules()}
    assert [names[a] + names[b] for a, b in find_pairs(model, x)] == expected
    folded = fold_batchnorm(model, x[:1])
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-12)
    assert count(folded) == 2 - len(expected) and count(model) == 2


class Counted(nn.Conv2d):
    """改了 ``forward`` 的卷积：它后面的 BatchNorm 不能折。"""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


def test_subclasses_and_batch_statistics_are_left_alone() -> None:
    x = normal(2, 4, 3, 3)
    for pair in (
        nn.Sequential(Counted(4, 4, 1), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
    ):
        pair = pair.double().eval()
        assert_equal(fold_batchnorm(pair, x)(x), pair(x))
        assert count(fold_batchnorm(pair, x)) == 1


def test_order_of_registration_would_be_wrong() -> None:
    # 常见的写法：谁登记在后面就折谁。预激活网络上它能跑，结果是错的，而且没有任何报错
    flow, _ = FLOWS["preact"]
    model = randomize(Net(flow).double())
    naive, x = copy.deepcopy(model), normal(2, 4, 3, 3)
    for conv, bn in (("conv1", "bn1"), ("conv2", "bn2")):
        setattr(naive, conv, fold_conv_bn(getattr(naive, conv), getattr(naive, bn)))
        setattr(naive, bn, nn.Identity())
    assert (naive(x) - model(x)).abs().max() > 0.1
    assert_equal(fold_batchnorm(model, x)(x), model(x))


def test_modes_and_statistics_of_the_original_survive() -> None:
    model = Net(FLOWS["chain"][0])
    model.train()
    model.bn2.eval()
    before = copy.deepcopy(model.state_dict())
    folded = fold_batchnorm(model, torch.ones(1, 4, 3, 3))
    assert not any(m.training for m in folded.modules())
    assert model.bn1.training and not model.bn2.training
    find_pairs(model, torch.ones(1, 4, 3, 3))
    assert model.bn1.training and not model.bn2.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not model.conv1._forward_hooks


def test_hooks_are_removed_when_the_model_fails() -> None:
    model = Net(FLOWS["chain"][0])
    with pytest.raises(RuntimeError):
        find_pairs(model, torch.ones(1, 3, 3, 3))
    assert not model.conv1._forward_hooks and model.training


def test_a_lone_module_and_a_nested_one() -> None:
    lone = nn.Conv2d(4, 4, 1).double()
    x = normal(1, 4, 3, 3)
    assert_equal(fold_batchnorm(lone, x)(x), lone(x))
    inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    nested = randomize(nn.Sequential(nn.Sequential(inner), nn.ReLU(inplace=True)).double())
    assert_equal(fold_batchnorm(nested, x)(x), nested(x))
    assert count(fold_batchnorm(nested, x)) == 0


# ---------------------------------------------------------------- 整个网络


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_whole_network(dtype: torch.dtype, tolerance: float) -> None:
    from chapter_04_cnn_classic.vgg import vgg_small

    model = randomize(vgg_small(11, width=16)).to(dtype)
    x = normal(2, 3, 32, 32).to(dtype)
    folded = fold_batchnorm(model, x)
    assert count(model) == 8 and count(folded) == 0
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=tolerance)
