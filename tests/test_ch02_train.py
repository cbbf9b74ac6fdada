"""第 2 章的训练循环：与手写的循环逐步相同；可复现；在任何时刻中断，续训的结果都逐位相同。"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chapter_02_nn_basics_mlp import showcase, tasks, train
from chapter_02_nn_basics_mlp.losses import cross_entropy, mse
from chapter_02_nn_basics_mlp.mlp import MLP
from chapter_02_nn_basics_mlp.tasks import correct, make_task, squared_error
from tests.resuming import flatten, interrupt_after
from utils import UserError, datasets, load_json, make_generator
from utils.datasets import TensorBatches
from utils.file_io_util import REPO_ROOT, CheckpointManager, load_checkpoint

SCRIPT = REPO_ROOT / "chapter_02_nn_basics_mlp" / "train.py"
TINY = ["--epochs", "3", "--batch-size", "64", "--hidden", "8", "--seeds", "1", "--device", "cpu"]
SAVES = 6  # 两个模型，各 3 轮


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """画图与落盘占去大半时间，而与训练的结果无关。"""
    monkeypatch.setattr(train, "draw", lambda *_: {})
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, no_figures: None) -> None:
    """每个任务只有几百个样本。"""
    sizes = {"train": 200, "val": 100, "test": 100}
    monkeypatch.setattr(tasks, "POINT_SIZES", sizes)
    monkeypatch.setattr(datasets, "SYNTH_SIZES", sizes)


@pytest.fixture
def dropout_like(monkeypatch: pytest.MonkeyPatch, tiny: None) -> None:
    """分类损失每次都用到全局的随机数，像 dropout 那样：全局状态没有恢复，续训就会走样。"""

    def noisy(output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output + 0.1 * torch.randn_like(output), target)

    monkeypatch.setattr(tasks, "cross_entropy", noisy)


def run(out_dir: Path, *extra: str, task: str = "spiral") -> dict[str, Any]:
    return train.main(["--task", task, *TINY, "--out-dir", str(out_dir), *extra])


def outcome(out_dir: Path) -> dict[str, Any]:
    """一次训练的全部结果：两个模型的权重、逐轮记录、测试得分。"""
    metrics = load_json(out_dir / "metrics.json")
    found = {key: metrics[key] for key in ("histories", "test_scores", "results")}
    for path in sorted([*out_dir.glob("*.pt"), *out_dir.glob("checkpoints/*/*.pt")]):
        found[str(path.relative_to(out_dir))] = flatten(load_checkpoint(path))
    assert len(list(out_dir.glob("*.pt"))) == 2
    return found


# ---------------------------------------------------------------- 循环本身


def ragged(generator: torch.Generator | None = None) -> TensorBatches:
    """10 个样本，每批 4 个，最后一批只有 2 个。"""
    x = torch.randn(10, 3, generator=make_generator(0), dtype=torch.float64)
    return TensorBatches(x, torch.arange(10) % 2, 4, generator=generator)


def test_train_one_epoch_equals_a_manual_loop() -> None:
    model, reference = (MLP(3, (5,), 2, "tanh", make_generator(0)).double() for _ in range(2))
    batches = ragged(make_generator(7))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    averages = [
        train.train_one_epoch(model, batches, cross_entropy, optimizer, schedule) for _ in range(2)
    ]

    generator, step, expected = make_generator(7), 0, []
    for _ in range(2):
        order, total = torch.randperm(10, generator=generator), 0.0
        for chosen in order.split(4):
            loss = F.cross_entropy(reference(batches.inputs[chosen]), batches.labels[chosen])
            grads = torch.autograd.grad(loss, list(reference.parameters()))
            lr = 0.1 * (1 + np.cos(np.pi * step / 6)) / 2
            with torch.no_grad():
                for parameter, grad in zip(reference.parameters(), grads, strict=True):
                    parameter -= lr * grad
            total, step = total + loss.item() * len(chosen), step + 1
        expected.append(total / 10)
    assert averages == pytest.approx(expected, rel=1e-12)
    assert model.training and schedule.get_last_lr()[0] == pytest.approx(0, abs=1e-15)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_evaluate_is_a_sum_over_a_count() -> None:
    model, batches = MLP(3, (5,), 2, generator=make_generator(3)).double(), ragged()
    model.layers[-1].weight.data *= 30  # 各批的损失相差悬殊，才分得清两种平均
    output = model(batches.inputs).detach()
    loss, score = train.evaluate(model, batches, cross_entropy, correct)
    assert loss == pytest.approx(F.cross_entropy(output, batches.labels).item(), rel=1e-12)
    assert score == pytest.approx((output.argmax(1) == batches.labels).double().mean().item())
    of_batches = [F.cross_entropy(model(x), y).item() for x, y in batches]
    assert abs(sum(of_batches) / 3 - loss) > 1e-3  # 各批平均的平均是另一个数
    assert not model.training
    target = torch.randn(10, 1, generator=make_generator(1), dtype=torch.float64)
    regression = TensorBatches(batches.inputs, target, 3)
    model = MLP(3, (), 1, generator=make_generator(2)).double()
    loss, score = train.evaluate(model, regression, mse, squared_error)
    assert (
        loss
        == pytest.approx(score)
        == pytest.approx((model(batches.inputs) - target).square().mean().item())
    )


def test_training_memorises_a_small_set() -> None:
    model = MLP(3, (64,), 2, generator=make_generator(0)).double()
    batches = ragged(make_generator(1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 80 * len(batches))
    losses = [
        train.train_one_epoch(model, batches, cross_entropy, optimizer, schedule) for _ in range(80)
    ]
    assert losses[0] > 0.5 and losses[-1] < 0.01
    assert train.evaluate(model, batches, cross_entropy, correct)[1] == 1.0


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", ["spiral", "regression"])
def test_fit_returns_the_weights_of_the_best_validation_epoch(name: str, tmp_path: Path) -> None:
    task = make_task(name)
    arguments = ["--task", name, *TINY, "--epochs", "6", "--lr", "0.3"]  # 学习率大，曲线才起伏
    args = train.parse_args(arguments)
    model = MLP(task.in_features, (8,), task.out_features, generator=make_generator(0))
    history, best = train.fit(model, task, args, 0, "mlp", tmp_path)
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]
    val = task.batches("val", 1000)
    last = train.evaluate(model, val, task.loss, task.score)
    assert last == (history[-1]["val_loss"], history[-1]["val_score"])
    model.load_state_dict(best)
    scores = [row["val_score"] for row in history]
    choose = max if task.expectation.higher_is_better else min
    assert train.evaluate(model, val, task.loss, task.score)[1] == choose(scores)
    assert len(set(scores)) > 1


# ---------------------------------------------------------------- 可复现


@pytest.mark.usefixtures("tiny")
def test_same_seed_same_everything_other_seed_other(tmp_path: Path) -> None:
    first, again, other = tmp_path / "first", tmp_path / "again", tmp_path / "other"
    run(first)
    run(again)
    run(other, "--seed", "1")
    assert outcome(first) == outcome(again)
    histories = [load_json(path / "metrics.json")["histories"] for path in (first, other)]
    for model in ("logistic", "mlp"):
        assert histories[0][model] != histories[1][model]


@pytest.mark.usefixtures("dropout_like")
def test_seeds_are_independent_of_each_other(tmp_path: Path) -> None:
    """三个种子一起跑，与单独跑第三个，得到同一条曲线。"""
    together = run(tmp_path / "a", "--seeds", "3")
    alone = run(tmp_path / "b", "--seed", "2")
    assert len(together["histories"]["mlp"]) == 3
    assert together["histories"]["mlp"][2] == alone["histories"]["mlp"][0]
    scores = together["test_scores"]["mlp"]
    assert scores[2] == alone["test_scores"]["mlp"][0]
    assert together["results"][0]["value"] == pytest.approx(np.mean(scores))
    assert together["results"][0]["std"] == pytest.approx(np.std(scores, ddof=1))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("task", ["spiral", "digits", "regression"])
def test_saved_model_reproduces_the_reported_test_score(task: str, tmp_path: Path) -> None:
    metrics = run(tmp_path, task=task)
    prepared = make_task(task)
    for name, hidden in ((prepared.baseline, ()), ("mlp", (8,))):
        model = MLP(prepared.in_features, hidden, prepared.out_features)
        model.load_state_dict(load_checkpoint(tmp_path / f"{name}.pt"))
        test = prepared.batches("test", 1000)
        _, score = train.evaluate(model, test, prepared.loss, prepared.score)
        assert metrics["test_scores"][name] == [score]


# ---------------------------------------------------------------- 中断与续训


@pytest.mark.usefixtures("dropout_like")
@pytest.mark.parametrize("task", ["spiral", "digits", "regression"])
def test_interrupted_at_any_epoch_then_resumed(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", task=task)
    expected = outcome(tmp_path / "whole")
    for saves in range(SAVES):
        out_dir = tmp_path / str(saves)
        restore = interrupt_after(monkeypatch, saves)
        with pytest.raises(KeyboardInterrupt):
            run(out_dir, task=task)
        restore()
        assert not (out_dir / "metrics.json").exists()
        random.seed(99), np.random.seed(99), torch.manual_seed(99)  # 新的进程，全局状态不同
        run(out_dir, "--resume", task=task)
        assert outcome(out_dir) == expected, f"保存 {saves} 次之后中断"


@pytest.mark.usefixtures("tiny")
def test_interrupted_at_every_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """每次只走一轮就被打断，反复续训，直到走完。"""
    run(tmp_path / "whole")
    for _ in range(SAVES):
        restore = interrupt_after(monkeypatch, 1)
        try:
            run(tmp_path / "parts", "--resume")
        except KeyboardInterrupt:
            restore()
    run(tmp_path / "parts", "--resume")
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


@pytest.mark.usefixtures("tiny")
def test_resuming_a_finished_run_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path)
    before = outcome(tmp_path)
    monkeypatch.setattr(train, "train_one_epoch", None)  # 一旦再训练就会出错
    run(tmp_path, "--resume")
    assert outcome(tmp_path) == before


@pytest.mark.usefixtures("tiny")
def test_resume_never_picks_up_an_older_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """从前用别的设置训练完的检查点还在；重新训练，在第一个模型上就中断，续训不能接错。"""
    run(tmp_path / "whole")
    run(tmp_path / "again", "--epochs", "2", "--lr", "0.1")
    restore = interrupt_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "again")
    restore()
    run(tmp_path / "again", "--resume")
    assert outcome(tmp_path / "again") == outcome(tmp_path / "whole")


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)


@pytest.mark.usefixtures("tiny")
def test_damaged_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """最新的损坏就报告并用前一个，结果仍与没有中断时逐位相同；都损坏就报错，什么也不改动。"""
    run(tmp_path)
    expected = outcome(tmp_path)
    kept = sorted((tmp_path / "checkpoints" / "mlp_seed0").glob("*.pt"))
    assert [path.name for path in kept] == ["step_00000002.pt", "step_00000003.pt"]
    damage(kept[-1])
    (tmp_path / "mlp.pt").unlink()
    capsys.readouterr()
    run(tmp_path, "--resume")
    assert outcome(tmp_path) == expected
    warnings = [line for line in capsys.readouterr().err.splitlines() if "警告" in line]
    assert len(warnings) == 1 and "step_00000003.pt 已损坏" in warnings[0]
    for path in kept:
        damage(path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="也没有更早的完好检查点：请去掉 --resume 从头训练"):
        run(tmp_path, "--resume")
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("option", "value", "shown"),
    [
        ("--epochs", "4", "epochs 原为 3 今为 4"),
        ("--batch-size", "32", "batch_size 原为 64 今为 32"),
        ("--lr", "0.1", "lr 原为 0.002 今为 0.1"),
        ("--hidden", "9", r"hidden 原为 \(8,\) 今为 \(9,\)"),
        ("--activation", "tanh", "activation 原为 relu 今为 tanh"),
    ],
)
def test_resume_with_other_settings(option: str, value: str, shown: str, tmp_path: Path) -> None:
    run(tmp_path)
    before = outcome(tmp_path)
    with pytest.raises(UserError, match=f"--resume 的设置与检查点不同（{shown}）：改回原设置"):
        run(tmp_path, "--resume", option, value)
    assert outcome(tmp_path) == before


@pytest.mark.usefixtures("tiny")
def test_resume_with_another_table(tmp_path: Path) -> None:
    table = "\n".join(["x,y", *(f"{i},{i * i}" for i in range(40))])
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text(table, encoding="utf-8")
    out_dir, column = tmp_path / "out", ("--column", "y")
    run(out_dir, "--csv", str(tmp_path / "a.csv"), *column, task="regression")
    for other in (("--csv", str(tmp_path / "b.csv"), *column), ()):
        with pytest.raises(UserError, match="设置与检查点不同（csv 原为"):
            run(out_dir, "--resume", *other, task="regression")


# ---------------------------------------------------------------- 真实的进程与信号

LONG = ["--task", "spiral", "--batch-size", "6000", "--hidden", "8", "--seeds", "1"]


def start(out_dir: Path, epochs: int, model: str, reached: int) -> subprocess.Popen[str]:
    """在子进程里训练，等到 ``model`` 走完 ``reached`` 轮。"""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *LONG, "--epochs", str(epochs), "--out-dir", str(out_dir)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "PYTHONPATH": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    deadline, newest = time.monotonic() + 60, f"step_{reached:08d}.pt"
    folder = out_dir / "checkpoints" / f"{model}_seed0"
    while max((path.name for path in folder.glob("step_*.pt")), default="") < newest:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, f"一分钟都没有走完 {reached} 轮"
        time.sleep(0.002)
    return process


@pytest.mark.usefixtures("no_figures")
def test_killed_at_a_random_moment_then_resumed(tmp_path: Path) -> None:
    chance, epochs = random.SystemRandom(), 40
    model, reached = chance.choice(["logistic", "mlp"]), chance.randint(1, epochs - 10)
    process = start(tmp_path / "killed", epochs, model, reached)
    time.sleep(chance.uniform(0, 0.02))  # 一轮之内的任意时刻
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "mlp.pt").exists()
    arguments = [*LONG, "--epochs", str(epochs), "--device", "cpu", "--out-dir"]
    train.main([*arguments, str(tmp_path / "killed"), "--resume"])
    train.main([*arguments, str(tmp_path / "whole")])
    killed, whole = outcome(tmp_path / "killed"), outcome(tmp_path / "whole")
    assert killed == whole, f"{model} 走完 {reached} 轮之后被杀"


def test_ctrl_c(tmp_path: Path) -> None:
    process = start(tmp_path, 100_000, "logistic", 2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    lines = [line for line in stderr.splitlines() if line and "轮/s" not in line]  # 略去进度条
    assert lines == ["已中断：此前写好的文件与检查点都完好；支持 --resume 的脚本加上它即可继续"]
    folder = tmp_path / "checkpoints" / "logistic_seed0"
    assert len(CheckpointManager(folder).load_latest()["history"]) >= 2
    assert {path.suffix for path in folder.iterdir()} == {".pt"}  # 没有写了一半的临时文件


# ---------------------------------------------------------------- 展示


@torch.no_grad()
def test_last_hidden_frame_shows_the_score_difference() -> None:
    model = MLP(2, (6, 5), 2, generator=make_generator(0))
    x = torch.randn(40, 2, generator=make_generator(1))
    frames = showcase.hidden_frames(model, x)
    assert list(frames) == ["input", "hidden layer 1", "hidden layer 2"]
    assert all(frame.shape == (40, 2) for frame in frames.values())
    output, weight = model(x), model.layers[-1].weight
    scores = (output[:, 1] - output[:, 0]) / (weight[1] - weight[0]).norm()
    centered = (scores - scores.mean()).numpy()
    np.testing.assert_allclose(frames["hidden layer 2"][:, 0], centered, atol=1e-5)


@pytest.mark.parametrize("hidden", [(1,), (1, 3), (3, 1)])
def test_hidden_frames_of_a_layer_with_one_unit(hidden: tuple[int, ...]) -> None:
    model = MLP(2, hidden, 2, "tanh", make_generator(0))
    with torch.no_grad():
        frames = showcase.hidden_frames(model, torch.randn(20, 2, generator=make_generator(1)))
    assert all(frame.shape == (20, 2) for frame in frames.values())
    assert all(np.ptp(frame[:, 0]) > 0 for frame in frames.values())


def test_a_diverged_run_ends_with_a_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """学习率荒谬：权重成了 nan，但照样画图、写结果，并说没学会。"""
    monkeypatch.setattr(tasks, "POINT_SIZES", {"train": 200, "val": 50, "test": 50})
    metrics = run(tmp_path, "--lr", "1e30", "--epochs", "2")
    assert metrics["results"][0]["learned"] is False
    assert "没学会" in capsys.readouterr().out
    images = {path.name for path in tmp_path.glob("*.png")}
    assert images == {"history.png", "boundary.png", "hidden_space.png"}


@pytest.mark.usefixtures("no_figures")
def test_smoke_is_not_judged(tmp_path: Path) -> None:
    metrics = train.main(["--smoke", "--device", "cpu", "--out-dir", str(tmp_path)])
    assert metrics["results"][0]["learned"] is None
    assert {len(runs[0]) for runs in metrics["histories"].values()} == {2}
    assert (tmp_path / "mlp.pt").is_file() and (tmp_path / "logistic.pt").is_file()


def test_default_arguments() -> None:
    args = train.parse_args(["--task", "digits"])
    assert args.hidden == (256, 128) and args.seeds == 3 and not args.resume
    assert args.out_dir == SCRIPT.parent / "outputs" / "digits"
    assert [key for key in train.CONFIG_KEYS if not hasattr(args, key)] == []
