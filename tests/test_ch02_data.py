"""第 2 章的数据与任务：可复现、不重叠、极限算得对；CSV 的每种错误；平移增强逐像素核对。"""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from chapter_02_nn_basics_mlp import data, tasks
from chapter_02_nn_basics_mlp.losses import cross_entropy
from chapter_02_nn_basics_mlp.mlp import MLP, fit_function, r_squared, spread_kinks
from chapter_02_nn_basics_mlp.tasks import make_task
from utils import UserError, make_generator
from utils.datasets import SPLITS
from utils.synth_points import spiral_bayes, two_spirals


def rows(x: Tensor) -> set[bytes]:
    """每个样本的字节，用来查两个划分有没有同一个样本。"""
    return {row.numpy().tobytes() for row in x.flatten(1)}


# ---------------------------------------------------------------- 目标与曲面


@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        ("sine", [0.0, 0.25, 0.5, -0.25], [0.0, 1.0, 0.0, -1.0]),
        ("step", [-0.5, -1e-6, 0.0, 0.5], [-0.8, -0.8, 0.8, 0.8]),
        ("sawtooth", [0.0, 0.2, 0.5, -0.2], [0.0, 0.5, -0.75, -0.5]),
        ("bumps", [-0.7, 0.25, 0.0], [0.9, 1.0, -0.7 * math.exp(-((0.2 / 0.12) ** 2))]),
    ],
)
def test_targets_by_hand(name: str, x: list[float], expected: list[float]) -> None:
    for dtype in (torch.float32, torch.float64):
        values = data.TARGETS[name](torch.tensor(x, dtype=dtype))
        assert values.dtype == dtype
        assert values.tolist() == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("name", data.TARGETS)
def test_targets_stay_in_the_documented_range(name: str) -> None:
    values = data.TARGETS[name](torch.linspace(-1, 1, 2001))
    assert values.abs().max() <= 1.001
    assert values.max() > 0.5 and values.min() < -0.5


def test_surface_by_hand() -> None:
    z = data.surface(torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.5, 1.0]]))
    expected = [[0.5], [1 + 0.5 * math.exp(-1)], [-1 + 0.5 * math.exp(-5)]]
    torch.testing.assert_close(z, torch.tensor(expected))


def test_uniform_fills_the_interval() -> None:
    x = data.uniform(5000, 3, make_generator(0), -2.0, 4.0)
    assert x.shape == (5000, 3) and x.min() >= -2 and x.max() < 4
    assert x.mean().item() == pytest.approx(1.0, abs=0.05)
    assert x.std().item() == pytest.approx(6 / math.sqrt(12), rel=0.02)


# ---------------------------------------------------------------- 合成数据


def test_friedman_is_determined_by_the_generator() -> None:
    make, before = data.friedman, torch.get_rng_state()
    first, again, other = (make(41, make_generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), before)  # 不碰全局的随机数
    generator = make_generator(0)
    train, test = make(500, generator), make(500, generator)
    assert not rows(train[0]) & rows(test[0])


def test_friedman_formula_and_noise_variance() -> None:
    x, y = data.friedman(20_000, make_generator(0))
    assert x.shape == (20_000, 10) and y.shape == (20_000, 1)
    assert x.min() >= 0 and x.max() < 1
    a = x.double().numpy()
    clean = 10 * np.sin(np.pi * a[:, 0] * a[:, 1]) + 20 * (a[:, 2] - 0.5) ** 2
    clean += 10 * a[:, 3] + 5 * a[:, 4]
    noise = y[:, 0].double().numpy() - clean
    assert noise.var() == pytest.approx(1.0, rel=0.03) and abs(noise.mean()) < 0.03
    _, quiet = data.friedman(20_000, make_generator(0), noise=0.0)
    np.testing.assert_allclose(quiet[:, 0].numpy(), clean, rtol=0, atol=1e-4)


