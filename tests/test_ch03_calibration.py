"""第 3 章的校准与不确定性：手算的例子、独立的实现、已知答案的分布。"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_03_optimization_regularization.calibration import (
    expected_calibration_error,
    fit_temperature,
    mc_dropout,
    mutual_information,
    negative_log_likelihood,
    predictive_entropy,
    reliability_bins,
)
from chapter_03_optimization_regularization.regularization import Dropout
from tests.parity import assert_equal, normal
from utils import make_generator, set_seed


def sampled(count: int, scale: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """完全校准的 logits 与由它采样的标签；返回的 logits 放大了 ``scale`` 倍。"""
    logits = 2 * normal(count, 4, seed=seed)
    generator = make_generator(seed + 1)  # 与 logits 用同一个种子，二者就不独立了
    labels = logits.softmax(-1).multinomial(1, generator=generator).squeeze(1)
    return scale * logits, labels


# ---------------------------------------------------------------- 校准误差


def test_bins_and_error_by_hand() -> None:
    top = torch.tensor([0.55, 0.60, 0.75, 0.95, 1.0], dtype=torch.float64)
    probabilities = torch.stack([top, 1 - top], dim=1)
    labels = torch.tensor([0, 1, 0, 0, 1])
    bins = reliability_bins(probabilities, labels, bins=10)
    assert bins.count.tolist() == [0, 0, 0, 0, 0, 2, 0, 1, 0, 2]  # 0.60 在 (0.5, 0.6] 里：右闭
    assert bins.accuracy[[5, 7, 9]].tolist() == [0.5, 1.0, 0.5]
    assert_equal(bins.confidence[[5, 7, 9]], torch.tensor([0.575, 0.75, 0.975]).double(), 1e-6)
    expected = (2 * 0.075 + 1 * 0.25 + 2 * 0.475) / 5
    assert expected_calibration_error(probabilities, labels, 10) == pytest.approx(expected)
    # 只有一格时，就是平均置信度与准确率之差
    one = expected_calibration_error(probabilities, labels, 1)
    assert one == pytest.approx(abs(0.6 - top.mean().item()))


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_error_equals_the_loop_over_bins(bins: int) -> None:
    logits, labels = sampled(500, 1.7)
    probabilities = logits.softmax(-1)
    confidence, predicted = probabilities.max(-1)
    error = 0.0
    for k in range(bins):
        inside = (confidence > k / bins) & (confidence <= (k + 1) / bins)
        if inside.any():
            gap = (predicted == labels)[inside].double().mean() - confidence[inside].mean()
            error += inside.double().mean().item() * gap.abs().item()
    assert expected_calibration_error(probabilities, labels, bins) == pytest.approx(error, rel=1e-9)
    assert reliability_bins(probabilities, labels, bins).count.sum() == 500


def test_error_vanishes_for_calibrated_probabilities_only() -> None:
    logits, labels = sampled(20_000, 1.0)
    assert expected_calibration_error(logits.softmax(-1), labels) < 0.015
    assert expected_calibration_error((3 * logits).softmax(-1), labels) > 0.1
    assert expected_calibration_error((logits / 3).softmax(-1), labels) > 0.1


def test_nll_equals_torch() -> None:
    logits, labels = sampled(50, 1.0)
    ours = negative_log_likelihood(logits.softmax(-1), labels)
    assert ours == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-12)
    assert negative_log_likelihood(torch.tensor([[0.0, 1.0]]), torch.tensor([0])) == math.inf


def test_bad_inputs() -> None:
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="是不是忘了 softmax"):
        reliability_bins(torch.tensor([[2.0, 1.0], [0.5, 0.1]]), labels)
    with pytest.raises(ValueError, match="是不是忘了 softmax"):
        reliability_bins(torch.full((2, 2), math.nan), labels)
    for shape, count in [((2,), 2), ((3, 2), 2), ((0, 2), 0)]:
        with pytest.raises(ValueError, match=r"应为非空的 \(N, C\) 与 \(N,\)"):
            reliability_bins(torch.full(shape, 0.5), labels[:count])
    with pytest.raises(ValueError, match="bins=0"):
        reliability_bins(torch.ones(2, 2) / 2, labels, 0)


# ---------------------------------------------------------------- 温度缩放


@pytest.mark.parametrize("scale", [0.02, 1.0, 4.0, 300.0])
def test_temperature_recovers_the_scale(scale: float) -> None:
    logits, labels = sampled(20_000, scale)
    assert fit_temperature(logits, labels) == pytest.approx(scale, rel=0.03)


def test_temperature_is_the_minimum_and_equivariant() -> None:
    logits, labels = sampled(300, 2.5)
    temperature = fit_temperature(logits, labels)

    def nll(t: float) -> float:
        return F.cross_entropy(logits / t, labels).item()

    beta = torch.tensor(1 / temperature, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(beta * logits, labels).backward()
    assert abs(beta.grad.item()) < 1e-9
    assert nll(temperature) < min(nll(0.99 * temperature), nll(1.01 * temperature))
    assert fit_temperature(10 * logits, labels) == pytest.approx(10 * temperature, rel=1e-8)
    assert fit_temperature((logits + 5).float(), labels) == pytest.approx(temperature, rel=1e-5)


def test_temperature_by_hand() -> None:
    """两类，得分差总是 a，对的占 q：最优处 σ(a/T) = q，T = a / ln(q/(1−q))。"""
    logits = torch.tensor([[3.0, 0.0]]).expand(10, 2)
    labels = torch.tensor([0] * 8 + [1] * 2)
    assert fit_temperature(logits, labels) == pytest.approx(3 / math.log(4), rel=1e-9)


def test_temperature_refuses_the_two_degenerate_cases() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    with pytest.raises(ValueError, match="不比乱猜好"):
        fit_temperature(logits, torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="没有一个错误"):
        fit_temperature(logits, torch.tensor([0, 1]))


# ---------------------------------------------------------------- MC-dropout


def mixed_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), Dropout(0.5), nn.Dropout(0.3), nn.Linear(8, 4)
    ).double()


def test_mc_dropout_turns_on_dropout_only_and_restores_the_modes() -> None:
    set_seed(0)
    model = mixed_net()
    model.train()
    model[3].eval()
    model[1](normal(6, 8))
    flags = [module.training for module in model.modules()]
    statistics = model[1].running_mean.clone()
    x = normal(5, 3)
    draws = mc_dropout(model, x, 20)
    assert draws.shape == (20, 5, 4) and not draws.requires_grad
    assert_equal(draws.sum(-1), torch.ones(20, 5, dtype=torch.float64))
    assert (draws[0] != draws[1]).any()
    assert torch.equal(model[1].running_mean, statistics)  # 批归一化没有更新
    assert [module.training for module in model.modules()] == flags
    # 一次抽样等于：把模型放到评估模式，只打开两个 Dropout，再前向
    model.eval()
    for layer in (model[2], model[3]):
        layer.train()
    set_seed(11)
    expected = model(x).softmax(-1)
    set_seed(11)
    assert torch.equal(mc_dropout(model, x, 1)[0], expected.detach())


def test_mc_dropout_with_zero_probability_is_the_deterministic_model() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0)).double()
    draws = mc_dropout(model, normal(2, 3), 3)
    assert_equal(draws[2], model(normal(2, 3)).softmax(-1).detach())
    assert mutual_information(draws).abs().max() < 1e-15


def test_mc_dropout_refuses_useless_calls() -> None:
    with pytest.raises(ValueError, match="没有 Dropout"):
        mc_dropout(nn.Linear(2, 2), torch.ones(1, 2), 3)
    with pytest.raises(ValueError, match="samples=0"):
        mc_dropout(nn.Sequential(nn.Dropout()), torch.ones(1, 2), 0)


def test_uncertainties_by_hand() -> None:
    sure_0, sure_1, unsure = [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]
    draws = torch.tensor([[sure_0, unsure, sure_0], [sure_0, unsure, sure_1]]).double()
    ln2 = math.log(2)
    expected = {predictive_entropy: [0, ln2, ln2], mutual_information: [0, 0, ln2]}
    for function, values in expected.items():
        assert function(draws).tolist() == pytest.approx(values, abs=1e-15)


def test_mutual_information_is_the_mean_divergence_from_the_average() -> None:
    draws = normal(7, 5, 4).softmax(-1)
    mean = draws.mean(0)
    divergence = (draws * (draws / mean).log()).sum(-1).mean(0)
    assert_equal(mutual_information(draws), divergence)
    categorical = torch.distributions.Categorical(probs=mean)
    assert_equal(predictive_entropy(draws), categorical.entropy())


def test_calibration_error_does_not_depend_on_the_precision_of_the_input() -> None:
    logits = torch.randn(20_000, 3, generator=make_generator(0))
    probabilities = torch.softmax(4 * logits, dim=-1)
    labels = torch.randint(3, (20_000,), generator=make_generator(1))
    exact = expected_calibration_error(probabilities.double(), labels)
    assert exact > 0.3
    assert expected_calibration_error(probabilities.bfloat16(), labels) == pytest.approx(
        exact, abs=0.01
    )
