"""The manual keeps its word: its code runs page by page, its tables are current, every public name is documented."""

import importlib
import inspect
import re
from pathlib import Path

import matplotlib
import pytest
from matplotlib import pyplot

import fisherviz as fv
from fisherviz.papers.ledger.registry import chosen

DOCS = Path(__file__).parent.parent / "docs"
CELL = re.compile(r"^```\{code-cell\}.*?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TEXTS = [page for page in DOCS.rglob("*.md") if "_build" not in page.parts]
PAGES = {str(page.relative_to(DOCS)): CELL.findall(page.read_text(encoding="utf-8")) for page in TEXTS}
PUBLIC = ("", ".plotting", ".optim", ".operators", ".statistics", ".datasets", ".models", ".training")


def public():
    """Every public class and function, and their public methods, by dotted name."""
    for module in (importlib.import_module("fisherviz" + part) for part in PUBLIC):
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                yield f"{module.__name__}.{name}", thing
            if inspect.isclass(thing):
                for key, member in vars(thing).items():
                    if not key.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                        yield f"{module.__name__}.{name}.{key}", member


@pytest.mark.soak  # building the manual runs it too
@pytest.mark.parametrize("page", [page for page, cells in PAGES.items() if cells])
def test_the_pages_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fv.approximations, "_classes", dict(fv.approximations._classes))
    matplotlib.use("Agg")
    names = {"display": print}
    for number, cell in enumerate(PAGES[page], 1):
        cell = re.sub(r"\A(?::.*\n|---\n.*?^---\n)+", "", cell, flags=re.DOTALL | re.MULTILINE)  # options of the cell
        exec(compile(cell, f"{page}, cell {number}", "exec"), names)
    pyplot.close("all")


def test_every_public_name_is_documented():
    found = dict(public())
    assert len(found) > 100
    assert sorted(name for name, thing in found.items() if not inspect.getdoc(thing)) == []


def test_the_reference_has_a_page_for_every_public_module():
    pages = " ".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    assert [part for part in PUBLIC if f".. automodule:: fisherviz{part}\n" not in pages] == []


def test_the_exhibits_that_the_manual_names_exist():
    named = set().union(*(re.findall(r"--only ([\w.]+)", page.read_text(encoding="utf-8")) for page in TEXTS))
    assert named
    assert all(chosen([name]) for name in named)  # a name that stands for nothing is refused


def test_no_page_names_a_machine():
    texts = {str(page): page.read_text(encoding="utf-8") for page in TEXTS}
    assert [page for page, text in texts.items() if re.search(r"(^|[\s`(])/(home|root|work|tmp|Users)/", text)] == []


def test_the_tables_are_current(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    tables = importlib.import_module("tables")
    texts = {str(page): page.read_text(encoding="utf-8") for page in TEXTS}
    assert [name for name, text in texts.items() if tables.renewed(text) != text] == [], "run python docs/tables.py"
    assert sum(len(tables.MARKED.findall(text)) for text in texts.values()) == len(tables.TABLES)
