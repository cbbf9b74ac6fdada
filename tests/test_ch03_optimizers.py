"""第 3 章的优化器：与 torch.optim 走同样的 100 步（float64），状态互换，续训，出错。"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chapter_03_optimization_regularization.optimizers import SGD, Adadelta, Adagrad, RMSprop
from chapter_03_optimization_regularization.optimizers_adam import (
    Adafactor,
    Adam,
    AdamW,
    Lion,
    NAdam,
    adam_naive,
)
from chapter_03_optimization_regularization.optimizers_modern import (
    SAM,
    Muon,
    ScheduleFreeAdamW,
)
from tests.optimizing import MATRICES, SHAPES, make_params, parameters, walk
from tests.parity import assert_equal, normal
from utils.file_io_util import load_checkpoint, save_checkpoint

STEPS = 100

# (我们的类, torch 的名字, 构造参数)
OFFICIAL: list[tuple[type, str, dict[str, Any]]] = [
    (SGD, "SGD", {"lr": 0.1}),
    (SGD, "SGD", {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    (SGD, "SGD", {"lr": 0.1, "momentum": 0.9}),
    (SGD, "SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    (SGD, "SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (Adagrad, "Adagrad", {}),
    (Adagrad, "Adagrad", {"lr": 0.1, "lr_decay": 0.01, "weight_decay": 0.1}),
    (Adagrad, "Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.5, "maximize": True}),
    (RMSprop, "RMSprop", {}),
    (RMSprop, "RMSprop", {"momentum": 0.9, "weight_decay": 0.1}),
    (RMSprop, "RMSprop", {"centered": True, "momentum": 0.9, "alpha": 0.9, "maximize": True}),
    (Adadelta, "Adadelta", {}),
    (Adadelta, "Adadelta", {"lr": 0.5, "rho": 0.8, "weight_decay": 0.1, "maximize": True}),
    (Adam, "Adam", {}),
    (Adam, "Adam", {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
    (Adam, "Adam", {"amsgrad": True, "weight_decay": 0.1, "maximize": True}),
    (AdamW, "AdamW", {}),
    (AdamW, "AdamW", {"lr": 0.05, "amsgrad": True, "weight_decay": 0.3, "maximize": True}),
    (NAdam, "NAdam", {}),
    (NAdam, "NAdam", {"lr": 0.05, "momentum_decay": 0.1, "weight_decay": 0.1, "maximize": True}),
    (NAdam, "NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    (Adafactor, "Adafactor", {}),
    (Adafactor, "Adafactor", {"lr": 0.1, "d": 2.0, "weight_decay": 0.1, "maximize": True}),
    (Adafactor, "Adafactor", {"eps": (1e-4, 0.5), "beta2_decay": -0.5}),
    (Muon, "Muon", {"lr": 0.02}),
    (Muon, "Muon", {"lr": 0.02, "nesterov": False, "momentum": 0.8, "weight_decay": 0.0}),
]
OTHERS: list[tuple[type, dict[str, Any]]] = [
    (Lion, {"lr": 0.01, "weight_decay": 0.1}),
    (ScheduleFreeAdamW, {"lr": 0.05, "weight_decay": 0.1, "warmup_steps": 7}),
    (SAM, {"base_optimizer": AdamW, "rho": 0.1, "lr": 0.05}),
]


def label(case: Any) -> str:
    return case.__name__ if isinstance(case, type) else str(case)


def pair(ours: type, name: str, options: dict) -> tuple[Any, Any]:
    """起点相同的两个优化器：我们的与 torch 的；这个版本的 torch 没有时跳过。"""
    official = getattr(torch.optim, name, None)
    if official is None:
        pytest.skip(f"torch {torch.__version__} 没有 torch.optim.{name}")
    shapes = MATRICES if ours is Muon else SHAPES
    extra = {"ns_dtype": torch.bfloat16} if ours is Muon else {}  # torch 的迭代固定用 bf16
    return ours(make_params(shapes), **options, **extra), official(make_params(shapes), **options)


# ---------------------------------------------------------------- 与 torch.optim 相等


@pytest.fixture
def float64_scalars() -> Iterator[None]:
    """torch 把 NAdam 的 ∏μ 存成缺省的浮点类型；要比到 1e-12，它也得是 float64。"""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("ours", "name", "options"), OFFICIAL, ids=label)
def test_hundred_steps_equal_torch(
    ours: type, name: str, options: dict, float64_scalars: None
) -> None:
    mine, official = pair(ours, name, options)
    before = [p.clone() for p in parameters(mine)]
    walk(mine, STEPS)
    walk(official, STEPS)
    for p, q, start in zip(parameters(mine), parameters(official), before, strict=True):
        assert_equal(p, q)
        assert not torch.equal(p, start)


@pytest.mark.parametrize(
    ("ours", "name", "options"), [case for case in OFFICIAL if case[0] is not Muon], ids=label
)
def test_state_dicts_are_interchangeable_with_torch(
    ours: type, name: str, options: dict, float64_scalars: None
) -> None:
    """torch 走一段，把状态交给我们的接着走；我们的走一段，交给 torch 接着走。"""
    mine, official = pair(ours, name, options)
    straight = copy.deepcopy(official)
    walk(straight, 40)
    for first, second in ((official, mine), (mine, official)):
        begin, end = copy.deepcopy(first), copy.deepcopy(second)
        walk(begin, 20)
        for p, q in zip(parameters(end), parameters(begin), strict=True):
            p.copy_(q)
        end.load_state_dict(begin.state_dict())
        walk(end, 20, start=20)
        for p, q in zip(parameters(end), parameters(straight), strict=True):
            assert_equal(p, q)


def test_float32_and_groups_equal_torch() -> None:
    """不同的组各用各的超参数；float32 的误差在几个单位之内。"""
    results = []
    for cls in (AdamW, torch.optim.AdamW):
        params = [p.detach().float().requires_grad_() for p in make_params(SHAPES)]
        groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "weight_decay": 0.5}]
        optimizer = cls(groups, lr=0.01)
        for t in range(50):
            for i, p in enumerate(params):
                p.grad = normal(*p.shape, seed=t * 10 + i).float()
            optimizer.step()
        results.append(parameters(optimizer))
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_torch_schedulers_and_hooks_accept_ours() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = SGD([p], lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(optimizer.param_groups[0]["lr"]))
    for _ in range(3):
        p.grad = torch.ones(2)
        optimizer.step()
        schedule.step()
    assert seen == [1.0, 0.5, 0.25]
    assert p.tolist() == [-0.75, -0.75]


# ---------------------------------------------------------------- 没有官方对照的


def test_adam_update_is_the_naive_formula() -> None:
    p, m, v = normal(4, 3), torch.zeros(4, 3).double(), torch.zeros(4, 3).double()
    ours = p.clone().requires_grad_()
    optimizer = Adam([ours], lr=0.1, betas=(0.8, 0.95), eps=1e-4)
    for t in range(1, 31):
        ours.grad = normal(4, 3, seed=t)
        optimizer.step()
        p, m, v = adam_naive(p, normal(4, 3, seed=t), m, v, t, 0.1, (0.8, 0.95), 1e-4)
    assert_equal(ours.detach(), p)
    assert_equal(optimizer.state[ours]["exp_avg"], m)
    assert_equal(optimizer.state[ours]["exp_avg_sq"], v)


def test_adafactor_by_hand_with_a_vanishing_gradient() -> None:
    """一维，第一步 ``v = g²``：极小的梯度由下限 ``ε₁²`` 接住，``u = g/ε₁``。"""
    p = torch.tensor([2.0, -2.0], dtype=torch.float64, requires_grad=True)
    p.grad = torch.tensor([1e-9, -3e-9], dtype=torch.float64)
    Adafactor([p], lr=0.1, eps=(1e-6, 1e-3)).step()
    # u = (1e-3, −3e-3)，均方根不到 1，不截；α = RMS(p) · min(0.1, 1) = 0.2
    assert_equal(p.detach(), torch.tensor([2 - 0.2e-3, -2 + 0.6e-3], dtype=torch.float64))


def test_first_adam_step_is_the_sign_of_the_gradient() -> None:
    """``m̂ = g``、``v̂ = g²``，所以第一步恰为 ``−η sign(g)``（ε 之外）。"""
    p = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    p.grad = torch.tensor([1e-3, -5.0, 200.0], dtype=torch.float64)
    Adam([p], lr=0.1, eps=0.0).step()
    assert_equal(p.detach(), torch.tensor([0.9, 2.1, 2.9], dtype=torch.float64))


def test_lion_follows_its_two_formulas() -> None:
    ours = normal(6).requires_grad_()
    p, m = ours.detach().clone(), torch.zeros(6).double()
    optimizer = Lion([ours], lr=0.02, betas=(0.9, 0.99), weight_decay=0.1)
    for t in range(50):
        g = normal(6, seed=t + 1)
        ours.grad = g
        optimizer.step()
        p = p - 0.02 * ((0.9 * m + 0.1 * g).sign() + 0.1 * p)
        m = 0.99 * m + 0.01 * g
    assert_equal(ours.detach(), p)


# ---------------------------------------------------------------- 存取与续训


@pytest.mark.parametrize(("ours", "options"), [(c, o) for c, _, o in OFFICIAL] + OTHERS, ids=label)
def test_resuming_from_a_checkpoint_is_exact(ours: type, options: dict, tmp_path: Path) -> None:
    shapes = MATRICES if ours is Muon else SHAPES
    straight, first = ours(make_params(shapes), **options), ours(make_params(shapes), **options)
    walk(straight, 24)
    walk(first, 12)
    save_checkpoint(tmp_path / "a.pt", {"o": first.state_dict(), "p": parameters(first)})
    saved = load_checkpoint(tmp_path / "a.pt")
    second = ours([p.clone().requires_grad_() for p in saved["p"]], **options)
    second.load_state_dict(saved["o"])
    walk(second, 12, start=12)
    for p, q in zip(parameters(second), parameters(straight), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(("ours", "options"), [(c, o) for c, _, o in OFFICIAL] + OTHERS, ids=label)
def test_step_leaves_the_gradient_alone(ours: type, options: dict) -> None:
    params = make_params([(4, 3)])
    optimizer = ours(params, **options)
    for t in range(3):
        params[0].grad = normal(4, 3, seed=t)
        closure = (lambda: torch.zeros(())) if ours is SAM else None
        optimizer.step(closure)
        assert torch.equal(params[0].grad, normal(4, 3, seed=t))


def test_closure_is_called_with_gradients_enabled() -> None:
    p = nn.Parameter(torch.tensor(2.0))
    optimizer = SGD([p], lr=0.25)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p**2
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert p.item() == 1.0


def test_sgd_accepts_sparse_gradients_as_torch_does() -> None:
    results = []
    for cls in (SGD, torch.optim.SGD):
        table = nn.Embedding(6, 3, sparse=True, _weight=normal(6, 3))
        optimizer = cls(table.parameters(), lr=0.5, momentum=0.9)
        for rows in ([1, 1, 4], [2, 4]):
            optimizer.zero_grad()
            table(torch.tensor(rows)).square().sum().backward()
            optimizer.step()
        results.append(table.weight.detach())
    assert_equal(*results)


# ---------------------------------------------------------------- 出错


@pytest.mark.parametrize(
    "cls", [SGD, Adagrad, RMSprop, Adadelta, Adam, AdamW, NAdam, Lion, Adafactor, Muon,
            ScheduleFreeAdamW]
)  # fmt: skip
def test_bad_hyperparameters_and_parameters(cls: Callable) -> None:
    good = [torch.zeros(2, 2, requires_grad=True)]
    with pytest.raises(ValueError, match="参数列表是空的"):
        cls([])
    for bad in (-0.1, math.nan):
        with pytest.raises(ValueError, match=r"lr=.* 无效：应不小于 0"):
            cls(good, lr=bad)
    with pytest.raises(ValueError, match="weight_decay=-1 无效"):
        cls(good, weight_decay=-1)
    with pytest.raises(ValueError, match="lr=-3 无效"):  # 组里写错的也查得出
        cls([{"params": good, "lr": -3}])
    with pytest.raises(TypeError):
        cls(good[0])  # 与 torch 一样，不接受光秃秃的一个张量
    optimizer = cls(good)
    if not optimizer.supports_sparse:
        good[0].grad = torch.eye(2).to_sparse()
        with pytest.raises(RuntimeError, match=f"{cls.__name__} 不支持稀疏梯度"):
            optimizer.step()
    complex_one = torch.zeros(2, 2, dtype=torch.complex64, requires_grad=True)
    complex_one.grad = torch.ones(2, 2, dtype=torch.complex64)
    with pytest.raises(TypeError, match="不支持复数参数"):
        cls([complex_one]).step()


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (Adam, {"betas": (1.0, 0.999)}, r"betas\[0\]=1.0 无效：应在 \[0, 1\) 之内"),
        (AdamW, {"betas": (0.9, 1.0)}, r"betas\[1\]=1.0 无效"),
        (NAdam, {"betas": (0.9, -0.1)}, r"betas\[1\]=-0.1 无效"),
        (Lion, {"betas": (0.9, 1)}, r"betas\[1\]=1 无效"),
        (Adam, {"eps": -1e-8}, "eps=-1e-08 无效"),
        (NAdam, {"momentum_decay": -1}, "momentum_decay=-1 无效"),
        (RMSprop, {"alpha": 1.0}, "alpha=1.0 无效"),
        (RMSprop, {"momentum": -1}, "momentum=-1 无效"),
        (Adadelta, {"rho": 1.5}, "rho=1.5 无效"),
        (Adagrad, {"lr_decay": -1}, "lr_decay=-1 无效"),
        (SGD, {"momentum": -0.9}, "momentum=-0.9 无效"),
        (SGD, {"nesterov": True}, "nesterov=True 要求 momentum 大于 0"),
        (SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "dampening 等于 0"),
        (Adafactor, {"eps": (-1.0, 1e-3)}, "两项都应不小于 0"),
        (Adafactor, {"d": 0.5}, "d=0.5 无效：应不小于 1"),
        (Adafactor, {"beta2_decay": 0.8}, "beta2_decay=0.8 无效：应不大于 0"),
        (ScheduleFreeAdamW, {"betas": (0.0, 0.9)}, r"betas\[0\]=0 无效"),
        (Muon, {"momentum": 1.0}, "momentum=1.0 无效"),
    ],
)  # fmt: skip
def test_messages_name_the_value_and_the_rule(cls: type, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cls([torch.zeros(2, 2, requires_grad=True)], **options)


def test_muon_and_sam_refuse_what_they_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"Muon 只处理二维参数，实有形状 \(3,\)：请用 muon_groups"):
        Muon([torch.zeros(2, 2, requires_grad=True), torch.zeros(3, requires_grad=True)])
    with pytest.raises(ValueError, match="rho=-1 无效"):
        SAM([torch.zeros(2, requires_grad=True)], SGD, rho=-1)
    with pytest.raises(ValueError, match="需要 closure"):
        SAM([torch.zeros(2, requires_grad=True)], SGD).step()
    with pytest.raises(ValueError, match="参数列表是空的"):
        SAM([], SGD)
