"""Paths in two coordinate systems: what is measured, against plain torch, and both verdicts of each rule."""

import pytest
import torch
from torch import nn

from fisherviz import models
from fisherviz.papers.kfac import invariance
from fisherviz.papers.kfac.invariance import (
    AFRESH,
    DAMPED,
    DIAGONAL,
    METHODS,
    NATURAL,
    OTHERS,
    TRIDIAGONAL,
    claims_of,
    coordinates,
    distances,
    path,
)


def rows(*, same=1e-9, apart=0.3):
    """The claims on fabricated distances of two seeds."""
    exact = [[same / 2, same], [same, same / 3]]
    far = [[0.1, apart], [0.2, 2 * apart]]
    own = {method: far if method in (DAMPED, *OTHERS) else exact for method in METHODS}
    kfacs = dict.fromkeys((DIAGONAL, TRIDIAGONAL), exact)
    return claims_of(own, {"logistic": kfacs, "inputs": kfacs}, exact)


def test_paths_that_are_the_same_and_paths_that_are_not_reproduce_the_claims():
    assert [row.verdict for row in rows()] == ["reproduced"] * 7
    assert [row.verdict for row in rows(same=1e-5)] == ["not reproduced"] * 5 + ["reproduced"] * 2
    assert [row.verdict for row in rows(apart=1e-4)] == ["reproduced"] * 5 + ["not reproduced"] * 2


def test_distances_are_relative_to_how_far_the_outputs_came():
    here = [torch.zeros(2), torch.tensor([3.0, 4.0]), torch.tensor([0.0, 10.0])]
    there = [torch.zeros(2), torch.tensor([3.0, 5.0]), torch.tensor([0.0, 10.0])]
    assert distances(here, there) == [pytest.approx(0.2), 0.0]


def test_gradient_descent_in_the_twin_is_a_step_with_the_metric_of_its_coordinates():
    """Plain torch: ζ(θ† − α∇h†) = W̄ − α ΦΦᵀ ∇h ΩᵀΩ."""
    net = invariance._network(0)
    omegas, phis = coordinates(0)
    twin = models.transformed(net, omegas, phis)
    found = path(twin, METHODS["SGD"], 1, 0)[1]
    invariance._loss(net).backward()
    own = nn.Sequential(*net)
    with torch.no_grad():
        for layer, omega, phi in zip([m for m in own if isinstance(m, nn.Linear)], omegas, phis, strict=True):
            gradient = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
            step = invariance.RATE * phi @ phi.T @ gradient @ omega.T @ omega
            layer.weight -= step[:, :-1]
            layer.bias -= step[:, -1]
        torch.testing.assert_close(found, own(invariance._inputs()), rtol=1e-9, atol=1e-9)


def test_the_methods_of_the_rules_are_measured():
    assert {DIAGONAL, TRIDIAGONAL, NATURAL, DAMPED, *OTHERS} <= set(METHODS)
    assert AFRESH not in METHODS
