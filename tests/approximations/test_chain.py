"""The block-tridiagonal inverse: agreement with the Khatri-Rao matrix, chains, damping (K-FAC paper, section 4.3)."""

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.oracles import exact, kronecker, laws, nets, order, trace
from tests.oracles.checks import assert_matches
from tests.oracles.definitions import definition


def unit_dense(method, net, x, likelihood, y=None, kind="exact", **options):
    fisher = fv.Probe(net, likelihood).fisher(x, y, kind=kind)
    return fv.approximate(fisher, method, **options).to_dense(order="unit").numpy()


every_law = pytest.mark.parametrize("likelihood", laws.ALL)


def chain(*widths, N=14, likelihood="gaussian"):
    net, x = nets.mlp(*widths), nets.vectors(N, widths[0])
    fisher = fv.Probe(net, likelihood).fisher(x)
    return fisher, kronecker.factors(trace.moments(net, x, laws.ALL[likelihood])), trace.layers_of(net)


@every_law
def test_tridiagonal_of_two_layers_is_the_khatri_rao_matrix(likelihood):
    fisher, _, _ = chain(3, 4, 2, likelihood=likelihood)
    tridiagonal = fv.approximate(fisher, "kfac-tridiagonal").to_dense()
    assert_matches(tridiagonal, fv.approximate(fisher, "kfac-full").to_dense(), 1e-10)


@every_law
def test_tridiagonal_blocks_agree_with_the_khatri_rao_matrix(likelihood):
    fisher, _, _ = chain(2, 3, 3, 2, likelihood=likelihood)
    hat, full = fv.approximate(fisher, "kfac-tridiagonal"), fv.approximate(fisher, "kfac-full")
    for i in range(3):
        for j in range(max(0, i - 1), min(3, i + 2)):
            assert_matches(hat.block(i, j), full.block(i, j), 1e-12)
    assert torch.linalg.norm(hat.block(0, 2) - full.block(0, 2)) > 1e-3 * torch.linalg.norm(full.block(0, 2))


@pytest.mark.parametrize("gamma", [0.03, 0.3])
@every_law
def test_factored_damping_of_the_tridiagonal_inverse(likelihood, gamma):
    fisher, factors, layers = chain(2, 3, 3, 2, likelihood=likelihood)
    expected = kronecker.tridiagonal_inverse(*kronecker.damp(*factors, gamma))
    approximation = fv.approximate(fisher, "kfac-tridiagonal")
    damping = fv.FactoredTikhonov(gamma)
    assert_matches(approximation.inverse(damping).to_dense(), order.to_torch(expected, layers), 1e-8)
    v = nets.vectors(len(expected), 1)[:, 0]
    assert_matches(approximation.solve(v, damping), order.to_torch(expected, layers) @ v.numpy(), 1e-8)
    damped = approximation.damped(damping).to_dense(order="unit")
    assert_matches(damped, kronecker.tridiagonal(*kronecker.damp(*factors, gamma)), 1e-8)


def test_damped_tridiagonal_inverse_is_block_tridiagonal_and_positive_definite():
    fisher, _, _ = chain(2, 3, 3, 3, 2)
    inverse = fv.approximate(fisher, "kfac-tridiagonal").inverse(fv.FactoredTikhonov(0.1)).to_dense()
    sizes = [0, 9, 21, 33, 41]
    scale = inverse.abs().max()
    for i in range(4):
        for j in range(i + 2, 4):
            assert inverse[sizes[i] : sizes[i + 1], sizes[j] : sizes[j + 1]].abs().max() < 1e-9 * scale
    assert torch.linalg.eigvalsh((inverse + inverse.T) / 2).min() > 0


def test_undamped_tridiagonal_inverse_of_a_singular_fisher_is_refused():
    """The bias coordinate is the same in all layers, so that I - S1 (x) S2 has the eigenvalue 0."""
    fisher, _, _ = chain(2, 3, 2, likelihood="categorical")
    with pytest.raises((ValueError, RuntimeError), match="damping"):
        fv.approximate(fisher, "kfac-tridiagonal").solve(nets.vectors(17, 1)[:, 0])


def test_tridiagonal_of_convolutions_with_equal_positions_expands():
    net = nets.conv_net(*(nn.Conv1d(2, 2, 3, padding="same") for _ in range(3)))
    x = torch.randn(5, 2, 5, dtype=torch.float64)
    actual = unit_dense("kfac-tridiagonal", net, x, "bernoulli")
    assert_matches(actual, definition("kfac-tridiagonal", net, x, laws.Bernoulli()), 1e-7)


