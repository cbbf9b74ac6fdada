"""仓库的布局：顶层有什么、每章有什么、文件的名字与大小、依赖、文档字符串。"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.repo import chapters, load, parse, python_files, repo_files
from utils.file_io_util import REPO_ROOT, load_json

CHAPTERS = {
    "chapter_01_tensor_autograd",
    "chapter_02_nn_basics_mlp",
    "chapter_03_optimization_regularization",
    "chapter_04_cnn_classic",
    "chapter_05_resnet_modern_cnn",
    "chapter_06_rnn_lstm_seq",
    "chapter_07_attention_mechanism",
    "chapter_08_transformer_vanilla",
    "chapter_09_efficient_attention",
    "chapter_10_llm_modern_components",
}
REQUIRED = {
    "README.md", "requirements.txt", "LICENSE", "pyproject.toml", ".gitignore", "utils", "tests",
}  # fmt: skip

# ---------------------------------------------------------------- 布局


def top_level_violations(names: set[str]) -> set[str]:
    """缺少的与多余的顶层条目。"""
    return (REQUIRED - names) | (names - REQUIRED - CHAPTERS - {".ci"})


def test_top_level_rule() -> None:
    assert top_level_violations(REQUIRED | CHAPTERS | {".ci"}) == set()
    assert top_level_violations(REQUIRED - {"LICENSE"} | {"setup.py", "chapter_11_x"}) == {
        "LICENSE", "setup.py", "chapter_11_x",
    }  # fmt: skip


def test_top_level_holds_exactly_what_the_design_lists() -> None:
    assert top_level_violations({path.parts[0] for path in repo_files()}) == set()


SKELETON = {"README.md", "__init__.py", "data.py", "train.py", "figures.py", "results.json"}


@pytest.mark.parametrize("chapter", chapters(), ids=lambda path: path.name)
def test_chapter_has_its_skeleton(chapter: Path) -> None:
    present = {path.name for path in repo_files() if path.parent.name == chapter.name}
    assert present >= SKELETON


@pytest.mark.parametrize("chapter", chapters(), ids=lambda path: path.name)
def test_ledger_entries_are_complete(chapter: Path) -> None:
    entries = load_json(chapter / "results.json")["entries"]
    ids = [entry["id"] for entry in entries]
    assert ids and len(set(ids)) == len(ids)
    for entry in entries:
        assert entry["requires"] in (None, "data", "cuda")
        assert entry["results"], f"{entry['id']} 没有实测记录"
        for target in entry["figures"].values():
            assert target.startswith("images/") and (chapter / target).is_file()


# ---------------------------------------------------------------- 文件

# 章里的文件与它同名时，`python train.py` 会先找到章里的那一个
DEPENDENCIES = """
    torch torchvision numpy matplotlib tqdm pytest PIL sympy mpmath networkx jinja2 markupsafe
    fsspec filelock contourpy cycler dateutil kiwisolver packaging pyparsing six pluggy iniconfig
    typing_extensions setuptools triton functorch
