"""What objects print and show: every number in 80 columns, one line of text, HTML in which names stay text."""

import pickle
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.results.comparison import Comparison
from tests.factory import METHODS, make_comparison

HOSTILE = "<script>alert(1)</script>\n&\"'"


@pytest.mark.parametrize("width", [80, 100, 200])
def test_a_summary_prints_every_number_in_the_width_there_is(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    comparison = make_comparison()
    text = str(comparison.summary())
    assert max(map(len, text.splitlines())) <= width
    assert "..." not in text
    rows = [line for line in text.splitlines() if line.startswith("nearest-kronecker")]
    cells = [cell for line in rows for cell in re.split(r"\s{2,}", line)[1:]]
    assert len(cells) == len(comparison.summary().columns)
    assert cells[0] == "0.580"


def test_a_printed_comparison_shows_its_numbers_in_80_columns():
    text = str(make_comparison())
    assert max(map(len, text.splitlines()[1:])) <= 80
    assert {line.split()[0] for line in text.splitlines()} >= set(METHODS)
    assert "\n" not in repr(make_comparison())


def test_a_comparison_of_few_metrics_prints_what_was_asked_for():
    whole = make_comparison()
    few = Comparison(whole.frame[whole.frame["metric"].isin(["relative_spectral", "kl"])], {"parameters": 1680})
    assert "spectral" in str(few)
    assert "more metric" not in str(few)
    assert "1,680 parameters" in repr(few)
    assert "1 parameter" in repr(Comparison(whole.frame, {"parameters": 1}))
    assert "1 parameters" not in repr(Comparison(whole.frame, {"parameters": 1}))


def test_a_summary_stays_a_data_frame():
    summary = make_comparison().summary()
    assert isinstance(summary, pd.DataFrame)
    assert "12.4" in repr(summary[["kl"]])
    for other in (summary.T, summary.reset_index(), summary.describe(), summary.astype(str), summary.iloc[:0]):
        assert repr(other)
    assert repr(summary.T) == repr(pd.DataFrame(summary).T)


@pytest.mark.parametrize(
    "derived",
    [
        lambda s: s / s.loc["kfac"], lambda s: s.rank(), lambda s: s.isna(), lambda s: s > 0.5, lambda s: s.round(1),
        lambda s: s * 2, lambda s: s - s.min(), lambda s: s.diff(), lambda s: s.astype("float32"),
        lambda s: s.fillna(0.0), lambda s: s.rename(columns={"kl": "bytes", "bytes": "kl"}),
    ],
)  # fmt: skip
def test_other_numbers_than_those_of_the_comparison_have_none_of_their_units(derived):
    table = derived(make_comparison().summary())
    assert repr(table) == repr(pd.DataFrame(table))
    assert table._repr_html_() == pd.DataFrame(table)._repr_html_()


@pytest.mark.parametrize(
    "selected",
    [
        lambda s: s.loc[["kfac", "foof"]], lambda s: s[["bytes", "kl"]], lambda s: s.sort_values("bytes"),
        lambda s: s.head(2), lambda s: s[s["bytes"] > 0], lambda s: s.copy(), lambda s: s.drop(columns="kl"),
        lambda s: s.iloc[::-1], lambda s: s.dropna(axis=1), lambda s: s.filter(like="b"),
        lambda s: pickle.loads(pickle.dumps(s)),
    ],
)  # fmt: skip
def test_a_selection_shows_the_numbers_with_their_units(selected):
    whole = make_comparison().summary()
    names, rows = whole.cells()
    expected = {(row[0], name): cell for row in rows for name, cell in zip(names, row[1:], strict=True)}
    table = selected(whole)
    names, rows = table.cells()
    assert table._is_summary
    for row in rows:
        for name, cell in zip(names, row[1:], strict=True):
            assert cell == expected[row[0], name]
            assert cell in repr(table)


class Cells(HTMLParser):
    """Tags and texts of a page."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


class Hostile(nn.Module):
    """A network whose one layer has a name that is markup."""

    def __init__(self):
        super().__init__()
        self.add_module(HOSTILE, nn.Linear(3, 2))

    def forward(self, x):
        return getattr(self, HOSTILE)(x)


def objects():
    """One of each kind of thing that shows itself, of a network with a hostile name."""
    model = Hostile()
    data = torch.randn(8, 3), torch.randint(2, (8,))
    probe = fv.Probe(model, "categorical")
    fisher = probe.fisher(data)
    kfac = fv.approximate(fisher, "kfac")
    monitor = fv.Monitor(probe, {HOSTILE: "kfac"}, every=1, data=data)
    monitor.step()
    comparison = fv.compare(fisher, {HOSTILE: "kfac"})
    return {
        "probe": probe, "layers": probe.layers, "fisher": fisher, "approximation": kfac, "inverse": kfac.inverse(0.1),
        "exact inverse": fisher.inverse(0.1), "operator": kfac.operator(0, 0), "cumulants": fv.cumulants(fisher),
        "monitor": monitor, "comparison": comparison, "summary": comparison.summary(), "plan": fisher.plan(),
        "optimizer": fv.optim.KFAC(model, "categorical"), "approximations": fv.approximations,
    }  # fmt: skip


@pytest.mark.parametrize("name", objects())
def test_whatever_shows_itself_in_a_notebook_shows_names_as_text(name):
    shown = Cells(objects()[name]._repr_html_())
    assert shown.tags
    assert set(shown.tags) <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "p"}
    assert "".join(shown.texts).strip()


ONE_LINE = ("fisher", "approximation", "inverse", "exact inverse", "operator", "cumulants", "monitor", "comparison",
            "optimizer")  # fmt: skip


@pytest.mark.parametrize("name", ONE_LINE)
def test_what_is_no_table_prints_one_line(name):
    assert "\n" not in repr(objects()[name])


def test_an_optimizer_says_what_it_does():
    model = nn.Linear(3, 2)
    made = fv.optim.NaturalGradient(model, "categorical", "ekfac", lr=0.1, damping=0.25, momentum=0.5, T=3, decay=0.9)
    assert repr(made) == (
        "NaturalGradient(method ekfac, kind mc, decay 0.9, T 3; λ = 0.25, lr 0.1, momentum 0.5; 1 layer, 0 steps taken)"
    )
    groups = [{"params": [model.weight], "lr": 0.5}, {"params": [model.bias], "approximation": "none"}]
    two = fv.optim.NaturalGradient(model, "categorical", "kfac", params=groups, lr=0.1, damping=0.25)
    assert "lr 0.5" in repr(two)
    assert Cells(two._repr_html_()).texts.count("no") == 1


def test_damped_and_inverse_matrices_say_so():
    model = nn.Linear(3, 2)
    kfac = fv.approximate(fv.Probe(model, "categorical").fisher(torch.randn(8, 3)), "kfac")
    assert repr(kfac.damped(0.5)) == "damped kfac, λ = 0.5: 8 x 8 over 1 layer"
    assert repr(kfac.inverse(fv.FactoredTikhonov(0.5))).startswith("damped inverse of kfac, λ = 0.25, factored: 8 x 8")
    assert repr(kfac.damped(None)).startswith("kfac: 8 x 8")


def test_the_package_knows_its_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", fv.__version__)
