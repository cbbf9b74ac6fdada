"""数据集：像素逐一核对，划分互不重叠，坏文件给出一行说明。

真实数据都在 ``tmp_path`` 里按真实格式现造；需要 torchvision 的测试在它不可用时跳过。
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import write_idx
from utils import datasets
from utils.cli import UserError
from utils.datasets import (
    SPLITS,
    ImageSet,
    import_torchvision,
    load_images,
)
from utils.seed import make_generator

needs_torchvision = pytest.mark.usefixtures("needs_torchvision")


def fingerprints(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


# ---------------------------------------------------------------- synth-digits


@pytest.fixture(scope="module")
def synth() -> dict[str, ImageSet]:
    """三个划分，各取一部分。"""
    return {split: load_images("synth-digits", split, limit=300) for split in SPLITS}


def test_synth_digits_layout_and_balance(synth: dict[str, ImageSet]) -> None:
    for data in synth.values():
        assert data.images.dtype == torch.uint8 and data.images.shape == (300, 1, 28, 28)
        assert data.labels.dtype == torch.int64
        assert torch.bincount(data.labels).tolist() == [30] * 10  # 各类一样多
        assert data.labels[:50].unique().numel() > 5  # 次序已打乱
        assert data.class_names == tuple("0123456789")
        # 黑底白字：边缘暗，中间亮，而且每张图都有墨迹
        edge, centre = data.images[..., :2].float().mean(), data.images[..., 8:20, 10:18].float()
        assert edge < 60 < centre.mean()
        assert data.images.flatten(1).amax(1).min() > 100


def test_synth_digits_are_deterministic_whatever_the_global_seed(
    synth: dict[str, ImageSet],
) -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = load_images("synth-digits", "train", limit=300)
    assert torch.equal(again.images, synth["train"].images)
    assert torch.equal(again.labels, synth["train"].labels)
    assert torch.equal(torch.get_rng_state(), state)
    other = load_images("synth-digits", "train", generator=make_generator(1), limit=300)
    assert not torch.equal(other.images, again.images)


def test_synth_digits_splits_do_not_overlap(synth: dict[str, ImageSet]) -> None:
    found = [fingerprints(data.images) for data in synth.values()]
    assert len(set.union(*found)) == sum(map(len, found)) == 900  # 划分内也没有重复的图


@pytest.mark.parametrize("name", ["synth-digits", "synth-objects"])
def test_generators_in_one_state_still_give_different_splits(name: str) -> None:
    found = [load_images(name, split, generator=make_generator(5), limit=40) for split in SPLITS]
    seen = [fingerprints(data.images) for data in found]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    again = load_images(name, "val", generator=make_generator(5), limit=40)
    assert torch.equal(again.images, found[1].images)


def test_synth_digits_default_sizes() -> None:
    assert datasets.SYNTH_SIZES == {"train": 12_000, "val": 2_000, "test": 2_000}
    assert len(load_images("synth-digits", "test").images) == 2_000


def test_synth_digits_need_no_torchvision(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)  # 导入即 ImportError
    assert len(load_images("synth-digits", "test", limit=20).images) == 20
    with pytest.raises(
        UserError,
        match=r"torchvision 不可用（.*）.*pip install.*synth-digits 与 synth-objects 不受影响",
    ):
        import_torchvision()


def test_unknown_names_are_refused() -> None:
    with pytest.raises(
        ValueError, match="数据集 'minst' 不认识：可选 synth-digits、synth-objects、mnist"
    ):
        load_images("minst", "train")
    with pytest.raises(ValueError, match="划分 'valid' 不认识：可选 train、val、test"):
        load_images("mnist", "valid")


# ---------------------------------------------------------------- MNIST 与 FashionMNIST


def serial_numbers(images: Tensor) -> list[int]:
    """``write_mnist`` 写在前两个像素里的序号。"""
    return (images[:, 0, 0, 0].int() * 256 + images[:, 0, 0, 1].int()).tolist()


@needs_torchvision
@pytest.mark.parametrize(
    ("name", "kind", "class_name"),
    [("mnist", "MNIST", "3"), ("fashion-mnist", "FashionMNIST", "Dress")],
)
def test_mnist_pixels_labels_and_splits(
    tmp_path: Path, write_mnist, name: str, kind: str, class_name: str
) -> None:
    made = write_mnist(tmp_path, 60, 20, kind)
    test = load_images(name, "test", tmp_path)
    assert np.array_equal(test.images[:, 0].numpy(), made["test"][0])  # 次序不变，像素逐一相等
    assert test.labels.tolist() == made["test"][1].tolist()
    assert test.labels.dtype == torch.int64 and test.class_names[3] == class_name
    train, val = (load_images(name, split, tmp_path) for split in ("train", "val"))
    assert len(val.images) == 5 and len(train.images) == 55  # 1/12 作验证
    numbers = {"train": serial_numbers(train.images), "val": serial_numbers(val.images)}
    assert sorted(numbers["train"] + numbers["val"]) == list(range(60))  # 不重不漏
    for split, data in (("train", train), ("val", val)):
        for image, label, number in zip(data.images, data.labels, numbers[split], strict=True):
            assert np.array_equal(image[0].numpy(), made["train"][0][number])
            assert label == number % 10  # 图与标签没有错位


@needs_torchvision
def test_mnist_split_is_fixed_unless_a_generator_is_given(tmp_path: Path, write_mnist) -> None:
    write_mnist(tmp_path, 48, 4)

    def validation(generator: torch.Generator | None = None) -> list[int]:
        return serial_numbers(load_images("mnist", "val", tmp_path, generator).images)

    fixed = validation()
    torch.manual_seed(5)
    assert validation() == fixed
    assert validation(make_generator(3)) == validation(make_generator(3)) != fixed


@needs_torchvision
def test_limit_keeps_the_first_of_the_same_split(tmp_path: Path, write_mnist) -> None:
    write_mnist(tmp_path, 48, 8)
    whole, part = (
        load_images("mnist", "train", tmp_path),
        load_images("mnist", "train", tmp_path, limit=7),
    )
    assert serial_numbers(part.images) == serial_numbers(whole.images)[:7]
    assert torch.equal(part.labels, whole.labels[:7])


@needs_torchvision
def test_missing_mnist_names_folder_and_cure(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_images("mnist", "train", tmp_path)
    message = str(caught.value)
    assert f"应在 {tmp_path.resolve() / 'MNIST'}）缺失或不完整" in message
    assert "--data-dir" in message and "--download" in message and "\n" not in message


@needs_torchvision
def test_one_missing_file_is_reported(tmp_path: Path, write_mnist) -> None:
    write_mnist(tmp_path, 12, 4)
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="缺失或不完整"):
        load_images("mnist", "test", tmp_path)


@needs_torchvision
def test_truncated_idx_names_file_sizes_and_cure(tmp_path: Path, write_mnist) -> None:
    write_mnist(tmp_path, 12, 4)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])
    size = 16 + 12 * 784
    expected = f"{path} 已损坏：应有 {size} 字节，实有 {size - 100}；请删除后加 --download"
    with pytest.raises(UserError) as caught:
        load_images("mnist", "train", tmp_path)
    assert str(caught.value).startswith(expected)


@needs_torchvision
@pytest.mark.parametrize(
    "content", [b"", b"\0\0\x08", b"<html>404</html>", b"\0\0\x0d\x01" + b"\0" * 20]
)
def test_file_that_is_not_idx_is_named(tmp_path: Path, write_mnist, content: bytes) -> None:
    write_mnist(tmp_path, 12, 4)
    path = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path} 不是 IDX 文件：请删除后加 --download"):
        load_images("mnist", "train", tmp_path)


@needs_torchvision
def test_counts_that_disagree_name_folder_and_cure(tmp_path: Path, write_mnist) -> None:
    made = write_mnist(tmp_path, 12, 4)
    write_idx(tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte", made["test"][1])
    with pytest.raises(UserError, match=r"MNIST）的图像有 12 张而标签有 4 个：.*--download"):
        load_images("mnist", "train", tmp_path)


@needs_torchvision
def test_images_and_labels_swapped_is_a_user_error(tmp_path: Path, write_mnist) -> None:
    write_mnist(tmp_path, 12, 4)
    raw = tmp_path / "MNIST" / "raw"
    images, labels = raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"
    swapped = labels.read_bytes(), images.read_bytes()
    images.write_bytes(swapped[0])
    labels.write_bytes(swapped[1])
    with pytest.raises(UserError, match="缺失或不完整"):
        load_images("mnist", "train", tmp_path)


# ---------------------------------------------------------------- CIFAR-10


@needs_torchvision
def test_missing_and_damaged_cifar10_name_folder_and_cure(tmp_path: Path) -> None:
    # torchvision 会核对官方文件的 MD5，无法自造可用的一份，只测错误
    folder = tmp_path / "cifar-10-batches-py"
    pattern = rf"cifar10（应在 {folder.resolve()}）缺失或不完整；.*--data-dir.*--download"
    with pytest.raises(UserError, match=pattern):
        load_images("cifar10", "train", tmp_path)
    folder.mkdir()
    for i in range(1, 6):
        (folder / f"data_batch_{i}").write_bytes(b"damaged")
    with pytest.raises(UserError, match=pattern):
        load_images("cifar10", "train", tmp_path)


def test_cifar10_layout_is_converted_to_channels_first(tmp_path: Path, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)

    class Fake:
        """与 torchvision 的 CIFAR10 同样的三个属性：NHWC 数组、标签列表、类名。"""

        MNIST = FashionMNIST = None

        def __init__(self, root: str, train: bool, download: bool) -> None:
            self.data, self.targets = pixels, [i % 10 for i in range(24)]
            self.classes = list("abcdefghij")

    module = type(
        "torchvision",
        (),
        {"datasets": type("d", (), {"CIFAR10": Fake, "MNIST": Fake, "FashionMNIST": Fake})},
    )
    monkeypatch.setattr(datasets, "import_torchvision", lambda: module)
    test = load_images("cifar10", "test", tmp_path)
    assert test.images.shape == (24, 3, 32, 32) and test.images.is_contiguous()
    assert np.array_equal(test.images[5, 2].numpy(), pixels[5, :, :, 2])
    assert test.labels.tolist() == [i % 10 for i in range(24)]


# ---------------------------------------------------------------- 图片文件夹


def colours(data: ImageSet) -> list[tuple[int, int]]:
    """``write_class_folders`` 写进红、绿两个通道的 (类别, 序号)。"""
    return [(int(image[0, 0, 0]) // 50, int(image[1, 0, 0])) for image in data.images]


@needs_torchvision
def test_folder_is_split_8_1_1_without_overlap(tmp_path: Path, write_class_folders) -> None:
    write_class_folders(tmp_path, {"cat": 12, "dog": 9, "emu": 9}, size=(20, 16))
    sets = {s: load_images("folder", s, tmp_path, image_size=8) for s in SPLITS}
    assert {s: len(data.images) for s, data in sets.items()} == {"train": 24, "val": 3, "test": 3}
    everything = sorted(item for data in sets.values() for item in colours(data))
    assert everything == [(0, i) for i in range(12)] + [(k, i) for k in (1, 2) for i in range(9)]
    for data in sets.values():
        assert data.images.dtype == torch.uint8 and data.images.shape[1:] == (3, 8, 8)
        assert data.class_names == ("cat", "dog", "emu")
        assert data.labels.tolist() == [k for k, _ in colours(data)]
        assert (data.images[:, 2] == 7).all()  # 缩放与裁剪不改变纯色图


@needs_torchvision
def test_folder_with_train_and_test_carves_validation_from_train(
    tmp_path: Path, write_class_folders
) -> None:
    write_class_folders(tmp_path / "train", {"a": 12, "b": 12})
    write_class_folders(tmp_path / "test", {"a": 2, "b": 1})
    sets = {s: load_images("folder", s, tmp_path, image_size=8) for s in SPLITS}
    assert sorted(colours(sets["test"])) == [(0, 0), (0, 1), (1, 0)]
    assert len(sets["val"].images) == 2
    both = colours(sets["train"]) + colours(sets["val"])
    assert sorted(both) == [(k, i) for k in range(2) for i in range(12)]


@needs_torchvision
def test_folder_with_its_own_validation_uses_it(tmp_path: Path, write_class_folders) -> None:
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        write_class_folders(tmp_path / split, {"a": count, "b": count})
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        data = load_images("folder", split, tmp_path, image_size=8)
        assert sorted(colours(data)) == [(k, i) for k in range(2) for i in range(count)]


@needs_torchvision
def test_folder_splits_with_different_classes_are_refused(
    tmp_path: Path, write_class_folders
) -> None:
    # 测试集缺一类时，其后各类的编号都会悄悄错位
    write_class_folders(tmp_path / "train", {"a": 12, "b": 12})
    write_class_folders(tmp_path / "test", {"b": 3})
    with pytest.raises(UserError, match=r"test 的类别 \['b'\] 与 train 的 \['a', 'b'\] 不同"):
        load_images("folder", "test", tmp_path, image_size=8)


@needs_torchvision
def test_folder_with_train_but_no_test_is_not_taken_for_classes(
    tmp_path: Path, write_class_folders
) -> None:
    write_class_folders(tmp_path, {"train": 12, "val": 12})
    with pytest.raises(UserError, match="须同时有 train 与 test"):
        load_images("folder", "train", tmp_path, image_size=8)


@needs_torchvision
def test_folder_crops_the_centre_and_scales_the_short_side(tmp_path: Path) -> None:
    from PIL import Image

    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 200  # 只有正中三分之一是亮的
    (tmp_path / "a").mkdir()
    for i in range(12):
        Image.fromarray(pixels).save(tmp_path / "a" / f"{i}.png")
    data = load_images("folder", "train", tmp_path, image_size=10)
    assert (data.images == 200).all()


@needs_torchvision
def test_unusable_folders_say_what_was_expected(tmp_path: Path, write_class_folders) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    for name in ("absent", "file", "empty", "hollow"):
        with pytest.raises(
            UserError, match=f"{name} 不存在，或里面没有可用的图片：应为每类一个文件夹"
        ):
            load_images("folder", "train", tmp_path / name)
    write_class_folders(tmp_path / "few", {"cat": 3})
    with pytest.raises(UserError, match="图片太少（3 张），分不出 test 划分"):
        load_images("folder", "test", tmp_path / "few")


@needs_torchvision
@pytest.mark.parametrize(
    "content", [b"", b"not an image", None], ids=["empty", "text", "truncated"]
)
def test_corrupt_image_is_named(tmp_path: Path, write_class_folders, content) -> None:
    write_class_folders(tmp_path, {"cat": 20}, size=(64, 64))
    for path in (tmp_path / "cat").iterdir():  # 每张都损坏，就不必知道训练集抽到哪几张
        raw = path.read_bytes()
        path.write_bytes(raw[: len(raw) * 2 // 3] if content is None else content)
    with pytest.raises(
        UserError, match=rf"图片 {tmp_path}/cat/\d+.png 无法解码（.*）：请修复或移走它"
    ):
        load_images("folder", "train", tmp_path)
