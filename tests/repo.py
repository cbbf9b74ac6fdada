"""仓库里有什么：文件、章、入口脚本。各个契约测试共用。"""

from __future__ import annotations

import ast
import fnmatch
import functools
import importlib
import re
import subprocess
from pathlib import Path
from types import ModuleType

from utils.file_io_util import REPO_ROOT

GENERATED = {"outputs", "__pycache__", "data", "venv"}  # 没有 git 时，据此略过运行产生的文件


@functools.cache
def repo_files() -> tuple[Path, ...]:
    """属于仓库的文件：已跟踪的，加上未跟踪而未被忽略的；相对于仓库根目录。"""
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=REPO_ROOT,
            capture_output=True,
            check=True,
        ).stdout.decode()
        found = [Path(name) for name in listing.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):  # 下载的 zip 里没有 .git
        found = [
            path.relative_to(REPO_ROOT)
            for path in REPO_ROOT.rglob("*")
            if path.is_file() and not is_generated(path.relative_to(REPO_ROOT))
        ]
    return tuple(sorted(path for path in found if (REPO_ROOT / path).is_file()))


def is_generated(path: Path) -> bool:
    """是否运行产生、或在以点开头的文件夹里。"""
    return bool(set(path.parts) & GENERATED) or any(p.startswith(".") for p in path.parts[:-1])


def python_files(*tops: str) -> list[Path]:
    """以 ``tops`` 之一（可含通配符）为顶层文件夹的全部 .py 文件。"""
    return [
        path
        for path in repo_files()
        if path.suffix == ".py" and any(fnmatch.fnmatch(path.parts[0], top) for top in tops)
    ]


def chapters() -> list[Path]:
    """已有的章，绝对路径。"""
    names = {path.parts[0] for path in repo_files() if re.match(r"chapter_\d\d_", path.parts[0])}
    return [REPO_ROOT / name for name in sorted(names)]


@functools.cache
def parse(path: Path) -> ast.Module:
    """语法树；``path`` 相对于仓库根目录。"""
    return ast.parse((REPO_ROOT / path).read_text("utf-8"), str(path))


def has_main_guard(tree: ast.Module) -> bool:
    """最外层是否有 ``if __name__ == "__main__":``。"""
    return any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        for node in tree.body
    )


def entry_scripts() -> list[Path]:
    """各章里可以直接运行的脚本，相对于仓库根目录。"""
    return [path for path in python_files("chapter_*") if has_main_guard(parse(path))]


def load(path: Path) -> ModuleType:
    """按全名导入；``path`` 相对于仓库根目录。"""
    return importlib.import_module(module_name(path))


def module_name(path: Path) -> str:
    """``a/b.py`` -> ``a.b``；``a/__init__.py`` -> ``a``。"""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")
