"""下载：可续传、可校验，出错时说清原因；服务器开在本机，不联网。"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from utils.cli import UserError
from utils.file_io_util import download, save_text, sha256_of


def names(folder: Path) -> list[str]:
    """文件夹里的全部名字，包括没下完的临时文件。"""
    return sorted(path.name for path in folder.iterdir())


CONTENT = bytes(range(256)) * 3000  # 768 000 字节，三块
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """只监听 127.0.0.1 的文件服务器，行为可调。"""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.supports_range = True
        self.cut_after: int | None = None  # 发出这么多字节后断开
        self.ranges: list[str | None] = []  # 收到的每个请求的 Range

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/set.bin"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        start = 0
        if wanted and self.server.supports_range:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        body = self.server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # 对方可能提前挂断
            self.wfile.write(body[: self.server.cut_after])

    def log_message(self, *_: object) -> None:
        """不打印访问日志。"""


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(server: Server, folder: Path) -> Path:
    return download(server.url, folder / "raw" / "set.bin", SHA256, len(CONTENT))


def test_fresh_download_then_no_second_request(server: Server, tmp_path: Path) -> None:
    path = fetch(server, tmp_path)
    assert path.read_bytes() == CONTENT and names(path.parent) == ["set.bin"]
    assert fetch(server, tmp_path) == path
    assert server.ranges == [None]  # 第二次没有联网


def test_existing_file_with_wrong_content_is_replaced(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "raw" / "set.bin"
    save_text(path, "旧的、不完整的")
    fetch(server, tmp_path)
    assert sha256_of(path) == SHA256


def test_partial_download_is_resumed_with_range(server: Server, tmp_path: Path) -> None:
    save_text(tmp_path / "raw" / "set.bin.part", "")
    (tmp_path / "raw" / "set.bin.part").write_bytes(CONTENT[:1000])
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"]


def test_server_without_range_support_starts_over(server: Server, tmp_path: Path) -> None:
    server.supports_range = False
    save_text(tmp_path / "raw" / "set.bin.part", "x" * 1000)
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"]


def test_complete_part_file_needs_no_network(server: Server, tmp_path: Path) -> None:
    save_text(tmp_path / "raw" / "x", "")
    (tmp_path / "raw" / "set.bin.part").write_bytes(CONTENT)
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges == []


def test_part_longer_than_the_file_is_discarded(server: Server, tmp_path: Path) -> None:
    save_text(tmp_path / "raw" / "x", "")
    (tmp_path / "raw" / "set.bin.part").write_bytes(CONTENT + b"more")
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None]


def test_connection_cut_midway_then_resumed(server: Server, tmp_path: Path) -> None:
    server.cut_after = 300_000
    with pytest.raises(UserError, match="中断于 300000/768000 字节：再次运行会接着下载"):
        fetch(server, tmp_path)
    assert names(tmp_path / "raw") == ["set.bin.part"]
    server.cut_after = None
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-"]


def test_wrong_sha_is_deleted_and_explained(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:-1] + b"\0"
    with pytest.raises(UserError, match="SHA-256 与预期不符，已删除"):
        fetch(server, tmp_path)
    assert names(tmp_path / "raw") == []


@pytest.mark.parametrize("content", [CONTENT + b"x", CONTENT[:-1]], ids=["longer", "shorter"])
def test_wrong_size_is_explained_before_downloading(
    server: Server, tmp_path: Path, content: bytes
) -> None:
    server.content = content
    expected = f"有 {len(content)} 字节，应为 768000 字节：文件已变，或地址不对"
    for _ in range(2):  # 再次运行也是同一句话，不会卡在续传上
        with pytest.raises(UserError, match=expected):
            fetch(server, tmp_path)
        assert names(tmp_path / "raw") == []


def test_unreachable_server_is_one_line_and_keeps_the_part(server: Server, tmp_path: Path) -> None:
    save_text(tmp_path / "raw" / "set.bin.part", "已下载的")
    server.shutdown()
    server.server_close()  # 端口不再有人监听
    with pytest.raises(UserError, match="下载 http://127.0.0.1:.* 失败（.*refused.*）：检查网络"):
        fetch(server, tmp_path)
    assert (tmp_path / "raw" / "set.bin.part").read_text("utf-8") == "已下载的"


def test_missing_address_is_one_line(server: Server, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.send_error(404))
    with pytest.raises(UserError, match="失败（HTTP Error 404: Not Found）"):
        fetch(server, tmp_path)
