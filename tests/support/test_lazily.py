"""Names that are imported when they are first asked for: the same as ever, but for the time that nobody waits."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fisherviz as fv
from fisherviz import training
from fisherviz.approximations.registry import Registry

LAZY = {"fisherviz": fv, "fisherviz.training": training}


def for_type_checkers(package):
    """The names that a package's file imports for type checkers alone."""
    tree = ast.parse(Path(package.__file__).read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    return {alias.asname or alias.name for node in block.body for alias in node.names}


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("name", LAZY)
def test_type_checkers_and_python_see_the_same_names(name):
    package = LAZY[name]
    offered = set(package.__all__) - {"__version__"}
    assert for_type_checkers(package) == offered
    assert offered <= set(dir(package))
    assert all(getattr(package, each) is not None for each in offered)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'fisherviz' has no attribute 'Prob'"):
        _ = fv.Prob


FIRST = ["fisherviz.approximations.kronecker", "fisherviz.approximations", "fisherviz.probe"]
REGISTRY = "; print(type(fv.approximations).__name__, 'kfac' in fv.approximations)"
IMPORTED = {
    **{f"import {first}, fisherviz as fv{REGISTRY}": f"{Registry.__name__} True" for first in FIRST},
    "import fisherviz.training.sweep; from fisherviz.training import sweep; print(callable(sweep))": "True",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="orders of imports are tried after a fork")
def test_names_are_the_same_whichever_module_is_imported_first():
    """One process that has imported what the package takes, and nothing of itself, tries each order in a child."""
    code = f"""
import os, sys, torch, pandas, pydantic, safetensors.torch, scipy.sparse.linalg, yaml
assert "fisherviz" not in sys.modules
for imported in {list(IMPORTED)}:
    if (child := os.fork()) == 0:
        exec(imported)
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""
    assert dict(zip(IMPORTED, run(code).splitlines(), strict=True)) == IMPORTED


def test_importing_the_package_imports_no_torch():
    assert run("import sys, fisherviz, fisherviz.training.config; print('torch' in sys.modules)") == "False"


def test_a_page_is_made_by_whoever_imported_a_part_alone():
    code = "from fisherviz.results.outputs import output; print(callable(output('page')))"
    assert run(code) == "True"
