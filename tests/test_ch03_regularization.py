"""第 3 章的正则化：惩罚与近端算子、Dropout、软标签、混合、裁剪，在 float64 下与官方逐项对照。"""

from __future__ import annotations

import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_03_optimization_regularization.regularization import (
    Dropout,
    DropPath,
    _log_gamma_sample,
    clip_grad_norm_,
    clip_grad_value_,
    cutmix,
    cutmix_box,
    drop_path,
    dropout,
    elastic_net_penalty,
    l1_penalty,
    l2_penalty,
    label_smoothing_cross_entropy,
    label_smoothing_cross_entropy_grad,
    mixup,
    prox_elastic_net_,
    prox_l1_,
    sample_beta,
    soft_cross_entropy,
    soft_threshold,
)
from tests.parity import assert_equal, autograd, normal
from utils import make_generator, set_seed

# ---------------------------------------------------------------- 惩罚与近端算子


def test_penalties_by_hand() -> None:
    params = [torch.tensor([3.0, -4.0]), torch.tensor([[0.0], [2.0]])]
    assert l1_penalty(params).item() == 9
    assert l2_penalty(params).item() == 29 / 2
    assert elastic_net_penalty(iter(params), 2.0, 10.0).item() == 2 * 9 + 10 * 14.5  # 生成器也行


def test_penalty_gradients_are_sign_and_weight() -> None:
    w, one = normal(3, 5), torch.ones((), dtype=torch.float64)
    assert_equal(autograd(lambda w: l1_penalty([w]), one, w)[0], w.sign())
    assert_equal(autograd(lambda w: l2_penalty([w]), one, w)[0], w)


def test_l2_penalty_equals_weight_decay_of_sgd() -> None:
    a, b = (normal(4).requires_grad_() for _ in range(2))
    for w, decay, penalty in [(a, 0.0, 0.3), (b, 0.3, 0.0)]:
        optimizer = torch.optim.SGD([w], lr=0.1, weight_decay=decay)
        (w.pow(3).sum() + penalty * l2_penalty([w])).backward()
        optimizer.step()
    assert_equal(a.detach(), b.detach())


@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0])
def test_soft_threshold_equals_softshrink(threshold: float) -> None:
    x, grad = normal(43), normal(43, seed=1)
    edges = torch.tensor([-threshold, threshold, 0.0, math.inf, -math.inf])
    for values in (x, edges):  # 恰在阈值上的只比取值：那里不可导
        assert torch.equal(soft_threshold(values, threshold), F.softshrink(values, threshold))
    # nan 要传下去；torch 2.4 的 softshrink 会把它变成 0，所以不与之比较
    assert soft_threshold(torch.tensor(math.nan), threshold).isnan()
    assert_equal(
        autograd(lambda x: soft_threshold(x, threshold), grad, x)[0],
        autograd(lambda x: F.softshrink(x, threshold), grad, x)[0],
    )


def test_proximal_operators_minimise_their_objective() -> None:
    """不看公式，直接在细网格上找 argmin。"""
    grid = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    lr, l1, l2 = 0.5, 1.2, 0.7
    for value in (-2.0, -0.61, -0.3, 0.0, 0.59, 1.4):
        distance = (grid - value).square() / 2
        w = torch.tensor([value], dtype=torch.float64)
        prox_l1_([w], lr * l1)
        best = grid[(distance + lr * l1 * grid.abs()).argmin()]
        assert w.item() == pytest.approx(best.item(), abs=1e-4)
        w = torch.tensor([value], dtype=torch.float64)
        prox_elastic_net_([w], lr, l1, l2)
        penalty = lr * (l1 * grid.abs() + l2 * grid.square() / 2)
        assert w.item() == pytest.approx(grid[(distance + penalty).argmin()].item(), abs=1e-4)


