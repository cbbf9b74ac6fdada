"""第 5 章的多进程训练：真正的 torchrun、两个进程、gloo，与一个进程对照。

没有 BatchNorm 的网络：全局的一批相同，梯度就相同，两条曲线只差浮点求和的次序。
有 BatchNorm 的：每个进程用自己那一半的统计量，曲线相近而不相等，本来就该如此。

启动一次 torchrun 要导入三次 torch，所以几种情形在同一次里依次运行：``SCENARIOS`` 在每个进程里
执行 ``scenarios``，各自的输出写进文件，由这里的测试查看。
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn

from chapter_05_resnet_modern_cnn import recipe, train
from chapter_05_resnet_modern_cnn.data import load_data
from chapter_05_resnet_modern_cnn.models import MODELS, Recipe, build_model
from tests.conftest import run_python
from tests.resuming import flatten
from utils import datasets, get_device, load_json
from utils.distributed import join_torchrun, world
from utils.file_io_util import REPO_ROOT, load_checkpoint
from utils.resume import TrainingState

pytestmark = pytest.mark.script

SCRIPT = REPO_ROOT / "chapter_05_resnet_modern_cnn" / "train.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
COMMON = ["--epochs", "3", "--batch-size", "16", "--device", "cpu", "--against", "none"]
MIXED = ["--mixup", "0.4", "--cutmix", "1", "--ema", "0.9", "--label-smoothing", "0.1"]

STILL = ["--epochs", "1", "--lr", "1e-9"]  # 六步，权重几乎不动


def smooth(num_classes: int, in_channels: int, stem_stride: int = 2) -> nn.Module:
    """没有 BatchNorm，也没有随机的层。"""
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 5, stride=2 * stem_stride),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(8 * 7 * 7, num_classes),
    )


def noisy(num_classes: int, in_channels: int, stem_stride: int = 2) -> nn.Module:
    """有 BatchNorm，也有各进程各不相同的 dropout。"""
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 5, stride=2 * stem_stride),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(8 * 7 * 7, num_classes),
    )


def register() -> None:
    """两个极小的网络；测试集的 35 张与验证集的 33 张都不能由两个进程平分。"""
    MODELS["smooth"] = Recipe(smooth, lr=0.05)
    MODELS["noisy"] = Recipe(noisy, lr=0.05)
    datasets.SYNTH_SIZES = {"train": 100, "val": 33, "test": 35}
    train.figures.training_figures = lambda *_: {}
    os.fsync = lambda _: None


def run(out_dir: Path, model: str, *extra: str) -> dict[str, Any]:
    return train.main([*COMMON, "--model", model, "--out-dir", str(out_dir), *extra])


@contextlib.contextmanager
def interrupted(epochs: int) -> Iterator[None]:
    """记下 ``epochs`` 轮之后，每个进程都在同一处被 Ctrl-C 打断。"""
    original = TrainingState.record

    def record(self: TrainingState, *args: Any, **kwargs: Any) -> None:
        if self.epoch == epochs:
            raise KeyboardInterrupt
        original(self, *args, **kwargs)

    TrainingState.record = record
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        TrainingState.record = original


# ---------------------------------------------------------------- 两个进程里的事

SCENARIOS = """
import sys
from pathlib import Path
from tests.test_ch05_ddp import scenarios
from utils import run_main
run_main(lambda: scenarios(Path(sys.argv[1])))
"""


def scenarios(root: Path) -> None:
    """依次运行各种情形；最后一种以用户错误结束。"""
    register()
    with join_torchrun("cpu"):
        train.join_torchrun = lambda _: contextlib.nullcontext()  # 已经加入，以下共用一个进程组
        rank = world().rank
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run(root / "smooth", "smooth")
        (root / f"printed_{rank}").write_text(out.getvalue(), encoding="utf-8")
        (root / f"progress_{rank}").write_text(err.getvalue(), encoding="utf-8")
        with contextlib.redirect_stderr(io.StringIO()):
            run(root / "mixed", "smooth", *MIXED)
            run(root / "norm", "noisy")
            for model, name in (("smooth", "smooth_2"), ("noisy", "norm_2")):
                with interrupted(1):
                    run(root / f"{name}_to_2", model)
                if rank == 0:
                    shutil.copytree(root / f"{name}_to_2", root / f"{name}_to_1")
                dist.barrier()
                run(root / f"{name}_to_2", model, "--resume")
            run(root / "smooth_1_to_2", "smooth", "--resume")
            run(root / "still", "noisy", *STILL)
        print("到此为止", flush=True)
        run(root / "odd", "smooth", "--batch-size", "15")


# ---------------------------------------------------------------- 一个进程里的事


class Runs(NamedTuple):
    """两次 torchrun，与它们写下的东西。"""

    root: Path
    scenarios: subprocess.CompletedProcess[str]
    real: subprocess.CompletedProcess[str]

    def history(self, name: str) -> list[dict[str, float]]:
        (found,) = load_json(self.root / name / "metrics.json")["runs"].values()
        return found["history"]

    def outcome(self, name: str) -> dict[str, Any]:
        """逐轮记录、测试得分、混淆矩阵，最好的权重与最后的检查点；用时除外。"""
        folder = self.root / name
        (found,) = load_json(folder / "metrics.json")["runs"].values()
        found = {key: value for key, value in found.items() if "second" not in key}
        for path in sorted([*folder.glob("*.pt"), *folder.glob("checkpoints*/*.pt")]):
            found[path.name] = flatten(load_checkpoint(path))
        return found


@pytest.fixture(scope="module")
def tiny() -> Iterator[None]:
    """``register``，之后恢复原状。"""
    with pytest.MonkeyPatch.context() as context:
        for name in ("smooth", "noisy"):
            context.setitem(MODELS, name, Recipe(smooth))
        context.setattr(datasets, "SYNTH_SIZES", datasets.SYNTH_SIZES)
        context.setattr(train.figures, "training_figures", train.figures.training_figures)
        context.setattr(os, "fsync", os.fsync)
        register()
        yield


@pytest.fixture(scope="module")
def runs(tiny: None, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("ddp")
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run(root / "smooth_alone", "smooth")
        run(root / "mixed_alone", "smooth", *MIXED)
        run(root / "norm_alone", "noisy")
        run(root / "still_alone", "noisy", *STILL)
        with interrupted(2):
            run(root / "smooth_1_to_2", "smooth")
    driver = root / "driver.py"
    driver.write_text(SCENARIOS, encoding="utf-8")
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    start = partial(run_python, cwd=root, timeout=300)
    smoke = ("--smoke", "--model", "resnet20", "--against", "none", "--out-dir", root / "real")
    with ThreadPoolExecutor() as pool:
        first = pool.submit(
            start, *TORCHRUN, driver, root, env={"PYTHONPATH": str(REPO_ROOT), **environment}
        )
        second = pool.submit(start, *TORCHRUN, SCRIPT, *smoke, env=environment)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run(root / "smooth_2_to_1", "smooth", "--resume")
        run(root / "norm_2_to_1", "noisy", "--resume")
    assert "到此为止" in first.result().stdout, first.result().stderr
    return Runs(root, first.result(), second.result())


def assert_same_curve(found: list, expected: list, tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)


# ---------------------------------------------------------------- 数学


@pytest.mark.parametrize("name", ["smooth", "mixed"])
def test_without_batch_norm_two_processes_train_like_one(name: str, runs: Runs) -> None:
    """同样的全局的一批：训练损失、验证损失、验证准确率逐轮相同，测试得分也相同。"""
    found, alone = runs.outcome(name), runs.outcome(f"{name}_alone")
    assert_same_curve(found["history"], alone["history"])
    assert alone["history"][2]["train_loss"] < 0.99 * alone["history"][0]["train_loss"]
    assert found["test_loss"] == pytest.approx(alone["test_loss"], rel=1e-5)
    assert found["confusion"] == alone["confusion"]
    assert sum(map(sum, found["confusion"])) == 35  # 不能平分，一张也不少、不重


def test_with_batch_norm_the_curves_are_close_but_not_equal(runs: Runs) -> None:
    found, alone = runs.history("norm"), runs.history("norm_alone")
    losses = [[row["train_loss"] for row in history] for history in (found, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_statistics_are_those_of_both_halves(runs: Runs) -> None:
    """权重不动时，BatchNorm 的滑动均值与一个进程的相同：两半的均值之平均就是全批的均值。

    若每步都把 0 号的统计量发给大家（DDP 的缺省），或只存 0 号的，就只剩它那一半数据的。
    """
    found, alone = (
        load_checkpoint(runs.root / name / "noisy.pt") for name in ("still", "still_alone")
    )
    torch.testing.assert_close(
        found["1.running_mean"], alone["1.running_mean"], rtol=1e-4, atol=1e-5
    )
    assert found["1.num_batches_tracked"] == alone["1.num_batches_tracked"] == 6
    assert not torch.allclose(found["1.running_var"], alone["1.running_var"], rtol=1e-5)


def test_reported_score_belongs_to_the_saved_weights(runs: Runs) -> None:
    """两个进程评估的是同一个模型：BatchNorm 的统计量若各用各的，这里就对不上。"""
    (reported,) = load_json(runs.root / "norm" / "metrics.json")["runs"].values()
    data = load_data("synth-objects")
    model = build_model("noisy", 10, data.shape, 2)
    model.load_state_dict(load_checkpoint(runs.root / "norm" / "noisy.pt"))
    score = recipe.evaluate(model, data.batches("test"), 10, get_device("cpu"))
    assert score.loss == pytest.approx(reported["test_loss"], rel=1e-5)
    assert score.confusion.tolist() == reported["confusion"]
    best = max(reported["history"], key=lambda row: row["val_accuracy"])
    score = recipe.evaluate(model, data.batches("val"), 10, get_device("cpu"))
    assert score.accuracy == best["val_accuracy"]
    assert score.loss == pytest.approx(best["val_loss"], rel=1e-5)


# ---------------------------------------------------------------- 中断与续训


@pytest.mark.parametrize("name", ["smooth", "norm"])
def test_resumed_on_as_many_processes_is_bit_identical(name: str, runs: Runs) -> None:
    assert runs.outcome(f"{name}_2_to_2") == runs.outcome(name)


def test_resumed_on_another_number_of_processes(runs: Runs) -> None:
    for name in ("smooth_2_to_1", "smooth_1_to_2"):
        found = runs.outcome(name)
        assert_same_curve(found["history"], runs.history("smooth_alone"))
        assert found["confusion"] == runs.outcome("smooth_alone")["confusion"]
    stopped = runs.history("norm")[:1]  # 有 BatchNorm 的也接得上
    assert runs.history("norm_2_to_1")[:1] == stopped and len(runs.history("norm_2_to_1")) == 3


# ---------------------------------------------------------------- 只有 0 号进程打印与存盘


def test_only_rank_zero_speaks(runs: Runs) -> None:
    printed = [(runs.root / f"printed_{rank}").read_text(encoding="utf-8") for rank in (0, 1)]
    progress = [(runs.root / f"progress_{rank}").read_text(encoding="utf-8") for rank in (0, 1)]
    assert printed[1] == "" and progress[1] == ""
    for words in ("2 个进程", "预期  ", "测试  smooth", "用时  ", "结论  ", "合计："):
        assert printed[0].count(words) == 1, words
    assert "smooth: 100%" in progress[0]


def test_the_real_script_under_torchrun(runs: Runs) -> None:
    assert runs.real.returncode == 0, runs.real.stderr
    lines = [line for line in runs.real.stdout.splitlines() if re.match(r"[^ ─]", line)]
    for words in ("设备  ", "预期  ", "测试  resnet20", "用时  ", "结论  ", "合计："):
        assert sum(line.startswith(words) for line in lines) == 1, words
    assert "CPU" in runs.real.stdout and "，2 个进程" in runs.real.stdout
    folder = runs.root / "real"
    metrics = load_json(folder / "metrics.json")
    assert metrics["processes"] == 2 and metrics["threads"] == 1
    assert len(metrics["runs"]["resnet20"]["history"]) == 2
    assert sum(map(sum, metrics["runs"]["resnet20"]["confusion"])) == 256
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    checkpoints = {f"checkpoints/step_0000000{i}.pt" for i in (1, 2)}
    assert names == {"metrics.json", "resnet20.pt", "history.png", "confusion.png", *checkpoints}


def test_a_batch_that_cannot_be_dealt_is_one_line(runs: Runs) -> None:
    done = runs.scenarios
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("错误：")]
    assert lines == ["错误：--batch-size 15 不能由 2 个进程平分：应为 2 的倍数，如 14"]
    assert "UserError" not in done.stderr and not (runs.root / "odd" / "metrics.json").exists()
