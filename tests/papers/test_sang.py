"""Sang et al. 2022: its optimizers and the rules of its table and curves."""

import math

import pytest
import torch
from torch import nn

from fisherviz import optim
from fisherviz.papers.sang import rules
from fisherviz.papers.sang.optimizers import DecayedAdam, MeanCostCWNGD
from fisherviz.papers.sang.rules import LITERAL, MEAN_COST, VALIDATION, each_reading, epochs_to_converge, falls
from fisherviz.papers.trials.problems import Effort, Method, Trained

LOOK = 10


def test_rates_decay_down_to_their_floor():
    model = nn.Linear(2, 2)
    adam = DecayedAdam(model.parameters(), lr=1.0, lr_rate=0.5, lr_floor=0.3, eps=0.1, eps_rate=0.1)
    seen = []
    for _ in range(3):
        model(torch.ones(1, 2)).sum().backward()
        adam.step()
        seen.append((adam.param_groups[0]["lr"], adam.param_groups[0]["eps"]))
    assert [lr for lr, _ in seen] == pytest.approx([1.0, 0.5, 0.3])
    torchs = [eps / (1 - 0.999**step) ** 0.5 for step, eps in ((1, 0.1), (2, 0.01), (3, 0.001))]  # TensorFlow's ε
    assert [eps for _, eps in seen] == pytest.approx(torchs)


