"""Grouped convolutions in the methods that couple layers: KFAC's block, and a chain that breaks there."""

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.oracles import kronecker, laws, nets, order, trace
from tests.oracles.checks import assert_matches

pytestmark = pytest.mark.filterwarnings("ignore:.*grouped")


def network(groups=2, padding=1, behind=0):
    """Five convolutions, the third in groups; with these paddings all have equally many positions."""
    return nets.conv_net(
        nn.Conv1d(1, 2, 3, padding=1), nn.Conv1d(2, 4, 1), nn.Conv1d(4, 4, 3, padding=padding, groups=groups),
        nn.Conv1d(4, 2, 1, padding=behind), nn.Conv1d(2, 2, 1),
    )  # fmt: skip


def some(pairs, parts):
    """The factors of some parts, renumbered."""
    return {(i, j): pairs[a, b] for i, a in enumerate(parts) for j, b in enumerate(parts)}


def expected(method, A, G, groups, assembled=kronecker.tridiagonal):
    """From the factors of all parts: before the groups, the groups, and behind them."""
    before, behind = [0, 1], [2 + groups, 3 + groups]
    if method == "kfac-tridiagonal":
        chains = [before, *([part] for part in range(2, 2 + groups)), behind]
        return kronecker.block_diagonal([assembled(some(A, chain), some(G, chain)) for chain in chains])
    coupled = kronecker.full(some(A, before + behind), some(G, before + behind))
    edge = sum(len(A[i, i]) * len(G[i, i]) for i in before)
    alone = [np.kron(G[i, i], A[i, i]) for i in range(2, 2 + groups)]
    dense = kronecker.block_diagonal([coupled[:edge, :edge], *alone, coupled[edge:, edge:]])
    dense[:edge, edge - len(coupled) :] = coupled[:edge, edge:]
    dense[edge - len(coupled) :, :edge] = coupled[edge:, :edge]
    return dense


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("method", ["kfac-full", "kfac-tridiagonal"])
def test_groups_stand_alone_and_the_rest_is_coupled(method, groups):
    net, x, law = network(groups), torch.randn(8, 1, 4, dtype=torch.float64), laws.Bernoulli()
    A, G = kronecker.factors(trace.moments(net, x, law), "expand")
    found = fv.approximate(fv.Probe(net, "bernoulli").fisher(x), method)
    assert_matches(found.to_dense(order="unit"), expected(method, A, G, groups), 1e-8)
    kfac = fv.approximate(fv.Probe(net, "bernoulli").fisher(x), "kfac")
    assert_matches(found.block("4"), kfac.block("4"))
    v = torch.randn(found.shape[0], dtype=torch.float64)
    assert_matches(found @ v, found.to_dense() @ v)


@pytest.mark.parametrize(("behind", "setting"), [(0, "reduce"), (1, "expand")])
@pytest.mark.parametrize("method", ["kfac-full", "kfac-tridiagonal"])
def test_positions_of_groups_and_of_coupled_layers_decide_nothing_for_one_another(method, behind, setting):
    net, x, law = network(padding=0, behind=behind), torch.randn(8, 1, 5, dtype=torch.float64), laws.Gaussian()
    moments = trace.moments(net, x, law)
    (A, G), (alone_A, alone_G) = kronecker.factors(moments, setting), kronecker.factors(moments, "expand")
    for part in (2, 3):
        A[part, part], G[part, part] = alone_A[part, part], alone_G[part, part]
    found = fv.approximate(fv.Probe(net, "gaussian").fisher(x), method)
    assert_matches(found.to_dense(order="unit"), expected(method, A, G, 2), 1e-8)


def test_damped_inverse_breaks_the_chain_too():
    net, x, gamma = network(), torch.randn(8, 1, 4, dtype=torch.float64), 0.2
    A, G = kronecker.damp(*kronecker.factors(trace.moments(net, x, laws.Bernoulli()), "expand"), gamma)
    found = fv.approximate(fv.Probe(net, "bernoulli").fisher(x), "kfac-tridiagonal")
    inverse = expected("kfac-tridiagonal", A, G, 2, kronecker.tridiagonal_inverse)
    layers = trace.layers_of(net)
    assert_matches(found.inverse(fv.FactoredTikhonov(gamma)).to_dense(), order.to_torch(inverse, layers), 1e-7)
    full = fv.approximate(fv.Probe(net, "bernoulli").fisher(x), "kfac-full")
    v = torch.randn(found.shape[0], dtype=torch.float64)
    damped = full.to_dense().numpy() + 0.1 * np.eye(len(v))
    assert_matches(full.solve(v, 0.1), np.linalg.solve(damped, v.numpy()), 1e-8)


@pytest.mark.filterwarnings("error:.*grouped")
@pytest.mark.parametrize("method", ["kfac-full", "kfac-tridiagonal"])
def test_it_is_said_once(method):
    fisher = fv.Probe(network(), "gaussian").fisher(torch.randn(3, 1, 4, dtype=torch.float64))
    with pytest.warns(UserWarning, match="grouped convolutions have no cross factors: '4'") as said:
        fv.approximate(fisher, method)
    assert len(said) == 1


class MobileBlock(nn.Module):
    """An inverted residual: wide, depthwise, narrow, and past them."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU6(),
            nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU6(),
            nn.Conv2d(6, 2, 1, bias=False), nn.BatchNorm2d(2),
        )  # fmt: skip

    def forward(self, x):
        return x + self.body(x)


@pytest.mark.filterwarnings("ignore:.*single features", "ignore:.*chain")
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "by structure"])
def test_a_mobile_network_is_compared_by_every_method(dense, monkeypatch):
    if not dense:
        monkeypatch.setattr("fisherviz.comparison.planning.why_not_dense", lambda *given: "which are too many")
    net = nets.randomised(nn.Sequential(nn.Conv2d(1, 2, 3, 2), MobileBlock(), nets.MeanPixels(), nn.Linear(2, 2)))
    x, y = torch.randn(6, 1, 7, 7, dtype=torch.float64), torch.randint(2, (6,))
    fisher = fv.Probe(net, "categorical").fisher((x, y))
    found = fv.compare(fisher, progress=False)
    frame = (
        found.frame[(found.frame.metric == "relative_frobenius") & (found.frame.row == "all")].set_index("method").value
    )
    F = fisher.to_dense()
    for method in fv.approximations:
        error = torch.linalg.norm(fv.approximate(fisher, method).to_dense() - F) / torch.linalg.norm(F)
        assert frame[method] == pytest.approx(float(error), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*lambda", "ignore:.*damping")
def test_block_tridiagonal_kfac_trains():
    net, x = network().train(), torch.randn(8, 1, 4, dtype=torch.float64)
    opt = fv.optim.KFAC.paper(
        net, "categorical", inverse="block-tridiagonal", rescale=False, adapt=False, lr=0.1, damping=0.1, kind="exact"
    )
    nn.functional.cross_entropy(net(x), torch.arange(8) % 2).backward()
    before = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    g = torch.cat([p.grad.reshape(-1) for p in net.parameters()])
    matrix = fv.approximate(fv.Probe(net, "categorical").fisher(x), "kfac-tridiagonal")
    opt.step()
    after = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    assert_matches(after, before - 0.1 * matrix.solve(g, fv.FactoredTikhonov(0.1**0.5)), 1e-8)
