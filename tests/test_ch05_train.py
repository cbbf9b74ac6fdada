"""第 5 章的训练脚本：循环与手写的相同，中断后续训逐位相同，开关不改变数学，坏输入是一行错误。"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chapter_03_optimization_regularization.averaging import EMA
from chapter_05_resnet_modern_cnn import recipe, train
from chapter_05_resnet_modern_cnn.data import load_data
from chapter_05_resnet_modern_cnn.models import MODELS, Recipe, build_model
from tests.resuming import flatten, interrupt_after
from utils import UserError, datasets, get_device, load_json, make_generator
from utils.datasets import TensorBatches
from utils.distributed import World
from utils.file_io_util import REPO_ROOT, load_checkpoint

SCRIPT = REPO_ROOT / "chapter_05_resnet_modern_cnn" / "train.py"
TINY = ["--model", "tiny", "--epochs", "3", "--batch-size", "32", "--device", "cpu"]
EVERYTHING = ["--mixup", "0.4", "--cutmix", "1", "--ema", "0.9", "--label-smoothing", "0.1"]
CPU = get_device("cpu")
needs_torchvision = pytest.mark.usefixtures("needs_torchvision")


def tiny_network(
    num_classes: int, in_channels: int, stem_stride: int = 2, dropout: float = 0.2
) -> nn.Module:
    """卷积、BatchNorm、dropout 各一层：统计量与随机性都在，几毫秒一轮。"""
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 5, stride=2 * stem_stride),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.LazyLinear(num_classes),
    )


def register() -> None:
    """几百张图、极小的网络，不画图，不等落盘；子进程里也用它。"""
    MODELS["tiny"] = Recipe(tiny_network, lr=0.05)
    datasets.SYNTH_SIZES = {"train": 110, "val": 50, "test": 50}
    train.figures.training_figures = lambda *_: {}
    os.fsync = lambda _: None


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """``register``，测试之后恢复原状。"""
    monkeypatch.setitem(MODELS, "tiny", MODELS["resnet10"])
    for owner, name in (
        (datasets, "SYNTH_SIZES"),
        (train.figures, "training_figures"),
        (os, "fsync"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    register()


def run(out_dir: Path, *extra: str) -> dict[str, Any]:
    return train.main([*TINY, "--out-dir", str(out_dir), *extra])


def outcome(out_dir: Path) -> dict[str, Any]:
    """一次训练的全部结果，用时除外。"""
    metrics = load_json(out_dir / "metrics.json")
    found: dict[str, Any] = {"results": metrics["results"]}
    for name, each in metrics["runs"].items():
        found[name] = {k: v for k, v in each.items() if "second" not in k}
    for path in sorted([*out_dir.glob("*.pt"), *out_dir.glob("checkpoints*/*.pt")]):
        found[path.name] = flatten(load_checkpoint(path))
    return found


# ---------------------------------------------------------------- 循环本身


@pytest.mark.parametrize("soft", [False, True])
def test_train_one_epoch_equals_a_manual_loop(soft: bool) -> None:
    """软、硬标签，标签平滑，逐步的学习率，权重的指数移动平均，不足一批的零头。"""
    x = torch.randn(10, 3, generator=make_generator(0), dtype=torch.float64)
    onehot = torch.eye(4, dtype=torch.float64)[torch.arange(10) % 4]
    targets = 0.7 * onehot + 0.3 * onehot.roll(1, 0) if soft else onehot
    batches = TensorBatches(x, targets if soft else torch.arange(10) % 4, 4)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    reference = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    average = EMA(model, 0.9)
    loss = recipe.train_one_epoch(
        model.eval(), model, batches, optimizer, schedule, CPU, label_smoothing=0.2, average=average
    )

    total, mean = 0.0, []
    for step, chosen in enumerate(torch.arange(10).split(4)):
        w1, b1, w2, b2 = (p.requires_grad_() for p in reference)
        log_p = (torch.tanh(x[chosen] @ w1.T + b1) @ w2.T + b2).log_softmax(dim=1)
        wanted = 0.8 * targets[chosen] + 0.2 / 4
        value = -(wanted * log_p).sum(dim=1).mean()
        grads = torch.autograd.grad(value, reference)
        total += value.item() * len(chosen)
        reference = [
            (p - 0.1 / (1 + step) * g).detach() for p, g in zip(reference, grads, strict=True)
        ]
        # 第一步照抄，以后按指数衰减
        mean = [0.9 * m + 0.1 * p for m, p in zip(mean or reference, reference, strict=True)]
    assert loss == pytest.approx(total / 10, rel=1e-6) and model.training
    for found, expected in ((model, reference), (average.module, mean)):
        for ours, theirs in zip(found.parameters(), expected, strict=True):
            torch.testing.assert_close(ours.detach(), theirs, rtol=1e-12, atol=1e-14)


class Fixed(nn.Module):
    """输出就是输入：得分可以手算。"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return x


