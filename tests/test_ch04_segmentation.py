"""第 4 章的分割脚本：循环、损失、翻转、续训逐位相同、一行式错误、图。"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_04_cnn_classic import segmentation
from chapter_04_cnn_classic.figures_segmentation import segmentation_figure
from chapter_04_cnn_classic.scenes import make_scenes
from chapter_04_cnn_classic.segmentation import (
    EVAL_BATCH,
    NAMES,
    Data,
    background_miou,
    evaluate,
    load_data,
    random_symmetry,
    segmentation_loss,
    train_one_epoch,
)
from chapter_04_cnn_classic.unet import UNet, dice_loss, mean_iou
from tests.parity import normal
from tests.resuming import flatten, interrupt_after
from utils import UserError, get_device, make_generator
from utils.cli import run_main
from utils.file_io_util import load_checkpoint, load_json
from utils.resume import check_config

CPU = get_device("cpu")


@pytest.fixture(scope="module")
def data() -> Data:
    return load_data(limit=12)


# ---------------------------------------------------------------- 数据与损失


def test_validation_and_test_use_the_statistics_of_the_training_set(data: Data) -> None:
    train = torch.cat([x for x, _ in data.batches("train", 5, CPU)])
    assert train.mean().abs() < 1e-5
    test = data.batches("test", 5, CPU)
    x, y = next(iter(test))
    images = data.splits["test"].images[:5] / 255
    expected = (images - data.mean.view(3, 1, 1)) / data.std.view(3, 1, 1)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(y, data.splits["test"].masks[:5])


def test_image_and_mask_turn_together_in_all_eight_ways() -> None:
    """掩码由图像算出（红色分量的正负），翻转之后仍应由翻转后的图像算出。"""
    x = normal(2, 3, 6, 6)
    y = (x[:, 0] > 0).long()
    generator, seen = make_generator(0), set()
    for _ in range(60):
        turned, mask = random_symmetry(x, y, generator)
        assert torch.equal(mask, (turned[:, 0] > 0).long())
        assert torch.equal(turned.flatten(1).sort().values, x.flatten(1).sort().values)
        seen.add(tuple(image.contiguous().numpy().tobytes() for image in turned))
    for index in (0, 1):
        assert len({pair[index] for pair in seen}) == 8
    assert len(seen) > 20  # 两张图各抽各的：64 种组合


def test_losses_add_up() -> None:
    logits = normal(2, 5, 4, 4)
    y = torch.randint(0, 5, (2, 4, 4), generator=make_generator(0))
    ce, dice, both = (segmentation_loss(logits, y, kind) for kind in ("ce", "dice", "ce+dice"))
    assert torch.equal(ce, F.cross_entropy(logits, y)) and torch.equal(dice, dice_loss(logits, y))
    torch.testing.assert_close(both, ce + dice)


def test_chance_is_the_share_of_background_over_the_classes_present(data: Data) -> None:
    masks = data.splits["test"].masks
    present = len(masks.unique())
    share = (masks == 0).double().mean().item()
    assert background_miou(masks) == pytest.approx(share / present)


# ---------------------------------------------------------------- 循环


class Colors(nn.Module):
    """逐点的一层：与 U-Net 形状相同而极快。"""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, len(NAMES), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def test_evaluation_does_not_depend_on_the_batch_size(data: Data) -> None:
    model = UNet(len(NAMES), widths=(4, 6))
    (loss, counts), (other, others) = (
        evaluate(model, data.batches("val", size, CPU), "ce") for size in (12, 5)
    )
    assert torch.equal(counts, others) and counts.sum() == 12 * 64 * 64
    assert loss == pytest.approx(other, rel=1e-5)
    assert not model.training


def test_one_epoch_is_the_loop_written_by_hand(data: Data) -> None:
    ours, by_hand = Colors(), Colors()
    by_hand.load_state_dict(ours.state_dict())
    ours.eval()

    def optimizer_of(model: nn.Module):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)

    optimizer, schedule = optimizer_of(ours)
    loss = train_one_epoch(
        ours, data.batches("train", 5, CPU, make_generator(1)), "ce+dice", optimizer, schedule
    )
    assert ours.training
    batches = data.batches("train", 5, CPU, make_generator(1))
    plain, _ = optimizer_of(by_hand)
    losses = []
    for x, y in batches:
        x, y = random_symmetry(x, y, batches.generator)
        plain.zero_grad()
        value = F.cross_entropy(by_hand(x), y) + dice_loss(by_hand(x), y)
        value.backward()
        plain.step()
        losses += [value.item()] * len(y)
    assert loss == pytest.approx(sum(losses) / 12, rel=1e-5)
    torch.testing.assert_close(ours.head.weight, by_hand.head.weight)


# ---------------------------------------------------------------- 整个脚本


@pytest.fixture
def tiny(monkeypatch) -> None:
    """小网络、少数据，使整个脚本只用一两秒。"""

    def small(num_classes: int, skips: bool = True) -> UNet:
        return UNet(num_classes, widths=(4, 6), skips=skips)

    monkeypatch.setattr(segmentation, "UNet", small)
    monkeypatch.setattr(segmentation, "load_data", lambda limit=None: load_data(limit=16))


ARGS = ["--device", "cpu", "--batch-size", "8", "--epochs", "3", "--out-dir"]


def test_resume_after_a_kill_is_bit_identical(tiny, tmp_path: Path, monkeypatch, capsys) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = segmentation.main([*ARGS, str(whole)])
    restore = interrupt_after(monkeypatch, saves=2)
    with pytest.raises(KeyboardInterrupt):
        segmentation.main([*ARGS, str(cut)])
    restore()
    resumed = segmentation.main([*ARGS, str(cut), "--resume"])
    for name in ("best.pt", "checkpoints/step_00000003.pt"):  # 后者含优化器、调度与随机状态
        assert flatten(load_checkpoint(whole / name)) == flatten(load_checkpoint(cut / name))
    for key in ("history", "confusion", "class_iou", "test_loss"):
        assert resumed[key] == expected[key]
    capsys.readouterr()

    with pytest.raises(SystemExit) as caught:
        run_main(lambda: segmentation.main([*ARGS, str(cut), "--resume", "--loss", "ce"]))
    err = capsys.readouterr().err
    assert caught.value.code == 2 and len(err.splitlines()) == 1
    assert "loss 原为 ce+dice 今为 ce" in err


def test_without_resume_old_checkpoints_are_gone(tiny, tmp_path: Path) -> None:
    argv = [*ARGS, str(tmp_path)]
    first = segmentation.main(argv)
    again = segmentation.main(argv)
    assert first["history"] == again["history"] and len(again["history"]) == 3
    other = segmentation.main([*argv, "--seed", "1"])
    assert other["history"] != first["history"]


def test_best_epoch_is_picked_on_validation_and_tested_once(
    tiny, tmp_path: Path, monkeypatch
) -> None:
    original, splits = segmentation.evaluate, []

    def recorded(model, batches, kind):
        splits.append(len(batches.inputs))
        return original(model, batches, kind)

    monkeypatch.setattr(segmentation, "evaluate", recorded)
    metrics = segmentation.main([*ARGS, str(tmp_path)])
    assert len(splits) == 4  # 三轮各看一次验证集，最后看一次测试集
    counts = torch.tensor(metrics["confusion"])
    assert metrics["results"][0]["value"] == mean_iou(counts)
    best = max(row["val_miou"] for row in metrics["history"])
    model = UNet(len(NAMES), widths=(4, 6))
    model.load_state_dict(load_checkpoint(tmp_path / "best.pt"))
    _, val = original(model, load_data(limit=16).batches("val", EVAL_BATCH, CPU), "ce")
    assert mean_iou(val) == pytest.approx(best, abs=1e-3)
    saved = load_json(tmp_path / "metrics.json")
    assert saved["confusion"] == metrics["confusion"] and saved["laps"]


def test_options_reach_the_model(tmp_path: Path) -> None:
    for argv, name in (
        ([], "segmentation"),
        (["--no-skips"], "segmentation_no_skips"),
        (["--loss", "dice", "--smoke"], "segmentation_dice_smoke"),
    ):
        assert segmentation.parse_args(argv).out_dir.name == name
    with pytest.raises(SystemExit):
        segmentation.parse_args(["--loss", "focal"])
    with pytest.raises(UserError, match="batch_size 原为 8 今为 16"):
        check_config({"batch_size": "8"}, {"batch_size": "16"})


# ---------------------------------------------------------------- 图


def test_figure_shows_every_scene_and_class() -> None:
    scenes = make_scenes(3, make_generator(0), size=32)
    history = [{"epoch": e, "val_miou": 0.2 * e} for e in (1, 2, 3)]
    figure = segmentation_figure(
        scenes.images, scenes.masks, scenes.masks[:2], [0.9] * 5, history, NAMES, 0.17, 0.9
    )
    grid, bottom = figure.subfigs
    assert len(grid.axes) == 4 * 2 and len(bottom.axes) == 2
    assert [axes.get_xlabel() for axes in grid.axes[-2:]] == ["0.0% wrong"] * 2
    assert [text.get_text() for text in grid.legends[0].get_texts()] == [*NAMES, "wrong pixel"]
