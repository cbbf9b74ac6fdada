"""检测器：无锚框、单阶段、一层特征的 FCOS，以及训练它的 focal loss。

特征图上的每个位置各自回答两件事：自己是不是某类物体的中心附近（分类），那个物体的四条边离自己
多远（回归）。没有预先设定的锚框，也没有候选区域；多余的重复由 NMS 去掉。

与论文的差别：
- 只有 1/4 大小的一层特征，不按物体大小分配到五层；同一位置落在几个框里时仍取最小的一个。
- 没有 centre-ness 分支，代之以「中心采样」（作者后来的改进）：只有框中心附近的位置算正样本。
- 距离以 ``STRIDE`` 个像素为单位，``STRIDE · exp(·)``；只有一层，不需要每层一个可学的缩放。
- 主干是几层卷积，不预训练；论文用 ResNet-50 与 FPN。头里用 BatchNorm，论文用 GroupNorm。
- 得分就是分类概率；论文乘以 centre-ness。

维度约定：``B`` 批，``C`` 通道，``H, W`` 图的高与宽，``L`` 位置数 ``(H/4)(W/4)``，``K`` 类别数，
``M`` 一张图至多的物体数。

参考: Tian 等, 2019, FCOS, arXiv:1904.01355；Lin 等, 2017, Focal Loss for Dense Object
Detection, arXiv:1708.02002。页面 detection.md。
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_04_cnn_classic.boxes import Detections, batched_nms, box_area, giou_loss
from chapter_04_cnn_classic.inputs import check_image

STRIDE = 4  # 输入与特征图的边长之比，像素
RADIUS = 1.5  # 中心采样的半径，以 ``STRIDE`` 个像素为单位
PRIOR = 0.01  # 训练之初，每个位置是某类物体的概率
MAX_LOG = 5.0  # exp 之前的上限：4·e^5 ≈ 594 像素，远大于图，只防溢出
BACKGROUND = -1


class Output(NamedTuple):
    """检测器的输出。"""

    logits: Tensor  # (B, L, K)，每类各过一个 sigmoid，不是 softmax
    boxes: Tensor  # (B, L, 4)，像素


class Losses(NamedTuple):
    """两项损失，各除以正样本的个数。"""

    classification: Tensor
    box: Tensor


# ---------------------------------------------------------------- focal loss


def sigmoid_focal_loss(
    logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """focal loss：``−α_t (1 − p_t)^γ log p_t``，逐元素。

    ``p_t`` 是给正确答案的概率。已经分对的（``p_t → 1``）几乎不计，于是成千上万个容易的背景位置
    不会淹没少数的物体。``γ = 0`` 就是加权的二元交叉熵。

    令 ``u = z``（正样本）或 ``−z``（负样本），则 ``log p_t = logsigmoid(u)``、
    ``log(1 − p_t) = logsigmoid(−u)``；全程在对数域里算，``|z|`` 再大也不溢出、不丢精度。

    参数:
        logits: ``(...)``，sigmoid 之前的得分 ``z``。
        targets: 同形，0 或 1。
        alpha: 正样本的权重，负样本为 ``1 − alpha``。
        gamma: 聚焦的程度，≥ 0。

    返回:
        ``(...)``，nats。

    参考: Lin 等, 2017, arXiv:1708.02002，式 (5)。
    """
    if logits.shape != targets.shape:
        shapes = f"{tuple(logits.shape)}、{tuple(targets.shape)}"
        raise ValueError(f"logits 与 targets 应同形，实为 {shapes}")
    if gamma < 0 or not 0 <= alpha <= 1:
        raise ValueError(f"gamma={gamma} 应非负，alpha={alpha} 应在 0 与 1 之间")
    positive = targets > 0.5
    u = torch.where(positive, logits, -logits)
    # torch.where(positive, alpha, 1 - alpha) 得到 float32：两个 Python 数不随 logits 的类型
    weight = torch.where(positive, logits.new_full((), alpha), logits.new_full((), 1 - alpha))
    return -weight * (gamma * F.logsigmoid(-u)).exp() * F.logsigmoid(u)


def prior_bias(prior: float) -> float:
    """使 ``sigmoid(bias) = prior`` 的偏置：``−log((1 − π)/π)``。"""
    return -math.log((1 - prior) / prior)


# ---------------------------------------------------------------- 位置、分配与解码


def locations(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """特征图各位置在原图上的坐标 ``(x, y)``，``(L, 2)``，像素；按行排列，取格子的中心。"""
    y = (torch.arange(height, device=device) + 0.5) * STRIDE
    x = (torch.arange(width, device=device) + 0.5) * STRIDE
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flip(-1).flatten(0, 1)


def boxes_from_distances(points: Tensor, distances: Tensor) -> Tensor:
    """``(x − l, y − t, x + r, y + b)``：``(L, 2)`` 与 ``(..., L, 4) -> (..., L, 4)``，像素。"""
    left_top, right_bottom = distances[..., :2], distances[..., 2:]
    return torch.cat([points - left_top, points + right_bottom], dim=-1)


def assign_targets(points: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """每个位置负责哪个物体：在框内、且离框的中心不超过 ``RADIUS·STRIDE`` 像素；有几个时取最小的框。

    参数:
        points: ``(L, 2)``，像素。
        boxes: ``(B, M, 4)``，像素。
        labels: int64 ``(B, M)``，不足 ``M`` 个处为 −1。

    返回:
        (类别 int64 ``(B, L)``，背景为 −1；负责的框 ``(B, L, 4)``，背景处无意义)。
    """
    corners, opposite = boxes[:, None, :, :2], boxes[:, None, :, 2:]  # (B, 1, M, 2)
    at = points[:, None]  # (L, 1, 2)
    centers = (corners + opposite) / 2
    inside = ((at > corners) & (at < opposite)).all(dim=-1)
    central = ((at - centers).abs() <= RADIUS * STRIDE).all(dim=-1)
    candidate = inside & central & (labels >= 0).unsqueeze(1)  # (B, L, M)
    areas = box_area(boxes).unsqueeze(1).expand_as(candidate)
    smallest, owner = areas.masked_fill(~candidate, math.inf).min(dim=-1)  # (B, L)
    classes = labels.gather(1, owner).masked_fill(smallest == math.inf, BACKGROUND)
    return classes, boxes.gather(1, owner.unsqueeze(-1).expand(-1, -1, 4))


def detection_loss(output: Output, points: Tensor, boxes: Tensor, labels: Tensor) -> Losses:
    """分类的 focal loss（全部位置）与框的 GIoU 损失（只有正样本），各除以正样本数（至少 1）。

    参数:
        output: 检测器的输出。
        points, boxes, labels: 同 ``assign_targets``。
    """
    classes, targets = assign_targets(points, boxes, labels)
    positive = classes != BACKGROUND
    one_hot = F.one_hot(classes.clamp(min=0), output.logits.shape[-1]) * positive.unsqueeze(-1)
    count = positive.sum().clamp(min=1)
    classification = sigmoid_focal_loss(output.logits.float(), one_hot).sum() / count
    box = giou_loss(output.boxes[positive].float(), targets[positive]).sum() / count
    return Losses(classification, box)


def ideal_output(points: Tensor, boxes: Tensor, labels: Tensor, num_classes: int) -> Output:
    """训练目标本身当作输出：正样本的得分近于 1，框恰为真值。

    把它解码、再算 mAP，得到的是分配与 NMS 的上限：被同类大框遮住而遭 NMS 去掉的、太小而没有
    位置负责的，网络再好也找不回来。低得离谱就说明编码或解码写错了，应在训练之前查。

    参数:
        points, boxes, labels: 同 ``assign_targets``。
        num_classes: 类别数 ``K``。
    """
    classes, targets = assign_targets(points, boxes, labels)
    wanted = classes.unsqueeze(-1) == torch.arange(num_classes, device=classes.device)
    return Output(torch.where(wanted, 10.0, -10.0), targets)


@torch.no_grad()
def decode(
    output: Output,
    image_size: tuple[int, int],
    score_threshold: float = 0.05,
    iou_threshold: float = 0.5,
    limit: int = 100,
) -> list[Detections]:
    """网络的输出 -> 每张图的检出：去掉得分低的，取最高的 ``limit`` 个，裁到图内，逐类 NMS。

    参数:
        output: 检测器的输出。
        image_size: (高, 宽)，像素。
        score_threshold: 得分不大于它的不要。AP 看的是整条曲线，所以取得很低；展示时另取。
        iou_threshold: NMS 的阈值。
        limit: 每张图至多留下多少个进入 NMS。

    返回:
        ``B`` 个 ``Detections``，得分由高到低；什么都没检出时各项的长度为零。
    """
    height, width = image_size
    corner = output.boxes.new_tensor([width, height, width, height])
    found = []
    for probabilities, boxes in zip(output.logits.sigmoid(), output.boxes, strict=True):
        where, labels = (probabilities > score_threshold).nonzero(as_tuple=True)
        scores = probabilities[where, labels]
        top = scores.argsort(descending=True, stable=True)[:limit]
        where, labels, scores = where[top], labels[top], scores[top]
        clipped = torch.minimum(boxes[where].relu(), corner)
        keep = batched_nms(clipped, scores, labels, iou_threshold)
        found.append(Detections(clipped[keep], scores[keep], labels[keep]))
    return found


# ---------------------------------------------------------------- 网络


def conv_block(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """3×3 卷积 -> BatchNorm -> ReLU；卷积不要偏置，BatchNorm 会把它减掉。"""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class Detector(nn.Module):
    """一层特征的 FCOS。

    主干缩到 1/8（看得更远），再放大一倍与 1/4 大小的特征相加（位置更准），即只有一级的 FPN。

    参数:
        num_classes: 类别数，不含背景。
        width: 第一层的通道数，其余按比例。

    形状: ``(B, 3, H, W) -> Output``，``H, W`` 是 8 的倍数。
    """

    def __init__(self, num_classes: int, width: int = 24) -> None:
        super().__init__()
        if num_classes < 1 or width < 1:
            raise ValueError(f"num_classes={num_classes} 与 width={width} 应为正整数")
        self.stem = nn.Sequential(
            conv_block(3, width, stride=2),  # 1/2
            conv_block(width, 2 * width, stride=2),  # 1/4
            conv_block(2 * width, 2 * width),
        )
        self.deep = nn.Sequential(
            conv_block(2 * width, 4 * width, stride=2),  # 1/8
            conv_block(4 * width, 4 * width),
            conv_block(4 * width, 4 * width),
            nn.Conv2d(4 * width, 2 * width, 1),
        )
        self.merge = conv_block(2 * width, 2 * width)
        self.class_head = nn.Sequential(
            conv_block(2 * width, 2 * width), nn.Conv2d(2 * width, num_classes, 3, padding=1)
        )
        self.box_head = nn.Sequential(
            conv_block(2 * width, 2 * width), nn.Conv2d(2 * width, 4, 3, padding=1)
        )
        for head, bias in ((self.class_head[-1], prior_bias(PRIOR)), (self.box_head[-1], 0.0)):
            nn.init.normal_(head.weight, std=0.01)
            nn.init.constant_(head.bias, bias)

    def forward(self, x: Tensor) -> Output:
        check_image(x, 3, 8, "Detector")
        if x.shape[2] % 8 or x.shape[3] % 8:
            raise ValueError(f"Detector 的输入边长应为 8 的倍数，实为 {tuple(x.shape[2:])}")
        near = self.stem(x)  # (B, C, H/4, W/4)
        features = self.merge(near + F.interpolate(self.deep(near), scale_factor=2.0))
        logits = self.class_head(features).flatten(2).transpose(1, 2)  # -> (B, L, K)
        raw = self.box_head(features).flatten(2).transpose(1, 2)  # -> (B, L, 4)
        distances = STRIDE * raw.clamp(max=MAX_LOG).exp()
        points = locations(*features.shape[2:], device=x.device)
        return Output(logits, boxes_from_distances(points, distances))
