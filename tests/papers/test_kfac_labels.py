"""What sampled labels cost, against dense matrices."""

import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.papers.kfac.labels import METHOD, decrease, sampled
from fisherviz.papers.kfac.network import kfac_networks
from fisherviz.papers.trials.work import Run


def test_the_decrease_is_that_of_the_quadratic_models_minimum_along_the_update():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randint(3, (30,))
    g = torch.cat(
        [p.reshape(-1) for p in torch.autograd.grad(nn.functional.cross_entropy(net(x), y), [*net.parameters()])]
    )
    fisher, gamma = fv.Probe(net, "categorical").fisher(x), 0.3
    M = fv.approximate(fisher, METHOD).damped(fv.FactoredTikhonov(gamma)).to_dense("torch")
    delta = -torch.linalg.solve(M, g)
    F = fisher.to_dense("torch") + gamma**2 * torch.eye(len(g))
    scales = torch.linspace(0, 3, 30001, dtype=torch.float64)
    lowest = (0.5 * scales**2 * (delta @ F @ delta) + scales * (g @ delta)).min()
    assert decrease(fisher, fisher, g, gamma) == pytest.approx(-float(lowest), rel=1e-6)


def test_more_labels_come_nearer_to_the_exact_statistics():
    net = kfac_networks(Run("smoke", progress=False)).first
    found = sampled(net, net.gamma)
    assert found["worst"] <= found["one"] < found["more"] <= 1.05
