"""The laws of the house that import-linter and ruff cannot express, read from the source itself."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType

import pytest

from spark3d.classify_recipe import ClassifyRecipe
from spark3d.config import FinetuneRecipe, PretrainRecipe, load_recipe
from spark3d.protocols import read_protocol

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "spark3d"
SOURCES = sorted(PACKAGE.rglob("*.py"))
OWN = ("spark3d", "configs", "docs", "tests", "benchmarks", "data_prep")
TEXT = (".py", ".md", ".yaml", ".toml", ".json", ".html", ".css")
MOST_LINES = 400

HEAVY = frozenset({"torch", "monai", "timm", "numpy", "scipy", "nibabel", "blosc2", "matplotlib"})
MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MAKERS = frozenset({"list", "dict", "set", "defaultdict", "Counter", "deque", "OrderedDict"})
CHANGERS = frozenset(
    {"append", "extend", "insert", "remove", "pop", "clear", "update", "setdefault", "add"}
)
CONSTANT = re.compile(r"_?[A-Z][A-Z0-9_]*")
AXES = re.compile(r"n?dims?|ndims|spatial_dims|n_axes")
BRANCHES_BY_AXES = MappingProxyType(
    {
        "objectives/hog.py": "gradients point to a circle in 2D and to a sphere in 3D",
        "models/backbones.py": "timm has 2D networks, which a 3D recipe asks to be inflated",
    }
)
OPTIONAL_IMPORTS = MappingProxyType(
    {
        "cli.py": "commands load what they need when they run",
        "cli_evaluation.py": "the same for the commands around scores",
        "cli_weights.py": "the same for the group `weights`",
        "cli_bench.py": "the same for the group `bench`",
    }
)


def short(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def found(law: Callable[[Path, ast.Module], Iterator[str]]) -> list[str]:
    """What breaks a law, over all modules."""
    return [
        f"{short(path)}: {problem}"
        for path in SOURCES
        for problem in law(path, ast.parse(path.read_text(encoding="utf-8")))
    ]


def named(node: ast.AST) -> str:
    """The last part of a name or attribute; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else ""


# ---- the laws ------------------------------------------------------------------------------------