def test_evaluate_is_a_sum_over_a_count() -> None:
    logits = torch.tensor([[2.0, 0, 0], [0, 3, 0], [0, 1, 0], [1, 0, 4], [5, 0, 0]])
    labels = torch.tensor([0, 1, 2, 2, 1])
    score = recipe.evaluate(Fixed().train(), TensorBatches(logits, labels, 2), 3, CPU)
    rows = logits.double().exp()
    expected = -(rows[torch.arange(5), labels] / rows.sum(dim=1)).log().mean()
    assert score.loss == pytest.approx(expected.item(), rel=1e-6)
    assert score.accuracy == 3 / 5
    assert score.confusion.tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]  # 行真实，列预测


def test_optimizer_and_schedule() -> None:
    model = build_model("resnet20", 10, (3, 32, 32))
    optimizer, schedule = recipe.make_optimizer(model, "sgd", 0.1, 0.3, 100)
    decayed, rest = optimizer.param_groups
    assert decayed["weight_decay"] == 0.3 and rest["weight_decay"] == 0.0
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert {id(p) for p in decayed["params"]} == {id(m.weight) for m in layers}
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))
    assert decayed["momentum"] == 0.9 and decayed["nesterov"]
    rates = []
    for _ in range(100):
        rates.append(decayed["lr"])
        optimizer.step()
        schedule.step()
    assert rates[4] < 0.1 == rates[5] == max(rates)  # 前 1/20 预热
    assert decayed["lr"] == pytest.approx(0, abs=1e-9) and rates[99] < 1e-4
    assert isinstance(recipe.make_optimizer(model, "adamw", 0.1, 0, 9)[0], torch.optim.AdamW)


# ---------------------------------------------------------------- 中断与续训


@pytest.mark.usefixtures("tiny")
def test_interrupted_at_every_epoch_then_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """打乱、增强、mixup、CutMix、dropout 的随机性，与 EMA、BatchNorm 的状态，都须恢复。"""
    run(tmp_path / "whole", *EVERYTHING)
    expected = outcome(tmp_path / "whole")
    assert [len(expected["tiny"]["history"])] == [3]
    for done in range(3):
        resume = interrupt_after(monkeypatch, done)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / f"{done}", *EVERYTHING)
        resume()
        speed = run(tmp_path / f"{done}", *EVERYTHING, "--resume")["runs"]["tiny"]
        assert outcome(tmp_path / f"{done}") == expected, f"{done} 轮之后打断"
        trained = speed["images_per_second"] * speed["seconds"]
        assert trained == pytest.approx(96 * (3 - done))  # 只算这一次走的几轮


KILLED = """
import sys
from tests.test_ch05_train import register, train
register()
train.main(sys.argv[1:])
"""


def test_killed_at_a_random_moment_then_resumed(tmp_path: Path, tiny: None) -> None:
    log = tmp_path / "killed"
    options = [*TINY, *EVERYTHING, "--epochs", "8"]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *options, "--out-dir", str(log)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=REPO_ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # 与本进程相同，否则舍入不同
    )
    deadline = time.monotonic() + 100
    while not list(log.glob("checkpoints*/*.pt")) and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(random.SystemRandom().uniform(0, 0.3))  # 一轮之内的任意时刻
    process.kill()
    assert process.wait() in (-signal.SIGKILL, 0)
    assert list(log.glob("checkpoints*/*.pt"))
    run(log, *options, "--resume")
    run(tmp_path / "whole", *options)
    assert outcome(log) == outcome(tmp_path / "whole")


