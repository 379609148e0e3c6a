"""Tikhonov and factored Tikhonov damping: equation 7 of Martens & Grosse 2015, written out by hand."""

import math

import pytest
import torch

from fisherviz.operators import (
    Dense,
    Diagonal,
    DirectSum,
    Identity,
    Kronecker,
    KroneckerSum,
    UnitBlocks,
    Zero,
)
from fisherviz.operators.damping import FactoredTikhonov, Tikhonov, as_damping

A = torch.tensor([[2.0, 0.5, 0.0], [0.5, 3.0, 0.1], [0.0, 0.1, 1.0]], dtype=torch.float64)
G = torch.tensor([[0.04, 0.01], [0.01, 0.02]], dtype=torch.float64)


def test_factors_follow_equation_7():
    pi = math.sqrt((6.0 / 3) / (0.06 / 2))
    damped_a, damped_g = FactoredTikhonov(0.1).factors(A, G)
    torch.testing.assert_close(damped_a, A + pi * 0.1 * torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(damped_g, G + 0.1 / pi * torch.eye(2, dtype=torch.float64))


def test_factored_damping_differs_from_tikhonov_by_the_paper_s_residual():
    gamma = 0.1
    pi = math.sqrt((6.0 / 3) / (0.06 / 2))
    eye_a, eye_g = torch.eye(3, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    factored = Kronecker(A, G).damped(FactoredTikhonov(gamma)).to_dense()
    plain = Kronecker(A, G).damped(Tikhonov(gamma**2)).to_dense()
    residual = pi * gamma * torch.kron(G, eye_a) + gamma / pi * torch.kron(eye_g, A)
    torch.testing.assert_close(factored - plain, residual)


@pytest.mark.parametrize("norm", ["trace-norm", "frobenius-norm", "spectral-norm"])
@pytest.mark.parametrize("diagonal", [False, True])
def test_pi_is_the_ratio_of_a_norm_of_both_products_with_identities(norm, diagonal):
    kinds = {"trace-norm": "nuc", "frobenius-norm": "fro", "spectral-norm": 2}
    whole = torch.diag(A.diagonal()) if diagonal else A
    products = torch.kron(torch.eye(2).double(), whole), torch.kron(G, torch.eye(3).double())
    left, right = (float(torch.linalg.matrix_norm(product, kinds[norm])) for product in products)
    found = FactoredTikhonov(0.1, norm).balance(whole.diagonal() if diagonal else whole, G)
    assert found == pytest.approx(math.sqrt(left / right), rel=1e-12)


def test_pi_of_bare_traces_is_that_of_foof_s_equation_3():
    damped_a, damped_g = FactoredTikhonov(0.1, "traces").factors(A, G)
    added_a, added_g = (damped_a - A).trace() / 3, (damped_g - G).trace() / 2
    assert float(added_a / added_g) == pytest.approx(float(A.trace() / G.trace()))
    assert float(added_a * added_g) == pytest.approx(0.1**2)


def test_pi_may_be_a_number():
    damped_a, damped_g = FactoredTikhonov(0.1, pi=2).factors(A, G)
    torch.testing.assert_close(damped_a, A + 0.2 * torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(damped_g, G + 0.05 * torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("pi", "message"),
    [("trace_norm", "did you mean 'trace-norm'"), ("x", "pi must be one of trace-norm, frobenius-norm"),
     (0.0, "pi must be a positive number"), (None, "pi must be a positive number")],
)  # fmt: skip
def test_no_other_pi_is_taken(pi, message):
    with pytest.raises(ValueError, match=message):
        FactoredTikhonov(0.1, pi)


@pytest.mark.parametrize("dead", ["A", "G", "both"])
def test_a_dead_layer_takes_pi_one(dead):
    a = torch.zeros_like(A) if dead in ("A", "both") else A
    g = torch.zeros_like(G) if dead in ("G", "both") else G
    damped_a, damped_g = FactoredTikhonov(0.1).factors(a, g)
    torch.testing.assert_close(damped_a, a + 0.1 * torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(damped_g, g + 0.1 * torch.eye(2, dtype=torch.float64))


def test_vanishing_factors_neither_overflow_nor_become_nan():
    damped_a, damped_g = FactoredTikhonov(1e-3).factors(A.float(), 1e-30 * G.float())
    assert torch.isfinite(damped_a).all()
    assert torch.isfinite(damped_g).all()
    assert damped_a.dtype == torch.float32


def test_a_direct_sum_is_damped_group_by_group():
    groups = [Kronecker(A, G), Kronecker(5 * A, G)]
    damped = DirectSum(groups).damped(FactoredTikhonov(0.1))
    expected = torch.block_diag(*[op.damped(FactoredTikhonov(0.1)).to_dense() for op in groups])
    torch.testing.assert_close(damped.to_dense(), expected)
    torch.testing.assert_close(FactoredTikhonov(0.1).applied_to(DirectSum(groups)).to_dense(), expected)


@pytest.mark.parametrize(
    "operator",
    [
        Dense(A),
        Diagonal(torch.ones(3)),
        Identity(3),
        UnitBlocks(torch.ones(2, 3, 3)),
        KroneckerSum([(A, G), (A, G)]),
        Kronecker(A, G).damped(0.1),
        Zero(3, 3),
        DirectSum([Kronecker(A, G), Dense(A)]),
    ],
    ids=lambda operator: type(operator).__name__,
)
def test_what_has_no_two_factors_refuses_factored_damping(operator):
    with pytest.raises(TypeError, match="has none; use Tikhonov"):
        operator.damped(FactoredTikhonov(0.1))


def test_numbers_become_tikhonov():
    assert as_damping(0.5) == Tikhonov(0.5)
    assert as_damping(torch.tensor(0.5)) == Tikhonov(0.5)
    assert as_damping(0) == Tikhonov(0.0)
    assert as_damping(None) is None
    factored = FactoredTikhonov(0.1)
    assert as_damping(factored) is factored
    assert factored.tikhonov == Tikhonov(0.1**2)


@pytest.mark.parametrize("kind", [Tikhonov, FactoredTikhonov, as_damping])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (-1.0, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        ("0.1", TypeError),
        (True, TypeError),
    ],
)
def test_bad_dampings_are_refused(kind, value, error):
    with pytest.raises(error, match="must be a"):
        kind(value)


def test_dampings_are_immutable():
    with pytest.raises(AttributeError):
        Tikhonov(0.1).value = 0.2


@pytest.mark.parametrize(
    ("damping", "said"),
    [
        (Tikhonov(0.25), "λ = 0.25"),
        (FactoredTikhonov(0.5), "λ = 0.25, factored"),
        (FactoredTikhonov(0.5, "traces"), "λ = 0.25, factored, π traces"),
        (FactoredTikhonov(0.5, 1), "λ = 0.25, factored, π = 1"),
    ],
)
def test_a_damping_says_its_strength_and_how_it_is_shared(damping, said):
    assert str(damping) == said
