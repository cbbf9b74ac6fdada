"""批迭代器：与手算的归一化相同，次序只由生成器决定。"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from utils.datasets import ImageBatches, TensorBatches, channel_stats
from utils.seed import make_generator


@pytest.fixture
def pictures() -> tuple[Tensor, Tensor]:
    """10 张双通道小图；标签就是序号，便于追踪。"""
    images = torch.randint(0, 256, (10, 2, 3, 3), generator=make_generator(0)).to(torch.uint8)
    return images, torch.arange(10)


def test_channel_stats_equal_float64_formulas(pictures) -> None:
    images, _ = pictures
    mean, std = channel_stats(images)
    values = images.double() / 255
    torch.testing.assert_close(mean.double(), values.mean((0, 2, 3)), atol=1e-7, rtol=0)
    expected = values.std((0, 2, 3), correction=0)
    torch.testing.assert_close(std.double(), expected, atol=1e-7, rtol=0)
    assert mean.dtype == std.dtype == torch.float32


def test_constant_channel_is_not_divided_by_zero() -> None:
    mean, std = channel_stats(torch.full((4, 1, 2, 2), 255, dtype=torch.uint8))
    assert (mean.tolist(), std.tolist()) == ([1.0], [1.0])


def test_batches_in_order_equal_hand_computed_normalisation(pictures) -> None:
    images, labels = pictures
    mean, std = torch.tensor([0.5, 0.25]), torch.tensor([0.5, 2.0])
    batches = list(ImageBatches(images, labels, 4, mean=mean, std=std))
    assert [y.tolist() for _, y in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    x = torch.cat([x for x, _ in batches])
    expected = (images.double() / 255 - mean.double().view(2, 1, 1)) / std.double().view(2, 1, 1)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double(), expected, atol=1e-6, rtol=0)


def test_batches_normalise_to_zero_mean_and_unit_std_by_default(pictures) -> None:
    x = torch.cat([x for x, _ in ImageBatches(*pictures, 3)]).double()
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(2).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        x.std((0, 2, 3), correction=0), torch.ones(2).double(), atol=1e-6, rtol=0
    )


def orders(batches: ImageBatches, epochs: int) -> list[list[int]]:
    return [torch.cat([y for _, y in batches]).tolist() for _ in range(epochs)]


def test_shuffling_is_driven_by_the_generator_alone(pictures) -> None:
    first = orders(ImageBatches(*pictures, 3, generator=make_generator(1)), 3)
    torch.manual_seed(99)
    assert orders(ImageBatches(*pictures, 3, generator=make_generator(1)), 3) == first
    assert all(sorted(order) == list(range(10)) for order in first)  # 每轮不重不漏
    assert len({tuple(order) for order in first}) == 3  # 每轮重新打乱
    assert orders(ImageBatches(*pictures, 3), 2) == [list(range(10))] * 2


def test_generator_state_is_the_data_order(pictures) -> None:
    generator = make_generator(1)
    batches = ImageBatches(*pictures, 3, generator=generator)
    orders(batches, 1)
    state = generator.get_state()
    expected = orders(batches, 2)
    generator.set_state(state)  # 续训：恢复生成器就恢复了此后的数据顺序
    assert orders(batches, 2) == expected


def test_shuffled_images_stay_with_their_labels(pictures) -> None:
    images, _ = pictures
    zero, one = torch.zeros(2), torch.ones(2)
    for x, y in ImageBatches(*pictures, 4, generator=make_generator(0), mean=zero, std=one):
        torch.testing.assert_close(x, images[y] / 255)


@pytest.mark.parametrize(
    ("batch_size", "drop_last", "sizes"),
    [
        (4, False, [4, 4, 2]),
        (4, True, [4, 4]),
        (5, False, [5, 5]),
        (5, True, [5, 5]),
        (64, False, [10]),
        (64, True, []),
    ],
)
def test_batch_sizes_and_lengths(pictures, batch_size, drop_last, sizes) -> None:
    batches = ImageBatches(*pictures, batch_size, drop_last=drop_last)
    assert [len(y) for _, y in batches] == sizes
    assert (len(batches), batches.num_samples) == (len(sizes), sum(sizes))


def test_transform_gets_the_float_batch_and_the_generator(pictures) -> None:
    seen = []

    def transform(x: Tensor, generator: torch.Generator | None) -> Tensor:
        seen.append((x.dtype, x.shape, generator))
        return x + 100

    generator = make_generator(0)
    plain = [x for x, _ in ImageBatches(*pictures, 6, generator=make_generator(0))]
    changed = [x for x, _ in ImageBatches(*pictures, 6, generator=generator, transform=transform)]
    for before, after in zip(plain, changed, strict=True):
        assert torch.equal(after, before + 100)
    expected = [(torch.float32, (size, 2, 3, 3), generator) for size in (6, 4)]
    assert seen == expected
    seen.clear()
    list(ImageBatches(*pictures, 10, transform=transform))
    assert seen[0][2] is None


def test_stored_images_are_not_modified(pictures) -> None:
    images, labels = pictures
    before = images.clone()
    for x, _ in ImageBatches(images, labels, 4):
        x.zero_()
    assert torch.equal(images, before)


def test_wrong_inputs_are_refused(pictures) -> None:
    images, labels = pictures
    for wrong in (images.float(), images[:, 0]):
        with pytest.raises(ValueError, match=r"images 应为 uint8 \(N, C, H, W\)，实为"):
            ImageBatches(wrong, labels, 2)
    with pytest.raises(ValueError, match="应非空且等长，实为 9 与 10"):
        ImageBatches(images[:9], labels, 2)
    with pytest.raises(ValueError, match="应非空且等长，实为 0 与 0"):
        TensorBatches(images[:0], labels[:0], 2)
    with pytest.raises(ValueError, match="batch_size=0 应至少为 1"):
        ImageBatches(images, labels, 0)


def test_tensor_batches_hand_out_rows_unchanged() -> None:
    x, y = torch.randn(7, 3, generator=make_generator(0)), torch.arange(7)
    assert [len(batch) for batch, _ in TensorBatches(x, y, 3)] == [3, 3, 1]
    assert torch.equal(torch.cat([batch for batch, _ in TensorBatches(x, y, 3)]), x)
    for batch, rows in TensorBatches(x, y, 3, generator=make_generator(1), drop_last=True):
        assert torch.equal(batch, x[rows]) and len(rows) == 3