def test_a_mean_cost_is_the_mean_fisher_with_damping_times_the_batch():
    ends = []
    for make in (
        lambda m: MeanCostCWNGD(m, "categorical", batch=6),
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


def curve(*values, stopped=None):
    """A run whose accuracies, after 0, 1, ... epochs, are all the same."""
    lines = [{"step": LOOK * i, "train_accuracy": v, VALIDATION: v} for i, v in enumerate(values)]
    for line in lines[1:]:
        line["running_accuracy"] = line["train_accuracy"]
    return {"curve": lines, "stopped": stopped}


def method(name, *runs, epochs=4):
    return Trained(Method(name, "sgd"), Effort(epochs * LOOK, LOOK, len(runs), 0, 0), {}, (), runs)


def methods(own, adam, kfac, name=LITERAL):
    """One seed of each method, from accuracies after 1, 2, ... epochs."""
    given = {name: own, "Adam": adam, "K-FAC": kfac}
    return {key: method(key, curve(0.1, *values), epochs=len(own)) for key, values in given.items()}


def verdict(row, found, key="train_accuracy"):
    return row(found, next(iter(found)), key, ()).holds


@pytest.mark.parametrize(
    ("values", "epochs"),
    [((0.1, 0.9, 1.0, 1.0), 2.0), ((0.1, 1.0, 0.9, 1.0), 3.0), ((0.1, 0.9), math.inf), ((1.0, 1.0), 1.0)],
)
def test_converged_means_to_stay_there(values, epochs):
    assert epochs_to_converge(curve(*values), LOOK) == epochs
    assert epochs_to_converge(curve(*values), LOOK, "running_accuracy") == epochs


def test_what_broke_off_never_converges_and_falls_without_end():
    broken = curve(0.1, 1.0, 1.0, stopped="the loss is inf")
    assert epochs_to_converge(broken, LOOK) == math.inf
    assert max(falls(broken, "train_accuracy")) == math.inf


def test_falls_are_those_between_whole_epochs():
    assert falls(curve(0.9, 0.5, 0.7, 0.6, 0.65), "train_accuracy") == pytest.approx([0.0, 0.1, 0.0, 0.0])


@pytest.mark.parametrize(
    ("own", "other", "third_of", "third_fewer"),
    [(1, 2, True, True), (3, 4, False, True), (4, 5, False, False), (2, None, True, True), (None, None, False, False)],
)
def test_sooner_has_two_readings(own, other, third_of, third_fewer):
    def converging(epoch):
        return [1.0 if epoch and i >= epoch else 0.9 for i in range(1, 6)]

    found = methods(converging(own), converging(other), converging(other))
    assert verdict(rules.a_third_of, found) == third_of
    assert verdict(rules.a_third_fewer, found) == third_fewer


def test_starting_between_the_others_has_an_order():
    assert verdict(rules.starts_between, methods([0.8], [0.7], [0.9]))
    assert not verdict(rules.starts_between, methods([0.8], [0.9], [0.7]))
    assert not verdict(rules.starts_between, methods([0.95], [0.7], [0.9]))


def test_ahead_from_the_second_epoch_means_until_the_end():
    row = rules.ahead_from_the_second
    assert verdict(row, methods([0.5, 0.98, 1.0], [0.6, 0.9, 1.0], [0.6, 0.9, 1.0]))
    caught_up = methods([0.5, 0.98, 0.98], [0.6, 0.9, 0.99], [0.6, 0.9, 0.9])
    assert not verdict(row, caught_up)
    assert row(caught_up, LITERAL, "train_accuracy", ()).earlier_holds
    assert not verdict(row, methods([0.5, 0.9, 1.0], [0.6, 0.9, 0.99], [0.6, 0.9, 0.9]))


def test_ahead_before_a_fluctuation_ends_where_another_falls():
    row = rules.ahead_before_the_first_fluctuation
    assert verdict(row, methods([0.5, 0.95, 0.95], [0.6, 0.9, 0.8], [0.6, 0.9, 0.99]))
    assert not verdict(row, methods([0.5, 0.95, 0.95], [0.6, 0.9, 0.91], [0.6, 0.9, 0.99]))
    assert not verdict(row, methods([0.5, 0.95, 0.95], [0.6, 0.5, 0.6], [0.6, 0.9, 0.91]))


def test_smooth_curves_do_not_fall():
    still, falling = [0.5, 0.9, 0.9], [0.5, 0.9, 0.8]
    assert verdict(rules.rises_smoothly, methods(still, falling, falling))
    assert not verdict(rules.rises_smoothly, methods(falling, still, still))
    assert rules.others_fluctuate(methods(still, falling, falling), "train_accuracy", ()).holds
    assert not rules.others_fluctuate(methods(still, still, falling), "train_accuracy", ()).holds
    assert verdict(rules.steadier_validation, methods(still, falling, falling), VALIDATION)
    assert not verdict(rules.steadier_validation, methods(falling, falling, falling), VALIDATION)


def test_the_highest_validation_is_that_of_the_end():
    assert verdict(rules.highest_validation, methods([0.5, 0.9], [0.9, 0.8], [0.9, 0.8]), VALIDATION)
    assert not verdict(rules.highest_validation, methods([0.9, 0.8], [0.5, 0.9], [0.5, 0.7]), VALIDATION)


def test_a_claim_is_counted_in_one_reading_only():
    found = methods([0.5, 0.9], [0.5, 0.9], [0.5, 0.9]) | {MEAN_COST: method(MEAN_COST, curve(0.1, 0.5, 0.9), epochs=2)}
    rows = each_reading(rules.rises_smoothly, found, ("another setting",))
    assert [row.repeats for row in rows] == [False, True, True, True]
    assert {row.verdict for row in rows} == {"different setting"}
    assert len({row.statement for row in rows}) == 4


def test_numbers_of_the_table_are_near_or_not():
    like_the_paper = method("Adam", curve(0.1, 0.86, 0.96, *[0.99] * 45, 1.0, 1.0), epochs=49)
    assert [row.holds for row in rules.table_rows("Adam", like_the_paper, ())] == [True, True, True, True, False]
    other = method("Adam", curve(0.1, 0.5, 0.7, 0.9868), epochs=3)
    assert [row.holds for row in rules.table_rows("Adam", other, ())] == [False, False, False, False, True]
    assert all(row.repeats for row in rules.table_rows(MEAN_COST, other, ()))


def test_the_other_reading_of_an_accuracy_stands_beside_it():
    run = curve(0.1, 0.86, 0.96)
    run["curve"][1]["running_accuracy"] = 0.5
    first, second, *_ = rules.table_rows("Adam", method("Adam", run, epochs=2), ())
    assert first.sensitivity == "Keras's running mean: 50.00 %, which breaks the rule"
    assert second.sensitivity == "Keras's running mean: 96.00 %, which keeps the rule"
