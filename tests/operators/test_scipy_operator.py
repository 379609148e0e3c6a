"""scipy's solvers on a Fisher and its approximations, held to dense algebra on a brute-force matrix."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator, cg, eigsh

import fisherviz as fv
from tests.oracles import exact, laws, nets
from tests.oracles.checks import assert_matches

LAMBDA = 0.2


def made():
    net = nets.randomised(nets.mlp(3, 5, 2))
    x = nets.vectors(6, 3)
    return fv.Probe(net, "gaussian").fisher(x), np.asarray(exact.fisher(net, x, laws.Gaussian()))


def test_eigsh_finds_the_largest_eigenvalues_of_the_fisher():
    fisher, F = made()
    values, vectors = eigsh(fisher.to_scipy(), k=3, v0=np.ones(len(F)))
    assert_matches(values, np.linalg.eigvalsh(F)[-3:])
    assert_matches(F @ vectors, vectors * values, 1e-8)


def test_cg_solves_with_the_fisher_preconditioned_by_an_approximation():
    fisher, F = made()
    right = np.random.default_rng(0).normal(size=len(F))
    damped = fisher.to_scipy() + LAMBDA * aslinearoperator(np.eye(len(F)))
    kfac = fv.approximate(fisher, "kfac").inverse(LAMBDA).to_scipy()
    found, left = cg(damped, right, rtol=1e-12, M=kfac)
    assert left == 0
    assert_matches(found, np.linalg.solve(F + LAMBDA * np.eye(len(F)), right), 1e-8)


@pytest.mark.parametrize("method", fv.approximations)
def test_every_approximation_is_a_linear_operator(method):
    fisher, _ = made()
    approximation = fv.approximate(fisher, method)
    operator, dense = approximation.to_scipy(), approximation.to_dense().numpy()
    v = np.asfortranarray(np.random.default_rng(0).normal(size=(len(dense), 4)))[:, ::2]  # no view that torch takes
    assert isinstance(operator, LinearOperator)
    assert operator.shape == dense.shape
    assert_matches(operator @ v, dense @ v)
    assert_matches(operator @ v[:, 0], dense @ v[:, 0])
    assert_matches(operator.H @ v, dense @ v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_numbers_are_the_models_or_float32_in_half_precision(dtype):
    net = nets.mlp(3, 5, 2).to(dtype)
    fisher = fv.Probe(net, "gaussian").fisher(torch.ones(2, 3, dtype=dtype))
    expected = np.float64 if dtype == torch.float64 else np.float32
    for matrix in (fisher, fv.approximate(fisher, "kfac")):
        operator = matrix.to_scipy()
        assert operator.dtype == expected
        assert (operator @ np.ones(operator.shape[0])).dtype == expected
