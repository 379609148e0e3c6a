"""The papers' training comparisons at scale smoke: equal effort, runs that are kept, verdicts by their rules."""

import json
import math

import pytest
import torch
from PIL import Image
from torch import nn

from fisherviz import optim
from fisherviz.papers import autoencoders, benzing, sang, shrestha, training
from fisherviz.papers.claims import load
from fisherviz.papers.pictures import LARGEST
from fisherviz.papers.registry import Run, chosen, measure
from fisherviz.papers.training import Effort, Method, Problem, Trained, compare, search, trained
from fisherviz.papers.words import spread

EXHIBITS = {
    "sang.table1": 18, "sang.tuned": 3, "benzing.fig5": 2, "benzing.fig4a": 4, "shrestha.table1": 2,
    "autoencoders.fig11": 3,
}  # fmt: skip
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
    count, once = [0], training._train

    def breaks(*arguments):
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return once(*arguments)

    monkeypatch.setattr(training, "_train", breaks)
    with pytest.raises(KeyboardInterrupt):
        compare(PROBLEM, [SGD], EFFORT, run_at(tmp_path / "broken"))
    again = compare(PROBLEM, [SGD], EFFORT, run_at(tmp_path / "broken"))["SGD"]
    assert count[0] == 3 + 2  # two were kept, the third broke, two were left
    assert [one["curve"] for one in again.runs] == [one["curve"] for one in whole.runs]
    assert again.trials == whole.trials


def test_the_loss_is_that_of_a_plain_loop():
    found = trained(PROBLEM, SGD, {"lr": 0.1}, 2, 1, 5, run_at(None))
    data = PROBLEM.data()
    model = training.build(PROBLEM, data, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches, position = training.Batches(*data.train, 50, None, 5), training.Position()
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
    one = Trained(SGD, {}, (), (found,))
    assert one.last("train_loss") == [math.inf]
    assert one.last("validation_accuracy") == [-math.inf]
    assert spread(one.last("train_loss")) == "diverged"
    assert trained(PROBLEM, SGD, {"lr": 1e30}, 4, 2, 0, run_at(tmp_path)) == found


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
            raise {"value": ValueError, "run": RuntimeError, "zero": ZeroDivisionError}[self.error]("a mistake")
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


def test_a_wrong_option_is_no_divergence():
    with pytest.raises(ValueError, match="speed"):
        trained(PROBLEM, SGD, {"speed": 1.0}, 1, 1, 0, run_at(None))


def test_rates_decay_down_to_their_floor():
    model = nn.Linear(2, 2)
    adam = sang.DecayedAdam(model.parameters(), lr=1.0, lr_rate=0.5, lr_floor=0.3, eps=0.1, eps_rate=0.1)
    seen = []
    for _ in range(3):
        model(torch.ones(1, 2)).sum().backward()
        adam.step()
        seen.append((adam.param_groups[0]["lr"], adam.param_groups[0]["eps"]))
    assert [lr for lr, _ in seen] == pytest.approx([1.0, 0.5, 0.3])
    torchs = [eps / (1 - 0.999**step) ** 0.5 for step, eps in ((1, 0.1), (2, 0.01), (3, 0.001))]  # TensorFlow's ε
    assert [eps for _, eps in seen] == pytest.approx(torchs)


# Rules


def curve(*values, key="train_squared_error", stopped=None):
    return {"curve": [{"step": 10 * i, key: value} for i, value in enumerate(values)], "stopped": stopped}


@pytest.mark.parametrize(("error", "iterations"), [(6.0, 5.0), (2.0, 10.0), (1.0, 20.0), (0.5, math.inf)])
def test_iterations_to_an_error_are_read_between_the_looks(error, iterations):
    assert autoencoders.iterations_to(curve(10.0, 2.0, 1.0), error) == iterations


def test_how_much_faster_is_measured_at_the_slower_ones_lowest_error():
    slow, fast = (Trained(SGD, {}, (), (curve(*values),)) for values in ((10.0, 8.0, 6.0), (10.0, 2.0, 1.0)))
    assert autoencoders.ratios(slow, fast) == [4.0]
    assert autoencoders.ratios(fast, slow) == [0.0]


@pytest.mark.parametrize(
    ("values", "epochs"),
    [((0.1, 0.9, 1.0, 1.0), 2.0), ((0.1, 1.0, 0.9, 1.0), 3.0), ((0.1, 0.9), math.inf)],
)
def test_converged_means_to_stay_there(values, epochs):
    assert sang.epochs_to_converge(curve(*values, key="train_accuracy"), 10) == epochs


@pytest.mark.parametrize(
    ("sgd", "tengrad", "holds"), [(0.3, 0.1, True), (0.1, 0.3, False), (0.3, 0.3, False), (0.3, math.inf, False)]
)
def test_the_verdict_of_a_cell_follows_from_its_seeds(sgd, tengrad, holds):
    def one(loss):
        last = curve(loss, key="train_loss") if loss < math.inf else curve(1.0, stopped="it diverged")
        return Trained(SGD, {}, (), (last,) * 3)

    claim = shrestha._order("4", "house", "house price", {"SGD": one(sgd), "TENGraD": one(tengrad)}, ())
    assert claim.verdict == ("reproduced" if holds else "not reproduced")


def test_ten_times_is_judged_on_each_data_set():
    def one(loss):
        return Trained(SGD, {}, (), (curve(loss, key="train_loss"),))

    far, near = ({"natural gradient": one(value), "K-FAC": one(0.01)} for value in (0.1, 0.02))
    assert benzing._ten_times({"mnist": far, "fashion-mnist": far}, ()).verdict == "reproduced"
    assert benzing._ten_times({"mnist": far, "fashion-mnist": near}, ()).verdict == "not reproduced"
    assert benzing._ten_times({"mnist": far}, ("less data",)).verdict == "different setting"


# The exhibits


@pytest.mark.parametrize("name", EXHIBITS)
def test_each_exhibit_at_smoke_says_that_its_setting_is_another(name, tmp_path):
    (one,) = chosen([name])
    outcome = measure(one, Run("smoke", progress=False), tmp_path)
    assert len(outcome.claims) == EXHIBITS[name]
    assert {claim.verdict for claim in outcome.claims} == {"different setting"}
    assert all("digits" in " ".join(claim.departures) for claim in outcome.claims)
    assert load(tmp_path)[name]["run"].keys() == {"scale", "seed", "device", "fisherviz"}
    path = tmp_path / f"{name}.png"
    assert path.stat().st_size <= LARGEST
    assert Image.open(path).width >= 600


def test_a_mean_cost_is_the_mean_fisher_with_damping_times_the_batch():
    ends = []
    for make in (
        lambda m: sang.MeanCostCWNGD(m, "categorical", batch=6),
        lambda m: optim.NaturalGradient(
            m, "categorical", "cw-ngd", kind="empirical", decay=0.0, lr=1.0, damping=6 * 1e-4
        ),
    ):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3).double()
        opt = make(model)
        x, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
        torch.nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        ends.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.allclose(*ends, rtol=1e-9, atol=1e-12)