def star_imports(path: Path, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            yield f"line {node.lineno}: from {node.module} import *"


def late_imports(path: Path, tree: ast.Module) -> Iterator[str]:
    if short(path) in OPTIONAL_IMPORTS:
        return
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for node in ast.walk(function):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    yield f"line {node.lineno}: {ast.unparse(node)} inside a function"


def module_state(path: Path, tree: ast.Module) -> Iterator[str]:
    """Mutable values of a module must be constants by name, and nothing may change them."""
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            call = isinstance(node.value, ast.Call) and named(node.value.func) in MAKERS
            if isinstance(node.value, MUTABLE) or call:
                for target in targets:
                    if named(target) != "__all__" and not CONSTANT.fullmatch(named(target)):
                        yield f"line {node.lineno}: {ast.unparse(target)} can change"
    for node in ast.walk(tree):
        if isinstance(node, ast.Global) or changes_constant(node):
            yield f"line {getattr(node, 'lineno', 0)}: {ast.unparse(node)} changes a module's state"


def changes_constant(node: ast.AST) -> bool:
    """`TABLE[key] = ...`, `del TABLE[key]`, `TABLE.append(...)` and the like."""
    if isinstance(node, ast.Subscript):
        written = isinstance(node.ctx, ast.Store | ast.Del)
        return written and bool(CONSTANT.fullmatch(named(node.value)))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr in CHANGERS and bool(CONSTANT.fullmatch(named(node.func.value)))
    return False


def prints(path: Path, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "print"
        ):
            yield f"line {node.lineno}: {ast.unparse(node)}"


def branches_by_axes(path: Path, tree: ast.Module) -> Iterator[str]:
    """One code path for any number of axes: no comparison of it with 1, 2 or 3."""
    inside = short(path).split("/")[0] in ("sparse", "models", "objectives")
    if not inside or short(path) in BRANCHES_BY_AXES:
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        numbers = [s for s in sides if isinstance(s, ast.Constant) and s.value in (1, 2, 3)]
        axes = [s for s in sides if isinstance(s, ast.Name | ast.Attribute)]
        own = [s for s in axes if AXES.fullmatch(named(s)) and not is_of_tensor(s)]
        if numbers and own and any(isinstance(op, ast.Eq | ast.NotEq) for op in node.ops):
            yield f"line {node.lineno}: {ast.unparse(node)}"


def is_of_tensor(node: ast.AST) -> bool:
    """Whether it is the rank of some tensor, such as `weight.ndim`, and not of the space."""
    return isinstance(node, ast.Attribute) and named(node.value) in ("weight", "parameter", "value")


def names_to_objects(path: Path, tree: ast.Module) -> Iterator[str]:
    """No registry: nothing is looked up in a module by a name made at run time."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and named(node.func) in ("getattr", "import_module"):
            argument = node.args[1] if len(node.args) > 1 else node.args[0]
            of_itself = named(node.args[0]) == "self"
            if not isinstance(argument, ast.Constant) and not of_itself:
                yield f"line {node.lineno}: {ast.unparse(node)}"


def unfinished(path: Path, tree: ast.Module) -> Iterator[str]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line):
            yield f"line {number}: {line.strip()}"


LAWS = (
    star_imports,
    late_imports,
    module_state,
    prints,
    branches_by_axes,
    names_to_objects,
    unfinished,
)
BREAKS = MappingProxyType(
    {
        star_imports: "from os import *",
        late_imports: "def f():\n    import os",
        module_state: "seen = {}",
        prints: "print(1)",
        branches_by_axes: "def f(ndim):\n    return ndim == 3",
        names_to_objects: "def f(name):\n    return getattr(json, name)",
        unfinished: "x = 1  # TO" + "DO",
    }
)
MORE_STATE = ("TABLE = {}\ndef f():\n    TABLE['a'] = 1", "A = []\nA.append(1)", "global x")


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Callable[[Path, ast.Module], Iterator[str]]) -> None:
    assert found(law) == []


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_every_law_can_be_broken(
    law: Callable[[Path, ast.Module], Iterator[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    file = tmp_path / "sparse" / "module.py"
    file.parent.mkdir()
    for source in (BREAKS[law], *(MORE_STATE if law is module_state else ())):
        file.write_text(source)
        assert list(law(file, ast.parse(source)))


def test_exceptions_are_still_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = {*BRANCHES_BY_AXES}
    monkeypatch.setitem(globals(), "BRANCHES_BY_AXES", {})
    assert {line.split(":")[0] for line in found(branches_by_axes)} == needed


def test_no_file_is_too_long() -> None:
    folders = ("spark3d", "benchmarks", "data_prep")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    lengths = {str(f.relative_to(ROOT)): len(f.read_text("utf-8").splitlines()) for f in files}
    assert {name: n for name, n in lengths.items() if n > MOST_LINES} == {}


def test_nothing_depends_on_one_machine() -> None:
    own = re.compile(
        "|".join(["/wo" + "rk/", "/ro" + "ot/", "/ho" + r"me/\w", r"\.\./sha" + "red"])
    )
    files = [f for folder in OWN for f in (ROOT / folder).rglob("*") if f.suffix in TEXT]
    files += [ROOT / name for name in ("README.md", "Makefile", "pyproject.toml", "CHANGELOG.md")]
    named = {str(f.relative_to(ROOT)): own.search(f.read_text("utf-8")) for f in files}
    assert {name: match.group() for name, match in named.items() if match} == {}


# ---- what is loaded when -------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from spark3d.cli import app, main\n"
        "names = [c.name or c.callback.__name__ for c in app.registered_commands]\n"
        "for words in [['--help'], ['--version'], *([n, '--help'] for n in names)]:\n"
        "    try:\n"
        "        main(words)\n"
        "    except SystemExit as left:\n"
        "        assert left.code == 0, words\n"
        "print('LOADED', len(names), *sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    count, *loaded = done.stdout.split("LOADED ")[1].split()
    assert int(count) >= 8
    assert not HEAVY & set(loaded)


# ---- recipes -------------------------------------------------------------------------------------

RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))
KINDS = MappingProxyType(
    {"pretrain": PretrainRecipe, "finetune": FinetuneRecipe, "classify": ClassifyRecipe}
)
COMMANDS = MappingProxyType({"classify": "finetune"})
"""What runs recipes of a folder that is not named after its command."""


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_recipe_loads_and_opens_with_its_command_and_what_to_expect(file: Path) -> None:
    if (kind := file.parent.name) == "protocols":
        recipe, command = read_protocol(file.stem).recipe(), f"finetune --protocol {file.stem} "
    else:
        recipe, command = load_recipe(KINDS[kind], file), f"{COMMANDS.get(kind, kind)} {file.stem} "
    assert recipe.optim.warmup < recipe.optim.steps
    head = [line for line in file.read_text("utf-8").splitlines() if line.startswith("#")]
    assert any(command in line for line in head)
    assert any("Expected" in line for line in head)


def test_there_are_recipes_of_all_kinds() -> None:
    assert {file.parent.name for file in RECIPES} == {*KINDS, "protocols"}
