"""Shrestha 2023, figure 1 and the equations: measures against plain algebra, and the rules."""

import pytest
import torch
from torch import nn

from fisherviz.papers.shrestha import matrices


def network(outputs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, outputs)).double()
    return model, torch.randn(30, 5, dtype=torch.float64)


def scores(model, x, y):
    """Gradients of each example's loss, (N, P)."""
    rows = []
    for one, target in zip(x, y, strict=True):
        loss = 0.5 * (model(one[None]) - target).square().sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows)


def test_errors_and_steps_are_those_of_the_gradients_own_outer_products():
    model, x = network(1)
    y = torch.randn(30, 1, dtype=torch.float64)
    found = matrices.approximations_of(model, (x, y), "gaussian")
    J = scores(model, x, y)
    dense, gradient = J.T @ J / len(J), J.mean(0)
    sizes = [24, 5]
    blocks = torch.block_diag(*(dense[a : a + n, a : a + n] for a, n in ((0, 24), (24, 5))))
    assert found["within"] == pytest.approx(float(blocks.norm() ** 2 / dense.norm() ** 2))
    assert found["errors"]["layer"] == pytest.approx(float((dense - blocks).norm() / dense.norm()))
    assert found["block_errors"]["layer"] == pytest.approx(0.0, abs=1e-12)
    damped = [matrix + matrices.BETA * torch.eye(sum(sizes), dtype=dense.dtype) for matrix in (dense, blocks)]
    exact, own = (torch.linalg.solve(matrix, gradient) for matrix in damped)
    cosine = torch.nn.functional.cosine_similarity(exact, own, dim=0)
    assert found["cosines"]["layer"] == pytest.approx(float(cosine))
    torch.testing.assert_close(matrices.tengrad_step(model, (x, y), "gaussian"), own)
    assert found["tengrad"] < 1e-12
    assert found["across"] == 0.0


def test_a_step_of_tengrad_leaves_the_model_as_it_was():
    model, x = network(1)
    before = [p.detach().clone() for p in model.parameters()]
    matrices.tengrad_step(model, (x, torch.zeros(30, 1, dtype=torch.float64)), "gaussian")
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_equations_hold_on_any_network_and_the_quadratic_only_nearby():
    model, x = network(3)
    found = matrices.fisher_and_divergence(model, x, 0)
    assert found["score"] < 1e-12
    assert max(found["divergence"], found["hessian"]) < 1e-12
    medians = [sorted(values)[len(values) // 2] for values in found["off"]]
    assert medians == sorted(medians, reverse=True)
    assert medians[0] > 0.05
    assert medians[-1] < 1e-3


def measured(**changes):
    errors = {"layer": 0.5, "ekfac": 0.6, "kfac": 0.7}
    return {
        "errors": errors, "block_errors": {"layer": 0.0, "ekfac": 0.3, "kfac": 0.4}, "across": 0.0, "within": 0.6,
        "cosines": {"layer": 0.9, "ekfac": 0.8, "kfac": 0.7}, "tengrad": 1e-15, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({}, []),
        ({"across": 1e-3}, [0]),
        ({"tengrad": 1e-6}, [1]),
        ({"block_errors": {"layer": 0.0, "ekfac": 0.4, "kfac": 0.3}}, [2]),
        ({"errors": {"layer": 0.65, "ekfac": 0.6, "kfac": 0.7}}, [3]),
        ({"cosines": {"layer": 0.7, "ekfac": 0.8, "kfac": 0.7}}, [3]),
    ],
)
def test_each_claim_of_figure_1_can_fail_on_one_seed(changes, failing):
    claims = matrices._claims([measured(), measured(**changes)], ())
    assert [place for place, claim in enumerate(claims) if not claim.holds] == failing