def test_prox_is_in_place_exact_and_leaves_no_graph() -> None:
    w = torch.tensor([0.05, -0.1, 1.0], requires_grad=True)
    prox_l1_([w], 0.1)
    assert w.tolist() == [0.0, 0.0, pytest.approx(0.9)] and w.is_leaf and w.requires_grad
    prox_elastic_net_([w], lr=1.0, l1=0.0, l2=2.0)
    assert w[2].item() == pytest.approx(0.3)


def test_proximal_gradient_reaches_the_lasso_optimum() -> None:
    """收敛处满足 KKT：w ≠ 0 时 g = −l1·sign(w)，w = 0 时 |g| ≤ l1。"""
    a, l1 = normal(30, 8), 6.0
    b = a @ torch.tensor([2.0, -1, 0, 0, 0, 0, 0, 0.05], dtype=torch.float64)
    w = torch.zeros(8, dtype=torch.float64)
    lr = 1 / torch.linalg.matrix_norm(a, 2).item() ** 2
    for _ in range(2000):
        w -= lr * (a.T @ (a @ w - b))
        prox_l1_([w], lr * l1)
    grad = a.T @ (a @ w - b)
    assert 0 < (w == 0).sum() < 8
    assert_equal(grad[w != 0], -l1 * w[w != 0].sign(), 1e-9)
    assert (grad[w == 0].abs() < l1).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: soft_threshold(torch.ones(1), -0.1),
        lambda: soft_threshold(torch.ones(1), math.nan),
        lambda: prox_elastic_net_([torch.ones(1)], 0.1, -1.0, 0.0),
        lambda: prox_elastic_net_([torch.ones(1)], 0.1, 0.0, -1.0),
    ],
)
def test_prox_refuses_negative_coefficients(call) -> None:
    with pytest.raises(ValueError, match="应不小于 0"):
        call()


# ---------------------------------------------------------------- Dropout 与 DropPath


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1,), (5, 7), (2, 3, 4, 5)])
def test_dropout_is_bit_equal_to_torch(p: float, shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.float64):
        x, grad = normal(*shape).to(dtype), normal(*shape, seed=1).to(dtype)
        results = []
        for module in (Dropout(p), nn.Dropout(p)):
            set_seed(3)
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            y.backward(grad)
            # 之后的第一个随机数也相同：两者耗掉的随机数一样多
            results.append((y.detach(), leaf.grad, torch.rand(())))
        for ours, official in zip(*results, strict=True):
            assert torch.equal(ours, official)
        assert torch.equal(Dropout(p).eval()(x), x)


def test_dropout_keeps_the_expectation_and_has_the_stated_variance() -> None:
    x, p, generator = torch.full((200_000,), 2.0, dtype=torch.float64), 0.3, make_generator(0)
    y = dropout(x, p, True, generator)
    assert y.mean().item() == pytest.approx(2, abs=0.015)
    assert y.var().item() == pytest.approx(4 * p / (1 - p), rel=0.01)
    assert set(y.unique().tolist()) == {0.0, 2.0 / 0.7}


@pytest.mark.parametrize("p", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(1, 3), (9,), (9, 4), (9, 2, 3, 3)])
def test_drop_path_is_bit_equal_to_torchvision(
    needs_torchvision: None, p: float, shape: tuple[int, ...]
) -> None:
    from torchvision.ops import StochasticDepth

    x, grad = normal(*shape), normal(*shape, seed=1)
    results = []
    for module in (DropPath(p), StochasticDepth(p, "row")):
        set_seed(5)
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.backward(grad)
        results.append((y.detach(), leaf.grad, torch.rand(()) if p < 1 else torch.zeros(())))
    for ours, official in zip(*results, strict=True):
        assert torch.equal(ours, official)
    assert torch.equal(DropPath(p).eval()(x), x)


def test_drop_path_drops_whole_samples() -> None:
    y = drop_path(torch.ones(1000, 3, 2), 0.25, True, make_generator(0))
    per_sample = y.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    kept = (per_sample[:, 0] != 0).double().mean().item()
    assert kept == pytest.approx(0.75, abs=0.04)
    assert per_sample.max().item() == pytest.approx(4 / 3)


