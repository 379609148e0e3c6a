"""Unit blocks by their leading eigenpairs: TONGA's matrix (Le Roux et al. 2008)."""

import numpy as np
import pytest
import torch

import fisherviz as fv
from fisherviz.approximations import units
from tests.oracles import exact, laws, nets, order, trace
from tests.oracles.checks import assert_matches


def leading(B, rank):
    """By singular values: a semidefinite block's are its eigenvalues."""
    U, s, V = np.linalg.svd(B)
    return (U[:, :rank] * s[:rank]) @ V[:rank]


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_each_block_is_the_nearest_of_its_rank(rank, kind):
    net, x, y = nets.mlp(4, 3, 2), nets.vectors(9, 4), nets.vectors(9, 2)
    targets = y if kind == "empirical" else None
    layers = trace.layers_of(net)
    F = order.reorder(exact.fisher(net, x, laws.Gaussian(), targets=targets), layers, "unit")
    expected, at = np.zeros_like(F), 0
    for d_out, fan_in, bias in layers:
        for _ in range(d_out):
            own = slice(at, at + fan_in + bias)
            expected[own, own] = leading(F[own, own], rank)
            at = own.stop
    fisher = fv.Probe(net, "gaussian").fisher(x, targets, kind=kind)
    assert_matches(fv.approximate(fisher, "cw-ngd", rank=rank).to_dense("unit"), expected, 1e-9)


def test_the_full_rank_is_the_block_itself():
    net, x = nets.mlp(4, 3, 2), nets.vectors(9, 4)
    fisher = fv.Probe(net, "categorical").fisher(x)
    whole = fv.approximate(fisher, "cw-ngd").to_dense()
    for rank in (5, 100):
        assert_matches(fv.approximate(fisher, "cw-ngd", rank=rank).to_dense(), whole, 1e-9)


def test_a_step_of_the_empirical_kind_is_tonga_s():
    net, x, y = nets.mlp(4, 3, 2), nets.vectors(9, 4), torch.randint(2, (9,))
    M = fv.approximate(fv.Probe(net, "categorical").fisher(x, y, kind="empirical"), "cw-ngd", rank=2).to_dense()
    before = torch.cat([p.detach().flatten() for p in net.parameters()])
    optimizer = fv.optim.NaturalGradient(
        net.train(), "categorical", "cw-ngd", lr=0.5, damping=0.1, kind="empirical", rank=2
    )
    torch.nn.functional.cross_entropy(net(x), y).backward()
    gradient = torch.cat([p.grad.flatten() for p in net.parameters()])
    optimizer.step()
    after = torch.cat([p.detach().flatten() for p in net.parameters()])
    expected = -0.5 * torch.linalg.solve(M + 0.1 * torch.eye(len(M)).double(), gradient)
    torch.testing.assert_close(after - before, expected)


def test_a_rank_that_is_none_is_refused(monkeypatch):
    fisher = fv.Probe(nets.mlp(4, 3, 2), "gaussian").fisher(nets.vectors(9, 4))
    for options, message in [({"rank": 0}, "rank must be a positive"), ({"rank": 2, "entrywise": True}, "no rank")]:
        with pytest.raises(ValueError, match=message):
            fv.approximate(fisher, "cw-ngd", **options)
    monkeypatch.setattr(units, "FORMED_ENTRIES", 10)
    with pytest.raises(MemoryError, match="leave rank= out"):
        fv.approximate(fisher, "cw-ngd", rank=2)
