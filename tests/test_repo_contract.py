"""仓库的契约：谁可以导入谁、入口脚本长什么样、什么不许做。

每条规则是一个小函数，输入源码（的语法树），输出违规的说明；先用片段证明它抓得住违规，
再用它检查整个仓库。规则的理由见各函数的说明。
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import run_python
from tests.repo import (
    chapters,
    entry_scripts,
    has_main_guard,
    load,
    module_name,
    parse,
    python_files,
)
from utils.file_io_util import REPO_ROOT

# ---------------------------------------------------------------- 导入的方向

PACKAGES = {"torch", "torchvision", "numpy", "matplotlib", "tqdm", "pytest"}
EARLIER = {3: {2}, 5: {3, 4}, 8: {7}, 9: {7}, 10: {7, 8, 9}}  # 理论上承接的章
NOT_CONCEPTS = {"train", "demo", "benchmark", "data", "tasks", "showcase", "demo_figures"} | {
    "experiments",
    "reports",
    "recipes",
    "recipe",
    "scenes",
    "models",
    "fitting",
    "few_shot",
    "sources",
}
ENTRIES = {"train", "demo", "benchmark"}  # 箭头的起点，没有人导入它们


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """每一处导入的 (全名, 行号)；相对导入的名字以点开头。"""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from a import b` 里的 b 可能是子模块
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def chapter_number(name: str) -> int | None:
    found = re.match(r"chapter_(\d\d)_", name)
    return int(found[1]) if found else None


def import_violations(path: Path, tree: ast.AST) -> list[str]:
    """一个文件的导入是否都顺着箭头：入口 -> 数据、图、概念 -> utils；章只往前引用概念。"""
    owner, wrong = path.parts[0], []
    for name, line in imported(tree):
        parts = name.split(".")
        top, module = parts[0], parts[1] if len(parts) > 1 else ""
        here, there = chapter_number(owner), chapter_number(top)
        if top == "":
            reason = "应写包的全名，不用相对导入"
        elif top == "tests":
            reason = "" if owner == "tests" else "只有测试可以导入 tests"
        elif top == "utils" or top in sys.stdlib_module_names or top in PACKAGES:
            reason = ""
        elif top == "PIL":
            reason = "" if here is None else "PIL 只在 utils 与 tests 里用"
        elif there is None:
            reason = "不在允许的第三方库之中，也不是全名（同章的模块要写章名）"
        elif owner == "utils":
            reason = "utils 不认识任何一章"
        elif owner == "tests" or top == owner:
            reason = "没有人导入入口脚本" if module in ENTRIES and owner != "tests" else ""
        elif there not in EARLIER.get(here, set()):
            reason = "不在这一章可以引用的前面各章之中"
        else:
            helper = module in NOT_CONCEPTS or module.startswith(("figures", "topics_", "arms"))
            reason = "只能引用别章的概念模块" if helper else ""
        if reason:
            wrong.append(f"{path}:{line} 导入 {name}：{reason}")
    return wrong


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("utils/x.py", "import chapter_02_mlp.layers", "utils 不认识任何一章"),
        ("utils/x.py", "def f():\n    from chapter_02_mlp import layers", "utils 不认识任何一章"),
        ("chapter_02_a/x.py", "from tests.invariants import y", "只有测试"),
        ("chapter_02_a/x.py", "from . import layers", "相对导入"),
        ("chapter_02_a/x.py", "from .layers import Linear", "相对导入"),
        ("chapter_02_a/train.py", "from layers import Linear", "也不是全名"),
        ("chapter_02_a/x.py", "import pandas", "第三方库"),
        ("chapter_02_a/x.py", "from PIL import Image", "PIL 只在"),
        ("chapter_02_a/x.py", "from chapter_02_a.train import fit", "没有人导入入口脚本"),
        ("chapter_02_a/x.py", "from chapter_02_a import train", "没有人导入入口脚本"),
        ("chapter_02_a/x.py", "from chapter_03_b.adam import Adam", "前面各章"),
        ("chapter_08_a/x.py", "from chapter_06_b.lstm import LSTM", "前面各章"),
        ("chapter_08_a/x.py", "from chapter_07_b.data import make", "概念模块"),
        ("chapter_08_a/x.py", "from chapter_07_b import figures", "概念模块"),
        ("chapter_08_a/x.py", "from chapter_07_b.topics_x import TOPICS", "概念模块"),
    ],
)
def test_import_rule_catches(path: str, source: str, reason: str) -> None:
    (message,) = import_violations(Path(path), ast.parse(source))
    assert reason in message


def test_import_rule_accepts_the_arrows_of_the_design() -> None:
    source = """
        import math, torch
        from torchvision import datasets
        from utils import Timer
        from chapter_08_a.data import make
        from chapter_07_b.attention import attend
    """
    assert (
        import_violations(Path("chapter_08_a/train.py"), ast.parse(textwrap.dedent(source))) == []
    )
    tests = ast.parse("from chapter_02_a.train import fit\nfrom tests.invariants import x")
    assert import_violations(Path("tests/test_x.py"), tests) == []


@pytest.mark.parametrize("path", python_files("utils", "chapter_*", "tests"), ids=str)
def test_imports_follow_the_arrows(path: Path) -> None:
    assert import_violations(path, parse(path)) == []


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """有向图里的一个环；没有则为空。反复删去没有出边的点，剩下的必在环上或通向环。"""
    graph = {node: targets & graph.keys() for node, targets in graph.items()}
    while sinks := {node for node, targets in graph.items() if not targets}:
        graph = {node: t - sinks for node, t in graph.items() if node not in sinks}
    if not graph:
        return []
    walk = [min(graph)]
    while walk[-1] not in walk[:-1]:
        walk.append(min(graph[walk[-1]]))
    return walk[walk.index(walk[-1]) :]


def test_cycle_finder() -> None:
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c", "b"]


def test_no_import_cycles() -> None:
    modules = {module_name(path): path for path in python_files("utils", "chapter_*")}
    graph = {
        name: {
            target
            for full, _ in imported(parse(path))
            for target in (full, full.rpartition(".")[0])
            if target in modules and target != "utils"  # utils/__init__ 只是转出口
        }
        for name, path in modules.items()
    }
    assert find_cycle(graph) == []


def early_imports(tree: ast.Module, package: str) -> list[int]:
    """在导入模块时（而不是在函数里）就导入 ``package`` 的行号。"""
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    outside = [node for node in ast.walk(tree) if id(node) not in inside]
    return [
        line
        for node in outside
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name, line in imported(node)
        if name.split(".")[0] == package
    ]


def test_late_import_rule_tells_module_level_from_function_level() -> None:
    tree = ast.parse("def f():\n    import torchvision\nif x:\n    from torchvision import ops")
    assert early_imports(tree, "torchvision") == [4]


@pytest.mark.parametrize("path", python_files("utils", "chapter_*"), ids=str)
def test_torchvision_is_imported_only_where_it_is_used(path: Path) -> None:
    # 它的二进制可能与 torch 不匹配；内置数据的一切都不应受牵连
    assert early_imports(parse(path), "torchvision") == []


# ---------------------------------------------------------------- 入口脚本

BOOTSTRAP = """\
if not __package__:  # 直接运行脚本时，把仓库根目录加入模块搜索路径
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
"""


def bootstrap_violations(source: str) -> list[str]:
    """有 ``__main__`` 的文件必须有且只有一段逐字相同的引导，在第一个仓库内导入之前；别处不许有。"""
    tree = ast.parse(source)
    if not has_main_guard(tree):
        return ["不是入口，却改动 sys.path"] if "sys.path" in source else []
    if source.count(BOOTSTRAP) != 1 or source.count("sys.path") != 1:
        return ["引导应恰有一段，与约定逐字相同"]
    at = source[: source.index(BOOTSTRAP)].count("\n") + 1
    first = min((n for name, n in imported(tree) if re.match("utils|chapter_", name)), default=at)
    return ["引导应在第一个仓库内的导入之前"] if first < at else []


def test_bootstrap_rule() -> None:
    guard = 'if __name__ == "__main__":\n    run_main(main)\n'
    good = f"import sys\n\n{BOOTSTRAP}\nfrom utils import run_main\n\n{guard}"
    assert bootstrap_violations(good) == []
    assert bootstrap_violations("from utils import Timer\n") == []
    assert bootstrap_violations(good.replace("parents[1]", "parents[2]")) != []
    assert bootstrap_violations(good.replace(BOOTSTRAP, "")) != []
    assert bootstrap_violations(good.replace("import sys\n", "import sys\nimport utils\n")) != []
    assert bootstrap_violations(good.replace(guard, "")) == ["不是入口，却改动 sys.path"]


@pytest.mark.parametrize("path", python_files("utils", "chapter_*"), ids=str)
def test_bootstrap_is_identical_everywhere_and_nowhere_else(path: Path) -> None:
    source = (REPO_ROOT / path).read_text("utf-8")
    if path.parts[0] == "utils":
        assert "sys.path" not in source
    else:
        assert bootstrap_violations(source) == []


def signature_violations(tree: ast.Module) -> list[str]:
    """入口有 ``parse_args(argv=None)`` 与 ``main(argv=None)``，守卫里只有 ``run_main(main)``。"""
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    wrong = []
    for name in ("parse_args", "main"):
        arguments = functions[name].args if name in functions else None
        if (
            arguments is None
            or [a.arg for a in arguments.args] != ["argv"]
            or [ast.unparse(d) for d in arguments.defaults] != ["None"]
        ):
            wrong.append(f"缺少 {name}(argv=None)")
    guards = [n for n in tree.body if isinstance(n, ast.If) and "__main__" in ast.unparse(n.test)]
    if [ast.unparse(statement) for n in guards for statement in n.body] != ["run_main(main)"]:
        wrong.append("守卫里应只有 run_main(main)")
    return wrong


def test_signature_rule() -> None:
    good = (
        "def parse_args(argv: list | None = None): ...\n"
        "def main(argv=None) -> dict: ...\n"
        "if __name__ == '__main__':\n    run_main(main)\n"
    )
    assert signature_violations(ast.parse(good)) == []
    assert signature_violations(ast.parse(good.replace("main(argv=None)", "main()")))
    assert signature_violations(ast.parse(good.replace("parse_args", "get_args")))
    assert signature_violations(ast.parse(good.replace("run_main(main)", "main()")))


@pytest.mark.parametrize("path", entry_scripts(), ids=str)
def test_entry_scripts_have_the_common_shape(path: Path) -> None:
    assert signature_violations(parse(path)) == []
    args = vars(load(path).parse_args([]))
    assert {"seed", "out_dir", "smoke"} <= args.keys()
    assert args["seed"] == 0 and args["smoke"] is False and args.get("device", "auto") == "auto"
    outputs = REPO_ROOT / path.parts[0] / "outputs"
    assert args["out_dir"] == outputs or outputs in args["out_dir"].parents


def called_names(tree: ast.AST) -> set[str]:
    """被调用的名字；``a.b(...)`` 记作 b。"""
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in calls}


def test_called_names() -> None:
    assert called_names(ast.parse("f(x)\na.g(h)\n[i][0](1)")) == {"f", "g", ""}


SERVICES = {"get_device", "set_seed", "Timer", "model_summary", "add_common_args"}
COMMON = {"epochs", "batch_size", "lr", "seed", "device", "data_dir", "out_dir", "smoke"}


@pytest.mark.parametrize("chapter", chapters(), ids=lambda path: path.name)
def test_training_scripts_look_alike(chapter: Path) -> None:
    path = Path(chapter.name) / "train.py"
    assert called_names(parse(path)) >= SERVICES
    module = load(path)
    assert vars(module.parse_args([])).keys() >= COMMON
    for name in ("train_one_epoch", "evaluate"):  # 循环写在明处
        assert inspect.isfunction(getattr(module, name, None)), f"{path} 缺少 {name}"


# ---------------------------------------------------------------- 导入没有副作用

IMPORT_ALL = """
import importlib, random, sys
import numpy, torch
def state():
    return [str(random.getstate()), str(numpy.random.get_state()), torch.get_rng_state().tolist(),
            torch.get_num_threads(), torch.get_default_dtype(), list(sys.path)]
