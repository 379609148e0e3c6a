"""Every operator × every operation against its dense matrix, built here by hand, in float64."""

import contextlib
import itertools

import numpy as np
import pytest
import torch

from fisherviz.operators import (
    BlockMatrix,
    BlockTridiagonal,
    Dense,
    Diagonal,
    DiagonalKronecker,
    DirectSum,
    Identity,
    Kronecker,
    KroneckerEigen,
    KroneckerSum,
    Permuted,
    SingularMatrixError,
    UnitBlocks,
    Zero,
    inner,
)
from fisherviz.operators.damping import FactoredTikhonov, Tikhonov, damp
from fisherviz.operators.finite import NonFiniteMatrixError
from fisherviz.operators.kronecker_sum import KroneckerDifferenceInverse
from fisherviz.support.peaks import peak_bytes

DA, DG = 4, 3
P = DA * DG


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def spd(n, seed=0, dtype=torch.float64):
    X = normal(n, 2 * n, seed=seed)
    return (X @ X.T / n + 0.5 * torch.eye(n, dtype=torch.float64)).to(dtype)


def orthogonal(n, seed):
    return torch.linalg.qr(normal(n, n, seed=seed))[0]


def kron(G, A):
    return torch.from_numpy(np.kron(G.numpy(), A.numpy()))


def square_cases(dtype=torch.float64):
    """Pairs of an operator and its dense matrix, all P x P, symmetric positive definite."""
    A, G = spd(DA, 1, dtype), spd(DG, 2, dtype)
    A2, G2 = spd(DA, 3, dtype), spd(DG, 4, dtype)
    d = spd(P, 5, dtype).diagonal().clone()
    M = spd(P, 6, dtype)
    B = torch.stack([spd(DA, 7 + o, dtype) for o in range(DG)])
    QA, QG = orthogonal(DA, 11).to(dtype), orthogonal(DG, 12).to(dtype)
    S = 0.2 + normal(DG, DA, seed=13, dtype=dtype).abs()
    Q = kron(QG, QA)
    first, second = spd(8, 14, dtype), spd(2, 15, dtype)
    return {
        "identity": (Identity(P, 2.5, dtype=dtype), 2.5 * torch.eye(P, dtype=dtype)),
        "diagonal": (Diagonal(d), torch.diag(d)),
        "dense": (Dense(M), M),
        "units": (UnitBlocks(B), torch.block_diag(*B)),
        "damped units": (UnitBlocks(B, 0.3), torch.block_diag(*B) + 0.3 * torch.eye(P, dtype=dtype)),
        "kronecker": (Kronecker(A, G), kron(G, A)),
        "over units": (Kronecker.over_units(A, DG), kron(torch.eye(DG, dtype=dtype), A)),
        "diagonal kronecker": (DiagonalKronecker(d[:DA], G), kron(G, torch.diag(d[:DA]))),
        "sum": (KroneckerSum([(A, G), (A2, G2)]), kron(G, A) + kron(G2, A2)),
        "sum of three": (KroneckerSum([(A, G), (A2, G2), (A, G2)]), kron(G, A) + kron(G2, A2) + kron(G2, A)),
        "one-term": (KroneckerSum([(A, G)]), kron(G, A)),
        "difference, inverted": (
            KroneckerDifferenceInverse.from_difference(A, G, 0.3 * A, 0.5 * G),
            torch.linalg.inv(0.85 * kron(G, A)),
        ),
        "eigen": (KroneckerEigen(QA, QG, S), Q @ torch.diag(S.reshape(-1)) @ Q.T),
        "eigen of a diagonal": (
            KroneckerEigen(None, QG, S),
            kron(QG, torch.eye(DA, dtype=dtype)) @ torch.diag(S.reshape(-1)) @ kron(QG, torch.eye(DA, dtype=dtype)).T,
        ),
        "direct": (
            DirectSum([Dense(first), Kronecker(second, second)]),
            torch.block_diag(first, kron(second, second)),
        ),
        "groups": (
            DirectSum([Kronecker(A, G[:1, :1]), Kronecker(A2, G2[:2, :2])]),
            torch.block_diag(kron(G[:1, :1], A), kron(G2[:2, :2], A2)),
        ),
        "pairs": (
            BlockMatrix({(0, 0): Dense(M[:5, :5]), (0, 1): Dense(M[:5, 5:]), (1, 1): Dense(M[5:, 5:])}),
            M,
        ),
        "uncoupled pairs": (
            BlockMatrix({(0, 0): Dense(first), (0, 1): Zero(8, 4, dtype), (1, 1): Kronecker(second, second)}),
            torch.block_diag(first, kron(second, second)),
        ),
        "permuted": (
            Permuted(DirectSum([Dense(first), Kronecker(second, second)]), [[1], [0]]),
            torch.block_diag(kron(second, second), first),
        ),
    }


