"""第 4 章的增强：逐张与 torchvision 的函数相等；随机参数的范围与生成器；填充。"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from chapter_04_cnn_classic import augment
from chapter_04_cnn_classic.augment import Augment
from chapter_04_cnn_classic.data import AUGMENTS
from tests.parity import assert_equal, normal
from utils import make_generator

needs_torchvision = pytest.mark.usefixtures("needs_torchvision")
SHAPE = (6, 3, 11, 8)  # 高宽不等，一奇一偶


@pytest.fixture
def x() -> Tensor:
    return normal(*SHAPE)


@needs_torchvision
def test_flip(x: Tensor) -> None:
    from torchvision.transforms import functional

    chosen = torch.tensor([True, False, True, True, False, False])
    expected = [functional.hflip(i) if c else i for i, c in zip(x, chosen, strict=True)]
    assert torch.equal(augment.flip(x, chosen), torch.stack(expected))


@needs_torchvision
def test_crop(x: Tensor) -> None:
    from torchvision.transforms import functional

    top, left = torch.tensor([0, 1, 4, 2, 3, 0]), torch.tensor([3, 0, 1, 2, 3, 0])
    cut = augment.crop(x, top, left, 7, 5)
    for i, image in enumerate(x):
        assert torch.equal(cut[i], functional.crop(image, int(top[i]), int(left[i]), 7, 5))


@needs_torchvision
@pytest.mark.parametrize("fill", [0.0, -1.5])
def test_shift_equals_affine_translation_and_padded_crop(x: Tensor, fill: float) -> None:
    from torchvision.transforms import functional

    down, right = torch.tensor([0, 2, -3, 1, 0, -1]), torch.tensor([1, 0, 2, -3, 0, -2])
    moved = augment.shift(x, down, right, fill)
    for i, image in enumerate(x):
        dy, dx = int(down[i]), int(right[i])
        affine = functional.affine(image, 0.0, [dx, dy], 1.0, [0.0], fill=[fill] * 3)
        padded = functional.pad(image, [3, 3, 3, 3], fill=fill)
        assert_equal(moved[i], affine)
        assert torch.equal(moved[i], functional.crop(padded, 3 - dy, 3 - dx, *SHAPE[2:]))


@needs_torchvision
def test_rotate(x: Tensor) -> None:
    from torchvision.transforms import InterpolationMode, functional

    degrees = torch.tensor([0.0, 10.0, -25.0, 90.0, 180.0, 3.5], dtype=torch.float64)
    turned = augment.rotate(x, degrees)
    for i, image in enumerate(x):
        expected = functional.rotate(image, float(degrees[i]), InterpolationMode.BILINEAR)
        # torchvision 在内部用 float32 的网格
        assert_equal(turned[i], expected, tolerance=2e-6)


def test_rotate_equals_grid_sample_exactly(x: Tensor) -> None:
    height, width = SHAPE[2:]
    degrees = torch.linspace(-180, 180, 6, dtype=torch.float64)
    theta = degrees * torch.pi / 180
    cos, sin, zero = theta.cos(), theta.sin(), torch.zeros_like(theta)
    # 归一化坐标里，长边短边的比例要换算进矩阵
    rows = torch.stack([cos, -sin * height / width, zero, sin * width / height, cos, zero], dim=1)
    grid = torch.nn.functional.affine_grid(rows.view(-1, 2, 3), list(SHAPE), align_corners=False)
    expected = torch.nn.functional.grid_sample(x, grid, align_corners=False)
    assert_equal(augment.rotate(x, degrees), expected)


def test_rotate_by_right_angles_moves_pixels() -> None:
    x = normal(1, 2, 5, 5)
    turned = augment.rotate(x, torch.tensor([90.0], dtype=torch.float64))
    assert_equal(turned, x.rot90(1, (2, 3)))  # 逆时针


@needs_torchvision
def test_erase(x: Tensor) -> None:
    from torchvision.transforms import functional

    top, left = torch.tensor([0, 3, 8, -2, 5, 1]), torch.tensor([2, -1, 6, 0, 3, 4])
    erased = augment.erase(x, top, left, 4, 0.25)
    for i, image in enumerate(x):
        t, b = max(0, int(top[i])), min(11, int(top[i]) + 4)
        le, r = max(0, int(left[i])), min(8, int(left[i]) + 4)
        expected = functional.erase(image, t, le, b - t, r - le, torch.tensor(0.25))
        assert torch.equal(erased[i], expected)


def test_fill_may_differ_by_channel(x: Tensor) -> None:
    fill = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    moved = augment.shift(x, torch.full((6,), 4), torch.zeros(6, dtype=torch.int64), fill)
    assert_equal(moved[:, :, :4], fill.view(1, 3, 1, 1).expand(6, 3, 4, 8))
    turned = augment.rotate(x, torch.full((6,), 45.0, dtype=torch.float64), fill)
    assert_equal(turned[:, :, 0, 0], fill.expand(6, 3))  # 转过 45 度，角上落在图外
    erased = augment.erase(x, torch.zeros(6), torch.zeros(6), 2, fill)
    assert_equal(erased[:, :, :2, :2], fill.view(1, 3, 1, 1).expand(6, 3, 2, 2))


def test_random_parameters_differ_by_image_and_cover_the_range() -> None:
    x = torch.zeros(400, 1, 9, 9)
    x[:, :, 4, 4] = 1.0
    moved = Augment(shift=2)(x, make_generator(0)).flatten(1).argmax(dim=1)
    rows, columns = moved // 9 - 4, moved % 9 - 4
    assert set(rows.tolist()) == set(columns.tolist()) == {-2, -1, 0, 1, 2}
    assert len({*zip(rows.tolist(), columns.tolist(), strict=True)}) == 25  # 两个方向独立

    ramp = torch.arange(9.0).expand(400, 1, 9, 9)
    flipped = (Augment(hflip=0.3)(ramp, make_generator(0))[:, 0, 0, 0] == 8).float().mean()
    assert 0.22 < flipped < 0.38
    holes = (Augment(cutout=4)(torch.ones(400, 1, 9, 9), make_generator(0)) == 0).sum((1, 2, 3))
    assert holes.max() == 16 and holes.min() == 4  # 中心在角上时只剩四分之一


def test_same_generator_same_result_and_input_untouched() -> None:
    x, full = torch.randn(5, 3, 16, 16, generator=make_generator(1)), Augment(0.5, 3, 15, 6)
    before = x.clone()
    first, second = (full(x, make_generator(9)) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(x, before)
    assert not torch.equal(first, full(x, make_generator(10)))
    assert torch.equal(Augment()(x, make_generator(0)), x)


def test_digits_are_never_mirrored() -> None:
    assert AUGMENTS["mnist"].hflip == AUGMENTS["synth-digits"].hflip == 0


@pytest.mark.parametrize("options", [{"hflip": 1.5}, {"shift": -1}, {"degrees": -3.0}])
def test_bad_options(options: dict) -> None:
    with pytest.raises(ValueError, match="hflip 应在 0 与 1 之间"):
        Augment(**options)


def test_shift_of_the_whole_batch_by_hand() -> None:
    x = torch.arange(6.0).view(1, 1, 2, 3)
    assert augment.shift(x, 0, 1, 9.0)[0, 0].tolist() == [[9, 0, 1], [9, 3, 4]]
    assert augment.shift(x, -1, -2, 9.0)[0, 0].tolist() == [[5, 9, 9], [9, 9, 9]]
    assert torch.equal(augment.shift(x, 0, 0), x)
    assert augment.shift(x, 2, 0, 9.0).eq(9).all()  # 整张移出图外


def test_fill_may_differ_by_image(x: Tensor) -> None:
    fill = torch.arange(6.0, dtype=torch.float64).view(6, 1, 1, 1)
    assert augment.shift(x, 0, 2, fill)[..., :2].eq(fill).all()
    assert augment.shift(x, 11, 0, fill).eq(fill).all()
