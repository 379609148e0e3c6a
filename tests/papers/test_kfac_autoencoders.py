"""The rules of the K-FAC paper's training curves, on made-up runs, and what is trained."""

import math

import numpy as np
import pytest
import torch

from fisherviz import datasets
from fisherviz.papers.kfac import autoencoders
from fisherviz.papers.kfac.autoencoder_claims import (
    BASELINE,
    DIAGONAL,
    ITERATIONS,
    PLAIN,
    SECONDS,
    STILL,
    TRIDIAGONAL,
    Compared,
    averaging,
    costlier,
    judged,
    ratios,
    reached,
)
from fisherviz.papers.trials.problems import Effort, Method, Trained
from fisherviz.papers.trials.work import Run

EFFORT = Effort(steps=30, look=10, seeds=1, trials=0, trial_steps=0)
MEAN_IMAGE = 10.0


def curve(*values, every=10, cost=1.0, average=1.0):
    """A run with errors at steps of the same distance; its average has `average` times the iterate's error."""
    lines = [
        {
            "step": every * i, "seconds": cost * every * i, "train_squared_error": value,
            "iterate_train_squared_error": value, "average_train_squared_error": average * value,
        }
        for i, value in enumerate(values)
    ]  # fmt: skip
    return {"curve": lines, "stopped": None}


def method(name, *runs):
    return Trained(Method(name, "sgd"), EFFORT, {}, (), runs)


def falling(times, cost=1.0, average=1.0):
    """Falls from 20 to 2 in 1000 / times steps, which every look is on the way of."""
    return curve(20.0, 2.0, every=1000 / times, cost=cost, average=average)


def problem(**times):
    """Methods that come to the baseline's lowest error so many times sooner than it does, in iterations and seconds."""
    named = {
        BASELINE: times.pop("baseline", falling(1)), PLAIN: times.pop("plain", falling(0.01)),
        DIAGONAL: times.pop("diagonal", falling(20)), TRIDIAGONAL: times.pop("tridiagonal", falling(26)),
        f"{DIAGONAL}{STILL}": times.pop("diagonal_still", falling(1)),
        f"{TRIDIAGONAL}{STILL}": times.pop("tridiagonal_still", falling(1)),
    }  # fmt: skip
    assert not times
    return Compared({name: method(name, run) for name, run in named.items()}, MEAN_IMAGE)


@pytest.mark.parametrize(("error", "iterations"), [(6.0, 5.0), (2.0, 10.0), (1.0, 20.0), (0.5, math.inf)])
def test_iterations_to_an_error_are_read_between_the_looks(error, iterations):
    assert reached(curve(10.0, 2.0, 1.0), error) == iterations
    assert reached(curve(10.0, 2.0, 1.0, cost=3.0), error, "seconds") == 3 * iterations


def test_how_much_faster_is_measured_at_the_slower_ones_lowest_error():
    slow, fast = (method("M", curve(*values)) for values in ((10.0, 8.0, 6.0), (10.0, 2.0, 1.0)))
    assert ratios(slow, fast) == [4.0]
    assert ratios(fast, slow) == [0.0]


def test_seconds_are_compared_apart_from_iterations():
    slow, fast = method("M", falling(1)), method("M", falling(10, cost=20.0))
    assert ratios(slow, fast, "step") == pytest.approx([10.0])
    assert ratios(slow, fast, "seconds") == pytest.approx([0.5])


# of each row: a problem that keeps its rule, and one that breaks it
CASES = {
    "much higher per-second": ({}, {"tridiagonal": falling(1.9)}),
    "was not significantly faster": ({"diagonal_still": falling(1.9)}, {"tridiagonal_still": falling(2.1)}),
    "only moderately higher": ({}, {"tridiagonal": falling(30)}),
    "SGD without momentum": ({}, {"plain": falling(0.2)}),
    "orders of magnitude higher": ({}, {"diagonal": falling(9.9)}),
    "25 % to 40 %": ({}, {"tridiagonal": falling(20)}),
}


@pytest.mark.parametrize("row", SECONDS + ITERATIONS)
def test_each_rule_can_be_kept_and_broken(row):
    (keeps, breaks) = next(case for words, case in CASES.items() if words in row.statement)
    whole = judged(row, {"A": problem(**keeps), "B": problem(**keeps)}, ())
    assert whole.holds
    assert whole.verdict == "reproduced"
    assert not judged(row, {"A": problem(**breaks)}, ()).holds
    assert judged(row, {"A": problem(**breaks)}, ("smaller",)).verdict == "different setting"
    if row.everywhere:
        assert not judged(row, {"A": problem(**keeps), "B": problem(**breaks)}, ()).holds


def test_typically_is_the_median_of_the_problems():
    row = next(row for row in ITERATIONS if "25 %" in row.statement)
    problems = {"A": problem(), "B": problem(), "C": problem(tridiagonal=falling(60))}
    assert judged(row, problems, ()).holds
    assert not judged(row, problems | {"A": problem(tridiagonal=falling(60))}, ()).holds


def test_a_method_that_never_comes_so_low_is_not_faster():
    never = curve(20.0, 15.0)
    row = ITERATIONS[0]
    claim = judged(row, {"A": problem(diagonal=never)}, ())
    assert not claim.holds
    assert claim.values["A: K-FAC diagonal against Nesterov"] == 0.0


