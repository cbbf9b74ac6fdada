"""检测框的运算：交并比、GIoU 损失、非极大值抑制、平均精度（AP）。

框一律是 ``(x1, y1, x2, y2)``，单位像素，连续坐标：第 0 个像素占 [0, 1)，面积是
``(x2 − x1)(y2 − y1)``，不加 1（VOC 早年的代码用像素下标，两边各加 1，小框上差得很多）。

这里不处理：旋转的框、「困难」与「人群」标注（VOC 的 difficult、COCO 的 iscrowd）、按大小分组的 AP。

维度约定：``N, M`` 框数，``K`` 类别数。

参考: Everingham 等, 2010, The PASCAL VOC Challenge, IJCV 88(2)；Rezatofighi 等, 2019,
Generalized Intersection over Union, arXiv:1902.09630。页面 detection.md。
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Objects(NamedTuple):
    """一张图里真实的物体。"""

    boxes: Tensor  # (M, 4)，像素
    labels: Tensor  # int64 (M,)


class Detections(NamedTuple):
    """一张图里检出的物体。"""

    boxes: Tensor  # (N, 4)，像素
    scores: Tensor  # (N,)，越大越有把握
    labels: Tensor  # int64 (N,)


def _check_boxes(boxes: Tensor, name: str) -> None:
    if boxes.ndim < 1 or boxes.shape[-1] != 4:
        raise ValueError(f"{name} 应为 (..., 4) 的 (x1, y1, x2, y2)，实为 {tuple(boxes.shape)}")


def _check_threshold(threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"iou_threshold={threshold} 应在 0 与 1 之间：交并比不会超出这个范围")


# ---------------------------------------------------------------- 交并比


def box_area(boxes: Tensor) -> Tensor:
    """面积，平方像素，``(..., 4) -> (...)``。"""
    _check_boxes(boxes, "boxes")
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _intersection(a: Tensor, b: Tensor) -> Tensor:
    """相交的面积，按广播规则逐对。"""
    top_left = torch.maximum(a[..., :2], b[..., :2])
    bottom_right = torch.minimum(a[..., 2:], b[..., 2:])
    sides = (bottom_right - top_left).relu()  # 不相交时某一边为负：两个负数相乘会冒充面积
    return sides[..., 0] * sides[..., 1]


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """两两的交并比 ``|A ∩ B| / |A ∪ B|``。

    参数:
        a: ``(N, 4)``，像素。
        b: ``(M, 4)``，像素。

    返回:
        ``(N, M)``，[0, 1]；两个框的面积都为零时记作 0（torchvision 给出 nan）。

    异常:
        ValueError: 末维不是 4。
    """
    _check_boxes(a, "a")
    _check_boxes(b, "b")
    shared = _intersection(a.unsqueeze(-2), b.unsqueeze(-3))  # (N, M)
    union = box_area(a).unsqueeze(-1) + box_area(b).unsqueeze(-2) - shared
    return torch.where(union > 0, shared / union, 0)


def giou_loss(boxes: Tensor, targets: Tensor, eps: float = 1e-7) -> Tensor:
    """``1 − GIoU``，逐对（不是两两）：``GIoU = IoU − (|C| − |A ∪ B|) / |C|``，``C`` 是最小外接框。

    不相交时 IoU 恒为 0，没有梯度；GIoU 的第二项仍随距离变化，把两个框拉到一起。

    参数:
        boxes, targets: ``(..., 4)``，像素，``x2 ≥ x1``、``y2 ≥ y1``。
        eps: 加在两个分母上，退化的框也不至于除以零。

    返回:
        ``(...)``，[0, 2]，0 表示重合。

    参考: Rezatofighi 等, 2019, arXiv:1902.09630，算法 2。
    """
    _check_boxes(boxes, "boxes")
    _check_boxes(targets, "targets")
    shared = _intersection(boxes, targets)
    union = box_area(boxes) + box_area(targets) - shared
    corner = torch.minimum(boxes[..., :2], targets[..., :2])
    sides = torch.maximum(boxes[..., 2:], targets[..., 2:]) - corner
    hull = sides[..., 0] * sides[..., 1]
    giou = shared / (union + eps) - (hull - union) / (hull + eps)
    return 1 - giou


# ---------------------------------------------------------------- 非极大值抑制


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """非极大值抑制（NMS）：每次留下得分最高的，去掉与它的 IoU 超过阈值的，直到没有剩余。

    时间与内存 ``O(N²)``。得分相同时，原先在前的优先。

    参数:
        boxes: ``(N, 4)``，像素。
        scores: ``(N,)``。
        iou_threshold: IoU **大于**它才去掉。

    返回:
        int64，留下的下标，得分由高到低。

    异常:
        ValueError: 形状不符，或阈值不在 [0, 1]。
    """
    _check_boxes(boxes, "boxes")
    _check_threshold(iou_threshold)
    if boxes.shape[:-1] != scores.shape:
        raise ValueError(f"{tuple(boxes.shape)} 的框应配 (N,) 的得分，实为 {tuple(scores.shape)}")
    order = scores.argsort(descending=True, stable=True)
    overlaps = box_iou(boxes[order], boxes[order]) > iou_threshold
    alive = torch.ones(len(order), dtype=torch.bool, device=boxes.device)
    for i in range(len(order)):
        if alive[i]:
            alive[i + 1 :] &= ~overlaps[i, i + 1 :]
    return order[alive]


def batched_nms(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float) -> Tensor:
    """各类分别做 NMS：不同类的框再重叠也互不抑制。

    参数:
        labels: int64 ``(N,)``；其余同 ``nms``。

    返回:
        int64，留下的下标，得分由高到低。
    """
    if labels.shape != scores.shape:
        raise ValueError(f"labels 应为 {tuple(scores.shape)}，实为 {tuple(labels.shape)}")
    kept = []
    for label in labels.unique():
        mine = (labels == label).nonzero().flatten()
        kept.append(mine[nms(boxes[mine], scores[mine], iou_threshold)])
    keep = torch.cat(kept).sort().values if kept else torch.zeros_like(labels)
    return keep[scores[keep].argsort(descending=True, stable=True)]


# ---------------------------------------------------------------- 平均精度


def match_detections(
    boxes: Tensor, scores: Tensor, truths: Tensor, iou_threshold: float = 0.5
) -> Tensor:
    """一张图、一个类：哪些检出是对的。

    得分高的先挑：在还没有被认领的真实框里取 IoU 最大的一个，不小于阈值就算对，并把它认领；
    否则算错。因此同一个物体检出两次，第二次是错的。

    参数:
        boxes, scores: ``(N, 4)`` 与 ``(N,)``。
        truths: ``(M, 4)``。
        iou_threshold: IoU **不小于**它才算对。

    返回:
        bool ``(N,)``，与 ``boxes`` 同序。
    """
    _check_threshold(iou_threshold)
    hits = torch.zeros(len(boxes), dtype=torch.bool)
    if len(truths) == 0:
        return hits
    overlaps = box_iou(boxes, truths).cpu()
    for i in scores.argsort(descending=True, stable=True).tolist():
        best, j = overlaps[i].max(dim=0)
        if best >= iou_threshold:
            hits[i] = True
            overlaps[:, j] = -1.0  # 已被认领
    return hits


class Curve(NamedTuple):
    """一个类的查准率—查全率曲线与它的 AP。"""

    recall: Tensor  # float64 (N,)，单调不减
    precision: Tensor  # float64 (N,)，未取包络
    ap: float  # 没有真实物体时为 nan


def average_precision(scores: Tensor, hits: Tensor, num_truths: int) -> Curve:
    """一个类的平均精度：查准率包络之下的面积，每个点都算（VOC 2010 起的定义）。

    检出按得分由高到低排好，前 ``k`` 个里对了 ``TP_k`` 个：查准率 ``P_k = TP_k / k``，查全率
    ``R_k = TP_k / num_truths``，``AP = Σ_k (R_k − R_{k−1}) · max_{j ≥ k} P_j``。

    与别处的差别：VOC 2007 只在查全率 0, 0.1, …, 1 这 11 点取包络的平均；COCO 取 101 点，再对
    IoU 阈值 0.50, 0.55, …, 0.95 平均，每张图至多算 100 个检出。配对时，VOC 先取 IoU 最大的
    真实框，它若已被认领就算错；这里与 COCO 一样，只在未被认领的里面挑。

    参数:
        scores: ``(N,)``，所有图的检出合在一起。
        hits: bool ``(N,)``，由 ``match_detections`` 得出。
        num_truths: 真实物体的总数；没有检出到的靠它计入。

    参考: Everingham 等, 2010, 4.2 节；Lin 等, 2014, Microsoft COCO, arXiv:1405.0312。
    """
    if scores.shape != hits.shape:
        raise ValueError(f"scores 与 hits 应同形，实为 {tuple(scores.shape)}、{tuple(hits.shape)}")
    order = scores.argsort(descending=True, stable=True)
    correct = hits[order.to(hits.device)].double().cumsum(dim=0).cpu()
    precision = correct / torch.arange(1, len(correct) + 1)
    if num_truths == 0:
        return Curve(torch.full_like(precision, torch.nan), precision, torch.nan)
    recall = correct / num_truths
    envelope = precision.flip(0).cummax(dim=0).values.flip(0) if len(precision) else precision
    steps = recall.diff(prepend=recall.new_zeros(1))
    return Curve(recall, precision, (steps * envelope).sum().item())


def mean_average_precision(
    predictions: Sequence[Detections],
    truths: Sequence[Objects],
    num_classes: int,
    iou_threshold: float = 0.5,
) -> tuple[float, list[Curve]]:
    """各类 AP 的平均（mAP）；没有真实物体的类不计入。

    参数:
        predictions, truths: 每张图一项，同序。

    返回:
        (mAP，一个真实物体都没有时为 nan；逐类的曲线)。

    异常:
        ValueError: 图数不同。
    """
    if len(predictions) != len(truths):
        raise ValueError(f"预测有 {len(predictions)} 张图而真值有 {len(truths)} 张：应一一对应")
    curves = []
    for k in range(num_classes):
        scores, hits, count = [torch.zeros(0)], [torch.zeros(0, dtype=torch.bool)], 0
        for found, real in zip(predictions, truths, strict=True):
            mine, wanted = found.labels == k, real.boxes[real.labels == k]
            count += len(wanted)
            scores.append(found.scores[mine].cpu())
            hits.append(
                match_detections(found.boxes[mine], found.scores[mine], wanted, iou_threshold)
            )
        curves.append(average_precision(torch.cat(scores), torch.cat(hits), count))
    valid = [curve.ap for curve in curves if curve.ap == curve.ap]  # 去掉 nan
    return (sum(valid) / len(valid) if valid else torch.nan), curves
