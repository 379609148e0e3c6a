"""Theorem 1 and corollary 3 of Martens & Grosse 2015 as properties of what the package computes.

A transformed network uses weights Phi_i^-1 W_i Omega_{i-1}^-1 and activations Omega_i phi(Phi_i s): the same
function with other coordinates. Undamped K-FAC updates must be the same step in both.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fisherviz as fv
from tests.oracles import kronecker, laws, nets, order, trace
from tests.oracles.checks import assert_matches

quickly = settings(max_examples=5, deadline=None, derandomize=True)
seeds = st.integers(0, 10**6)


class Matrix(nn.Module):
    """Multiply rows by a fixed matrix, with or without a homogeneous coordinate."""

    def __init__(self, M):
        super().__init__()
        self.register_buffer("M", M)

    def forward(self, x):
        return x @ self.M.T


class Homogeneous(nn.Module):
    """Append the 1 that takes the bias's part, so that Omega may mix it with the activities."""

    def forward(self, x):
        return torch.cat([x, torch.ones_like(x[:, :1])], 1)


WIDTHS = (2, 3, 2)


def default_network(generator):
    """Linear layers without bias on inputs that carry the 1 themselves."""
    modules = []
    for d_in, d_out in pairwise(WIDTHS):
        modules += [Homogeneous(), nn.Linear(d_in + 1, d_out, bias=False), nn.Tanh()]
    net = nn.Sequential(*modules[:-1]).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return net


def well_conditioned(size, generator):
    """A random matrix with singular values between 1/2 and 2."""
    U, _, Vt = torch.linalg.svd(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return U @ torch.diag(2 ** (2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1)) @ Vt


def gradient(net, x, y):
    loss = 0.5 * (net(x) - y).square().sum(1).mean()
    return torch.autograd.grad(loss, list(net.parameters()))


def step(net, x, y, method):
    """The undamped natural-gradient step of an approximation, one matrix per layer."""
    fisher = fv.Probe(net, "gaussian").fisher(x)
    flat = torch.cat([g.reshape(-1) for g in gradient(net, x, y)])
    delta = -fv.approximate(fisher, method).solve(flat)
    sizes = [p.numel() for p in net.parameters()]
    return [d.reshape(p.shape) for d, p in zip(delta.split(sizes), net.parameters(), strict=True)]


@quickly
@given(seed=seeds)
def test_theorem_1_kfac_takes_the_same_step_in_transformed_coordinates(seed):
    generator = torch.Generator().manual_seed(seed)
    net = default_network(generator)
    x = torch.randn(15, WIDTHS[0], generator=generator, dtype=torch.float64)
    y = torch.randn(15, WIDTHS[-1], generator=generator, dtype=torch.float64)
    Omegas = [well_conditioned(d + 1, generator) for d in WIDTHS[:-1]]
    Phis = [well_conditioned(d, generator) for d in WIDTHS[1:]]
    other = fv.models.transformed(net, Omegas, Phis)
    assert_matches(other(x), net(x), 1e-10)
    here, there = step(net, x, y, "kfac"), step(other, x, y, "kfac")
    for delta, delta_dagger, Omega, Phi in zip(here, there, Omegas, Phis, strict=True):
        assert_matches(Phi @ delta_dagger @ Omega, delta, 1e-6)


@quickly
@given(seed=seeds)
def test_theorem_1_both_matrices_transform_with_the_jacobian(seed):
    """F^dagger = J^T F J for the block-diagonal, the Khatri-Rao and the tridiagonal matrix (appendix D)."""
    generator = torch.Generator().manual_seed(seed)
    net = default_network(generator)
    x = torch.randn(15, WIDTHS[0], generator=generator, dtype=torch.float64)
    Omegas = [well_conditioned(d + 1, generator) for d in WIDTHS[:-1]]
    Phis = [well_conditioned(d, generator) for d in WIDTHS[1:]]
    other = fv.models.transformed(net, Omegas, Phis)
    blocks = [torch.kron(Phi, Omega.T.contiguous()) for Omega, Phi in zip(Omegas, Phis, strict=True)]
    J = torch.block_diag(*blocks)
    here, there = (fv.Probe(n, "gaussian").fisher(x) for n in (net, other))
    assert_matches(there.to_dense(), J.T @ here.to_dense() @ J, 1e-8)
    for method in ("kfac", "kfac-full", "kfac-tridiagonal"):
        original = fv.approximate(here, method).to_dense()
        assert_matches(fv.approximate(there, method).to_dense(), J.T @ original @ J, 1e-6)


def whitening(net, x):
    """Omega_i = A^-1/2 and Phi_i = G^-1/2 of the default network, from the oracle."""
    moments = trace.moments(net, x, laws.Gaussian())
    A, G = kronecker.factors(moments)

    def root(M):
        values, Q = np.linalg.eigh(M)
        return torch.from_numpy(Q @ np.diag(values**-0.5) @ Q.T)

    count = len(moments[0][1])
    return [root(A[i, i]) for i in range(count)], [root(G[i, i]) for i in range(count)]


@quickly
@given(seed=seeds)
def test_corollary_3_kfac_is_gradient_descent_in_the_whitened_network(seed):
    generator = torch.Generator().manual_seed(seed)
    net = default_network(generator)
    x = torch.randn(15, WIDTHS[0], generator=generator, dtype=torch.float64)
    y = torch.randn(15, WIDTHS[-1], generator=generator, dtype=torch.float64)
    Omegas, Phis = whitening(net, x)
    other = fv.models.transformed(net, Omegas, Phis)
    white = fv.approximate(fv.Probe(other, "gaussian").fisher(x), "kfac").to_dense()
    assert_matches(white, np.eye(len(white)), 1e-6)
    here = step(net, x, y, "kfac")
    for delta, g, Omega, Phi in zip(here, gradient(other, x, y), Omegas, Phis, strict=True):
        assert_matches(Phi @ -g @ Omega, delta, 1e-6)


@quickly
@given(seed=seeds, gamma=st.floats(0.01, 1.0))
def test_logistic_and_hyperbolic_tangent_differ_by_a_transformation_only(seed, gamma):
    """The remark after corollary 2: sigmoid(s) = (tanh(s / 2) + 1) / 2, so both take the same step."""
    generator = torch.Generator().manual_seed(seed)
    tanh = nets.mlp(2, 3, 2)
    with torch.no_grad():
        for p in tanh.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    logistic = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        logistic[0].weight.copy_(2 * tanh[0].weight)
        logistic[0].bias.copy_(2 * tanh[0].bias)
        logistic[2].weight.copy_(2 * tanh[2].weight)
        logistic[2].bias.copy_(tanh[2].bias - tanh[2].weight.sum(1))
    x = torch.randn(15, 2, generator=generator, dtype=torch.float64)
    y = torch.randn(15, 2, generator=generator, dtype=torch.float64)
    assert_matches(logistic(x), tanh(x), 1e-10)
    dW, db, dV, dc = step(tanh, x, y, "kfac")
    eW, eb, eV, ec = step(logistic, x, y, "kfac")
    assert_matches(eW, 2 * dW, 1e-6)
    assert_matches(eb, 2 * db, 1e-6)
    assert_matches(eV, 2 * dV, 1e-6)
    assert_matches(ec, dc - dV.sum(1), 1e-6)


@quickly
@given(seed=seeds)
def test_exact_natural_gradient_is_invariant_too(seed):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 2)).double()
    x = torch.randn(9, 2, generator=generator, dtype=torch.float64)
    v = torch.randn(6, generator=generator, dtype=torch.float64)
    M = well_conditioned(2, generator)
    other = nn.Sequential(nn.Linear(2, 2), Matrix(M)).double()
    here, there = fv.Probe(net, "gaussian").fisher(x), fv.Probe(other, "gaussian").fisher(x)
    J = torch.block_diag(torch.kron(M, torch.eye(2).double()), M)
    assert_matches(J @ there.solve(J.T @ v, 0.0), here.solve(v, 0.0), 1e-7)


