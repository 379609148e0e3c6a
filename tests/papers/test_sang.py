"""Sang et al. 2022: its optimizers and its rules."""

import math

import pytest
import torch
from torch import nn

from fisherviz import optim
from fisherviz.papers.sang.optimizers import DecayedAdam, MeanCostCWNGD
from fisherviz.papers.sang.table import epochs_to_converge


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


def curve(*values, key="train_squared_error", stopped=None):
    return {"curve": [{"step": 10 * i, key: value} for i, value in enumerate(values)], "stopped": stopped}


@pytest.mark.parametrize(
    ("values", "epochs"),
    [((0.1, 0.9, 1.0, 1.0), 2.0), ((0.1, 1.0, 0.9, 1.0), 3.0), ((0.1, 0.9), math.inf)],
)
def test_converged_means_to_stay_there(values, epochs):
    assert epochs_to_converge(curve(*values, key="train_accuracy"), 10) == epochs
