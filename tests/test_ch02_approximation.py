"""第 2 章的万能逼近、深度与频率、泛化与诊断：与闭式解、NumPy 或手算的数对照。"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chapter_02_nn_basics_mlp import diagnostics, generalization
from chapter_02_nn_basics_mlp.approximation import (
    FourierFeatures,
    build_relu_network,
    build_sawtooth_network,
    count_linear_pieces,
    hat,
    max_error,
    mode_errors,
    pieces_for,
    spectral_bias,
    sum_of_hats,
    wave_mixture,
)
from chapter_02_nn_basics_mlp.losses import cross_entropy
from chapter_02_nn_basics_mlp.mlp import MLP
from utils import make_generator

# (函数, 在 [-1, 1] 上的利普希茨常数)
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "sine": (lambda x: torch.sin(2 * math.pi * x), 2 * math.pi),
    "abs": (torch.abs, 1.0),
    "square": (torch.square, 2.0),
    "tanh": (lambda x: torch.tanh(5 * x), 5.0),
}


def grid(low: float, high: float, points: int) -> Tensor:
    return torch.linspace(low, high, points, dtype=torch.float64)


# ---------------------------------------------------------------- 构造性证明


def test_hat_by_hand() -> None:
    x = torch.tensor([-1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 2.0])
    assert hat(x, 0.5, 0.5).tolist() == [0.0, 0.0, 0.5, 1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("pieces", [1, 2, 7, 64])
def test_hats_network_and_interpolation_agree(name: str, pieces: int) -> None:
    function = FUNCTIONS[name][0]
    knots, x = grid(-1, 1, pieces + 1), grid(-1, 1, 501)
    expected = np.interp(x.numpy(), knots.numpy(), function(knots).numpy())
    network = build_relu_network(function, pieces)
    assert network.layers[0].out_features == pieces
    for ours in (sum_of_hats(function, x, knots), network(x.unsqueeze(1)).squeeze(1)):
        np.testing.assert_allclose(ours.detach().numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("epsilon", [0.5, 0.2, 0.01])
def test_the_promised_error_is_kept(name: str, epsilon: float) -> None:
    function, lipschitz = FUNCTIONS[name]
    network = build_relu_network(function, pieces_for(epsilon, lipschitz))
    assert 0 < max_error(network, function) <= epsilon * (1 + 1e-12)


def test_the_bound_is_tight() -> None:
    """|x| 分成奇数段时，误差恰为 Lh/2：公式里的 2 不能再改进。"""
    assert pieces_for(0.2, 1.0) == 5
    assert max_error(build_relu_network(torch.abs, 5), torch.abs) == pytest.approx(0.2, rel=1e-12)
    assert max_error(build_relu_network(torch.abs, 4), torch.abs) < 1e-15  # 折点恰在节点上


def test_network_on_another_interval() -> None:
    network = build_relu_network(torch.square, pieces_for(0.05, 8.0, 1.0, 4.0), 1.0, 4.0)
    assert max_error(network, torch.square, 1.0, 4.0) <= 0.05


def test_pieces_for_rejects_nonsense() -> None:
    for arguments in [(0.0, 1.0), (0.1, 0.0), (-0.1, 1.0), (0.1, 1.0, 1.0, 1.0)]:
        with pytest.raises(ValueError, match="ε > 0"):
            pieces_for(*arguments)


def test_error_falls_with_the_square_of_the_width() -> None:
    function = FUNCTIONS["sine"][0]
    errors = [max_error(build_relu_network(function, n), function) for n in (32, 64, 128)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert coarse / fine == pytest.approx(4, rel=0.05)
    h = 2 / 128
    assert errors[-1] == pytest.approx((2 * math.pi) ** 2 * h**2 / 8, rel=0.01)  # max|f''| h²/8


# ---------------------------------------------------------------- 深度


def iterated_tent(x: Tensor, depth: int) -> Tensor:
    """闭式：帐篷映射迭代 k 次是周期 ``2^{1−k}`` 的三角波。"""
    phase = torch.remainder(x * 2 ** (depth - 1), 1.0)
    return 1 - (2 * phase - 1).abs()


@pytest.mark.parametrize("depth", range(1, 11))
def test_sawtooth_has_two_to_the_depth_pieces(depth: int) -> None:
    network = build_sawtooth_network(depth)
    assert [layer.out_features for layer in network.layers] == [2] * depth + [1]
    assert count_linear_pieces(network) == 2**depth
    x = torch.rand(301, 1, generator=make_generator(0), dtype=torch.float64)
    x[:3, 0] = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(network(x), iterated_tent(x, depth), rtol=0, atol=1e-10)


def test_count_linear_pieces_on_known_networks() -> None:
    assert count_linear_pieces(MLP(1, (), 1, generator=make_generator(0)).double()) == 1
    # 折点在 1/8, 2/8, ..., 7/8；相邻斜率都不同
    cubic = build_relu_network(lambda x: x**3, 8, 0.0, 1.0)
    assert count_linear_pieces(cubic) == 8
    line = build_relu_network(lambda x: 2 * x + 1, 8, 0.0, 1.0)
    assert count_linear_pieces(line) == 1


# ---------------------------------------------------------------- 频率


def periodic_grid(points: int = 256) -> Tensor:
    return torch.arange(points, dtype=torch.float64).unsqueeze(1) / (points / 2) - 1


def test_mode_errors_reads_off_amplitudes() -> None:
    x = periodic_grid()
    residual = 0.3 * torch.sin(3 * math.pi * x + 1) - 0.05 * torch.cos(10 * math.pi * x) + 0.7
    expected = torch.tensor([0.0, 0.3, 0.05], dtype=torch.float64)
    torch.testing.assert_close(mode_errors(residual, (1, 3, 10)), expected, rtol=0, atol=1e-12)
    target = wave_mixture(x, (1, 4))
    torch.testing.assert_close(mode_errors(target, (1, 2, 4)), torch.tensor([1.0, 0, 1]).double())


def test_wave_mixture_by_hand() -> None:
    x = torch.tensor([[0.0], [0.5]])
    expected = [
        [math.sin(1) + math.sin(3)],
        [math.sin(math.pi / 2 + 1) + math.sin(3 * math.pi / 2 + 3)],
    ]
    torch.testing.assert_close(wave_mixture(x, (1, 3)), torch.tensor(expected))


def test_fourier_features_by_hand() -> None:
    features = FourierFeatures(2)(torch.tensor([[0.5], [0.25]]))
    half = math.sqrt(0.5)
    expected = torch.tensor([[1.0, 0.0, 0.0, -1.0], [half, 1.0, half, 0.0]])  # 先 sin 后 cos
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)
    assert not list(FourierFeatures(2).parameters())


def test_low_frequencies_are_learned_first() -> None:
    generator = make_generator(0)
    model = MLP(1, (64, 64), 1, "relu", generator)
    start = [p.clone() for p in model.parameters()]
    marks, errors = spectral_bias(model, (1, 6), steps=200, every=100, lr=3e-3)
    assert marks == [0, 100, 200] and errors.shape == (3, 2)
    assert errors[0].tolist() == pytest.approx([1, 1], abs=0.3)  # 还没学，误差就是振幅
    assert errors[-1, 0] < 0.15 and errors[-1, 1] > 0.5
    assert not torch.equal(start[0], model.layers[0].weight)


def test_fourier_features_remove_the_bias() -> None:
    model = nn.Sequential(FourierFeatures(8), MLP(16, (64,), 1, "relu", make_generator(0)))
    _, errors = spectral_bias(model, (1, 6), steps=200, every=200, lr=3e-3)
    assert errors[-1].max() < 0.1


# ---------------------------------------------------------------- 泛化


@pytest.mark.parametrize("degree", [0, 1, 2, 7, 18])
def test_legendre_equals_numpy(degree: int) -> None:
    x = torch.rand(37, 1, generator=make_generator(0), dtype=torch.float64) * 2 - 1
    expected = np.polynomial.legendre.legvander(x[:, 0].numpy(), degree)
    np.testing.assert_allclose(generalization.legendre(x, degree).numpy(), expected, atol=1e-13)


@pytest.mark.parametrize(("samples", "features"), [(9, 4), (4, 9), (5, 5), (1, 3)])
def test_least_squares_is_the_minimum_norm_solution(samples: int, features: int) -> None:
    generator = make_generator(0)
    matrix = torch.randn(samples, features, generator=generator, dtype=torch.float64)
    target = torch.randn(samples, 1, generator=generator, dtype=torch.float64)
    solution = generalization.least_squares(matrix, target)
    torch.testing.assert_close(solution, torch.linalg.pinv(matrix) @ target, rtol=0, atol=1e-10)


def test_polynomial_recovers_a_polynomial_exactly() -> None:
    def sample(count: int, seed: int) -> tuple[Tensor, Tensor]:
        x = torch.rand(count, 1, generator=make_generator(seed), dtype=torch.float64) * 2 - 1
        return x, x**3 - 0.5 * x + 1

    errors = generalization.polynomial_errors(3, sample(10, 0), sample(50, 1))
    assert max(errors) < 1e-25
    underfit, _ = generalization.polynomial_errors(2, sample(10, 0), sample(50, 1))
    assert underfit > 1e-3


def test_training_error_falls_with_the_degree_while_the_test_error_turns() -> None:
    generator = make_generator(0)
    train, test = (generalization.noisy_sine(count, generator) for count in (30, 2000))
    errors = {d: generalization.polynomial_errors(d, train, test) for d in (1, 7, 18)}
    assert errors[1][0] > errors[7][0] > errors[18][0]
    assert errors[7][1] < errors[1][1] and errors[7][1] < errors[18][1]
    assert errors[7][1] > generalization.NOISE**2 * 0.9  # 噪声方差是下限


def test_noisy_sine_noise_variance() -> None:
    x, y = generalization.noisy_sine(20_000, make_generator(0))
    residual = y - torch.sin(2 * math.pi * x)
    assert x.dtype == y.dtype == torch.float64 and x.shape == y.shape == (20_000, 1)
    assert residual.var().item() == pytest.approx(0.09, rel=0.03)


def test_double_descent_peaks_at_the_interpolation_threshold() -> None:
    widths = [10, 50, 90, 100, 110, 1000]
    runs = [generalization.double_descent(widths, make_generator(seed)) for seed in range(5)]
    train, test = (
        {w: statistics.median(run[i][split] for run in runs) for i, w in enumerate(widths)}
        for split in (0, 1)
    )
    assert train[10] > train[50] > train[90] > train[1000]
    assert train[1000] < 1e-20  # 远多于样本数的特征：连噪声也全部记住
    assert max(test, key=test.get) in (90, 100, 110)
    assert test[100] > 5 * test[50] and test[1000] < test[50]


# ---------------------------------------------------------------- 诊断


def test_signal_scale_by_initialisation() -> None:
    def signal(scheme: str) -> tuple[list[float], list[float]]:
        return diagnostics.signal_by_layer(scheme, "relu", make_generator(0), depth=8, width=128)

    forward, backward = signal("Kaiming")
    assert len(forward) == len(backward) == 8
    assert all(0.6 < value < 1.6 for value in [*forward, *backward])  # ReLU 后均方根约 1
    forward, backward = signal("N(0, 0.01²)")
    ratio = 0.01 * math.sqrt(128 / 2)  # 每层缩小到的倍数
    assert forward[-1] / forward[0] == pytest.approx(ratio**7, rel=0.5)
    assert backward[0] / backward[-1] == pytest.approx(ratio**7, rel=0.5)
    forward, _ = signal("N(0, 1)")
    assert forward[-1] / forward[0] == pytest.approx(8**7, rel=0.5)


@torch.no_grad()
def test_dead_fraction_by_construction() -> None:
    model = MLP(3, (4, 6), 2, "relu", make_generator(0))
    x = torch.randn(50, 3, generator=make_generator(1))
    model.layers[0].bias.fill_(100.0)
    model.layers[1].weight.abs_()
    assert diagnostics.dead_fraction(model, x) == 0
    model.layers[0].bias[:3] = -100.0  # 第一层死 3 个
    model.layers[1].bias[0] = -1e6  # 第二层死 1 个
    assert diagnostics.dead_fraction(model, x) == pytest.approx(4 / 10)
    leaky = MLP(3, (4, 6), 2, "leaky_relu", make_generator(0))
    leaky.load_state_dict(model.state_dict())
    assert diagnostics.dead_fraction(leaky, x) == 0


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_initial_loss_is_log_of_the_number_of_classes(classes: int) -> None:
    generator = make_generator(0)
    x, y = torch.randn(256, 20, generator=generator), torch.arange(256) % classes
    model = MLP(20, (64,), classes, generator=generator)
    loss, expected = diagnostics.initial_loss(model, x, y)
    assert expected == pytest.approx(math.log(classes))
    assert loss == pytest.approx(expected, abs=0.05)
    assert loss == pytest.approx(cross_entropy(model(x), y).item())


def test_overfit_one_batch() -> None:
    generator = make_generator(0)
    x, y = torch.randn(32, 10, generator=generator), torch.arange(32) % 5  # 标签与输入无关
    model = MLP(10, (64, 64), 5, generator=generator)
    before, _ = diagnostics.initial_loss(model, x, y)
    losses, norms = diagnostics.overfit_one_batch(model, x, y)
    assert len(losses) == len(norms) == 200
    assert losses[0] == pytest.approx(before) and losses[-1] < 0.01
    assert norms[-1] < 0.1 * norms[0]


def test_overfit_reports_the_gradient_norm() -> None:
    generator = make_generator(0)
    x, y = torch.randn(8, 3, generator=generator), torch.arange(8) % 2
    model = MLP(3, (5,), 2, generator=generator)
    grads = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
    expected = torch.cat([grad.flatten() for grad in grads]).norm().item()
    _, norms = diagnostics.overfit_one_batch(model, x, y, steps=1)
    assert norms == [pytest.approx(expected, rel=1e-5)]
