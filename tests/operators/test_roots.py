"""Roots of inverses, S Sᵀ = M⁻¹, and two Kronecker products in closed form, against dense inverses in float64."""

import pytest
import torch

from fisherviz.operators import (
    BlockMatrix,
    BlockTridiagonal,
    Dense,
    Inverse,
    Kronecker,
    KroneckerDifferenceInverse,
    KroneckerSum,
    Operator,
    SingularMatrixError,
    Zero,
    kronecker_sum,
)
from fisherviz.operators import block_matrix as block_matrix_module
from tests.operators.test_operators import (
    BLOCKS,
    DA,
    DG,
    SQUARE,
    P,
    chain,
    kron,
    normal,
    rank_deficient,
    singular_cases,
    spd,
    square_cases,
)


def root_of(operator):
    """S, column by column of the identity."""
    return operator.inverse_root(torch.eye(operator.shape[0], dtype=torch.float64))


def assert_root(operator, dense):
    S = root_of(operator)
    torch.testing.assert_close(S @ S.T, torch.linalg.inv(dense), rtol=1e-9, atol=1e-10)
    z = normal(len(dense), seed=55)
    torch.testing.assert_close(operator.inverse_root(z), S @ z)


@pytest.mark.parametrize("damping", [None, 0.01, 3.0])
@pytest.mark.parametrize("name", SQUARE)
def test_the_root_times_its_transpose_is_the_inverse(name, damping):
    operator, dense = SQUARE[name]
    assert_root(operator.damped(damping), dense + (damping or 0) * torch.eye(P, dtype=torch.float64))


def test_the_root_of_a_chain_is_made_of_its_conditional_precisions():
    operator, blocks = chain()
    dense = torch.cat([torch.cat(row, 1) for row in blocks])
    assert_root(operator, dense)
    assert_root(operator.damped(0.3), dense + 0.3 * torch.eye(10, dtype=torch.float64))


def test_a_chain_that_breaks_has_a_root_too():
    A, G = [spd(2, 30), spd(3, 31), spd(2, 38)], [spd(2, 32), spd(1, 33), spd(2, 39)]
    A_next, G_next = 0.2 * normal(3, 2, seed=34), 0.2 * normal(1, 2, seed=35)
    operator = BlockTridiagonal(A, G, [None, A_next], [None, G_next])
    cross = kron(G_next, A_next)
    tail = torch.cat([torch.cat([kron(G[1], A[1]), cross], 1), torch.cat([cross.T, kron(G[2], A[2])], 1)])
    assert_root(operator, torch.block_diag(kron(G[0], A[0]), tail))


def test_a_difference_of_kronecker_products_has_roots_on_both_sides():
    A, G = spd(DA, 1), spd(DG, 2)
    operator = KroneckerDifferenceInverse.from_difference(A, G, 0.3 * A, 0.5 * G)
    dense = torch.linalg.inv(kron(G, A) - kron(0.5 * G, 0.3 * A))
    assert_root(operator, dense)
    S = operator.root(torch.eye(P, dtype=torch.float64))
    torch.testing.assert_close(S @ S.T, dense)


