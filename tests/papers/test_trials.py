"""Training comparisons: equal effort, runs that are kept and resume, errors that stay errors."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fisherviz.operators.finite import NonFiniteMatrixError
from fisherviz.papers.benzing.balanced import BALANCED
from fisherviz.papers.trials import running
from fisherviz.papers.trials.problems import Effort, Method, Problem, Trained, build
from fisherviz.papers.trials.running import trained
from fisherviz.papers.trials.tuning import compare, search
from fisherviz.papers.trials.words import protocol, spread
from fisherviz.papers.trials.work import Run
from fisherviz.training.data import Batches, Position

PROBLEM = Problem("digits", "shrestha-mlp", (("hidden", (4,)),), batch=50, limit=100)
SGD = Method("SGD", "sgd", {}, {"lr": (0.01, 0.1, 1.0)}, {"lr": 0.1})
EFFORT = Effort(steps=4, look=2, seeds=2, trials=2, trial_steps=2)


def run_at(path):
    return Run("smoke", progress=False, work=path)


# Tuning


def test_every_method_gets_the_same_number_of_different_trials():
    grid = {"lr": (0.01, 0.1, 1.0), "damping": (1e-2, 1.0, 1e2)}
    for start in ({"lr": 0.1, "damping": 1.0}, {"lr": 0.01, "damping": 1e-2}):
        found = search(Method("M", "m", {}, grid, start), 6, lambda o: o["lr"] * o["damping"])
        assert found[0][0] == start
        assert len({tuple(options.values()) for options, _ in found}) == 6


def test_the_search_walks_downhill_to_the_best_setting():
    rates = tuple(10.0**-i for i in range(20))
    method = Method("M", "m", {}, {"lr": rates}, {"lr": rates[4]})
    found = search(method, 20, lambda options: abs(math.log10(options["lr"]) + 7))
    assert min(found, key=lambda trial: trial[1])[0] == {"lr": rates[7]}
    assert [rates.index(options["lr"]) for options, _ in found[:6]] == [4, 3, 5, 6, 7, 8]


def test_a_diverged_trial_is_never_chosen():
    found = search(SGD, 3, lambda options: math.inf if options["lr"] == 0.1 else options["lr"])
    assert min(found, key=lambda trial: trial[1])[0] == {"lr": 0.01}


def test_seeds_that_count_were_seen_by_no_trial(tmp_path):
    compare(PROBLEM, [SGD], EFFORT, run_at(tmp_path))
    kept = [json.loads(path.read_text())["what"] for path in tmp_path.iterdir()]
    assert sorted((what["seed"], what["steps"]) for what in kept) == [(0, 2), (0, 2), (1, 4), (2, 4)]


# Runs


def test_an_interrupted_comparison_goes_on_with_the_next_run(tmp_path, monkeypatch):
    whole = compare(PROBLEM, [SGD], EFFORT, run_at(tmp_path / "whole"))["SGD"]
    count, once = [0], running._Training.finish

    def breaks(training):
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return once(training)

    monkeypatch.setattr(running._Training, "finish", breaks)
    with pytest.raises(KeyboardInterrupt):
        compare(PROBLEM, [SGD], EFFORT, run_at(tmp_path / "broken"))
    again = compare(PROBLEM, [SGD], EFFORT, run_at(tmp_path / "broken"))["SGD"]
    assert count[0] == 3 + 2  # two were kept, the third broke, two were left
    assert [curve(one) for one in again.runs] == [curve(one) for one in whole.runs]
    assert again.trials == whole.trials


def test_the_loss_is_that_of_a_plain_loop():
    found = trained(PROBLEM, SGD, {"lr": 0.1}, 2, 1, 5, run_at(None))
    data = PROBLEM.data()
    model = build(PROBLEM, data, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches, position = Batches(*data.train, 50, None, 5), Position()
    for step in (1, 2):
        x, y, position = batches.take(position, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    loss = nn.functional.cross_entropy(model(data.train.inputs), data.train.targets).detach()
    assert found["curve"][-1]["train_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert found["curve"][-1]["epoch"] == 1.0


def test_what_diverges_is_kept_as_such_and_counts_as_the_worst(tmp_path):
    found = trained(PROBLEM, SGD, {"lr": 1e30}, 4, 2, 0, run_at(tmp_path))
    assert "loss is" in found["stopped"]
    one = Trained(SGD, EFFORT, {}, (), (found,))
    assert one.last("train_loss") == [math.inf]
    assert one.last("validation_accuracy") == [-math.inf]
    assert spread(one.last("train_loss")) == "diverged"
    assert trained(PROBLEM, SGD, {"lr": 1e30}, 4, 2, 0, run_at(tmp_path)) == found


ERRORS = {"value": ValueError, "run": RuntimeError, "zero": ZeroDivisionError, "matrix": NonFiniteMatrixError}


class Refusing(torch.optim.SGD):
    """Fails at the second step, with weights that are finite or not."""

    def __init__(self, params, error, spoil):
        super().__init__(params, lr=0.1)
        self.error, self.spoil, self.steps = error, spoil, 0

    def step(self, closure):
        self.steps += 1
        loss = super().step(closure)
        if self.steps == 2:
            if self.spoil:
                self.param_groups[0]["params"][0].data.fill_(math.nan)
            raise ERRORS[self.error]("a mistake")
        return loss


@pytest.mark.parametrize("error", ["value", "run", "zero"])
def test_an_error_in_a_trial_is_an_error_and_nothing_of_it_is_kept(tmp_path, error):
    method = Method("refusing", f"{__name__}:Refusing", {"error": error, "spoil": False})
    with pytest.raises((ValueError, RuntimeError, ZeroDivisionError), match="a mistake"):
        trained(PROBLEM, method, {}, 4, 2, 0, run_at(tmp_path))
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("error", ["value", "run"])
def test_an_optimizer_that_refuses_weights_that_are_not_finite_has_diverged(tmp_path, error):
    method = Method("refusing", f"{__name__}:Refusing", {"error": error, "spoil": True})
    found = trained(PROBLEM, method, {}, 4, 2, 0, run_at(tmp_path))
    assert "step 2 met numbers that are not finite" in found["stopped"]


def test_a_loss_that_has_risen_a_thousand_times_has_diverged_before_it_is_no_number():
    problem = replace(PROBLEM, task="autoencoder", standardise=True, dtype="float64")
    found = trained(problem, SGD, {"lr": 3.0}, 40, 20, 0, Run("smoke", progress=False))
    assert "the loss has risen to" in found["stopped"]
    factor = running.EXPLODED
    assert factor * found["curve"][0]["train_loss"] < float(found["stopped"].split()[5])


def test_a_damping_too_small_for_the_factors_breaks_the_run_off():
    """The corners of the digits are black in every image: A is singular, and float32 forgets the damping."""
    kfac = Method("K-FAC", "kfac", {"rescale": False, "adapt": False, "damping": 1e-30})
    found = trained(PROBLEM, kfac, {"lr": 0.1}, 4, 2, 0, run_at(None))
    assert "not positive definite" in found["stopped"]
    assert found["curve"][-1]["step"] == 0


def test_a_matrix_that_is_not_finite_breaks_the_run_off():
    """That of another mini-batch than the loss's: weights and loss are finite still."""
    method = Method("refusing", f"{__name__}:Refusing", {"error": "matrix", "spoil": False})
    found = trained(PROBLEM, method, {}, 4, 2, 0, run_at(None))
    assert found["stopped"] == "step 2: a mistake"


