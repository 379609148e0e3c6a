"""Imports walk one way: a room imports only rooms before it in ORDER, and the files inside a room form no circle.

Read from the source by ast, so that an import inside a function counts too, and so do those for annotations alone.
`fisherviz/__init__.py` sees all.
"""

import ast
import graphlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "fisherviz"
LONGEST = 400
"""Lines of a file."""
MOST_ARGUMENTS = 12
"""Arguments of a constructor, `self` aside; more belong into a frozen options object."""

# A new room gets its line here, as high up as what it imports allows.
ORDER = (
    "_version",
    "support",
    "operators",
    "network",
    "capture",
    "statistics",
    "matrices",
    "exact",
    "probe",
    "approximations",
    "results",
    "comparison",
    "plotting",
    "report",
    "optim",
    "datasets",
    "models",
    "training",
    "papers",
    "commands",
    "cli",
    "__main__",
)

# Rooms that see less than what stands above them.
ONLY = {
    "plotting": {"_version", "support", "results"},
    "report": {"_version", "support", "results", "plotting"},
    "datasets": {"_version", "support"},
    "models": {"_version", "support", "operators", "datasets"},
}


class Import(NamedTuple):
    file: str
    line: int
    importer: tuple[str, ...]
    imported: tuple[str, ...]

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


def modules(package: Path) -> dict[tuple[str, ...], Path]:
    """Every file of the package by its dotted parts; a folder's __init__ stands for the folder."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[parts[:-1] if parts[-1] == "__init__" else parts] = path
    return found


@cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


def imports(package: Path) -> Iterator[Import]:
    """Every import of one file of the package by another."""
    known = modules(package)
    for parts, path in known.items():
        if not parts:
            continue
        for node in ast.walk(parsed(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for target in targets(node, package.name, parts, path.stem == "__init__", known):
                    yield Import(str(path.relative_to(package)), node.lineno, parts, target)


def targets(node, name, importer, is_folder, known) -> Iterator[tuple[str, ...]]:
    """The files that one statement imports, by their parts; () is the package itself."""
    if isinstance(node, ast.Import):
        dotted = [alias.name.split(".") for alias in node.names]
    else:
        level = node.level - 1 if is_folder and node.level else node.level
        above = [name, *importer][: len(importer) + 1 - level] if node.level else []
        module = above + (node.module.split(".") if node.module else [])
        dotted = [[*module, alias.name] for alias in node.names]
    for path in dotted:
        if path[0] != name:
            continue
        parts = tuple(path[1:])
        while parts and parts not in known:
            parts = parts[:-1]
        yield parts


def violations(package: Path) -> list[str]:
    """What is wrong with the package's imports, one sentence each."""
    found: list[str] = []
    inside: dict[str, dict[tuple[str, ...], set[tuple[str, ...]]]] = {}
    for item in imports(package):
        row, col = item.importer[0], item.imported[0] if item.imported else ""
        if not col:
            found.append(f"{item.where}: {row!r} imports the whole package; import the module it needs")
        elif unknown := [room for room in (row, col) if room not in ORDER]:
            found.append(f"{item.where}: {unknown[0]!r} is not in ORDER of {Path(__file__).name}; give it a line there")
        elif row == col:
            if item.importer != item.imported:
                inside.setdefault(row, {}).setdefault(item.importer, set()).add(item.imported)
        elif ORDER.index(col) > ORDER.index(row):
            found.append(f"{item.where}: {row!r} imports {col!r}, which stands below it")
        elif col not in ONLY.get(row, {col}):
            found.append(f"{item.where}: {col!r} is not for {row!r}")
    for room, graph in inside.items():
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            circle = " -> ".join(".".join(parts) for parts in error.args[1])
            found.append(f"the files of {room!r} import each other in a circle: {circle}")
    return found


def test_imports_walk_one_way():
    assert violations(PACKAGE) == []


def test_every_room_has_its_place():
    rooms = {parts[0] for parts in modules(PACKAGE) if parts}
    assert sorted(rooms - set(ORDER)) == []


