"""Curves of training comparisons, drawn from numbers that are written down here."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from fisherviz.papers.trials.curves import draw_curves, over_seeds
from fisherviz.papers.trials.problems import Effort, Method, Trained


def run(*losses, stopped=None):
    curve = [{"step": 10 * i, "epoch": i / 2, "train_loss": loss} for i, loss in enumerate(losses)]
    return {"curve": curve, "stopped": stopped}


def drawn(*runs):
    ax = Figure().subplots()
    draw_curves(
        ax, {"SGD": Trained(Method("SGD", "sgd"), Effort(30, 10, 3, 1, 30), {}, (), runs)}, "train_loss", over="step"
    )
    (line,), (band,) = ax.get_lines(), ax.collections
    return line, band.get_paths()[0].vertices


def test_a_seed_that_broke_off_counts_as_the_worst_and_hides_no_other():
    line, band = drawn(run(5.0, 3.0, 2.0, 1.0), run(6.0, 4.0, 3.0, 2.0), run(7.0, stopped="diverged"))
    assert list(line.get_xdata()) == [0, 10, 20, 30]
    assert list(line.get_ydata()) == [6.0, 4.0, 3.0, 2.0]  # medians of three, one infinite
    assert line.get_label() == "SGD (1 of 3 diverged)"
    assert band[:, 1].min() == 1.0
    assert band[:, 1].max() == 7.0
    assert np.isfinite(band).all()


def test_where_most_seeds_broke_off_there_is_no_line_to_draw():
    line, _ = drawn(run(5.0, 3.0), run(6.0, stopped="diverged"), run(7.0, stopped="diverged"))
    assert list(line.get_ydata()) == [6.0, np.inf]


@pytest.mark.parametrize(("key", "worst"), [("train_loss", np.inf), ("test_accuracy", -np.inf)])
def test_seeds_stand_side_by_side_by_their_steps(key, worst):
    curves = [[{"step": 0, "seconds": 1.0, key: 5.0}, {"step": 10, "seconds": 3.0, key: 4.0}],
              [{"step": 0, "seconds": 2.0, key: 6.0}], []]  # fmt: skip
    x, values = over_seeds(curves, "seconds", key)
    assert x.tolist() == [1.5, 3.0]
    assert values.tolist() == [[5.0, 4.0], [6.0, worst], [worst, worst]]
