"""第 3 章的早停与权重平均：与 ``torch.optim.swa_utils`` 逐步对照。"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import swa_utils

from chapter_03_optimization_regularization.averaging import EMA, SWA, EarlyStopping, update_bn
from chapter_03_optimization_regularization.normalization import BatchNorm1d
from tests.parity import assert_equal, normal
from utils import set_seed
from utils.file_io_util import load_checkpoint, save_checkpoint

# ---------------------------------------------------------------- 早停


def constant(value: float) -> nn.Linear:
    """权重全是 ``value`` 的模型：看权重就知道是哪一轮的。"""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


@pytest.mark.parametrize(
    ("mode", "values", "stops_at", "best_at"),
    [
        ("min", [3.0, 2.875, 2.875, 2.875, 2.875, 0.0], 3, 0),  # 恰好好 min_delta 不算改善
        ("min", [3.0, 2.0, 2.5, 2.1, 2.2, 0.0], 4, 1),  # 第 2、3、4 次没有改善，第 5 次来不及了
        ("max", [1.0, 5.0, 4.0, 5.0, 5.0, 9.0], 4, 1),  # 持平不算改善
        ("min", [3.0, 2.9, 2.8, 2.7, 2.7, 2.7, 2.7], 5, 2),  # 慢慢累积的也算
        ("min", [1.0, math.nan, math.nan, math.nan], 3, 0),
        ("min", [math.nan, 2.0, 1.0, 3.0, 3.0, 3.0], 5, 2),
    ],
)
def test_early_stopping_by_hand(
    mode: str, values: list[float], stops_at: int, best_at: int
) -> None:
    stopper = EarlyStopping(patience=3, min_delta=0.125, mode=mode)
    model = constant(-1.0)
    for index, value in enumerate(values):
        nn.init.constant_(model.weight, float(index))
        if stopper.step(value, model):
            break
    assert index == stops_at and stopper.best == values[best_at]
    stopper.restore(model)
    assert model.weight.item() == best_at


def test_early_stopping_resumes_where_it_was(tmp_path: Path) -> None:
    values = [3.0, 2.0, 2.5, 2.4, 1.9, 2.0, 2.1, 2.2, 2.3, 2.4]

    def run(break_at: int | None) -> tuple[int, float, float]:
        stopper, model = EarlyStopping(3), constant(0.0)
        for index, value in enumerate(values):
            if index == break_at:
                save_checkpoint(tmp_path / "x.pt", {"stopper": stopper.state_dict()})
                stopper = EarlyStopping(3)
                stopper.load_state_dict(load_checkpoint(tmp_path / "x.pt")["stopper"])
            nn.init.constant_(model.weight, float(index))
            if stopper.step(value, model):
                break
        stopper.restore(model)
        return index, stopper.best, model.weight.item()

    whole = run(None)
    assert whole == (7, 1.9, 4.0)
    for break_at in range(1, 8):
        assert run(break_at) == whole


def test_early_stopping_state_is_a_copy() -> None:
    stopper = EarlyStopping(1)
    stopper.step(1.0, constant(5.0))
    state = stopper.state_dict()
    other = EarlyStopping(1)
    other.load_state_dict(state)
    state["best_weights"]["weight"].zero_()
    for kept in (stopper, other):
        assert kept.best_weights["weight"].item() == 5


def test_early_stopping_refuses_bad_arguments() -> None:
    for arguments, match in [
        ({"patience": 0}, "patience=0 应至少为 1"),
        ({"patience": 1, "min_delta": -1.0}, "min_delta=-1.0 应不小于 0"),
        ({"patience": 1, "min_delta": math.nan}, "min_delta=nan 应不小于 0"),
        ({"patience": 1, "mode": "best"}, "mode='best' 应为"),
    ]:
        with pytest.raises(ValueError, match=match):
            EarlyStopping(**arguments)
    with pytest.raises(RuntimeError, match="还没有记下任何权重"):
        EarlyStopping(1).restore(constant(0.0))


# ---------------------------------------------------------------- EMA 与 SWA


def small_net() -> nn.Module:
    """有批归一化（缓冲区）、有冻结的参数。"""
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)).double()
    net[3].bias.requires_grad_(False)
    return net


PAIRS: list[tuple[Callable, Callable]] = [
    (
        lambda model, decay=decay: EMA(model, decay),
        lambda model, decay=decay: swa_utils.AveragedModel(
            model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay)
        ),
    )
    for decay in (0.0, 0.3, 0.9, 1.0)
] + [(SWA, swa_utils.AveragedModel)]


@pytest.mark.parametrize(("ours_of", "official_of"), PAIRS)
def test_averages_equal_torch_along_training(ours_of: Callable, official_of: Callable) -> None:
    set_seed(0)
    model = small_net()
    ours, official = ours_of(model), official_of(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x, y = normal(9, 3), normal(9, 2, seed=1)
    assert list(ours.state_dict()) == list(official.state_dict())
    for _ in range(8):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        for average in (ours, official):
            average.update_parameters(model)
        for (key, a), (_, b) in zip(
            ours.state_dict().items(), official.state_dict().items(), strict=True
        ):
            assert torch.equal(a, b) if not a.is_floating_point() else True, key
            if a.is_floating_point():
                assert_equal(a, b)
    assert_equal(ours.eval()(x), official.eval()(x))
    assert torch.equal(ours.module[1].running_mean, model[1].running_mean)  # 缓冲区照抄
    assert all(not p.requires_grad for p in ours.parameters())


def test_averages_by_hand() -> None:
    model = constant(0.0)
    ema, swa = EMA(model, 0.5), SWA(model)
    for value in (8.0, 4.0, 6.0):
        nn.init.constant_(model.weight, value)
        ema.update_parameters(model)
        swa.update_parameters(model)
    assert ema.module.weight.item() == 6.0  # 8 -> (8+4)/2 = 6 -> (6+6)/2 = 6
    assert swa.module.weight.item() == 6.0 and int(swa.n_averaged) == 3
    nn.init.constant_(model.weight, 0.0)
    ema.update_parameters(model)
    swa.update_parameters(model)
    assert (ema.module.weight.item(), swa.module.weight.item()) == (3.0, 4.5)


def test_averages_resume_from_official_state() -> None:
    set_seed(0)
    model = small_net()
    official, ours = swa_utils.AveragedModel(model), SWA(small_net())
    official.update_parameters(model)
    ours.load_state_dict(official.state_dict())
    other = small_net()
    for average in (ours, official):
        average.update_parameters(other)
    for a, b in zip(ours.parameters(), official.parameters(), strict=True):
        assert_equal(a, b.detach())


@pytest.mark.parametrize("decay", [-0.1, 1.1, math.nan])
def test_decay_is_checked(decay: float) -> None:
    with pytest.raises(ValueError, match="decay=.* 应在 0 到 1 之间"):
        EMA(constant(0.0), decay)


# ---------------------------------------------------------------- 批归一化的统计量


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("pairs", [True, False])
def test_update_bn_equals_torch(momentum: float | None, pairs: bool) -> None:
    batches = [normal(4, 3, seed=seed) for seed in range(5)] + [normal(2, 3, seed=9)]
    loader = [(x, None) for x in batches] if pairs else batches
    states = []
    for recompute in (update_bn, swa_utils.update_bn):
        set_seed(0)
        model = small_net()
        model[1].momentum = momentum
        model(100 + batches[0])  # 旧的统计量应被忘掉
        model.eval()
        recompute(loader, model)
        assert model[1].momentum == momentum and not model.training
        states.append(model.state_dict())
    for key, ours in states[0].items():
        assert torch.equal(ours, states[1][key]), key


def test_update_bn_is_the_equal_average_over_batches_and_knows_our_batch_norm() -> None:
    batches = [normal(4, 3, seed=seed) for seed in range(5)]
    for norm in (BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()):
        update_bn(batches, nn.Sequential(norm))
        assert_equal(norm.running_mean, torch.stack([x.mean(0) for x in batches]).mean(0))
        assert_equal(norm.running_var, torch.stack([x.var(0) for x in batches]).mean(0))
        assert norm.momentum == 0.1


def test_update_bn_restores_each_module() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).double()
    model[2].eval()
    before = model[0].weight.clone()
    update_bn([normal(4, 3)], model)
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert torch.equal(model[0].weight, before) and model[0].weight.grad is None


def test_update_bn_without_batch_norm_does_not_even_read_the_data() -> None:
    def forbidden():
        raise AssertionError("不该读数据")
        yield

    update_bn(forbidden(), nn.Linear(2, 2))
