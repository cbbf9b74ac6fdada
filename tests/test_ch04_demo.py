"""demo.py 与 visualize.py 的专题：所用的小工具算得对，报错说得清，权重装得进。"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chapter_04_cnn_classic import demo, visualize
from chapter_04_cnn_classic.alexnet import alexnet
from chapter_04_cnn_classic.fitting import accuracy, fit, normalized, small_mlp
from chapter_04_cnn_classic.lenet import lenet5
from chapter_04_cnn_classic.topics_cnn import (
    SOBEL,
    equivariance_gaps,
    learn_kernel,
    lenet_bn,
    patch_hessian,
    permute_pixels,
    permuted_training_gap,
)
from chapter_04_cnn_classic.topics_structure import (
    blur_pool,
    layer_costs,
    mismatches,
    on_meta,
    stripes,
    thin_strokes,
)
from chapter_04_cnn_classic.vgg import vgg16, vgg_small
from tests.parity import assert_equal, normal
from utils import UserError, make_generator

# ---------------------------------------------------------------- 训练与平移


def test_fit_is_reproducible_and_learns() -> None:
    train = normalized("synth-digits", "train", 300)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = fit(small_mlp(784), train[:2], 8, make_generator(0))
        runs.append(accuracy(model, train.x, train.y))
        assert not model.training
    assert runs[0] == runs[1] > 0.9


def test_test_set_is_normalised_by_the_training_set() -> None:
    train = normalized("synth-digits", "train", 400)
    test = normalized("synth-digits", "test", 100, (train.mean, train.std))
    assert train.x.mean().abs() < 1e-3 and train.x.std().item() == pytest.approx(1, abs=1e-3)
    assert torch.equal(test.mean, train.mean) and test.x.mean().abs() > 1e-4


# ---------------------------------------------------------------- 边缘、等变、打乱


def test_patch_hessian_is_the_second_derivative() -> None:
    x, y = normal(2, 1, 7, 8), normal(2, 1, 5, 6, seed=1)

    def loss(w):
        return (F.conv2d(x, w.view(1, 1, 3, 3)) - y).square().mean() / 2

    expected = torch.autograd.functional.hessian(loss, normal(9, seed=2))
    assert_equal(patch_hessian(x), expected)


def test_learn_kernel_finds_any_kernel_at_the_predicted_rate() -> None:
    x = normal(4, 1, 20, 20)
    target = F.conv2d(x, torch.tensor(SOBEL, dtype=torch.float64)[None, None])
    kernel, errors, condition = learn_kernel(x, target, 12)
    rate = (condition - 1) / (condition + 1)
    assert errors[-1] < 1e-6 and torch.allclose(kernel, torch.tensor(SOBEL).double(), atol=1e-6)
    for step, error in enumerate(errors, start=1):
        assert error <= 12**0.5 * rate**step + 1e-15  # ‖w*‖₂ = √12


def test_equivariance_table() -> None:
    gaps = equivariance_gaps(normal(2, 1, 12, 12), normal(4, 1, 3, 3, seed=1))
    assert max(gaps["conv, circular"]) < 1e-14 and max(gaps["global avg"]) < 1e-12
    for name in ("conv, stride 2", "max pool 2", "avg pool 2"):
        assert gaps[name][0] > 0.05 and gaps[name][1] < 1e-14  # 移一整格就又等变了
    assert min(gaps["conv, zero pad"]) > 0.05  # 边界破坏等变


def test_zero_padding_breaks_equivariance_only_near_the_border() -> None:
    x, weight = normal(1, 1, 12, 12), normal(4, 1, 3, 3, seed=1)
    a = F.conv2d(x.roll(2, dims=3), weight, padding=1)
    b = F.conv2d(x, weight, padding=1).roll(2, dims=3)
    differs = ((a - b).abs() > 1e-12).any(dim=1)[0].any(dim=0)
    assert differs.nonzero().flatten().tolist() == [0, 1, 2, 11]


def test_permuting_pixels_permutes_columns() -> None:
    x, order = normal(3, 1, 4, 5), torch.randperm(20, generator=make_generator(0))
    layer = nn.Linear(20, 2).double()
    before = layer(x.flatten(1))
    with torch.no_grad():
        layer.weight.copy_(layer.weight[:, order])
    assert_equal(layer(permute_pixels(x, order).flatten(1)).detach(), before.detach())
    train = normalized("synth-digits", "train", 128)
    order = torch.randperm(784, generator=make_generator(0))
    assert permuted_training_gap(train, order, 2, 0) < 1e-10  # 训练之后仍然如此


def test_batch_norm_follows_each_convolution() -> None:
    kinds = [type(layer).__name__ for layer in lenet_bn().features]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"] * 2
    assert lenet_bn()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


# ---------------------------------------------------------------- 结构


@pytest.mark.parametrize(
    ("make", "params", "macs"),
    [(alexnet, 61_100_840, 714_188_480), (vgg16, 138_357_544, 15_470_264_320)],
    ids=["alexnet", "vgg16"],
)
def test_layer_costs(make, params: int, macs: int) -> None:
    rows = layer_costs(on_meta(make), 224)
    assert sum(r[1] for r in rows) == params and sum(r[2] for r in rows) == macs
    name, count, products, memory = rows[1]
    if make is vgg16:  # 64 -> 64 个 3×3，224×224 个输出
        assert (name, count) == ("conv2", 64 * 64 * 9 + 64)
        assert products == 64 * 64 * 9 * 224**2 and memory == 64 * 224**2 * 4 / 2**20


def test_formula_and_gradient_agree() -> None:
    wrong, total = mismatches(lenet5().features, 28)
    assert (wrong, total) == (0, 5 * 28 * 28)


def test_blur_pool_by_hand() -> None:
    flat = torch.full((1, 2, 8, 8), 3.0)
    assert torch.equal(blur_pool(flat, 2), flat[..., ::2, ::2])
    one = torch.zeros(1, 1, 8, 8)
    one[..., 3, 3] = 16.0
    pooled = blur_pool(one, 2)  # 最大值铺到 (2..3)²，再以 [1 2 1]/4 模糊，取偶数行列
    line = torch.tensor([0.0, 3.0, 1.0, 0.0])  # 位置 0 2 4 6 上的 [1 2 1]·[1 1] / 4 = 0 3 1 0
    assert torch.equal(pooled[0, 0], torch.outer(line, line))


def test_thin_strokes_and_stripes() -> None:
    x = torch.zeros(1, 1, 7, 7)
    x[..., 2:5, :] = torch.tensor([0.6, 1.0, 0.6])[:, None]
    thin = thin_strokes(x)
    assert (thin[0, 0, 3] == 1).all() and thin[0, 0, [0, 1, 5, 6]].sum() == 0
    assert stripes(4)[0, 0].tolist() == [[1, 0, 1, 0]] * 4


# ---------------------------------------------------------------- 入口


def test_every_topic_asks_a_question() -> None:
    assert list(demo.TOPICS) == [
        "edge", "equivariance", "shuffled", "ablation", "receptive", "cost", "pooling",
    ]  # fmt: skip
    assert all("？" in topic.__doc__.splitlines()[0] for topic in demo.TOPICS.values())


@pytest.mark.parametrize("name", ["lenet", "vgg11_bn"])
def test_weights_load(name: str, tmp_path: Path) -> None:
    model = lenet5() if name == "lenet" else vgg_small(11, 10, 1, 8)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    out = ["--smoke", "--out-dir", str(tmp_path / "out"), "--device", "cpu"]
    argv = [*out, "--model", name, "--weights", str(tmp_path / "w.pt")]
    metrics = visualize.main(argv)
    assert metrics["attack"]["epsilon"][0] == 0
    names = {"filters.png", "feature_maps.png", "occlusion.png", "adversarial.png"}
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == names


def test_wrong_weights_are_named(tmp_path: Path) -> None:
    path, out = tmp_path / "w.pt", ["--smoke", "--out-dir", str(tmp_path / "out")]
    cases = {
        "缺少 features.0.weight": {"a": torch.zeros(1)},
        "不属于这个 LeNet5": vgg_small(11, 10, 1, 8).state_dict(),
    }
    for words, state in cases.items():
        torch.save(state, path)
        with pytest.raises(UserError, match=words):
            visualize.main([*out, "--weights", str(path)])
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"w\.pt 已损坏"):
        visualize.main([*out, "--weights", str(path)])


def test_random_signs_have_the_stated_size() -> None:
    test = normalized("synth-digits", "test", 20)
    moved = visualize.random_signs(test, 0.1, make_generator(0))
    change = (moved - test.x).abs() * test.std.view(-1, 1, 1)
    assert change.max() < 0.1 + 1e-6 and (change > 0.0999).float().mean() > 0.4
    again = visualize.random_signs(test, 0.1, make_generator(0))
    assert torch.equal(moved, again)


def test_cam_layer_keeps_a_quarter_of_the_side() -> None:
    x = torch.zeros(1, 1, 28, 28)
    for model, index in ((lenet5(), 1), (vgg_small(11, 10, 1, 4).eval(), 3)):
        assert visualize.cam_layer(model, x) is visualize.activations(model)[index]