def test_a_wrong_option_is_no_divergence():
    with pytest.raises(ValueError, match="speed"):
        trained(PROBLEM, SGD, {"speed": 1.0}, 1, 1, 0, run_at(None))


def curve(found):
    """Without what the clock says."""
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found["curve"]]


def finished(found):
    return curve(found), found["stopped"]


@pytest.mark.covering
@pytest.mark.parametrize("averaging", [None, 0.9])
@pytest.mark.parametrize(
    "optimizer", ["sgd", "nesterov", "adam", "kfac", "foof", "ekfac", "kbfgs", "subsampled", BALANCED]
)
def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path, monkeypatch, optimizer, averaging):
    problem, method = replace(PROBLEM, averaging=averaging), Method("M", optimizer)
    whole = trained(problem, method, {}, 6, 2, 1, run_at(tmp_path / "whole"))
    monkeypatch.setattr(running, "SAVED", -1.0)  # a state after every step
    once = running._Training._step

    def breaks(training, x, y, step):
        if step == 4:
            raise KeyboardInterrupt
        once(training, x, y, step)

    monkeypatch.setattr(running._Training, "_step", breaks)
    with pytest.raises(KeyboardInterrupt):
        trained(problem, method, {}, 6, 2, 1, run_at(tmp_path / "broken"))
    assert [path.suffix for path in (tmp_path / "broken").iterdir()] == [".part"]
    seen = []
    monkeypatch.setattr(running._Training, "_step", lambda *given: (seen.append(given[-1]), once(*given)))
    again = trained(problem, method, {}, 6, 2, 1, run_at(tmp_path / "broken"))
    assert seen == [4, 5, 6]
    assert finished(again) == finished(whole)
    assert [path.suffix for path in (tmp_path / "broken").iterdir()] == [".json"]


