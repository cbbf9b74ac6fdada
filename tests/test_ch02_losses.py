"""第 2 章的损失函数：取值、手推梯度与经 autograd 的梯度，都在 float64 下与 PyTorch 对照。"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chapter_02_nn_basics_mlp import losses
from utils import make_generator

SHAPES = [(1,), (1, 1), (7, 3), (2, 3, 5)]
Loss = Callable[..., Tensor]


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=make_generator(seed), dtype=torch.float64)


def labels(batch: int, classes: int, seed: int = 1) -> Tensor:
    return torch.randint(classes, (batch,), generator=make_generator(seed))


def value_and_grad(loss: Loss, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = loss(x, target)
    return value.detach(), torch.autograd.grad(value, x)[0]


def check(ours: Loss, ours_grad: Loss, official: Loss, x: Tensor, target: Tensor) -> None:
    """取值、手推的梯度、穿过我们的公式的 autograd，三者都等于官方的。"""
    expected, truth = value_and_grad(official, x, target)
    value, through = value_and_grad(ours, x, target)
    assert value.shape == () and value.dtype == x.dtype
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(ours_grad(x, target), truth, rtol=1e-12, atol=1e-16)
    torch.testing.assert_close(through, truth, rtol=1e-12, atol=1e-16)


# ---------------------------------------------------------------- 回归


@pytest.mark.parametrize("shape", SHAPES)
def test_mse_and_mae(shape: tuple[int, ...]) -> None:
    x, target = normal(*shape), normal(*shape, seed=1)
    check(losses.mse, losses.mse_grad, F.mse_loss, x, target)
    check(losses.mae, losses.mae_grad, F.l1_loss, x, target)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("delta", [1e-3, 0.5, 1.0, 10.0])
def test_huber(shape: tuple[int, ...], delta: float) -> None:
    x, target = normal(*shape), normal(*shape, seed=1)
    ours, grad = partial(losses.huber, delta=delta), partial(losses.huber_grad, delta=delta)
    check(ours, grad, partial(F.huber_loss, delta=delta), x, target)


def test_regression_by_hand() -> None:
    pred, target = torch.tensor([1.0, 5.0, 2.0]), torch.tensor([2.0, 2.0, 2.0])  # 误差 −1, 3, 0
    assert losses.mse(pred, target).item() == pytest.approx(10 / 3)
    assert losses.mae(pred, target).item() == pytest.approx(4 / 3)
    assert losses.huber(pred, target).item() == pytest.approx((0.5 + 2.5 + 0) / 3)
    assert losses.mse_grad(pred, target).tolist() == pytest.approx([-2 / 3, 2.0, 0.0])
    assert losses.mae_grad(pred, target).tolist() == pytest.approx([-1 / 3, 1 / 3, 0.0])
    assert losses.huber_grad(pred, target).tolist() == pytest.approx([-1 / 3, 1 / 3, 0.0])


def test_the_best_constant_is_the_mean_for_mse_and_the_median_for_mae() -> None:
    data = torch.tensor([0.0, 1.0, 2.0, 3.0, 100.0])
    guesses = torch.linspace(0, 100, 2001)
    for loss, best in ((losses.mse, data.mean()), (losses.mae, data.median())):
        values = torch.stack([loss(guess.expand(5), data) for guess in guesses])
        assert guesses[values.argmin()].item() == pytest.approx(best.item(), abs=0.03)


# ---------------------------------------------------------------- softmax 交叉熵


@pytest.mark.parametrize(("batch", "classes"), [(1, 1), (1, 5), (9, 2), (7, 11)])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_cross_entropy(batch: int, classes: int, scale: float) -> None:
    x, target = normal(batch, classes, scale=scale), labels(batch, classes)
    check(losses.cross_entropy, losses.cross_entropy_grad, F.cross_entropy, x, target)
    log_sum = losses.log_sum_exp(x)
    torch.testing.assert_close(log_sum, torch.logsumexp(x, -1), rtol=1e-14, atol=0)


def test_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0]])  # 概率 (1/4, 3/4) 与 (1/2, 1/2)
    target = torch.tensor([0, 1])
    assert losses.cross_entropy(logits, target).item() == pytest.approx(math.log(8) / 2)
    grad = losses.cross_entropy_grad(logits, target)
    assert grad.flatten().tolist() == pytest.approx([-0.375, 0.375, 0.25, -0.25])


def test_naive_log_sum_exp_overflows_where_the_stable_one_does_not() -> None:
    x = torch.tensor([[88.0, 0.0], [89.0, 0.0], [1e4, -1e4], [-200.0, -201.0]])  # float32
    naive, stable = losses.log_sum_exp_naive(x), losses.log_sum_exp(x)
    assert naive[0].isfinite() and naive[1:3].tolist() == [math.inf, math.inf]
    assert naive[3] == -math.inf  # 下溢：Σ e^x 成了 0
    assert stable.tolist() == pytest.approx([88.0, 89.0, 1e4, -200 + math.log1p(math.exp(-1))])
    target = torch.tensor([1, 1, 1, 1])
    assert losses.cross_entropy(x, target).item() == pytest.approx(
        F.cross_entropy(x, target).item()
    )
    moderate = normal(4, 6)
    torch.testing.assert_close(losses.log_sum_exp_naive(moderate), losses.log_sum_exp(moderate))


def test_log_sum_exp_gradient_is_softmax() -> None:
    x = normal(3, 5).requires_grad_()
    (grad,) = torch.autograd.grad(losses.log_sum_exp(x).sum(), x)
    torch.testing.assert_close(grad, F.softmax(x.detach(), -1))


# ---------------------------------------------------------------- 二分类

EXTREME_LOGITS = torch.tensor(
    [0.0, -0.0, 1e-8, -1e-8, 50.0, -50.0, 1000.0, -1000.0], dtype=torch.float64
)


def test_softplus() -> None:
    for x in (normal(7, 3, scale=10), EXTREME_LOGITS):
        exact = torch.logaddexp(x, torch.zeros_like(x))
        torch.testing.assert_close(losses.softplus(x), exact, rtol=1e-14, atol=0)
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(losses.softplus(leaf).sum(), leaf)
        torch.testing.assert_close(grad, torch.sigmoid(x), rtol=1e-12, atol=0)


def test_softplus_is_accurate_where_the_naive_form_is_zero() -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-15)):
        x = torch.tensor(-50.0, dtype=dtype)
        assert torch.log(1 + torch.exp(x)) == 0
        assert losses.softplus(x).item() == pytest.approx(1.928749847963918e-22, rel=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_bce(shape: tuple[int, ...]) -> None:
    soft = torch.rand(shape, generator=make_generator(1), dtype=torch.float64)
    official = F.binary_cross_entropy_with_logits
    for target in (soft, soft.round()):
        x = normal(*shape, scale=3)
        check(losses.bce_with_logits, losses.bce_with_logits_grad, official, x, target)


@pytest.mark.parametrize("target", [0.0, 1.0, 0.25])
def test_bce_at_extreme_logits(target: float) -> None:
    targets = torch.full_like(EXTREME_LOGITS, target)
    official = F.binary_cross_entropy_with_logits
    arguments = losses.bce_with_logits, losses.bce_with_logits_grad, official
    check(*arguments, EXTREME_LOGITS, targets)
    wrong = torch.tensor([-1000.0])
    assert losses.bce_with_logits(wrong, torch.ones(1)).item() == 1000.0
    assert losses.bce_with_logits(-wrong, torch.ones(1)).item() == 0.0


def focal_by_definition(x: Tensor, target: Tensor, gamma: float, alpha: float) -> Tensor:
    """论文的式 (5)，照字面写：先求概率，再取对数。"""
    p = torch.sigmoid(x)
    positive = -alpha * (1 - p) ** gamma * torch.log(p)
    negative = -(1 - alpha) * p**gamma * torch.log(1 - p)
    return torch.where(target == 1, positive, negative).mean()


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_focal_equals_its_definition(gamma: float, alpha: float) -> None:
    options = {"gamma": gamma, "alpha": alpha}
    for shape in SHAPES:
        x = normal(*shape, scale=2)
        target = labels(x.numel(), 2).view(shape).double()
        check(
            partial(losses.focal, **options),
            partial(losses.focal_grad, **options),
            partial(focal_by_definition, **options),
            x,
            target,
        )


def test_focal_with_gamma_zero_is_half_of_bce() -> None:
    x, target = normal(9, scale=3), labels(9, 2).double()
    half = losses.focal(x, target, gamma=0.0, alpha=0.5)
    assert half.item() == pytest.approx(0.5 * losses.bce_with_logits(x, target).item(), rel=1e-14)


def test_focal_by_hand() -> None:
    x, target = torch.tensor([0.0, math.log(3.0)]), torch.tensor([1.0, 0.0])  # p_t = 1/2 与 1/4
    expected = (0.25 * 0.5**2 * math.log(2) + 0.75 * 0.75**2 * math.log(4)) / 2
    assert losses.focal(x, target).item() == pytest.approx(expected)


def test_focal_is_finite_at_extreme_logits() -> None:
    for target in (torch.zeros(8).double(), torch.ones(8).double()):
        value, through = value_and_grad(losses.focal, EXTREME_LOGITS, target)
        hand = losses.focal_grad(EXTREME_LOGITS, target)
        assert value.isfinite() and hand.isfinite().all()
        torch.testing.assert_close(through, hand, rtol=1e-12, atol=1e-16)


@pytest.mark.usefixtures("needs_torchvision")
@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("alpha", [0.25, 0.9])
def test_focal_equals_torchvision(gamma: float, alpha: float) -> None:
    from torchvision.ops import sigmoid_focal_loss

    options = {"gamma": gamma, "alpha": alpha}
    check(
        partial(losses.focal, **options),
        partial(losses.focal_grad, **options),
        partial(sigmoid_focal_loss, **options, reduction="mean"),
        normal(7, 3, scale=3),
        labels(21, 2).view(7, 3).double(),
    )


# ---------------------------------------------------------------- 分布与间隔


@pytest.mark.parametrize(("batch", "classes"), [(1, 1), (1, 5), (7, 3)])
def test_kl_divergence(batch: int, classes: int) -> None:
    log_q = F.log_softmax(normal(batch, classes), -1)
    p = F.softmax(normal(batch, classes, seed=1, scale=3), -1)
    official = partial(F.kl_div, reduction="batchmean")
    check(losses.kl_divergence, losses.kl_divergence_grad, official, log_q, p)


def test_kl_divergence_with_zeros_in_p() -> None:
    log_q = F.log_softmax(normal(4, 3), -1)
    p = torch.eye(4, 3, dtype=torch.float64)
    p[3] = torch.tensor([0.5, 0.5, 0.0])
    official = partial(F.kl_div, reduction="batchmean")
    check(losses.kl_divergence, losses.kl_divergence_grad, official, log_q, p)
    one_hot = losses.kl_divergence(log_q[:3], p[:3])  # 独热的 p：KL 就是交叉熵
    assert one_hot.item() == pytest.approx(F.nll_loss(log_q[:3], torch.arange(3)).item())


def test_kl_divergence_by_hand() -> None:
    p = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    q = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    expected = (0.5 * math.log(2) + 0.5 * math.log(2 / 3) + math.log(2)) / 2
    assert losses.kl_divergence(q.log(), p).item() == pytest.approx(expected)
    assert losses.kl_divergence(q.log(), q).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(("batch", "classes"), [(1, 2), (1, 5), (7, 3)])
@pytest.mark.parametrize("margin", [0.1, 1.0, 3.0])
def test_hinge(batch: int, classes: int, margin: float) -> None:
    x, target = normal(batch, classes, scale=2), labels(batch, classes)
    ours, grad = partial(losses.hinge, margin=margin), partial(losses.hinge_grad, margin=margin)
    check(ours, grad, partial(F.multi_margin_loss, margin=margin), x, target)


def test_hinge_by_hand() -> None:
    scores = torch.tensor([[3.0, 2.5, 0.0]])  # 正确类 0：类 1 差半分，类 2 已越过间隔
    target = torch.tensor([0])
    assert losses.hinge(scores, target).item() == pytest.approx(0.5 / 3)
    grad = losses.hinge_grad(scores, target)
    assert grad.flatten().tolist() == pytest.approx([-1 / 3, 1 / 3, 0.0])


# ---------------------------------------------------------------- 共同的性质


@pytest.mark.parametrize("name", ["mse", "mae", "huber", "bce_with_logits", "focal"])
def test_nan_is_never_hidden(name: str) -> None:
    target = torch.tensor([1.0, 1.0])
    assert getattr(losses, name)(torch.tensor([math.nan, 1.0]), target).isnan()
    assert getattr(losses, name)(torch.tensor([0.5, 1.0]), target).isfinite()


@pytest.mark.parametrize("name", ["cross_entropy", "hinge"])
def test_nan_in_scores_is_never_hidden(name: str) -> None:
    target = torch.tensor([1])
    assert getattr(losses, name)(torch.tensor([[math.nan, 1.0]]), target).isnan()
    assert getattr(losses, name)(torch.tensor([[0.5, 1.0]]), target).isfinite()


def test_gradients_pass_gradcheck() -> None:
    x, target = normal(3, 4), normal(3, 4, seed=1)
    p = F.softmax(target, -1)
    cases = [
        (losses.mse, target),
        (losses.huber, target),
        (losses.bce_with_logits, p),
        (losses.focal, (target > 0).double()),
        (losses.kl_divergence, p),
        (losses.cross_entropy, labels(3, 4)),
        (losses.hinge, labels(3, 4)),
    ]
    for loss, against in cases:
        assert torch.autograd.gradcheck(loss, (x.clone().requires_grad_(), against)), loss.__name__
