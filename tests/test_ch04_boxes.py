"""第 4 章的检测框：交并比、GIoU、NMS 与官方一致，AP 与手算一致，空输入都有意义。"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from chapter_04_cnn_classic.boxes import (
    Detections,
    Objects,
    average_precision,
    batched_nms,
    box_area,
    box_iou,
    giou_loss,
    match_detections,
    mean_average_precision,
    nms,
)
from tests.parity import assert_equal, autograd
from utils import make_generator

EMPTY = torch.zeros(0, 4, dtype=torch.float64)


def random_boxes(count: int, seed: int = 0, spread: float = 40.0) -> Tensor:
    """边长 2 到 22 像素的框，float64 ``(count, 4)``；``spread`` 越小越拥挤。"""
    draw = torch.rand(count, 4, generator=make_generator(seed), dtype=torch.float64)
    corner = spread * draw[:, :2]
    return torch.cat([corner, corner + 2 + 20 * draw[:, 2:]], dim=1)


def random_scores(count: int, seed: int = 0) -> Tensor:
    """互不相同的得分。"""
    return torch.randperm(count, generator=make_generator(seed)).double() / count


# ---------------------------------------------------------------- 交并比


def test_iou_by_hand() -> None:
    a = torch.tensor([[0.0, 0.0, 4.0, 2.0]])
    b = torch.tensor([[2.0, 1.0, 6.0, 3.0], [0.0, 0.0, 4.0, 2.0], [5.0, 5.0, 6.0, 6.0]])
    assert box_area(b).tolist() == [8, 8, 1]
    assert box_iou(a, b).tolist() == [[pytest.approx(2 / 14), 1, 0]]


def test_diagonal_neighbours_do_not_overlap() -> None:
    # 两边之差都为负，乘起来是正的：忘了截断，这里会得到非零的面积
    a, b = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[3.0, 3.0, 5.0, 5.0]])
    assert box_iou(a, b).item() == 0


def test_iou_equals_torchvision(needs_torchvision: None) -> None:
    from torchvision.ops import box_iou as official

    a, b = random_boxes(30, 1), random_boxes(20, 2)
    assert_equal(box_iou(a, b), official(a, b))


def test_iou_of_degenerate_and_missing_boxes() -> None:
    point = torch.ones(1, 4)
    assert box_iou(point, point).item() == 0  # 面积为零
    assert box_iou(EMPTY, random_boxes(3)).shape == (0, 3)
    assert box_iou(random_boxes(3), EMPTY).shape == (3, 0)


@pytest.mark.parametrize("spread", [10.0, 200.0])  # 大多相交；大多不相交
def test_giou_loss_and_gradients_equal_torchvision(needs_torchvision: None, spread: float) -> None:
    from torchvision.ops import generalized_box_iou_loss

    a, b = random_boxes(64, 3, spread), random_boxes(64, 4, spread)
    assert_equal(giou_loss(a, b), generalized_box_iou_loss(a, b))
    grad = torch.rand(64, generator=make_generator(5), dtype=torch.float64)
    ours, theirs = autograd(giou_loss, grad, a, b), autograd(generalized_box_iou_loss, grad, a, b)
    for actual, expected in zip(ours, theirs, strict=True):
        assert_equal(actual, expected)


def test_giou_pulls_disjoint_boxes_together_while_iou_cannot() -> None:
    box, target = torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([6.0, 0.0, 8.0, 2.0])
    assert giou_loss(box, target).item() == pytest.approx(1 + (16 - 8) / 16)
    (through_giou,) = autograd(lambda x: giou_loss(x, target), torch.tensor(1.0), box)
    assert through_giou[[0, 2]].tolist() == pytest.approx([1 / 16, -1 / 8])  # 两边都向外：先变宽
    (through_iou,) = autograd(
        lambda x: box_iou(x[None], target[None])[0, 0], torch.tensor(1.0), box
    )
    assert through_iou.abs().max() == 0


def test_giou_loss_range() -> None:
    boxes = random_boxes(50)
    assert giou_loss(boxes, boxes).abs().max() < 1e-7
    far = torch.tensor([1e4, 1e4, 1e4 + 1, 1e4 + 1], dtype=torch.float64)
    assert giou_loss(boxes, far).max() == pytest.approx(2, abs=1e-3)
    assert giou_loss(EMPTY, EMPTY).shape == (0,)


# ---------------------------------------------------------------- NMS


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_nms_equals_torchvision(needs_torchvision: None, threshold: float) -> None:
    from torchvision.ops import nms as official

    for seed in range(5):
        boxes, scores = random_boxes(80, seed), random_scores(80, seed)
        scores = (scores * 20).round() / 20  # 有并列的得分
        assert nms(boxes, scores, threshold).tolist() == official(boxes, scores, threshold).tolist()


def test_batched_nms_equals_torchvision(needs_torchvision: None) -> None:
    from torchvision.ops import batched_nms as official

    for seed in range(5):
        boxes, scores = random_boxes(80, seed, spread=15), random_scores(80, seed)
        labels = torch.randint(0, 3, (80,), generator=make_generator(seed))
        expected = official(boxes, scores, labels, 0.4)
        assert batched_nms(boxes, scores, labels, 0.4).tolist() == expected.tolist()


def test_suppressed_boxes_suppress_nobody() -> None:
    # B 被 A 去掉，于是 C 留下，尽管 B 与 C 重叠得很多
    a, b, c = [0.0, 0, 10, 10], [4.0, 0, 14, 10], [8.0, 0, 18, 10]
    boxes, scores = torch.tensor([a, b, c]), torch.tensor([0.9, 0.8, 0.7])
    assert nms(boxes, scores, 0.4).tolist() == [0, 2]
    assert nms(boxes, scores.flip(0), 0.4).tolist() == [2, 0]


def test_nms_without_boxes() -> None:
    none, labels = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert nms(EMPTY, none, 0.5).tolist() == []
    assert batched_nms(EMPTY, none, labels, 0.5).tolist() == []


# ---------------------------------------------------------------- 配对与 AP


def test_each_truth_is_used_once_and_high_scores_choose_first() -> None:
    truth = torch.tensor([[0.0, 0, 10, 10]])
    boxes = torch.tensor([[0.0, 0, 10, 8], [0.0, 0, 10, 10]])
    assert match_detections(boxes, torch.tensor([0.9, 0.5]), truth).tolist() == [True, False]
    assert match_detections(boxes, torch.tensor([0.5, 0.9]), truth).tolist() == [False, True]
    two = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 7]])  # 第二个检出改认另一个真实框
    assert match_detections(boxes, torch.tensor([0.5, 0.9]), two).tolist() == [True, True]


def test_the_threshold_itself_counts_as_a_match() -> None:
    box, truth = torch.tensor([[0.0, 0, 10, 5]]), torch.tensor([[0.0, 0, 10, 10]])
    assert match_detections(box, torch.ones(1), truth, 0.5).tolist() == [True]
    assert match_detections(box, torch.ones(1), truth, 0.51).tolist() == [False]


def test_average_precision_worked_by_hand() -> None:
    """detection.md 的例子：4 个真实物体，6 个检出，对错为 ✓ ✗ ✓ ✓ ✗ ✗，AP = 5/8。"""
    scores = torch.tensor([0.95, 0.9, 0.8, 0.7, 0.6, 0.5])
    hits = torch.tensor([True, False, True, True, False, False])
    shuffled = torch.tensor([3, 0, 5, 1, 4, 2])
    curve = average_precision(scores[shuffled], hits[shuffled], num_truths=4)
    assert curve.precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3, 3 / 4, 3 / 5, 3 / 6])
    assert curve.recall.tolist() == pytest.approx([1 / 4, 1 / 4, 2 / 4, 3 / 4, 3 / 4, 3 / 4])
    assert curve.ap == pytest.approx(1 / 4 * (1 + 3 / 4 + 3 / 4))


def test_average_precision_limits() -> None:
    scores, hits = random_scores(10), torch.ones(10, dtype=torch.bool)
    assert average_precision(scores, hits, 10).ap == pytest.approx(1)
    assert average_precision(scores, hits, 20).ap == pytest.approx(0.5)  # 一半没有检出
    assert average_precision(scores, ~hits, 10).ap == 0
    assert average_precision(torch.zeros(0), hits[:0], 3).ap == 0  # 什么也没检出
    assert math.isnan(average_precision(scores, ~hits, 0).ap)  # 没有真实物体


def test_only_the_order_of_scores_matters() -> None:
    scores = random_scores(30)
    hits = torch.rand(30, generator=make_generator(1)) < 0.5
    assert average_precision(scores, hits, 20).ap == average_precision(scores**3, hits, 20).ap


def test_mean_average_precision_over_images_and_classes() -> None:
    box, other = torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([[20.0, 20, 30, 30]])
    truths = [
        Objects(torch.cat([box, other]), torch.tensor([0, 1])),
        Objects(EMPTY.float(), torch.zeros(0, dtype=torch.int64)),
    ]
    found = [
        Detections(torch.cat([box, other]), torch.tensor([0.9, 0.6]), torch.tensor([0, 1])),
        Detections(box, torch.tensor([0.8]), torch.tensor([1])),  # 空图里的误报，得分还更高
    ]
    score, curves = mean_average_precision(found, truths, num_classes=3)
    assert [curve.ap for curve in curves[:2]] == [1, 0.5] and math.isnan(curves[2].ap)
    assert score == 0.75  # 没有真实物体的第 3 类不计入
    wrong = [found[0]._replace(labels=torch.tensor([1, 0])), found[1]]  # 框对，类别错
    assert mean_average_precision(wrong, truths, 3)[0] == 0


def test_no_images_and_no_objects_give_nan() -> None:
    assert math.isnan(mean_average_precision([], [], 2)[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: box_iou(torch.zeros(2, 3), torch.zeros(2, 4)), r"a 应为 \(\.\.\., 4\).*\(2, 3\)"),
        (lambda: giou_loss(torch.zeros(4), torch.zeros(5)), r"targets 应为.*\(5,\)"),
        (lambda: nms(torch.zeros(2, 4), torch.zeros(3), 0.5), r"应配 \(N,\) 的得分，实为 \(3,\)"),
        (lambda: nms(torch.zeros(2, 4), torch.zeros(2), 50), "iou_threshold=50 应在 0 与 1 之间"),
        (
            lambda: batched_nms(torch.zeros(2, 4), torch.zeros(2), torch.zeros(1), 0.5),
            r"labels 应为 \(2,\)，实为 \(1,\)",
        ),
        (lambda: average_precision(torch.zeros(2), torch.zeros(3).bool(), 1), "应同形"),
        (lambda: mean_average_precision([], [None], 1), "预测有 0 张图而真值有 1 张"),
    ],
)
def test_errors_are_one_line_and_name_the_rule(call, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1
