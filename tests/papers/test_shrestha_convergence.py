"""Shrestha 2023: the rules of figures 2, 3 and 4."""

import math

import pytest

from fisherviz.papers.shrestha import convergence
from fisherviz.papers.shrestha.setting import METHODS, along_rates, lead, race, reaches, width
from fisherviz.papers.trials.problems import Effort, Method, Trained

EFFORT = Effort(steps=30, look=10, seeds=2, trials=0, trial_steps=0)


def trained(*curves, options=None, trials=()):
    """Seeds with a loss each ten steps; None: the run broke off there."""
    runs = []
    for curve in curves:
        lines = [{"step": 10 * k, "train_loss": loss} for k, loss in enumerate(curve) if loss is not None]
        runs.append({"curve": lines, "stopped": "it diverged" if None in curve else None})
    return Trained(Method("m", "sgd"), EFFORT, options or {}, tuple(trials), tuple(runs))


SLOW = trained((1.0, 0.8, 0.6, 0.4), (1.0, 0.9, 0.7, 0.5))
FAST = trained((1.0, 0.5, 0.3, 0.2), (1.0, 0.4, 0.2, 0.1))
NOWHERE = trained((1.0, 0.9, 0.9, 0.9), (1.0, None))


def test_a_method_reaches_a_loss_at_the_first_look_that_is_below_it():
    assert reaches(FAST, 0.3) == [20, 20]
    assert reaches(NOWHERE, 0.5) == [math.inf, math.inf]


def test_the_race_is_to_the_loss_at_which_the_last_seed_of_sgd_ends():
    assert race({"SGD": SLOW, "TENGraD": FAST}, "TENGraD") == ([10, 10], [30, 30])
    assert race({"SGD": trained((1.0, 0.7), (1.0, None)), "TENGraD": FAST}, "TENGraD") == ([10, 10], [10, math.inf])
    assert lead([10, 10], [30, 30]) == 3
    assert lead([0, 0], [0, 0]) == 0
    assert lead([math.inf] * 2, [30, 30]) == 0


def test_widths_are_of_the_trials_at_the_chosen_damping():
    trials = [
        ({"lr": lr, "damping": beta}, loss * beta)
        for beta in (1.0, 10.0)
        for lr, loss in ((1.0, 5.0), (0.1, 1.0), (0.01, 1.9), (0.001, 2.1), (10.0, math.inf))
    ]
    one = trained((1.0,), options={"lr": 0.1, "damping": 1.0}, trials=trials)
    assert along_rates(one) == {0.001: 2.1, 0.01: 1.9, 0.1: 1.0, 1.0: 5.0, 10.0: math.inf}
    assert width(one) == pytest.approx(1.0)


@pytest.mark.parametrize(("natural", "holds"), [(FAST, True), (SLOW, False), (NOWHERE, False)])
def test_faster_and_lower_than_sgd_is_a_matter_of_every_seed(natural, holds):
    found = {"SGD": SLOW, "natural gradient": natural, "TENGraD": natural}
    assert convergence._sooner(found, ()).holds is holds
    assert convergence._ends_lower(found, ()).holds is holds
    assert convergence._decaying(found, ()).holds is holds
    assert convergence._holds_too({"deep": found}, ()).holds is holds


@pytest.mark.parametrize(("exact", "holds"), [(FAST, True), (SLOW, False)])
def test_the_exact_natural_gradient_is_best_if_its_median_is(exact, holds):
    found = dict.fromkeys(METHODS, SLOW) | {"natural gradient": exact}
    assert convergence._exact_is_best(found, "digits", ()).holds is holds


@pytest.mark.parametrize(("narrow", "holds"), [(True, False), (False, True)])
def test_sensitive_is_what_fewer_learning_rates_suit(narrow, holds):
    def walked(losses):
        return trained((1.0,), options={"lr": 1.0}, trials=[({"lr": 10.0**k}, loss) for k, loss in enumerate(losses)])

    few, many = walked((9.0, 1.0, 9.0)), walked((1.0, 1.0, 1.0))
    found = {"SGD": few if narrow else many, "TENGraD": many if narrow else few}
    assert convergence._sensitive(found, ()).holds is holds


@pytest.mark.parametrize(("large", "holds"), [(SLOW, True), (FAST, False)])
def test_performance_degrades_where_larger_networks_end_higher(large, holds):
    small = trained((1.0, 0.3), (1.0, 0.3))
    found = {convergence.SMALL: {"TENGraD": small}, "deep": {"TENGraD": large}}
    assert convergence._degrades(found, "digits", ()).holds is holds


def test_the_four_claims_on_batch_sizes_hold_where_only_large_batches_help():
    small = {"SGD": trained((1.0, 0.6, 0.5, 0.4)), "TENGraD": trained((1.0, 0.7, 0.7, 0.7))}
    large = {"SGD": trained((1.0, 0.6, 0.5, 0.4)), "TENGraD": trained((1.0, 0.3, 0.2, 0.1))}
    claims = convergence._batches({"batch 8": small, "batch 512": large}, "digits", ())
    assert [claim.holds for claim in claims] == [True] * 4
    claims = convergence._batches({"batch 8": large, "batch 512": small}, "digits", ())
    assert [claim.holds for claim in claims] == [False] * 4
    claims = convergence._batches({"batch 8": large, "batch 512": large}, "digits", ())
    assert [claim.holds for claim in claims] == [True, False, False, False]