@pytest.mark.parametrize("module", [Dropout, DropPath])
def test_stochastic_modules_use_their_own_generator(module: type[nn.Module]) -> None:
    x = torch.ones(50, 4)
    state = torch.get_rng_state()
    a, b = (module(0.5, generator=make_generator(7))(x) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(torch.get_rng_state(), state)
    layer = module(0.5, generator=make_generator(7))
    assert not torch.equal(layer(x), layer(x))
    assert repr(layer) == f"{module.__name__}(p=0.5)"


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan])
def test_drop_probability_is_checked(p: float) -> None:
    for call in (
        lambda: Dropout(p),
        lambda: DropPath(p),
        lambda: dropout(torch.ones(2), p, False),
        lambda: drop_path(torch.ones(2), p, False),
    ):
        with pytest.raises(ValueError, match="dropout 概率应在 0 到 1 之间"):
            call()


# ---------------------------------------------------------------- 软标签


@pytest.mark.parametrize(("batch", "classes"), [(1, 2), (7, 5)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing_equals_torch(batch: int, classes: int, smoothing: float) -> None:
    logits, target = 3 * normal(batch, classes), torch.arange(batch) % classes
    one = torch.ones((), dtype=torch.float64)

    def ours(x: Tensor) -> Tensor:
        return label_smoothing_cross_entropy(x, target, smoothing)

    def official(x: Tensor) -> Tensor:
        return F.cross_entropy(x, target, label_smoothing=smoothing)

    assert_equal(ours(logits), official(logits))
    truth = autograd(official, one, logits)[0]
    assert_equal(autograd(ours, one, logits)[0], truth)
    assert_equal(label_smoothing_cross_entropy_grad(logits, target, smoothing), truth)


def test_label_smoothing_optimum() -> None:
    """最优处 softmax = q，正确类与其余的 logits 之差 ln((C(1−ε) + ε)/ε)，梯度为零。"""
    classes, smoothing = 4, 0.2
    gap = math.log((classes * (1 - smoothing) + smoothing) / smoothing)
    logits, target = torch.zeros(1, classes, dtype=torch.float64), torch.tensor([1])
    logits[0, 1] = gap
    assert label_smoothing_cross_entropy_grad(logits, target, smoothing).abs().max() < 1e-15
    entropy = -(0.85 * math.log(0.85) + 3 * 0.05 * math.log(0.05))  # q = (0.05, 0.85, 0.05, 0.05)
    loss = label_smoothing_cross_entropy(logits, target, smoothing).item()
    assert loss == pytest.approx(entropy, rel=1e-12)


@pytest.mark.parametrize(("batch", "classes"), [(1, 3), (6, 5)])
def test_soft_cross_entropy_equals_torch(batch: int, classes: int) -> None:
    logits, one = 3 * normal(batch, classes), torch.ones((), dtype=torch.float64)
    q = normal(batch, classes, seed=1).softmax(-1)
    assert_equal(soft_cross_entropy(logits, q), F.cross_entropy(logits, q))
    assert_equal(
        autograd(lambda x: soft_cross_entropy(x, q), one, logits)[0],
        autograd(lambda x: F.cross_entropy(x, q), one, logits)[0],
    )


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, math.nan])
def test_smoothing_is_checked(smoothing: float) -> None:
    for loss in (label_smoothing_cross_entropy, label_smoothing_cross_entropy_grad):
        with pytest.raises(ValueError, match="smoothing=.* 应在 0 到 1 之间"):
            loss(torch.zeros(1, 2), torch.tensor([0]), smoothing)


# ---------------------------------------------------------------- mixup 与 cutmix


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_beta_has_the_right_moments(alpha: float) -> None:
    generator = make_generator(1)
    draws = [sample_beta(alpha, generator) for _ in range(4000)]
    variance = 1 / (4 * (2 * alpha + 1))
    assert statistics.fmean(draws) == pytest.approx(0.5, abs=4 * math.sqrt(variance / 4000))
    assert statistics.pvariance(draws) == pytest.approx(variance, rel=0.06)
    # 四阶矩：方差相同而形状不同的分布也分得出来
    fourth = torch.distributions.Beta(alpha, alpha).sample((200_000,)).sub(0.5).pow(4).mean()
    ours = statistics.fmean((x - 0.5) ** 4 for x in draws)
    assert ours == pytest.approx(fourth.item(), rel=0.12)