@pytest.mark.parametrize("name", SQUARE)
def test_roots_in_float32_stay_float32(name):
    operator, dense = square_cases(torch.float32)[name]
    S = operator.inverse_root(torch.eye(P))
    assert S.dtype == torch.float32
    torch.testing.assert_close(S @ S.T, torch.linalg.inv(dense.double()).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", singular_cases(torch.float64))
def test_singular_operators_have_no_root(name):
    operator = singular_cases(torch.float64)[name]
    with pytest.raises(SingularMatrixError, match="damping of at least"):
        operator.inverse_root(torch.ones(operator.shape[0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("action", "kind", "message"),
    [
        (lambda: BLOCKS["kronecker rectangular"][0].inverse_root(torch.ones(12).double()), ValueError, "square"),
        (lambda: BLOCKS["dense square"][0].inverse_root(torch.ones(P).double()), ValueError, "symmetric"),
        (lambda: SQUARE["dense"][0].inverse_root(torch.ones(P + 1).double()), ValueError, "takes"),
        (lambda: SQUARE["dense"][0].inverse_root(torch.ones(P)), TypeError, "float32"),
        (lambda: Zero(3, 3).inverse_root(torch.ones(3)), SingularMatrixError, "zero matrix"),
        (
            lambda: Inverse(SQUARE["dense"][0], [P], lambda: None).inverse_root(torch.ones(P).double()),
            NotImplementedError,
            "no square root in closed form",
        ),
    ],
)
def test_what_has_no_root_says_so_in_one_sentence(action, kind, message):
    with pytest.raises(kind, match=message):
        action()


def test_coupled_layers_too_large_to_be_dense_have_no_root(monkeypatch):
    monkeypatch.setattr(block_matrix_module, "DENSE_SOLVE", 3)
    M = spd(P, 6)
    coupled = BlockMatrix({(0, 0): Dense(M[:5, :5]), (0, 1): Dense(M[:5, 5:]), (1, 1): Dense(M[5:, 5:])})
    with pytest.raises(NotImplementedError, match="layers stand alone"):
        coupled.inverse_root(torch.ones(P).double())


# ---- A ⊗ B + C ⊗ D ---------------------------------------------------------------------------------------------------


def singular(n, seed):
    """Positive semidefinite, of rank n - 1."""
    return rank_deficient(n, seed)


def antisymmetric(n, seed):
    X = normal(n, n, seed=seed)
    return 0.1 * (X - X.T)


PAIRS = {
    "both definite": ((spd(DA, 1), spd(DG, 2)), (spd(DA, 3), spd(DG, 4))),
    "the second semidefinite": ((spd(DA, 1), spd(DG, 2)), (singular(DA, 3), singular(DG, 4))),
    "the first semidefinite": ((singular(DA, 3), singular(DG, 4)), (spd(DA, 1), spd(DG, 2))),
    "the second subtracted": ((spd(DA, 1), spd(DG, 2)), (0.1 * spd(DA, 3), -0.1 * spd(DG, 4))),
    "plus a multiple of the identity": ((spd(DA, 1), spd(DG, 2)), tuple(0.3 * torch.eye(n).double() for n in (DA, DG))),
}
every_pair = pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS.keys())


@every_pair
def test_two_products_are_inverted_without_a_dense_matrix(pairs, monkeypatch):
    """Appendix B of the K-FAC paper, for either sign."""
    dense = sum(kron(G, A) for A, G in pairs)
    monkeypatch.setattr(kronecker_sum, "DENSE_LIMIT", 0)
    monkeypatch.setattr(kronecker_sum, "cg", None)
    operator = KroneckerSum(list(pairs))
    v = normal(P, 3, seed=50)
    assert operator.direct
    torch.testing.assert_close(operator.solve(v), torch.linalg.solve(dense, v))
    torch.testing.assert_close(operator.inverse().to_dense(), torch.linalg.inv(dense))
    torch.testing.assert_close(operator.inverse().inverse().to_dense(), dense)
    assert operator.log_determinant() == pytest.approx(float(torch.linalg.slogdet(dense).logabsdet), rel=1e-10)
    assert_root(operator, dense)


UNSAFE = {
    "neither definite": ((singular(DA, 1), spd(DG, 2)), (singular(DA, 3), spd(DG, 4))),
    "hardly definite": (
        (spd(DA, 1) * 1e-12 + singular(DA, 1), spd(DG, 2)),
        (spd(DA, 3) * 1e-12 + singular(DA, 3), spd(DG, 4)),
    ),
    "antisymmetric": ((spd(DA, 1), spd(DG, 2)), (antisymmetric(DA, 3), antisymmetric(DG, 4))),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_two_products_that_cannot_be_whitened_safely_are_solved_densely(name):
    pairs = UNSAFE[name]
    dense = sum(kron(G, A) for A, G in pairs)
    v = normal(P, seed=50)
    torch.testing.assert_close(KroneckerSum(list(pairs)).solve(v), torch.linalg.solve(dense, v))


def test_an_indefinite_sum_is_refused_as_a_whole():
    operator = KroneckerSum([(spd(DA, 1), spd(DG, 2)), (5 * spd(DA, 3), -5 * spd(DG, 4))])
    with pytest.raises(SingularMatrixError, match="dense matrix"):
        operator.solve(torch.ones(P).double())


def test_two_large_products_are_solved_in_their_factors():
    """25,000,000,000 entries if anything were formed; the residual is measured by products alone."""
    operator = KroneckerSum([(spd(400, 1), spd(400, 2)), (spd(400, 3), spd(400, 4))])
    v = normal(400 * 400, seed=5)
    assert float((operator @ operator.solve(v) - v).norm() / v.norm()) < 1e-10
    assert isinstance(operator.inverse(), Operator)
    assert isinstance(operator.terms[0], Kronecker)
