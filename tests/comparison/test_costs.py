"""What fitting costs: operations against formulas, the same whatever the circumstances; seconds with their spread."""

import itertools

import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.approximations import exact
from fisherviz.comparison import costs
from fisherviz.comparison.measures import Estimate
from fisherviz.report.tables import facts
from fisherviz.support.timing import Effort
from tests.oracles import nets

N, SIZES = 40, (6, 5, 4, 3)
K = SIZES[-1] - 1  # vectors of a softmax, whose Fisher is singular along one direction
CHAIN = list(itertools.pairwise(SIZES))
FORWARD = N * sum(a * b for a, b in CHAIN)
TO_INPUTS = N * sum(a * b for a, b in CHAIN[1:])
"""Multiply-adds of a backpropagated vector up to the first layer's output."""
UNIT = 2 * FORWARD + TO_INPUTS
"""Of a forward pass, and a backward pass for the weights' gradients."""


def mlp():
    torch.manual_seed(0)
    layers = [module for a, b in CHAIN for module in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nets.MeanPixels(), nn.Linear(4, 3))


def tokens():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 9))


def data(of):
    torch.manual_seed(1)
    if of is tokens:
        return torch.randint(9, (N, 4)), torch.randint(9, (N, 4))
    x = torch.randn(N, 6) if of is mlp else torch.randn(N, 2, 6, 6)
    return x, torch.randint(3, (N,))


def passes(of, methods=None, batches=None, kind="exact", **options):
    x, y = data(of)
    given = (x, y) if batches is None else [(x[i : i + batches], y[i : i + batches]) for i in range(0, N, batches)]
    fisher = fv.Probe(of(), "categorical").fisher(given, kind=kind, generator=torch.Generator().manual_seed(0))
    return fv.compare(fisher, methods, metrics=["passes"], damping=0.1, progress=False, **options).whole("passes")


# ---- the count -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "vectors"), [("exact", K), ("mc", 1), ("empirical", 1)])
def test_passes_are_the_multiply_adds_of_vectors_statistics_and_factors(kind, vectors):
    found = passes(mlp, ["identity", "foof", "kfac", "ekfac"], kind=kind)
    inputs = N * sum((a + 1) ** 2 for a, _ in CHAIN)
    outputs = vectors * N * sum(b**2 for _, b in CHAIN)
    captures = FORWARD + vectors * TO_INPUTS
    assert found["identity"] == 0
    assert found["foof"] == pytest.approx((FORWARD + inputs) / UNIT)
    assert found["kfac"] == pytest.approx((captures + inputs + outputs) / UNIT)
    factors = 4.5 * sum((a + 1) ** 3 + b**3 for a, b in CHAIN)
    turned = N * sum((a + 1) ** 2 + vectors * b**2 + (a + 1) * b for a, b in CHAIN)
    assert found["ekfac"] == pytest.approx((2 * captures + inputs + outputs + factors + turned) / UNIT)


def test_a_fit_from_captures_alone_costs_the_pass_that_makes_them(monkeypatch):
    monkeypatch.setattr(exact, "MOST_DENSE_PARAMETERS", 0)
    found = passes(mlp, {"kept": fv.approximations["layer"](dense_parameters=0)})
    assert found["kept"] == pytest.approx((FORWARD + K * TO_INPUTS) / UNIT)


@pytest.mark.filterwarnings("ignore:.*chain", "ignore:.*single features")
@pytest.mark.parametrize("of", [mlp, *(pytest.param(of, marks=pytest.mark.soak) for of in (convolutions, tokens))])
def test_passes_are_the_same_again_with_two_threads_by_batches_and_in_other_company(of, monkeypatch):
    steady = [name for name in fv.approximations if name != "nearest-kronecker"]  # whose iterations end by a tolerance
    found, threads = passes(of, steady), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert passes(of, steady) == found
    finally:
        torch.set_num_threads(threads)
    assert passes(of, batches=7).items() >= found.items()
    for method in ("kfac", "ekfac", "cw-ngd", "layer"):
        assert passes(of, [method])[method] == found[method]
    monkeypatch.setattr("fisherviz.exact.passes.keep_limit", lambda device: 0)
    memoryless = passes(of, [name for name in steady if name != "layer"])
    assert memoryless.items() <= found.items()


