"""退化问题：梯度的分解与增长、拆块、路的条数，以及 ``degradation.py`` 的循环、续训与结论。"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_03_optimization_regularization.averaging import update_bn
from chapter_05_resnet_modern_cnn import degradation
from chapter_05_resnet_modern_cnn.degradation import (
    DEEPER_PLAIN,
    DEEPER_RESNET,
    EXPECTED,
    conclusions,
)
from chapter_05_resnet_modern_cnn.figures_degradation import (
    gradient_figure,
    lesion_figure,
    training_figure,
)
from chapter_05_resnet_modern_cnn.gradient_flow import (
    GAIN,
    branch_gradient,
    gradient_similarity,
    open_path,
    plain_growth,
    relative_gradients,
    residual_growth,
)
from chapter_05_resnet_modern_cnn.lesions import (
    bypass,
    path_counts,
    random_lesions,
    removable,
    without_blocks,
)
from chapter_05_resnet_modern_cnn.resnet_cifar import CifarBlock, CifarResNet, PreActBlock
from tests.parity import assert_equal, autograd, normal
from tests.resuming import flatten, interrupt_after
from utils import UserError, make_generator
from utils.file_io_util import load_checkpoint


def chain(block: type[CifarBlock], length: int = 3, channels: int = 4) -> nn.Sequential:
    """形状不变的一串块，float64；BatchNorm 的缩放与平移取随机值。"""
    blocks = nn.Sequential(*(block(channels, channels) for _ in range(length))).double()
    for index, parameter in enumerate(blocks.parameters()):
        if parameter.ndim == 1:
            parameter.data = 1 + 0.3 * normal(*parameter.shape, seed=index)
    return blocks


# ---------------------------------------------------------------- 恒等的直路


def test_preactivation_telescopes_and_the_gradient_arrives_whole() -> None:
    """``x_L = x_l + ΣF``，于是 ``∂L/∂x_l = ∂L/∂x_L + (∂ΣF/∂x_l)ᵀ ∂L/∂x_L``，逐元素成立。"""
    blocks, x, grad = chain(PreActBlock), normal(2, 4, 5, 5), normal(2, 4, 5, 5, seed=1)
    states, residuals = [x], []
    for block in blocks:
        residuals.append(block.residual(states[-1]))
        states.append(block(states[-1]))
    assert_equal(states[-1], x + sum(residuals))
    for start in range(3):
        tail = blocks[start:]
        (whole,) = autograd(tail, grad, states[start])
        assert_equal(whole, grad + branch_gradient(tail, states[start], grad), 1e-12)


def test_the_identity_survives_when_every_branch_is_dead() -> None:
    """权重全为零：预激活的梯度原样传回，后激活只在 ReLU 放行之处，孪生网络什么也没有。"""
    x, grad = normal(2, 4, 5, 5), normal(2, 4, 5, 5, seed=1)
    found = {}
    for name, block in (("pre", PreActBlock), ("post", CifarBlock)):
        blocks = nn.Sequential(*(block(4, 4) for _ in range(3))).double()
        for parameter in blocks.parameters():
            nn.init.zeros_(parameter)
        found[name] = autograd(blocks, grad, x)[0]
    assert torch.equal(found["pre"], grad)
    assert torch.equal(found["post"], grad * (x > 0))
    plain = CifarBlock(4, 4, shortcut=False).double()
    nn.init.zeros_(plain.conv1.weight)
    nn.init.constant_(plain.bn2.bias, 1.0)  # 使最后的 ReLU 放行
    assert torch.equal(autograd(plain, grad, x)[0], torch.zeros_like(x))


def test_post_activation_masks_the_straight_path() -> None:
    """后激活的直路是 ``grad`` 乘以各个 ReLU 的掩码：其余的全经过分支，预激活的等式不再成立。"""
    blocks, x, grad = chain(CifarBlock), normal(2, 4, 5, 5).relu(), normal(2, 4, 5, 5, seed=1)
    mask = torch.ones_like(x, dtype=torch.bool)
    start = x.clone().requires_grad_()
    state, gates = start, []
    for block in blocks:
        total = state + block.residual(state)
        gates.append(total > 0)
        mask &= gates[-1]
        # 分支的输出当作常数，只留直路
        state = F.relu(state + block.residual(state).detach())
    (straight,) = torch.autograd.grad(state, start, grad)
    assert_equal(straight, grad * mask)
    assert torch.equal(open_path(blocks, x), mask)
    assert 0.1 < mask.double().mean() < 0.9
    (whole,) = autograd(blocks, grad, x)
    assert (whole - grad - branch_gradient(blocks, x, grad)).abs().max() > 0.1


# ---------------------------------------------------------------- 梯度的大小与相似


def wide_growth(residual: bool, depth: int, width: int = 256, batch: int = 512) -> float:
    """宽的全连接网络，由深到浅梯度平方的放大倍数；残差的一块有两层，其余一层。"""

    def linear(x: Tensor, seed: int) -> Tensor:
        return x @ (normal(width, width, seed=seed).float() * math.sqrt(2 / width))

    def active(x: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, None, None, training=True))

    start = state = normal(batch, width).float().requires_grad_()
    for index in range(depth):
        if residual:
            state = state + linear(active(linear(active(state), 2 * index + 1)), 2 * index + 2)
        else:
            state = linear(active(state), index + 1)
    grad = normal(batch, width, seed=999).float()
    (found,) = torch.autograd.grad(state, start, grad)
    return (found.square().sum() / grad.square().sum()).item()


def test_gradients_grow_exponentially_without_shortcuts_and_as_a_power_with_them() -> None:
    """推导出的两条增长律，与宽网络里量出来的相符。"""
    assert round(GAIN, 3) == 1.467
    # 第一层的输入方差是 1，而不是 1/GAIN，所以少放大一次
    assert wide_growth(False, 13) == pytest.approx(plain_growth(12), rel=0.2)
    for blocks in (3, 9):
        assert wide_growth(True, blocks) == pytest.approx(residual_growth(blocks), rel=0.05)
    assert plain_growth(54) > 9e8 and round(residual_growth(27)) == 328


def small(depth: int = 20, **options: bool) -> CifarResNet:
    """四个通道起的小网络。"""
    torch.manual_seed(0)
    return CifarResNet(depth, width=4, **options)


def images(count: int = 16) -> tuple[Tensor, Tensor]:
    """随机的图像与标签。"""
    return normal(count, 3, 16, 16).float(), torch.arange(count) % 10


def test_relative_gradients_are_the_ones_of_autograd_and_leave_the_model_alone() -> None:
    model, (x, y) = small().eval(), images()
    before = flatten(model.state_dict())
    found = relative_gradients(model, x, y)
    assert not model.training and flatten(model.state_dict()) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    model.train()
    F.cross_entropy(model(x), y).backward()
    convs = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    expected = [(c.weight.grad.norm() / c.weight.norm()).item() for c in convs]
    assert found == pytest.approx(expected, rel=1e-5) and len(found) == 19
    for conv in convs:  # BatchNorm 使输出与权重的大小无关，梯度因而与权重垂直
        cosine = F.cosine_similarity(conv.weight.grad.flatten(), conv.weight.flatten(), dim=0)
        assert cosine.abs() < 1e-3


def test_shortcuts_tame_the_growth_of_gradients() -> None:
    x, y = images(32)
    ratio = {}
    for name, options in (
        ("plain", {"shortcut": False}),
        ("residual", {}),
        ("pre", {"block": PreActBlock}),
    ):
        found = relative_gradients(small(56, **options), x, y)
        ratio[name] = found[1] / found[-1]
    assert ratio["plain"] > 20 * ratio["residual"] and ratio["plain"] > 20 * ratio["pre"]


def test_zero_gamma_starts_with_branches_that_do_not_move() -> None:
    """γ = 0：分支里的卷积梯度恰为零，先动的只有 γ 自己、起始卷积与改变形状的两个块。"""
    model, (x, y) = small(zero_init_residual=True), images()
    found = relative_gradients(model, x, y)
    moving = [index for index, value in enumerate(found) if value > 0]
    assert moving == [0, 7, 8, 13, 14]  # 第 3、6 个块（从 0 数）各两个卷积
    F.cross_entropy(model(x), y).backward()
    assert all(block.bn2.weight.grad.abs().max() > 0 for block in model.blocks)


def test_similarity_is_one_for_a_linear_model_and_falls_with_noise() -> None:
    x, _ = images()
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, 10))
    assert gradient_similarity(linear, x, 0.5, make_generator(0)) == pytest.approx(1.0)
    model = small()
    before = flatten(model.state_dict())
    found = [gradient_similarity(model, x, e, make_generator(0)) for e in (0.0, 0.02, 0.3)]
    assert found[0] == pytest.approx(1.0) and found[0] > found[1] > found[2]
    assert flatten(model.state_dict()) == before and model.training


def test_similarity_is_the_mean_over_images_taken_one_by_one() -> None:
    """推理模式：一张图的梯度与同批的其他图无关。"""
    model, (x, _) = small(), images(6)
    found = gradient_similarity(model, x, 0.1, make_generator(0))
    update_bn([(x, x)], model)
    model.eval()
    moved = x + 0.1 * x.std() * torch.randn(x.shape, generator=make_generator(0))
    grads = []
    for points in (x, moved):
        ends = [point.unsqueeze(0).requires_grad_() for point in points]
        scores = [model(end) @ torch.linspace(-1, 1, 10) for end in ends]
        grads.append(
            torch.stack(
                [torch.autograd.grad(*pair)[0].flatten() for pair in zip(scores, ends, strict=True)]
            )
        )
    expected = F.cosine_similarity(*grads).mean().item()
    assert found == pytest.approx(expected, abs=1e-4) and 0 < found < 1


def test_gradients_of_deep_plain_networks_shatter() -> None:
    x, _ = images()
    cosine = {
        shortcut: gradient_similarity(small(56, shortcut=shortcut), x, 0.01, make_generator(0))
        for shortcut in (True, False)
    }
    assert cosine[True] > 0.4 and cosine[False] < 0.2


# ---------------------------------------------------------------- 拆块


def trained_statistics(model: CifarResNet) -> CifarResNet:
    """以几批随机图像更新滑动统计量，使推理模式有意义。"""
    for seed in range(3):
        model.train()(normal(8, 3, 16, 16, seed=seed).float())
    return model.eval()


def test_a_removed_block_is_its_shortcut() -> None:
    """拆掉之后的输出，等于把那一块的残差分支清零；恒等与补零的捷径都是。"""
    model, x = trained_statistics(small()), images(4)[0]
    before = flatten(model.state_dict())
    for index in (1, 3, 8):  # 3 是改变形状的一块
        cut = without_blocks(model, [index])
        silent = without_blocks(model, [])
        nn.init.zeros_(silent.blocks[index].bn2.weight)
        nn.init.zeros_(silent.blocks[index].bn2.bias)
        assert_equal(cut(x), silent(x), 1e-6)
        assert not torch.equal(cut(x), model(x))
    assert flatten(model.state_dict()) == before and len(model.blocks) == 9


def test_plain_blocks_get_a_shortcut_when_removed() -> None:
    model = small(shortcut=False)
    assert isinstance(bypass(model.blocks[0]), nn.Identity)
    x = normal(2, 4, 6, 6)
    shrunk = bypass(model.blocks[3])(x)
    assert shrunk.shape == (2, 8, 3, 3)
    assert torch.equal(shrunk[:, 2:6], x[:, :, ::2, ::2]) and shrunk[:, [0, 1, 6, 7]].sum() == 0
    assert removable(model) == [0, 1, 2, 4, 5, 7, 8]


def test_random_lesions_are_distinct_blocks_that_keep_the_shape() -> None:
    model = small()
    seen = set()
    for seed in range(20):
        cut = random_lesions(model, 3, make_generator(seed))
        gone = {i for i, block in enumerate(cut.blocks) if isinstance(block, nn.Identity)}
        assert len(gone) == 3 and gone <= set(removable(model))
        seen |= gone
    assert seen == set(removable(model))
    for count in (-1, 8):
        with pytest.raises(ValueError, match=f"count={count}"):
            random_lesions(model, count, make_generator(0))
    with pytest.raises(ValueError, match=r"dropped=\[9\]"):
        without_blocks(model, [9])


def test_paths_by_length() -> None:
    assert path_counts(3) == [1, 3, 3, 1]
    deep = path_counts(27)
    assert sum(deep) == 2**27 == 134_217_728
    near = sum(deep[9:19])  # 9 到 18 个分支：20 到 38 层
    assert near / 2**27 == pytest.approx(0.9478, abs=1e-4)
    # 一个线性的例子：F_i = a_i·x，y = Π(1 + a_i)·x，恰是各条路之和
    a = [0.5, -0.25, 2.0]
    paths = [
        math.prod(a[i] for i in range(3) if mask >> i & 1) for mask in range(8)
    ]  # 空积是 1：只走捷径的那条
    assert math.prod(1 + v for v in a) == sum(paths) == 3.375


# ---------------------------------------------------------------- 整个脚本


@pytest.fixture
def tiny(monkeypatch) -> None:
    """8 层的小网络、少数据，使整个脚本只用一两秒。"""

    def build(name: str, classes: int, shape: tuple[int, ...], stem_stride: int) -> CifarResNet:
        plain = name.startswith("plain")
        return CifarResNet(
            8, classes, shape[0], width=4, stem_stride=stem_stride, shortcut=not plain
        )

    original = degradation.load_data
    monkeypatch.setattr(degradation, "build_model", build)
    monkeypatch.setattr(degradation, "load_data", lambda name, limit: original(name, limit=24))


ARGS = ["--jobs", "1", "--device", "cpu", "--batch-size", "8", "--epochs", "6", "--out-dir"]


def test_resume_after_a_kill_is_bit_identical(tiny, tmp_path: Path, monkeypatch) -> None:
    """在第二个网络的半途打断：走完的网络不再训练，其余的接着走。"""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    monkeypatch.setattr(degradation, "draw", lambda *rest: {})  # 画图占去一半时间
    expected = degradation.main([*ARGS, str(whole)])
    restore = interrupt_after(monkeypatch, saves=3)
    with pytest.raises(KeyboardInterrupt):
        degradation.main([*ARGS, str(cut)])
    restore()
    epochs = []
    original = degradation.train_one_epoch
    monkeypatch.setattr(degradation, "train_one_epoch", lambda *a: epochs.append(1) or original(*a))
    resumed = degradation.main([*ARGS, str(cut), "--resume"])
    assert len(epochs) == 4 * 6 - 6 - 3
    for name in degradation.NETWORKS:
        path = f"checkpoints_{name}_0/step_00000002.pt"
        assert flatten(load_checkpoint(whole / path)) == flatten(load_checkpoint(cut / path))
    for key in ("runs", "errors", "lesions", "similarity", "open_shares"):
        assert resumed[key] == expected[key]
    with pytest.raises(UserError, match=r"lr 原为 0\.03 今为 0\.1"):
        degradation.main([*ARGS, str(cut), "--resume", "--lr", "0.1"])


def test_every_network_sees_the_same_data_and_the_last_epoch_counts(
    tiny, tmp_path: Path, monkeypatch
) -> None:
    seen: dict[Any, list[Tensor]] = {}  # 批迭代器 -> 它先后给出的标签
    original = degradation.train_one_epoch

    def recorded(run, model, batches, *rest):
        labels = seen.setdefault(batches, [])
        watched = [(x, labels.append(y) or y) for x, y in batches]
        return original(run, model, watched, *rest)

    monkeypatch.setattr(degradation, "train_one_epoch", recorded)
    metrics = degradation.main([*ARGS, str(tmp_path), "--seeds", "2"])
    orders = [torch.cat(labels) for labels in seen.values()]
    assert len(orders) == 8 and all(len(order) == 6 * 24 for order in orders)
    assert all(torch.equal(order, orders[0]) for order in orders[:4])
    assert all(torch.equal(order, orders[4]) for order in orders[4:])
    assert not torch.equal(orders[0], orders[4])  # 两个种子
    for name, group in metrics["runs"].items():
        assert [row["epoch"] for row in group[0]["history"]] == [3, 6]
        assert metrics["errors"][name] == [run["history"][-1]["train_error"] for run in group]
        assert len(group[0]["start"]) == len(group[0]["growth"]) == 7
    assert metrics["lesions"]["resnet20"]["intact"] == metrics["errors"]["resnet20"][0]


def test_conclusions_use_the_least_favourable_seed() -> None:
    errors = {
        "plain20": [0.10, 0.20],
        "plain56": [0.80, 0.70],
        "resnet20": [0.02, 0.00],
        "resnet56": [0.00, 0.01],
    }
    deep, plain, residual = conclusions(errors)
    assert deep.value == pytest.approx(0.005) and deep.baseline == pytest.approx(0.75)
    assert deep.std == pytest.approx(0.01 / math.sqrt(2))
    assert plain.value == pytest.approx(0.5) and residual.value == pytest.approx(0.01)
    assert EXPECTED.learned(0.0) and not EXPECTED.learned(0.1)
    assert DEEPER_PLAIN.learned(0.5) and not DEEPER_PLAIN.learned(0.1)
    assert DEEPER_RESNET.learned(0.0) and not DEEPER_RESNET.learned(0.05)
    (alone, *_) = conclusions({name: values[:1] for name, values in errors.items()})
    assert alone.std is None


def test_table_is_the_mean_of_the_last_rows() -> None:
    keys = ("train_loss", "train_error", "val_loss", "val_error")
    history = [dict.fromkeys(keys, 9.0), dict(zip(keys, (0.5, 0.1, 2.0, 0.4), strict=True))]
    other = [dict.fromkeys(keys, 9.0), dict(zip(keys, (1.5, 0.3, 4.0, 0.6), strict=True))]
    group = [
        degradation.Run(nn.Identity(), [], [1.0, k], rows)
        for k, rows in ((2.0, history), (5.0, other))
    ]
    shown = degradation.table({"plain20": group}).splitlines()[1].split()
    assert shown == ["plain20", "1.0000", "20.00%", "3.0000", "50.00%", "3.5", "倍"]


def test_options(capsys) -> None:
    assert degradation.parse_args([]).out_dir.name == "degradation"
    smoke = degradation.parse_args(["--smoke", "--seeds", "3"])
    assert smoke.out_dir.name == "degradation_smoke" and (smoke.seeds, smoke.epochs) == (1, 3)
    for argv, reason in (
        (["--epochs", "4"], "应为 3 的倍数"),
        (["--batch-size", "1001"], "超过训练集的 1000 张"),
    ):
        with pytest.raises(SystemExit):
            degradation.parse_args(argv)
        assert reason in capsys.readouterr().err


# ---------------------------------------------------------------- 图


def test_figures_show_what_they_are_given() -> None:
    values = np.array([[0.9, 0.5], [0.7, 0.3]])
    figure = training_figure([3, 6], {"plain20": values}, {"plain20": values}, 0.9)
    line = figure.axes[0].get_lines()[0]
    assert line.get_ydata().tolist() == pytest.approx([80, 40])  # 各种子的平均
    runs = {"plain56": [10.0, 1.0], "resnet56": [2.0, 1.0]}
    figure = gradient_figure(runs, runs, [0.01, 0.1], {"resnet56": [0.9, 0.2]}, 3)
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "log", "linear"]
    found = {
        "intact": 0.0, "single": [0.1, 0.8, 0.3], "changing": [1], "counts": [1, 2],
        "several": [[0.1, 0.2], [0.3, 0.6]],
    }  # fmt: skip
    figure = lesion_figure({"resnet20": found}, 0.9)
    bars = figure.axes[0].patches
    assert [bar.get_height() for bar in bars] == pytest.approx([10, 80, 30])
    assert [bool(bar.get_hatch()) for bar in bars] == [False, True, False]
    assert figure.axes[1].get_lines()[0].get_ydata().tolist() == pytest.approx([20, 40])
