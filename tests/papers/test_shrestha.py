"""Shrestha 2023: the rules of table 1."""

import math

import pytest

from fisherviz.papers.shrestha.setting import WEATHER
from fisherviz.papers.shrestha.table import _better_with_squares, _numbers, _order, _reading
from fisherviz.papers.trials.problems import Effort, Method, Trained

SGD = Method("SGD", "sgd")
EFFORT = Effort(steps=30, look=10, seeds=3, trials=0, trial_steps=0)


def one(*losses):
    runs = tuple(
        {"curve": [{"step": 30, "train_loss": loss}], "stopped": None}
        if loss < math.inf
        else {"curve": [{"step": 0, "train_loss": 1.0}], "stopped": "it diverged"}
        for loss in losses
    )
    return Trained(SGD, EFFORT, {}, (), runs)


def pair(sgd, tengrad):
    return {"SGD": one(*sgd), "TENGraD": one(*tengrad)}


@pytest.mark.parametrize(
    ("sgd", "tengrad", "holds", "by_medians"),
    [
        ((0.3, 0.3, 0.4), (0.1, 0.1, 0.2), True, True),
        ((0.1, 0.1, 0.2), (0.3, 0.3, 0.4), False, False),
        ((0.3, 0.3, 0.3), (0.3, 0.3, 0.3), False, False),
        ((0.3, 0.3, 0.3), (0.1, 0.1, 0.3), False, True),
        ((0.3, 0.3, 0.3), (0.1, math.inf, 0.1), False, True),
        ((0.3, 0.3, 0.3), (math.inf,) * 3, False, False),
    ],
)
def test_the_verdict_of_a_cell_follows_from_its_seeds_and_the_earlier_one_from_medians(sgd, tengrad, holds, by_medians):
    claim = _order("4", "house", "house price", pair(sgd, tengrad), ())
    assert claim.verdict == ("reproduced" if holds else "not reproduced")
    assert claim.earlier_rule == "TENGraD's median is the lower one"
    assert claim.earlier_holds is by_medians


def test_where_the_paper_has_sgd_ahead_the_rule_turns_around():
    claim = _order("4", "ecoli", "ecoli", pair((0.1,) * 3, (0.3,) * 3), ())
    assert claim.holds
    assert claim.rule == "every seed of SGD ends below every seed of TENGraD"


def test_losses_of_a_regression_are_squared_errors():
    claim = _order("4", WEATHER, "weather", pair((0.5,) * 3, (0.5 * math.exp(-2.96),) * 3), ())
    assert claim.values["sgd"] == pytest.approx(0.0)
    assert claim.values["tengrad"] == pytest.approx(-2.96)


def test_numbers_are_close_within_three_tenths_and_count_no_claim_twice():
    paper = {"4": (-0.192, -1.120), "32-16": (-0.794, -0.876), "32-16-16": (-0.16, -1.06)}

    def cells(shift):
        return {
            (key, "house"): pair(*((0.5 * math.exp(value + shift),) * 3 for value in row)) for key, row in paper.items()
        }

    near, far = (_numbers("house", cells(shift), ()) for shift in (0.29, 0.31))
    assert near.holds
    assert near.repeats
    assert not far.holds


@pytest.mark.parametrize("better", [True, False])
def test_the_other_reading_of_the_weather_is_a_repeated_row_over_all_its_networks(better):
    cells = {
        ("4", "weather"): pair((0.3,) * 3, (0.1,) * 3),
        ("32-16", "weather"): pair((0.2,) * 3, (0.1 + better,) * 3),
    }
    claim = _reading("read", cells, ("short",))
    assert claim.repeats
    assert claim.holds is not better
    assert claim.departures == ("short",)


def test_least_squares_are_better_where_a_larger_share_of_them_is_won():
    def cells(regressions, classifications):
        won, lost = pair((0.3,) * 3, (0.1,) * 3), pair((0.1,) * 3, (0.3,) * 3)
        return {("4", "house"): won if regressions else lost, ("4", "ecoli"): won if classifications else lost}

    assert _better_with_squares(cells(True, False), ()).holds
    assert not _better_with_squares(cells(True, True), ()).holds
    assert not _better_with_squares(cells(False, True), ()).earlier_holds
