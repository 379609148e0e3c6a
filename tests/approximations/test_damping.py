"""Damping, products, solves and norms of approximations against their own dense matrices; the registry."""

import re

import numpy as np
import pytest
import torch

import fisherviz as fv
from tests.oracles import kronecker, laws, nets, order, trace
from tests.oracles.checks import assert_matches
from tests.oracles.definitions import METHODS, definition

every_method = pytest.mark.parametrize("method", METHODS)


@every_method
def test_tikhonov_damping_adds_a_multiple_of_the_identity(method):
    net, x = nets.mlp(3, 4, 2), nets.vectors(6, 3)
    approximation = fv.approximate(fv.Probe(net, "categorical").fisher(x), method)
    dense = approximation.to_dense().numpy()
    damped = dense + 0.2 * np.eye(len(dense))
    V = nets.vectors(len(dense), 2)
    assert_matches(approximation.damped(0.2).to_dense(), damped)
    assert_matches(approximation.solve(V[:, 0], 0.2), np.linalg.solve(damped, V[:, 0]), 1e-8)
    assert_matches(approximation.solve(V, 0.2), np.linalg.solve(damped, V), 1e-8)
    assert_matches(approximation.damped(0.2).solve(V[:, 0]), np.linalg.solve(damped, V[:, 0]), 1e-8)
    assert_matches(approximation.inverse(0.2).to_dense(), np.linalg.inv(damped), 1e-8)
    assert_matches(approximation.inverse(0.2) @ V[:, 0], np.linalg.solve(damped, V[:, 0]), 1e-8)


def test_tikhonov_object_and_number_mean_the_same():
    net, x = nets.mlp(3, 4, 2), nets.vectors(6, 3)
    kfac = fv.approximate(fv.Probe(net, "categorical").fisher(x), "kfac")
    assert_matches(kfac.damped(fv.Tikhonov(0.2)).to_dense(), kfac.damped(0.2).to_dense(), 0)


@pytest.mark.parametrize("method", ["kfac", "kfac-full"])
@pytest.mark.parametrize("gamma", [0.02, 0.5])
def test_factored_damping_of_each_layers_own_two_factors(method, gamma):
    net, x, law = nets.mlp(3, 4, 2), nets.vectors(6, 3), laws.Categorical()
    layers = trace.layers_of(net)
    A, G = kronecker.damp(*kronecker.factors(trace.moments(net, x, law)), gamma)
    expected = order.to_torch((kronecker.kfac if method == "kfac" else kronecker.full)(A, G), layers)
    approximation = fv.approximate(fv.Probe(net, "categorical").fisher(x), method)
    damping = fv.FactoredTikhonov(gamma)
    v = nets.vectors(len(expected), 1)[:, 0]
    assert_matches(approximation.damped(damping).to_dense(), expected)
    assert_matches(approximation.solve(v, damping), np.linalg.solve(expected, v), 1e-8)
    assert_matches(approximation.inverse(damping).to_dense(), np.linalg.inv(expected), 1e-8)


@pytest.mark.parametrize("method", ["kfac", "kfac-full", "kfac-tridiagonal"])
def test_factored_damping_of_a_summed_fisher_starts_from_the_summed_factors(method):
    """A (x) N G and N A (x) G are damped to the same matrix, since pi takes up the difference."""
    net, x = nets.mlp(2, 3, 2), nets.vectors(9, 2)
    A, G = kronecker.factors(trace.moments(net, x, laws.Gaussian()))
    A, G = kronecker.damp(A, {ij: 9 * g for ij, g in G.items()}, 0.1)
    dense = {"kfac": kronecker.kfac, "kfac-full": kronecker.full, "kfac-tridiagonal": kronecker.tridiagonal}
    approximation = fv.approximate(fv.Probe(net, "gaussian").fisher(x, reduction="sum"), method)
    actual = approximation.damped(fv.FactoredTikhonov(0.1)).to_dense(order="unit")
    assert_matches(actual, dense[method](A, G), 1e-8)
    actual = approximation.inverse(fv.FactoredTikhonov(0.1)).to_dense(order="unit")
    assert_matches(actual, np.linalg.inv(dense[method](A, G)), 1e-7)


def test_factored_damping_of_a_dead_layer_takes_equal_parts():
    net, x = nets.mlp(3, 4, 2), nets.vectors(6, 3)
    with torch.no_grad():
        net[2].weight.zero_()
    kfac = fv.approximate(fv.Probe(net, "categorical").fisher(x), "kfac")
    block = kfac.damped(fv.FactoredTikhonov(0.1)).block(0, 0)
    A = kronecker.factors(trace.moments(net, x, laws.Categorical()))[0][0, 0]
    expected = np.kron(0.1 * np.eye(4), A + 0.1 * np.eye(4))
    assert_matches(block, order.to_torch(expected, [(4, 3, True)]))


