"""第 2 章的激活函数与 softmax：在 float64 下与 PyTorch 逐项对照，前向与梯度都比。"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_02_nn_basics_mlp import activations, initialization
from chapter_02_nn_basics_mlp.activations import ACTIVATIONS, MODULES, softmax, softmax_backward
from tests.parity import assert_equal, autograd, normal

# 名字 -> (官方函数, 官方模块)
OFFICIAL: dict[str, tuple[Callable[[Tensor], Tensor], nn.Module]] = {
    "identity": (lambda x: x, nn.Identity()),
    "relu": (F.relu, nn.ReLU()),
    "leaky_relu": (F.leaky_relu, nn.LeakyReLU()),
    "sigmoid": (torch.sigmoid, nn.Sigmoid()),
    "tanh": (torch.tanh, nn.Tanh()),
    "gelu": (F.gelu, nn.GELU()),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), nn.GELU("tanh")),
    "silu": (F.silu, nn.SiLU()),
}
EXTREMES = [0.0, -0.0, 1e-8, -1e-8, 1.0, -1.0, 100.0, -100.0, 800.0, -800.0]
SHAPES = [(1,), (1, 1), (7, 3), (2, 3, 5)]  # 奇数、批为 1、前面多出的维


def test_every_activation_has_a_module_a_gain_and_an_official_counterpart() -> None:
    assert set(ACTIVATIONS) == set(MODULES) == set(initialization.GAINS) == set(OFFICIAL)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("x", [*(normal(*shape) for shape in SHAPES), torch.tensor(EXTREMES)])
def test_activation_value_derivative_and_autograd(name: str, x: Tensor) -> None:
    x = x.double()
    official, module = OFFICIAL[name]
    ours = ACTIVATIONS[name]
    (truth,) = autograd(official, torch.ones_like(x), x)
    for value in (ours.value(x), MODULES[name]()(x)):
        torch.testing.assert_close(value, official(x), rtol=1e-13, atol=1e-15)
    assert torch.equal(module(x), official(x))
    torch.testing.assert_close(ours.prime(x), truth, rtol=1e-12, atol=1e-15)
    for function in (ours.value, MODULES[name]()):
        (through,) = autograd(function, torch.ones_like(x), x)
        torch.testing.assert_close(through, truth, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_derivative_passes_gradcheck(name: str) -> None:
    x = normal(11, seed=1).requires_grad_()  # 没有恰为 0 的点，各函数都可导
    assert torch.autograd.gradcheck(ACTIVATIONS[name].value, (x,))
    h = 1e-6
    value, prime = ACTIVATIONS[name]
    numeric = (value(x + h) - value(x - h)) / (2 * h)
    torch.testing.assert_close(prime(x), numeric, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activation_keeps_dtype_and_propagates_nan(name: str, dtype: torch.dtype) -> None:
    x = torch.tensor([math.nan, 1.0, *EXTREMES], dtype=dtype)
    value = ACTIVATIONS[name].value(x)
    assert value.dtype == dtype
    assert value.isnan().tolist() == [True] + [False] * (len(x) - 1)
    assert ACTIVATIONS[name].prime(x[1:]).isfinite().all()


def test_relu_subgradient_at_zero_is_zero() -> None:
    zeros = torch.tensor([0.0, -0.0])
    assert activations.relu_prime(zeros).tolist() == [0.0, 0.0]
    assert autograd(activations.relu, torch.ones(2), zeros)[0].tolist() == [0.0, 0.0]


def test_sigmoid_prime_has_no_cancellation() -> None:
    x = torch.tensor([100.0], dtype=torch.float64)
    # 1 − σ(100) 在 float64 里是 0，而 σ(100) σ(−100) = e^{−100} 到最后一位
    torch.testing.assert_close(activations.sigmoid_prime(x), torch.exp(-x), rtol=1e-15, atol=0)


def test_module_options() -> None:
    x = normal(5, 3)
    torch.testing.assert_close(activations.LeakyReLU(0.2)(x), F.leaky_relu(x, 0.2))
    torch.testing.assert_close(activations.Softmax()(x), nn.Softmax(dim=-1)(x))
    with pytest.raises(ValueError, match="approximate='erf'"):
        activations.GELU("erf")


def test_gelu_tanh_error_is_below_the_documented_bound() -> None:
    x = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    error = (activations.gelu_tanh(x) - activations.gelu(x)).abs().max().item()
    assert 4e-4 < error < 5e-4


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (7, 3), (2, 3, 5)])
@pytest.mark.parametrize("scale", [1.0, 800.0])
def test_softmax_and_backward(shape: tuple[int, ...], scale: float) -> None:
    x, grad = scale * normal(*shape), normal(*shape, seed=1)
    y = softmax(x)
    assert_equal(y, F.softmax(x, dim=-1))
    torch.testing.assert_close(y.sum(-1), torch.ones(shape[:-1], dtype=torch.float64))
    (truth,) = autograd(lambda x: F.softmax(x, dim=-1), grad, x)
    (through,) = autograd(softmax, grad, x)
    for ours in (softmax_backward(grad, y), through):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-15)


def test_softmax_backward_is_the_full_jacobian() -> None:
    x, grad = normal(5), normal(5, seed=1)
    jacobian = torch.autograd.functional.jacobian(softmax, x)
    y = softmax(x)
    torch.testing.assert_close(jacobian, torch.diag(y) - torch.outer(y, y))
    torch.testing.assert_close(softmax_backward(grad, y), jacobian @ grad)