def test_bayes_accuracy_is_calibrated_and_beats_a_trained_model() -> None:
    generator = make_generator(0)
    points, labels = two_spirals(5000, generator)
    posterior = spiral_bayes(points)
    bayes = ((posterior > 0.5) == labels).float().mean().item()
    claimed = torch.maximum(posterior, 1 - posterior).mean().item()
    assert bayes == pytest.approx(claimed, abs=0.004)  # 自称的把握等于实际的准确率
    x, y = two_spirals(1000, generator)
    model = MLP(2, (64, 64), 2, "tanh", generator)
    spread_kinks(model, generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(120):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    trained = (model(points).argmax(1) == labels).float().mean().item()
    assert 0.9 < trained <= bayes


# ---------------------------------------------------------------- 拟合（mlp.py 的部件）


def test_r_squared() -> None:
    truth = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert r_squared(truth, truth) == 1.0
    assert r_squared(torch.full((4,), 3.0), truth) == 0.0
    assert r_squared(truth + 1, truth) == pytest.approx(1 - 4 / 14)


def test_spread_kinks_puts_every_kink_inside_the_interval() -> None:
    model = MLP(1, (50, 50), 1, "relu", make_generator(0))
    spread_kinks(model, make_generator(1))
    first = model.layers[0]
    kinks = -first.bias / first.weight[:, 0]
    assert kinks.abs().max() <= 1 and kinks.std().item() == pytest.approx(2 / 12**0.5, rel=0.2)
    assert not model.layers[1].bias.any()


def test_fit_function_learns_a_line() -> None:
    x = torch.linspace(-1, 1, 64).unsqueeze(1)
    model = MLP(1, (16,), 1, "tanh", make_generator(0))
    start = (model(x) - (2 * x - 0.5)).square().mean().item()
    losses = fit_function(model, x, 2 * x - 0.5, steps=200, lr=0.02)
    assert len(losses) == 200 and losses[0] == pytest.approx(start) and losses[-1] < 0.01 * start


# ---------------------------------------------------------------- CSV

GOOD_ROWS = [["面积", "房龄", "价格"]] + [[str(i), str(2 * i), str(3 * i + 0.5)] for i in range(30)]


def write_csv(path: Path, lines: list[list[str]], encoding: str = "utf-8") -> Path:
    with path.open("w", encoding=encoding, newline="") as stream:
        csv.writer(stream).writerows(lines)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])  # 后者是 Excel 存出的