@pytest.mark.parametrize("method", ["diagonal", "layer", "cw-ngd"])
def test_factored_damping_of_a_matrix_without_factors_adds_gamma_squared(method):
    """The product of the two added identities, (pi gamma) (gamma / pi): what is left without factors."""
    approximation = fv.approximate(fv.Probe(nets.mlp(3, 2), "gaussian").fisher(nets.vectors(4, 3)), method)
    damped = approximation.damped(fv.FactoredTikhonov(0.1)).to_dense()
    assert_matches(damped, approximation.to_dense() + 0.01 * torch.eye(8, dtype=torch.float64), 1e-12)


@every_method
def test_products_blocks_diagonal_and_norms_agree_with_the_dense_matrix(method):
    net, x = nets.mlp(2, 3, 2, 2), nets.vectors(9, 2)
    fisher = fv.Probe(net, "bernoulli").fisher(x)
    approximation = fv.approximate(fisher, method)
    dense = approximation.to_dense().numpy()
    V = nets.vectors(len(dense), 2)
    assert dense.shape == tuple(fisher.shape)
    assert_matches(dense, dense.T, 1e-10)
    assert_matches(approximation @ V[:, 0], dense @ V[:, 0].numpy(), 1e-8)
    assert_matches(approximation @ V, dense @ V.numpy(), 1e-8)
    assert_matches(approximation.diagonal(), np.diag(dense), 1e-8)
    assert float(approximation.norm("fro")) == pytest.approx(np.linalg.norm(dense), rel=1e-8)
    assert float(approximation.norm("spectral")) == pytest.approx(np.linalg.norm(dense, 2), rel=1e-5)
    assert float(approximation.norm("trace")) == pytest.approx(np.trace(dense), rel=1e-8)
    parts = {"0": slice(0, 9), "2": slice(9, 17), "4": slice(17, 23)}
    for row, rows in parts.items():
        for col, cols in parts.items():
            assert_matches(approximation.block(row, col), dense[rows, cols], 1e-8)


@every_method
def test_dictionaries_like_named_parameters(method):
    net, x = nets.mlp(2, 3, 2), nets.vectors(9, 2)
    approximation = fv.approximate(fv.Probe(net, "bernoulli").fisher(x), method)
    v = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    flat = torch.cat([t.reshape(-1) for t in v.values()])
    for given, expected in (
        (approximation @ v, approximation @ flat),
        (approximation.solve(v, 0.1), approximation.solve(flat, 0.1)),
    ):
        assert list(given) == list(v)
        assert_matches(torch.cat([t.reshape(-1) for t in given.values()]), expected, 1e-13)


@every_method
def test_float32_approximations(method):
    net, x = nets.mlp(2, 3, 2), nets.vectors(12, 2)
    expected = definition(method, net, x, laws.Bernoulli())
    fisher = fv.Probe(net.float(), "bernoulli").fisher(x.float())
    dense = fv.approximate(fisher, method).to_dense(order="unit")
    assert dense.dtype == torch.float32
    assert_matches(dense, expected, 1e-4)


@pytest.mark.parametrize("method", ["kfac", "ekfac", "foof", "cw-ngd", "layer", "nearest-kronecker"])
def test_undamped_solve_of_singular_factors_names_the_layer_and_the_damping_that_would_do(method):
    net, x = nets.mlp(3, 4, 2), nets.vectors(2, 3)
    approximation = fv.approximate(fv.Probe(net, "categorical").fisher(x), method)
    v = nets.vectors(26, 1)[:, 0]
    sentence = r"layer '0'.*smallest eigenvalue.*damping of at least ([\d.e+-]+\d)"
    with pytest.raises((ValueError, RuntimeError), match=sentence) as error:
        approximation.solve(v)
    enough = float(re.search(sentence, str(error.value)).group(1))
    assert torch.isfinite(approximation.solve(v, enough)).all()


def test_undamped_solve_of_regular_factors():
    net, x = nets.mlp(2, 3), nets.vectors(9, 2)
    kfac = fv.approximate(fv.Probe(net, "gaussian").fisher(x), "kfac")
    v = nets.vectors(9, 1)[:, 0]
    assert_matches(kfac.solve(v), np.linalg.solve(kfac.to_dense(), v), 1e-9)


def test_ten_methods_are_registered():
    assert set(METHODS) <= set(fv.approximations)


def test_an_approximation_of_ones_own_is_registered_in_a_few_lines(monkeypatch):
    class Doubled(fv.Approximation):
        """Twice the identity."""

        def statistics(self, layer):
            return {}

        def operator_for(self, layer, values):
            return fv.approximate(small, "identity").operator(0, 0).scale(2.0)

    net, x = nets.mlp(3, 2), nets.vectors(4, 3)
    small = fv.Probe(net, "gaussian").fisher(x)
    monkeypatch.setattr(fv.approximations, "_classes", dict(fv.approximations))
    fv.register("doubled", Doubled)
    assert "doubled" in fv.approximations
    assert_matches(fv.approximate(small, "doubled").to_dense(), 2 * np.eye(8))
    assert_matches(fv.approximate(small, Doubled).to_dense(), 2 * np.eye(8))
    with pytest.raises((ValueError, TypeError), match="kfac"):
        fv.register("kfac", Doubled)
