"""The count of what is left: planted leaks are found, and what leaves nothing passes."""

import functools
import gc

import pytest
import torch
from torch import nn

import fisherviz as fv
from benchmarks.trust import endurance


@pytest.fixture(scope="module", autouse=True)
def what_was_imported_is_not_looked_through():
    """Each count runs the collector over everything that is not frozen."""
    gc.collect()
    gc.freeze()


def leaks(kind):
    held, module = [], nn.Linear(2, 2)

    def cycle(i):
        if kind == "tensors":
            held.append(torch.ones(1000))
        elif kind == "hooks":
            module.register_forward_hook(functools.partial(print))
        elif kind == "files":
            held.append(open("/dev/null"))  # noqa: SIM115

    cycle.held = held
    return cycle


@pytest.mark.parametrize("kind", ["tensors", "hooks", "files"])
def test_a_planted_leak_is_found(kind):
    cycle = leaks(kind)
    found = endurance.row(lambda: cycle, 1, 20, 0.0)
    for each in cycle.held:
        if kind == "files":
            each.close()
    assert found["cycles"] == endurance.FEWEST - 1
    assert found["grown"][kind] > 0
    assert any(kind in said for said in endurance.broken({"rows": {"probes": found}}))


def test_memory_that_grows_by_a_line_is_found():
    counts = (5, 4, 3, 2, 1, 1, 0)
    samples = [endurance.Left(100 * 2**20 + i * 2**20, *counts) for i in range(21)]
    found = endurance.judged(samples, range(0, 2001, 100))
    assert found["memory"] == pytest.approx(20 * 2**20)
    assert found["per_cycle"] == pytest.approx(20 * 2**20 / 2000)
    assert found["grown"] == {}
    row = found | {"cycles": 2000, "seconds": 1.0}
    assert "memory grows by 10486 bytes a cycle" in endurance.broken({"rows": {"probes": row}})[0]
    assert endurance.broken({"rows": {"probes": row | {"memory": 2**20}}}) == []
    assert "2,000" in endurance.words({"rows": {"probes": row}})[1]


def test_probe_fisher_and_detach_leave_nothing():
    """Objects of others come and go in a process that runs tests; they are counted in a process of the row alone."""
    grown = endurance.row(endurance.probes, 24, 24, 0.0)["grown"]
    assert set(grown) <= {"objects"}


def test_every_row_names_what_exists():
    for what, make, period in endurance.ROWS.values():
        assert what
        assert period > 0
        assert callable(make)


def test_fits_in_bases_of_their_own_leave_nothing_at_their_fisher():
    """EKFAC's moments belong to its eigenvectors: nobody asks for them again."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    fisher = fv.Probe(model, "categorical").fisher(torch.randn(6, 4))
    fv.approximate(fisher, "ekfac")
    before = len(fisher._kept.statistics), len(fisher.updates)
    for _ in range(3):
        fv.approximate(fisher, "ekfac")
    assert (len(fisher._kept.statistics), len(fisher.updates)) == before