def test_read_csv(tmp_path: Path, encoding: str) -> None:
    path = write_csv(tmp_path / "t.csv", GOOD_ROWS, encoding)
    inputs, targets = data.read_csv(path, "房龄")
    assert inputs.shape == (30, 2) and targets.shape == (30, 1)
    assert inputs[3].tolist() == [3.0, 9.5] and targets[3].tolist() == [6.0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "不是 UTF-8 编码的带表头的 CSV"),
        ([["价格"], *([["1"]] * 30)], "没有 --column '价格' 这一列"),
        ([["a", "b"], *([["1", "2"]] * 30)], "没有 --column '价格' 这一列：有 a、b"),
        (GOOD_ROWS[:20], "只有 19 行数据：至少要 20 行"),
        (
            [*GOOD_ROWS[:5], ["1", "x", "2"], *GOOD_ROWS[5:]],
            r"第 6 行.* 3 个数：\['1', 'x', '2'\]",
        ),
        ([*GOOD_ROWS[:5], ["1", "", "2"], *GOOD_ROWS[5:]], "第 6 行应为 3 个数"),
        ([*GOOD_ROWS, ["1", "2"]], "第 32 行应为 3 个数"),
        ([*GOOD_ROWS, ["1", "2", "3", "4"]], "第 32 行应为 3 个数"),
        ([*GOOD_ROWS, ["7"]], r"第 32 行应为 3 个数：\['7'\]"),
        ([*GOOD_ROWS, ["1", "nan", "2"]], "有 nan 或 inf"),
        ([*GOOD_ROWS, ["1", "1e39", "2"]], "有 nan 或 inf"),  # float32 放不下
        ([*GOOD_ROWS, ["1", "9" * 200_000, "2"]], "field larger than field limit"),
    ],
)
def test_read_csv_errors(tmp_path: Path, lines: list[list[str]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        data.read_csv(write_csv(tmp_path / "t.csv", lines), "价格")


def test_read_csv_rejects_another_encoding(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", GOOD_ROWS, "gbk")
    with pytest.raises(UserError, match="不是 UTF-8 编码"):
        data.read_csv(path, "价格")


# ---------------------------------------------------------------- 平移增强


@pytest.mark.parametrize("pixels", [1, 2])
def test_random_shift_equals_a_pixelwise_reference(pixels: int) -> None:
    x = torch.rand(3, 2, 5, 7, generator=make_generator(0))
    seen = set()
    for seed in range(250):
        width = 2 * pixels + 1
        draws = torch.randint(0, width, (2,), generator=make_generator(seed)).tolist()
        down, right = pixels - draws[0], pixels - draws[1]  # 内容向下、向右移动的像素数
        source_rows = (torch.arange(5) - down).clamp(0, 4)
        source_columns = (torch.arange(7) - right).clamp(0, 6)
        expected = x[..., source_rows, :][..., source_columns]
        shifted = data.random_shift(x, make_generator(seed), pixels)
        assert torch.equal(shifted, expected)
        inner = (slice(None), slice(None), slice(pixels, -pixels), slice(pixels, -pixels))
        assert torch.equal(shifted[inner], x.roll((down, right), (-2, -1))[inner])
        seen.add((down, right))
    assert len(seen) == width**2  # 每种平移都出现过


# ---------------------------------------------------------------- 任务


@pytest.mark.parametrize(
    ("name", "shape", "outputs", "baseline"),
    [
        ("spiral", (2,), 2, "logistic"),
        ("digits", (1, 28, 28), 10, "softmax"),
        ("regression", (10,), 1, "linear"),
    ],
)
def test_tasks(name: str, shape: tuple[int, ...], outputs: int, baseline: str) -> None:
    task, again = make_task(name, smoke=True), make_task(name, smoke=True)
    assert (task.in_features, task.out_features) == (math.prod(shape), outputs)
    assert task.baseline == baseline and task.expectation == again.expectation
    chance, floor = task.expectation.chance, task.expectation.floor
    assert task.expectation.higher_is_better == (name != "regression")
    if name == "regression":
        assert floor == 1.0 < task.expectation.band[0] < chance
    else:
        assert chance < task.expectation.band[0] < 1 and (floor is None or floor <= 1)
    contents = []
    for split in SPLITS:
        batches = task.batches(split, 50)
        x, y = next(iter(batches))
        assert x.shape == (50, *shape) and x.dtype == torch.float32
        assert torch.equal(x, next(iter(again.batches(split, 50)))[0])  # 人人得到同一份数据
        output = MLP(task.in_features, (), outputs)(x)
        assert task.loss(output, y).shape == () and task.score(output, y).shape == (50,)
        contents.append(rows(batches.inputs))
        assert sum(len(y) for _, y in batches) == batches.num_samples == len(batches.inputs)
    assert not contents[0] & contents[1] | contents[0] & contents[2] | contents[1] & contents[2]


def test_training_batches_are_shuffled_by_the_generator_only() -> None:
    task = make_task("spiral", smoke=True)
    plain = torch.cat([x for x, _ in task.batches("train", 100)])
    first, again, other = (
        torch.cat([x for x, _ in task.batches("train", 100, make_generator(seed))])
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, plain) and rows(first) == rows(plain)


def test_digits_are_normalised_with_the_training_statistics() -> None:
    task = make_task("digits", smoke=True)
    means = {s: torch.cat([x for x, _ in task.batches(s, 64)]) for s in SPLITS}
    assert means["train"].mean().item() == pytest.approx(0, abs=1e-3)
    assert means["train"].std().item() == pytest.approx(1, abs=1e-3)
    assert means["test"].mean().abs() > 1e-4  # 用的是训练集的均值，自己的均值不会恰为 0


def test_spiral_expectation_floor_is_the_bayes_accuracy() -> None:
    task = make_task("spiral")
    test = task.batches("test", 2000)
    predicted = spiral_bayes(test.inputs.double()) > 0.5
    assert (predicted == test.labels).double().mean().item() == pytest.approx(
        task.expectation.floor, abs=1e-3
    )
    assert task.expectation.band[0] < task.expectation.floor < 1


def test_scores_by_hand() -> None:
    output = torch.tensor([[0.1, 0.9], [2.0, -1.0], [0.0, 1.0]])
    assert tasks.correct(output, torch.tensor([1, 1, 1])).tolist() == [1.0, 0.0, 1.0]
    errors = tasks.squared_error(torch.tensor([[3.0], [1.0]]), torch.ones(2, 1))
    assert errors.tolist() == [4.0, 0.0]


def test_csv_task_standardises_with_training_rows_only(tmp_path: Path) -> None:
    generator = make_generator(0)
    table = 5 + 3 * torch.randn(100, 3, generator=generator)
    table[:, 1] = 7.0  # 常数列：标准差为零，不能除
    lines = [["a", "b", "y"], *(list(map(str, row)) for row in table.tolist())]
    path = write_csv(tmp_path / "t.csv", lines)
    task = make_task("regression", csv_file=path, column="y")
    parts = {split: task.batches(split, 1000) for split in SPLITS}
    train = parts["train"]
    repeats = 172  # 每轮至少 12000 个样本次：70 行重复 172 遍
    assert len(train.inputs) == 70 * repeats and torch.equal(
        train.inputs[:70], train.inputs[70:140]
    )
    train.inputs, train.labels = train.inputs[:70], train.labels[:70]
    assert [len(parts[split].inputs) for split in SPLITS] == [70, 15, 15]
    train = torch.cat([parts["train"].inputs, parts["train"].labels], dim=1)
    assert train.mean(0).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert train.std(0).tolist() == pytest.approx([1, 0, 1], abs=1e-5)
    assert parts["test"].labels.mean().abs() > 1e-3
    # 得分换算回原来的单位：标准化后的平方误差乘以训练集目标的方差
    _, std = train_statistics(table[:, 2], torch.cat([parts[s].labels[:, 0] for s in SPLITS]))
    labels = parts["test"].labels
    guess_the_mean = task.score(torch.zeros_like(labels), labels)
    expected = (labels[:, 0] * std).square()
    torch.testing.assert_close(guess_the_mean, expected, rtol=1e-4, atol=1e-6)
    assert task.expectation.chance == pytest.approx(guess_the_mean.mean().item(), rel=1e-5)
    everything = torch.cat([parts[split].inputs[:, 0] for split in SPLITS])
    mean, std = train_statistics(table[:, 0], everything)
    torch.testing.assert_close(everything.sort()[0] * std + mean, table[:, 0].sort()[0])


@pytest.mark.parametrize("constant", ["7", "0.1"])  # 0.1 的标准差因舍入不恰为零
def test_csv_task_rejects_a_constant_target(constant: str, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [["a", "y"], *([str(i), constant] for i in range(30))])
    with pytest.raises(UserError, match="'y' 列在训练集里是常数"):
        make_task("regression", csv_file=path, column="y")


def test_friedman_score_is_in_the_original_unit() -> None:
    task = make_task("regression")
    labels = task.batches("test", 1000).labels
    guess = task.score(torch.zeros_like(labels), labels).mean().item()
    assert guess == pytest.approx(task.expectation.chance, rel=1e-5)
    _, targets = data.friedman(20_000, make_generator(0))
    assert guess == pytest.approx(targets.var().item(), rel=0.1)  # 总报均值的 MSE 就是目标的方差


def train_statistics(original: Tensor, standardised: Tensor) -> tuple[Tensor, Tensor]:
    """由标准化前后的最小与最大值反推均值与标准差。"""
    std = (original.max() - original.min()) / (standardised.max() - standardised.min())
    return original.min() - standardised.min() * std, std