@pytest.mark.parametrize("method", ["diagonal", "cw-ngd"])
def test_methods_without_the_property_are_told_apart(method):
    """The check has teeth: a diagonal or unit-wise step does change with the coordinates."""
    generator = torch.Generator().manual_seed(0)
    net = default_network(generator)
    x = torch.randn(15, WIDTHS[0], generator=generator, dtype=torch.float64)
    y = torch.randn(15, WIDTHS[-1], generator=generator, dtype=torch.float64)
    Omegas = [well_conditioned(d + 1, generator) for d in WIDTHS[:-1]]
    Phis = [well_conditioned(d, generator) for d in WIDTHS[1:]]
    other = fv.models.transformed(net, Omegas, Phis)
    here, there = step(net, x, y, method), step(other, x, y, method)
    assert any(
        torch.linalg.norm(Phi @ b @ Omega - a) > 1e-2 * torch.linalg.norm(a)
        for a, b, Omega, Phi in zip(here, there, Omegas, Phis, strict=True)
    )


@quickly
@given(seed=seeds)
def test_kfac_step_is_the_two_sided_solve_of_the_factors(seed):
    """U = G^-1 V A^-1 (section 4.2), with factors from the oracle."""
    generator = torch.Generator().manual_seed(seed)
    net = default_network(generator)
    x = torch.randn(15, WIDTHS[0], generator=generator, dtype=torch.float64)
    y = torch.randn(15, WIDTHS[-1], generator=generator, dtype=torch.float64)
    A, G = kronecker.factors(trace.moments(net, x, laws.Gaussian()))
    for i, (delta, g) in enumerate(zip(step(net, x, y, "kfac"), gradient(net, x, y), strict=True)):
        expected = -np.linalg.solve(G[i, i], g.numpy()) @ np.linalg.inv(A[i, i])
        assert_matches(delta, expected, 1e-6)
    assert order.layer_sizes(trace.layers_of(net)) == [9, 8]
