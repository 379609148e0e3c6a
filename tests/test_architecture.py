"""Imports point downwards: a module of the package imports only modules that stand before it in ORDER.

Read from the source by ast, so that an import inside a function counts too; imports for annotations alone
(`if TYPE_CHECKING:`) don't, since nothing depends on them at run time. `fisherviz/__init__.py` sees all.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "fisherviz"

# A new module or sub-package gets its line here, as high up as what it imports allows.
ORDER = (
    # ground: nothing of the field
    "_version",
    "glossary",
    "files",
    "memory",
    "progress",
    # data and networks of the papers (see ONLY_FOR)
    "_sources",
    "datasets",
    "fitting",
    "models",
    # from a model to captures
    "likelihoods",
    "kinds",
    "layers",
    "captures",
    "batches",
    "guest",
    "generic",
    "attach",
    "recorder",
    "path_check",
    "probe",
    # from captures to matrices
    "products",
    "statistics",
    "operators",
    "damping",
    "layered",
    "joint",
    "forward_mode",
    "examplespace",
    "solving",
    "posterior",
    "natural",
    "spectra",
    "passes",
    "fisher",
    "approximations",
    "cumulants",
    # from matrices to what people look at
    "exact_inner",
    "measures",
    "reduction",
    "results",
    "dense_comparison",
    "structured_comparison",
    "comparison",
    "runs",
    "plotting",
    "report",
    # from matrices to training
    "optim",
    "monitor",
    "training",
    # what ties it together
    "papers",
    "cli",
    "__main__",
)

# The mathematics knows nothing of particular data and networks: these are for those who run something.
APPLICATIONS = {"report", "training", "papers", "cli"}
ONLY_FOR = {
    "_sources": {"datasets"},
    "datasets": APPLICATIONS | {"models"},
    "fitting": {"models"},
    "models": APPLICATIONS,
}

# Imports inside a function that point upwards, and why they may.
EXCEPTIONS = {
    (
        "probe",
        "fisher",
    ): "Probe.fisher(data) is where users start; the class it returns is built on the probe",
    (
        "results",
        "report",
    ): "Comparison.to_html draws the page, which itself needs nothing but the saved result",
}


class Import(NamedTuple):
    file: str
    line: int
    importer: str
    imported: str
    inside_a_function: bool


def imports(package: Path) -> Iterator[Import]:
    """Every import of one top-level module of the package by another, in all its files."""
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts == ("__init__",):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node, inside in statements(tree, False):
            for module in sorted(targets(node, package.name, parts)):
                if module != parts[0]:
                    yield Import(str(path.relative_to(package)), node.lineno, parts[0], module, inside)


def statements(node: ast.AST, inside: bool) -> Iterator[tuple[ast.AST, bool]]:
    """All imports below a node but those for type checkers, and whether a function surrounds them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, inside
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for statement in child.orelse:
                yield from statements(ast.Module([statement], []), inside)
        else:
            yield from statements(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def targets(node: ast.AST, name: str, importer: tuple[str, ...]) -> set[str]:
    """Top-level modules of the package that one statement imports; "__init__" is the package itself."""
    if isinstance(node, ast.Import):
        dotted = [alias.name.split(".") for alias in node.names]
    else:
        above = [name, *importer][: -node.level] if node.level else []
        module = above + (node.module.split(".") if node.module else [])
        dotted = [[*module, alias.name] for alias in node.names]
    return {([*path, "__init__"])[1] for path in dotted if path[0] == name}


def violations(package: Path) -> list[str]:
    """What is wrong with the package's imports, one sentence each."""
    found, used = [], set()
    for item in imports(package):
        where = f"{item.file}:{item.line}"
        pair = (item.importer, item.imported)
        if item.imported == "__init__":
            found.append(f"{where}: {item.importer!r} imports the whole package; import the module it needs")
        elif unknown := [module for module in pair if module not in ORDER]:
            found.append(f"{where}: {unknown[0]!r} is not in ORDER of {Path(__file__).name}; give it a line there")
        elif pair in EXCEPTIONS:
            used.add(pair)
            if not item.inside_a_function:
                found.append(f"{where}: {item.imported!r} may be imported by {item.importer!r} inside a function only")
        elif ORDER.index(item.imported) > ORDER.index(item.importer):
            found.append(f"{where}: {item.importer!r} imports {item.imported!r}, which stands above it")
        elif item.importer not in ONLY_FOR.get(item.imported, {item.importer}):
            found.append(f"{where}: {item.imported!r} is not for {item.importer!r}")
    present = {path.stem for path in package.iterdir()}
    for pair in set(EXCEPTIONS) - used:
        if set(pair) <= present:
            found.append(f"the exception for {pair[0]!r} importing {pair[1]!r} is not used any more; remove it")
    return found


def test_imports_point_downwards():
    assert violations(PACKAGE) == []


def test_every_module_has_its_place():
    modules = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert sorted(modules - set(ORDER) - {"__init__"}) == []


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        (
            "layers.py",
            "import fisherviz.fisher",
            "layers.py:1: 'layers' imports 'fisher', which stands above it",
        ),
        ("layers.py", "from fisherviz.fisher import Fisher", "'layers' imports 'fisher'"),
        ("layers.py", "from fisherviz import fisher", "'layers' imports 'fisher'"),
        ("layers.py", "from . import fisher", "'layers' imports 'fisher'"),
        ("layers.py", "from .fisher import Fisher", "'layers' imports 'fisher'"),
        (
            "operators/base.py",
            "from ..fisher import Fisher",
            "operators/base.py:1: 'operators' imports 'fisher'",
        ),
        ("operators/__init__.py", "from ..fisher import Fisher", "'operators' imports 'fisher'"),
        ("layers.py", "def f():\n    from fisherviz import fisher", "layers.py:2: 'layers' imports 'fisher'"),
        ("layers.py", "import fisherviz as fv", "'layers' imports the whole package"),
        ("helpers.py", "from fisherviz import layers", "'helpers' is not in ORDER"),
        ("fisher.py", "from fisherviz import datasets", "'datasets' is not for 'fisher'"),
        ("results.py", "from fisherviz.report import render", "inside a function only"),
    ],
)
def test_an_import_that_points_upwards_is_found(tmp_path, file, source, complaint):
    path = tmp_path / "fisherviz" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    found = violations(tmp_path / "fisherviz")
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("fisher.py", "import torch\nfrom fisherviz import layers\nfrom .probe import Probe"),
        ("layers.py", "if TYPE_CHECKING:\n    from fisherviz.fisher import Fisher"),
        ("results.py", "def to_html():\n    from fisherviz.report import render"),
        ("operators/dense.py", "from fisherviz.operators.base import Operator\nfrom .simple import Identity"),
        ("papers/kfac.py", "from fisherviz import datasets, models"),
    ],
)
def test_imports_that_are_allowed(tmp_path, file, source):
    path = tmp_path / "fisherviz" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert violations(tmp_path / "fisherviz") == []