def test_tridiagonal_of_unequal_positions_reduces():
    net = nets.randomised(
        nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 2))
    )
    x, gamma = torch.randn(14, 1, 4, dtype=torch.float64), 0.1
    A, G = kronecker.damp(*kronecker.factors(trace.moments(net, x, laws.Bernoulli()), "reduce"), gamma)
    approximation = fv.approximate(fv.Probe(net, "bernoulli").fisher(x), "kfac-tridiagonal")
    expected = order.to_torch(kronecker.tridiagonal_inverse(A, G), trace.layers_of(net))
    assert_matches(approximation.inverse(fv.FactoredTikhonov(gamma)).to_dense(), expected, 1e-8)


@pytest.mark.filterwarnings("ignore:.*single features")
def test_layer_without_factors_stays_out_of_the_tridiagonal_chain():
    """Linear, LayerNorm, Linear: the two Linear layers are neighbours, the norm keeps its exact 2 x 2 blocks."""
    net, x = (
        nets.randomised(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2))),
        nets.vectors(14, 2),
    )
    fisher = fv.Probe(net, "bernoulli").fisher(x)
    hat = fv.approximate(fisher, "kfac-tridiagonal")
    full = fv.approximate(fv.Probe(net, "bernoulli", layers=["0", "2"]).fisher(x), "kfac-full").to_dense()
    dense = hat.to_dense().numpy()
    linear = np.r_[0:9, 15:23]
    assert_matches(dense[np.ix_(linear, linear)], full, 1e-9)
    same_feature = np.tile(np.eye(3), (2, 2))
    assert_matches(dense[9:15, 9:15], exact.fisher(net, x, laws.Bernoulli())[9:15, 9:15] * same_feature)
    assert_matches(dense[9:15, linear], np.zeros((6, 17)))


class Branching(nn.Module):
    """Two layers side by side on the same input, then one on their sum: no chain."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.left(x)) + torch.tanh(self.right(x)))


def test_network_that_is_no_chain_takes_neighbours_in_execution_and_says_so():
    net, x = nets.randomised(Branching()), nets.vectors(14, 2)
    fisher = fv.Probe(net, "bernoulli").fisher(x)
    with pytest.warns(UserWarning, match="chain"):
        hat = fv.approximate(fisher, "kfac-tridiagonal")
    full = fv.approximate(fisher, "kfac-full")
    for i, j in ((0, 1), (1, 2)):
        assert_matches(hat.block(i, j), full.block(i, j), 1e-9)


def test_order_of_layers_in_the_chain_is_that_of_execution():
    """Defined last, run first: the chain follows the forward pass, the numbering the definition."""

    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.third, self.first, self.second = nn.Linear(3, 2), nn.Linear(2, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))

    net, x = nets.randomised(Backwards()), nets.vectors(14, 2)
    straight = nn.Sequential(net.first, nn.Tanh(), net.second, nn.Tanh(), net.third)
    damping = fv.FactoredTikhonov(0.1)
    fisher = fv.Probe(net, "gaussian").fisher(x)
    actual = fv.approximate(fisher, "kfac-tridiagonal").inverse(damping).to_dense()
    layers = trace.layers_of(straight)
    A, G = kronecker.damp(*kronecker.factors(trace.moments(straight, x, laws.Gaussian())), 0.1)
    expected = order.to_torch(kronecker.tridiagonal_inverse(A, G), layers)
    first, second, third = (np.arange(len(expected))[part] for part in order.segments(layers))
    where = np.concatenate([third, first, second])
    assert_matches(actual, expected[np.ix_(where, where)], 1e-8)


def test_a_network_without_structured_layers_has_no_chain():
    """Every layer takes its exact diagonal, and nothing is coupled."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.EmbeddingBag(4, 3, mode="max"), nn.Tanh()).double()
    fisher = fv.Probe(net, "categorical").fisher(torch.randint(4, (9, 1)))
    with pytest.warns(UserWarning, match="exact diagonal"):
        approximation = fv.approximate(fisher, "kfac-tridiagonal")
    torch.testing.assert_close(approximation.to_dense(), torch.diag(fisher.to_dense().diagonal()))
