"""第 3 章的学习率调度：逐步等于 torch.optim.lr_scheduler；没有官方对照的按定义手算。"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as official

from chapter_03_optimization_regularization import schedulers
from chapter_03_optimization_regularization.optimizers import SGD
from chapter_03_optimization_regularization.optimizers_adam import Adam
from chapter_03_optimization_regularization.schedulers import (
    ConstantLR,
    CosineAnnealingLR,
    LRScheduler,
    NoamLR,
    OneCycleLR,
    StepLR,
    WarmupCosineLR,
    WarmupStableDecayLR,
    lr_range_test,
)

CASES: list[tuple[str, dict[str, Any]]] = [
    ("StepLR", {"step_size": 7, "gamma": 0.5}),
    ("MultiStepLR", {"milestones": [30, 10, 10], "gamma": 0.3}),
    ("ExponentialLR", {"gamma": 0.97}),
    ("CosineAnnealingLR", {"T_max": 100}),
    ("CosineAnnealingLR", {"T_max": 37, "eta_min": 0.01}),  # 过了 T_max 又升回去
    ("LinearLR", {"total_iters": 30}),
    ("LinearLR", {"start_factor": 1.0, "end_factor": 0.2, "total_iters": 50}),
    ("OneCycleLR", {"max_lr": 2.0, "total_steps": 100}),
    ("OneCycleLR", {"max_lr": 2.0, "total_steps": 100, "pct_start": 0.45, "div_factor": 10}),
    ("OneCycleLR", {"max_lr": 0.1, "total_steps": 100, "final_div_factor": 7,
                    "base_momentum": 0.7, "max_momentum": 0.8}),
    ("OneCycleLR", {"max_lr": 0.1, "total_steps": 100, "cycle_momentum": False}),
]  # fmt: skip


def make_optimizer(kind: type = SGD, lr: float = 0.3, **options: Any) -> torch.optim.Optimizer:
    """两组，学习率不同。"""
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    return kind([{"params": [a]}, {"params": [b], "lr": lr / 7}], lr=lr, **options)


def record(scheduler: Any, steps: int) -> list[list[float]]:
    """各步各组的 (学习率, 动量或 β₁)。"""
    rows = []
    for step in range(steps + 1):
        rows.append([group["lr"] for group in scheduler.optimizer.param_groups])
        for group in scheduler.optimizer.param_groups:
            rows[-1].append(group["betas"][0] if "betas" in group else group["momentum"])
        if step < steps:
            scheduler.optimizer.step()
            scheduler.step()
    return rows


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_hundred_steps_equal_torch(name: str, options: dict, kind: str) -> None:
    if kind == "sgd":
        make = lambda cls: make_optimizer(cls, momentum=0.9)  # noqa: E731
        mine, theirs = make(SGD), make(torch.optim.SGD)
    else:
        mine, theirs = make_optimizer(Adam), make_optimizer(torch.optim.Adam)
    rows = record(getattr(schedulers, name)(mine, **options), 100)
    expected = record(getattr(official, name)(theirs, **options), 100)
    assert torch.tensor(rows).shape == (101, 4)
    difference = torch.tensor(rows).double() - torch.tensor(expected).double()
    assert difference.abs().max() <= 1e-7  # float32 张量只作汇总
    for row, wanted in zip(rows, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-12, abs=1e-15)


def test_constant_does_nothing() -> None:
    assert record(ConstantLR(make_optimizer(lr=0.7)), 3) == [[0.7, 0.7 / 7, 0.0, 0.0]] * 4


def test_noam_follows_the_paper() -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = NoamLR(optimizer, d_model=512, warmup=40)
    rates = [row[0] for row in record(scheduler, 100)]
    for t, rate in enumerate(rates):
        step = t + 1
        assert rate == pytest.approx(512**-0.5 * min(step**-0.5, step * 40**-1.5), rel=1e-12)
    assert rates.index(max(rates)) == 39
    assert max(rates) == pytest.approx((512 * 40) ** -0.5, rel=1e-12)


def test_warmup_cosine_by_hand() -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    rates = [r[0] for r in record(WarmupCosineLR(optimizer, 4, 12, min_factor=0.1), 14)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[8] == pytest.approx(2.0 * 0.55)  # 余弦的正中
    assert rates[12:] == pytest.approx([0.2, 0.2, 0.2])  # 之后不变


def test_warmup_stable_decay_by_hand() -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    rates = [r[0] for r in record(WarmupStableDecayLR(optimizer, 1, 3, 4, 0.2), 9)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2])


def test_extending_the_stable_phase_keeps_the_past() -> None:
    """WSD 的用处：不变的一段延长之后，已经走过的部分一步也不变；余弦不是这样。"""

    def path(make: Any) -> list[float]:
        return [r[0] for r in record(make(SGD([nn.Parameter(torch.zeros(1))], lr=1.0)), 49)]

    short, long = (path(lambda o, s=s: WarmupStableDecayLR(o, 5, s, 10)) for s in (45, 85))
    assert short == long
    short, long = (path(lambda o, s=s: WarmupCosineLR(o, 5, s)) for s in (60, 100))
    assert short[10:] != long[10:]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_state_dict_resumes_exactly(name: str, options: dict) -> None:
    def make() -> LRScheduler:
        return getattr(schedulers, name)(make_optimizer(momentum=0.9), **options)

    whole = record(make(), 60)
    first = make()
    record(first, 25)
    second = make()
    second.base_lrs = [1e9, 1e9]  # 续训时优化器里的学习率已经变过，基准要以保存的为准
    second.load_state_dict(first.state_dict())
    assert record(second, 35) == whole[25:]
    assert second.get_last_lr() == whole[-1][:2]


def test_one_cycle_edges() -> None:
    for fraction in (0.0, 0.5, 1.0):
        scheduler = OneCycleLR(make_optimizer(momentum=0.9), 1.0, 2, pct_start=fraction)
        scheduler.step()
        scheduler.step()
        assert all(math.isfinite(lr) for lr in scheduler.get_last_lr())
    with pytest.raises(ValueError, match="OneCycleLR 只有 2 步，现在要走第 3 步"):
        scheduler.step()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda o: StepLR(o, 0), "step_size=0 无效"),
        (lambda o: CosineAnnealingLR(o, 0), "T_max=0 无效"),
        (lambda o: WarmupCosineLR(o, 10, 10), "warmup=10 无效"),
        (lambda o: NoamLR(o, 0), "d_model=0 无效"),
        (lambda o: WarmupStableDecayLR(o, 1, 1, 0), "decay=0 应不小于 1"),
        (lambda o: OneCycleLR(o, -1.0, 10), "max_lr=-1.0 无效"),
        (lambda o: OneCycleLR(o, 1.0, 10, pct_start=1.5), "pct_start=1.5 无效"),
        (lambda o: ConstantLR(o).load_state_dict({"last_epoch": 1, "base_lrs": [1.0]}), "1 组"),
    ],
)  # fmt: skip
def test_errors(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(make_optimizer(momentum=0.9))


def test_groups_added_later_are_refused() -> None:
    optimizer = make_optimizer()
    scheduler = StepLR(optimizer, 3)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ValueError, match="请先加完参数组，再建立调度"):
        scheduler.step()


def test_one_cycle_needs_a_momentum() -> None:
    adagrad = torch.optim.Adagrad([nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="要求优化器有 momentum 或 betas"):
        OneCycleLR(adagrad, 1.0, 10)


def test_lr_range_test_finds_the_stability_limit() -> None:
    """``½ · 8 · w²`` 上梯度下降的稳定极限是 2/8：不到它损失就降，过了它损失就升，然后停下。"""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    batches = [(torch.ones(1, 1), torch.zeros(1, 1))]
    loss_fn = lambda output, target: 4 * (output - target).square().sum()  # noqa: E731
    optimizer = SGD(model.parameters(), lr=1.0)
    lrs, losses = lr_range_test(model, batches, loss_fn, optimizer, 0.2, 0.4, 40, smoothing=0.0)
    assert len(lrs) == len(losses) < 40  # 发散之后提前停下
    ratio = 2 ** (1 / 39)
    assert lrs == pytest.approx([0.2 * ratio**t for t in range(len(lrs))])
    lowest = losses.index(min(losses))  # 第 t 个损失是第 t 步之前的
    assert lrs[lowest - 1] < 0.25 < lrs[lowest]
    assert losses[1] == pytest.approx(losses[0] * (1 - 8 * 0.2) ** 2)
    with pytest.raises(ValueError, match="0 < lr_min < lr_max"):
        lr_range_test(model, batches, loss_fn, optimizer, 1.0, 0.1, 10)


@pytest.mark.parametrize("batches", [[], iter([(torch.ones(1, 1), torch.zeros(1, 1))])])
def test_lr_range_test_refuses_what_it_cannot_repeat(batches: Any) -> None:
    model = nn.Linear(1, 1)
    loss_fn = nn.functional.mse_loss
    with pytest.raises(ValueError, match="只能走一遍"):
        lr_range_test(model, batches, loss_fn, SGD(model.parameters()), 1e-3, 1e-2, 5)


def test_lr_range_test_smooths_like_adam() -> None:
    """损失恒定时，平滑之后也恒定：偏差修正使开头不偏向零。"""
    model = nn.Linear(1, 1)
    constant = lambda output, target: output.sum() * 0 + 3.0  # noqa: E731
    batches = [(torch.ones(1, 1), torch.zeros(1, 1))]
    _, losses = lr_range_test(model, batches, constant, SGD(model.parameters()), 0.1, 1.0, 5)
    assert losses == pytest.approx([3.0] * 5)
