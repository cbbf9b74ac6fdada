"""合成的二维数据：可复现、不重叠、几何正确，贝叶斯后验等于暴力积分。"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from utils import make_generator, synth_points


def rows(x: Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in x}


@pytest.mark.parametrize("make", [synth_points.two_spirals, synth_points.two_moons])
def test_points_are_determined_by_the_generator(make) -> None:
    before = torch.get_rng_state()
    first, again, other = (make(41, make_generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), before)  # 不碰全局的随机数
    generator = make_generator(0)
    train, test = make(500, generator), make(500, generator)
    assert not rows(train[0]) & rows(test[0])
    assert train[1].bincount().tolist() == [250, 250] and train[1].dtype == torch.int64


def test_two_spirals_without_noise_lie_on_the_arms() -> None:
    points, labels = synth_points.two_spirals(101, make_generator(0), noise=0.0)
    radius = points.norm(dim=1)
    turns = synth_points.SPIRAL_TURNS * (radius - 0.1) / 0.9
    angle = 2 * math.pi * turns + math.pi * labels
    expected = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    torch.testing.assert_close(points, expected, rtol=0, atol=1e-5)
    assert radius.min() >= 0.1 and radius.max() <= 1.0


def test_two_moons_without_noise_lie_on_half_circles() -> None:
    points, labels = synth_points.two_moons(200, make_generator(0), noise=0.0)
    centers = torch.tensor([[0.0, 0.0], [1.0, 0.5]])[labels]
    offset = points - centers
    torch.testing.assert_close(offset.norm(dim=1), torch.ones(200))
    assert (offset[labels == 0, 1] >= 0).all() and (offset[labels == 1, 1] <= 0).all()


@pytest.mark.parametrize("make", [synth_points.two_spirals, synth_points.two_moons])
def test_noise_has_the_requested_size(make) -> None:
    clean, _ = make(8000, make_generator(0), noise=0.0)
    noisy, _ = make(8000, make_generator(0), noise=0.2)
    assert (noisy - clean).std(dim=0).tolist() == pytest.approx([0.2, 0.2], rel=0.03)


def curves(kind: str, t: np.ndarray, label: int) -> tuple[np.ndarray, np.ndarray]:
    """与被测代码无关的写法：用复数表示平面上的点。"""
    if kind == "spiral":
        z = (0.1 + 0.9 * t) * np.exp(1j * np.pi * (2 * synth_points.SPIRAL_TURNS * t + label))
    else:
        z = np.exp(1j * np.pi * t)
        z = z if label == 0 else 1 + 0.5j - z
    return z.real, z.imag


def brute_force_posterior(kind: str, point: Tensor, noise: float, steps: int = 200_001) -> float:
    """逐条曲线用梯形公式求 ``∫ N(x; γ_c(t), noise² I) dt``，不取对数，不用 cdist。"""
    t = np.linspace(0, 1, steps)
    density = []
    for label in (0, 1):
        x, y = curves(kind, t, label)
        distance2 = (x - point[0].item()) ** 2 + (y - point[1].item()) ** 2
        values = np.exp(-distance2 / (2 * noise**2))
        density.append((values.sum() - (values[0] + values[-1]) / 2) / (steps - 1))
    return density[1] / (density[0] + density[1])


@pytest.mark.parametrize(
    ("kind", "bayes", "noise"),
    [
        ("spiral", synth_points.spiral_bayes, synth_points.SPIRAL_NOISE),
        ("spiral", synth_points.spiral_bayes, 0.2),
        ("moon", synth_points.moon_bayes, synth_points.MOON_NOISE),
        ("moon", synth_points.moon_bayes, 0.4),
    ],
)
def test_bayes_posterior_equals_a_brute_force_integral(kind: str, bayes, noise: float) -> None:
    points = torch.tensor(
        [[0.0, 0.0], [0.3, 0.2], [-0.35, 0.4], [0.05, -0.6], [1.0, 0.1], [-0.3, 0.05]],
        dtype=torch.float64,
    )
    expected = [brute_force_posterior(kind, point, noise) for point in points]
    assert bayes(points, noise).tolist() == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.15  # 不是空洞的对照


def test_symmetries_of_the_posterior() -> None:
    points = torch.randn(50, 2, generator=make_generator(0), dtype=torch.float64)
    # 螺旋转半圈、双月绕 (½, ¼) 转半圈，都是换一类
    flipped = synth_points.spiral_bayes(-points)
    torch.testing.assert_close(flipped, 1 - synth_points.spiral_bayes(points))
    center = torch.tensor([0.5, 0.25], dtype=torch.float64)
    flipped = synth_points.moon_bayes(2 * center - points)
    torch.testing.assert_close(flipped, 1 - synth_points.moon_bayes(points))


@pytest.mark.parametrize("name", ["spiral", "moon"])
def test_bayes_accuracy_is_calibrated(name: str) -> None:
    make = {"spiral": synth_points.two_spirals, "moon": synth_points.two_moons}[name]
    posterior_of = {"spiral": synth_points.spiral_bayes, "moon": synth_points.moon_bayes}[name]
    points, labels = make(20_000, make_generator(0))
    posterior = posterior_of(points)
    accuracy = ((posterior > 0.5) == labels).float().mean().item()
    claimed = torch.maximum(posterior, 1 - posterior).mean().item()
    assert accuracy == pytest.approx(claimed, abs=0.003)  # 自称的把握等于实际的准确率
    assert 0.95 < accuracy < 0.999