def block_cases():
    """Off-diagonal blocks: rectangular, or square without symmetry."""
    A, G = normal(4, 2, seed=21), normal(3, 5, seed=22)
    A2, G2 = normal(4, 2, seed=23), normal(3, 5, seed=24)
    R, S = normal(12, 10, seed=25), normal(P, P, seed=26)
    N, O = normal(DA, DA, seed=27), normal(DG, DG, seed=28)
    W, V = normal(2, 4, seed=29), normal(6, 3, seed=30)
    units = normal(DG, DA, DA, seed=31)
    return {
        "dense rectangular": (Dense(R), R),
        "dense square": (Dense(S), S),
        "kronecker rectangular": (Kronecker(A, G), kron(G, A)),
        "kronecker square": (Kronecker(N, O), kron(O, N)),
        "kronecker of rectangular factors, square": (Kronecker(W, V), kron(V, W)),
        "sum rectangular": (KroneckerSum([(A, G), (A2, G2)]), kron(G, A) + kron(G2, A2)),
        "sum of rectangular factors, square": (KroneckerSum([(W, V), (2 * W, V.flip(0))]), kron(V + 2 * V.flip(0), W)),
        "zero rectangular": (Zero(12, 10, torch.float64), torch.zeros(12, 10, dtype=torch.float64)),
        "zero": (Zero(P, P, torch.float64), torch.zeros(P, P, dtype=torch.float64)),
        "direct rectangular": (
            DirectSum([Dense(R), Kronecker(A, G)]),
            torch.block_diag(R, kron(G, A)),
        ),
        "units without symmetry": (UnitBlocks(units), torch.block_diag(*units)),
    }


SQUARE, BLOCKS = square_cases(), block_cases()
ALL = SQUARE | BLOCKS
every = pytest.mark.parametrize(("operator", "dense"), ALL.values(), ids=ALL.keys())
every_square = pytest.mark.parametrize(("operator", "dense"), SQUARE.values(), ids=SQUARE.keys())


@every
def test_shape_and_dense(operator, dense):
    assert operator.shape == tuple(dense.shape)
    assert operator.dtype == torch.float64
    assert operator.device == torch.device("cpu")
    assert operator.bytes == sum(t.numel() * 8 for t in {id(t): t for t in operator.tensors}.values())
    assert f"{dense.shape[0]} x {dense.shape[1]}" in repr(operator)
    torch.testing.assert_close(operator.to_dense(), dense)


@every
@pytest.mark.parametrize("columns", [None, 1, 4])
def test_product(operator, dense, columns):
    v = normal(dense.shape[1], *([] if columns is None else [columns]), seed=50)
    torch.testing.assert_close(operator @ v, dense @ v)


@every
def test_no_columns_give_no_columns(operator, dense):
    assert (operator @ normal(dense.shape[1], 0)).shape == (len(dense), 0)


@every_square
def test_no_columns_have_nothing_to_solve(operator, dense):
    none = normal(len(dense), 0)
    assert operator.solve(none).shape == (len(dense), 0)
    with contextlib.suppress(NotImplementedError):  # a structure without a root
        assert operator.inverse_root(none).shape == (len(dense), 0)


@every
def test_transpose(operator, dense):
    torch.testing.assert_close(operator.T.to_dense(), dense.T)
    v = normal(dense.shape[0], seed=51)
    torch.testing.assert_close(operator.T @ v, dense.T @ v)


@every
def test_frobenius_and_spectral_norm(operator, dense):
    assert operator.norm("fro") == pytest.approx(float(dense.norm()), rel=1e-12)
    assert operator.norm("spectral") == pytest.approx(float(torch.linalg.svdvals(dense)[0]), rel=1e-10)