@pytest.mark.soak
def test_several_processes_find_what_one_finds(tmp_path):
    one = compare(PROBLEM, [SGD], EFFORT, run_at(tmp_path / "one"))["SGD"]
    two = compare(PROBLEM, [SGD], EFFORT, replace(run_at(tmp_path / "two"), jobs=2))["SGD"]
    assert [finished(run) for run in two.runs] == [finished(run) for run in one.runs]
    assert (two.options, two.trials) == (one.options, one.trials)


def test_what_a_measurement_is_made_of_is_noted(tmp_path):
    run = run_at(tmp_path)
    found = trained(PROBLEM, SGD, {"lr": 0.1}, 2, 1, 5, run)
    assert list(run.used.values()) == [found]
    assert found["what"]["seed"] == 5
    assert found["made"].keys() == {"cpu_seconds", "commit", "fisherviz", "torch", "threads"}
    again = run_at(tmp_path)
    assert trained(PROBLEM, SGD, {"lr": 0.1}, 2, 1, 5, again) == found
    assert list(again.used.values()) == [found]


def test_each_line_has_the_seconds_of_the_steps_before_it():
    found = trained(PROBLEM, SGD, {"lr": 0.1}, 4, 2, 5, run_at(None))
    seconds = [line["seconds"] for line in found["curve"]]
    assert seconds[0] == 0.0 < seconds[1] < seconds[2] == found["seconds"]


def test_the_better_of_iterate_and_average_counts_and_both_are_kept():
    found = trained(replace(PROBLEM, averaging=0.9), SGD, {"lr": 0.1}, 4, 2, 5, run_at(None))
    plain = trained(PROBLEM, SGD, {"lr": 0.1}, 4, 2, 5, run_at(None))
    for line, alone in zip(found["curve"], plain["curve"], strict=True):
        assert line["train_loss"] == min(line["iterate_train_loss"], line["average_train_loss"])
        assert line["iterate_train_loss"] == alone["train_loss"]
    assert found["curve"][-1]["average_train_loss"] > found["curve"][-1]["iterate_train_loss"]


def test_running_accuracy_is_the_mean_over_the_batches_before_their_steps():
    found = trained(PROBLEM, SGD, {"lr": 0.1}, 4, 2, 5, run_at(None))
    data = PROBLEM.data()
    model = build(PROBLEM, data, 5)
    batches, position, right = Batches(*data.train, 50, None, 5), Position(), []
    for step in range(1, 5):
        x, y, position = batches.take(position, step)
        z = model(x)
        right.append(float((z.argmax(1) == y).double().mean()))
        model.zero_grad()
        nn.functional.cross_entropy(z, y).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    assert "running_accuracy" not in found["curve"][0]
    assert [line["running_accuracy"] for line in found["curve"][1:]] == pytest.approx(
        [sum(right[:2]) / 2, sum(right[2:]) / 2]
    )


def test_the_protocol_names_grid_start_trials_and_what_diverged():
    wild = Method("wild", "sgd", {"momentum": 0.5}, {"lr": (1e30, 0.1)}, {"lr": 1e30})
    found = compare(PROBLEM, [wild, Method("plain", "adam")], EFFORT, run_at(None))
    tuned, plain = protocol(found)
    assert tuned == {
        "method": "wild", "optimizer": "sgd", "fixed": "momentum 0.5", "grid": "lr 1e+30, 0.1", "start": "lr 1e+30",
        "trials": "2 of 2 steps, 1 diverged", "chosen": "lr 0.1", "runs": "2 seeds of 4 steps, 0 diverged",
    }  # fmt: skip
    assert (plain["grid"], plain["trials"], plain["chosen"]) == ("none", "none", "none")


def test_a_protocol_shortens_long_grids():
    rates = tuple(10.0**-i for i in range(8))
    found = compare(
        PROBLEM, [Method("M", "sgd", {}, {"lr": rates}, {"lr": rates[1]})], replace(EFFORT, trials=1), run_at(None)
    )
    assert protocol(found)[0]["grid"] == "lr 1, 0.1, ..., 1e-07 (8 values)"
