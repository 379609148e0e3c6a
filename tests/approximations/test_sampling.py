"""Laplace samples from approximations: the root of the inverse is exact, and a sample is that root times its noise."""

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.approximations import example_units, units
from fisherviz.statistics.examples import root_correction
from tests.approximations.test_contract import NETWORKS, every_approximation, every_network
from tests.oracles import definitions, laws, nets, order, trace


def eye(P):
    return torch.eye(P, dtype=torch.float64)


def covariance_of(S):
    return S @ S.T


def close(actual, expected):
    return torch.allclose(actual, expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max()))


@every_approximation
@every_network
def test_the_root_gives_the_damped_inverse(method, build):
    net, x = build()
    approximation = fv.approximate(fv.Probe(net, "categorical").fisher(x), method)
    M = approximation.to_dense()
    S = approximation.inverse_root(eye(len(M)), 0.3)
    assert close(covariance_of(S), torch.linalg.inv(M + 0.3 * eye(len(M))))


FACTORED = ("kfac", "kfac-tridiagonal", "ekfac", "foof", "nearest-kronecker", "diagonal")


@pytest.mark.parametrize("method", FACTORED)
def test_the_root_gives_the_inverse_of_damped_factors(method):
    net, x = nets.mlp(3, 4, 4, 2), nets.vectors(9, 3)
    approximation = fv.approximate(fv.Probe(net, "categorical").fisher(x), method)
    damping = fv.FactoredTikhonov(0.4)
    S = approximation.inverse_root(eye(approximation.shape[0]), damping)
    assert close(covariance_of(S), torch.linalg.inv(approximation.damped(damping).to_dense()))


@pytest.mark.parametrize("rows", [True, False])
def test_units_that_stay_in_example_space_have_the_same_root(monkeypatch, rows):
    monkeypatch.setattr(units, "FORMED_ENTRIES", 0)
    monkeypatch.setattr(example_units, "_ENTRIES", 40)  # a few units at a time
    net, x = nets.mlp(6, 5, 2), nets.vectors(3 if rows else 20, 6)
    approximation = fv.approximate(fv.Probe(net, "gaussian").fisher(x), "cw-ngd")
    assert type(approximation.operators[0]).__name__ == "ExampleUnits"
    assert approximation.operators[0].shifted(0.3)._fewer_rows is rows
    M = approximation.to_dense()
    S = approximation.inverse_root(eye(len(M)), 0.3)
    assert close(covariance_of(S), torch.linalg.inv(M + 0.3 * eye(len(M))))


def test_layers_that_stay_in_example_space_have_the_same_root():
    net, x = nets.mlp(6, 5, 2), nets.vectors(3, 6)
    approximation = fv.approximate(fv.Probe(net, "gaussian").fisher(x), "layer", dense_parameters=1)
    assert {type(op).__name__ for op in approximation.operators} == {"ExampleSpace"}
    M = approximation.to_dense()
    S = approximation.inverse_root(eye(len(M)), 1e-4)
    assert close(covariance_of(S), torch.linalg.inv(M + 1e-4 * eye(len(M))))


