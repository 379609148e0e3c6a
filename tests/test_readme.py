"""The README keeps its word: its Python runs from top to bottom, its files exist, its numbers are measured."""

import re
from functools import partial
from pathlib import Path

import matplotlib
import pytest
from matplotlib import pyplot

import fisherviz as fv

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)
ROWS = re.findall(r"^\| `([\w-]+)` \|.*\| ([\d.]+) \| ([\d.]+) \|$", TEXT, flags=re.MULTILINE)


@pytest.fixture(scope="module", params=["two metrics", pytest.param("as it stands", marks=pytest.mark.soak)])
def ran(request, tmp_path_factory):
    """Run all blocks in one namespace, in a directory of their own, and return the namespace."""
    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "two metrics":  # all of them take longer than everything else in the README
            patch.setattr(fv, "compare", partial(fv.compare, metrics=["relative_frobenius", "frobenius_cosine"]))
        patch.chdir(tmp_path_factory.mktemp("readme"))
        patch.setattr(fv.approximations, "_classes", dict(fv.approximations._classes))
        matplotlib.use("Agg")
        for number, block in enumerate(BLOCKS, 1):
            exec(compile(block, f"README.md, block {number}", "exec"), names)
    pyplot.close("all")
    return names


@pytest.mark.slow
def test_the_readmes_python_runs(ran):
    assert len(BLOCKS) == 1
    assert ran["fisher"].shape == (1680, 1680)


@pytest.mark.slow
def test_the_readmes_numbers_are_measured(ran):
    exact = ran["fisher"].to_dense()
    assert sorted(name for name, *_ in ROWS) == sorted(fv.approximations)
    for name, error, cosine in ROWS:
        matrix = fv.approximate(ran["fisher"], name).to_dense()
        # trained in float32: another machine's rounding moves the third digit
        assert float(error) == pytest.approx(float((exact - matrix).norm() / exact.norm()), rel=0.02)
        measured = float((exact * matrix).sum() / exact.norm() / matrix.norm())
        assert float(cosine) == pytest.approx(measured, rel=0.02)


def test_the_readmes_links_lead_to_files():
    links = re.findall(r"\]\(((?!https?:)[^)]+)\)", TEXT)
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert (ROOT / "figures/kfac.fig2.png").stat().st_size <= 300_000


def test_no_machine_is_named():
    assert not re.search(r"(^|[\s`(])/(home|root|work|tmp|Users)/", TEXT)
