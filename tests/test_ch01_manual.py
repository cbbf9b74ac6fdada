"""第 1 章的手推反向：每个中间量、每个参数的梯度，与引擎、与 PyTorch、与官方的层逐一相同。"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from chapter_01_tensor_autograd.manual_backprop import (
    EPS,
    PARAMETERS,
    Arrays,
    batchnorm_backward,
    engine_gradients,
    forward_with,
    manual_gradients,
    random_problem,
    torch_gradients,
)

# (批, 输入, 隐藏, 类别)
SIZES = [(5, 7, 3, 4), (2, 3, 4, 3), (9, 1, 1, 2), (4, 5, 6, 1), (3, 2, 11, 5), (64, 30, 17, 10)]
INTERMEDIATE = (
    "a", "mean", "centered", "var", "inv_std", "normed", "scaled", "h", "logits",
)  # fmt: skip


def assert_gradients(actual: Arrays, expected: Arrays, tolerance: float = 1e-12) -> None:
    """逐个数组比较；误差相对于这一层里最大的梯度。

    批归一化的输入梯度是几个大数相消的余数（两个样本时几乎为零），所以与 ``normed`` 的梯度比大小。
    """
    assert set(actual) == set(expected)
    for name, truth in expected.items():
        scale = np.abs(truth).max()
        if name in ("a", "mean", "centered", "weight1"):
            scale = max(scale, np.abs(expected["inv_std"]).max(), np.abs(expected["normed"]).max())
        assert actual[name].shape == truth.shape, name
        assert np.abs(actual[name] - truth).max() <= tolerance * scale, name


def official_layers(v: Arrays) -> tuple[nn.Linear, nn.BatchNorm1d, nn.Linear]:
    """同样参数的官方三层，训练模式。"""
    hidden, inputs = v["weight1"].shape
    first, norm = nn.Linear(inputs, hidden, bias=False), nn.BatchNorm1d(hidden)
    second = nn.Linear(hidden, len(v["bias2"]))
    values = {name: torch.from_numpy(v[name]) for name in PARAMETERS}
    first.double().load_state_dict({"weight": values["weight1"]})
    norm.double().load_state_dict(
        norm.state_dict() | {"weight": values["gamma"], "bias": values["beta"]}
    )
    second.double().load_state_dict({"weight": values["weight2"], "bias": values["bias2"]})
    return first, norm.train(), second


# ---------------------------------------------------------------- 三者相同


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("seed", [0, 1])
def test_manual_and_engine_equal_torch(sizes: tuple[int, ...], seed: int) -> None:
    v = random_problem(*sizes, seed=seed)
    expected = torch_gradients(v)
    assert set(expected) == {*INTERMEDIATE, *PARAMETERS}
    assert_gradients(manual_gradients(v), expected)
    assert_gradients(engine_gradients(v), expected)


@pytest.mark.parametrize("sizes", SIZES)
def test_equal_the_official_layers(sizes: tuple[int, ...]) -> None:
    v = random_problem(*sizes, seed=3)
    first, norm, second = official_layers(v)
    x, target = torch.from_numpy(v["x"]), torch.from_numpy(v["target"])
    scaled = norm(first(x))
    logits = second(scaled.tanh())
    loss = nn.functional.cross_entropy(logits, target)
    ours = forward_with(
        torch.nn.functional, {name: torch.from_numpy(value) for name, value in v.items()}
    )
    for name, value in (("scaled", scaled), ("logits", logits), ("loss", loss)):
        torch.testing.assert_close(ours[name], value.detach(), rtol=1e-12, atol=1e-12)

    parameters = [first.weight, norm.weight, norm.bias, second.weight, second.bias]
    truth = torch.autograd.grad(loss, parameters)
    manual = manual_gradients(v)
    scale = max(np.abs(g).max() for g in manual.values())
    for name, g in zip(PARAMETERS, truth, strict=True):
        assert np.abs(manual[name] - g.numpy()).max() <= 1e-12 * scale, name
    # 隐藏层整体平移不影响输出，于是对 a 的梯度沿批求和为零
    assert np.abs(manual["a"].sum(0)).max() <= 1e-12 * scale


def test_logits_gradient_by_hand() -> None:
    """两类、logits 全为零时概率各半：梯度是 ±1/2 除以批大小。"""
    v = random_problem(4, 3, 2, 2, seed=0)
    v["weight2"], v["bias2"] = np.zeros((2, 2)), np.zeros(2)
    v["target"] = np.array([0, 1, 1, 1])
    expected = np.array([[-1, 1], [1, -1], [1, -1], [1, -1]]) / 8
    for gradients in (manual_gradients(v), engine_gradients(v), torch_gradients(v)):
        np.testing.assert_allclose(gradients["logits"], expected, rtol=1e-15)
        np.testing.assert_allclose(gradients["bias2"], [0.25, -0.25], rtol=1e-15)
        assert not gradients["weight1"].any()  # weight2 = 0：梯度传不下去


def test_large_logits_do_not_overflow() -> None:
    v = random_problem(5, 3, 4, 3, seed=0)
    v["weight2"] = v["weight2"] * 1e4
    with np.errstate(over="raise", invalid="raise"):
        manual, ours = manual_gradients(v), engine_gradients(v)
    assert_gradients(manual, torch_gradients(v), 1e-9)
    assert_gradients(ours, torch_gradients(v), 1e-9)


# ---------------------------------------------------------------- 批归一化


@pytest.mark.parametrize("batch", [2, 3, 8, 65])
def test_batchnorm_backward(batch: int) -> None:
    """一行的公式，等于 ``manual_gradients`` 的三条路，也等于 ``F.batch_norm`` 的梯度。"""
    v = random_problem(batch, 4, 5, 3, seed=4)
    g = manual_gradients(v)
    a = v["x"] @ v["weight1"].T
    inv_std = 1 / np.sqrt(a.var(0) + EPS)
    normed = (a - a.mean(0)) * inv_std
    one_line = batchnorm_backward(g["normed"], normed, inv_std)

    leaf = torch.tensor(a, requires_grad=True)
    y = nn.functional.batch_norm(leaf, None, None, training=True, eps=EPS)
    np.testing.assert_allclose(normed, y.detach().numpy(), rtol=0, atol=1e-12)
    (truth,) = torch.autograd.grad(y, leaf, torch.from_numpy(g["normed"]))
    scale = np.abs(g["normed"] * inv_std).max()
    assert np.abs(one_line - g["a"]).max() <= 1e-12 * scale
    assert np.abs(one_line - truth.numpy()).max() <= 1e-12 * scale
    assert np.abs(truth.numpy()).max() > 1e-7 * scale  # 比较的不是两个零


def test_batchnorm_backward_removes_two_directions() -> None:
    """对输入的梯度与 1、与 x̂ 正交（忽略 EPS）：平移与缩放输入，输出不变。"""
    a = np.random.default_rng(0).normal(size=(16, 3)) * 100  # 方差很大，EPS 可以忽略
    inv_std = 1 / np.sqrt(a.var(0) + EPS)
    normed = (a - a.mean(0)) * inv_std
    gradient = batchnorm_backward(np.random.default_rng(1).normal(size=(16, 3)), normed, inv_std)
    assert np.abs(gradient).max() > 1e-3
    assert np.abs(gradient.sum(0)).max() < 1e-14
    assert np.abs((gradient * normed).sum(0)).max() < 1e-9


# ---------------------------------------------------------------- 随机的问题


def test_random_problem() -> None:
    v, again, other = (random_problem(50, 7, 3, 4, seed=seed) for seed in (0, 0, 1))
    shapes = {name: value.shape for name, value in v.items()}
    assert shapes == {
        "x": (50, 7), "target": (50,), "weight1": (3, 7), "gamma": (3,), "beta": (3,),
        "weight2": (4, 3), "bias2": (4,),
    }  # fmt: skip
    assert set(v["target"]) == {0, 1, 2, 3}
    for name, value in v.items():
        assert np.array_equal(value, again[name]) and not np.array_equal(value, other[name])
        assert value.dtype == (np.int64 if name == "target" else np.float64)


def test_problem_is_left_unchanged() -> None:
    v = random_problem(5, 7, 3, 4, seed=0)
    before = {name: value.copy() for name, value in v.items()}
    for gradients in (manual_gradients, engine_gradients, torch_gradients):
        gradients(v)
        assert all(np.array_equal(v[name], before[name]) for name in v)