@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_log_gamma_has_the_right_moments(alpha: float) -> None:
    """``Gamma(α)`` 的均值与方差都是 α，``log G`` 的均值是 digamma(α)。"""
    generator = make_generator(2)
    logs = [_log_gamma_sample(alpha, generator) for _ in range(20_000)]
    values = [math.exp(x) for x in logs]
    assert statistics.fmean(values) == pytest.approx(alpha, abs=4 * math.sqrt(alpha / 20_000))
    assert statistics.pvariance(values) == pytest.approx(alpha, rel=0.06)
    digamma = torch.digamma(torch.tensor(alpha, dtype=torch.float64)).item()
    assert statistics.fmean(logs) == pytest.approx(digamma, abs=0.06)


def test_tiny_alpha_gives_no_nan() -> None:
    generator = make_generator(0)
    draws = [sample_beta(1e-4, generator) for _ in range(200)]
    assert all(0 <= x <= 1 for x in draws)
    assert 60 < sum(x > 0.5 for x in draws) < 140  # 几乎都在两端，各占一半
    assert all(min(x, 1 - x) < 1e-3 for x in draws[:20])


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_alpha_is_checked(alpha: float) -> None:
    with pytest.raises(ValueError, match="应为有限的正数"):
        sample_beta(alpha, make_generator(0))


