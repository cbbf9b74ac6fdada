"""第 4 章的训练脚本：循环与手写的相同，中断后续训逐位相同，手写的层可训练，坏输入是一行错误。"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chapter_04_cnn_classic import recipe, train
from chapter_04_cnn_classic.data import load_data
from chapter_04_cnn_classic.models import MODELS, build_model
from chapter_04_cnn_classic.weights import load_torchvision_weights
from tests.resuming import flatten, interrupt_after
from utils import UserError, datasets, get_device, load_json, make_generator, set_seed
from utils.datasets import TensorBatches
from utils.file_io_util import REPO_ROOT, load_checkpoint

SCRIPT = REPO_ROOT / "chapter_04_cnn_classic" / "train.py"
TINY = ["--epochs", "3", "--batch-size", "64", "--device", "cpu"]
needs_torchvision = pytest.mark.usefixtures("needs_torchvision")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """几百张图，不画图，不等落盘。"""
    monkeypatch.setattr(datasets, "SYNTH_SIZES", {"train": 120, "val": 50, "test": 50})
    monkeypatch.setattr(train.figures, "training_figures", lambda *_: {})
    monkeypatch.setattr(os, "fsync", lambda _: None)


def run(out_dir: Path, *extra: str) -> dict[str, Any]:
    return train.main([*TINY, "--out-dir", str(out_dir), *extra])


def outcome(out_dir: Path) -> dict[str, Any]:
    """一次训练的全部结果：逐轮记录、测试得分、最好的权重、最后的检查点。"""
    metrics = load_json(out_dir / "metrics.json")
    found = {key: metrics[key] for key in ("history", "test_loss", "results")}
    for path in sorted([out_dir / "best.pt", *out_dir.glob("checkpoints/*.pt")]):
        found[path.name] = flatten(load_checkpoint(path))
    return found


# ---------------------------------------------------------------- 循环本身


def test_train_one_epoch_equals_a_manual_loop() -> None:
    x = torch.randn(10, 1, 12, 12, generator=make_generator(0), dtype=torch.float64)
    batches = TensorBatches(x, torch.arange(10) % 3, 4, generator=make_generator(7))
    set_seed(1)
    model, reference = (build_model("lenet", 3, 1, 12).double() for _ in range(2))
    reference.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    loss = train.train_one_epoch(model, batches, optimizer, schedule, get_device("cpu"), None)

    total = 0.0
    chunks = torch.randperm(10, generator=make_generator(7)).split(4)
    for step, chosen in enumerate(chunks):
        value = F.cross_entropy(reference(x[chosen]), batches.labels[chosen])
        grads = torch.autograd.grad(value, list(reference.parameters()))
        total += value.item() * len(chosen)
        with torch.no_grad():
            for parameter, grad in zip(reference.parameters(), grads, strict=True):
                parameter -= 0.1 / (1 + step) * grad
    assert loss == pytest.approx(total / 10, rel=1e-12) and model.training
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_evaluate_is_a_sum_over_a_count_in_eval_mode() -> None:
    x = torch.randn(10, 3, 16, 16, generator=make_generator(0))
    model = build_model("vgg11_bn", 4, 3, 16).train()
    loss, outputs = train.evaluate(model, TensorBatches(x, torch.arange(10) % 4, 4))
    assert not model.training and outputs.shape == (10, 4)
    with torch.no_grad():
        whole = model(x)  # eval：BatchNorm 与批的切法无关
    torch.testing.assert_close(outputs, whole, rtol=1e-4, atol=1e-5)
    assert loss == pytest.approx(F.cross_entropy(whole, torch.arange(10) % 4).item(), rel=1e-5)


def test_warmup_then_cosine() -> None:
    factors = [recipe.warmup_cosine(step, 100) for step in range(101)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and factors[5] == 1.0
    assert factors[100] == pytest.approx(0.0, abs=1e-15)
    assert factors[5 + 95 // 2] == pytest.approx(0.5, abs=0.02)
    assert all(a >= b for a, b in zip(factors[5:], factors[6:], strict=False))
    assert recipe.warmup_cosine(9, 50, 5) == 1.0 > recipe.warmup_cosine(8, 50, 5)
    assert recipe.warmup_cosine(0, 1) == 1.0  # 只有一步也不出错


def test_only_matrices_and_kernels_decay() -> None:
    model = build_model("vgg11_bn", 10, 3, 32)
    decayed, rest = recipe.parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert {id(p) for p in decayed["params"]} == {id(m.weight) for m in layers}
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))


# ---------------------------------------------------------------- 整个脚本


@pytest.mark.usefixtures("tiny")
def test_interrupted_at_every_epoch_then_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 带 dropout 的网络，打乱与增强：三种随机性都须恢复
    options = ["--model", "nin", "--lr", "1e-3"]
    run(tmp_path / "whole", *options)
    for done in range(3):
        resume = interrupt_after(monkeypatch, done)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / f"{done}", *options)
        resume()
        run(tmp_path / f"{done}", *options, "--resume")
        assert outcome(tmp_path / f"{done}") == outcome(tmp_path / "whole"), f"{done} 轮之后打断"


def test_killed_at_a_random_moment_then_resumed(tmp_path: Path) -> None:
    chance = random.SystemRandom()
    arguments = ["--smoke", "--device", "cpu", "--out-dir"]
    log = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments, str(log)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not list(log.glob("checkpoints/*.pt")) and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 0.3))  # 一轮之内的任意时刻
    process.kill()
    assert process.wait() in (-signal.SIGKILL, 0)
    train.main([*arguments, str(log), "--resume"])
    train.main([*arguments, str(tmp_path / "whole")])
    assert outcome(log) == outcome(tmp_path / "whole")


@pytest.mark.usefixtures("tiny")
def test_handmade_layers_train_like_the_official_ones(tmp_path: Path) -> None:
    official = run(tmp_path / "a", "--augment", "none")["history"]
    ours = run(tmp_path / "b", "--augment", "none", "--handmade")["history"]
    for a, b in zip(official, ours, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)
    assert official[-1]["train_loss"] < official[0]["train_loss"]


@pytest.mark.usefixtures("tiny")
def test_saved_weights_reproduce_the_reported_score(tmp_path: Path) -> None:
    metrics = run(tmp_path)
    data = load_data("synth-digits")
    model = build_model("lenet", 10, 1, 28)
    model.load_state_dict(load_checkpoint(tmp_path / "best.pt"))
    loss, outputs = train.evaluate(model, data.batches("test"))
    assert loss == metrics["test_loss"]
    score = train.accuracy(outputs, data.splits["test"].labels)
    assert score == metrics["results"][0]["value"]
    best = max(row["val_accuracy"] for row in metrics["history"])
    _, outputs = train.evaluate(model, data.batches("val"))
    assert train.accuracy(outputs, data.splits["val"].labels) == best


@pytest.mark.usefixtures("tiny")
def test_resume_with_other_settings(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(UserError, match="epochs 原为 3 今为 4"):
        run(tmp_path, "--resume", "--epochs", "4")


def test_a_diverged_run_ends_with_a_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets, "SYNTH_SIZES", {"train": 200, "val": 50, "test": 50})
    metrics = run(tmp_path, "--lr", "1e30")
    assert metrics["results"][0]["learned"] is False and "没学会" in capsys.readouterr().out
    assert {"history.png", "confusion.png"} <= {path.name for path in tmp_path.glob("*.png")}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_runs_forward_and_backward(name: str) -> None:
    channels = 1 if name == "lenet1998" else 3
    for size in (28, 32):
        model = build_model(name, 10, channels, size)
        x = torch.randn(2, channels, size, size, generator=make_generator(0))
        output = model(x)
        assert output.shape == (2, 10)
        output.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# ---------------------------------------------------------------- 用户的失误


@needs_torchvision
def test_folder_with_one_class(tmp_path: Path, write_class_folders) -> None:
    write_class_folders(tmp_path, {"cat": 20})
    with pytest.raises(UserError, match=r"只有 \('cat',\) 一个类别"):
        load_data("folder", tmp_path)


@needs_torchvision
def test_zero_byte_image_is_named(tmp_path: Path, write_class_folders) -> None:
    write_class_folders(tmp_path, {"cat": 20, "dog": 20})
    (tmp_path / "dog" / "003.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"003\.png 无法解码"):
        load_data("folder", tmp_path)


@needs_torchvision
@pytest.mark.parametrize(
    ("model", "size", "words"),
    [
        ("lenet", 8, "输入边长至少 12 像素，实为 8"),
        ("lenet1998", 32, "只认 10 类、单通道"),
        ("vgg11", 8, "边长至少 16 像素"),
        ("alexnet", 12, "边长至少 15 像素"),
    ],
)
def test_images_that_do_not_suit_the_model(
    model: str, size: int, words: str, tmp_path: Path, write_class_folders
) -> None:
    write_class_folders(tmp_path / "data", {"cat": 20, "dog": 20})
    argv = ["--dataset", "folder", "--data-dir", str(tmp_path / "data"), "--image-size", str(size)]
    with pytest.raises(UserError, match=words):
        run(tmp_path / "out", "--model", model, *argv)
    assert not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("features.0.bias"), "缺少 features.0.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "多出 extra"),
        (lambda s: s.update({"features.0.bias": torch.zeros(7)}), r"应为 \(6,\)，文件里是 \(7,\)"),
    ],
)
def test_weights_of_another_model(change, words: str, tmp_path: Path) -> None:
    model = build_model("lenet", 10, 1, 28)
    state = {key: value + 1 for key, value in model.state_dict().items()}
    path = tmp_path / "other.pth"
    torch.save(state, path)
    before = flatten(model.state_dict())
    load_torchvision_weights(build_model("lenet", 10, 1, 28), path)  # 相配的装得进
    change(state)
    torch.save(state, path)
    with pytest.raises(UserError, match=words) as caught:
        load_torchvision_weights(model, path)
    assert str(path) in str(caught.value) and flatten(model.state_dict()) == before


def test_weights_older_than_num_batches_tracked(tmp_path: Path) -> None:
    """早年的文件没有这一项，且有的网络改过名字；别的仍须齐全。"""
    source, model = (build_model("vgg11_bn", 10, 3, 32) for _ in range(2))
    state = {k: v for k, v in source.state_dict().items() if "num_batches" not in k}
    path = tmp_path / "old.pth"
    torch.save(state, path)
    load_torchvision_weights(model, path)
    assert flatten(model.state_dict()) == flatten(source.state_dict())
    torch.save({f"old.{key}": value for key, value in state.items()}, path)
    fresh = build_model("vgg11_bn", 10, 3, 32)
    with pytest.raises(UserError, match=r"缺少 features\.0\.weight"):
        load_torchvision_weights(fresh, path)
    load_torchvision_weights(
        fresh, path, lambda old: {k.removeprefix("old."): v for k, v in old.items()}
    )
    assert flatten(fresh.state_dict()) == flatten(source.state_dict())


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_damaged_weights(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.pth 已损坏或不可信"):
        load_torchvision_weights(build_model("lenet", 10, 1, 28), path)
    with pytest.raises(UserError, match="找不到权重文件"):
        load_torchvision_weights(build_model("lenet", 10, 1, 28), tmp_path / "none.pth")
