"""第 2 章的坏输入：每种都是标准错误上的一行中文，退出码 2，没有 traceback，不丢也不多任何文件。"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from chapter_02_nn_basics_mlp import demo, mlp, tasks, train
from utils import run_main
from utils.file_io_util import REPO_ROOT, save_checkpoint

SCRIPT = REPO_ROOT / "chapter_02_nn_basics_mlp" / "train.py"
Fails = Callable[..., str]


@pytest.fixture
def out_dir(tmp_path: Path) -> Path:
    """一个已有结果的输出文件夹：坏输入不许碰它。"""
    folder = tmp_path / "out"
    for name in ("metrics.json", "mlp.pt", "checkpoints/mlp_seed0/step_00000012.pt", "我的.txt"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"从前的 {name}", encoding="utf-8")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def only_error(stderr: str) -> str:
    """标准错误上唯一的一行（略去进度条），应是「错误：」开头的中文。"""
    lines = [line for line in re.split(r"[\r\n]", stderr) if line.strip() and "轮/s" not in line]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("错误：") and "Traceback" not in stderr
    return lines[0]


@pytest.fixture
def fails(tmp_path: Path, out_dir: Path, capsys: pytest.CaptureFixture[str]) -> Fails:
    """在本进程里运行一个入口，确认它规规矩矩地失败；返回那一行错误。"""

    def run(*arguments: str | Path, main: Callable = train.main) -> str:
        before = contents(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_main(lambda: main(["--out-dir", str(out_dir), *map(str, arguments)]))
        assert stop.value.code == 2
        assert contents(tmp_path) == before
        return only_error(capsys.readouterr().err)

    return run


# ---------------------------------------------------------------- 命令行


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epochs 0", "参数 --epochs：'0' 不合要求：应为正整数"),
        ("--epochs -1", "参数 --epochs：'-1' 不合要求"),
        ("--epochs x", "参数 --epochs：'x' 不合要求"),
        ("--epochs 1.5", "参数 --epochs：'1.5' 不合要求"),
        ("--lr 0", "参数 --lr：'0' 不合要求：应为正数"),
        ("--lr -0.1", "参数 --lr：'-0.1' 不合要求"),
        ("--lr nan", "参数 --lr：'nan' 不合要求"),
        ("--lr inf", "参数 --lr：'inf' 不合要求"),
        ("--batch-size 0", "参数 --batch-size：'0' 不合要求"),
        ("--seed -1", "参数 --seed：'-1' 不合要求：应为0 到"),
        ("--seed 4294967296", "参数 --seed"),
        ("--seeds 0", "参数 --seeds：'0' 不合要求"),
        ("--hidden a,b", "参数 --hidden：'a,b' 不合要求：应为逗号分隔的正整数"),
        ("--hidden=", "参数 --hidden：'' 不合要求"),
        ("--hidden 8,0", "参数 --hidden：'8,0' 不合要求"),
        ("--task sprial", "参数 --task 没有 'sprial' 这个选项，可选：.*spiral"),
        ("--dataset mnsit", "参数 --dataset 没有 'mnsit' 这个选项，可选：.*mnist"),
        ("--activation rleu", "参数 --activation 没有 'rleu' 这个选项，可选：.*relu"),
        ("--epoch 3", "不认识的参数 --epoch 3，是否想写 --epochs"),
        ("--batchsize=3", "不认识的参数 --batchsize=3，是否想写 --batch-size"),
        ("spiral", "不认识的参数 spiral"),
        ("--lr", "参数 --lr 后面需要一个值"),
        ("--smoke=yes", "参数 --smoke 是开关，不接受值"),
        ("--device gpu", "设备 'gpu' 写法不对：应为 auto、cpu、cuda"),
        ("--device cuda:99", "本机没有设备 'cuda:99'：可用的有 cpu"),
        ("--task regression --csv 没有.csv --column y", "参数 --csv：找不到文件 '没有.csv'"),
        ("--task regression --column y", "--csv 与 --column 要一起给出"),
    ],
)
def test_train_arguments(arguments: str, message: str, fails: Fails) -> None:
    assert re.search(message, fails(*arguments.split()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="这台机器有 CUDA")
def test_missing_cuda(fails: Fails) -> None:
    assert "本机没有设备 'cuda'：可用的有 cpu" in fails("--device", "cuda")


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (mlp.main, "--target sine cosine", "参数 --target 没有 'cosine' 这个选项，可选：.*sine"),
        (mlp.main, "--width 4 0", "参数 --width：'0' 不合要求"),
        (mlp.main, "--width", "参数 --width 后面"),
        (mlp.main, "--noise -1", "参数 --noise：'-1' 不合要求：应为非负数"),
        (mlp.main, "--samples 0", "参数 --samples：'0' 不合要求"),
        (mlp.main, "--surface --extrapolate", "参数 --extrapolate 与 --surface 不能同时使用"),
        (demo.main, "--topic widths", "参数 --topic 没有 'widths' 这个选项，可选：.*width"),
    ],
)
def test_arguments_of_the_other_scripts(
    main: Callable, arguments: str, message: str, fails: Fails
) -> None:
    assert re.search(message, fails(*arguments.split(), main=main))


def test_out_dir_under_a_regular_file(fails: Fails, out_dir: Path) -> None:
    inside_a_file = out_dir / "我的.txt" / "results"
    assert "无法写入输出文件夹（--out-dir）" in fails("--out-dir", inside_a_file)
    assert "无法写入输出文件夹（--out-dir）" in fails("--out-dir", inside_a_file.parent)


# ---------------------------------------------------------------- 表格


def table(path: Path, *extra: str, header: str = "a,b,y", count: int = 30) -> Path:
    lines = [header, *(f"{i},{2 * i},{3 * i}" for i in range(count)), *extra]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"header": "a,b,c"}, "没有 --column 'y' 这一列：有 a、b、c"),
        ({"extra": ["1,many,3"]}, r"第 32 行应为 3 个数：\['1', 'many', '3'\]"),
        ({"extra": ["1,2"]}, "第 32 行应为 3 个数"),
        ({"extra": ["7"]}, "第 32 行应为 3 个数"),
        ({"extra": ["1,nan,3"]}, "里有 nan 或 inf"),
        ({"count": 19}, "只有 19 行数据：至少要 20 行"),
        ({"extra": ["1," + "9" * 200_000 + ",3"]}, "不是 UTF-8 编码的带表头的 CSV"),
    ],
)
def test_csv(options: dict, message: str, fails: Fails, tmp_path: Path) -> None:
    extra = options.pop("extra", [])
    path = table(tmp_path / "t.csv", *extra, **options)
    assert re.search(message, fails("--task", "regression", "--csv", path, "--column", "y"))


def test_csv_with_a_constant_target(fails: Fails, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["a,y", *(f"{i},0.1" for i in range(30))]), encoding="utf-8")
    error = fails("--task", "regression", "--csv", path, "--column", "y")
    assert "'y' 列在训练集里是常数" in error


def test_csv_that_is_not_text(fails: Fails, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    for raw in (b"", b"\xff\xfe\x00a,y\n"):
        path.write_bytes(raw)
        error = fails("--task", "regression", "--csv", path, "--column", "y")
        assert "不是 UTF-8 编码的带表头的 CSV" in error


def test_csv_flags_must_fit_together(fails: Fails, tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv")
    assert "要一起给出" in fails("--task", "regression", "--csv", path)
    assert "--csv 只用于 --task regression" in fails("--csv", path, "--column", "y")
    assert "找不到文件" in fails("--task", "regression", "--csv", tmp_path, "--column", "y")


# ---------------------------------------------------------------- 图像数据


def test_torchvision_that_does_not_load(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    error = fails("--task", "digits", "--dataset", "mnist")
    assert "torchvision 不可用" in error and "pip install" in error


@pytest.mark.usefixtures("needs_torchvision")
def test_missing_mnist(fails: Fails, tmp_path: Path) -> None:
    error = fails("--task", "digits", "--dataset", "mnist", "--data-dir", tmp_path / "没有")
    assert f"数据集 mnist（应在 {tmp_path / '没有' / 'MNIST'}）缺失或不完整" in error
    assert "--download" in error


def truncate(raw: Path) -> None:
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])


def wrong_magic(raw: Path) -> None:
    path = raw / "t10k-labels-idx1-ubyte"
    path.write_bytes(b"\x1f\x8b" + path.read_bytes()[2:])


def labels_of_another_split(raw: Path) -> None:
    labels = (raw / "t10k-labels-idx1-ubyte").read_bytes()
    (raw / "train-labels-idx1-ubyte").write_bytes(labels)


def swap_images_and_labels(raw: Path) -> None:
    images, labels = raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"
    contents = images.read_bytes(), labels.read_bytes()
    images.write_bytes(contents[1])
    labels.write_bytes(contents[0])


def lose_labels(raw: Path) -> None:
    (raw / "train-labels-idx1-ubyte").unlink()


@pytest.mark.usefixtures("needs_torchvision")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "train-images-idx3-ubyte 已损坏：应有 47056 字节，实有 47055"),
        (wrong_magic, "t10k-labels-idx1-ubyte 不是 IDX 文件"),
        (labels_of_another_split, "图像有 60 张而标签有 24 个"),
        (swap_images_and_labels, "数据集 mnist.*缺失或不完整"),
        (lose_labels, "数据集 mnist.*缺失或不完整"),
    ],
)
def test_broken_mnist(
    spoil: Callable[[Path], None], message: str, write_mnist: Callable, fails: Fails, tmp_path: Path
) -> None:
    write_mnist(tmp_path / "data", 60, 24)
    spoil(tmp_path / "data" / "MNIST" / "raw")
    error = fails("--task", "digits", "--dataset", "mnist", "--data-dir", tmp_path / "data")
    assert re.search(message, error)


def no_folder(root: Path, write: Callable) -> None:
    """什么也不建。"""


def empty_folder(root: Path, write: Callable) -> None:
    root.mkdir()


def empty_classes(root: Path, write: Callable) -> None:
    write(root, {"猫": 0, "狗": 0})


def one_corrupt_image(root: Path, write: Callable) -> None:
    write(root, {"猫": 10, "狗": 10})
    (root / "狗" / "003.png").write_bytes(b"not an image")


def too_few_images(root: Path, write: Callable) -> None:
    write(root, {"猫": 2, "狗": 2})


def other_classes_in_test(root: Path, write: Callable) -> None:
    write(root / "train", {"猫": 12, "狗": 12})
    write(root / "test", {"猫": 3, "鸟": 3})


@pytest.mark.usefixtures("needs_torchvision")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (no_folder, "里面没有可用的图片：应为每类一个文件夹"),
        (empty_folder, "里面没有可用的图片"),
        (empty_classes, "里面没有可用的图片"),
        (one_corrupt_image, "图片 .*003.png 无法解码"),
        (too_few_images, "图片太少（4 张）"),
        (other_classes_in_test, "各划分的类别须完全一致"),
    ],
)
def test_broken_folder(
    build: Callable, message: str, write_class_folders: Callable, fails: Fails, tmp_path: Path
) -> None:
    build(tmp_path / "data", write_class_folders)
    error = fails("--task", "digits", "--dataset", "folder", "--data-dir", tmp_path / "data")
    assert re.search(message, error)


# ---------------------------------------------------------------- 续训

SMALL = ["--epochs", "2", "--batch-size", "100", "--hidden", "4", "--seeds", "1", "--device", "cpu"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "POINT_SIZES", {"train": 200, "val": 50, "test": 50})
    monkeypatch.setattr(train, "draw", lambda *_: {})


@pytest.mark.usefixtures("small")
def test_resume_with_other_settings(fails: Fails, out_dir: Path) -> None:
    train.main([*SMALL, "--out-dir", str(out_dir)])
    error = fails(*SMALL, "--resume", "--epochs", "3", "--lr", "0.5")
    assert "（epochs 原为 2 今为 3、lr 原为 0.002 今为 0.5）" in error
    assert error.endswith("改回原设置，或去掉 --resume 重训")


@pytest.mark.usefixtures("small")
def test_resume_from_the_checkpoint_of_another_program(fails: Fails, out_dir: Path) -> None:
    path = out_dir / "checkpoints" / "logistic_seed0" / "step_00000001.pt"
    save_checkpoint(path, {"weight": torch.zeros(2)})
    assert "--resume 的设置与检查点不同" in fails(*SMALL, "--resume")


# ---------------------------------------------------------------- 真实的进程


def test_full_disk(out_dir: Path) -> None:
    """限制单个文件的大小来模拟写满的磁盘：第一个检查点就写不下。"""
    resource = pytest.importorskip("resource")  # Windows 上没有

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    before = contents(out_dir)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *SMALL, "--resume", "--out-dir", str(out_dir)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "PYTHONPATH": ""},
        capture_output=True,
        encoding="utf-8",
        preexec_fn=limit,
        timeout=120,
    )
    assert done.returncode == 2
    error = only_error(done.stderr)
    assert re.search(r"无法写入 .*logistic_seed0/step_00000001.pt：File too large", error)
    assert contents(out_dir) == before  # 临时文件也已清除
