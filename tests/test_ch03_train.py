"""第 3 章的数据、公平比较与训练脚本。"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from chapter_02_nn_basics_mlp.losses import cross_entropy
from chapter_03_optimization_regularization import train
from chapter_03_optimization_regularization.arms import make_model
from chapter_03_optimization_regularization.averaging import EMA, EarlyStopping
from chapter_03_optimization_regularization.data import (
    EXTRA,
    FLIP,
    flip_labels,
    images_task,
    load_digits,
    noisy_moons,
    noisy_moons_error,
    points_task,
)
from chapter_03_optimization_regularization.experiments import (
    EXPERIMENTS,
    IMAGE_REGULARIZATION,
)
from chapter_03_optimization_regularization.networks import INITS, NORMS, BlockMLP
from chapter_03_optimization_regularization.optimizers import SGD
from chapter_03_optimization_regularization.optimizers_adam import AdamW
from chapter_03_optimization_regularization.optimizers_modern import ScheduleFreeAdamW
from chapter_03_optimization_regularization.recipes import (
    Arm,
    Recipe,
    Run,
    compare,
    mean_and_error,
    standard_error,
    steps_to_reach,
)
from chapter_03_optimization_regularization.schedulers import ConstantLR
from tests.invariants import assert_batch_independent
from utils import UserError, make_generator
from utils.synth_points import moon_bayes

CPU = torch.device("cpu")

# ---------------------------------------------------------------- 数据


def test_flip_labels_flips_the_stated_share_to_other_classes() -> None:
    labels = torch.arange(40_000) % 10
    flipped = flip_labels(labels, 0.3, 10, make_generator(0))
    share = (flipped != labels).float().mean().item()
    assert share == pytest.approx(0.3, abs=0.01)
    shifts = (flipped - labels)[flipped != labels] % 10
    counts = shifts.bincount(minlength=10)
    assert counts[0] == 0 and counts[1:].min() > 0.9 * counts[1:].float().mean()
    assert torch.equal(flip_labels(labels, 0.0, 10, make_generator(0)), labels)


def test_bayes_error_is_reached_by_the_bayes_classifier() -> None:
    """按后验判断的分类器在 6 万个样本上的错误率，等于算出的期望。"""
    points, labels = noisy_moons(60_000, make_generator(7))
    assert points.shape == (60_000, 2 + EXTRA)
    wrong = (moon_bayes(points[:, :2]) > 0.5).long() != labels
    expected = noisy_moons_error(points)
    assert wrong.float().mean().item() == pytest.approx(expected, abs=4e-3)
    assert expected > FLIP  # 标签有错，谁也不可能更好


def test_points_task_splits_do_not_overlap_and_training_set_follows_the_seed() -> None:
    task, again, other = points_task(0, 200), points_task(0, 200), points_task(1, 200)

    def rows(which, split: str) -> set[tuple[float, ...]]:
        return {tuple(row) for x, _ in which.batches(split, 500) for row in x.tolist()}

    train_rows, val_rows, test_rows = (rows(task, s) for s in ("train", "val", "test"))
    assert (len(train_rows), len(val_rows), len(test_rows)) == (200, 2_000, 20_000)
    assert not train_rows & val_rows and not train_rows & test_rows and not val_rows & test_rows
    assert rows(again, "train") == train_rows and not rows(other, "train") & train_rows
    assert rows(other, "val") == val_rows
    assert 0.1 < task.floor < 0.2 and task.chance == 0.5


def test_images_task_keeps_few_and_flips_only_training_labels(tmp_path: Path) -> None:
    splits = load_digits("synth-digits", tmp_path, smoke=True)
    task = images_task(splits, seed=1, train_size=100, flip=0.5)
    (x, y), *_ = task.batches("train", 1000)
    assert len(x) == 100 and x.shape[1:] == (1, 28, 28)
    clean = images_task(splits, seed=1, train_size=100)
    (x_clean, y_clean), *_ = clean.batches("train", 1000)
    assert torch.equal(x, x_clean)
    assert 0.35 < (y != y_clean).float().mean() < 0.65
    (_, test_labels), *_ = task.batches("test", 1000)
    assert torch.equal(test_labels, splits["test"].labels)
    assert x.mean().abs() < 1e-5 and x.std() == pytest.approx(1, abs=1e-3)  # 按留下的训练图像归一化


# ---------------------------------------------------------------- 网络


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("residual", [False, True])
def test_block_mlp_forward_and_backward(norm: str, residual: bool) -> None:
    model = BlockMLP(
        20, 16, 3, 5, norm=norm, residual=residual, dropout=0.2,
        drop_path=0.1 if residual else 0.0, generator=make_generator(0),
    )  # fmt: skip
    x = torch.randn(6, 4, 5, generator=make_generator(1))
    logits = model(x)
    assert logits.shape == (6, 5) and logits.isfinite().all()
    cross_entropy(logits, torch.arange(6) % 5).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert_batch_independent(model.double().eval(), x.double())


def test_residual_blocks_add_their_input() -> None:
    model = BlockMLP(8, 16, 2, 3, residual=True, generator=make_generator(0)).eval()
    x = torch.randn(4, 8, generator=make_generator(1))
    first = model.blocks[0](x)
    expected = model.head(first + model.blocks[1](first))
    assert torch.equal(model(x), expected)


def test_initial_loss_is_close_to_ln_classes_and_seeds_decide_the_weights() -> None:
    for init in ("xavier", "kaiming"):
        model = BlockMLP(784, 64, 4, 10, init=init, generator=make_generator(0))
        x = torch.randn(256, 784, generator=make_generator(1))
        loss = cross_entropy(model(x), torch.arange(256) % 10).item()
        assert loss == pytest.approx(math.log(10), abs=0.1)
    a, b, c = (BlockMLP(4, 8, 2, 3, generator=make_generator(s)) for s in (0, 0, 1))
    assert torch.equal(a.head.weight, b.head.weight)
    assert not torch.equal(a.head.weight, c.head.weight)
    assert set(INITS) == {"0.01", "xavier", "kaiming", "1.0"}


def test_drop_path_needs_residual() -> None:
    with pytest.raises(ValueError, match="drop_path=0.5 要求 residual=True"):
        BlockMLP(4, 8, 2, 3, drop_path=0.5)


# ---------------------------------------------------------------- 公平的比较


def fake_run(losses: dict[tuple[float, int], float]):
    calls = []

    def run_once(arm: Arm, knob: float, seed: int) -> Run:
        calls.append((arm.name, knob, seed))
        loss = losses[knob, seed]
        return Run(knob, seed, None, [], loss, 1 - loss)

    return run_once, calls


def test_compare_picks_on_validation_then_adds_the_other_seeds() -> None:
    losses = {(1.0, 0): math.nan, (2.0, 0): 3.0, (3.0, 0): 1.0, (4.0, 0): 2.0}
    losses |= {(3.0, 1): 9.0, (3.0, 2): 9.0}
    run_once, calls = fake_run(losses)
    arm = Arm("a", (1.0, 2.0, 3.0, 4.0), None)
    (c,) = compare([arm], run_once, range(3), 1, lambda run: run.val_loss)
    assert c.knob == 3.0 and not c.at_edge()  # nan 不会被选中，也不挡路
    assert calls == [("a", k, 0) for k in arm.knobs] + [("a", 3.0, 1), ("a", 3.0, 2)]
    assert [run.seed for run in c.chosen] == [0, 1, 2]
    assert c.tuning[3.0] == 1.0  # 补跑的两个种子不改变挑选时的记录
    (edge,) = compare([arm], run_once, range(1), 1, lambda run: run.val_error)
    assert edge.knob == 2.0  # 换一个依据，选中的就不同
    arm = arm._replace(knobs=(1.0, 2.0, 3.0))
    (edge,) = compare([arm], run_once, range(1), 1, lambda run: run.val_loss)
    assert edge.at_edge()
    assert not edge._replace(arm=arm._replace(knobs=(2.0, 3.0))).at_edge()  # 两个值无所谓边


def test_divergence_loses_even_when_its_error_looks_good() -> None:
    """全是 nan 的输出，argmax 是第 0 类，错误率看上去不坏。"""

    def run_once(arm: Arm, knob: float, seed: int) -> Run:
        return Run(knob, seed, None, [], math.nan if knob == 1.0 else 9.0, knob / 2)

    arm = Arm("a", (1.0, 1.5), None)
    (c,) = compare([arm], run_once, range(1), 1, lambda run: run.val_error)
    assert c.knob == 1.5


def test_standard_error_by_hand() -> None:
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))
    assert math.isnan(standard_error([1.0]))
    assert mean_and_error([1.0, 2.0, 3.0], "+6.1f") == "  +2.0 ± 0.6"
    assert mean_and_error([1.0]) == "1.00 ± —"


def test_steps_to_reach_interpolates() -> None:
    curve = [(10, 3.0), (20, 2.0), (30, 1.0)]
    assert steps_to_reach(curve, 1.5) == pytest.approx(25)
    assert steps_to_reach(curve, 3.0) == 10
    assert steps_to_reach(curve, 0.5) == math.inf
    assert steps_to_reach([(10, math.nan), (20, 1.0)], 1.0) == 20


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_arm_has_the_same_budget(name: str) -> None:
    for plan in (EXPERIMENTS[name], IMAGE_REGULARIZATION):
        counts = {len(arm.knobs) for arm in plan.arms if arm.name != "none"}
        assert len(counts) == 1, counts
        names = [arm.name for arm in plan.arms]
        assert plan.seeds >= 3 and len(set(names)) == len(names) and plan.baseline in names


ARMS = [arm for plan in EXPERIMENTS.values() for arm in plan.arms if "|" not in arm.name]


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_trains_for_a_step(arm: Arm) -> None:
    task = points_task(0, 64, smoke=True)
    run = train.fit(arm.build(task, arm.knobs[0], 2, 0, CPU), task, 1, 32, 0)
    assert math.isfinite(run.val_loss) and 0 <= run.val_error <= 1
    assert run.curve[-1] == (2, run.val_loss)


# ---------------------------------------------------------------- 训练循环


def small_recipe(optimizer=AdamW, **options) -> Recipe:
    task = points_task(0, 64, smoke=True)
    model = make_model(task, 0)
    optimizer = optimizer(model.parameters(), lr=1e-2)
    return Recipe(model, optimizer, ConstantLR(optimizer), **options)


def test_same_seed_gives_the_same_run_and_learning_happens() -> None:
    task = points_task(0, 200, smoke=True)
    runs = [train.fit(small_recipe(), task, 30, 50, seed) for seed in (0, 0, 1)]
    assert runs[0].curve == runs[1].curve != runs[2].curve
    assert runs[0].val_error < 0.4 and runs[0].curve[-1][0] == 120
    x, y = next(iter(task.batches("train", 200)))
    with torch.no_grad():
        logits = runs[0].recipe.model(x)
    assert (logits.argmax(dim=-1) == y).float().mean() > 0.95  # 200 个样本背得下来


def test_evaluate_is_sum_over_count() -> None:
    task = points_task(0, 64, smoke=True)
    model = make_model(task, 0)
    whole, ragged = (train.evaluate(model, task.batches("val", size)) for size in (200, 7))
    assert whole == pytest.approx(ragged, rel=1e-6)


def test_average_is_what_gets_evaluated() -> None:
    task = points_task(0, 64, smoke=True)
    recipe = small_recipe()
    average = EMA(recipe.model, 0.9)
    recipe.evaluated, recipe.after_step = average, lambda: average.update_parameters(recipe.model)
    run = train.fit(recipe, task, 3, 32, 0)
    assert run.val_loss == train.evaluate(average, task.batches("val", 2_000))[0]
    assert run.val_loss != train.evaluate(recipe.model, task.batches("val", 2_000))[0]


def test_early_stopping_restores_the_best_epoch() -> None:
    task = points_task(0, 64, smoke=True)
    run = train.fit(small_recipe(stopper=EarlyStopping(3)), task, 200, 32, 0)
    assert run.curve[-1][0] < 400  # 没有走完 200 轮
    assert run.val_loss == pytest.approx(min(loss for _, loss in run.curve), rel=1e-6)


def test_schedule_free_is_left_at_the_average() -> None:
    task = points_task(0, 64, smoke=True)
    recipe = small_recipe(ScheduleFreeAdamW)
    run = train.fit(recipe, task, 3, 32, 0)
    assert not recipe.optimizer.param_groups[0]["train_mode"]
    assert run.val_loss == train.evaluate(recipe.model, task.batches("val", 2_000))[0]


def test_divergence_stops_the_run() -> None:
    task = points_task(0, 64, smoke=True)
    model = make_model(task, 0)
    optimizer = SGD(model.parameters(), lr=1e6)
    run = train.fit(Recipe(model, optimizer, ConstantLR(optimizer)), task, 500, 32, 0)
    assert not math.isfinite(run.val_loss) and run.curve[-1][0] < 200


def test_loop_calls_train_mode_and_zeroes_gradients() -> None:
    """在两批相同的数据上走两步，等于手写的循环。"""
    task = points_task(0, 64, smoke=True)
    ours, by_hand = make_model(task, 0), make_model(task, 0)
    batches = task.batches("train", 32)
    optimizer = SGD(ours.parameters(), lr=0.1, momentum=0.9)
    ours.eval()
    train.train_one_epoch(
        ours, batches, lambda m, x, y: cross_entropy(m(x), y), optimizer, ConstantLR(optimizer)
    )
    assert ours.training
    plain = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches:
        plain.zero_grad()
        cross_entropy(by_hand(x), y).backward()
        plain.step()
    for p, q in zip(ours.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_evaluating_in_the_middle_changes_nothing(monkeypatch) -> None:
    """Schedule-Free 中途换成平均再换回来：轨迹不变，记下的损失是平均处的。"""
    task = points_task(0, 64, smoke=True)
    often, never = small_recipe(ScheduleFreeAdamW), small_recipe(ScheduleFreeAdamW)
    monkeypatch.setattr(train, "CURVE_EVERY", 1)
    run = train.fit(often, task, 3, 32, 0)
    monkeypatch.setattr(train, "CURVE_EVERY", 10**6)
    train.fit(never, task, 3, 32, 0)
    assert len(run.curve) == 6 and run.curve[-1][1] == run.val_loss
    for p, q in zip(often.model.parameters(), never.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- 各方


def arm_named(name: str, arms: tuple[Arm, ...]) -> Arm:
    (arm,) = [arm for arm in arms if arm.name == name]
    return arm


@pytest.mark.parametrize("arm", EXPERIMENTS["schedules"].arms, ids=lambda arm: arm.name)
def test_every_schedule_peaks_at_the_chosen_rate(arm: Arm) -> None:
    recipe = arm.build(points_task(0, 64, smoke=True), 0.1, 100, 0, CPU)
    rates = []
    for _ in range(100):
        rates.append(recipe.schedule.get_last_lr()[0])
        recipe.schedule.step()
    assert max(rates) == pytest.approx(0.1, rel=1e-3)


def test_swa_starts_where_it_is_told_to() -> None:
    arm = arm_named("SWA", EXPERIMENTS["regularization"].arms)
    recipe = arm.build(points_task(0, 64, smoke=True), 0.5, 10, 0, CPU)
    for _ in range(10):
        recipe.after_step()
    assert int(recipe.evaluated.n_averaged) == 6  # 第 5 步到第 10 步


def test_l1_shrinks_by_lr_times_strength() -> None:
    arm = arm_named("L1 (proximal)", EXPERIMENTS["regularization"].arms)
    recipe = arm.build(points_task(0, 64, smoke=True), 2.0, 10, 0, CPU)
    weight = recipe.model.blocks[0][0].weight
    before = weight.detach().clone()
    recipe.after_step()
    torch.testing.assert_close(weight, nn.functional.softshrink(before, 3e-3 * 2.0))


# ---------------------------------------------------------------- 入口


def test_defaults_follow_the_experiment() -> None:
    args = train.parse_args(["--experiment", "regularization"])
    assert (args.dataset, args.epochs, args.seeds) == ("noisy-moons", 60, 8)
    args = train.parse_args(["--experiment", "regularization", "--dataset", "synth-digits"])
    assert args.plan is IMAGE_REGULARIZATION and args.seeds == 5
    args = train.parse_args(["--epochs", "2", "--seeds", "4", "--batch-size", "64"])
    assert (args.epochs, args.seeds, args.batch_size) == (2, 4, 64)
    assert args.dataset == "synth-digits" and args.out_dir.name == "optimizers"
    assert train.parse_args(["--smoke"]).out_dir.name == "optimizers_smoke"
    args = train.parse_args(["--experiment", "regularization", "--dataset", "synth-digits"])
    assert args.out_dir.name == "regularization_synth-digits"
    args = train.parse_args(["--dataset", "mnist", "--smoke"])
    assert args.out_dir.name == "optimizers_mnist_smoke"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--dataset", "noisy-moons"], "noisy-moons 只用于 --experiment regularization"),
        (["--experiment", "regularization", "--lr", "2"], "--lr 只用于挑选学习率的实验"),
        (["--experiment", "generalization", "--batch-size", "9"], "它自己改变批大小"),
        (["--experiment", "optimisers"], "没有 'optimisers' 这个选项"),
        (["--seeds", "0"], "'0' 不合要求"),
    ],
)
def test_bad_combinations_are_one_line(argv: list[str], words: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        train.parse_args(argv)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and len(error.splitlines()) == 1
    assert words in error


def test_a_run_does_not_depend_on_what_ran_before(tmp_path: Path) -> None:
    """Dropout 的随机数由每次训练自己的种子决定。"""
    args = train.parse_args(["--experiment", "regularization", "--smoke"])
    task, cpu = train.task_maker(args, CPU), CPU
    whole = {c.arm.name: c.runs[0].val_loss for c in train.run_all(args, task, cpu)}
    chosen = [arm for arm in args.plan.arms if arm.name in ("dropout", "DropPath")]
    args.plan = dataclasses.replace(args.plan, arms=tuple(chosen))
    for c in train.run_all(args, task, cpu):
        assert c.runs[0].val_loss == whole[c.arm.name]


def test_missing_dataset_is_a_user_error(tmp_path: Path, needs_torchvision: None) -> None:
    with pytest.raises(UserError, match="数据集 mnist"):
        train.main(["--dataset", "mnist", "--data-dir", str(tmp_path), "--out-dir", str(tmp_path)])


def test_whole_experiment_on_mnist_files(
    tmp_path: Path, write_mnist, needs_torchvision: None, capsys
) -> None:
    write_mnist(tmp_path, 60, 30)
    options = ["--experiment", "schedules", "--dataset", "mnist", "--data-dir", str(tmp_path)]
    metrics = train.main([*options, "--smoke", "--out-dir", str(tmp_path / "out")])
    assert set(metrics["comparisons"]) == {arm.name for arm in EXPERIMENTS["schedules"].arms}
    assert (tmp_path / "out" / "schedules.png").stat().st_size > 10_000
    assert "问题" in capsys.readouterr().out


def test_test_errors_come_from_the_test_split() -> None:
    args = train.parse_args(["--experiment", "generalization", "--smoke"])
    task = train.task_maker(args, CPU)
    for c in train.run_all(args, task, CPU):
        (run,) = c.chosen
        model, data = run.recipe.watched, task(run.seed)
        assert run.test_error == train.evaluate(model, data.batches("test", 2_000))[1]
        assert run.val_error == train.evaluate(model, data.batches("val", 2_000))[1]


def test_lr_scales_the_whole_grid(tmp_path: Path) -> None:
    options = ["--smoke", "--experiment", "generalization", "--lr", "0.5"]
    metrics = train.main([*options, "--out-dir", str(tmp_path)])
    swept = [float(lr) for lr in metrics["comparisons"]["batch 8"]["sweep"]]
    grid = EXPERIMENTS["generalization"].arms[0].knobs[:2]
    assert swept == pytest.approx([0.5 * lr for lr in grid], rel=1e-3)


def test_results_are_reproducible(tmp_path: Path) -> None:
    results = [
        train.main(["--smoke", "--experiment", "schedules", "--out-dir", str(tmp_path / name)])
        for name in "ab"
    ]
    assert results[0]["comparisons"] == results[1]["comparisons"]
