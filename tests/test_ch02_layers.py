"""第 2 章的全连接层、初始化与 MLP：在 float64 下与 PyTorch 逐项对照，前向与梯度都比。"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_02_nn_basics_mlp import initialization
from chapter_02_nn_basics_mlp.activations import ACTIVATIONS
from chapter_02_nn_basics_mlp.layers import (
    Linear,
    MLPManual,
    SwiGLU,
    linear,
    linear_backward,
    swiglu,
    swiglu_backward,
)
from chapter_02_nn_basics_mlp.losses import cross_entropy_grad, mse_grad
from chapter_02_nn_basics_mlp.mlp import MLP
from tests.invariants import assert_batch_independent
from tests.parity import assert_equal, autograd, normal
from tests.test_ch02_activations import OFFICIAL
from utils import count_parameters, make_generator
from utils.file_io_util import load_checkpoint, save_checkpoint

# ---------------------------------------------------------------- 全连接层与 SwiGLU


@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3)])
@pytest.mark.parametrize(("fan_in", "fan_out"), [(1, 1), (5, 3), (3, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_and_backward(
    leading: tuple[int, ...], fan_in: int, fan_out: int, bias: bool
) -> None:
    ours = Linear(fan_in, fan_out, bias, make_generator(0)).double()
    official = nn.Linear(fan_in, fan_out, bias).double()
    official.load_state_dict(ours.state_dict())
    x, grad = normal(*leading, fan_in), normal(*leading, fan_out, seed=1)
    assert_equal(ours(x), official(x))
    parameters = list(official.parameters())
    truth = autograd(official, grad, x)
    truth += torch.autograd.grad(official(x), parameters, grad)
    hand = linear_backward(grad, x, ours.weight)
    through = autograd(ours, grad, x)
    through += torch.autograd.grad(ours(x), list(ours.parameters()), grad)
    for a, b, c in zip(hand, truth, through, strict=False):
        assert_equal(a.detach(), b)
        assert_equal(c, b)
    assert len(truth) == len(through) == 2 + bias and len(hand) == 3
    assert torch.equal(linear(x, ours.weight, ours.bias), ours(x))


def test_linear_state_dict_loads_both_ways() -> None:
    ours, official = Linear(5, 3, generator=make_generator(0)), nn.Linear(5, 3)
    assert list(ours.state_dict()) == list(official.state_dict())
    ours.load_state_dict(official.state_dict())
    x = torch.randn(4, 5)
    torch.testing.assert_close(ours(x), official(x))
    assert repr(ours) == "Linear(5, 3, bias=True)"


def test_linear_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    weight = torch.tensor([[1.0, -1.0]])
    assert linear(x, weight, torch.tensor([0.5])).tolist() == [[-0.5], [-0.5]]
    gx, g_weight, g_bias = linear_backward(torch.tensor([[2.0], [3.0]]), x, weight)
    assert gx.tolist() == [[2.0, -2.0], [3.0, -3.0]]
    assert g_weight.tolist() == [[11.0, 16.0]]  # 2·[1, 2] + 3·[3, 4]
    assert g_bias.tolist() == [5.0]


def test_default_init_distribution() -> None:
    layer = Linear(400, 300, generator=make_generator(0))
    for values in (layer.weight, layer.bias):
        assert 0.99 / 20 < values.abs().max() <= 1 / 20  # U(−1/√400, 1/√400)
    assert layer.weight.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.01)
    assert layer.weight.mean().item() == pytest.approx(0, abs=3e-4)
    again = Linear(400, 300, generator=make_generator(0))
    assert torch.equal(layer.weight, again.weight) and torch.equal(layer.bias, again.bias)


@pytest.mark.parametrize("leading", [(1,), (5,), (2, 3)])
def test_swiglu_and_backward(leading: tuple[int, ...]) -> None:
    x, grad = normal(*leading, 3), normal(*leading, 3, seed=1)
    weights = normal(7, 3, seed=2), normal(7, 3, seed=3), normal(3, 7, seed=4)

    def official(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    assert_equal(swiglu(x, *weights), official(x, *weights))
    truth = autograd(official, grad, x, *weights)
    for hand, through, expected in zip(
        swiglu_backward(grad, x, *weights),
        autograd(swiglu, grad, x, *weights),
        truth,
        strict=True,
    ):
        assert_equal(hand, expected)
        assert_equal(through, expected)


def test_swiglu_module() -> None:
    block = SwiGLU(6, 16, make_generator(0)).double()
    assert list(block.state_dict()) == ["gate.weight", "up.weight", "down.weight"]
    assert (
        count_parameters(block) == 3 * 6 * 16 == 2 * 6 * (4 * 6)
    )  # hidden = 8C/3 与 4C 的 MLP 相等
    x = normal(2, 3, 6)
    assert torch.equal(block(x), swiglu(x, *(p.detach() for p in block.parameters())))
    assert_batch_independent(block.eval(), x)


# ---------------------------------------------------------------- 初始化


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (64, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_initialisation_is_bit_equal_to_torch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    kaiming = {"nonlinearity": "relu"}
    leaky = {"nonlinearity": "leaky_relu", "a": 0.01}
    pairs = [
        (initialization.xavier_uniform_, nn.init.xavier_uniform_, (1.5,), {"gain": 1.5}),
        (initialization.xavier_normal_, nn.init.xavier_normal_, (1.5,), {"gain": 1.5}),
        (initialization.kaiming_uniform_, nn.init.kaiming_uniform_, ("relu",), kaiming),
        (initialization.kaiming_normal_, nn.init.kaiming_normal_, ("relu",), kaiming),
        (initialization.kaiming_uniform_, nn.init.kaiming_uniform_, ("leaky_relu",), leaky),
        (initialization.kaiming_normal_, nn.init.kaiming_normal_, ("leaky_relu",), leaky),
    ]
    for ours, official, arguments, options in pairs:
        expected = official(torch.empty(shape, dtype=dtype), **options, generator=make_generator(3))
        weight = torch.empty(shape, dtype=dtype)
        assert ours(weight, *arguments, make_generator(3)) is weight  # 原地
        assert torch.equal(weight, expected), ours.__name__


@pytest.mark.parametrize("name", ["identity", "sigmoid", "tanh", "relu", "leaky_relu"])
def test_gains_equal_torch(name: str) -> None:
    official = "linear" if name == "identity" else name
    assert initialization.GAINS[name] == pytest.approx(nn.init.calculate_gain(official), rel=1e-15)


def test_measured_std() -> None:
    weight = torch.empty(500, 300)
    xavier, kaiming = math.sqrt(2 / 800), math.sqrt(2 / 300)
    for fill, std in [
        (initialization.xavier_uniform_, xavier),
        (initialization.xavier_normal_, xavier),
        (initialization.kaiming_uniform_, kaiming),
        (initialization.kaiming_normal_, kaiming),
    ]:
        fill(weight, generator=make_generator(0))
        assert weight.std().item() == pytest.approx(std, rel=0.01)
        assert abs(weight.mean().item()) < 0.01 * std


# ---------------------------------------------------------------- 手推反向传播的 MLP

SIZES = (5, 7, 3, 4)


def manual_and_official(activation: str, seed: int = 0) -> tuple[MLPManual, nn.Sequential]:
    """同样权重的 ``MLPManual`` 与官方的 ``nn.Sequential``。"""
    manual = MLPManual(SIZES, activation, make_generator(seed), torch.float64)
    for bias in manual.biases:  # 偏置缺省为零，换成随机数，才查得出偏置的错
        bias.normal_(generator=make_generator(seed + 1))
    layers: list[nn.Module] = []
    for weight, bias in zip(manual.weights, manual.biases, strict=True):
        layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers += [layer, OFFICIAL[activation][1]]
    return manual, nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("batch", [1, 9])
def test_manual_gradients_equal_official(activation: str, batch: int) -> None:
    manual, official = manual_and_official(activation)
    x = normal(batch, SIZES[0], seed=2).requires_grad_()
    y = torch.arange(batch) % SIZES[-1]
    output = official(x)
    truth = torch.autograd.grad(F.cross_entropy(output, y), [*official.parameters(), x])
    assert_equal(manual.forward(x.detach()), output.detach())
    grads, input_grad = manual.backward(cross_entropy_grad(output.detach(), y))
    worst = 0.0
    for ours, expected in zip([*grads, input_grad], truth, strict=True):
        assert ours.shape == expected.shape
        worst = max(worst, ((ours - expected).abs().max() / expected.abs().max()).item())
    assert worst <= 1e-12


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_manual_training_follows_official_sgd(activation: str) -> None:
    manual, official = manual_and_official(activation)
    optimizer = torch.optim.SGD(official.parameters(), lr=0.05)
    x, y = normal(9, SIZES[0], seed=2), normal(9, SIZES[-1], seed=3)
    start = [parameter.clone() for parameter in manual.parameters]
    for _ in range(20):
        grads, _ = manual.backward(mse_grad(manual.forward(x), y))
        manual.step(grads, 0.05)
        optimizer.zero_grad()
        F.mse_loss(official(x), y).backward()
        optimizer.step()
        for ours, expected in zip(manual.parameters, official.parameters(), strict=True):
            assert_equal(ours, expected.detach())
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(start, manual.parameters, strict=True))


def test_manual_gradient_equals_finite_differences() -> None:
    """不经 autograd 的独立核对：逐个参数加减 h。"""
    net = MLPManual((3, 4, 2), "tanh", make_generator(0), torch.float64)
    x, coefficients = normal(5, 3, seed=1), normal(5, 2, seed=2)
    net.forward(x)
    grads, _ = net.backward(coefficients)
    h = 1e-6
    for parameter, grad in zip(net.parameters, grads, strict=True):
        flat = parameter.view(-1)
        for i in range(len(flat)):
            loss = {}
            for sign in (1, -1):
                flat[i] += sign * h
                loss[sign] = (net.forward(x) * coefficients).sum().item()
                flat[i] -= sign * h
            numeric = (loss[1] - loss[-1]) / (2 * h)
            assert numeric == pytest.approx(grad.view(-1)[i].item(), abs=1e-8)


def test_manual_accepts_a_single_layer_and_rejects_nonsense() -> None:
    net = MLPManual((3, 2), generator=make_generator(0))
    with pytest.raises(RuntimeError, match="先调用 forward"):
        net.backward(torch.ones(4, 2))
    net.forward(torch.ones(4, 3))
    grads, gx = net.backward(torch.ones(4, 2))
    assert grads[0].tolist() == [[4.0] * 3] * 2 and grads[1].tolist() == [4.0, 4.0]
    assert gx.shape == (4, 3)
    for sizes in [(3,), (3, 0), ()]:
        with pytest.raises(ValueError, match="sizes"):
            MLPManual(sizes)


def test_linear_and_mlp_pass_gradcheck() -> None:
    layer = Linear(3, 2, generator=make_generator(0)).double()
    model = MLP(3, (4,), 2, "gelu", make_generator(0)).double()
    x = normal(5, 3).requires_grad_()
    for module in (layer, model):
        names, values = zip(*module.named_parameters(), strict=True)

        def call(x: Tensor, *values: Tensor, module=module, names=names) -> Tensor:
            parameters = dict(zip(names, values, strict=True))
            return torch.func.functional_call(module, parameters, (x,))

        assert torch.autograd.gradcheck(call, (x, *values))


# ---------------------------------------------------------------- MLP


@pytest.mark.parametrize("hidden", [(), (7,), (7, 3), (7, 3, 5)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_equals_sequential(hidden: tuple[int, ...], activation: str) -> None:
    model = MLP(5, hidden, 2, activation, make_generator(0)).double()
    modules: list[nn.Module] = []
    for layer in model.layers:
        official = nn.Linear(layer.in_features, layer.out_features).double()
        official.load_state_dict(layer.state_dict())
        modules += [official, OFFICIAL[activation][1]]
    sequential = nn.Sequential(*modules[:-1])
    for batch in (1, 6):
        x, grad = normal(batch, 5, seed=1), normal(batch, 2, seed=2)
        assert_equal(model(x), sequential(x))
        truth = torch.autograd.grad(sequential(x), list(sequential.parameters()), grad)
        ours = torch.autograd.grad(model(x), list(model.parameters()), grad)
        for a, b in zip(ours, truth, strict=True):
            assert_equal(a, b)
    states = model.hidden_states(x)
    assert [state.shape for state in states] == [(6, width) for width in hidden]
    for depth, state in enumerate(states):
        assert_equal(state, sequential[: 2 * depth + 2](x))


def test_mlp_flattens_images() -> None:
    model = MLP(3 * 4 * 5, (7,), 2, "tanh", make_generator(0)).double()
    images = normal(2, 3, 4, 5)
    assert torch.equal(model(images), model(images.view(2, 60)))
    assert_batch_independent(model.eval(), images)
    assert_batch_independent(MLP(60, (), 2, generator=make_generator(1)).double(), images)


def test_mlp_parameter_count_by_hand() -> None:
    assert count_parameters(MLP(784, (256, 128), 10)) == (
        (784 * 256 + 256) + (256 * 128 + 128) + (128 * 10 + 10)
    )
    assert count_parameters(MLP(784, (), 10)) == 7850


def test_mlp_initialisation() -> None:
    model = MLP(300, (400,), 500, "relu", make_generator(0))
    first, last = model.layers
    assert not first.bias.any() and not last.bias.any()
    assert first.weight.std().item() == pytest.approx(math.sqrt(2 / 300), rel=0.01)
    assert last.weight.std().item() == pytest.approx(0.1 * math.sqrt(2 / 400), rel=0.01)
    state = torch.get_rng_state()
    again = MLP(300, (400,), 500, "relu", make_generator(0))
    assert torch.equal(torch.get_rng_state(), state)  # 给了生成器，就不碰全局的随机数
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    other = MLP(300, (400,), 500, "relu", make_generator(1))
    assert not torch.equal(first.weight, other.layers[0].weight)


def test_mlp_saved_and_loaded_gives_the_same_output(tmp_path: Path) -> None:
    model = MLP(5, (7, 3), 2, "silu", make_generator(0))
    save_checkpoint(tmp_path / "model.pt", model.state_dict())
    loaded = MLP(5, (7, 3), 2, "silu", make_generator(1))
    x = torch.randn(4, 5)
    assert not torch.equal(loaded(x), model(x))
    loaded.load_state_dict(load_checkpoint(tmp_path / "model.pt"))
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    ("sizes", "activation", "message"),
    [
        ((0, (3,), 2), "relu", "正整数"),
        ((3, (0,), 2), "relu", "正整数"),
        ((3, (4,), -1), "relu", "正整数"),
        ((3, (4,), 2), "rleu", "'rleu'.*可选 .*relu"),
    ],
)
def test_mlp_rejects_nonsense(sizes: tuple, activation: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLP(*sizes, activation)