@pytest.mark.parametrize("row", [row for row in SECONDS + ITERATIONS if any(BASELINE in pair for pair in row.pairs)])
def test_the_baseline_is_judged_only_where_it_has_left_its_plateau(row):
    stays = curve(20.0, 8.1)  # above 0.8 of the mean image's error
    assert not problem(baseline=stays).left
    assert problem(baseline=curve(20.0, 8.0)).left
    claim = judged(row, {"A": problem(), "B": problem(baseline=stays)}, ())
    assert claim.holds
    assert "B: the baseline has not left its plateau, not judged" in claim.measured
    assert all(name.startswith("A") for name in claim.values)
    none = judged(row, {"B": problem(baseline=stays)}, ())
    assert not none.holds
    assert none.measured == "B: the baseline has not left its plateau, not judged"


def test_one_version_of_k_fac_against_the_other_needs_no_baseline():
    row = next(row for row in ITERATIONS if "25 %" in row.statement)
    assert judged(row, {"A": problem(baseline=curve(20.0, 19.0))}, ()).holds


@pytest.mark.parametrize(("cost", "holds"), [(1.5, True), (0.9, False)])
def test_the_cost_of_an_iteration_is_seconds_over_iterations(cost, holds):
    claim = costlier({"A": problem(tridiagonal=falling(26, cost=cost))}, ())
    assert claim.holds is holds
    assert claim.values["A"] == pytest.approx(cost)


@pytest.mark.parametrize(("average", "holds"), [(1.3, True), (0.97, False)])
def test_averaging_is_judged_at_the_end_of_the_runs_with_growing_batches(average, holds):
    claim = averaging({"A": problem(diagonal=falling(20, average=average))}, ())
    assert claim.holds is holds
    assert claim.values["A: K-FAC diagonal"] == pytest.approx(average)


# What is trained


def test_lambda_is_tuned_over_six_orders_of_magnitude_and_every_method_gets_as_many_trials():
    assert {m.grid["damping"] for m in autoencoders.methods(True) if m.optimizer == "kfac"} == {
        (0.00015, 0.0015, 0.015, 0.15, 1.5, 15.0, 150.0)
    }
    for setting in autoencoders.SETTINGS["desk"].values():
        assert setting.growing.trials == setting.still.trials == setting.plain.trials


def test_the_papers_setting_is_the_papers():
    run = Run("paper")
    settings = autoencoders.settings(run)
    steps = {title: one.growing.steps for title, one in settings.items()}
    assert steps == {"CURVES": 2000, "MNIST": 500, "FACES": 500}
    assert {title: one.batch for title, one in settings.items()} == {"CURVES": 250, "MNIST": 500, "FACES": 500}
    assert all((one.first, one.full_at, one.limit, one.hidden) == (1000, 500, None, None) for one in settings.values())
    of = {title: autoencoders.problem(title, one, False) for title, one in settings.items()}
    assert {title: (one.dataset, one.model) for title, one in of.items()} == {
        "CURVES": ("curves", "curves-autoencoder"), "MNIST": ("mnist", "mnist-autoencoder"),
        "FACES": ("faces-cut", "faces-autoencoder"),
    }  # fmt: skip
    assert all((one.averaging, one.task) == (0.99, "autoencoder") for one in of.values())


def test_faces_that_are_not_at_hand_are_left_out_and_said_to_be(monkeypatch, tmp_path):
    monkeypatch.setenv("FISHERVIZ_DATA", str(tmp_path))
    monkeypatch.setattr("fisherviz.datasets.locate.cache_directory", lambda: tmp_path)
    run = Run("desk")
    assert list(autoencoders.settings(run)) == ["CURVES"]
    assert "FACES left out, its files not being at hand" in autoencoders.departures(run)


def test_the_mean_image_is_where_the_error_is_the_images_variance():
    of = autoencoders.problem("MNIST", autoencoders.SETTINGS["smoke"]["MNIST"], True)
    images = datasets.load("digits", limit=120).train.inputs.double().numpy()
    assert autoencoders.mean_image(of, Run("smoke")) == pytest.approx(float(np.var(images, axis=0).sum()))


def test_a_narrow_autoencoder_is_the_papers_with_other_widths():
    net = autoencoders.narrow_autoencoder(9, hidden=(6, 4), code=2, generator=torch.Generator().manual_seed(0))
    kinds = [type(module).__name__ for module in net]
    linear = [module for module in net if isinstance(module, torch.nn.Linear)]
    assert [(one.in_features, one.out_features) for one in linear] == [(9, 6), (6, 4), (4, 2), (2, 4), (4, 6), (6, 9)]
    assert " ".join(kinds).replace("Linear", "L").replace("Sigmoid", "s") == "L s L s L L s L s L"
    assert all(bool((one.bias == 0).all()) for one in linear)


def test_both_figures_are_of_the_same_runs(tmp_path):
    first, second = Run("smoke", progress=False, work=tmp_path), Run("smoke", progress=False, work=tmp_path)
    autoencoders.fig10(first)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    autoencoders.fig11(second)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept
    assert first.used.keys() == second.used.keys()
