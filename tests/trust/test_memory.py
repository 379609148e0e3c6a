"""The measure of memory: what keeps to a budget passes, what does not is found; requests refuse before it is taken."""

import pytest
import torch

from benchmarks.trust import memory

MIB = 2**20


def test_a_budget_that_is_not_kept_is_found():
    found = memory.under(MIB, lambda: torch.ones(4 * MIB))
    assert 16 * MIB <= found.peak < 17 * MIB
    assert not found.refused
    row = {"network": "deep", "request": "r", "budget": MIB, "least": 0, "held": found.peak, "refused": ""}
    assert not memory.kept(row)
    assert memory.kept(row | {"held": 2 * MIB})
    said = memory.broken({"sweep": [row], "plans": [], "large": {}})
    assert said == ["r of deep holds 16 MiB where 1 MiB may be taken."]


def test_a_refusal_counts_with_what_was_held_before_it():
    def work():
        torch.ones(2 * MIB)
        raise MemoryError("too large")

    found = memory.outcome(work)
    assert found.peak >= 8 * MIB
    assert found.refused == "MemoryError: too large"


def test_a_peak_above_its_plan_and_a_large_case_that_is_neither_answered_nor_refused_are_found():
    plan = {"network": "deep", "request": "norm", "planned": MIB, "held": 4 * MIB}
    died = {"refused": "", "error": "RuntimeError: not enough memory", "grown": 0, "seconds": 0.1}
    said = memory.broken({"sweep": [], "plans": [plan], "large": {"units": died}})
    assert said[0] == "norm of deep holds 4 MiB, planned 1 MiB."
    assert "not enough memory" in said[1]
    assert memory.broken({"sweep": [], "plans": [], "large": {"units": died | {"error": "", "refused": "x"}}}) == []


SMALL = ["unit blocks", "to_dense", "norm", "inverse", "2,000 samples", "fit layer", "kfac block", "kfac samples"]


@pytest.mark.soak
@pytest.mark.parametrize("request_", SMALL)
def test_a_request_keeps_to_a_budget_or_refuses(request_):
    def work():
        return memory.REQUESTS[request_](memory.case("deep").fisher())

    free = memory.under(None, work)
    budget = max(2 * MIB, int(0.3 * free.peak))
    found = memory.under(budget, work)
    assert found.peak <= memory.TOLERANCE * budget + memory.BESIDE
    assert found.refused.startswith("MemoryError") or not found.refused
