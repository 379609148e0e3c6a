"""How the rate of progress depends on the batch size: exponents of fabricated runs, and both verdicts of each rule."""

import math

import pytest

from fisherviz.papers.kfac.batch_sizes import BASELINE, DIAGONAL, ERROR, STILL, claims_of, exponents, needed
from fisherviz.papers.trials.problems import Effort, Method, Trained

EFFORT = Effort(steps=100, look=1, seeds=1, trials=0, trial_steps=0)
SIZES = (100, 400)


def decaying(rate):
    """One seed whose error falls by a rate per iteration."""
    curve = [{"step": k, ERROR: 50 * math.exp(-rate * k)} for k in range(101)]
    return Trained(Method("M", "m"), EFFORT, {}, (), ({"curve": curve, "stopped": None},))


def powers(baseline, moving, still):
    """Methods whose rate grows as m to a power."""
    found = {}
    for name, p in ((BASELINE, baseline), (DIAGONAL, moving), (f"{DIAGONAL}{STILL}", still)):
        for m in SIZES:
            found[name, m] = decaying(0.01 * (m / SIZES[0]) ** p)
    return found


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 1.3])
def test_the_exponent_is_that_of_the_rates(p):
    assert exponents(decaying(0.01), decaying(0.01 * 4**p), SIZES) == [pytest.approx(p, abs=0.02)]


def test_iterations_are_read_between_the_looks():
    run = {"curve": [{"step": 5 * i, ERROR: error} for i, error in enumerate((10.0, 4.0, 6.0, 2.0))]}
    assert [needed(run, error) for error in (10.0, 7.0, 4.0, 3.0, 1.0)] == [0.0, 2.5, 5.0, 13.75, math.inf]


@pytest.mark.parametrize(
    ("given", "verdicts"),
    [
        ((0.2, 1.3, 0.9), ("reproduced", "reproduced", "reproduced")),
        ((0.8, 0.9, 0.2), ("not reproduced", "not reproduced", "not reproduced")),
        ((0.2, 1.3, 1.3), ("reproduced", "reproduced", "not reproduced")),
    ],
)
def test_the_exponents_decide(given, verdicts):
    assert tuple(row.verdict for row in claims_of(powers(*given), SIZES, ())) == verdicts
