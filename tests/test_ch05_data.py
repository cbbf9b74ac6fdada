"""第 5 章的数据：归一化、增强、混合与进程数无关；训练丢掉零头，评估一张不少。"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from chapter_03_optimization_regularization.regularization import cutmix, mixup
from chapter_04_cnn_classic.augment import Augment
from chapter_05_resnet_modern_cnn import data as data_module
from chapter_05_resnet_modern_cnn.data import AUGMENTS, DATASETS, Data, Mix, load_data
from utils import UserError, make_generator
from utils.datasets import IMAGE_DATASETS, ImageSet, channel_stats
from utils.distributed import World

needs_torchvision = pytest.mark.usefixtures("needs_torchvision")


def image_set(count: int, seed: int, classes: int = 3) -> ImageSet:
    """第 i 张图左上角的像素写着 i：任意两张都不同，可以追踪。"""
    images = torch.randint(256, (count, 3, 8, 8), generator=make_generator(seed))
    images[:, 0, 0, 0] = torch.arange(count)
    labels = torch.arange(count) % classes
    return ImageSet(images.to(torch.uint8), labels, tuple("abc"[:classes]))


@pytest.fixture
def data() -> Data:
    splits = {"train": image_set(21, 0), "val": image_set(7, 1), "test": image_set(7, 2)}
    mean, std = channel_stats(splits["train"].images)
    return Data(splits, mean, std, Augment(hflip=0.5, shift=2))


def as_world(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    """扮作 ``size`` 个进程中的 ``rank`` 号。"""
    monkeypatch.setattr(data_module, "world", lambda: World(rank, size))


def draw(data: Data, batch_size: int = 6, **changes) -> list[tuple[Tensor, Tensor]]:
    """两轮训练批；每轮重新打乱、增强、混合。"""
    options = {"augmented": False, "mixup": 0.0, "cutmix": 0.0, "device": "cpu", **changes}
    batches, _ = data.training(batch_size, make_generator(5), **options)
    return [*batches, *batches]


def identities(data: Data, x: Tensor) -> list[int]:
    """由左上角的像素认出各是哪一张。"""
    return ((x[:, 0, 0, 0] * data.std[0] + data.mean[0]) * 255).round().int().tolist()


# ---------------------------------------------------------------- 批


def test_training_batches_drop_the_remainder_and_shuffle(data: Data) -> None:
    batches, steps = data.training(
        6, make_generator(5), augmented=False, mixup=0, cutmix=0, device="cpu"
    )
    epochs = [[*batches] for _ in range(2)]
    assert steps == 3 == len(epochs[0])  # 21 张，丢掉 3 张
    seen = [[i for x, _ in epoch for i in identities(data, x)] for epoch in epochs]
    assert all(len(set(order)) == 18 and set(order) < set(range(21)) for order in seen)
    assert seen[0] != seen[1] and seen[0] != sorted(seen[0])
    for x, y in epochs[0]:  # 标签跟着图像走
        assert y.tolist() == [i % 3 for i in identities(data, x)]


def test_normalisation_uses_the_training_statistics(data: Data) -> None:
    images = data.splits["train"].images.double() / 255
    mean, std = images.mean(dim=(0, 2, 3)), images.std(dim=(0, 2, 3), correction=0)
    for split in ("train", "val", "test"):
        found = torch.cat([x for x, _ in data.batches(split, 4)])
        expected = data.splits[split].images / 255.0
        expected = (expected - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_evaluation_is_complete_in_order_and_untouched(data: Data) -> None:
    for split in ("val", "test"):
        batches = [*data.evaluation(split, "cpu")]
        x = torch.cat([x for x, _ in batches])
        assert identities(data, x) == list(range(7))
        assert torch.equal(x, torch.cat([x for x, _ in data.batches(split, 3)]))
    assert torch.equal(torch.cat([y for _, y in batches]), data.splits["test"].labels)


def test_vacated_pixels_are_black_after_normalisation(data: Data) -> None:
    white = data.splits["train"].images.clone().fill_(255)
    train = data.splits["train"]._replace(images=white)
    shifted = Data({**data.splits, "train": train}, data.mean, data.std, Augment(shift=2))
    x = torch.cat([x for x, _ in draw(shifted, augmented=True)])
    pixels = (x * data.std.view(3, 1, 1) + data.mean.view(3, 1, 1)) * 255
    dark = pixels.abs() < 0.01
    assert dark.any() and ((pixels - 255).abs() < 0.01)[~dark].all()


def test_augmentation_only_where_asked(data: Data) -> None:
    plain, augmented = draw(data), draw(data, augmented=True)
    assert torch.equal(plain[0][1], augmented[0][1])  # 第一批：增强之前先打乱，次序相同
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(plain, augmented, strict=True))
    everything = torch.cat([x for x, _ in data.batches("train", 6, make_generator(0))])
    rows = {row.numpy().tobytes() for row in torch.cat([x for x, _ in data.batches("train")])}
    assert {row.numpy().tobytes() for row in everything} < rows


# ---------------------------------------------------------------- 与进程数无关


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"augmented": True},
        {"augmented": True, "mixup": 0.4, "cutmix": 1.0},
    ],
    ids=["plain", "augmented", "mixed"],
)
@pytest.mark.parametrize("size", [2, 3, 6])
def test_processes_together_see_the_batches_of_one(
    options: dict, size: int, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """各进程的一份拼起来，与一个进程看到的逐位相同。"""
    whole = draw(data, **options)
    shards = []
    for rank in range(size):
        as_world(monkeypatch, rank, size)
        shards.append(draw(data, **options))
    assert len(whole) == 6
    for step, (x, y) in enumerate(whole):
        parts = [shard[step] for shard in shards]
        assert [len(part) for part, _ in parts] == [6 // size] * size
        assert torch.equal(torch.cat([part for part, _ in parts]), x)
        assert torch.equal(torch.cat([labels for _, labels in parts]), y)


@pytest.mark.parametrize("size", [2, 5, 9])
def test_processes_together_evaluate_everything_once(
    size: int, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "EVAL_BATCH", 4)
    seen = []
    for rank in range(size):
        as_world(monkeypatch, rank, size)
        seen += [i for x, _ in data.evaluation("test", "cpu") for i in identities(data, x)]
    assert sorted(seen) == list(range(7))


@pytest.mark.parametrize(
    ("batch", "size", "words"),
    [
        (22, 1, "--batch-size 22 超过训练集的 21 张：请减小"),
        (5, 2, "--batch-size 5 不能由 2 个进程平分：应为 2 的倍数，如 4$"),
        (2, 4, "--batch-size 2 不能由 4 个进程平分：应为 4 的倍数，如 4$"),
    ],
)
def test_batches_that_cannot_be_dealt(
    batch: int, size: int, words: str, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_world(monkeypatch, 0, size)
    with pytest.raises(UserError, match=words):
        draw(data, batch)
    as_world(monkeypatch, 0, 1)
    assert len(draw(data, 21)) == 2  # 恰好一批


# ---------------------------------------------------------------- mixup 与 CutMix


def mixed(alpha_mixup: float, alpha_cutmix: float, count: int = 200) -> list:
    x = torch.rand(4, 1, 8, 8, generator=make_generator(0))
    batches = [(x, torch.tensor([0, 1, 2, 2]))] * count
    return [*Mix(batches, 3, alpha_mixup, alpha_cutmix, make_generator(1))]


def test_each_kind_of_mixing_alone_is_the_function_of_chapter_3() -> None:
    x, y = torch.rand(4, 1, 8, 8, generator=make_generator(0)), torch.tensor([0, 1, 2, 2])
    for function, alphas in ((mixup, (0.4, 0.0)), (cutmix, (0.0, 0.7))):
        generator = make_generator(1)
        for found in mixed(*alphas, count=3):
            torch.randint(1, (), generator=generator)
            expected = function(x, y, 3, max(alphas), generator)
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 1, "cutmix": 1}])
def test_any_mixing_makes_soft_labels(options: dict, data: Data) -> None:
    plain, softened = draw(data), draw(data, **options)
    assert all(y.shape == (6,) for _, y in plain)
    assert all(y.shape == (6, 3) for _, y in softened)


def test_both_kinds_take_turns_by_chance() -> None:
    """CutMix 的每个像素都来自某一张原图，mixup 的则几乎都不是；各约一半。"""
    x = torch.rand(4, 1, 8, 8, generator=make_generator(0))
    cut = 0
    for found, labels in mixed(1.0, 1.0):
        assert labels.shape == (4, 3) and labels.dtype == torch.float32
        torch.testing.assert_close(labels.sum(dim=1), torch.ones(4))
        assert (found >= 0).all() and (found <= 1).all()
        cut += bool((found[:, None] == x).any(dim=1).all())
    assert 70 <= cut <= 130  # 200 次，标准差 7


# ---------------------------------------------------------------- 读入


def test_every_dataset_has_an_augmentation() -> None:
    assert set(DATASETS) == set(AUGMENTS) == set(IMAGE_DATASETS)
    for name in ("synth-objects", "synth-digits", "mnist"):  # 翻转之后就不是它自己了
        assert AUGMENTS[name].hflip == 0


def test_synthetic_objects_as_loaded() -> None:
    data = load_data("synth-objects", limit=60)
    assert data.shape == (3, 32, 32) and len(data.class_names) == 10
    assert [len(data.splits[s].labels) for s in ("train", "val", "test")] == [60] * 3
    assert data.chance == pytest.approx(0.1)
    mean, std = channel_stats(data.splits["train"].images)
    assert torch.equal(data.mean, mean) and torch.equal(data.std, std)
    assert data.augment is AUGMENTS["synth-objects"]


def test_chance_is_the_largest_class_of_the_test_set(data: Data) -> None:
    assert data.chance == 3 / 7  # 标签 0 1 2 0 1 2 0


@needs_torchvision
def test_folder_with_one_class(tmp_path: Path, write_class_folders) -> None:
    write_class_folders(tmp_path, {"cat": 20})
    with pytest.raises(UserError, match=r"只有 \('cat',\) 一个类别"):
        load_data("folder", tmp_path)


@needs_torchvision
def test_folder_with_three_classes(tmp_path: Path, write_class_folders) -> None:
    write_class_folders(tmp_path, {"a": 20, "b": 20, "c": 20})
    data = load_data("folder", tmp_path, image_size=16)
    assert data.shape == (3, 16, 16) and data.class_names == ("a", "b", "c")
    assert sum(len(split.labels) for split in data.splits.values()) == 60


@needs_torchvision
def test_zero_byte_image_is_named(tmp_path: Path, write_class_folders) -> None:
    write_class_folders(tmp_path, {"cat": 20, "dog": 20})
    (tmp_path / "dog" / "003.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"003\.png 无法解码"):
        load_data("folder", tmp_path)
