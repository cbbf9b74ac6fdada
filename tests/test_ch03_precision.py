"""第 3 章的低精度：浮点格式与 ``torch.finfo``、舍入与硬件、损失缩放与 ``GradScaler`` 逐项对照。"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from chapter_03_optimization_regularization.precision import (
    FORMATS,
    LossScaler,
    cast_loss,
    master_weights,
    mixed_precision_step,
    round_to_format,
)
from tests.parity import normal
from utils import make_generator

LOW = ["float16", "bfloat16"]

# ---------------------------------------------------------------- 格式与舍入


@pytest.mark.parametrize("name", FORMATS)
def test_formats_equal_finfo(name: str) -> None:
    form, info = FORMATS[name], torch.finfo(getattr(torch, name))
    assert (form.max, form.eps, form.smallest_normal) == (info.max, info.eps, info.smallest_normal)
    assert 1 + form.exponent_bits + form.mantissa_bits == info.bits
    kinds = {16: torch.int16, 32: torch.int32}
    one_bit = torch.tensor([1], dtype=kinds[info.bits]).view(getattr(torch, name))
    assert form.smallest_subnormal == one_bit.double().item()  # 只有最低位是 1 的数


@pytest.mark.parametrize("name", LOW)
def test_every_value_of_a_16_bit_format_is_a_fixed_point(name: str) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(getattr(torch, name)).double()
    every = every[~every.isnan()]
    assert torch.equal(round_to_format(every, FORMATS[name]), every)


@pytest.mark.parametrize("name", LOW)
def test_rounding_equals_the_hardware(name: str) -> None:
    dtype, form = getattr(torch, name), FORMATS[name]
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=make_generator(0))
    x = bits.to(torch.int32).view(torch.float32)  # 各个数量级、正负、次正规数都有
    x = torch.cat([x[~x.isnan()], torch.tensor([0.0, math.inf, -math.inf])])
    assert torch.equal(round_to_format(x, form), x.to(dtype).double())
    grid = torch.arange(0, 2**14).to(torch.int16).view(dtype).float()
    middle = (grid[1:] + grid[:-1]) / 2  # 恰在两个数的正中：取偶
    assert torch.equal(round_to_format(middle, form), middle.to(dtype).double())
    assert round_to_format(torch.tensor([math.nan]), form).isnan().all()


def test_rounding_at_the_edges_of_fp16() -> None:
    form = FORMATS["float16"]
    x = torch.tensor([65504, 65519.99, 65520, 2.0**-24, 2.0**-25, 2.0**-25 * 1.01, 2049, 2051])
    assert round_to_format(x, form).tolist() == [
        65504, 65504, math.inf, 2.0**-24, 0.0, 2.0**-24, 2048, 2052,
    ]  # fmt: skip


def test_cast_loss_counts() -> None:
    x = torch.tensor([1e5, -1e5, 1e-9, 1e-6, 1.0, 2.0, 0.0, math.inf])  # 后两个不算
    assert cast_loss(x, torch.float16) == pytest.approx((2 / 6, 1 / 6, 1 / 6))
    assert cast_loss(x, torch.bfloat16) == (0, 0, 0)
    with pytest.raises(ValueError, match="没有非零的有限数"):
        cast_loss(torch.tensor([0.0, math.nan]), torch.float16)


# ---------------------------------------------------------------- 损失缩放


def official(**options: float) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"init_scale": 8.0, "growth_interval": 2},
        {"init_scale": 3.3, "growth_factor": 1.7, "backoff_factor": 0.3, "growth_interval": 3},
        {"init_scale": 2.0**127, "growth_interval": 1},  # 再长就超出 float32：停在原处
    ],
)
def test_scaler_follows_grad_scaler(options: dict[str, float]) -> None:
    bad_steps = {0, 5, 6, 13, 30}
    histories, weights = [], []
    for scaler in (LossScaler(**options), official(**options)):
        w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        optimizer = torch.optim.SGD([w], lr=0.01, momentum=0.9)
        history = []
        for t in range(40):
            optimizer.zero_grad()
            loss = (w * torch.linspace(0.1, 0.3, 3)).sum()
            scaler.scale(loss * 1e-3).backward()
            if t in bad_steps:
                w.grad[t % 3] = math.inf if t % 2 else math.nan
            if t % 3 == 0:
                scaler.unscale_(optimizer)  # 提前除回去，与让 step 去除，结果相同
            scaler.step(optimizer)
            scaler.update()
            history.append(scaler.get_scale())
            assert scaler.state_dict()["_growth_tracker"] < options["growth_interval"]
        histories.append((history, scaler.state_dict()))
        weights.append(w.detach())
    assert histories[0] == histories[1]
    assert torch.equal(*weights)
    assert len(set(histories[0][0])) > 2 and weights[0].isfinite().all()


def test_scaler_by_hand() -> None:
    scaler = LossScaler(init_scale=4.0, growth_interval=2)
    w = torch.tensor([2.0], requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=1.0)
    scaler.scale(3 * w.sum()).backward()
    assert w.grad.item() == 12.0
    scaler.unscale_(optimizer)
    assert w.grad.item() == 3.0
    scaler.step(optimizer)
    scaler.update()
    assert (w.item(), scaler.get_scale()) == (-1.0, 4.0)
    for grad, w_after, scale_after in ((1.0, -1.25, 8.0), (math.inf, -1.25, 4.0)):
        w.grad = torch.tensor([grad])
        scaler.step(optimizer)
        scaler.update()
        assert (w.item(), scaler.get_scale()) == (w_after, scale_after)


def test_one_bad_optimizer_backs_off_but_stops_only_itself() -> None:
    for scaler in (LossScaler(init_scale=4.0), official(init_scale=4.0)):
        good, bad = (torch.ones(1, requires_grad=True) for _ in range(2))
        optimizers = [torch.optim.SGD([p], lr=1.0) for p in (good, bad)]
        scaler.scale((good + bad).sum()).backward()
        bad.grad.fill_(math.inf)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        assert (good.item(), bad.item(), scaler.get_scale()) == (0.0, 1.0, 2.0)


def test_scale_of_a_half_loss_does_not_overflow() -> None:
    loss = torch.tensor(2.0, dtype=torch.float16)
    scaled = LossScaler().scale(loss)
    reference = official()
    assert torch.equal(scaled, reference.scale(loss)) and scaled.item() == 2.0**17


def test_scaler_state_dict_is_exchanged_with_grad_scaler() -> None:
    ours = LossScaler(init_scale=16.0, growth_factor=3.0, backoff_factor=0.1, growth_interval=7)
    w = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.1)
    ours.scale(w.sum()).backward()
    ours.step(optimizer)
    ours.update()
    theirs, again = official(), LossScaler()
    theirs.load_state_dict(ours.state_dict())
    again.load_state_dict(theirs.state_dict())
    assert again.state_dict() == theirs.state_dict() == ours.state_dict()
    assert ours.state_dict()["_growth_tracker"] == 1


def test_scaler_rejects_misuse() -> None:
    scaler = LossScaler()
    w = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.1)
    with pytest.raises(RuntimeError, match="update 之前"):
        scaler.update()
    w.grad = torch.ones(1)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="已经对这个优化器调用过 unscale_"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="已经对这个优化器调用过 step"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="应在 step 之前"):
        scaler.unscale_(optimizer)
    half = torch.ones(1, dtype=torch.float16, requires_grad=True)
    half.grad = torch.ones(1, dtype=torch.float16)
    with pytest.raises(ValueError, match="fp16 的梯度"):
        scaler.step(torch.optim.SGD([half], lr=0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_scale": 0.0}, "init_scale=0.0"),
        ({"init_scale": math.inf}, "init_scale=inf"),
        ({"growth_factor": 1.0}, "growth_factor=1.0"),
        ({"backoff_factor": 1.0}, "backoff_factor=1.0"),
        ({"backoff_factor": 0.0}, "backoff_factor=0.0"),
        ({"growth_interval": 0}, "growth_interval=0"),
    ],
)
def test_scaler_rejects_bad_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossScaler(**options)


# ---------------------------------------------------------------- 主权重


class Scale(nn.Module):
    """只有一个参数的模型 ``w``。"""

    def __init__(self, value: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([value], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_master_weights_keep_updates_too_small_for_the_format(dtype: torch.dtype) -> None:
    """每步减 2^−13：低精度的 1.0 减不动，主权重积少成多。"""
    model = Scale(1.0, dtype)
    masters = master_weights(model)
    assert masters[0].dtype == torch.float32
    optimizer = torch.optim.SGD(masters, lr=2.0**-13)
    alone = Scale(1.0, dtype)
    alone_optimizer = torch.optim.SGD(alone.parameters(), lr=2.0**-13)
    for _ in range(64):
        mixed_precision_step(model, masters, optimizer, lambda m: m.w.float().sum(), None)
        alone_optimizer.zero_grad()
        alone.w.sum().backward()
        alone_optimizer.step()
    assert masters[0].item() == 1 - 2.0**-7
    assert alone.w.item() == 1.0


@pytest.mark.parametrize("scaled", [False, True])
def test_scaling_rescues_gradients_below_the_smallest_subnormal(scaled: bool) -> None:
    """梯度 2^−30 在 fp16 里是 0；乘 2^16 之后是 2^−14，除回去分毫不差。"""
    model = Scale(1.0, torch.float16)
    masters = master_weights(model)
    optimizer = torch.optim.SGD(masters, lr=1.0)
    scaler = LossScaler() if scaled else None
    loss = mixed_precision_step(
        model, masters, optimizer, lambda m: m.w.float().sum() * 2.0**-30, scaler
    )
    assert loss == 2.0**-30  # 返回的是没有缩放的损失
    assert masters[0].grad.item() == (2.0**-30 if scaled else 0.0)


def test_overflow_skips_the_step_and_backs_off() -> None:
    model = Scale(1.0, torch.float16)
    masters = master_weights(model)
    optimizer = torch.optim.SGD(masters, lr=2.0**-10)
    scaler = LossScaler(init_scale=2.0**16)
    seen = []
    for _ in range(4):  # 梯度 4：4 · 2^16、4 · 2^15、4 · 2^14 都超过 65504
        mixed_precision_step(model, masters, optimizer, lambda m: 4 * m.w.float().sum(), scaler)
        seen.append((scaler.get_scale(), masters[0].item()))
    assert seen == [(2.0**15, 1.0), (2.0**14, 1.0), (2.0**13, 1.0), (2.0**13, 1 - 2.0**-8)]


def test_mixed_precision_training_follows_fp32() -> None:
    """权重与激活是 fp16，学到的与 fp32 只差舍入。"""
    x, y = normal(32, 4).float(), normal(32, 3, seed=1).float()

    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def loss_fn(model: nn.Module) -> Tensor:
        dtype = next(model.parameters()).dtype
        return (model(x.to(dtype)).float() - y).square().mean()

    reference = build()
    plain = torch.optim.SGD(reference.parameters(), lr=0.3)
    model = build().half()
    masters = [p.detach().clone().requires_grad_() for p in build().parameters()]
    optimizer, scaler = torch.optim.SGD(masters, lr=0.3), LossScaler()
    for _ in range(30):
        plain.zero_grad()
        loss = loss_fn(reference)
        loss.backward()
        plain.step()
        mixed = mixed_precision_step(model, masters, optimizer, loss_fn, scaler)
    assert mixed == pytest.approx(loss.item(), rel=2e-3)
    for p, master in zip(reference.parameters(), masters, strict=True):
        assert (p - master).abs().max() < 5e-3
    assert all(p.dtype == torch.float16 for p in model.parameters())


def test_frozen_parameters_stay_frozen_in_mixed_precision() -> None:
    model = nn.Linear(3, 2).bfloat16()
    model.bias.requires_grad_(False)
    masters = master_weights(model)
    optimizer = torch.optim.SGD([p for p in masters if p.requires_grad], lr=0.1)
    before = [p.clone() for p in masters]
    x = torch.ones(4, 3, dtype=torch.bfloat16)
    mixed_precision_step(model, masters, optimizer, lambda m: m(x).float().square().sum(), None)
    assert not torch.equal(masters[0], before[0]) and torch.equal(masters[1], before[1])
