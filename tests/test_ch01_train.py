"""第 1 章的网络、优化器、数据与训练：逐步等于 PyTorch；可复现；划分不重叠；坏参数只有一行错误。"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chapter_01_tensor_autograd import data, optim, train
from chapter_01_tensor_autograd import functional as F
from chapter_01_tensor_autograd.engine import Tensor, as_tensor, no_grad
from chapter_01_tensor_autograd.nn import ACTIVATIONS, MLP, Linear, TorchMLP
from utils import get_device, load_json, make_generator, run_main
from utils.datasets import SPLITS

# ---------------------------------------------------------------- 网络


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("sizes", "batch"), [((3, 2), 1), ((5, 7, 4, 3), 6)])
def test_mlp_equals_its_twin(activation: str, sizes: tuple[int, ...], batch: int) -> None:
    ours = MLP(sizes, activation, make_generator(0))
    twin = TorchMLP(sizes, activation).double()
    twin.load_state_dict(ours.state_dict())
    x = torch.randn(batch, sizes[0], generator=make_generator(1), dtype=torch.float64)
    y = torch.arange(batch) % sizes[-1]
    loss = F.cross_entropy(ours(as_tensor(x.numpy())), y.numpy())
    official = torch.nn.functional.cross_entropy(twin(x), y)
    loss.backward()
    official.backward()
    assert loss.item() == pytest.approx(official.item(), rel=1e-14)
    for (name, p), q in zip(ours.named_parameters().items(), twin.parameters(), strict=True):
        np.testing.assert_allclose(p.grad.numpy(), q.grad, rtol=1e-11, atol=1e-14, err_msg=name)


def test_state_dict_round_trip() -> None:
    sizes = (4, 5, 2)
    ours, twin = MLP(sizes, "relu", make_generator(0)), TorchMLP(sizes, "relu").double()
    ours.load_state_dict(twin.state_dict())
    assert list(ours.state_dict()) == list(twin.state_dict())
    for a, b in zip(ours.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    before = ours.state_dict()
    for wrong in (TorchMLP((4, 6, 2), "relu"), TorchMLP((4, 2), "relu")):
        with pytest.raises(ValueError, match="load_state_dict：应为"):
            ours.load_state_dict(wrong.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), ours.state_dict().values(),
                                                 strict=True))  # fmt: skip


def test_default_initialisation_is_that_of_torch() -> None:
    layer = Linear(400, 300, make_generator(0), np.float64)
    weight = layer.weight.numpy()
    assert 0.99 / 20 < np.abs(weight).max() <= 1 / 20  # U(−1/√400, 1/√400)
    assert weight.std() == pytest.approx(1 / 20 / np.sqrt(3), rel=0.01)
    assert np.abs(layer.bias.numpy()).max() <= 1 / 20
    again = Linear(400, 300, make_generator(0), np.float64)
    assert np.array_equal(weight, again.weight.numpy())


def test_bad_networks() -> None:
    for sizes in ((3,), (3, 0)):
        with pytest.raises(ValueError, match="sizes="):
            MLP(sizes, "relu", make_generator(0))
    with pytest.raises(ValueError, match="activation='rleu' 不认识：可选 relu"):
        MLP((2, 2), "rleu", make_generator(0))


# ---------------------------------------------------------------- 优化器


@pytest.mark.parametrize(
    ("ours", "official"),
    [
        (lambda p: optim.SGD(p, 0.1), lambda p: torch.optim.SGD(p, 0.1)),
        (lambda p: optim.SGD(p, 0.05, 0.9), lambda p: torch.optim.SGD(p, 0.05, 0.9)),
        (lambda p: optim.Adam(p, 0.02), lambda p: torch.optim.Adam(p, 0.02)),
        (
            lambda p: optim.Adam(p, 0.01, (0.5, 0.7), 1e-3),
            lambda p: torch.optim.Adam(p, 0.01, (0.5, 0.7), 1e-3),
        ),
    ],
    ids=["sgd", "momentum", "adam", "adam-options"],
)
def test_optimizers_equal_torch_over_100_steps(ours: Any, official: Any) -> None:
    start = np.array([[0.5, -1.0, 2.0], [1.5, 0.1, -0.3]])
    a, t = Tensor(start, requires_grad=True), torch.tensor(start, requires_grad=True)
    untouched = Tensor(np.ones(2), requires_grad=True)
    mine, theirs = ours([a, untouched]), official([t])
    for _ in range(100):
        for x, optimizer in ((a, mine), (t, theirs)):
            optimizer.zero_grad()
            loss = ((x - 1.0) ** 2 * (x.sin() + 2.0)).sum()
            loss.backward()
            optimizer.step()
        np.testing.assert_allclose(a.numpy(), t.detach().numpy(), rtol=1e-12, atol=1e-14)
    assert untouched.numpy().tolist() == [1.0, 1.0]  # 没有梯度的不动
    assert a.is_leaf and a.requires_grad


def test_gradients_accumulate_until_zero_grad() -> None:
    x = Tensor([1.0], requires_grad=True)
    optimizer = optim.SGD([x], 0.1)
    for _ in range(2):
        (x * 3.0).sum().backward()
    assert x.grad.numpy().tolist() == [6.0]
    optimizer.zero_grad()
    assert x.grad is None
    kept = x.grad
    optimizer.step()
    assert kept is None and x.numpy().tolist() == [1.0]


def test_one_batch_can_be_memorised() -> None:
    generator = make_generator(0)
    x = torch.randn(16, 8, generator=generator, dtype=torch.float64).numpy()
    y = torch.randint(4, (16,), generator=generator).numpy()
    model = MLP((8, 32, 4), "relu", generator)
    optimizer = optim.Adam(model.parameters(), 0.02)
    with no_grad():
        start = F.cross_entropy(model(as_tensor(x)), y).item()
    assert start == pytest.approx(np.log(4), abs=0.3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(as_tensor(x)), y)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01


# ---------------------------------------------------------------- 数据


@pytest.mark.parametrize("name", ["moons", "spiral"])
def test_splits_do_not_overlap(name: str) -> None:
    task = data.make_task(name)
    rows = [{row.tobytes() for row in task.splits[split].inputs} for split in SPLITS]
    assert [len(r) for r in rows] == list(data.POINT_SIZES.values())
    assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]
    assert task.expectation.floor > task.expectation.band[0] > 0.95


def test_batches_cover_every_sample_once_in_the_generators_order() -> None:
    task = data.make_task("moons", smoke=True)
    for generator in (None, make_generator(3)):
        batches = list(task.batches("train", 50, generator))
        assert [len(y) for _, y in batches] == [50, 50, 28]
        seen = np.concatenate([x for x, _ in batches])
        expected = task.splits["train"].inputs.astype(np.float64)
        assert sorted(map(tuple, seen)) == sorted(map(tuple, expected))
        assert np.array_equal(seen, expected) == (generator is None)
    again = list(task.batches("train", 50, make_generator(3)))
    assert np.array_equal(again[0][0], batches[0][0])


def test_digits_are_normalised_with_the_training_statistics() -> None:
    task = data.make_task("digits", smoke=True, dtype=np.float32)
    pixels = task.splits["train"].inputs
    x = task.normalize(pixels)
    assert pixels.dtype == np.uint8 and x.dtype == np.float32 and x.shape == (128, 784)
    assert x.mean() == pytest.approx(0, abs=1e-4) and x.std() == pytest.approx(1, abs=1e-3)
    mean, std = (pixels / 255).mean(), (pixels / 255).std()
    np.testing.assert_allclose(x, (pixels / 255 - mean) / std, atol=1e-4)


# ---------------------------------------------------------------- 训练


def run(out_dir: Path, *extra: str) -> dict[str, Any]:
    argv = ["--epochs", "2", "--hidden", "8", "--device", "cpu", "--out-dir", str(out_dir)]
    return train.main([*argv, *extra])


def test_both_sides_walk_the_same_path(tmp_path: Path) -> None:
    metrics = run(tmp_path, "--task", "spiral")
    ours, theirs = (np.array(metrics["history"][name]["loss"]) for name in ("engine", "PyTorch"))
    assert len(ours) == 2 * 63 and ours[-1] < ours[0]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    assert metrics["test_scores"]["engine"] == metrics["test_scores"]["PyTorch"]
    accuracy, gap = metrics["results"]
    assert gap["value"] == np.abs(ours - theirs).max() and gap["learned"] is True
    assert accuracy["value"] == metrics["test_scores"]["engine"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "metrics.json", "curves.png", "boundary.png",
    }  # fmt: skip
    assert load_json(tmp_path / "metrics.json") == metrics


def test_same_seed_same_history(tmp_path: Path) -> None:
    first, again, other = (
        run(tmp_path / str(i), "--smoke", "--seed", seed) for i, seed in enumerate("001")
    )
    assert first["history"] == again["history"]
    assert first["history"]["engine"]["loss"] != other["history"]["engine"]["loss"]


def test_evaluate_is_a_sum_over_a_count() -> None:
    task = data.make_task("moons", smoke=True)
    sides = train.make_sides((2, 4, 2), "tanh", 0.01, 0, get_device("cpu"), np.float64)
    for side in sides:
        whole = train.evaluate(side, task.batches("test", 128))
        parts = train.evaluate(side, task.batches("test", 50))  # 最后一批只有 28 个
        assert parts == pytest.approx(whole, rel=1e-12)


def test_a_model_that_learned_nothing_is_told_so(tmp_path: Path, capsys) -> None:
    metrics = train.main(["--epochs", "1", "--lr", "1e-9", "--out-dir", str(tmp_path)])
    assert metrics["results"][0]["learned"] is False
    assert "没学会" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--task", "moon"], "参数 --task 没有 'moon' 这个选项，可选：.*moons"),
        (["--epochs", "0"], "参数 --epochs：'0' 不合要求：应为正整数"),
        (["--lr", "nan"], "参数 --lr：'nan' 不合要求：应为正数"),
        (["--hidden", "8,0"], "参数 --hidden：'8,0' 不合要求"),
        (["--activation", "rleu"], "参数 --activation 没有 'rleu'"),
        (["--dataset", "mnist"], "--dataset 与 --download 只用于 --task digits"),
    ],
)
def test_bad_arguments_are_one_line(argv: list[str], message: str, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: train.main([*argv, "--out-dir", str(tmp_path / "out")]))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1
    assert err.startswith("错误：") and re.search(message, err)


def test_missing_dataset_is_one_line(needs_torchvision: None, tmp_path: Path, capsys) -> None:
    argv = ["--task", "digits", "--dataset", "mnist", "--data-dir", str(tmp_path / "没有")]
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: train.main([*argv, "--out-dir", str(tmp_path / "out")]))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and "数据集 mnist" in err