"""
SHADOWED = sys.stdlib_module_names | set(DEPENDENCIES.split()) | {"utils", "tests"}


def size_violations(name: str, content: bytes) -> list[str]:
    """文件不能太大：仓库要克隆得快，代码要一屏一屏读得完。"""
    wrong = []
    if len(content) > 500_000:
        wrong.append(f"{name} 有 {len(content)} 字节，至多 500 KB")
    if name.endswith(".png") and len(content) > 200_000:
        wrong.append(f"{name} 有 {len(content)} 字节，图至多 200 KB")
    lines = content.count(b"\n")
    limit = 500 if name.startswith("tests/") else 400
    if name.endswith(".py") and lines > limit:
        wrong.append(f"{name} 有 {lines} 行，至多 {limit}")
    return wrong


def test_size_rule() -> None:
    assert size_violations("a.json", b"x" * 500_000) == []
    assert len(size_violations("a.json", b"x" * 500_001)) == 1
    assert len(size_violations("a.png", b"x" * 200_001)) == 1
    assert len(size_violations("a.py", b"\n" * 401)) == 1
    assert size_violations("tests/a.py", b"\n" * 500) == []
    assert len(size_violations("tests/a.py", b"\n" * 501)) == 1


def test_no_file_is_too_large() -> None:
    wrong = [size_violations(str(path), (REPO_ROOT / path).read_bytes()) for path in repo_files()]
    assert sum(wrong, []) == []


def test_shadow_list_contains_the_usual_traps() -> None:
    assert {"profile", "types", "tokenize", "random", "torch", "utils"} <= SHADOWED
    assert not {"data", "train", "layers", "figures"} & SHADOWED


def test_no_chapter_file_shadows_another_module() -> None:
    assert [path for path in python_files("chapter_*") if path.stem in SHADOWED] == []


def test_text_files_are_utf8_with_unix_line_ends() -> None:
    for path in repo_files():
        if path.suffix in {".py", ".md", ".txt", ".toml", ".json"}:
            content = (REPO_ROOT / path).read_bytes()
            content.decode("utf-8")
            assert b"\r" not in content and content.endswith(b"\n"), path


# ---------------------------------------------------------------- 依赖


def requirement_violations(lines: list[str]) -> list[str]:
    """只写下界：学习者的机器上往往已经装好了较新的版本。"""
    return [line for line in lines if not re.fullmatch(r"[a-z]+>=\d+(\.\d+)*", line)]


def test_requirement_rule() -> None:
    assert requirement_violations(["torch>=2.4", "numpy>=1.26"]) == []
    for line in ("torch", "torch==2.4", "torch>=2.4,<3", "torch~=2.4", "torch>=2.4 # x"):
        assert requirement_violations([line]) == [line]


def test_requirements_are_the_six_packages_with_lower_bounds_only() -> None:
    lines = (REPO_ROOT / "requirements.txt").read_text("utf-8").split()
    assert requirement_violations(lines) == []
    names = [line.split(">=")[0] for line in lines]
    assert sorted(names) == ["matplotlib", "numpy", "pytest", "torch", "torchvision", "tqdm"]


# ---------------------------------------------------------------- 文档字符串

# 名字已经说明一切、由框架或约定规定了含义的
CONVENTIONAL = {"forward", "backward", "extra_repr", "setup_context", "parse_args", "main"}


def undocumented(tree: ast.Module) -> list[str]:
    """没有文档字符串的公开的模块、函数、类与方法。"""
    missing = [] if ast.get_docstring(tree) else ["（模块）"]

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node) and node.name not in CONVENTIONAL:
                missing.append(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{node.name}.")

    visit(tree.body, "")
    return missing


def test_docstring_rule() -> None:
    source = (
        'def f(): ...\ndef _g(): ...\ndef main(): ...\nclass C:\n    """说明。"""\n'
        "    def method(self): ...\n    def __len__(self): ...\n    def forward(self, x): ...\n"
    )
    assert undocumented(ast.parse(source)) == ["（模块）", "f", "C.method"]


def is_inherited(path: Path, name: str) -> bool:
    """``类.方法`` 是否改写了仓库里某个父类已写明的方法：含义在父类里，不必重复。"""
    owner, _, method = name.partition(".")
    parents = getattr(load(path), owner).__mro__[1:] if method else ()
    return any(
        getattr(parent.__dict__.get(method), "__doc__", None)
        for parent in parents
        if parent.__module__.startswith(("chapter_", "utils"))
    )


def test_inherited_documentation_rule() -> None:
    path = Path("utils/datasets.py")  # ImageBatches 改写了 TensorBatches.prepare
    assert is_inherited(path, "ImageBatches.prepare")
    assert not is_inherited(path, "TensorBatches.prepare")
    assert not is_inherited(path, "load_images")


@pytest.mark.parametrize("path", python_files("utils", "chapter_*"), ids=str)
def test_everything_public_is_documented(path: Path) -> None:
    missing = undocumented(parse(path))
    assert [name for name in missing if not is_inherited(path, name)] == []
