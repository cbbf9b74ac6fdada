"""第 4 章的 U-Net、Dice 损失与 mIoU：手算的例子、形状、对称性、学得会。"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chapter_04_cnn_classic.scenes import CLASS_NAMES, make_scenes
from chapter_04_cnn_classic.unet import (
    UNet,
    class_iou,
    confusion_counts,
    dice_loss,
    mean_iou,
)
from tests.invariants import assert_batch_independent
from tests.parity import assert_equal, normal
from utils import make_generator

# ---------------------------------------------------------------- 网络


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (24, 40), (56, 8)])
def test_output_keeps_the_size_at_odd_multiples(size: tuple[int, int], skips: bool) -> None:
    model = UNet(5, widths=(4, 6, 8, 10), skips=skips)
    output = model(torch.randn(2, 3, *size, generator=make_generator(0)))
    assert output.shape == (2, 5, *size)
    output.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_parameter_count_by_hand() -> None:
    """宽度 (2, 3)、1 个输入通道、2 类：3×3 卷积无偏置，BatchNorm 每通道 2 个参数。"""
    down = 9 * 1 * 2 + 9 * 2 * 2 + 4 * 2
    bottom = 9 * 2 * 3 + 9 * 3 * 3 + 4 * 3
    up = 4 * 3 * 2 + 2
    head = 2 * 2 + 2
    for skips, joined in ((True, 4), (False, 2)):
        decoder = 9 * joined * 2 + 9 * 2 * 2 + 4 * 2
        model = UNet(2, in_channels=1, widths=(2, 3), skips=skips)
        expected = down + bottom + up + decoder + head
        assert sum(p.numel() for p in model.parameters()) == expected


def small(depth: int = 2, skips: bool = True) -> UNet:
    """float64、评估模式的小 U-Net，BatchNorm 的统计量与系数都不是初值。"""
    model = UNet(3, in_channels=2, widths=tuple(range(3, 4 + depth)), skips=skips).double()
    with torch.no_grad():
        for _ in range(3):
            model(normal(8, 2, 16, 16))
    return model.eval()


@pytest.mark.parametrize("skips", [True, False])
def test_translation_by_the_pooling_stride_moves_the_output(skips: bool) -> None:
    """输入平移 2^depth 像素，输出跟着平移（离边够远处）；平移 1 像素则不然。"""
    model, size, margin = small(skips=skips), 96, 40
    picture = normal(1, 2, size + 8, size + 8)
    with torch.no_grad():
        whole = model(picture[..., :size, :size])
        moved, off = (model(picture[..., s : s + size, s : s + size]) for s in (4, 1))
    inner = slice(margin, size - margin)
    shifted = slice(margin + 4, size - margin + 4)
    assert_equal(moved[..., inner, inner], whole[..., shifted, shifted])
    by_one = slice(margin + 1, size - margin + 1)
    assert (off[..., inner, inner] - whole[..., by_one, by_one]).abs().max() > 1e-5


def reach(function, size: int) -> int:
    """中央一个输出取决于多宽的输入，由梯度量出。"""
    x = normal(1, 2, size, size).requires_grad_()
    y = function(x)
    middle = y.shape[-1] // 2
    y[0, :, middle, middle].sum().backward()
    columns = (x.grad != 0).any(dim=2).flatten(0, 1).any(dim=0).nonzero().flatten()
    return (columns[-1] - columns[0] + 1).item()


@pytest.mark.parametrize(("depth", "expected"), [(3, 68), (4, 140)])
def test_receptive_field_of_the_bottom(depth: int, expected: int) -> None:
    """``1 + Σ 4·2^i + Σ 2^i``；激活与最大池化换成处处有梯度的，才量得全。"""
    assert expected == 1 + 4 * (2 ** (depth + 1) - 1) + (2**depth - 1)
    model = UNet(3, in_channels=2, widths=(2,) * (depth + 1)).double()
    stages = [*model.encoder, model.bottom]

    def down(x: Tensor) -> Tensor:
        for level, stage in enumerate(stages):
            for conv in (layer for layer in stage if isinstance(layer, torch.nn.Conv2d)):
                x = conv(x)
            x = F.avg_pool2d(x, 2) if level < depth else x
        return x

    assert reach(down, 2 * expected // 32 * 32) == expected
    assert reach(lambda x: stages[0][3](stages[0][0](x)), 32) == 5  # 没有池化的两层 3×3


@pytest.mark.parametrize("skips", [True, False])
def test_evaluation_does_not_depend_on_the_batch(skips: bool) -> None:
    assert_batch_independent(small(skips=skips), normal(3, 2, 16, 8))


def test_skips_carry_detail_that_the_bottom_never_sees() -> None:
    """2×2 池化之后就消失的细节：没有跳跃连接，输出不可能知道它在哪里。"""
    for skips in (True, False):
        model = small(depth=1, skips=skips)
        model.encoder[0] = torch.nn.Conv2d(2, 3, 1, bias=False).double()  # 逐点，不看邻居
        x = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
        y = x.clone()
        x[..., 4, 4], y[..., 5, 5] = 1.0, 1.0  # 同一个池化窗口里的两个位置
        with torch.no_grad():
            difference = (model(x) - model(y)).abs().max().item()
        assert (difference > 1e-6) == skips


@pytest.mark.parametrize("skips", [True, False])
def test_a_few_scenes_can_be_learned_by_heart(skips: bool) -> None:
    scenes = make_scenes(4, make_generator(0), size=32)
    x, y = scenes.images.float() / 255 - 0.5, scenes.masks
    model = UNet(1 + len(CLASS_NAMES), widths=(12, 24, 48), skips=skips)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 150)  # 末尾不再跳动
    for _ in range(150):
        optimizer.zero_grad()
        logits = model(x)
        (F.cross_entropy(logits, y) + dice_loss(logits, y)).backward()
        optimizer.step()
        schedule.step()
    guesses = model(x).argmax(dim=1)
    # 没有跳跃连接时边界糊一些，要多走许多步才背得一像素不差
    assert mean_iou(confusion_counts(guesses, y, 5)) > (0.95 if skips else 0.85)


@pytest.mark.parametrize("shape", [(1, 3, 60, 64), (1, 3, 64, 4), (1, 1, 64, 64), (3, 64, 64)])
def test_wrong_input_is_one_line(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"U-Net 的输入应为 \(B, 3, H, W\)") as caught:
        UNet(5, widths=(2, 2, 2, 2))(torch.zeros(shape))
    assert str(shape) in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_arguments_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"widths=\(4,\) 至少两级"):
        UNet(5, widths=(4,))
    with pytest.raises(ValueError, match="num_classes=1 至少为 2"):
        UNet(1)
    logits = torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="标签应在 0 与 1 之间，实有 0 到 2"):
        dice_loss(logits, torch.tensor([[0, 1, 2, 0]]))
    with pytest.raises(ValueError, match="形状不相配"):
        dice_loss(logits, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="形状应相同"):
        confusion_counts(torch.zeros(2, 2), torch.zeros(4), 2)
    with pytest.raises(ValueError, match="实有 -1 到 0"):
        confusion_counts(torch.zeros(2).long(), torch.tensor([-1, 0]), 2)


# ---------------------------------------------------------------- Dice


def test_dice_by_hand() -> None:
    """segmentation.md 的例子：两个像素、两类，概率 (3/4, 1/4) 与 (1/2, 1/2)，真值 0 与 1。"""
    p = torch.tensor([[[3 / 4, 1 / 2], [1 / 4, 1 / 2]]], dtype=torch.float64)  # (1, K, 2)
    labels = torch.tensor([[0, 1]])
    first = 2 * (3 / 4) / (9 / 16 + 1 / 4 + 1)  # 类 0：交 3/4，Σp² = 13/16，Σg² = 1 -> 24/29
    second = 2 * (1 / 2) / (1 / 16 + 1 / 4 + 1)  # 类 1：交 1/2，Σp² = 5/16，Σg² = 1 -> 16/21
    assert first == pytest.approx(24 / 29) and second == pytest.approx(16 / 21)
    loss = dice_loss(p.log(), labels, eps=0.0)
    assert loss.item() == pytest.approx(1 - (24 / 29 + 16 / 21) / 2)


def test_dice_gradient_is_the_formula() -> None:
    """``∂D/∂p_j = 2 (g_j − D p_j) / (Σ p² + Σ g² + ε)``，经 softmax 传回得分。"""
    logits, eps = normal(2, 3, 4, 4, seed=1), 0.7
    labels = torch.randint(0, 3, (2, 4, 4), generator=make_generator(2))
    leaf = logits.clone().requires_grad_()
    dice_loss(leaf, labels, eps).backward()
    p = logits.softmax(dim=1)
    g = F.one_hot(labels, 3).movedim(-1, 1).double()
    size = (p**2 + g).sum((0, 2, 3), keepdim=True) + eps
    dice = (2 * (p * g).sum((0, 2, 3), keepdim=True) + eps) / size
    gp = -2 * (g - dice * p) / size / 3  # 三类的平均
    expected = p * (gp - (p * gp).sum(dim=1, keepdim=True))  # softmax 的反向
    assert_equal(leaf.grad, expected)
    assert torch.autograd.gradcheck(lambda x: dice_loss(x, labels, eps), leaf)


def test_dice_limits() -> None:
    labels = torch.randint(0, 3, (2, 8, 8), generator=make_generator(0))
    right = 100.0 * F.one_hot(labels, 3).movedim(-1, 1).double()
    wrong = 100.0 * F.one_hot((labels + 1) % 3, 3).movedim(-1, 1).double()
    assert dice_loss(right, labels).item() == pytest.approx(0, abs=1e-12)
    assert dice_loss(wrong, labels, eps=0.0).item() == pytest.approx(1)
    empty = torch.zeros(1, 4, dtype=torch.int64)  # 没有第 1、2 类，也没有预测它们
    scores = torch.tensor([100.0, 0.0, 0.0]).view(1, 3, 1).expand(1, 3, 4)
    assert dice_loss(scores, empty).item() == pytest.approx(0, abs=1e-6)


def test_background_dilutes_cross_entropy_but_not_the_dice_of_the_foreground() -> None:
    """10 个前景像素全部猜成背景：背景由 10 个增到 990 个，交叉熵只剩 1/50，前景的 D 始终是 0。"""
    for extra in (10, 990):
        labels = torch.cat([torch.ones(10), torch.zeros(extra)]).long().unsqueeze(0)
        logits = torch.zeros(1, 2, 10 + extra, dtype=torch.float64)
        logits[:, 0] = 60.0  # 十分肯定是背景
        assert F.cross_entropy(logits, labels).item() == pytest.approx(60 * 10 / (10 + extra))
        background = 2 * extra / (10 + extra + extra)
        loss = dice_loss(logits, labels, eps=0.0).item()
        assert loss == pytest.approx(1 - (background + 0) / 2) and loss > 0.5


def test_confident_mistakes_move_cross_entropy_but_not_dice() -> None:
    """错得十分肯定：交叉熵对得分的梯度仍近于 −1/n，Dice 的经 softmax 消失。"""
    labels = torch.ones(1, 4, dtype=torch.int64)
    gradients = []
    for loss in (F.cross_entropy, dice_loss):
        logits = torch.zeros(1, 2, 4, dtype=torch.float64)
        logits[:, 0] = 20.0
        logits.requires_grad_()
        loss(logits, labels).backward()
        gradients.append(logits.grad[0, 1, 0].item())
    assert gradients[0] == pytest.approx(-1 / 4) and abs(gradients[1]) < 1e-8


# ---------------------------------------------------------------- mIoU


def test_mean_iou_by_hand() -> None:
    """segmentation.md 的例子：4×4，三类，混淆矩阵、各类 IoU 与 mIoU。"""
    truth = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 2, 2]])
    guess = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 1, 0], [0, 0, 2, 0]])
    counts = confusion_counts(guess, truth, 3)
    assert counts.tolist() == [[9, 1, 0], [1, 3, 0], [1, 0, 1]]
    assert class_iou(counts).tolist() == pytest.approx([9 / 12, 3 / 5, 1 / 2])
    assert mean_iou(counts) == pytest.approx(37 / 60)
    accuracy = (counts.diagonal().sum() / counts.sum()).item()
    assert accuracy == pytest.approx(13 / 16)


def test_absent_classes_are_left_out_but_missed_ones_are_not() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    perfect = confusion_counts(labels, labels, 4)
    assert class_iou(perfect)[2:].isnan().all() and mean_iou(perfect) == 1.0
    missed = confusion_counts(torch.zeros(4, dtype=torch.int64), labels, 4)
    assert mean_iou(missed) == pytest.approx((2 / 4 + 0) / 2)
    invented = confusion_counts(torch.tensor([0, 0, 1, 3]), labels, 4)
    assert mean_iou(invented) == pytest.approx((1 + 1 / 2 + 0) / 3)


def test_summed_counts_equal_the_whole_and_batch_means_do_not() -> None:
    generator = make_generator(0)
    labels = torch.randint(0, 3, (12, 16), generator=generator)
    guesses = torch.where(torch.rand(12, 16, generator=generator) < 0.3, 0, labels)
    labels[:6] = labels[:6].clamp(max=1)  # 前一半没有第 2 类
    whole = confusion_counts(guesses, labels, 3)
    parts = [confusion_counts(guesses[i : i + 5], labels[i : i + 5], 3) for i in range(0, 12, 5)]
    assert torch.equal(sum(parts), whole)
    averaged = sum(map(mean_iou, parts)) / len(parts)
    assert math.isfinite(averaged) and abs(averaged - mean_iou(whole)) > 1e-3
