"""第 3 章的结论：由比较的结果得出的表、判定与打印的几行。"""

from __future__ import annotations

import math

import pytest
import torch

from chapter_03_optimization_regularization import benchmark, reports
from chapter_03_optimization_regularization.data import points_task
from chapter_03_optimization_regularization.experiments import EXPERIMENTS
from chapter_03_optimization_regularization.recipes import Arm, Comparison, Run

CPU = torch.device("cpu")


def made_up(errors: dict[str, list[float]], curves=((), ())) -> list[Comparison]:
    """每一方两个种子，测试错误率随意指定。"""
    done = []
    for name, values in errors.items():
        runs = [
            Run(1.0, seed, None, list(curve), 1.0, error, test_error=error, seconds=2.0)
            for seed, (error, curve) in enumerate(zip(values, curves, strict=True))
        ]
        done.append(Comparison(Arm(name, (1.0,), None), runs, 1.0, {1.0: 1.0}))
    return done


def make_context(name: str, dataset: str, task, smoke: bool = False) -> reports.Context:
    plan = EXPERIMENTS[name]
    expectation = plan.expectation(task, dataset)
    return reports.Context(plan, expectation, dataset, lambda seed: task, range(2), 10, CPU, smoke)


def test_claims_about_regularizers_are_judged() -> None:
    task = points_task(0, 64, smoke=True)
    context = make_context("regularization", "noisy-moons", task)
    errors = {"none": [0.30, 0.31], "dropout": [0.25, 0.27], "label smoothing": [0.33, 0.35]}
    report = reports.report_regularization(made_up(errors), context)
    assert [r.expectation.learned(r.value) for r in report.results[1:]] == [True, True]
    assert report.results[1].value == pytest.approx(-0.045 / 0.005)  # 差 −0.05、−0.04
    errors = {"none": [0.30, 0.31], "dropout": [0.33, 0.35], "label smoothing": [0.25, 0.27]}
    report = reports.report_regularization(made_up(errors), context)
    assert [r.expectation.learned(r.value) for r in report.results[1:]] == [False, False]
    assert report.results[0].baseline == pytest.approx(0.305)


def test_curves_of_unequal_length_are_padded() -> None:
    curves = ([(1, 3.0), (2, 2.0)], [(1, 4.0)])
    ((steps, losses),) = reports._curves(made_up({"a": [0.1, 0.2]}, curves)).values()
    assert steps == [1, 2] and losses[0].tolist() == [3.0, 2.0]
    assert losses[1, 0] == 4.0 and math.isnan(losses[1, 1])


def test_the_winner_is_chosen_on_validation_and_divergence_comes_last() -> None:
    task = points_task(0, 64, smoke=True)
    context = make_context("optimizers", "synth-digits", task)
    comparisons = made_up({"a": [0.1, 0.1], "b": [0.2, 0.2]})
    for run, loss in zip(
        [*comparisons[0].runs, *comparisons[1].runs], (math.nan, 1, 5, 5), strict=True
    ):
        run.val_loss = loss
    assert reports._winner(comparisons, context).arm.name == "b"


def test_training_to_a_target_stops_there() -> None:
    task = points_task(0, 100, smoke=True)
    row = reports._train_to_target(20, 0.3, 0, make_context("generalization", "x", task))
    assert row["train_loss"] <= reports.TARGET < row["train_loss"] * 3
    assert row["samples"] == 20 * row["steps"] and 10 < row["steps"] < 5_000
    assert row["sharpness"] > 0 and 0 < row["test_error"] < 1
    diverged = reports._train_to_target(20, 1e9, 0, make_context("generalization", "x", task))
    assert math.isnan(diverged["sharpness"]) and diverged["steps"] < 200
    short = reports._train_to_target(20, 0.3, 0, make_context("generalization", "x", task, True))
    assert short["steps"] == 5


def test_nothing_beyond_two_standard_errors_is_said_in_words() -> None:
    context = make_context("regularization", "noisy-moons", points_task(0, 64, smoke=True))
    report = reports.report_regularization(
        made_up({"none": [0.3, 0.3], "EMA": [0.2, 0.4]}), context
    )
    assert report.lines == ["      两个标准误之外：无"]


def test_the_table_compares_with_the_declared_baseline() -> None:
    """对照不必排在最前；一个种子没有标准误，只有一个「—」。"""
    plan = EXPERIMENTS["generalization"]
    errors = {"batch 8": [0.10, 0.12], "batch 512": [0.20, 0.20]}
    header, first, second = reports.table(made_up(errors), plan)
    assert "与 batch 512 之差" in header
    assert first.split()[:2] == ["batch", "8"] and first.split()[-4:] == [
        "-9.00",
        "±",
        "1.00",
        "2.00",
    ]
    assert second.split()[-4:] == ["+0.00", "±", "0.00", "2.00"]
    (single,) = reports.table(made_up({"batch 512": [0.2]}, ((),)), plan)[1:]
    assert single.split()[-4:] == ["+0.00", "±", "—", "2.00"] and "nan" not in single


def test_time_to_the_target_is_printed() -> None:
    """走到目标的步数是总步数的一半，秒数就是一次训练的一半。"""
    context = make_context("optimizers", "synth-digits", points_task(0, 64, smoke=True))
    curves = ([(5, 1.0), (10, 1.0)], [(5, 1.0), (10, 1.0)])
    comparisons = made_up({name: [0.1, 0.1] for name in ("SGD", "AdamW", "Muon")}, curves)
    lines = reports.report_optimizers(comparisons, context).lines
    assert lines[0].endswith("步数（共 10 步）与秒数")
    assert lines[3].split() == ["Muon", "5", "±", "0", "1.00", "秒"]


# ---------------------------------------------------------------- benchmark.py


def test_predicted_cost_of_muon_by_hand() -> None:
    """边长 2048 的方阵占了绝大部分：5·6k³ 比 6k²B，即 5k/B = 80；第一层把它拉低到 75。"""
    k, batch = 2048, 128
    muon = 5 * (2 * 6 * k**3 + 4 * 784**2 * k + 2 * 784**3)
    work = batch * (2 * 6 * k**2 + 4 * 784 * k + 6 * 10 * k)
    assert benchmark.muon_flops_ratio(k) == pytest.approx(muon / work)
    assert muon / work == pytest.approx(74.9, abs=0.05)
