"""文件读写：任何时刻出错，旧文件都完好；损坏的检查点被认出，退回前一个。

测试可能以 root 身份运行，权限位拦不住写入，所以"不可写"用普通文件之下的路径模拟，
"磁盘已满"用 fsync 报错与子进程里的文件大小上限模拟。
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import pickle
import re
from pathlib import Path

import pytest
import torch

from tests.conftest import run_python
from utils.cli import UserError
from utils.file_io_util import (
    REPO_ROOT,
    CheckpointManager,
    atomic_write,
    load_checkpoint,
    load_json,
    prepare_out_dir,
    save_checkpoint,
    save_json,
    save_text,
)


def names(folder: Path) -> list[str]:
    """文件夹里的全部名字，包括隐藏的临时文件。"""
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- 原子写入


def test_write_creates_folders_and_readable_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.txt"
    save_text(path, "一\n二\n")
    assert path.read_bytes() == "一\n二\n".encode()
    assert path.stat().st_mode & 0o777 == 0o644


class Interrupted(BaseException):
    """像 KeyboardInterrupt 一样，不是 Exception 的子类。"""


@pytest.mark.parametrize("error", [ValueError("坏数据"), Interrupted()])
def test_failed_write_keeps_old_file_and_leaves_nothing(tmp_path: Path, error) -> None:
    path = tmp_path / "x.txt"
    path.write_text("旧")

    def write(stream: io.BufferedWriter) -> None:
        stream.write(b"half")
        raise error

    with pytest.raises(type(error)):
        atomic_write(path, write)
    assert path.read_text() == "旧" and names(tmp_path) == ["x.txt"]


def test_full_disk_at_fsync_is_one_readable_line(tmp_path: Path, monkeypatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "x.txt"
    path.write_text("旧")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=rf"无法写入 {path}：No space left on device"):
        save_text(path, "新")
    assert path.read_text() == "旧" and names(tmp_path) == ["x.txt"]


def test_writing_past_the_size_limit_keeps_old_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("resource", reason="Windows 没有文件大小上限")
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from utils.cli import run_main\n"
        "from utils.file_io_util import CheckpointManager\n"
        "manager = CheckpointManager(Path(sys.argv[1]))\n"
        "manager.save(1, {'w': torch.zeros(4)})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "run_main(lambda: manager.save(2, {'w': torch.zeros(100_000)}))\n"
    )
    done = run_python("-c", code, tmp_path, cwd=REPO_ROOT)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"错误：无法写入 {tmp_path / 'step_00000002.pt'}：File too large"
    ]
    assert names(tmp_path) == ["step_00000001.pt"]
    assert torch.equal(CheckpointManager(tmp_path).load_latest()["w"], torch.zeros(4))


def test_path_below_a_file_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for attempt in (
        lambda: save_text(tmp_path / "file" / "x.txt", ""),
        lambda: prepare_out_dir(tmp_path / "file" / "out"),
        lambda: prepare_out_dir(tmp_path / "file"),
    ):
        with pytest.raises(UserError, match=r"无法写入.*file"):
            attempt()
    assert names(tmp_path) == ["file"]


def test_target_that_is_a_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(UserError, match="无法写入"):
        save_text(tmp_path / "folder", "x")
    assert names(tmp_path) == ["folder"]


def test_prepare_out_dir_creates_absolute_folder_and_leaves_it_empty(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = prepare_out_dir(Path("a/b"))
    assert out == tmp_path.resolve() / "a" / "b"
    assert names(out) == []


# ---------------------------------------------------------------- JSON


def test_json_round_trip_and_layout(tmp_path: Path) -> None:
    value = {"准确率": 0.5, "列": [1, 2.5, None, True, "中"], "空": {}}
    save_json(tmp_path / "x.json", value)
    assert load_json(tmp_path / "x.json") == value
    text = (tmp_path / "x.json").read_text("utf-8")
    assert text.startswith('{\n  "准确率": 0.5') and text.endswith("}\n")


def test_json_writes_nan_and_infinity_as_null_at_any_depth(tmp_path: Path) -> None:
    save_json(tmp_path / "x.json", {1: math.nan, "b": [math.inf, (1.0, -math.inf)], "c": {"d": 2}})
    text = (tmp_path / "x.json").read_text("utf-8")
    assert json.loads(text) == {"1": None, "b": [None, [1.0, None]], "c": {"d": 2}}


def test_json_refuses_tensors_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Tensor"):
        save_json(tmp_path / "x.json", {"loss": torch.tensor(1.0)})
    assert names(tmp_path) == []


def test_unreadable_json_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="无法读取 .*x.json：No such file"):
        load_json(tmp_path / "x.json")
    for damaged in (b'{"a": 1', b"", b"\xff\xfe"):
        (tmp_path / "x.json").write_bytes(damaged)
        with pytest.raises(UserError, match="x.json 不是完整的 JSON"):
            load_json(tmp_path / "x.json")


# ---------------------------------------------------------------- 检查点


def make_state(value: float = 1.0) -> dict:
    return {"w": torch.full((3, 2), value), "epoch": 4, "history": [0.5, None], "name": "网络"}


def test_checkpoint_round_trip_is_exact(tmp_path: Path) -> None:
    state = make_state() | {"half": torch.randn(5).bfloat16(), "rng": torch.get_rng_state()}
    save_checkpoint(tmp_path / "c.pt", state)
    loaded = load_checkpoint(tmp_path / "c.pt")
    assert loaded.keys() == state.keys()
    for key, value in state.items():
        same = torch.equal(loaded[key], value) if torch.is_tensor(value) else loaded[key] == value
        assert same, key
    assert loaded["half"].dtype == torch.bfloat16


def test_optimizer_resumes_from_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    def build() -> tuple[torch.nn.Linear, torch.optim.Adam]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 2)
        return model, torch.optim.Adam(model.parameters())

    def step(model: torch.nn.Linear, optimizer: torch.optim.Adam) -> None:
        optimizer.zero_grad()
        model(torch.ones(3, 4)).square().sum().backward()
        optimizer.step()

    model, optimizer = build()
    step(model, optimizer)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    save_checkpoint(tmp_path / "c.pt", state)
    step(model, optimizer)
    resumed, resumed_optimizer = build()
    state = load_checkpoint(tmp_path / "c.pt")
    resumed.load_state_dict(state["model"])
    resumed_optimizer.load_state_dict(state["optimizer"])
    step(resumed, resumed_optimizer)
    assert torch.equal(resumed.weight, model.weight) and torch.equal(resumed.bias, model.bias)


def test_newest_two_are_kept(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "c")
    assert manager.load_latest() is None
    for step in (9, 10, 11):
        manager.save(step, make_state(step))
    assert names(tmp_path / "c") == ["step_00000010.pt", "step_00000011.pt"]
    assert manager.load_latest()["w"][0, 0] == 11


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    for step in (99_999_999, 100_000_000):
        manager.save(step, make_state(step))
    assert manager.load_latest()["w"][0, 0] == 100_000_000


def test_restarted_run_is_not_shadowed_by_checkpoints_of_the_abandoned_one(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    for step in (8, 9):
        manager.save(step, make_state(step)).write_bytes(b"")
    with pytest.raises(UserError, match="也没有更早的完好检查点"):
        manager.load_latest()
    manager.save(1, make_state(1))
    assert names(tmp_path) == ["step_00000001.pt"]
    assert manager.load_latest()["w"][0, 0] == 1


def test_clear_removes_checkpoints_and_leftovers_only(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(1, make_state())
    (tmp_path / ".step_00000002.pt.abc.tmp").write_bytes(b"half")
    (tmp_path / "metrics.json").write_text("{}")
    manager.clear()
    assert names(tmp_path) == ["metrics.json"]
    CheckpointManager(tmp_path / "absent").clear()  # 没有文件夹也不出错


def truncate(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def flip_payload_bit(raw: bytes) -> bytes:
    """翻转张量数据里的一个比特：文件结构完好，只有校验和认得出来。"""
    at = raw.index(torch.full((3, 2), 2.0).numpy().tobytes())
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


@pytest.mark.parametrize(
    "damage", [truncate, flip_payload_bit, lambda _: b"", lambda _: b"\0" * 99]
)
def test_damaged_newest_is_reported_and_previous_one_used(tmp_path: Path, capsys, damage) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(1, make_state(1.0))
    newest = manager.save(2, make_state(2.0))
    newest.write_bytes(damage(newest.read_bytes()))
    assert manager.load_latest()["w"][0, 0] == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"警告：检查点 {newest} 已损坏或不可信（")
    assert lines[0].endswith("；改用 step_00000001.pt")


class Malicious:
    """反序列化时会执行 ``Path.touch``。"""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


@pytest.mark.parametrize(
    "serialise",
    [
        lambda value, path: torch.save(value, path),
        lambda value, path: path.write_bytes(pickle.dumps(value)),
    ],
    ids=["zip", "bare-pickle"],
)
def test_malicious_pickle_is_refused_and_not_executed(tmp_path: Path, serialise) -> None:
    target = tmp_path / "executed"
    manager = CheckpointManager(tmp_path)
    manager.save(1, make_state(1.0))
    serialise({"w": Malicious(target)}, tmp_path / "step_00000002.pt")
    assert manager.load_latest()["w"][0, 0] == 1
    assert not target.exists()
    with pytest.raises(UserError, match="已损坏或不可信"):
        load_checkpoint(tmp_path / "step_00000002.pt")
    pickle.loads(pickle.dumps(Malicious(target)))  # 对照：不设防的读法确实会执行它
    assert target.exists()


def test_no_single_flipped_bit_is_ever_loaded_as_something_else(tmp_path: Path) -> None:
    """翻转文件里任意一个比特：要么报告损坏，要么（落在无关紧要处）读出的与原来相同。"""
    path, state = tmp_path / "c.pt", {"w": torch.arange(6.0), "step": 3}
    save_checkpoint(path, state)
    raw = path.read_bytes()
    refused = 0
    places = [(at, at % 8) for at in range(0, len(raw), 7)]
    # zip 的目录没有校验和保护：压缩方式、两个大小、属性这四个字段逐比特地试
    entries = [match.start() for match in re.finditer(b"PK\x01\x02", raw)]
    places += [
        (at + field, bit) for at in entries for field in (10, 20, 24, 38) for bit in range(8)
    ]
    for at, bit in places:
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :])
        try:
            loaded = load_checkpoint(path)
        except UserError:
            refused += 1
        else:
            assert torch.equal(loaded["w"], state["w"]) and loaded["step"] == 3, (at, bit)
    assert refused > len(places) / 4


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="找不到检查点 .*none.pt"):
        load_checkpoint(tmp_path / "none.pt")