@pytest.mark.usefixtures("tiny")
def test_resume_with_other_settings_or_another_model(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(UserError, match="epochs 原为 3 今为 4，?"):
        run(tmp_path, "--resume", "--epochs", "4")
    with pytest.raises(UserError, match="mixup 原为 0.0 今为 0.5、ema 原为 0.0 今为 0.9"):
        run(tmp_path, "--resume", "--mixup", "0.5", "--ema", "0.9")
    with pytest.raises(UserError, match="model 原为 tiny 今为 resnet10"):
        run(tmp_path, "--resume", "--model", "resnet10")


# ---------------------------------------------------------------- 结果


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("extra", [[], ["--ema", "0.8"]], ids=["plain", "ema"])
def test_saved_weights_reproduce_the_reported_scores(tmp_path: Path, extra: list[str]) -> None:
    found = run(tmp_path, "--lr", "0.3", *extra)["runs"]["tiny"]  # 学习率大，最好的一轮不必是最后
    data = load_data("synth-objects")
    model = build_model("tiny", 10, data.shape, 2)
    weights = load_checkpoint(tmp_path / "tiny.pt")
    model.load_state_dict(weights)
    score = recipe.evaluate(model, data.batches("test"), 10, CPU)
    assert (score.loss, score.accuracy) == (found["test_loss"], found["test_accuracy"])
    assert score.confusion.tolist() == found["confusion"] and score.confusion.sum() == 50
    best = max(row["val_accuracy"] for row in found["history"])
    assert recipe.evaluate(model, data.batches("val"), 10, CPU).accuracy == best


@pytest.mark.usefixtures("tiny")
def test_the_average_with_its_own_statistics_is_scored_and_saved(tmp_path: Path) -> None:
    run(tmp_path, "--epochs", "1", "--ema", "0.8")
    weights = load_checkpoint(tmp_path / "tiny.pt")
    (path,) = tmp_path.glob("checkpoints/*.pt")
    last = load_checkpoint(path)
    for key, value in weights.items():
        assert torch.equal(value, last["average"][f"module.{key}"]), key
    assert not torch.equal(weights["0.weight"], last["model"]["0.weight"])
    # BatchNorm 的统计量属于平均之后的权重：用不增强的训练数据重算，各批等权
    images = load_data("synth-objects").batches("train", 32)
    outputs = [F.conv2d(x, weights["0.weight"], weights["0.bias"], stride=4) for x, _ in images]
    mean = torch.stack([y.mean(dim=(0, 2, 3)) for y in outputs]).mean(dim=0)
    var = torch.stack([y.var(dim=(0, 2, 3)) for y in outputs]).mean(dim=0)
    torch.testing.assert_close(weights["1.running_mean"], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights["1.running_var"], var, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("tiny")
def test_against_is_trained_alike_and_is_the_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MODELS, "other", Recipe(tiny_network, "adamw", 0.01, 0.3))
    seen = []
    original = train.make_optimizer

    def record(model, *rest):
        seen.append(rest)
        return original(model, *rest)

    monkeypatch.setattr(train, "make_optimizer", record)
    metrics = run(tmp_path, "--against", "other", "--epochs", "1")
    assert seen == [("sgd", 0.05, 5e-4, 3), ("adamw", 0.01, 0.3, 3)]  # 各用各的配方
    (result,) = metrics["results"]
    assert result["value"] == metrics["runs"]["tiny"]["test_accuracy"]
    assert result["baseline"] == metrics["runs"]["other"]["test_accuracy"]
    assert {p.name for p in tmp_path.glob("*.pt")} == {"tiny.pt", "other.pt"}
    out = capsys.readouterr().out
    assert out.count("测试  tiny") == out.count("测试  other") == 1 and "1 个进程" in out
    seen.clear()
    run(tmp_path, "--against", "other", "--epochs", "1", "--weight-decay", "0", "--lr", "0.2")
    assert seen == [("sgd", 0.2, 0.0, 3), ("adamw", 0.2, 0.0, 3)]


def test_settings_that_follow_from_others() -> None:
    args = train.parse_args([])
    assert (args.model, args.against, args.stem_stride) == ("resnet32", "plain32", 2)
    assert args.out_dir.name == "resnet32_synth-objects"
    args = train.parse_args(["--dataset", "cifar10", "--smoke"])
    assert (args.against, args.stem_stride, args.epochs) == ("none", 1, 2)
    assert args.out_dir.name == "resnet32_cifar10_smoke"
    assert train.parse_args(["--model", "resnet18"]).against == "none"
    assert train.parse_args(["--stem-stride", "1"]).stem_stride == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--image-size", "64"], "--image-size 只用于 --dataset folder"),
        (["--ema", "1"], "--ema 应小于 1"),
        (["--label-smoothing", "1"], "--label-smoothing 应小于 1"),
    ],
)
def test_settings_that_make_no_sense(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.parse_args(argv)
    assert words in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_every_epoch_starts_from_its_own_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = train.train_one_epoch

    def record(*args, **options):
        seen.append(torch.initial_seed())
        return original(*args, **options)

    monkeypatch.setattr(train, "train_one_epoch", record)
    run(tmp_path, "--seed", "7")
    assert seen == [train.epoch_seed(7, epoch) for epoch in range(3)]


def test_epochs_and_ranks_have_their_own_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = set()
    for rank in range(4):
        monkeypatch.setattr(train, "world", lambda rank=rank: World(rank, 4))
        seeds |= {train.epoch_seed(seed, epoch) for seed in range(3) for epoch in range(5)}
    assert len(seeds) == 4 * 3 * 5 and max(seeds) < 2**32


# ---------------------------------------------------------------- 不改变数学的开关


def losses(metrics: dict[str, Any]) -> list[float]:
    return [row["train_loss"] for row in metrics["runs"]["tiny"]["history"]]


@pytest.mark.usefixtures("tiny")
def test_memory_format_and_half_precision(tmp_path: Path) -> None:
    # dropout 的掩码依内存的次序抽取，换了布局就是另一串
    MODELS["tiny"] = Recipe(partial(tiny_network, dropout=0.0), lr=0.05)
    plain = losses(run(tmp_path / "a"))
    assert losses(run(tmp_path / "b", "--channels-last")) == pytest.approx(plain, rel=1e-4)
    kernel = load_checkpoint(tmp_path / "b" / "tiny.pt")["0.weight"]
    assert kernel.is_contiguous(memory_format=torch.channels_last) and not kernel.is_contiguous()
    half = losses(run(tmp_path / "c", "--amp"))
    assert half == pytest.approx(plain, rel=0.05) and half != pytest.approx(plain, rel=1e-6)
    weights = load_checkpoint(tmp_path / "c" / "tiny.pt")
    assert all(v.dtype in (torch.float32, torch.int64) for v in weights.values())


@pytest.mark.usefixtures("tiny")
def test_augmentation_is_on_unless_asked_otherwise(tmp_path: Path) -> None:
    default, standard, none = (
        losses(run(tmp_path / str(i), *extra))
        for i, extra in enumerate(([], ["--augment", "standard"], ["--augment", "none"]))
    )
    assert default == standard and default[0] != none[0]


@pytest.mark.script
@pytest.mark.skipif(not shutil.which("g++"), reason="没有 C++ 编译器")
def test_compiled_training_is_the_same(tmp_path: Path, tiny: None) -> None:
    MODELS["tiny"] = Recipe(
        lambda k, c, **_: nn.Sequential(nn.Flatten(), nn.Linear(3072, k)), lr=0.01
    )
    plain = losses(run(tmp_path / "a", "--epochs", "2"))
    compiled = losses(run(tmp_path / "b", "--epochs", "2", "--compile"))
    assert compiled == pytest.approx(plain, rel=1e-4)
    weights = load_checkpoint(tmp_path / "b" / "tiny.pt")
    assert list(weights) == ["1.weight", "1.bias"]  # 没有 _orig_mod 前缀


@pytest.mark.script
def test_compile_without_a_compiler_is_one_line(tmp_path: Path, run_script) -> None:
    done = run_script(
        *(SCRIPT, "--smoke", "--compile", "--against", "none", "--out-dir", tmp_path / "out"),
        env={"PATH": "/nonexistent", "CXX": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("错误：")]
    assert "--compile 需要编译器而这里用不了" in line and "去掉 --compile" in line
    assert not (tmp_path / "out" / "metrics.json").exists()


# ---------------------------------------------------------------- 用户的失误


@needs_torchvision
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--image-size", "6", "--batch-size", "8"],
            "--model resnet20 与数据不相配：CifarResNet 的输入.*至少 8 像素",
        ),
        (["--batch-size", "64"], "--batch-size 64 超过训练集的 32 张"),
    ],
)
def test_data_that_do_not_suit(
    options: list[str], words: str, tmp_path: Path, write_class_folders
) -> None:
    write_class_folders(tmp_path / "data", {"cat": 20, "dog": 20})
    argv = ["--model", "resnet20", "--dataset", "folder", "--data-dir", str(tmp_path / "data")]
    with pytest.raises(UserError, match=words):
        train.main([*argv, "--device", "cpu", "--out-dir", str(tmp_path / "out"), *options])
    assert not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.usefixtures("tiny")
def test_a_diverged_run_ends_with_a_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = run(tmp_path, "--lr", "1e30")
    assert metrics["results"][0]["learned"] is False and "没学会" in capsys.readouterr().out