def noise_of(seed, P, n):
    return torch.randn(P, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shift", [1e-8, 0.3, 1e6])
def test_the_root_in_example_space_loses_nothing_at_either_end(shift):
    U, s = noise_of(1, 7, 3), 0.4
    W = root_correction(U.T @ U, s, shift, "the Gram matrix")
    S = eye(7) / shift**0.5 + U @ W @ U.T
    M = s * U @ U.T + shift * eye(7)
    torch.testing.assert_close(S @ S @ M, eye(7), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["diagonal", "cw-ngd", "kfac", "ekfac", "foof", "layer", "kfac-full"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_sample_is_the_weights_plus_a_root_of_the_explicit_covariance_times_noise(method, reduction):
    net, x, tau = nets.mlp(2, 3, 3), nets.vectors(7, 2), 0.5
    F = definitions.definition(method, net, x, laws.ALL["categorical"])
    F = torch.from_numpy(order.to_torch(F, trace.layers_of(net)))
    covariance = torch.linalg.inv(tau * eye(len(F)) + len(x) * F)
    approximation = fv.approximate(fv.Probe(net, "categorical").fisher(x, reduction=reduction), method)
    samples = approximation.sample(tau, 40, generator=torch.Generator().manual_seed(3))
    assert samples.shape == (40, len(F))
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    z = noise_of(3, len(F), 40)
    S = torch.linalg.lstsq(z.T, samples - weights).solution.T  # more draws than parameters: the map itself
    assert torch.allclose(S @ S.T, covariance, rtol=1e-7, atol=1e-9)


def test_kronecker_samples_with_the_prior_in_the_factors_are_those_of_ritter():
    """Ritter, Botev & Barber 2018, equation 9: (√N A + √τ I) ⊗ (√N G + √τ I), for either reduction."""
    net, x, tau = nets.mlp(3, 2, bias=False), nets.vectors(9, 3), 0.7
    A, G = x.T @ x / 9, torch.eye(2, dtype=torch.float64)
    precision = torch.from_numpy(np.kron(3 * G + tau**0.5 * eye(2), 3 * A + tau**0.5 * eye(3)))
    z = noise_of(1, 6, 10)
    for reduction in ("mean", "sum"):
        approximation = fv.approximate(fv.Probe(net, "gaussian").fisher(x, reduction=reduction), "kfac")
        prior = fv.FactoredTikhonov(tau**0.5, pi=1)
        samples = approximation.sample(prior, 10, generator=torch.Generator().manual_seed(1))
        S = torch.linalg.lstsq(z.T, samples - net[0].weight.detach().flatten()).solution.T
        assert torch.allclose(S @ S.T, torch.linalg.inv(precision))


def test_the_exact_layer_of_a_one_layer_network_samples_the_exact_posterior():
    net, x = nets.mlp(3, 2), nets.vectors(9, 3)
    fisher = fv.Probe(net, "gaussian").fisher(x)
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    z = noise_of(1, 8, 12)
    roots = []
    for matrix in (fisher, fv.approximate(fisher, "layer")):
        samples = matrix.sample(2.0, 12, generator=torch.Generator().manual_seed(1))
        roots.append(torch.linalg.lstsq(z.T, samples - weights).solution.T)
    assert torch.allclose(covariance_of(roots[0]), covariance_of(roots[1]))


def test_samples_follow_their_generator_and_leave_the_global_state():
    net, x = nets.mlp(3, 4, 2), nets.vectors(9, 3)
    approximation = fv.approximate(fv.Probe(net, "gaussian").fisher(x), "kfac")
    before = torch.get_rng_state()
    first, second = approximation.sample(1.0, 3), approximation.sample(1.0, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    assert not torch.equal(first, approximation.sample(1.0, 3, generator=torch.Generator().manual_seed(1)))


def test_samples_have_the_model_s_precision():
    net = nn.Sequential(nn.Linear(3, 2))
    samples = fv.approximate(fv.Probe(net, "gaussian").fisher(torch.randn(5, 3)), "kfac").sample(1.0, 4)
    assert samples.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((0.0, 2), ValueError, "prior_precision must be a positive"),
        ((float("nan"), 2), ValueError, "prior_precision must be a positive"),
        ((fv.FactoredTikhonov(0.0), 2), ValueError, "prior_precision must be a positive"),
        ((torch.ones(26), 2), TypeError, "fisher.sample takes a vector"),
        (("much", 2), TypeError, "one number or a fv.FactoredTikhonov"),
        ((1.0, 0), ValueError, "n must be a positive whole number"),
        ((1.0, 2, 3), TypeError, "torch.Generator"),
    ],
)
def test_what_cannot_be_sampled_is_refused_in_one_sentence(arguments, kind, message):
    net, x = NETWORKS["perceptron"]()
    with pytest.raises(kind, match=message):
        fv.approximate(fv.Probe(net, "gaussian").fisher(x), "kfac").sample(*arguments)


def test_a_prior_in_the_factors_needs_factors():
    net, x = NETWORKS["perceptron"]()
    approximation = fv.approximate(fv.Probe(net, "gaussian").fisher(x), "nearest-kronecker", rank=2)
    with pytest.raises((RuntimeError, TypeError), match="damping"):
        approximation.sample(fv.FactoredTikhonov(1e-9), 2)


def test_what_is_not_fitted_cannot_be_sampled():
    with pytest.raises(RuntimeError, match="has not been fitted"):
        fv.approximations["kfac"]().sample(1.0, 2)
