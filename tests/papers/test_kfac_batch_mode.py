"""The verdicts on the iterations of K-FAC in batch mode."""

import math

import pytest

from fisherviz.papers.kfac.batch_mode import Descents, judged
from fisherviz.papers.kfac.descent import Recipe

TRIALS = {Recipe("mnist", None, 20, "xavier", 0, start, 0.05, 60): taken for start, taken in ((0.1, 9.0), (1.0, 20.0))}


def descents(*arrivals, length=60):
    """Runs whose error falls from 50 % to 0 % at an iteration."""
    return Descents(TRIALS, tuple((0.5,) * (at - 1) + (0.0,) if at <= length else (0.5,) * length for at in arrivals))


@pytest.mark.parametrize(
    ("glorot", "sparse", "verdict"),
    [
        ((9, 10, 30), (40, 40, 40), "reproduced"),
        ((30, 30, 30), (8, 9, 10), "reproduced"),
        ((11, 11, 5), (40, 40, 40), "not reproduced"),
        ((99, 99, 9), (99, 99, 99), "not reproduced"),
    ],
)
def test_the_median_of_the_faster_initialisation_decides(glorot, sparse, verdict):
    found = {"xavier": descents(*glorot), "sparse": descents(*sparse)}
    claim = judged(found, 0.05, 7, "5 % after 7", 60, ())
    assert claim.verdict == verdict
    assert "λ₀ = 0.1" in claim.measured


def test_runs_that_never_arrive_are_told_with_how_far_they_came():
    lowest = "lowest error 50.00% (50.00% to 50.00%)"
    assert descents(99, 99).words(0.0, 60) == f"none of 2 seeds in 60 iterations ({lowest})"
    assert descents(12, 99).words(0.0, 60) == "12 iterations, 1 of 2 seeds not in 60"
    assert descents(12, 99).taken(0.0) == [12, math.inf]
