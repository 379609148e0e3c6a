"""Whatever a plot is given by mistake, it answers in one sentence that says what it takes."""

import inspect
import re

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.factory import make_comparison

matplotlib.use("Agg")

FUNCTIONS = [name for name in fv.plot.__all__ if inspect.isfunction(getattr(fv.plot, name))]


def fisher():
    return fv.Probe(nn.Linear(3, 2), "categorical").fisher(torch.randn(5, 3))


WRONG = {
    "a Fisher": fisher,
    "a comparison": make_comparison,
    "a word": lambda: "kfac",
    "nothing": lambda: None,
    "a number": lambda: 3.5,
    "an array": lambda: np.ones((2, 3, 4)),
    "an array of words": lambda: np.array([["a", "b"], ["c", "d"]]),
    "complex numbers": lambda: torch.eye(2, dtype=torch.complex64),
    "a ragged list": lambda: [[1.0], [1.0, 2.0]],
    "a list": lambda: [1, "a"],
    "an empty list": list,
    "an empty dictionary": dict,
    "a tensor of wrong shape": lambda: torch.ones(2, 3, 4),
    "an empty tensor": lambda: torch.ones(0, 0),
    "a network": lambda: nn.Linear(2, 2),
    "a class": lambda: fv.Fisher,
    "an object": object,
}
TAKES = {
    "a Fisher": {"heatmap", "block_means", "spectrum"},
    "a comparison": {"heatmap", "block_means", "spectrum", "comparison", "pareto"},
}
"""What is no mistake."""


def is_right(wrong, function):
    return function.removesuffix("_info") in TAKES.get(wrong, ())


CASES = [(f, w) for f in FUNCTIONS for w in WRONG if not is_right(w, f)]


def refused(call):
    """The sentence with which a call is refused."""
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    message = str(caught.value)
    assert caught.traceback[-1].path.parts[-3:-1] != ("site-packages", "numpy"), message
    assert re.fullmatch(r"[^\n]{15,300}[.?]", message), message
    assert "object has no attribute" not in message
    assert "object is not" not in message
    return message


@pytest.mark.parametrize(("function", "wrong"), CASES)
def test_what_cannot_be_drawn_is_refused_in_a_sentence(function, wrong):
    given = WRONG[wrong]()
    beside = ["kfac"] if function.startswith("triptych") and wrong != "a comparison" else []
    if function.startswith("triptych") and wrong == "a comparison":
        beside = ["unknown method"]
    refused(lambda: getattr(fv.plot, function)(given, *beside))


@pytest.mark.parametrize("wrong", [w for w in WRONG if w != "a Fisher"])
def test_a_triptych_refuses_what_does_not_fit_beside_a_fisher(wrong):
    refused(lambda: fv.plot.triptych(fisher(), WRONG[wrong]()))
    if wrong != "a word":
        refused(lambda: fv.plot.triptych(make_comparison(), WRONG[wrong]()))


@pytest.mark.parametrize(
    ("call", "near"),
    [
        (lambda c: fv.plot.comparison(c, "relative_frobenus"), "relative_frobenius"),
        (lambda c: fv.plot.pareto(c, "relative_frobenus"), "relative_frobenius"),
        (lambda c: fv.plot.pareto(c, cost="pases"), "passes"),
        (lambda c: fv.plot.pareto(c, methods=["kfak"]), "kfac"),
        (lambda c: fv.plot.comparison(c, methods=["kfak"]), "kfac"),
        (lambda c: fv.plot.spectrum(c, ["kfak"]), "kfac"),
        (lambda c: fv.plot.heatmap(c, "heatmap/kfak"), "heatmap/kfac"),
        (lambda c: fv.plot.triptych(c, "kfak"), "heatmap/kfac"),
        (lambda c: fv.plot.block_means(c, "kfak"), "block_means/kfac"),
        (lambda c: fv.plot.heatmap(fisher(), order="units"), "unit"),
        (lambda c: fv.plot.heatmap(c, order="inputs"), "input"),
    ],
)
def test_a_name_that_is_nearly_right_is_answered_with_the_right_one(call, near):
    assert refused(lambda: call(make_comparison())).endswith(f"did you mean '{near}'?")


@pytest.mark.parametrize(
    "call",
    [
        lambda c: fv.plot.heatmap(c, like=3),
        lambda c: fv.plot.heatmap(c, like=c, vmax=1.0),
        lambda c: fv.plot.heatmap(fisher(), layers="0"),
        lambda c: fv.plot.heatmap(fisher(), layers=[]),
        lambda c: fv.plot.heatmap(fisher(), layers=["none"]),
        lambda c: fv.plot.heatmap(np.eye(2), order="unit"),
        lambda c: fv.plot.triptych(fisher(), fisher(), inverse=True),
        lambda c: fv.plot.triptych(c, "kfac", inverse=True, damping=0.1),
        lambda c: fv.plot.block_means(fisher(), inverse=True),
        lambda c: fv.plot.block_means(np.eye(4), edges=[0, 4, 2, 4]),
        lambda c: fv.plot.comparison(c, methods="kfac"),
        lambda c: fv.plot.comparison(c, methods=[]),
        lambda c: fv.plot.spectrum(c, floor=-1),
        lambda c: fv.plot.triptych(c, "kfac", ax=None, titles=["one"]),
    ],
)
def test_options_that_do_not_fit_are_refused_in_a_sentence(call):
    refused(lambda: call(make_comparison()))


class Choosy(fv.Approximation):
    """An author's class whose constructor has its own reason to refuse."""

    def __init__(self, rank=1):
        super().__init__()
        if rank < 1:
            raise KeyError("rank")

    def statistics(self, layer):
        return {}

    def operator_for(self, layer, values):
        raise NotImplementedError


def test_what_an_authors_constructor_raises_keeps_its_type_and_place():
    with pytest.raises(KeyError, match="rank") as caught:
        fv.approximate(fisher(), Choosy, rank=0)
    assert caught.traceback[-1].name == "__init__"
    assert "did you mean 'rank'?" in refused(lambda: fv.approximate(fisher(), Choosy, rnk=0))


@pytest.mark.parametrize(
    ("call", "near"),
    [
        (lambda f: f.block("(rot)"), None),
        (lambda f: f.norm("frob"), "fro"),
        (lambda f: f.to_dense("units"), "unit"),
        (lambda f: fv.approximate(f, "kfak"), "kfac"),
        (lambda f: fv.approximate(f, "kfac", setting="reduced"), "reduce"),
        (lambda f: fv.approximate(f, "kfac").norm("spectra"), "spectral"),
        (lambda f: fv.approximate(f, "kfac").to_dense("inputs"), "input"),
        (lambda f: f @ {"weigth": torch.ones(2, 3), "bias": torch.ones(2)}, "weight"),
        (lambda f: fv.models.build("kfac-mpl"), "kfac-mlp"),
        (lambda f: fv.models.build("kfac-mlp", input=3), "inputs"),
        (lambda f: fv.datasets.load("digit"), "digits"),
        (lambda f: fv.compare(f, metrics=["kld"]), "kl"),
        (lambda f: fv.Probe(nn.Linear(2, 2), "categoric"), "categorical"),
        (lambda f: f.plan("spectra"), "spectrum"),
    ],
)
def test_every_registry_and_option_answers_with_the_nearest_name(call, near):
    message = refused(lambda: call(fisher()))
    if near is not None:
        assert message.endswith(f"did you mean '{near}'?")