def test_mixup_mixes_inputs_and_labels_alike() -> None:
    """输入取成标签的独热向量，混合之后二者必须仍然相同；每行的和为 1。"""
    y = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    onehot = F.one_hot(y, 6).double()
    state = torch.get_rng_state()
    x, target = mixup(onehot, y, 6, 1.0, make_generator(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, target) and not torch.equal(x, onehot)
    assert_equal(target.sum(1), torch.ones(7, dtype=torch.float64))
    generator = make_generator(4)
    weight, order = sample_beta(1.0, generator), torch.randperm(7, generator=generator)
    assert_equal(x, weight * onehot + (1 - weight) * onehot[order])


def test_mixup_of_a_single_sample_is_itself() -> None:
    x, target = mixup(normal(1, 3), torch.tensor([2]), 4, 0.4, make_generator(0))
    assert_equal(x, normal(1, 3))
    assert_equal(target, torch.tensor([[0.0, 0, 1, 0]], dtype=torch.float64))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("size", [(8, 8), (5, 9)])
def test_cutmix_label_is_the_exact_pixel_share(seed: int, size: tuple[int, int]) -> None:
    """每张图涂满自己的序号：数像素就知道各类占多少。"""
    count = 6
    y = torch.arange(count)
    images = y.double().view(-1, 1, 1, 1).expand(count, 2, *size)
    mixed, target = cutmix(images, y, count, 1.0, make_generator(seed))
    shares = torch.stack([(mixed == k).double().mean(dim=(1, 2, 3)) for k in range(count)], dim=1)
    assert_equal(target, shares)
    assert (images == y.view(-1, 1, 1, 1)).all()  # 原来的图没有被改动
    assert torch.equal(mixed[:, 0], mixed[:, 1])  # 各通道用同一个方框


def test_cutmix_boxes() -> None:
    generator = make_generator(0)
    assert cutmix_box(8, 6, 1.0, generator)[0] == cutmix_box(8, 6, 1.0, make_generator(0))[1]
    areas = []
    for _ in range(3000):
        top, bottom, left, right = cutmix_box(32, 64, 0.75, generator)
        assert 0 <= top <= bottom <= 32 and 0 <= left <= right <= 64
        assert bottom - top <= 16 and right - left <= 32  # 边长的一半：√(1 − 0.75)
        areas.append((bottom - top) * (right - left) / (32 * 64))
    # 中心均匀，长 s 的边裁掉之后平均剩 s − s²/4（s = 1/2 时为 7/16），离散化使它略有出入
    assert statistics.fmean(areas) == pytest.approx((7 / 16) ** 2, rel=0.02)
    assert max(areas) == 0.25


def test_mixing_refuses_integers_and_flat_images() -> None:
    y, g = torch.tensor([0]), make_generator(0)
    with pytest.raises(ValueError, match="mixup 的输入应为浮点数，实为 torch.uint8"):
        mixup(torch.zeros(1, 3, dtype=torch.uint8), y, 2, 1.0, g)
    with pytest.raises(ValueError, match=r"cutmix 的输入应为浮点 \(B, 通道, H, W\)"):
        cutmix(torch.zeros(1, 9), y, 2, 1.0, g)


# ---------------------------------------------------------------- 梯度裁剪


def two_copies(scale: float) -> list[list[nn.Parameter]]:
    """两份相同的参数，梯度相同，其中一个没有梯度。"""
    copies = []
    for _ in range(2):
        params = [nn.Parameter(normal(3, 5)), nn.Parameter(normal(1)), nn.Parameter(normal(2, 2))]
        params[0].grad = scale * normal(3, 5, seed=1)
        params[2].grad = scale * normal(2, 2, seed=2)
        copies.append(params)
    return copies


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_clip_grad_norm_equals_torch(norm_type: float, scale: float) -> None:
    ours, official = two_copies(scale)
    total = clip_grad_norm_(ours, 1.5, norm_type)
    assert_equal(total, nn.utils.clip_grad_norm_(official, 1.5, norm_type))
    for a, b in zip(ours, official, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            assert_equal(a.grad, b.grad)


def test_clip_grad_value_equals_torch() -> None:
    ours, official = two_copies(1.0)
    clip_grad_value_(ours, 0.4)
    nn.utils.clip_grad_value_(official, 0.4)
    assert torch.equal(ours[0].grad, official[0].grad) and ours[0].grad.abs().max() == 0.4
    assert torch.equal(ours[2].grad, official[2].grad) and ours[1].grad is None


def test_clipping_by_hand() -> None:
    w = nn.Parameter(torch.zeros(2))
    w.grad = torch.tensor([3.0, -4.0])
    assert clip_grad_norm_(w, 1.0).item() == 5  # 单个张量也行
    torch.testing.assert_close(w.grad, torch.tensor([0.6, -0.8]))
    w.grad = torch.tensor([3.0, -0.5])
    clip_grad_value_(w, 1.0)
    assert w.grad.tolist() == [1.0, -0.5]  # 方向变了
    assert clip_grad_norm_([], 1.0).item() == 0 == nn.utils.clip_grad_norm_([], 1.0).item()
    assert clip_grad_norm_(iter([w]), 10.0).item() == pytest.approx(math.sqrt(1.25))
    assert w.grad.tolist() == [1.0, -0.5]  # 没有超过上限的，一个比特也不变


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_norm(bad: float) -> None:
    w = nn.Parameter(torch.zeros(2))
    w.grad = torch.tensor([bad, 1.0])
    with pytest.raises(RuntimeError, match="无法裁剪"):
        clip_grad_norm_([w], 1.0, error_if_nonfinite=True)
    assert w.grad[1] == 1  # 报错时没有改动
    official = nn.Parameter(torch.zeros(2))
    official.grad = w.grad.clone()
    nn.utils.clip_grad_norm_([official], 1.0)
    clip_grad_norm_([w], 1.0)
    assert torch.equal(w.grad.nan_to_num(7), official.grad.nan_to_num(7))


def test_no_smoothing_tolerates_masked_classes() -> None:
    logits, target = torch.tensor([[1.0, -math.inf, 2.0]]), torch.tensor([0])
    expected = nn.functional.cross_entropy(logits, target)
    torch.testing.assert_close(label_smoothing_cross_entropy(logits, target, 0.0), expected)
