"""A comparison's plan against the comparison: same steps, peaks of tensors, operations within what it says."""

import itertools

import pytest
import torch
from torch import nn

import fisherviz as fv
from benchmarks.measure import operations
from fisherviz.support.peaks import peak_bytes


def fisher(width, layers, examples):
    torch.manual_seed(0)
    sizes = [30, *[width] * layers]
    modules = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
    net = nn.Sequential(*modules, nn.Linear(width, 10))
    return fv.Probe(net, "categorical").fisher(torch.randn(examples, 30), torch.randint(10, (examples,)))


METHODS = ["identity", "diagonal", "layer", "cw-ngd", "kfac", "ekfac", "foof", "nearest-kronecker"]


LARGER = [pytest.param(sizes, marks=pytest.mark.soak) for sizes in ((25, 2, 60), (100, 1, 60))]


@pytest.mark.parametrize("sizes", [(10, 2, 30), *LARGER])
def test_its_peak_is_that_of_the_comparison(sizes):
    plan = fv.compare(fisher(*sizes), METHODS, plan=True)
    found = peak_bytes(lambda: fv.compare(fisher(*sizes), METHODS))
    assert plan.bytes == pytest.approx(found, rel=0.25)


@pytest.mark.parametrize("sizes", [(10, 2, 30), *LARGER])
def test_with_all_methods_it_is_an_upper_bound_and_its_count_of_the_right_size(sizes):
    """How many terms `kfac-full` needs, and when iterations end, depends on the data: within a factor of two."""
    plan = fv.compare(fisher(*sizes), plan=True)
    assert peak_bytes(lambda: fv.compare(fisher(*sizes))) < 1.1 * plan.bytes
    found = operations(lambda: fv.compare(fisher(*sizes), progress=False))
    assert 0.5 < 2 * plan.multiply_adds / 1e9 / found < 2


def test_it_names_every_method_and_what_is_dense():
    small, large = (fv.compare(fisher(*sizes), ["kfac", "foof"], plan=True) for sizes in ((25, 2, 20), (100, 2, 20)))
    for plan, how in ((small, "dense in float64"), (large, "products and solves")):
        steps = plan.frame().set_index("what")["how"]
        assert set(steps[[f"{name}: metrics" for name in ("kfac", "foof")]]) == {how}
        assert {"captures", "kfac", "foof", "exact Fisher"} <= set(steps.index)
    named = fv.compare(fisher(100, 2, 20), ["kfac"], metrics=["relative_nuclear"], plan=True)
    assert "dense in float64" in set(named.frame()["how"])


def test_fitted_methods_are_not_fitted_again_and_nothing_is_left_behind():
    of = fisher(25, 2, 20)
    kfac = fv.approximate(of, "kfac")
    matrix = kfac.matrix
    plan = fv.compare(of, {"mine": kfac, "ekfac": "ekfac"}, plan=True)
    assert "mine" not in set(plan.frame()["what"])
    assert "ekfac" in set(plan.frame()["what"])
    assert kfac.matrix is matrix


def test_it_says_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(fv.config, "_memory_budget", 2**20)
    plan = fv.compare(fisher(25, 2, 20), ["kfac"], plan=True)
    assert not plan.fits
    assert "exact Fisher" in plan.verdict


def test_a_method_that_refuses_a_layer_does_not_end_it():
    class Refuses(fv.Approximation):
        def statistics(self, layer):
            raise NotImplementedError("not for this layer")

        def operator_for(self, layer, values):
            raise NotImplementedError

    plan = fv.compare(fisher(25, 2, 20), {"kfac": "kfac", "other": Refuses()}, plan=True)
    steps = plan.frame().set_index("what")["how"]
    assert steps["other"] == "refuses, is left out"
    assert "other: metrics" not in steps.index
    assert "kfac: metrics" in steps.index


def test_a_comparison_that_cannot_fit_is_refused_before_anything_is_made(monkeypatch):
    net = nn.Sequential(nn.Linear(60, 30), nn.Tanh(), nn.Linear(30, 20))
    fisher = fv.Probe(net, "categorical").fisher(torch.randn(50, 60), kind="mc")
    monkeypatch.setattr(fv.config, "_memory_budget", 2**27)  # too little for matrices that are written out
    said = fv.compare(fisher, ["layer"], plan=True)
    monkeypatch.setattr(fv.config, "_memory_budget", int(said.bytes / 2))
    with pytest.raises(
        MemoryError, match=r"the comparison, at its step '.*', takes .* fewer examples or kind='mc', or"
    ):
        fv.compare(fisher, ["layer"], damping=0.1, progress=False)
    monkeypatch.setattr(fv.config, "_memory_budget", int(said.bytes))
    assert len(fv.compare(fisher, ["layer"], damping=0.1, progress=False).frame)
