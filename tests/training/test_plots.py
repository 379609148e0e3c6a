"""Training curves and the monitor's, by their artists."""

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fisherviz import plotting
from fisherviz.results.run import Run


def run(optimizer="kfac", seed=0, losses=(2.0, 1.0, 0.5), options=None, records=()):
    lines = [
        {"kind": "epoch", "step": 10 * i, "epoch": float(i), "examples": 100 * i, "train_loss": loss,
         "validation_accuracy": 1 - loss / 4, "seconds": {"total": 0.5 * i}}
        for i, loss in enumerate(losses)
    ]  # fmt: skip
    config = {"optimizer": optimizer, "optimizer_options": options or {}, "seed": seed, "dataset": "digits"}
    return Run(f"runs/{optimizer}", config, (*lines, *records), {})


def test_seeds_are_one_line_with_a_band():
    curves = plotting.training_info([run(seed=0), run(seed=1, losses=(2.0, 3.0, 1.5)), run("adam")])
    assert [(c.label, c.seeds) for c in curves] == [("kfac", 2), ("adam", 1)]
    np.testing.assert_allclose(curves[0].middle, [2.0, 2.0, 1.0])
    np.testing.assert_allclose(curves[0].low, [2.0, 1.0, 0.5])
    np.testing.assert_allclose(curves[0].high, [2.0, 3.0, 1.5])


def test_options_that_differ_are_in_the_labels():
    runs = [run(options={"lr": lr, "damping": 1.0}) for lr in (0.1, 0.3)]
    assert [c.label for c in plotting.training_info(runs)] == ["kfac (lr=0.1)", "kfac (lr=0.3)"]


@pytest.mark.parametrize(("over", "last"), [("epoch", 2), ("step", 20), ("examples", 200), ("seconds", 1.0)])
def test_curves_run_over_what_is_asked_for(over, last):
    ax = plotting.training([run(), run("adam")], over=over)
    assert [line.get_xdata()[-1] for line in ax.get_lines()] == [last, last]
    assert ax.get_yscale() == "log"
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["kfac", "adam"]


def test_accuracies_are_linear():
    assert plotting.training(run(), "validation_accuracy").get_yscale() == "linear"


def test_a_seed_that_is_still_running_shortens_its_line():
    (curve,) = plotting.training_info([run(seed=0), run(seed=1, losses=(2.0, 1.0))])
    assert len(curve.x) == 2


PLACES = st.lists(st.integers(0, 12), min_size=1, unique=True).map(sorted)


@given(st.lists(PLACES, min_size=1, max_size=4), st.sampled_from(["epoch", "step", "examples", "seconds"]), st.data())
def test_seeds_are_joined_where_all_of_them_were_evaluated(places, over, data):
    """A seed that was stopped midway and continued has an evaluation there that the others have not."""
    runs, seen = [], []
    for seed, steps in enumerate(places):
        values = {step: data.draw(st.one_of(st.none(), st.floats(0.1, 10))) for step in steps}
        lines = [
            {"kind": "epoch", "step": step, "epoch": step / 4, "examples": 10 * step, "seconds": {"total": seed + step},
             **({} if value is None else {"validation_loss": value})}
            for step, value in values.items()
        ]  # fmt: skip
        runs.append(Run(f"runs/{seed}", {"optimizer": "sgd", "seed": seed}, tuple(lines), {}))
        seen.append({step: value for step, value in values.items() if value is not None})
    seen = [one for one in seen if one]
    shared = sorted(set.intersection(*map(set, seen))) if seen else []
    if not shared:
        with pytest.raises(ValueError, match="no run has 'validation_loss' yet"):
            plotting.training_info(runs, "validation_loss", over)
        return
    (curve,) = plotting.training_info(runs, "validation_loss", over)
    values = np.array([[one[step] for step in shared] for one in seen])
    np.testing.assert_allclose(curve.middle, values.mean(0))
    np.testing.assert_allclose([curve.low, curve.high], [values.min(0), values.max(0)])
    if over != "seconds":
        np.testing.assert_allclose(curve.x, np.array(shared) * {"epoch": 0.25, "step": 1, "examples": 10}[over])


def test_what_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"no run has 'los' yet; it has .*train_loss"):
        plotting.training(run(), "los")
    with pytest.raises(ValueError, match="over must be one of epoch"):
        plotting.training(run(), over="day")
    with pytest.raises(ValueError, match="no runs"):
        plotting.training([])
    with pytest.raises(ValueError, match="has not looked yet"):
        plotting.monitor(pd.DataFrame())


def test_the_monitor_is_drawn_over_steps():
    rows = [["kfac", "all", "relative_frobenius", 0.5], ["foof", "all", "relative_frobenius", 0.9],
            ["kfac", "0", "relative_frobenius", 0.1], ["kfac", "all", "foof_cosine_factored", 0.7],
            ["kfac", "all", "foof_cosine_eigenvalues", 0.1], ["optimizer", "all", "lambda", 1.0]]  # fmt: skip
    seen = run(records=[{"kind": "monitor", "step": s, "rows": rows} for s in (0, 10)])
    ax = plotting.monitor(seen)
    assert [list(line.get_xdata()) for line in ax.get_lines()] == [[0, 10], [0, 10]]
    assert [list(line.get_ydata()) for line in ax.get_lines()] == [[0.5, 0.5], [0.9, 0.9]]
    labels = [t.get_text() for t in plotting.monitor(seen, "similarity").get_legend().get_texts()]
    assert labels == ["factored damping", "eigenvalue damping"]
    assert plotting.monitor(seen, "lambda").get_legend() is None
    more = [[f"{method}-reduce", layer, name, value / 2] for method, layer, name, value in rows]
    both = run(records=[{"kind": "monitor", "step": 0, "rows": [*rows, *more]}])
    lines = {label: y.tolist() for label, (_, y) in plotting.monitor_info(both, "similarity")[1].items()}
    assert lines == {
        "kfac, factored damping": [0.7], "kfac, eigenvalue damping": [0.1],
        "kfac-reduce, factored damping": [0.35], "kfac-reduce, eigenvalue damping": [0.05],
    }  # fmt: skip
    with pytest.raises(ValueError, match="no 'loss' of the whole network was recorded; it has foof_cosine"):
        plotting.monitor(seen, "loss")
