"""Benzing 2021: its rules."""

from fisherviz.papers.benzing.training import _ten_times
from fisherviz.papers.trials.problems import Effort, Method, Trained

SGD = Method("SGD", "sgd")
EFFORT = Effort(steps=30, look=10, seeds=1, trials=0, trial_steps=0)


def curve(*values, key="train_squared_error", stopped=None):
    return {"curve": [{"step": 10 * i, key: value} for i, value in enumerate(values)], "stopped": stopped}


def test_ten_times_is_judged_on_each_data_set():
    def one(loss):
        return Trained(SGD, EFFORT, {}, (), (curve(loss, key="train_loss"),))

    far, near = ({"natural gradient": one(value), "K-FAC": one(0.01)} for value in (0.1, 0.02))
    assert _ten_times({"mnist": far, "fashion-mnist": far}, ()).verdict == "reproduced"
    assert _ten_times({"mnist": far, "fashion-mnist": near}, ()).verdict == "not reproduced"
    assert _ten_times({"mnist": far}, ("less data",)).verdict == "different setting"