def test_no_file_is_longer_than_its_idea():
    long = {str(p.relative_to(PACKAGE)): len(p.read_text().splitlines()) for p in modules(PACKAGE).values()}
    assert {name: lines for name, lines in long.items() if lines > LONGEST} == {}


def test_no_page_holds_the_halves_of_a_merge():
    root = PACKAGE.parent
    pages = [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("figures/*.md")]
    assert root / "CHANGELOG.md" in pages
    halves = [
        page.name
        for page in pages
        if any(line.startswith(("<<<<<<< ", ">>>>>>> ")) for line in page.open(encoding="utf-8"))
    ]
    assert halves == []


def test_no_constructor_takes_more_than_a_reader_can_hold():
    wide = {}
    for path in modules(PACKAGE).values():
        for node in ast.walk(parsed(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                arguments = [*node.args.posonlyargs, *node.args.args[1:], *node.args.kwonlyargs]
                if len(arguments) > MOST_ARGUMENTS:
                    wide[f"{path.relative_to(PACKAGE)}:{node.lineno}"] = len(arguments)
    assert wide == {}


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("network/layers.py", "import fisherviz.exact.fisher", "network/layers.py:1: 'network' imports 'exact'"),
        ("network/layers.py", "from fisherviz.exact.fisher import Fisher", "'network' imports 'exact'"),
        ("network/layers.py", "from fisherviz import exact", "'network' imports 'exact'"),
        ("network/layers.py", "from .. import exact", "'network' imports 'exact'"),
        ("network/layers.py", "from ..exact.fisher import Fisher", "'network' imports 'exact'"),
        ("operators/__init__.py", "from ..exact.fisher import Fisher", "'operators' imports 'exact'"),
        ("network/layers.py", "def f():\n    from fisherviz import exact", "layers.py:2: 'network' imports 'exact'"),
        ("network/layers.py", "if TYPE_CHECKING:\n    from fisherviz import exact", "'network' imports 'exact'"),
        ("network/layers.py", "import fisherviz as fv", "'network' imports the whole package"),
        ("network/layers.py", "from fisherviz import helpers", "'helpers' is not in ORDER"),
        ("plotting/bars.py", "from fisherviz import network", "'network' is not for 'plotting'"),
        ("network/layers.py", "from fisherviz.network import space", "in a circle"),
    ],
)
def test_an_import_that_points_upwards_is_found(tmp_path, file, source, complaint):
    package = tmp_path / "fisherviz"
    for name in ("exact/__init__.py", "exact/fisher.py", "helpers.py", "network/__init__.py", "operators/__init__.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("")
    (package / "network" / "space.py").write_text("from fisherviz.network.layers import Layer")
    (package / file).parent.mkdir(parents=True, exist_ok=True)
    (package / file).write_text(source)
    found = violations(package)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("exact/fisher.py", "import torch\nfrom fisherviz.network import layers\nfrom .passes import Passes"),
        ("operators/dense.py", "from fisherviz.operators.base import Operator\nfrom .simple import Identity"),
        ("papers/kfac/matrices.py", "from fisherviz import datasets, models"),
    ],
)
def test_imports_that_are_allowed(tmp_path, file, source):
    package = tmp_path / "fisherviz"
    for name in ("network/layers.py", "exact/passes.py", "operators/base.py", "operators/simple.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("")
    for name in ("datasets/__init__.py", "models/__init__.py", file):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(source if name == file else "")
    assert violations(package) == []


MADE = {
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "normal", "ones", "rand",
    "randint", "randn", "randperm", "tensor", "zeros",
}  # fmt: skip
"""What makes a new tensor, where torch's default device says unless it is told."""


def test_every_new_tensor_says_where_it_is():
    """Under `torch.set_default_device` one that does not is beside the model, or its generator on another device."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        if "papers" in path.parts:  # runs of their own, which no setting of a user's reaches
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr not in MADE:
                continue
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch":
                told = {keyword.arg for keyword in node.keywords}
                found += [] if told & {"device", None} else [f"{path.relative_to(PACKAGE)}:{node.lineno}"]
    assert not found