before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
assert state() == before, "导入改变了随机状态、线程数、默认类型或 sys.path"
heavy = {"torchvision", "matplotlib.pyplot"} & sys.modules.keys()
assert not heavy, f"导入时不应带进 {heavy}"
"""


def test_importing_does_nothing_else(tmp_path: Path) -> None:
    modules = [module_name(path) for path in python_files("utils", "chapter_*")]
    done = run_python("-c", IMPORT_ALL, *modules, cwd=tmp_path, env={"PYTHONPATH": str(REPO_ROOT)})
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
    assert list(tmp_path.iterdir()) == []


def test_side_effect_check_catches_each_kind(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "bad.py").write_text("print(1)\nopen('x', 'w')\nimport torch\ntorch.rand(1)\n")
    done = run_python("-c", IMPORT_ALL, "bad", cwd=work, env={"PYTHONPATH": str(tmp_path)})
    assert done.stdout == "1\n" and done.returncode == 1 and "导入改变了随机状态" in done.stderr
    assert [path.name for path in work.iterdir()] == ["x"]


# ---------------------------------------------------------------- 随机性

SAMPLERS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"}
LIKE = {"rand_like", "randn_like", "randint_like"}  # 旧版不接受 generator
IN_PLACE = {"normal_", "uniform_", "bernoulli_", "random_", "exponential_", "log_normal_"}
SEEDERS = {"manual_seed", "seed", "set_rng_state"}


def global_rng_violations(tree: ast.AST) -> list[str]:
    """用到全局随机数生成器的地方：结果会取决于此前谁用过它。

    ``nn.init`` 与 ``nn.Dropout`` 例外：它们是模型的一部分，由入口处的 ``set_seed`` 固定。
    """
    from_torch = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "torch"
        for alias in node.names
    }
    wrong = [f"第 {n} 行：导入 {m}" for m, n in imported(tree) if m.split(".")[0] == "random"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("np.random", "numpy.random"):
            wrong.append(f"第 {node.lineno} 行：numpy.random")
        if not isinstance(node, ast.Call):
            continue
        text = ast.unparse(node.func)
        owner, _, name = text.rpartition(".")
        explicit = any(keyword.arg == "generator" for keyword in node.keywords)
        is_torch = owner == "torch" or (not owner and name in from_torch)
        if (
            (is_torch and name in LIKE | SEEDERS)
            or (is_torch and name in SAMPLERS | {"random_split"} and not explicit)
            or (owner.endswith("utils.data") and name == "random_split" and not explicit)
            or (owner and name in IN_PLACE and not owner.endswith("init") and not explicit)
            or (owner and not is_torch and name in {"bernoulli", "multinomial"} and not explicit)
        ):
            wrong.append(f"第 {node.lineno} 行：{text} 用了全局随机数，请传 generator=")
    return wrong


@pytest.mark.parametrize(
    "line",
    [
        "torch.randn(3)",
        "torch.manual_seed(0)",
        "torch.rand_like(x)",
        "from torch import randperm\nrandperm(4)",
        "x.normal_(0, 1)",
        "probabilities.multinomial(1)",
        "torch.utils.data.random_split(d, [1, 2])",
        "np.random.rand(3)",
        "numpy.random.default_rng(0)",
        "import random",
        "from random import shuffle",
    ],
)
def test_global_rng_rule_catches(line: str) -> None:
    assert len(global_rng_violations(ast.parse(line))) == 1


def test_global_rng_rule_accepts_explicit_generators() -> None:
    source = """
        torch.randn(3, generator=generator)
        x.uniform_(-1, 1, generator=g)
        nn.init.normal_(weight)
        normal(0, 1)
        make_generator(0).manual_seed(1)
    """
    assert global_rng_violations(ast.parse(textwrap.dedent(source))) == []


@pytest.mark.parametrize("path", python_files("chapter_*"), ids=str)
def test_chapters_never_touch_global_generators(path: Path) -> None:
    assert global_rng_violations(parse(path)) == []
