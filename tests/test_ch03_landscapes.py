"""第 3 章的损失地形：Hessian 与显式矩阵、切片与缩放不变性、噪声尺度与精确值逐项对照。"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from chapter_03_optimization_regularization.landscapes import (
    LANDSCAPES,
    filter_normalized_direction,
    gradient_noise,
    gradient_noise_from_batches,
    hessian_operator,
    lanczos,
    loss_slice,
    per_sample_gradients,
    power_iteration,
    quadratic,
    sharpness,
    trajectory,
)
from tests.parity import assert_equal, normal
from utils import make_generator

# ---------------------------------------------------------------- 测试函数


@pytest.mark.parametrize("name", LANDSCAPES)
def test_minima_are_strict_and_equal(name: str) -> None:
    land = LANDSCAPES[name]
    for minimum in land.minima:
        point = torch.tensor(minimum, dtype=torch.float64, requires_grad=True)
        value = land.function(point)
        (slope,) = torch.autograd.grad(value, point)
        assert slope.abs().max() < 1e-12
        hessian = torch.autograd.functional.hessian(land.function, point.detach())
        assert torch.linalg.eigvalsh(hessian)[0] > 0.1
        assert value.item() == pytest.approx(land.lowest, abs=1e-12)
    left, right, bottom, top = land.window
    for x, y in (land.start, land.minima[0]):
        assert left < x < right and bottom < y < top


def test_function_values_by_hand() -> None:
    at = {name: land.function for name, land in LANDSCAPES.items()}
    points = torch.tensor([[0.0, 0.0], [2.0, 5.0]], dtype=torch.float64)
    assert at["rosenbrock"](points).tolist() == [1.0, 101.0]  # 1 + 100 · (5 − 4)²
    assert at["beale"](points).tolist() == pytest.approx(
        [1.5**2 + 2.25**2 + 2.625**2, 9.5**2 + 50.25**2 + 250.625**2]
    )
    assert at["saddle"](points).tolist() == [0.0, 2 - 12.5 + 625 / 4]
    assert quadratic(points, condition=10.0, angle=0.0).tolist() == [0.0, 0.5 * (4 + 250)]


def test_quadratic_has_the_asked_condition_number_and_axes() -> None:
    function = lambda p: quadratic(p, condition=40.0, angle=0.3)  # noqa: E731
    hessian = torch.autograd.functional.hessian(function, normal(2))
    values, vectors = torch.linalg.eigh(hessian)
    assert values.tolist() == pytest.approx([1.0, 40.0])
    flat = vectors[:, 0] * vectors[0, 0].sign()  # 平的方向是转了 0.3 的 x 轴
    assert flat.tolist() == pytest.approx([math.cos(0.3), math.sin(0.3)])


def test_saddle_point_has_one_negative_curvature() -> None:
    hessian = torch.autograd.functional.hessian(LANDSCAPES["saddle"].function, torch.zeros(2))
    assert hessian.tolist() == [[1.0, 0.0], [0.0, -1.0]]


def test_trajectory_equals_gradient_descent_by_hand() -> None:
    function = lambda p: quadratic(p, condition=4.0, angle=0.0)  # noqa: E731
    path = trajectory(function, lambda p: torch.optim.SGD(p, lr=0.1), (1.0, -2.0), 3)
    # 每步 x 乘 1 − 0.1，y 乘 1 − 0.4
    by_hand = [[0.9**t, -2 * 0.6**t] for t in range(4)]
    assert_equal(path, torch.tensor(by_hand, dtype=torch.float64))
    still = trajectory(function, lambda p: torch.optim.SGD(p, lr=0.1), (1.0, -2.0), 0)
    assert still.tolist() == [[1.0, -2.0]]


# ---------------------------------------------------------------- Hessian


def net_and_loss(activation: type[nn.Module] = nn.Tanh) -> tuple[nn.Module, Callable[[], Tensor]]:
    model = nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 2)).double()
    x, y = normal(5, 3), torch.tensor([0, 1, 1, 0, 1])
    return model, lambda: nn.functional.cross_entropy(model(x), y)


def explicit_hessian(model: nn.Module, loss_fn: Callable[[], Tensor]) -> Tensor:
    """逐行求导写出的 Hessian，与 ``torch.autograd.functional.hessian`` 一样只是慢。"""
    x = torch.cat([p.detach().flatten() for p in model.parameters()])
    names, shapes = zip(*[(n, p.shape) for n, p in model.named_parameters()], strict=True)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self) -> Tensor:
            return loss_fn()

    def of_flat(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes])
        values = {f"inner.{n}": p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return torch.func.functional_call(Wrapped(), values, ())

    return torch.autograd.functional.hessian(of_flat, x)


def test_hessian_vector_product_equals_the_explicit_matrix() -> None:
    model, loss_fn = net_and_loss()
    hessian = explicit_hessian(model, loss_fn)
    operator = hessian_operator(loss_fn, list(model.parameters()))
    for seed in range(3):  # 同一张图可以反复用
        v = normal(len(hessian), seed=seed)
        assert_equal(operator(v), hessian @ v, 1e-12)


def test_hessian_of_a_parameter_the_loss_ignores_is_zero() -> None:
    used, unused = normal(2).requires_grad_(), normal(3).requires_grad_()
    operator = hessian_operator(lambda: used.pow(3).sum(), [used, unused])
    v = normal(5, seed=1)
    assert_equal(operator(v)[:2], 6 * used.detach() * v[:2])
    assert operator(v)[2:].tolist() == [0.0, 0.0, 0.0]


def test_sharpness_equals_the_largest_eigenvalue() -> None:
    model, loss_fn = net_and_loss()
    truth = torch.linalg.eigvalsh(explicit_hessian(model, loss_fn))[-1].item()
    params = list(model.parameters())
    assert sharpness(loss_fn, params, make_generator(0), 26) == pytest.approx(truth, rel=1e-10)
    assert sharpness(loss_fn, params, make_generator(1), 12) == pytest.approx(truth, rel=1e-6)
    assert sharpness(loss_fn, params, make_generator(0), 1) < 0.9 * truth  # 一步是瑞利商，偏小
    assert all(p.grad is None for p in params)


def test_sharpness_is_signed_while_power_iteration_is_not() -> None:
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    loss_fn = lambda: 0.5 * (x[0] ** 2 - 3 * x[1] ** 2)  # noqa: E731
    assert sharpness(loss_fn, [x], make_generator(0)) == pytest.approx(1.0, rel=1e-12)
    value = power_iteration(hessian_operator(loss_fn, [x]), normal(2), 60)
    assert value == pytest.approx(-3.0, rel=1e-12)


def test_lanczos_finds_the_whole_spectrum_and_beats_power_iteration() -> None:
    root = normal(30, 30)
    matrix = root @ root.T
    truth = torch.linalg.eigvalsh(matrix)
    start = normal(30, seed=1)
    assert_equal(lanczos(lambda v: matrix @ v, start, 30), truth, 1e-12)
    assert_equal(lanczos(lambda v: matrix @ v, start, 99), truth, 1e-12)  # 至多 P 步
    after = {k: lanczos(lambda v: matrix @ v, start, k)[-1].item() for k in (1, 5, 10)}
    assert after[1] == pytest.approx((start @ matrix @ start / (start @ start)).item())
    assert after[1] < after[5] < after[10] <= truth[-1] * (1 + 1e-12)
    power = power_iteration(lambda v: matrix @ v, start, 10)
    assert truth[-1] - after[10] < 0.05 * (truth[-1] - power)
    assert power_iteration(lambda v: matrix @ v, start, 2000) == pytest.approx(truth[-1].item())


def test_lanczos_stops_on_an_invariant_subspace() -> None:
    matrix = torch.diag(torch.tensor([2.0, 2.0, 2.0, 5.0], dtype=torch.float64))
    values = lanczos(lambda v: matrix @ v, normal(4), 4)  # 只有两个不同的特征值
    assert values.tolist() == pytest.approx([2.0, 5.0], rel=1e-12)


# ---------------------------------------------------------------- 切片


def relu_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)
    ).double()


def test_direction_rows_have_the_length_of_the_weights() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5))
    direction = filter_normalized_direction(model, make_generator(0))
    for p, d in zip(model.parameters(), direction, strict=True):
        if p.ndim == 1:
            assert d.abs().max() == 0
        else:
            torch.testing.assert_close(d.flatten(1).norm(dim=1), p.flatten(1).norm(dim=1))
    other = filter_normalized_direction(model, make_generator(1))
    assert not torch.allclose(direction[0], other[0])


@torch.no_grad()
def test_slice_is_invariant_under_rescaling_of_relu_layers() -> None:
    model, scaled = relu_net(), relu_net()
    scaled.load_state_dict(model.state_dict())
    for factor, (first, second) in ((10.0, (0, 2)), (0.2, (2, 4))):
        scaled[first].weight *= factor
        scaled[first].bias *= factor
        scaled[second].weight /= factor
    x, y = normal(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])
    grid = torch.linspace(-1, 1, 5, dtype=torch.float64)

    def curve(net: nn.Module, normalized: bool) -> Tensor:
        directions = filter_normalized_direction(net, make_generator(0))
        if not normalized:
            g = make_generator(0)
            directions = [torch.empty_like(p).normal_(generator=g) for p in net.parameters()]
        loss_fn = lambda: nn.functional.cross_entropy(net(x), y)  # noqa: E731
        return loss_slice(loss_fn, list(net.parameters()), [directions], grid)

    assert_equal(scaled(x), model(x), 1e-12)  # 函数没有变
    assert_equal(curve(scaled, True), curve(model, True), 1e-12)
    assert (curve(scaled, False) - curve(model, False)).abs().max() > 0.1  # 普通方向则变了


def test_slice_values_by_hand_and_parameters_restored() -> None:
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    d1, d2 = [torch.tensor([1.0, 0.0]).double()], [torch.tensor([0.0, 3.0]).double()]
    grid = torch.tensor([-1.0, 0.0, 2.0])
    values = loss_slice(lambda: x[0] + 10 * x[1], [x], [d1, d2], grid)
    assert values.tolist() == [[1 + a + 10 * (2 + 3 * b) for b in (-1, 0, 2)] for a in (-1, 0, 2)]
    assert loss_slice(lambda: x[0] * 1, [x], [d1], grid).tolist() == [0.0, 1.0, 3.0]
    assert x.tolist() == [1.0, 2.0]
    with pytest.raises(ZeroDivisionError):  # 中途出错也要复原
        loss_slice(lambda: x.sum() if x[0] < 2 else 1 / 0, [x], [d1], grid)
    assert x.tolist() == [1.0, 2.0]
    for count in (0, 3):
        with pytest.raises(ValueError, match="应给 1 或 2 个"):
            loss_slice(lambda: x.sum(), [x], [d1] * count, grid)


# ---------------------------------------------------------------- 梯度噪声


def test_per_sample_gradients_equal_a_loop() -> None:
    model, _ = net_and_loss()
    x, y = normal(4, 3), torch.tensor([0, 1, 1, 0])
    together = per_sample_gradients(model, nn.functional.cross_entropy, x, y)
    for i in range(4):
        loss = nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        alone = torch.autograd.grad(loss, list(model.parameters()))
        assert_equal(together[i], torch.cat([g.flatten() for g in alone]), 1e-12)


def test_both_estimators_are_exactly_unbiased() -> None:
    """总体是 6 个样本、有放回地抽：把全部可能的批都列出来，估计的平均应恰为真值。"""
    grads = normal(6, 4) + 0.5
    signal = grads.mean(dim=0).square().sum().item()
    noise = (grads - grads.mean(dim=0)).square().sum().item() / 6
    pairs = [gradient_noise(grads[[i, j]]) for i in range(6) for j in range(6)]
    assert sum(e.signal for e in pairs) / 36 == pytest.approx(signal, rel=1e-12)
    assert sum(e.noise for e in pairs) / 36 == pytest.approx(noise, rel=1e-12)
    single = grads.square().sum(dim=1).mean().item()
    triple = torch.stack(
        [grads[[i, j, k]].mean(0) for i in range(6) for j in range(6) for k in range(6)]
    )
    estimate = gradient_noise_from_batches(single, triple.square().sum(1).mean().item(), 1, 3)
    assert estimate.signal == pytest.approx(signal, rel=1e-12)
    assert estimate.noise == pytest.approx(noise, rel=1e-12)
    assert estimate.scale == pytest.approx(noise / signal, rel=1e-12)


def test_noise_scale_of_linear_regression() -> None:
    """``x ~ N(0, I)``，``y = w*·x + ε``，``δ = w − w*``：``G = δ``，``tr Σ = (P+1)|δ|² + σ²P``。"""
    features, sigma = 5, 0.7
    x, w_true, w = normal(20_000, features), normal(features, seed=1), normal(features, seed=2)
    y = x @ w_true + sigma * normal(20_000, seed=3)
    model = nn.Linear(features, 1, bias=False).double()
    model.weight.data[0] = w
    half_square = lambda out, target: 0.5 * (out.squeeze(1) - target).square().sum()  # noqa: E731
    measured = gradient_noise(per_sample_gradients(model, half_square, x, y))
    square = (w - w_true).square().sum().item()
    assert measured.signal == pytest.approx(square, rel=0.05)
    noise = (features + 1) * square + sigma**2 * features
    assert measured.noise == pytest.approx(noise, rel=0.05)


def test_noise_estimators_reject_bad_input() -> None:
    with pytest.raises(ValueError, match="至少要两个"):
        gradient_noise(normal(1, 3))
    for small, big in ((4, 4), (8, 4), (0, 4)):
        with pytest.raises(ValueError, match="0 < small < big"):
            gradient_noise_from_batches(1.0, 0.5, small, big)
