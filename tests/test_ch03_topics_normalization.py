"""归一化各专题所用的计算：并排训练等于分开训练，依赖关系量得对，重新估计不动原来的模型。"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_03_optimization_regularization.topics_normalization import (
    ParallelMLP,
    connected,
    error_without_eval,
    errors_of,
    reestimate,
    running_mean_error,
    running_variance,
    train_parallel,
    whole_batch_norm,
)
from tests.parity import assert_equal, normal
from utils import make_generator

OFFICIAL = {
    "BatchNorm": lambda width: nn.BatchNorm1d(width),
    "GroupNorm": lambda width: nn.GroupNorm(8, width),
    "LayerNorm": lambda width: nn.LayerNorm(width),
    "none": lambda width: nn.Identity(),
}


def member(model: ParallelMLP, index: int, norm: str) -> nn.Sequential:
    """第 ``index`` 个成员，用官方的层另写一份。"""
    layers: list[nn.Module] = []
    for layer, weight in enumerate(model.weights):
        bias = model.biases[layer]
        linear = nn.Linear(weight.shape[2], weight.shape[1]).double()
        linear.load_state_dict({"weight": weight[index], "bias": bias[index, 0]})
        layers.append(linear)
        if layer < len(model.norms):
            layers += [OFFICIAL[norm](weight.shape[1]).double(), nn.ReLU()]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("norm", OFFICIAL)
def test_members_train_as_if_alone(norm: str) -> None:
    model = ParallelMLP((5, 16, 24, 3), 3, norm, make_generator(0)).double()
    alone = [member(model, i, norm) for i in range(3)]
    x, y = normal(14, 5), torch.arange(14) % 3
    train_parallel(model, (x, y), 4, 0.3, make_generator(1))
    generator = make_generator(1)
    orders = [torch.randperm(14, generator=generator) for _ in range(3)]
    for i, network in enumerate(alone):
        for step in range(3):  # 14 个样本，批为 4：三步，丢掉两个
            part = orders[i][4 * step : 4 * step + 4]
            network.zero_grad()
            F.cross_entropy(network(x[part]), y[part]).backward()
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter -= 0.3 * (1 - step / 3) * parameter.grad
        expected = network.eval()(x)
        assert_equal(model.eval()(x.expand(3, -1, -1))[i].detach(), expected.detach(), 1e-10)
        wrong = (expected.argmax(-1) != y).float().mean()
        assert errors_of(model, (x, y))[i] == wrong


def test_connected_by_hand() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.stack([x[0] * x[2], x[1] + 0 * x[0], x.sum()])

    x = torch.tensor([1.0, 2.0, 3.0])
    assert connected(function, x, (0,)).tolist() == [True, False, True]
    assert connected(function, x, (1,)).tolist() == [False, True, False]
    assert connected(whole_batch_norm, normal(3, 2), (0, 1)).tolist() == [[False, True]] * 3


def test_reestimation_touches_only_a_copy() -> None:
    model = ParallelMLP((4, 8, 2), 2, "BatchNorm", make_generator(0))
    x, y = torch.randn(40, 4) + 3, torch.arange(40) % 2
    fresh = reestimate(model, x)
    hidden = x @ model.weights[0].transpose(1, 2) + model.biases[0]  # (S, 40, 8)
    torch.testing.assert_close(fresh.norms[0].running_mean, hidden.mean(1).flatten())
    torch.testing.assert_close(fresh.norms[0].running_var, hidden.var(1).flatten())
    assert not model.norms[0].running_mean.any()
    single = ParallelMLP((4, 8, 2), 1, "BatchNorm", make_generator(0))
    error = error_without_eval(single, (x, y), 40, torch.arange(40))
    assert error == errors_of(reestimate_biased(single, x), (x, y)).item()
    assert not single.norms[0].num_batches_tracked


def reestimate_biased(model: ParallelMLP, x: Tensor) -> ParallelMLP:
    """统计量恰是这一批的（方差有偏）：此时写不写 ``eval()`` 应当一样。"""
    fresh = reestimate(model, x)
    fresh.norms[0].running_var.mul_((len(x) - 1) / len(x))
    return fresh


def test_statistics_follow_the_formulas() -> None:
    kept, biased = running_variance(2, 400, make_generator(0))
    assert kept == pytest.approx(1, abs=0.03) and biased == pytest.approx(0.5, abs=0.015)
    gaps = running_mean_error(0.1, 10, make_generator(0))
    assert gaps == pytest.approx([0.9**t for t in range(1, 11)], rel=0.02)
