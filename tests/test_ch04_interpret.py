"""解释方法的数值：线性模型上有解析解，Grad-CAM 退化成 CAM，FGSM 的增量恰为 ε‖g‖₁；都不留痕迹。"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_04_cnn_classic.interpret import (
    best_window,
    deletion_drop,
    feature_maps,
    fgsm,
    grad_cam,
    occlusion,
    random_window,
    rank_correlation,
    saliency,
    window_starts,
)
from chapter_04_cnn_classic.lenet import lenet5
from chapter_04_cnn_classic.vgg import vgg_small
from tests.parity import assert_equal, normal
from utils import make_generator


class Linear(nn.Module):
    """``(B, 2, 5, 6) -> (B, 3)`` 的线性分类器；两个通道，长宽不等。"""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(60, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))

    def weight(self, target: Tensor) -> Tensor:
        """每张图的 ``w_t``，``(B, 2, 5, 6)``。"""
        return self.layer.weight[target].view(-1, 2, 5, 6).detach()


@pytest.fixture
def linear() -> tuple[Linear, Tensor, Tensor]:
    return Linear(), normal(4, 2, 5, 6), torch.tensor([0, 2, 1, 2])


# ---------------------------------------------------------------- 线性模型的解析解


def test_saliency_of_a_linear_model_is_its_weight(linear) -> None:
    model, x, y = linear
    assert_equal(saliency(model, x, y), model.weight(y).abs().amax(dim=1))


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (2, 1), (3, 2), (5, 4)])
@pytest.mark.parametrize("per_image", [False, True])
def test_occlusion_of_a_linear_model(linear, window: int, stride: int, per_image: bool) -> None:
    model, x, y = linear
    fill = normal(4, 2, 1, 1, seed=5) if per_image else 0.3
    heat = occlusion(model, x, y, window, stride, fill)
    contribution = (model.weight(y) * (x - fill)).sum(dim=1)  # 每个像素对得分的贡献
    total, count = torch.zeros_like(heat), torch.zeros(5, 6)
    for top in sorted({*range(0, 5 - window + 1, stride), 5 - window}):
        for left in sorted({*range(0, 6 - window + 1, stride), 6 - window}):
            area = (..., slice(top, top + window), slice(left, left + window))
            total[area] += contribution[area].sum(dim=(1, 2), keepdim=True)
            count[area] += 1
    assert_equal(heat, total / count)


def test_occlusion_in_probability(linear) -> None:
    model, x, y = linear
    covered = x.clone()
    covered[:, :, 2, 3] = 0
    with torch.no_grad():
        p = [model(v).softmax(1).gather(1, y[:, None])[:, 0] for v in (x, covered)]
    assert_equal(occlusion(model, x, y, 1, 1, probability=True)[:, 2, 3], p[0] - p[1])


@pytest.mark.parametrize(
    ("size", "window", "stride"), [(28, 7, 3), (28, 7, 2), (5, 5, 1), (9, 4, 4)]
)
def test_windows_cover_every_pixel(size: int, window: int, stride: int) -> None:
    starts = window_starts(size, window, stride)
    covered = {p for start in starts for p in range(start, start + window)}
    assert covered == set(range(size)) and len(set(starts)) == len(starts)


def test_grad_cam_is_cam_after_global_average_pooling() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 7, 3, stride=2), nn.ReLU())
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 4)).double()
    x, y = normal(3, 3, 13, 11), torch.tensor([3, 0, 1])
    maps = conv(x).detach()  # (3, 7, 6, 5)
    cam = (model[3].weight[y].detach()[:, :, None, None] * maps).sum(1, keepdim=True)
    expected = F.interpolate(
        F.relu(cam) / (6 * 5), size=(13, 11), mode="bilinear", align_corners=False
    )[:, 0]
    assert expected.max() > 0
    assert_equal(grad_cam(model, x, y, conv), expected)


def test_grad_cam_survives_an_inplace_relu() -> None:
    x, y = normal(2, 1, 28, 28).float(), torch.tensor([1, 4])
    plain, inplace = vgg_small(11, 10, 1, 4), vgg_small(11, 10, 1, 4)
    inplace.load_state_dict(plain.state_dict())
    for layer in plain.features:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    for index in (1, 5):  # BatchNorm 之后就是就地的 ReLU
        heats = [grad_cam(m, x, y, m.features[index]) for m in (plain, inplace)]
        maps = [feature_maps(m, x, [m.features[index]])[0] for m in (plain, inplace)]
        assert torch.equal(*heats) and torch.equal(*maps) and (maps[1] < 0).any()


# ---------------------------------------------------------------- FGSM

MEAN, STD = torch.tensor([0.4, 0.5]).double(), torch.tensor([0.2, 0.3]).double()


def inside(shape: tuple[int, ...]) -> Tensor:
    """归一化的图像，像素值在 0.3 到 0.7 之间：小的 ε 不会碰到 0 与 1。"""
    pixels = 0.3 + 0.4 * torch.rand(shape, generator=make_generator(1), dtype=torch.float64)
    return (pixels - MEAN.view(-1, 1, 1)) / STD.view(-1, 1, 1)


def test_fgsm_raises_a_linear_loss_by_epsilon_times_the_l1_norm() -> None:
    model, x, y, epsilon = Linear(), inside((4, 2, 5, 6)), torch.tensor([0, 2, 1, 2]), 0.05

    def score(images: Tensor) -> Tensor:
        return model(images).detach().gather(1, y[:, None])[:, 0]

    moved = fgsm(model, x, y, epsilon, MEAN, STD, lambda s, t: -s.gather(1, t[:, None]).sum())
    # 对像素值的梯度是 w / std，故得分恰降 ε·‖w / std‖₁
    norm = (model.weight(y) / STD.view(-1, 1, 1)).abs().sum(dim=(1, 2, 3))
    assert_equal(score(x) - score(moved), epsilon * norm)


def test_fgsm_on_two_class_logistic_regression() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(60, 2)).double()
    x, y, epsilon = inside((3, 2, 5, 6)), torch.tensor([0, 1, 0]), 0.02
    moved = fgsm(model, x, y, epsilon, MEAN, STD)
    other = model[1].weight[1 - y] - model[1].weight[y]
    norm = (other.detach().view(-1, 2, 5, 6) / STD.view(-1, 1, 1)).abs().sum(dim=(1, 2, 3))
    logits = model(x).detach()
    margin = (logits.gather(1, 1 - y[:, None]) - logits.gather(1, y[:, None]))[:, 0]
    loss = F.cross_entropy(model(moved), y, reduction="none").detach()
    assert_equal(loss, torch.log1p(torch.exp(margin + epsilon * norm)))


def test_fgsm_moves_pixels_by_epsilon_and_stays_in_range() -> None:
    model, y = Linear(), torch.tensor([0, 1])
    pixels = torch.rand(2, 2, 5, 6, generator=make_generator(2), dtype=torch.float64)
    x = (pixels - MEAN.view(-1, 1, 1)) / STD.view(-1, 1, 1)
    moved = fgsm(model, x, y, 0.3, MEAN, STD) * STD.view(-1, 1, 1) + MEAN.view(-1, 1, 1)
    assert moved.min() > -1e-12 and moved.max() < 1 + 1e-12
    free = (pixels > 0.3) & (pixels < 0.7)
    assert_equal((moved - pixels).abs()[free], torch.full_like(pixels[free], 0.3))
    assert (moved - pixels).abs().max() < 0.3 + 1e-12
    assert torch.equal(fgsm(model, x, y, 0.0, MEAN, STD), x)


def test_one_image_s_attack_does_not_depend_on_the_batch() -> None:
    model, x, y = lenet5(), normal(5, 1, 28, 28).float(), torch.arange(5)
    stats = (torch.tensor([0.5]), torch.tensor([0.25]))
    whole = fgsm(model, x, y, 0.1, *stats)
    alone = fgsm(model, x[3:4], y[3:4], 0.1, *stats)
    assert (whole[3] != alone[0]).float().mean() < 0.01  # 舍入可使个别近零的梯度变号


# ---------------------------------------------------------------- 删除检验


def test_windows_and_deletion_by_hand() -> None:
    heat = torch.zeros(2, 6, 7)
    heat[0, 3:5, 4:6] = 1.0
    heat[1, 0:2, 0:2] = 1.0
    assert best_window(heat, 2).tolist() == [[3, 4], [0, 0]]
    corners = random_window(1000, (6, 7), 2, make_generator(0))
    assert corners.amin(0).tolist() == [0, 0] and corners.amax(0).tolist() == [4, 5]
    model, x, y = Linear(), normal(2, 2, 5, 6), torch.tensor([1, 2])
    drop = deletion_drop(model, x, y, torch.tensor([[0, 1], [3, 4]]), 2, fill=0.5)
    covered = x.clone()
    covered[0, :, 0:2, 1:3] = 0.5
    covered[1, :, 3:5, 4:6] = 0.5
    with torch.no_grad():
        p = [model(v).softmax(1).gather(1, y[:, None])[:, 0] for v in (x, covered)]
    assert_equal(drop, p[0] - p[1])


def test_rank_correlation_by_hand() -> None:
    a = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [3.0, 4.0]]])
    b = torch.stack([a[0].exp(), -a[1]])  # 单调的变换不改变名次
    assert rank_correlation(a, b).tolist() == pytest.approx([1.0, -1.0])
    c = torch.tensor([[[1.0, 2.0], [4.0, 3.0]]])
    assert rank_correlation(a[:1], c).item() == pytest.approx(1 - 6 * 2 / (4 * 15))
    noise = normal(50, 20, 20), normal(50, 20, 20, seed=1)
    assert rank_correlation(*noise).abs().mean() < 3 / math.sqrt(400)


# ---------------------------------------------------------------- 不留痕迹

METHODS = {
    "saliency": lambda m, x, y: saliency(m, x, y),
    "occlusion": lambda m, x, y: occlusion(m, x, y, stride=7),
    "grad_cam": lambda m, x, y: grad_cam(m, x, y, m.features[3]),
    "feature_maps": lambda m, x, y: feature_maps(m, x, [m.features[0], m.features[3]])[1],
    "fgsm": lambda m, x, y: fgsm(m, x, y, 0.1, torch.tensor([0.5]), torch.tensor([0.2])),
    "deletion": lambda m, x, y: deletion_drop(m, x, y, torch.zeros(3, 2, dtype=torch.long), 7),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_leave_no_trace(name: str) -> None:
    model = vgg_small(11, 10, 1, 4)
    model.train()
    model.features[1].eval()  # 混合的模式也要原样恢复
    x, y = normal(3, 1, 28, 28).float(), torch.tensor([0, 5, 9])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    modes, original = [m.training for m in model.modules()], x.clone()
    with torch.no_grad():  # 在 no_grad 里也能用
        result = METHODS[name](model, x, y)
        again = METHODS[name](model, x, y)
    assert torch.equal(result, again) and not result.requires_grad and len(result) == 3
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    assert all((p.grad == 1).all() for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(x, original) and not x.requires_grad


@pytest.mark.parametrize("name", METHODS)
def test_methods_clean_up_after_an_error(name: str) -> None:
    model = vgg_small(11, 10, 1, 4).train()
    with pytest.raises(ValueError, match="小图 VGG 的输入"):
        METHODS[name](model, torch.zeros(3, 2, 28, 28), torch.zeros(3, dtype=torch.long))
    assert all(m.training and not m._forward_hooks for m in model.modules())


def test_errors_name_the_rule() -> None:
    model, x, y = lenet5(), torch.zeros(2, 1, 28, 28), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"target 应为 \(B,\)"):
        saliency(model, x, y[:1])
    with pytest.raises(ValueError, match="没有经过 layer"):
        grad_cam(model, x, y, nn.ReLU())
    with pytest.raises(ValueError, match="没有经过 layer"):
        grad_cam(model, x, y, model.classifier[0])
    with pytest.raises(ValueError, match=r"没有经过这些层：\['Tanh'\]"):
        feature_maps(model, x, [model.features[0], nn.Tanh()])
    with pytest.raises(ValueError, match="窗口 29"):
        occlusion(model, x, y, window=29)
    with pytest.raises(ValueError, match="8 级灰度写 8/255"):
        fgsm(model, x, y, 8, torch.tensor([0.5]), torch.tensor([0.2]))