@pytest.mark.filterwarnings("ignore:.*single features")
def test_passes_do_not_depend_on_what_was_asked_before():
    x, y = data(convolutions)
    fisher = fv.Probe(convolutions(), "categorical").fisher([(x[:11], y[:11]), (x[11:], y[11:])])
    fisher.norm()
    fv.approximate(fisher, "kfac")
    found = fv.compare(fisher, ["kfac", "diagonal"], metrics=["passes"], damping=0.1).whole("passes")
    assert found == passes(convolutions, ["kfac", "diagonal"])


def test_methods_that_do_more_cost_more():
    found = passes(mlp)
    assert found["identity"] < found["foof"] < found["kfac"] < found["ekfac"]
    assert found["kfac"] < found["kfac-tridiagonal"] < found["kfac-full"]
    assert found["diagonal"] < found["cw-ngd"] < found["layer"]


class Embedded(nn.Module):
    """Nothing but look-ups."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3)

    def forward(self, x):
        return self.table(x)


def test_a_network_without_products_has_no_passes_and_a_note():
    fisher = fv.Probe(Embedded(), "categorical").fisher(torch.randint(5, (9,)), torch.randint(3, (9,)))
    found = fv.compare(fisher, ["diagonal", "kfac"], metrics=["passes", "bytes"])
    assert found.metrics == ("bytes",)
    assert any(note.startswith("passes are left out") for note in found.notes)


def test_what_was_fitted_before_was_not_counted_and_a_note_says_so():
    x, y = data(mlp)
    fisher = fv.Probe(mlp(), "categorical").fisher(x, y)
    found = fv.compare(fisher, {"mine": fv.approximate(fisher, "kfac"), "new": "kfac"}, damping=0.1)
    assert set(found.whole("passes")) == {"new"}
    assert set(found.whole("seconds")) == {"mine", "new"}
    assert "passes of mine are left out: nobody counted when it was fitted; give its name." in found.notes
    counted_before = fv.compare(fisher, {"mine": fv.approximate(fisher, "kfac")}, metrics=["bytes"])
    assert not [note for note in counted_before.notes if "passes" in note]


def test_a_monitor_counts_what_it_fits():
    monitor = fv.Monitor(fv.Probe(mlp(), "categorical"), ["kfac"], data=data(mlp), damping=0.1, metrics=["passes"])
    rows = monitor.measure(0)
    assert rows[rows["metric"] == "passes"]["value"].item() == passes(mlp, ["kfac"])["kfac"]


# ---- seconds ---------------------------------------------------------------------------------------------------------


def compared(monkeypatch, moment):
    monkeypatch.setattr(costs, "FOR_TIMING", moment)
    fitted, fit_all = [], costs.fit_all
    monkeypatch.setattr(costs, "fit_all", lambda fisher, given: fitted.append(len(given)) or fit_all(fisher, given))
    fisher = fv.Probe(mlp(), "categorical").fisher(*data(mlp))
    found = fv.compare(fisher, ["kfac", "foof"], metrics=["seconds", "bytes"], damping=0.1, progress=False)
    return found, fitted


def test_seconds_are_the_median_with_half_the_range():
    fitted = fv.approximate(fv.Probe(mlp(), "categorical").fisher(*data(mlp)), "kfac")
    fits = costs.Fits({}, [], Effort(0.5, 10), {"kfac": [0.02, 0.01, 0.09, 0.03, 0.05]})
    assert fits.cost("kfac", fitted).seconds == Estimate(0.03, pytest.approx(0.04))
    assert fits.timed == 5
    assert fits.cost("fitted before", fitted).seconds == Estimate(fitted.seconds, 0.0)


def test_short_fits_are_repeated_for_a_spread(monkeypatch):
    found, fitted = compared(monkeypatch, 1e9)
    assert fitted == [2] * (1 + costs.TIMED)  # the first is counted, and warms up
    assert found.meta["fits_timed"] == costs.TIMED == 5
    assert min(found.whole("seconds", "stderr").values()) > 0
    assert ("fits that seconds are taken from", "the median of 5") in facts(found)


def test_long_fits_are_not_repeated_and_have_no_spread(monkeypatch):
    found, fitted = compared(monkeypatch, 0.0)
    assert fitted == [2]
    assert found.meta["fits_timed"] == 1
    assert not any(found.whole("seconds", "stderr").values())
    assert ("fits that seconds are taken from", "1, so no spread") in facts(found)
