"""第 4 章的场景：可重复，划分互不重叠，框紧贴看得见的部分，颜色分不出物体。"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chapter_04_cnn_classic import scenes as module
from chapter_04_cnn_classic.scenes import CLASS_NAMES, Scenes, load_scenes, make_scenes
from chapter_04_cnn_classic.unet import confusion_counts, mean_iou
from utils import make_generator
from utils.datasets import SPLITS

K = 1 + len(CLASS_NAMES)


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return make_scenes(300, make_generator(0))


def test_shapes_and_ranges(scenes: Scenes) -> None:
    images, masks, boxes, labels = scenes
    assert images.shape == (300, 3, 64, 64) and images.dtype == torch.uint8
    assert masks.shape == (300, 64, 64) and masks.dtype == torch.int64
    assert boxes.shape == (300, 4, 4) and boxes.dtype == torch.float32
    assert labels.shape == (300, 4) and labels.dtype == torch.int64
    assert masks.min() >= 0 and masks.max() < K
    assert labels.min() >= -1 and labels.max() < len(CLASS_NAMES)
    assert (labels[:, 0] >= 0).all()  # 至少一个物体
    assert images.float().std(dim=(1, 2, 3)).min() > 5  # 没有一片空白的


def test_same_generator_same_scenes() -> None:
    first, again, other = (make_scenes(6, make_generator(seed), size=48) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.images, other.images)


def test_global_generator_is_untouched() -> None:
    before = torch.get_rng_state()
    make_scenes(2, make_generator(0), size=32)
    assert torch.equal(torch.get_rng_state(), before)


def test_splits_do_not_overlap_and_are_the_same_for_everyone() -> None:
    splits = {split: load_scenes(split, limit=40).images for split in SPLITS}
    seen = [image.numpy().tobytes() for images in splits.values() for image in images]
    assert len(set(seen)) == len(seen) == 120
    assert torch.equal(load_scenes("test", limit=40).images, splits["test"])
    given = load_scenes("test", make_generator(1), limit=40).images
    assert not torch.equal(given, splits["test"])


def test_every_class_appears_and_none_rules(scenes: Scenes) -> None:
    pixels = scenes.masks.flatten().bincount(minlength=K).float()
    assert pixels[0] / pixels.sum() > 0.6  # 背景最多
    objects = pixels[1:] / pixels[1:].sum()
    assert objects.min() > 0.1 and objects.max() < 0.5
    counts = scenes.labels[scenes.labels >= 0].bincount(minlength=len(CLASS_NAMES)).float()
    assert counts.min() / counts.sum() > 0.15


def test_boxes_are_tight_around_the_visible_mask(scenes: Scenes) -> None:
    """框的每条边上都有这一类的像素；全部框的并集恰好盖住全部物体像素。"""
    for mask, boxes, labels in zip(*scenes[1:], strict=True):
        covered = torch.zeros_like(mask, dtype=torch.bool)
        for box, label in zip(boxes.long(), labels, strict=True):
            if label < 0:
                assert (box == 0).all()
                continue
            x1, y1, x2, y2 = box.tolist()
            assert 0 <= x1 < x2 <= 64 and 0 <= y1 < y2 <= 64
            inside = mask[y1:y2, x1:x2] == label + 1
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.any()
            covered[y1:y2, x1:x2] |= inside
        assert torch.equal(covered, mask > 0)


def test_alone_an_object_has_exactly_the_box_of_its_mask(scenes: Scenes) -> None:
    alone = (scenes.labels >= 0).sum(dim=1) == 1
    assert alone.sum() >= 10
    for mask, box in zip(scenes.masks[alone], scenes.boxes[alone, 0], strict=True):
        rows, columns = (mask > 0).nonzero(as_tuple=True)
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert box.tolist() == [float(v) for v in expected]


def test_objects_come_first_and_padding_last(scenes: Scenes) -> None:
    present = (scenes.labels >= 0).int()
    assert (present.diff(dim=1) <= 0).all()
    assert set(present.sum(dim=1).tolist()) == {1, 2, 3, 4}


def fit_colors(x: Tensor, y: Tensor, features) -> Tensor:
    """逐像素的逻辑回归 ``(类别, 特征)``；类别按频率的倒数加权，否则只会全猜背景。"""
    inputs = features(x)
    weight = torch.zeros(K, inputs.shape[1], requires_grad=True)
    balance = y.numel() / (K * y.bincount(minlength=K).clamp(min=1))
    optimizer = torch.optim.LBFGS([weight], max_iter=60)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight.T, y, weight=balance)
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def quadratic(x: Tensor) -> Tensor:
    """RGB、它们的两两乘积与常数，``(P, 3) -> (P, 10)``：边界是颜色空间里的二次曲面。"""
    pairs = torch.stack([x[:, i] * x[:, j] for i in range(3) for j in range(i, 3)], dim=1)
    return torch.cat([x, pairs, torch.ones(len(x), 1)], dim=1)


def test_color_alone_stays_far_below_a_segmenter(scenes: Scenes) -> None:
    """单看一个像素的颜色，mIoU 不到 0.35；U-Net 在 0.85 以上（见 segmentation.md）。"""
    held_out = make_scenes(100, make_generator(1))
    pick = torch.randperm(300 * 64 * 64, generator=make_generator(2))[:40_000]

    def pixels(which: Scenes) -> tuple[Tensor, Tensor]:
        return which.images.movedim(1, -1).reshape(-1, 3) / 255 - 0.5, which.masks.flatten()

    x, y = pixels(scenes)
    weight = fit_colors(x[pick], y[pick], quadratic)
    x, y = pixels(held_out)
    guesses = (quadratic(x) @ weight.T).argmax(dim=1)
    assert mean_iou(confusion_counts(guesses, y, K)) < 0.35

    # 只分物体与背景：每个通道、每个阈值、两个方向里最好的一个，阈值就在这批像素上挑
    best = 0.0
    for channel in range(3):
        for threshold in torch.linspace(-0.5, 0.5, 21):
            above = x[:, channel] > threshold
            for guess in (above, ~above):
                counts = confusion_counts(guess.long(), (y > 0).long(), 2)
                best = max(best, mean_iou(counts))
    assert best < 0.6


def test_errors_are_one_line() -> None:
    with pytest.raises(ValueError, match="划分 'tests' 不认识：可选 train、val、test"):
        load_scenes("tests")
    for count, size in ((0, 64), (1, 16)):
        with pytest.raises(ValueError, match=f"场景数 {count} 应为正，边长 {size} 至少 32"):
            make_scenes(count, make_generator(0), size)


def test_limit_and_sizes(monkeypatch) -> None:
    monkeypatch.setattr(module, "SIZES", {"train": 8, "val": 5, "test": 5})
    assert len(load_scenes("train").images) == 8
    assert len(load_scenes("val", limit=3).images) == 3
    assert len(load_scenes("test", limit=100).images) == 5
