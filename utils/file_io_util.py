"""文件读写：原子写入、JSON、检查点、带校验的下载。

所有写入都先写到同一文件夹里的临时文件，落盘（fsync）后再改名；改名是原子的，
因此无论进程何时被杀，目标位置上要么是完整的旧文件，要么是完整的新文件。
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import json
import math
import os
import pickle
import re
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from utils.cli import UserError

REPO_ROOT = Path(__file__).resolve().parents[1]

# ---------------------------------------------------------------- 原子写入


@contextlib.contextmanager
def _explain_os_error(action: str, path: Path) -> Iterator[None]:
    """把操作系统的错误变成一行能看懂的话。"""
    try:
        yield
    except OSError as error:
        raise UserError(f"无法{action} {path}：{error.strerror or error}") from error


def atomic_write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """原子地写文件：``write(stream)`` 写入临时文件，成功后才替换 ``path``。

    异常:
        UserError: 文件夹不可写、磁盘已满等；原有文件保持不变，临时文件被清除。
    """
    path = Path(path)
    with _explain_os_error("写入", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"
        )
        try:
            with os.fdopen(handle, "wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            Path(temporary).chmod(0o644)  # mkstemp 只给了属主权限
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def save_text(path: Path, text: str) -> None:
    """原子地写 UTF-8 文本（换行统一为 ``\\n``）。"""
    atomic_write(path, lambda stream: stream.write(text.encode("utf-8")))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def save_json(path: Path, value: Any) -> None:
    """原子地写 JSON；nan 与 ±inf 不是合法的 JSON，写成 null。

    异常:
        TypeError: 含有不能写成 JSON 的对象（例如张量）；此时不写任何文件。
    """
    save_text(
        path, json.dumps(_finite(value), ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    )


def load_json(path: Path) -> Any:
    """读 JSON。

    异常:
        UserError: 文件缺失、不可读，或内容不是 JSON。
    """
    path = Path(path)
    with _explain_os_error("读取", path):
        raw = path.read_bytes()
    try:
        return json.loads(raw)
    except ValueError as error:
        raise UserError(f"{path} 不是完整的 JSON（{error}）：请删除后重新生成") from error


def prepare_out_dir(path: Path) -> Path:
    """建好输出文件夹并确认可写：宁可在训练之前失败，也不要在训练之后丢失结果。"""
    path = Path(path).expanduser().resolve()
    with _explain_os_error("写入输出文件夹（--out-dir）", path):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".writable-"):
            pass
    return path


# ---------------------------------------------------------------- 检查点

# 损坏的检查点在读取时可能抛出的异常
_DAMAGE = (RuntimeError, EOFError, KeyError, ValueError, OSError, pickle.UnpicklingError)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """原子地保存检查点；``state`` 只应含张量与 python 基本类型，以便安全地读回。"""
    buffer = io.BytesIO()
    torch.save(state, buffer)  # 先序列化到内存：即使这里出错，磁盘也未被碰过
    atomic_write(path, lambda stream: stream.write(buffer.getbuffer()))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """读检查点到 CPU。``weights_only=True``：来历不明的文件也不会执行其中的代码。

    异常:
        UserError: 文件缺失、损坏，或含有不被允许的对象。
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"找不到检查点 {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # 检查点是 zip；torch.load 自己不核对 CRC-32
            for entry in archive.infolist():
                # torch 写的各项不压缩、无属性；目录里的这几个字段损坏时，CRC-32 查不出来
                if (
                    entry.compress_type
                    or entry.external_attr
                    or (entry.compress_size != entry.file_size)
                ):
                    raise RuntimeError(f"{entry.filename} 的目录项已损坏")
            damaged = archive.testzip()
        if damaged is not None:
            raise RuntimeError(f"{damaged} 的 CRC-32 不符")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (*_DAMAGE, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"检查点 {path} 已损坏或不可信（{reason[:80]}）") from error


