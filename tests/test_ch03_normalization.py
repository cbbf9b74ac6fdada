"""第 3 章的归一化：与 PyTorch 对照前向、梯度、滑动统计量与 state_dict；手算的例子与不变性。"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_03_optimization_regularization import normalization as ours_module
from chapter_03_optimization_regularization.normalization import (
    BatchNorm1d,
    BatchNorm2d,
    DyT,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    LayerNorm,
    RMSNorm,
    WSConv2d,
    WSLinear,
)
from chapter_03_optimization_regularization.normalization_functions import (
    batch_norm,
    batch_norm_backward,
    batch_statistics,
    dynamic_tanh,
    group_norm,
    instance_norm,
    layer_norm,
    layer_norm_backward,
    moments,
    normalize,
    rms_norm,
    standardize_weight,
)
from tests.invariants import assert_batch_independent
from tests.parity import assert_equal, autograd, normal
from utils import make_generator

# (类名, 构造参数, 输入形状)：奇数尺寸、批大小 1、多个前导维、单个样本
CASES = [
    ("BatchNorm1d", {"num_features": 5}, (7, 5)),
    ("BatchNorm1d", {"num_features": 5}, (7, 5, 3)),
    ("BatchNorm1d", {"num_features": 5}, (1, 5, 3)),
    ("BatchNorm1d", {"num_features": 1, "affine": False}, (2, 1)),
    ("BatchNorm1d", {"num_features": 5, "eps": 0.1, "momentum": 0.3}, (7, 5)),
    ("BatchNorm1d", {"num_features": 5, "momentum": None}, (7, 5)),
    ("BatchNorm1d", {"num_features": 5, "track_running_stats": False}, (7, 5)),
    ("BatchNorm2d", {"num_features": 3}, (2, 3, 5, 7)),
    ("BatchNorm2d", {"num_features": 3, "momentum": None, "affine": False}, (1, 3, 5, 7)),
    ("BatchNorm2d", {"num_features": 3, "track_running_stats": False}, (2, 3, 1, 1)),
    ("InstanceNorm1d", {"num_features": 5}, (3, 5, 4)),
    ("InstanceNorm1d", {"num_features": 5, "affine": True}, (5, 4)),
    ("InstanceNorm1d", {"num_features": 5, "track_running_stats": True}, (3, 5, 4)),
    ("InstanceNorm1d", {"num_features": 5, "track_running_stats": True}, (5, 4)),
    ("InstanceNorm2d", {"num_features": 3, "affine": True, "eps": 0.1}, (1, 3, 5, 7)),
    (
        "InstanceNorm2d",
        {"num_features": 3, "affine": True, "track_running_stats": True, "momentum": 0.3},
        (2, 3, 5, 7),
    ),
    ("GroupNorm", {"num_groups": 2, "num_channels": 6}, (3, 6)),
    ("GroupNorm", {"num_groups": 3, "num_channels": 6, "eps": 0.1}, (1, 6, 5)),
    ("GroupNorm", {"num_groups": 1, "num_channels": 5, "affine": False}, (2, 5, 3, 7)),
    ("GroupNorm", {"num_groups": 5, "num_channels": 5}, (2, 5, 3)),
    ("GroupNorm", {"num_groups": 4, "num_channels": 4}, (2, 4)),  # 每组一个值，输出是 β
    ("LayerNorm", {"normalized_shape": 5}, (5,)),
    ("LayerNorm", {"normalized_shape": 5}, (1, 5)),
    ("LayerNorm", {"normalized_shape": (5,), "bias": False}, (2, 3, 4, 5)),
    ("LayerNorm", {"normalized_shape": [3, 5], "eps": 0.1}, (2, 7, 3, 5)),
    ("LayerNorm", {"normalized_shape": 5, "elementwise_affine": False}, (7, 5)),
    ("LayerNorm", {"normalized_shape": 1}, (4, 1)),
    ("RMSNorm", {"normalized_shape": 5}, (5,)),
    ("RMSNorm", {"normalized_shape": 5}, (2, 3, 5)),
    ("RMSNorm", {"normalized_shape": (3, 5), "eps": 0.1}, (2, 3, 5)),
    ("RMSNorm", {"normalized_shape": 5, "elementwise_affine": False}, (7, 5)),
]
NAMES = [f"{n}-{'x'.join(map(str, s))}-{i}" for i, (n, _, s) in enumerate(CASES)]


def pair(name: str, options: dict, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """我们的模块与官方的模块；``γ, β`` 换成随机数，权重由官方装载我们的。"""
    mine = getattr(ours_module, name)(**options).to(dtype)
    official = getattr(nn, name)(**options).to(dtype)
    for seed, parameter in enumerate(mine.parameters()):
        nn.init.normal_(parameter, generator=make_generator(50 + seed))
    assert list(mine.state_dict()) == list(official.state_dict())
    official.load_state_dict(mine.state_dict())
    return mine, official


def forward_and_gradients(module: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """``[y, ∂ℓ/∂x, 各参数的梯度...]``。"""
    x = x.clone().requires_grad_()
    y = module(x)
    parameters = list(module.parameters())
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], grad)]


# ---------------------------------------------------------------- 与官方对照


@pytest.mark.parametrize(("name", "options", "shape"), CASES, ids=NAMES)
def test_equals_torch_in_train_and_eval(name: str, options: dict, shape: tuple[int, ...]) -> None:
    mine, official = pair(name, options, torch.float64)
    for step in range(6):  # 四步训练，两步推理；输入的均值与方差都不标准
        mine.train(step < 4), official.train(step < 4)
        x, grad = 3 * normal(*shape, seed=step) + 2, normal(*shape, seed=10 + step)
        results = forward_and_gradients(mine, x, grad), forward_and_gradients(official, x, grad)
        assert len(results[0]) == 2 + len(list(official.parameters()))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        for key, value in official.state_dict().items():
            torch.testing.assert_close(mine.state_dict()[key], value, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("name", "options", "shape"), CASES, ids=NAMES)
def test_equals_torch_in_float32(name: str, options: dict, shape: tuple[int, ...]) -> None:
    mine, official = pair(name, options, torch.float32)
    x, grad = (3 * normal(*shape) + 2).float(), normal(*shape, seed=1).float()
    for a, b in zip(
        forward_and_gradients(mine, x, grad), forward_and_gradients(official, x, grad), strict=True
    ):
        assert a.dtype == torch.float32
        # 每组只有一个值时梯度是零，舍入误差被 1/√ε ≈ 316 放大，所以绝对误差放宽到 1e-4
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize(("name", "options", "shape"), CASES, ids=NAMES)
def test_state_dict_loads_from_torch(name: str, options: dict, shape: tuple[int, ...]) -> None:
    """官方训练过的（滑动统计量、步数都不是初值）装进我们的新模块，输出相同，之后继续训练也相同。"""
    _, official = pair(name, options, torch.float64)
    for step in range(3):
        official(normal(*shape, seed=step) + 1)
    mine = getattr(ours_module, name)(**options).double()
    mine.load_state_dict(official.state_dict())
    for a, b in zip(mine.state_dict().values(), official.state_dict().values(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    x = normal(*shape, seed=9)
    assert_equal(mine(x).detach(), official(x).detach(), 1e-11)
    assert_equal(mine.eval()(x).detach(), official.eval()(x).detach(), 1e-11)


def test_default_parameters_equal_torch() -> None:
    for name, options, _ in CASES:
        mine, official = getattr(ours_module, name)(**options), getattr(nn, name)(**options)
        for a, b in zip(mine.state_dict().values(), official.state_dict().values(), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


def test_large_mean_keeps_its_digits_in_float32() -> None:
    """均值 10⁴、标准差 1：``mean(x²) − μ²`` 在 float32 里只剩噪声，两遍算法不受影响。"""
    x = normal(512, 3).float() + 1e4
    truth = x.double().var(dim=0, correction=0)
    _, var = moments(x, (0,))
    torch.testing.assert_close(var.double().squeeze(0), truth, rtol=1e-4, atol=0)
    naive = x.square().mean(dim=0) - x.mean(dim=0).square()
    assert ((naive.double() - truth).abs() / truth).max() > 0.5


# ---------------------------------------------------------------- BatchNorm 的统计量


def test_batch_norm_by_hand() -> None:
    """两个样本 1 与 3：μ = 2，有偏方差 1，无偏方差 2。"""
    layer = BatchNorm1d(1, eps=0.0)
    with torch.no_grad():
        layer.weight.fill_(10), layer.bias.fill_(5)
    assert layer(torch.tensor([[1.0], [3.0]])).tolist() == [[-5.0], [15.0]]
    assert layer.running_mean.item() == pytest.approx(0.9 * 0 + 0.1 * 2)
    assert layer.running_var.item() == pytest.approx(0.9 * 1 + 0.1 * 2)
    assert layer.num_batches_tracked.item() == 1
    expected = 10 * (1 - 0.2) / math.sqrt(1.1) + 5
    assert layer.eval()(torch.tensor([[1.0]])).item() == pytest.approx(expected)
    assert layer.num_batches_tracked.item() == 1  # 推理不更新
    layer.reset_running_stats()
    assert [b.item() for b in layer.buffers()] == [0.0, 1.0, 0]
    BatchNorm1d(1, track_running_stats=False).reset_running_stats()  # 没有统计量，什么也不做


def test_cumulative_average_is_the_mean_over_batches() -> None:
    layer = BatchNorm1d(3, momentum=None).double()
    batches = [normal(n, 3, seed=n) + n for n in (2, 5, 9)]
    for batch in batches:
        layer(batch)
    assert_equal(layer.running_mean, torch.stack([b.mean(0) for b in batches]).mean(0))
    assert_equal(layer.running_var, torch.stack([b.var(0) for b in batches]).mean(0))


def test_running_statistics_carry_no_graph() -> None:
    layer = BatchNorm1d(3)
    x = torch.randn(4, 3, requires_grad=True)
    layer(x), layer(x)
    assert not layer.running_mean.requires_grad and not layer.running_var.requires_grad


# ---------------------------------------------------------------- 手推的反向


@pytest.mark.parametrize("shape", [(2, 1), (7, 5), (1, 5, 3), (4, 5, 3), (2, 3, 5, 7)])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_batch_norm_backward(shape: tuple[int, ...], eps: float) -> None:
    x, grad, weight, bias = 3 * normal(*shape) + 2, normal(*shape, seed=1), *normal(2, shape[1])

    def official(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)

    truth = autograd(official, grad, x, weight, bias)
    # 批大小 2、ε 很小时 ∂ℓ/∂x 是大数相消之后的余量：误差以相消之前的量计
    scale = (grad * weight.view(-1, *[1] * (len(shape) - 2))).abs().max().item()
    for hand, expected in zip(batch_norm_backward(grad, x, weight, eps), truth, strict=True):
        torch.testing.assert_close(hand, expected, rtol=1e-12, atol=1e-12 * scale)


@pytest.mark.parametrize(
    ("shape", "inner"), [((5,), 1), ((1, 5), 1), ((2, 3, 5), 1), ((4, 3, 5), 2), ((3, 5), 2)]
)
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_layer_norm_backward(shape: tuple[int, ...], inner: int, eps: float) -> None:
    whole = shape[-inner:]
    x, grad = 3 * normal(*shape) + 2, normal(*shape, seed=1)
    weight, bias = normal(*whole, seed=2), normal(*whole, seed=3)

    def official(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, whole, weight, bias, eps)

    truth = autograd(official, grad, x, weight, bias)
    for hand, expected in zip(layer_norm_backward(grad, x, weight, eps), truth, strict=True):
        assert_equal(hand, expected)


def test_default_eps_is_that_of_torch() -> None:
    """方差小到与 ε 相当时，缺省的 ε 才看得出对错。"""
    x, grad, weight = 3e-3 * normal(5, 4), normal(5, 4, seed=1), normal(4, seed=2)
    functions = {
        batch_norm_backward: lambda x: F.batch_norm(x, None, None, weight, training=True),
        layer_norm_backward: lambda x: F.layer_norm(x, (4,), weight),
    }
    for backward, official in functions.items():
        (truth,) = autograd(official, grad, x)
        assert_equal(backward(grad, x, weight)[0], truth)
    for mine, official in [
        (batch_norm(x, *batch_statistics(x)), F.batch_norm(x, None, None, training=True)),
        (group_norm(x, 2), F.group_norm(x, 2)),
        (instance_norm(x[None]), F.instance_norm(x[None])),
        (layer_norm(x, (4,)), F.layer_norm(x, (4,))),
    ]:
        assert_equal(mine, official)


def test_normalisation_removes_two_directions_of_the_gradient() -> None:
    """ε = 0 时 ``∂ℓ/∂x`` 与 1、与 ``x̂`` 正交：平移、缩放输入不改变输出，梯度也就没有这两个分量。"""
    x, grad = normal(8, 3), normal(8, 3, seed=1)
    gx, _, _ = batch_norm_backward(grad, x, torch.ones(3, dtype=torch.float64), eps=0.0)
    x_hat = normalize(x, *moments(x, (0,)), 0.0)
    assert gx.sum(dim=0).abs().max() < 1e-13 and (gx * x_hat).sum(dim=0).abs().max() < 1e-13
    assert gx.abs().max() > 0.1


# ---------------------------------------------------------------- 性质


def test_batch_norm_ignores_the_scale_of_the_weights_before_it() -> None:
    """``BN(a W x) = BN(W x)``，于是 ``∂ℓ/∂(aW) = (1/a) ∂ℓ/∂W`` 且与 ``W`` 正交。"""
    x, weight, grad = normal(9, 4), normal(5, 4, seed=1), normal(9, 5, seed=2)
    layer = BatchNorm1d(5, eps=0.0).double()

    def run(weight: Tensor) -> Tensor:
        return layer(x @ weight.T)

    assert_equal(run(7 * weight).detach(), run(weight).detach())
    (base,), (scaled,) = autograd(run, grad, weight), autograd(run, grad, 7 * weight)
    assert_equal(scaled, base / 7)
    assert (base * weight).sum(dim=1).abs().max() < 1e-13 < base.abs().max()


@pytest.mark.parametrize(
    "module",
    [LayerNorm(6), LayerNorm((6, 5)), RMSNorm(5), InstanceNorm1d(6), GroupNorm(3, 6), DyT(5)],
    ids=lambda m: type(m).__name__,
)
def test_all_but_batch_norm_are_batch_independent(module: nn.Module) -> None:
    shape = (4, 5, 6) if getattr(module, "normalized_shape", ()) == (6,) else (4, 6, 5)
    # 训练时也成立；种子不取 0：检查所加的扰动恰是种子 0 的 3 倍，RMSNorm 对整数倍毫无反应
    assert_batch_independent(module.double(), normal(*shape, seed=1))


def test_batch_norm_mixes_the_batch_only_in_training() -> None:
    layer = BatchNorm1d(3).double()
    assert_batch_independent(layer.eval(), normal(5, 3, seed=1))
    layer.train()
    x = normal(5, 3)
    (gx,) = autograd(lambda x: layer(x)[0].square().sum(), torch.tensor(1.0).double(), x)
    assert (gx[1:].abs() > 1e-6).all()  # 第 0 个样本的输出取决于每一个同伴


def test_relations_between_the_norms() -> None:
    x, weight, bias = normal(3, 6, 5), normal(6, seed=1), normal(6, seed=2)
    assert_equal(group_norm(x, 6, weight, bias), instance_norm(x, weight, bias))
    assert_equal(group_norm(x, 1), layer_norm(x, (6, 5)))
    centred = x - x.mean(dim=-1, keepdim=True)  # 均值已为零，LayerNorm 就是 RMSNorm
    assert_equal(rms_norm(centred, (5,), eps=1e-5), layer_norm(x, (5,)))
    assert_equal(rms_norm(9 * x, (5,), eps=0.0), rms_norm(x, (5,), eps=0.0))
    assert (rms_norm(x + 1, (5,)) - rms_norm(x, (5,))).abs().max() > 0.1  # 平移则不然


# ---------------------------------------------------------------- DyT 与权重标准化


def test_dyt() -> None:
    layer = DyT(3)
    assert {k: v.tolist() for k, v in layer.state_dict().items()} == {
        "alpha": [0.5],
        "weight": [1.0] * 3,
        "bias": [0.0] * 3,
    }
    assert DyT(3, alpha_init_value=0.8).alpha.item() == pytest.approx(0.8)
    x, alpha, weight, bias = normal(2, 7, 3), normal(1), normal(3, seed=1), normal(3, seed=2)
    values = dynamic_tanh(x, alpha, weight, bias)
    assert_equal(values, torch.addcmul(bias, weight, torch.tanh(alpha * x)))
    layer.double().load_state_dict({"alpha": alpha, "weight": weight, "bias": bias})
    assert torch.equal(layer(x).detach(), values)
    x = x.requires_grad_()
    assert torch.autograd.gradcheck(
        dynamic_tanh, (x, *(p.detach().requires_grad_() for p in (alpha, weight, bias)))
    )


@pytest.mark.parametrize("shape", [(3, 7), (1, 2), (4, 3, 2, 5)])
def test_weight_standardisation_equals_batch_norm_of_the_weight(shape: tuple[int, ...]) -> None:
    """每个输出单元当作一个通道，全部输入权重当作空间位置：就是一次 BatchNorm。"""

    def official(weight: Tensor) -> Tensor:
        rows = weight.flatten(1).unsqueeze(0)
        return F.batch_norm(rows, None, None, training=True, eps=1e-5).view_as(weight)

    weight, grad = 3 * normal(*shape) + 2, normal(*shape, seed=1)
    assert_equal(standardize_weight(weight), official(weight))
    (mine,), (truth,) = (autograd(f, grad, weight) for f in (standardize_weight, official))
    torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12)
    assert_equal(standardize_weight(5 * weight, eps=0.0), standardize_weight(weight, eps=0.0))


def test_weight_standardised_layers() -> None:
    dense = WSLinear(5, 3, generator=make_generator(0)).double()
    x = normal(2, 4, 5)
    truth = nn.functional.linear(x, standardize_weight(dense.weight), dense.bias)
    assert_equal(dense(x).detach(), truth.detach())
    official = nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, groups=2, padding_mode="circular")
    conv = WSConv2d(4, 6, (3, 2), stride=2, padding=1, groups=2, padding_mode="circular").double()
    state = conv.state_dict()
    x = normal(2, 4, 7, 5)
    before = official.double().load_state_dict(state) and official(x)
    official.load_state_dict(state | {"weight": standardize_weight(state["weight"])})
    assert_equal(conv(x).detach(), official(x).detach())
    assert (before - official(x)).abs().max() > 0.1  # 标准化确实改变了权重


# ---------------------------------------------------------------- 错误

ERRORS: list[tuple[Callable[[], nn.Module], tuple[int, ...], str]] = [
    (lambda: BatchNorm1d(3), (1, 3), r"不止一个值.*\(1, 3\)"),
    (lambda: BatchNorm1d(3), (1, 3, 1), r"不止一个值.*\(1, 3, 1\)"),
    (lambda: BatchNorm1d(3), (0, 3), r"不止一个值.*\(0, 3\)"),
    (lambda: BatchNorm1d(3, track_running_stats=False).eval(), (1, 3), "不止一个值"),
    (lambda: BatchNorm1d(3), (3,), "2 或 3 维，实为 1 维"),
    (lambda: BatchNorm1d(3), (2, 3, 4, 5), "2 或 3 维，实为 4 维"),
    (lambda: BatchNorm2d(3), (2, 3), "BatchNorm2d 的输入应为 4 维，实为 2 维"),
    (lambda: BatchNorm1d(3), (2, 5), "num_features=3，实为 5"),
    (lambda: BatchNorm1d(3).eval(), (2, 5), "num_features=3，实为 5"),
    (lambda: InstanceNorm1d(3), (2, 3, 1), r"不止一个空间位置.*\(2, 3, 1\)"),
    (lambda: InstanceNorm2d(3).eval(), (2, 3, 1, 1), "不止一个空间位置"),
    (lambda: InstanceNorm1d(3), (2, 5, 4), "第 1 维应等于 num_features=3，实为 5"),
    (lambda: InstanceNorm1d(3), (5, 4), "第 0 维应等于 num_features=3，实为 5"),
    (lambda: InstanceNorm2d(3), (2, 3), "3 或 4 维，实为 2 维"),
    (lambda: GroupNorm(2, 4), (2, 6, 3), r"\(B, 4, ...\)，实为 \(2, 6, 3\)"),
    (lambda: GroupNorm(2, 4), (4,), r"实为 \(4,\)"),
    (lambda: GroupNorm(4, 4), (1, 4), r"每组应不止一个值.*\(1, 4\) 分成 4 组"),
    (lambda: GroupNorm(3, 4), (), "num_channels=4 应能被 num_groups=3 整除"),
    (lambda: GroupNorm(0, 4), (), "num_groups=0"),
    (lambda: LayerNorm(3), (4, 4), r"normalized_shape=\(3,\) .*\(\*, 3\)，实为 \(4, 4\)"),
    (lambda: LayerNorm((2, 3)), (3,), r"\(\*, 2, 3\)，实为 \(3,\)"),
    (lambda: RMSNorm(3), (4, 4), r"\(\*, 3\)，实为 \(4, 4\)"),
    (lambda: LayerNorm(()), (), "至少有一维"),
    (lambda: RMSNorm([]), (), "至少有一维"),
]


@pytest.mark.parametrize(("make", "shape", "message"), ERRORS)
def test_rejects_nonsense(make: Callable[[], nn.Module], shape: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message) as error:
        make()(torch.randn(shape))
    assert "\n" not in str(error.value)


def test_a_rejected_batch_leaves_the_statistics_alone() -> None:
    layer = BatchNorm1d(3)
    for shape in [(1, 3), (2, 5)]:
        with pytest.raises(ValueError):
            layer(torch.randn(shape))
    assert not layer.num_batches_tracked and not layer.running_mean.any()
    assert layer.eval()(torch.randn(1, 3)).shape == (1, 3)  # 推理时批大小 1 合法
