"""Sang et al. 2022, figures 1 to 3: what is measured of components, against plain torch in float64."""

import pytest
import torch
from torch import nn

from fisherviz.approximations import approximate
from fisherviz.papers.sang import matrices
from fisherviz.papers.sang.components import (
    GAMMA,
    between_units,
    conditions,
    errors,
    independence,
    leak,
)
from fisherviz.probe import Probe


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 4)
    ).double()
    return model, torch.randn(9, 2, 3, 3, dtype=torch.float64), torch.randint(4, (9,))


def rows(model, x, y, layer):
    """Gradients of each example's loss, (N, units, fan-in with the bias last), by plain autograd."""
    found = []
    for one, label in zip(x, y, strict=True):
        loss = nn.functional.cross_entropy(model(one[None]), label[None])
        weight, bias = torch.autograd.grad(loss, (layer.weight, layer.bias))
        found.append(torch.cat([weight.flatten(1), bias[:, None]], 1))
    return torch.stack(found)


def brute_force(gradients):
    """Share of ‖DᵀD‖² off the blocks of units, entry by entry."""
    n, units, width = gradients.shape
    matrix = gradients.reshape(n, -1).T @ gradients.reshape(n, -1)
    own = torch.block_diag(*[torch.ones(width, width, dtype=torch.float64)] * units)
    return float((matrix * (1 - own)).square().sum() / matrix.square().sum())


@pytest.mark.parametrize("place", [0, 3, 5])
def test_shares_between_units_are_those_of_the_whole_matrix(place):
    model, x, y = network()
    gradients = rows(model, x, y, model[place])
    fisher = Probe(model, "categorical").fisher((x, y), kind="empirical", reduction="sum")
    off, centred = brute_force(gradients), brute_force(gradients - gradients.mean(0))
    found = independence(fisher)[str(place)]
    assert errors(fisher)[str(place)]["off_unit"] == pytest.approx(off, rel=1e-9)
    assert errors(fisher)[str(place)]["component-wise"] == pytest.approx(off**0.5, rel=1e-9)
    assert between_units(gradients.flatten(1), gradients.shape[2]) == pytest.approx(off, rel=1e-9)
    assert found["covariance"] == pytest.approx(centred, rel=1e-9)
    mean = gradients.mean(0).square().sum() / gradients.square().sum((1, 2)).mean()
    assert found["mean"] == pytest.approx(float(mean), rel=1e-9)


@pytest.mark.parametrize("kind", ["empirical", "exact"])
def test_errors_are_those_of_dense_matrices(kind):
    model, x, y = network()
    fisher = Probe(model, "categorical").fisher((x, y), kind=kind, reduction="sum")
    found = errors(fisher)
    for method, name in (("kfac", "K-FAC"), ("diagonal", "entry-wise")):
        approximation = approximate(fisher, method)
        for layer in fisher.space.names:
            block = fisher.block(layer)
            apart = (block - approximation.block(layer)).norm() / block.norm()
            assert found[layer][name] == pytest.approx(float(apart), rel=1e-9)


def test_units_with_gradients_of_separate_examples_are_independent():
    apart = torch.zeros(4, 6, dtype=torch.float64)
    apart[:2, :3], apart[2:, 3:] = torch.randn(2, 3), torch.randn(2, 3)
    assert between_units(apart, 3) == pytest.approx(0.0, abs=1e-12)
    together = torch.ones(4, 6, dtype=torch.float64)
    assert between_units(together, 3) == pytest.approx(0.5)


def test_conditions_are_those_of_the_damped_components():
    model, x, y = network()
    fisher = Probe(model, "categorical").fisher((x, y), kind="empirical", reduction="sum")
    gradients = rows(model, x, y, model[5])
    blocks = torch.einsum("nui,nuj->uij", gradients, gradients)
    eye = torch.eye(blocks.shape[1], dtype=torch.float64)
    found = conditions(fisher, len(x))["5"]
    assert found["condition"] == pytest.approx(float(torch.linalg.cond(blocks + GAMMA * eye).max()), rel=1e-6)
    mean = blocks / len(x) ** 2 + GAMMA * eye
    assert found["condition_mean_cost"] == pytest.approx(float(torch.linalg.cond(mean).max()), rel=1e-6)
    assert found["singular"] == 0.0
    few = Probe(model, "categorical").fisher((x[:2], y[:2]), kind="empirical", reduction="sum")
    assert conditions(few, 2)["5"]["singular"] == 1.0  # two examples for six parameters


def test_groups_reach_their_own_outputs_and_all_of_them():
    layer = nn.Conv2d(2, 3, 2).double()
    assert leak(layer, torch.rand(4, 2, 5, 5, dtype=torch.float64), 3) == (0.0, 16)
    assert leak(nn.Linear(4, 3).double(), torch.rand(4, 4, dtype=torch.float64), 3) == (0.0, 1)
    shared = nn.Sequential(nn.Linear(4, 3).double(), nn.Linear(3, 3).double())

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(shared[0].weight.detach())

        def forward(self, x):
            return nn.functional.linear(x, self.weight) @ shared[1].weight.T

    assert leak(Mixed(), torch.rand(4, 4, dtype=torch.float64), 3)[0] > 0


def measured(off, cw=0.2, kfac=0.5, condition=10.0):
    names = ("conv", "dense1", "dense2")
    layers = {
        name: {
            "off_unit": share, "covariance": share, "mean": share, "component-wise": cw, "K-FAC": kfac,
            "entry-wise": 0.9, "condition": condition, "condition_mean_cost": condition, "singular": 0.5,
        }
        for name, share in zip(names, off, strict=True)
    }  # fmt: skip
    return [{"accuracy": 0.9, "empirical": layers, "exact": layers, "initial": layers}]


def test_both_verdicts_can_be_reached():
    near, far = measured((0.001, 0.002, 0.003)), measured((0.3, 0.002, 0.003), cw=0.6, condition=1e9)
    for row in (
        matrices._independent,
        matrices._independent_covariance,
        matrices._as_general,
        matrices._zero_mean,
        matrices._more_precise,
    ):
        assert row(near, ()).verdict == "reproduced"
        assert row(far, ()).verdict == "not reproduced"
    assert matrices._invertible(near, (), "condition", "").holds
    assert not matrices._invertible(far, (), "condition", "").holds
