"""The rules of the K-FAC paper's training curves."""

import math

import pytest

from fisherviz.papers.kfac.autoencoders import iterations_to, ratios
from fisherviz.papers.trials.problems import Effort, Method, Trained

SGD = Method("SGD", "sgd")
EFFORT = Effort(steps=30, look=10, seeds=1, trials=0, trial_steps=0)


def curve(*values, key="train_squared_error", stopped=None):
    return {"curve": [{"step": 10 * i, key: value} for i, value in enumerate(values)], "stopped": stopped}


@pytest.mark.parametrize(("error", "iterations"), [(6.0, 5.0), (2.0, 10.0), (1.0, 20.0), (0.5, math.inf)])
def test_iterations_to_an_error_are_read_between_the_looks(error, iterations):
    assert iterations_to(curve(10.0, 2.0, 1.0), error) == iterations


def test_how_much_faster_is_measured_at_the_slower_ones_lowest_error():
    slow, fast = (Trained(SGD, EFFORT, {}, (), (curve(*values),)) for values in ((10.0, 8.0, 6.0), (10.0, 2.0, 1.0)))
    assert ratios(slow, fast) == [4.0]
    assert ratios(fast, slow) == [0.0]
