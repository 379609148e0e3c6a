"""Shrestha 2023, section 4.3: measures, the decaying rate, and the rules."""

import math

import pytest
import torch
from torch import nn

from fisherviz.optim import TENGraD
from fisherviz.papers.shrestha import stability
from fisherviz.papers.shrestha.optimizers import DecayedNaturalGradient, DecayedSGD
from fisherviz.papers.shrestha.setting import WEATHER
from fisherviz.papers.shrestha.stability import CONSTANT, DECAYED, REGULARISED
from fisherviz.papers.trials.problems import Effort, Method, Trained

EFFORT = Effort(steps=30, look=10, seeds=2, trials=0, trial_steps=0)


def trained(*curves, trials=()):
    """Seeds with a loss each ten steps; None at the end: the run broke off."""
    runs = []
    for curve in curves:
        lines = [{"step": 10 * k, "train_loss": loss} for k, loss in enumerate(curve) if loss is not None]
        runs.append({"curve": lines, "stopped": "it diverged" if None in curve else None})
    return Trained(Method("m", "sgd"), EFFORT, {}, tuple(trials), tuple(runs))


def steps_of(optimizer, model, count):
    """Parameters after each step on one batch."""
    x, y = torch.ones(4, 2), torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    moved = []
    for _ in range(count):
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        optimizer.zero_grad()
        (0.5 * (model(x) - y).square()).mean().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        optimizer.step()
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        moved.append((before - after, gradient))
    return moved


def linear():
    torch.manual_seed(0)
    return nn.Linear(2, 1)


def test_the_rate_decays_from_the_first_step_on_and_is_halved_where_it_says():
    # with a huge β the step is the gradient times lr / β
    natural = DecayedNaturalGradient(m := linear(), "gaussian", method="exact", lr=1e6, damping=1e8, halved=2)
    sgd = DecayedSGD((other := linear()).parameters(), lr=0.01, halved=2)
    for optimizer, model in ((natural, m), (sgd, other)):
        for k, (moved, gradient) in enumerate(steps_of(optimizer, model, 4)):
            torch.testing.assert_close(moved, 0.01 / (1 + k / 2) * gradient, rtol=1e-3, atol=1e-7)


def test_without_decay_it_is_tengrad_without_momentum():
    options = {"lr": 0.1, "damping": 0.5}
    decayed = DecayedNaturalGradient(
        m := linear(), "gaussian", method="layer", dense_parameters=0, halved=10**12, **options
    )
    ours = steps_of(decayed, m, 3)
    plain = {**options, "momentum": 0.0, "kind": "empirical", "kl_clip": math.inf}
    theirs = steps_of(TENGraD(m := linear(), "gaussian", **plain), m, 3)
    for (one, _), (other, _) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_rank_and_condition_leave_out_what_is_zero_by_rounding():
    assert stability.rank_and_condition([4.0, 1.0, 1e-3, 1e-15, 0.0]) == (3, pytest.approx(4000.0))


def test_a_rise_is_from_the_smallest_loss_before():
    (run,) = trained((1.0, 0.1, 0.3, 0.05, 0.2)).runs
    assert stability.rise(run) == pytest.approx(4.0)
    (falling,) = trained((1.0, 0.5, 0.2)).runs
    assert stability.rise(falling) == 1.0
    (broken,) = trained((1.0, None)).runs
    assert stability.rise(broken) == math.inf


def test_the_large_rate_is_the_largest_that_still_trains_with_the_smallest_damping():
    trials = [
        ({"lr": 0.1, "damping": 0.1}, 1.0), ({"lr": 0.3, "damping": 0.1}, 1.9), ({"lr": 0.3, "damping": 0.01}, 2.0),
        ({"lr": 1.0, "damping": 0.1}, 2.1), ({"lr": 3.0, "damping": 1.0}, math.inf),
    ]  # fmt: skip
    assert stability.large_rate(trained((1.0,), trials=trials)) == {"lr": 0.3, "damping": 0.01}


def look(eigenvalues, cosines=(0.5, 0.6, 0.7, 0.9, 0.9999)):
    return {"eigenvalues": eigenvalues, "cosines": list(cosines), "apart": [1.0, 1.0, 1.0, 0.1, 1e-3]}


@pytest.mark.parametrize(
    ("eigenvalues", "deficient", "ill"),
    [([1.0, 1e-7, 0.0], True, True), ([1.0, 1e-7], False, True), ([1.0, 0.5, 0.0], True, False)],
)
def test_spectra_decide_two_claims(eigenvalues, deficient, ill):
    claims = stability._spectra({("ecoli", "4"): look(eigenvalues)}, ())
    assert [claim.holds for claim in claims] == [deficient, ill]


@pytest.mark.parametrize(
    ("cosines", "holds"),
    [
        ((0.5, 0.6, 0.7, 0.9, 0.9999), True),
        ((0.5, 0.6, 0.7, 0.9, 0.99), False),
        ((0.5, 0.4, 0.7, 0.9, 0.9999), False),
    ],
)
def test_a_large_beta_makes_sgd_where_the_cosine_rises_to_one(cosines, holds):
    assert stability._large_beta({("ecoli", "4"): look([1.0], cosines)}, ()).holds is holds


@pytest.mark.parametrize(("ecoli", "weather", "holds"), [(2.0, 0.5, True), (0.5, 2.0, False), (math.inf, 2.0, False)])
def test_classification_is_less_stable_where_more_settings_end_above_the_start(ecoli, weather, holds):
    walked = {
        name: trained((1.0, 0.1), trials=[({"lr": 1.0}, loss), ({"lr": 0.1}, 0.2)])
        for name, loss in (("ecoli", ecoli), (WEATHER, weather))
    }
    assert stability._classification(walked, ()).holds is holds


def test_training_diverges_after_converging_where_one_seed_does_and_either_help_counts():
    calm, wild = trained((1.0, 0.1, 0.1), (1.0, 0.1, 0.2)), trained((1.0, 0.1, 0.5), (1.0, 0.1, 2.0))
    found = {CONSTANT: wild, DECAYED: calm, REGULARISED: calm}
    assert [claim.holds for claim in stability._continued(found, ())] == [True, True]
    assert [claim.holds for claim in stability._continued({**found, REGULARISED: wild}, ())] == [True, False]
    assert [claim.holds for claim in stability._continued(dict.fromkeys(found, calm), ())] == [False, False]