@every
def test_diagonal_and_trace(operator, dense):
    if dense.shape[0] != dense.shape[1]:
        with pytest.raises(ValueError, match="square"):
            operator.diagonal()
        with pytest.raises(ValueError, match="square"):
            operator.norm("trace")
    else:
        torch.testing.assert_close(operator.diagonal(), dense.diagonal())
        assert operator.norm("trace") == pytest.approx(float(dense.trace()), rel=1e-12)


@every
def test_scale(operator, dense):
    torch.testing.assert_close(operator.scale(-0.3).to_dense(), -0.3 * dense)


@every_square
@pytest.mark.parametrize("damping", [0.7, Tikhonov(0.7)])
def test_damped_adds_the_identity(operator, dense, damping):
    torch.testing.assert_close(operator.damped(damping).to_dense(), dense + 0.7 * torch.eye(P, dtype=torch.float64))


@every_square
def test_no_damping_changes_nothing(operator, dense):
    assert operator.damped(None) is operator
    torch.testing.assert_close(operator.damped(0).to_dense(), dense)


@every_square
@pytest.mark.parametrize("damping", [None, 0.01, 3.0])
def test_inverse_and_solve(operator, dense, damping):
    operator = operator.damped(damping)
    dense = dense + (damping or 0) * torch.eye(P, dtype=torch.float64)
    torch.testing.assert_close(operator.inverse().to_dense(), torch.linalg.inv(dense), rtol=1e-9, atol=1e-10)
    for v in (normal(P, seed=52), normal(P, 3, seed=53)):
        torch.testing.assert_close(operator.solve(v), torch.linalg.solve(dense, v), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(operator.inverse() @ v, torch.linalg.solve(dense, v), rtol=1e-9, atol=1e-10)
    assert operator.direct
    expected = float(torch.linalg.slogdet(dense).logabsdet)
    assert operator.log_determinant() == pytest.approx(expected, rel=1e-10, abs=1e-10)
    assert operator.inverse().log_determinant() == pytest.approx(-expected, rel=1e-10, abs=1e-10)


@pytest.mark.covering
@pytest.mark.parametrize(("x", "y"), list(itertools.product(ALL, ALL)))
def test_inner_product_of_every_pair(x, y):
    (left, dense_left), (right, dense_right) = ALL[x], ALL[y]
    if dense_left.shape != dense_right.shape:
        with pytest.raises(ValueError, match="one shape"):
            inner(left, right)
    else:
        assert inner(left, right) == pytest.approx(float((dense_left * dense_right).sum()), rel=1e-10, abs=1e-10)


def split_cases(d_a, d_g, seed):
    """Square operators of one size, by factors of these sizes, and their dense matrices."""
    a, A, G = 0.1 + normal(d_a, seed=seed).abs(), spd(d_a, seed + 1), spd(d_g, seed + 2)
    QA, QG, S = orthogonal(d_a, seed + 3), orthogonal(d_g, seed + 4), normal(d_g, d_a, seed=seed + 5)
    B, Q, half = normal(d_g, d_a, d_a, seed=seed + 6), kron(QG, QA), kron(QG, torch.eye(d_a, dtype=torch.float64))
    return {
        "kronecker": (Kronecker(A, G), kron(G, A)),
        "diagonal kronecker": (DiagonalKronecker(a, G), kron(G, torch.diag(a))),
        "units": (UnitBlocks(B), torch.block_diag(*B)),
        "damped units": (UnitBlocks(B, 0.3), torch.block_diag(*B) + 0.3 * torch.eye(P, dtype=torch.float64)),
        "eigen": (KroneckerEigen(QA, QG, S), Q @ torch.diag(S.reshape(-1)) @ Q.T),
        "eigen of a diagonal": (KroneckerEigen(None, QG, S), half @ torch.diag(S.reshape(-1)) @ half.T),
    }


@pytest.mark.parametrize("split", [(4, 3), (3, 4), (2, 6), (12, 1), (1, 12)])
def test_an_inner_product_does_not_hang_on_how_both_are_split_into_factors(split):
    left, right = split_cases(4, 3, 100), split_cases(*split, 200)
    for (x, dense_x), (y, dense_y) in itertools.product(left.values(), right.values()):
        for first, second in ((x, y), (y, x)):
            assert inner(first, second) == pytest.approx(float((dense_x * dense_y).sum()), rel=1e-10, abs=1e-10)


EMPTY = {
    "dense": Dense(torch.zeros(0, 0)),
    "diagonal": Diagonal(torch.zeros(0)),
    "identity": Identity(0),
    "units": UnitBlocks(torch.zeros(0, 3, 3)),
    "eigen": KroneckerEigen(torch.eye(3), torch.zeros(0, 0), torch.zeros(0, 3)),
}


@pytest.mark.parametrize("operator", EMPTY.values(), ids=EMPTY.keys())
def test_a_matrix_without_rows_has_no_norm_and_nothing_to_solve(operator):
    assert operator.shape == (0, 0)
    assert [operator.norm(order) for order in ("fro", "spectral", "trace")] == [0, 0, 0]
    assert operator.solve(torch.zeros(0, 2)).shape == (0, 2)
    assert operator.damped(0.1).inverse().to_dense().shape == (0, 0)
    assert operator.damped(0.1).log_determinant() == 0.0


def test_inner_product_of_two_eigenbases():
    """Same structure, different factors: the overlap of the bases must enter the right way round."""
    operators = []
    for seed in (80, 90):
        QA, QG = orthogonal(DA, seed), orthogonal(DG, seed + 1)
        operators.append(KroneckerEigen(QA, QG, normal(DG, DA, seed=seed + 2)))
    first, second = operators
    dense = [kron(op.QG, op.QA) @ torch.diag(op.S.reshape(-1)) @ kron(op.QG, op.QA).T for op in operators]
    assert inner(first, second) == pytest.approx(float((dense[0] * dense[1]).sum()), rel=1e-10)


@pytest.mark.parametrize("name", SQUARE)
def test_float32_stays_float32(name):
    operator, dense = square_cases(torch.float32)[name]
    v = normal(P, 2, seed=54, dtype=torch.float32)
    for result in (
        operator @ v,
        operator.to_dense(),
        operator.diagonal(),
        operator.solve(v),
        operator.inverse().to_dense(),
        operator.damped(0.1).to_dense(),
        operator.scale(2.0).to_dense(),
    ):
        assert result.dtype == torch.float32
    torch.testing.assert_close(operator @ v, dense @ v)
    torch.testing.assert_close(operator.solve(v), torch.linalg.solve(dense, v), rtol=1e-4, atol=1e-4)
    assert operator.norm("spectral") == pytest.approx(float(torch.linalg.svdvals(dense)[0]), rel=1e-5)


def rank_deficient(n, seed, dtype=torch.float64):
    X = normal(n, n - 1, seed=seed)
    return (X @ X.T).to(dtype)


def singular_cases(dtype):
    low, full = rank_deficient(DA, 60, dtype), spd(DG, 61, dtype)
    S = torch.ones(DG, DA, dtype=dtype)
    S[1, 2] = 0
    return {
        "identity": Identity(P, 0.0, dtype=dtype),
        "diagonal": Diagonal(torch.tensor([1.0, 0.0, 2.0], dtype=dtype)),
        "indefinite diagonal": Diagonal(torch.tensor([1.0, -0.5, 2.0], dtype=dtype)),
        "dense": Dense(rank_deficient(P, 62, dtype)),
        "indefinite dense": Dense(torch.diag(torch.tensor([1.0, -0.5, 2.0], dtype=dtype))),
        "units": UnitBlocks(torch.stack([spd(DA, 63, dtype), low])),
        "damped units": UnitBlocks(torch.diag(torch.tensor([1.0, -0.5, 2.0], dtype=dtype)).expand(2, 3, 3), 0.1),
        "kronecker": Kronecker(low, full),
        "kronecker, G": Kronecker(full, low),
        "over units": Kronecker.over_units(low, DG),
        "diagonal kronecker, A": DiagonalKronecker(torch.tensor([1.0, 0.0, 2.0], dtype=dtype), full),
        "indefinite diagonal kronecker, A": DiagonalKronecker(torch.tensor([1.0, -0.5, 2.0], dtype=dtype), full),
        "diagonal kronecker, G": DiagonalKronecker(torch.ones(DA, dtype=dtype), low),
        "sum": KroneckerSum([(low, full), (low, 2 * full)]),
        "eigen": KroneckerEigen(torch.eye(DA, dtype=dtype), torch.eye(DG, dtype=dtype), S),
        "zero": Zero(P, P, dtype),
        "direct": DirectSum([Dense(full), Zero(2, 2, dtype)]),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", singular_cases(torch.float64))
def test_singular_operators_name_the_damping_that_does(name, dtype):
    operator = singular_cases(dtype)[name]
    v = torch.ones(operator.shape[0], dtype=dtype)
    with pytest.raises(SingularMatrixError, match=r"smallest eigenvalue is .*damping of at least"):
        operator.solve(v)
    with pytest.raises(SingularMatrixError) as error:
        operator.inverse()
    assert str(error.value.size) in str(error.value)
    damped = operator.damped(error.value.damping)
    assert torch.isfinite(damped.solve(v)).all()


NAMES = {
    "identity": "the multiple of the identity", "diagonal": "the diagonal matrix", "dense": "the dense matrix",
    "kronecker": "the Kronecker product", "over units": "the Kronecker product", "eigen": "the Kronecker-eigen matrix",
    "diagonal kronecker, A": "the Kronecker product", "zero": "the zero matrix",
    "direct": "block 1: the zero matrix",
}  # fmt: skip


@pytest.mark.parametrize(("name", "words"), NAMES.items())
def test_errors_name_the_matrix_and_its_size(name, words):
    operator = singular_cases(torch.float64)[name]
    size = 2 if name == "direct" else operator.shape[0]
    with pytest.raises(SingularMatrixError, match=rf"^{words} \({size} x {size}\) is not positive definite"):
        operator.inverse()


@pytest.mark.parametrize("name", ["kronecker rectangular", "dense rectangular", "direct rectangular"])
def test_a_rectangular_operator_says_what_needs_a_square_one(name):
    operator = BLOCKS[name][0]
    v = torch.ones(operator.shape[0], dtype=torch.float64)
    for action, call in (
        ("solve", lambda: operator.solve(v)),
        ("trace", lambda: operator.norm("trace")),
        *([] if name == "direct rectangular" else [("diagonal", operator.diagonal)]),
        ("damping", lambda: operator.damped(0.1)),
        ("a root of the inverse", lambda: operator.inverse_root(v)),
    ):
        with pytest.raises(ValueError, match=f"^{action} needs a square operator, this {type(operator).__name__} is"):
            call()


@pytest.mark.parametrize("n", [3, 20, 100])
def test_rank_deficiency_is_seen_whatever_the_rounding(n):
    for seed in range(10):
        with pytest.raises(SingularMatrixError):
            Dense(rank_deficient(n, seed)).inverse()


def test_the_singular_unit_is_named():
    with pytest.raises(SingularMatrixError, match="unit 1 ") as error:
        singular_cases(torch.float64)["units"].inverse()
    assert abs(error.value.smallest) < 1e-12


def test_a_damping_that_the_precision_does_not_hold_is_refused():
    with pytest.raises(NonFiniteMatrixError, match="the block of unit"):
        UnitBlocks(spd(DA, dtype=torch.float32).unsqueeze(0)).damped(1e39).solve(torch.ones(DA))


@pytest.mark.parametrize("trusted", [False, True])
def test_damped_unit_blocks_are_factorised_with_one_copy_and_never_held_beside_it(trusted):
    B = torch.stack([spd(64, seed) for seed in range(32)])
    damped = UnitBlocks(B).damped(0.1)
    damped = damped.trust() if trusted else damped
    assert damped.tensors[0] is B
    v = normal(32 * 64)
    held = B.numel() * B.element_size()
    assert peak_bytes(lambda: damped.solve(v)) < 1.3 * held
    torch.testing.assert_close(B, torch.stack([spd(64, seed) for seed in range(32)]), rtol=0, atol=0)


def test_the_singular_factor_is_named():
    with pytest.raises(SingularMatrixError, match="A factor has the eigenvalue"):
        singular_cases(torch.float64)["kronecker"].inverse()


def test_one_eigendecomposition_serves_every_damping():
    kronecker = SQUARE["kronecker"][0]
    first, second = kronecker.damped(0.1), kronecker.damped(0.2)
    assert first.QA is second.QA
    assert first.QG is second.QG


def test_kronecker_of_factored_damping_stays_kronecker():
    kronecker = SQUARE["kronecker"][0]
    damped = kronecker.damped(FactoredTikhonov(0.3))
    assert isinstance(damped, Kronecker)
    torch.testing.assert_close(damped.to_dense(), kron(damped.G, damped.A))


def test_a_solve_leaves_its_right_hand_side_alone():
    for operator, _ in SQUARE.values():
        v = normal(P, 2, seed=70)
        before = v.clone()
        operator.solve(v)
        assert torch.equal(v, before)


def test_norms_of_a_huge_kronecker_product_form_nothing():
    A, G = spd(400, 1), spd(400, 2)
    kronecker = Kronecker(A, G)  # 25 GB per 1e5 columns if anything dense were made
    assert kronecker.norm("fro") == pytest.approx(float(A.norm() * G.norm()))
    assert kronecker.norm("trace") == pytest.approx(float(A.trace() * G.trace()))
    assert kronecker.norm("spectral") == pytest.approx(
        float(torch.linalg.eigvalsh(A)[-1] * torch.linalg.eigvalsh(G)[-1])
    )
    other = KroneckerEigen(torch.eye(400).double(), torch.eye(400).double(), torch.ones(400, 400).double())
    assert inner(kronecker, other) == pytest.approx(kronecker.norm("trace"))


def test_large_pairs_without_a_rule_are_refused_by_name():
    big = KroneckerEigen(torch.eye(200), torch.eye(100), torch.ones(100, 200))
    other = KroneckerEigen(torch.eye(100), torch.eye(200), torch.ones(200, 100))
    with pytest.raises(MemoryError, match=r"KroneckerEigen and KroneckerEigen.*20000 x 20000"):
        inner(big, other)


@pytest.mark.parametrize(
    ("action", "kind", "message"),
    [
        (lambda: SQUARE["kronecker"][0] @ torch.ones(P + 1).double(), ValueError, "takes"),
        (lambda: SQUARE["kronecker"][0] @ torch.ones(P), TypeError, "float32"),
        (lambda: SQUARE["dense"][0] @ 3.0, TypeError, "tensors"),
        (lambda: BLOCKS["kronecker rectangular"][0].solve(torch.ones(12).double()), ValueError, "square"),
        (lambda: BLOCKS["dense square"][0].inverse(), ValueError, "symmetric"),
        (lambda: BLOCKS["kronecker square"][0].inverse(), ValueError, "symmetric"),
        (lambda: BLOCKS["kronecker square"][0].damped(0.1), ValueError, "symmetric"),
        (lambda: BLOCKS["dense rectangular"][0].damped(0.1), ValueError, "square"),
        (lambda: SQUARE["dense"][0].damped(-1.0), ValueError, "at least 0"),
        (lambda: SQUARE["dense"][0].norm("nuclear"), ValueError, "must be one of"),
        (lambda: Dense(torch.full((2, 2), float("nan"))).inverse(), ValueError, "NaN"),
        (lambda: Dense(torch.ones(2)), ValueError, "matrix"),
        (lambda: Diagonal(torch.ones(2, 2)), ValueError, "vector"),
        (lambda: UnitBlocks(torch.ones(2, 2)), ValueError, "d_out"),
        (lambda: Kronecker(torch.ones(2), torch.ones(2, 2)), ValueError, "two matrices"),
        (lambda: Kronecker(torch.ones(2, 2), torch.ones(2, 2).double()), TypeError, "bring them together"),
        (lambda: KroneckerEigen(torch.eye(2), torch.eye(3), torch.ones(2, 3)), ValueError, "QA"),
        (lambda: DiagonalKronecker(torch.ones(2, 2), torch.eye(3)), ValueError, "a diagonal and a square matrix"),
        (lambda: DiagonalKronecker(torch.ones(2), torch.ones(3, 2)), ValueError, "a diagonal and a square matrix"),
        (
            lambda: KroneckerDifferenceInverse(torch.eye(2), torch.zeros(3), torch.eye(3), torch.zeros(3)),
            ValueError,
            r"not \(2, 2\), \(3,\), \(3, 3\), \(3,\)",
        ),
        (lambda: BlockTridiagonal([spd(2)], [spd(2)], [None], []), ValueError, "1 A, 1 G, 1 A_next and 0 G_next"),
        (
            lambda: BlockTridiagonal([spd(2), spd(3)], [spd(2), spd(1)], [normal(3, 2)], [normal(2, 1)]),
            ValueError,
            r"A_next\[0\] must have its neighbours' shape \(2, 3\), not \(3, 2\)",
        ),
        (
            lambda: BlockTridiagonal([spd(2), spd(3)], [spd(2), spd(1)], [normal(2, 3)], [None]),
            ValueError,
            "must have its neighbours' shape",
        ),
        (lambda: lone_chain().block(0, 1), ValueError, "layer position must be 0 to 0, not 1"),
        (lambda: lone_chain().block(-1, 0), ValueError, "layer position must be 0 to 0, not -1"),
        (lambda: lone_chain().scale(-1.0), ValueError, "positive numbers only, not -1"),
        (lambda: lone_chain().scale(0.0), ValueError, "positive numbers only, not 0"),
        (lambda: lone_chain().damped(0.25), NotImplementedError, r"use FactoredTikhonov\(0.5\)"),
        (lambda: FactoredTikhonov(0.1).factors(normal(2, 3), spd(2)), ValueError, r"A has shape \(2, 3\)"),
        (lambda: FactoredTikhonov(0.1).factors(spd(2), normal(2, 3)), ValueError, r"G has shape \(2, 3\)"),
        (lambda: BLOCKS["sum of rectangular factors, square"][0].damped(0.1), ValueError, r"square factors.*\(2, 4\)"),
        (lambda: KroneckerSum([]), ValueError, "at least one"),
        (
            lambda: KroneckerSum([(torch.eye(2), torch.eye(2)), (torch.eye(3), torch.eye(2))]),
            ValueError,
            "one shape",
        ),
        (lambda: DirectSum([]), ValueError, "at least one"),
        (lambda: DirectSum([Identity(2), Identity(2, dtype=torch.float64)]), TypeError, "one dtype"),
        (lambda: Identity(2, torch.ones(2)), ValueError, "one number"),
    ],
)
def test_bad_input_gets_one_sentence(action, kind, message):
    with pytest.raises(kind, match=message):
        action()


def lone_chain():
    return BlockTridiagonal([spd(2)], [spd(3)], [], [])


def test_a_chain_of_one_layer_is_that_layer():
    dense = kron(spd(3), spd(2))
    assert lone_chain().damped(0.0).to_dense().equal(lone_chain().to_dense())
    torch.testing.assert_close(lone_chain().to_dense(), dense)
    torch.testing.assert_close(lone_chain().solve(normal(6)), torch.linalg.solve(dense, normal(6)))


def chain():
    """A chain over segments 2, 0 with a segment of its own between them, and its dense matrix, blocks by hand."""
    A, G = [spd(2, 30), spd(3, 31)], [spd(2, 32), spd(1, 33)]
    A_next, G_next = 0.2 * normal(2, 3, seed=34), 0.2 * normal(2, 1, seed=35)
    own, cross = spd(3, 36), kron(G_next, A_next)
    parts = DirectSum([BlockTridiagonal(A, G, [A_next], [G_next]), Dense(own)], ["the chain", "segment 1"])
    zero = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    dense = [[kron(G[1], A[1]), zero[0], cross.T], [zero[0], own, zero[1]], [cross, zero[1].T, kron(G[0], A[0])]]
    return Permuted(parts, [[2, 0], [1]]), dense


def test_a_chain_in_another_order_is_its_dense_matrix():
    operator, blocks = chain()
    dense, v = torch.cat([torch.cat(row, 1) for row in blocks]), normal(10, 2, seed=37)
    assert operator.sizes == [3, 3, 4]
    torch.testing.assert_close(operator.to_dense(), dense)
    torch.testing.assert_close(operator @ v, dense @ v)
    torch.testing.assert_close(operator.solve(v), torch.linalg.solve(dense, v))
    torch.testing.assert_close(operator.diagonal(), dense.diagonal())
    torch.testing.assert_close(operator.scale(3.0).to_dense(), 3 * dense)
    torch.testing.assert_close(operator.T.to_dense(), dense)
    torch.testing.assert_close(operator.damped(0.3).to_dense(), dense + 0.3 * torch.eye(10, dtype=torch.float64))
    assert operator.norm("fro") == pytest.approx(float(dense.norm()))
    assert operator.norm("trace") == pytest.approx(float(dense.trace()))
    assert operator.norm("spectral") == pytest.approx(float(torch.linalg.matrix_norm(dense, 2)))
    for i, row in enumerate(blocks):
        for j, block in enumerate(row):
            torch.testing.assert_close(operator.block(i, j).to_dense(), block)


@pytest.mark.parametrize("make", [lambda: chain()[0], lambda: SQUARE["pairs"][0]], ids=["chain", "pairs"])
def test_the_inverse_of_a_coupled_matrix_is_that_of_its_dense_matrix(make):
    operator = make()
    inverse, expected = operator.inverse(), torch.linalg.inv(operator.to_dense())
    v = normal(len(expected), 2, seed=38)
    torch.testing.assert_close(inverse @ v, expected @ v)
    torch.testing.assert_close(inverse.solve(v), operator.to_dense() @ v)
    torch.testing.assert_close(inverse.to_dense(), expected)
    torch.testing.assert_close(inverse.diagonal(), expected.diagonal())
    torch.testing.assert_close(inverse.scale(0.5).to_dense(), expected / 2)
    assert inverse.inverse() is operator
    assert inverse.T is inverse
    assert inverse.shape == operator.shape
    assert inverse.norm("spectral") == pytest.approx(float(torch.linalg.matrix_norm(expected, 2)))
    first = operator.sizes[0]
    torch.testing.assert_close(
        inverse.block(1, 0).to_dense()[: operator.sizes[1]], expected[first:][: operator.sizes[1], :first]
    )
    with pytest.raises(NotImplementedError, match="damp the matrix before inverting it"):
        inverse.damped(0.1)


def test_large_coupled_matrices_are_solved_by_conjugate_gradients(monkeypatch):
    operator, dense = square_cases()["pairs"]
    monkeypatch.setattr("fisherviz.operators.block_matrix.DENSE_SOLVE", 3)
    v = normal(P, 2, seed=39)
    torch.testing.assert_close(operator.solve(v), torch.linalg.solve(dense, v), rtol=1e-6, atol=1e-6)
    assert "_dense" not in operator.__dict__
    assert not operator.direct
    with pytest.raises(NotImplementedError, match="BlockMatrix has no determinant"):
        operator.log_determinant()


def test_errors_of_a_direct_sum_name_the_place():
    singular = DirectSum([Dense(spd(2, 1)), Zero(2, 2, torch.float64)], ["the first", "the second"])
    for action in (
        singular.inverse,
        lambda: singular.solve(torch.ones(4, dtype=torch.float64)),
        singular.scale(2).inverse,
    ):
        with pytest.raises(SingularMatrixError, match=r"^the second: the zero matrix") as error:
            action()
        assert error.value.damping > 0


def test_factored_damping_of_mixed_blocks_is_plain_where_there_are_no_factors():
    A, G, M = spd(DA, 1), spd(DG, 2), spd(4, 3)
    rule = FactoredTikhonov(0.3)
    pi = float((A.trace() / DA).sqrt() / (G.trace() / DG).sqrt())
    eye = [torch.eye(n, dtype=torch.float64) for n in (DA, DG, 4)]
    expected = kron(G + 0.3 / pi * eye[1], A + 0.3 * pi * eye[0]), M + 0.09 * eye[2]
    coupled = BlockMatrix({(0, 0): Kronecker(A, G), (1, 1): Dense(M), (0, 1): Dense(normal(P, 4, seed=4))})
    for operator in (DirectSum([Kronecker(A, G), Dense(M)]), coupled):
        damped = damp(operator, rule)
        for i in range(2):
            torch.testing.assert_close(damped.block(i, i).to_dense(), expected[i])
    torch.testing.assert_close(damped.block(0, 1).to_dense(), coupled.block(0, 1).to_dense())
    assert rule.strength == pytest.approx(0.09)
    assert Tikhonov(0.7).strength == 0.7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: BlockMatrix({(0, 0): Dense(spd(2, 1)), (0, 1): Dense(normal(2, 2))}),
            r"every diagonal block.*\(1, 1\)",
        ),
        (
            lambda: BlockMatrix({(0, 0): Dense(spd(2, 1)), (1, 1): Dense(spd(2, 1)), (1, 0): Dense(spd(2, 1))}),
            r"\(1, 0\)",
        ),
        (lambda: Permuted(DirectSum([Dense(spd(2, 1)), Dense(spd(2, 1))]), [[0], [0]]), "cover every segment once"),
    ],
)
def test_compositions_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
