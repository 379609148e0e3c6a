"""Shrestha 2023: its rules."""

import math

import pytest

from fisherviz.papers.shrestha.table import _order
from fisherviz.papers.trials.problems import Effort, Method, Trained

SGD = Method("SGD", "sgd")
EFFORT = Effort(steps=30, look=10, seeds=1, trials=0, trial_steps=0)


def curve(*values, key="train_squared_error", stopped=None):
    return {"curve": [{"step": 10 * i, key: value} for i, value in enumerate(values)], "stopped": stopped}


@pytest.mark.parametrize(
    ("sgd", "tengrad", "holds"), [(0.3, 0.1, True), (0.1, 0.3, False), (0.3, 0.3, False), (0.3, math.inf, False)]
)
def test_the_verdict_of_a_cell_follows_from_its_seeds(sgd, tengrad, holds):
    def one(loss):
        last = curve(loss, key="train_loss") if loss < math.inf else curve(1.0, stopped="it diverged")
        return Trained(SGD, EFFORT, {}, (), (last,) * 3)

    claim = _order("4", "house", "house price", {"SGD": one(sgd), "TENGraD": one(tengrad)}, ())
    assert claim.verdict == ("reproduced" if holds else "not reproduced")