class CheckpointManager:
    """一次训练的检查点文件夹：文件名带步数，保留最新的两个。

    最新的一个若已损坏，会在标准错误上报告，并退回到前一个。要做到"续训与未中断逐位相同"，
    ``state`` 里除了权重，还要有优化器、学习率调度、数据顺序的生成器与 ``capture_rng()``。
    """

    KEEP = 2

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def _files(self) -> list[tuple[int, Path]]:
        """(步数, 文件)，从旧到新。"""
        if not self.folder.is_dir():
            return []
        found = []
        for path in self.folder.iterdir():
            match = re.fullmatch(r"step_(\d+)\.pt", path.name)
            if match:
                found.append((int(match[1]), path))
        return sorted(found)

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """保存第 ``step`` 步（或轮）之后的状态，并删去更旧的检查点。

        步数更大的检查点来自已经作废的训练（例如都已损坏，只好重新开始），也一并删去。
        """
        path = self.folder / f"step_{step:08d}.pt"
        save_checkpoint(path, state)
        files = self._files()
        kept = [file for at, file in files if at <= step][-self.KEEP :]
        for _, file in files:
            if file not in kept:
                file.unlink(missing_ok=True)
        return path

    def load_latest(self) -> dict[str, Any] | None:
        """最新的完好检查点；一个文件都没有时为 ``None``。

        异常:
            UserError: 有检查点，但全部损坏。
        """
        damaged = []
        for _, path in reversed(self._files()):
            try:
                state = load_checkpoint(path)
            except UserError as error:
                damaged.append(error)
                continue
            for error in damaged:
                print(f"警告：{error}；改用 {path.name}", file=sys.stderr)
            return state
        if damaged:
            raise UserError(f"{damaged[0]}，也没有更早的完好检查点：请去掉 --resume 从头训练")
        return None

    def clear(self) -> None:
        """删除全部检查点与被杀进程留下的临时文件：从头训练之前调用。"""
        for _, path in self._files():
            path.unlink(missing_ok=True)
        if self.folder.is_dir():
            for leftover in self.folder.glob(".step_*.tmp"):
                leftover.unlink(missing_ok=True)


# ---------------------------------------------------------------- 下载

_CHUNK = 2**18  # 每次读 256 KiB
_TIMEOUT = 30  # 秒


def sha256_of(path: Path) -> str:
    """文件的 SHA-256（十六进制小写）。"""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _fetch(url: str, part: Path, size: int) -> None:
    """把 ``url`` 接着 ``part`` 已有的部分下载；服务器不支持断点续传时从头来。"""
    from tqdm import tqdm

    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        resumed = response.status == 206
        have = have if resumed else 0
        rest = response.headers.get("Content-Length")
        if rest is not None and have + int(rest) != size:
            raise UserError(
                f"{url} 有 {have + int(rest)} 字节，应为 {size} 字节：文件已变，或地址不对"
            )
        bar = tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=part.stem, leave=False)
        with bar, part.open("ab" if resumed else "wb") as stream:
            while block := response.read(_CHUNK):
                have += len(block)
                if have > size:
                    raise UserError(f"{url} 比应有的 {size} 字节更长：文件已变，或地址不对")
                stream.write(block)
                bar.update(len(block))


def download(url: str, path: Path, sha256: str, size: int) -> Path:
    """下载文件：进度条、断点续传（``.part`` 文件）、核对大小与 SHA-256 之后才改名。

    ``path`` 已存在且校验无误时不联网。

    参数:
        url: http(s) 地址。
        path: 目标文件。
        sha256: 应有的 SHA-256，十六进制。
        size: 应有的大小，字节。

    返回:
        ``path``。

    异常:
        UserError: 连不上、中途断开（已下载的部分保留，再次运行即续传）、大小或校验值不符。
    """
    path = Path(path)
    if path.is_file() and path.stat().st_size == size and sha256_of(path) == sha256:
        return path
    part = path.with_name(path.name + ".part")
    with _explain_os_error("写入", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if part.is_file() and part.stat().st_size > size:
            part.unlink()
    if not (part.is_file() and part.stat().st_size == size):
        try:
            _fetch(url, part, size)
        except UserError:
            part.unlink(missing_ok=True)
            raise
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            raise UserError(
                f"下载 {url} 失败（{error}）：检查网络后再次运行，会接着下载"
            ) from error
    got = part.stat().st_size
    if got < size:
        raise UserError(f"下载 {url} 中断于 {got}/{size} 字节：再次运行会接着下载")
    if sha256_of(part) != sha256:
        part.unlink()
        raise UserError(f"{url} 的 SHA-256 与预期不符，已删除：请重试，或检查镜像是否可信")
    part.replace(path)
    return path
