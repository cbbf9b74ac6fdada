"""第 4 章的检测器：focal loss 与官方一致，目标分配与手算一致，学得会，续训逐位相同。"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from chapter_04_cnn_classic import detection
from chapter_04_cnn_classic.boxes import Detections, Objects, box_iou, mean_average_precision
from chapter_04_cnn_classic.detector import (
    BACKGROUND,
    PRIOR,
    Detector,
    Output,
    assign_targets,
    boxes_from_distances,
    decode,
    detection_loss,
    ideal_output,
    locations,
    prior_bias,
    sigmoid_focal_loss,
)
from chapter_04_cnn_classic.scenes import CLASS_NAMES, make_scenes
from tests.invariants import assert_batch_independent
from tests.parity import assert_equal, autograd, normal
from tests.resuming import flatten, interrupt_after
from utils import UserError, make_generator
from utils.datasets import channel_stats
from utils.file_io_util import load_checkpoint

# ---------------------------------------------------------------- focal loss


def coin_flips(*shape: int, seed: int = 0) -> Tensor:
    """float64 的 0 与 1，三成是 1。"""
    return (torch.rand(shape, generator=make_generator(seed)) < 0.3).double()


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 0.0), (0.9, 5.0), (0.25, 0.5)])
def test_focal_loss_and_gradient_equal_torchvision(
    needs_torchvision: None, alpha: float, gamma: float
) -> None:
    from torchvision.ops import sigmoid_focal_loss as official

    z, t, grad = 4 * normal(50, 3), coin_flips(50, 3), normal(50, 3, seed=2)
    assert_equal(sigmoid_focal_loss(z, t, alpha, gamma), official(z, t, alpha, gamma))
    (actual,) = autograd(lambda x: sigmoid_focal_loss(x, t, alpha, gamma), grad, z)
    (expected,) = autograd(lambda x: official(x, t, alpha, gamma), grad, z)
    assert_equal(actual, expected)


def test_focal_gradient_equals_the_formula_of_the_page() -> None:
    """``∂/∂u = α_t (1 − p)^γ (γ p log p − (1 − p))``，``p = σ(u)``。"""
    z, t = 3 * normal(200), coin_flips(200)
    sign = 2 * t - 1
    (actual,) = autograd(lambda x: sigmoid_focal_loss(x, t), torch.ones_like(z), z)
    p = (sign * z).sigmoid()
    alpha = torch.where(t > 0.5, 0.25, 0.75).double()
    assert_equal(actual, sign * alpha * (1 - p) ** 2 * (2 * p * p.log() - (1 - p)))


def test_without_focusing_it_is_half_the_cross_entropy() -> None:
    z, t = normal(100), coin_flips(100)
    expected = 0.5 * torch.nn.functional.binary_cross_entropy_with_logits(z, t, reduction="none")
    assert_equal(sigmoid_focal_loss(z, t, alpha=0.5, gamma=0.0), expected)


def test_focal_loss_is_finite_and_exact_for_extreme_logits() -> None:
    z = torch.tensor([1e4, -1e4, 1e4, -1e4, 60.0], requires_grad=True)
    t = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0])
    loss = sigmoid_focal_loss(z, t)
    assert loss[:4].tolist() == [0, 2500, 7500, 0]
    loss.sum().backward()
    assert z.grad.isfinite().all() and z.grad[:4].tolist() == [0, -0.25, 0.75, 0]
    exact = 0.25 * math.exp(-40) ** 3  # 1 − p 与 −log p 都是 e^−40；直接算 1 − p 只得到零
    at_forty = sigmoid_focal_loss(torch.tensor([40.0], dtype=torch.float64), torch.ones(1))
    assert at_forty.item() == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(("prior", "first_loss"), [(0.01, 1.1), (0.5, 6.0)])
def test_prior_bias_leaves_the_first_loss_to_the_objects(prior: float, first_loss: float) -> None:
    """detection.md 里的两个数：先验 0.01 时几乎全来自物体；没有先验时几乎全来自背景。"""
    scenes, model = make_scenes(64, make_generator(0)), Detector(len(CLASS_NAMES))
    torch.nn.init.zeros_(model.class_head[-1].weight)  # 得分恰为偏置
    torch.nn.init.constant_(model.class_head[-1].bias, prior_bias(prior))
    ((x, _),) = detection.scene_batches(scenes, 64, channel_stats(scenes.images), "cpu")
    output, points = model(x), locations(16, 16)
    assert output.logits.sigmoid().mean().item() == pytest.approx(prior, rel=0.1)
    losses = detection_loss(output, points, scenes.boxes, scenes.labels)
    assert losses.classification.item() == pytest.approx(first_loss, abs=0.05 * first_loss)
    positive = assign_targets(points, scenes.boxes, scenes.labels)[0] != BACKGROUND
    background = sigmoid_focal_loss(
        output.logits[~positive], torch.zeros_like(output.logits[~positive])
    )
    share = background.sum() / positive.sum() / losses.classification
    assert share > 0.9 if prior == 0.5 else share < 0.01


def test_default_prior_is_the_one_of_the_paper() -> None:
    bias = Detector(4).class_head[-1].bias
    assert bias.sigmoid().tolist() == pytest.approx([0.01] * 4) and PRIOR == 0.01
    easy = torch.tensor([prior_bias(0.01), 0.0], dtype=torch.float64)
    small, large = sigmoid_focal_loss(easy, torch.zeros(2)).tolist()
    assert large == pytest.approx(0.130, abs=5e-4) and large / small == pytest.approx(
        1.7e5, rel=0.02
    )


# ---------------------------------------------------------------- 位置、分配与解码


def test_locations_are_cell_centers_in_row_order() -> None:
    assert locations(2, 3).tolist() == [[2, 2], [6, 2], [10, 2], [2, 6], [6, 6], [10, 6]]


def test_distances_decode_to_the_box() -> None:
    points = torch.tensor([[10.0, 20.0]])
    distances = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    assert boxes_from_distances(points, distances).tolist() == [[[9, 18, 13, 24]]]


def test_assignment_by_hand() -> None:
    """大框的中心附近是正样本；与小框重叠的位置归小框；凑数的框不算。"""
    points = locations(16, 16)
    boxes = torch.tensor([[[8.0, 8, 40, 40], [24.0, 24, 32, 32], [0.0, 0, 64, 64]]])
    labels = torch.tensor([[2, 1, -1]])
    classes, owners = assign_targets(points, boxes, labels)
    big, small = points[classes[0] == 2], points[classes[0] == 1]
    # 大框的中心 (24, 24)，半径 6：四个格子 18…30，其中 (26,26)、(26,30)、(30,26)、(30,30) 归小框
    assert len(small) == 4 and small.min() == 26 and small.max() == 30
    assert len(big) == 12 and big.min() == 18 and big.max() == 30
    assert (owners[0][classes[0] == 1] == boxes[0, 1]).all()
    assert (classes == BACKGROUND).sum() == 256 - 16


def test_loss_without_objects_is_finite_and_has_no_box_term() -> None:
    model = Detector(4)
    boxes, labels = torch.zeros(2, 4, 4), torch.full((2, 4), -1)
    output = model(normal(2, 3, 32, 32).float())
    losses = detection_loss(output, locations(8, 8), boxes, labels)
    assert losses.box.item() == 0 and losses.classification.item() > 0
    sum(losses).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_encoding_and_decoding_the_truth_gives_nearly_perfect_scores() -> None:
    scenes = make_scenes(40, make_generator(3))
    output = ideal_output(locations(16, 16), scenes.boxes, scenes.labels, len(CLASS_NAMES))
    found, truths = decode(output, (64, 64)), detection.real_objects(scenes)
    score, _ = mean_average_precision(found, truths, len(CLASS_NAMES))
    assert score > 0.97  # 差的一点：被同类的大框遮住、NMS 去掉的，与没有位置可用的小块
    losses = detection_loss(output, locations(16, 16), scenes.boxes, scenes.labels)
    assert losses.box < 1e-4 and losses.classification < 1e-3


def test_decode_of_nothing_is_empty_and_boxes_stay_inside() -> None:
    silent = Output(torch.full((2, 256, 4), -10.0), torch.zeros(2, 256, 4))
    for found in decode(silent, (64, 64)):
        assert found.boxes.shape == (0, 4) and len(found.scores) == len(found.labels) == 0
    wide = torch.tensor([-50.0, -50, 100, 100]).expand(1, 256, 4)
    (found,) = decode(Output(torch.zeros(1, 256, 4), wide), (64, 48))
    assert found.boxes.unique(dim=0).tolist() == [[0, 0, 48, 64]] and len(found.boxes) == 4


# ---------------------------------------------------------------- 网络


def test_shapes_and_batch_independence() -> None:
    model = Detector(5, width=8).double().eval()
    output = model(normal(2, 3, 32, 48))
    assert output.logits.shape == (2, 96, 5) and output.boxes.shape == (2, 96, 4)
    assert (output.boxes[..., 2:] > output.boxes[..., :2]).all()
    for part in range(2):
        assert_batch_independent(lambda x, part=part: model(x)[part], normal(3, 3, 32, 32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Detector(0), "num_classes=0 与 width=24 应为正整数"),
        (lambda: Detector(2)(torch.zeros(1, 3, 36, 64)), "应为 8 的倍数"),
        (lambda: Detector(2)(torch.zeros(1, 1, 64, 64)), r"应为 \(B, 3, H, W\)"),
        (lambda: sigmoid_focal_loss(torch.zeros(2), torch.zeros(3)), "应同形"),
        (lambda: sigmoid_focal_loss(torch.zeros(2), torch.zeros(2), gamma=-1), "gamma=-1 应非负"),
    ],
)
def test_errors_are_one_line(call, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1


def test_overfits_a_few_scenes() -> None:
    scenes = make_scenes(6, make_generator(0))
    stats = channel_stats(scenes.images)
    batches = detection.scene_batches(scenes, 6, stats, "cpu")
    model = Detector(len(CLASS_NAMES), width=12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ((x, targets),) = batches
    for _ in range(80):
        optimizer.zero_grad()
        sum(
            detection_loss(model(x), locations(16, 16), targets[..., :4], targets[..., 4].long())
        ).backward()
        optimizer.step()
    found = decode(model(x), (64, 64))  # 训练模式：与拟合时的统计量相同
    score, _ = mean_average_precision(found, detection.real_objects(scenes), len(CLASS_NAMES))
    assert score > 0.95


# ---------------------------------------------------------------- 入口脚本


def test_symmetries_move_boxes_with_the_pixels() -> None:
    boxes = torch.tensor([[[2.0, 4, 7, 6]]]).expand(64, 1, 4)
    x = torch.zeros(64, 1, 16, 16)
    x[:, :, 4:6, 2:7] = 1
    moved, after = detection.random_symmetry(x, boxes, make_generator(0))
    assert len(after.flatten(1).unique(dim=0)) == 8  # 八种都出现了
    for image, (x1, y1, x2, y2) in zip(moved[:, 0], after[:, 0].int().tolist(), strict=True):
        assert image.sum() == 10 and image[y1:y2, x1:x2].sum() == 10


def test_assignment_report_counts_objects_without_a_location() -> None:
    scenes = make_scenes(2, make_generator(0))
    boxes, labels = torch.zeros(2, 4, 4), torch.full((2, 4), -1)
    boxes[0, 0], labels[0, 0] = torch.tensor([8.0, 8, 24, 24]), 1
    boxes[1, 2], labels[1, 2] = torch.tensor([2.5, 2.5, 5.5, 5.5]), 0  # 落在四个位置之间
    report = detection.describe_assignment(scenes._replace(boxes=boxes, labels=labels))
    assert report.startswith("256 个位置里平均 8.0 个正样本；2 个物体里 1 个没有位置负责")
    assert report.endswith("mAP 50.00%")


def test_blind_guess_is_nearly_worthless() -> None:
    train, test = make_scenes(100, make_generator(1)), make_scenes(100, make_generator(2))
    guesses = detection.blind_guess(train, 100)
    assert guesses[0].scores.sum().item() == pytest.approx(1)
    score, _ = mean_average_precision(guesses, detection.real_objects(test), len(CLASS_NAMES))
    assert score < 0.05


def test_resume_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["--smoke", "--device", "cpu", "--seed", "3", "--out-dir"]
    parse = detection.parse_args

    def two_epochs(arguments: list[str]) -> argparse.Namespace:
        return argparse.Namespace(**vars(parse(arguments)) | {"epochs": 2})  # --smoke 只有一轮

    monkeypatch.setattr(detection, "parse_args", two_epochs)
    whole = detection.main([*argv, str(tmp_path / "whole")])
    restore = interrupt_after(monkeypatch, saves=1)
    with pytest.raises(KeyboardInterrupt):
        detection.main([*argv, str(tmp_path / "cut")])
    restore()
    resumed = detection.main([*argv, str(tmp_path / "cut"), "--resume"])
    assert resumed["history"] == whole["history"] and len(whole["history"]) == 2
    for name in ("best.pt", "checkpoints/step_00000002.pt"):
        first, second = (load_checkpoint(tmp_path / run / name) for run in ("whole", "cut"))
        assert flatten(first) == flatten(second)
    with pytest.raises(UserError, match="seed 原为 3 今为 4"):
        detection.main(["--seed", "4", *argv[:3], "--out-dir", str(tmp_path / "cut"), "--resume"])


def test_detections_and_truth_share_one_convention() -> None:
    scenes = make_scenes(5, make_generator(9))
    for image_boxes, mask, labels in zip(scenes.boxes, scenes.masks, scenes.labels, strict=True):
        for (x1, y1, x2, y2), label in zip(
            image_boxes.int().tolist(), labels.tolist(), strict=True
        ):
            if label >= 0:
                assert (mask[y1:y2, x1:x2] == label + 1).any(dim=0).all()
    truth = detection.real_objects(scenes)[0]
    assert isinstance(truth, Objects)
    exact = Detections(truth.boxes, torch.ones(len(truth.boxes)), truth.labels)
    assert box_iou(exact.boxes, truth.boxes).diagonal().eq(1).all()
