"""Entries far from one: sums and iterations stay within a precision's range, solves say what they leave."""

import math
import warnings

import pytest
import torch

from fisherviz.operators import Dense, Diagonal, DirectSum, Kronecker, SingularMatrixError, inner
from fisherviz.operators.damping import BALANCES, FactoredTikhonov
from fisherviz.operators.factorise import eigenvalues
from fisherviz.operators.finite import NonFiniteMatrixError, dot, square_sum
from fisherviz.operators.lanczos import LARGE, cg, extreme_eigenvalues, leading_eigenvector, spectral_norm
from fisherviz.operators.residual import residual_of, tell

every_scale = pytest.mark.parametrize("scale", [1e-30, 1e-22, 1.0, 1e22, 1e30])


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def moment(n, seed=0):
    x = normal(2 * n, n, seed=seed)
    return torch.maximum(x.T @ x, (x.T @ x).T) / n


@every_scale
def test_sums_of_products_do_not_leave_the_range(scale):
    x = normal(7, 5) * scale
    right = x.double().square().sum()
    assert dot(x, x) == pytest.approx(float(right), rel=1e-12, abs=0)
    assert square_sum(x) == pytest.approx(float(right), rel=1e-12, abs=0)
    M = Dense(moment(5) * scale)
    for partner in (M, Diagonal(M.M.diagonal().clone()), Kronecker(M.M, torch.eye(1))):
        expected = float((M.M.double() * partner.to_dense().double()).sum())
        assert inner(M, partner) == pytest.approx(expected, rel=1e-12, abs=0)


@every_scale
@pytest.mark.parametrize("size", [20, 90])
def test_extreme_eigenvalues_scale_with_the_matrix(scale, size):
    M = moment(size) * scale
    right = torch.linalg.eigvalsh(M.double())[-2:].flip(0)
    found = extreme_eigenvalues(lambda v: M @ v, size, 2, dtype=torch.float32)
    torch.testing.assert_close(found.double() / right, torch.ones(2).double(), rtol=1e-4, atol=0)


@every_scale
@pytest.mark.parametrize("shape", [(20, 30), (100, 80)])
def test_a_spectral_norm_scales_with_the_matrix(scale, shape):
    M = normal(*shape) * scale
    found = spectral_norm(lambda v: M @ v, lambda v: M.T @ v, shape, dtype=torch.float32)
    assert found == pytest.approx(float(torch.linalg.svdvals(M.double())[0]), rel=1e-4, abs=0)


@every_scale
def test_a_leading_eigenvector_does_not_hang_on_the_scale(scale):
    M = moment(30) * scale
    found = leading_eigenvector(lambda v: M @ v, normal(30, seed=1) * scale, 1e-5).double()
    right = torch.linalg.eigh(M.double())[1][:, -1]
    assert abs(float(found @ right)) == pytest.approx(1, rel=1e-4)


@every_scale
def test_conjugate_gradients_solve_for_small_and_large_right_hand_sides(scale):
    M = moment(40) + torch.eye(40)
    b = torch.stack([normal(40), normal(40, seed=1) * scale, torch.zeros(40)], 1)
    x = cg(lambda v: M @ v, b).double()
    right = torch.linalg.solve(M.double(), b.double())
    for k in range(2):
        assert float((x[:, k] - right[:, k]).norm()) <= 1e-3 * float(right[:, k].norm())
    assert not x[:, 2].any()


def test_conjugate_gradients_keep_a_tolerance_or_say_so():
    """In float32 the residual of the recursion falls on where the true one has stopped."""
    turn = torch.linalg.qr(normal(200, 200, dtype=torch.float64))[0]
    M = ((turn * torch.logspace(-5, 0, 200, dtype=torch.float64)) @ turn.T).float()
    M, b = torch.maximum(M, M.T), normal(200, seed=2)
    with pytest.raises(RuntimeError, match=r"relative residual .* above 1\.0e-06"):
        cg(lambda v: M @ v, b, tol=1e-6)
    try:
        x = cg(lambda v: M @ v, b)
    except RuntimeError as error:
        assert "did not converge" in str(error)  # noqa: PT017 — a kernel's rounding decides which
    else:
        assert float((M @ x - b).norm()) <= 1.1 * LARGE * float(b.norm())


@pytest.mark.parametrize("pi", BALANCES)
@pytest.mark.parametrize("which", ["A", "G"])
def test_factored_damping_of_a_factor_that_overflows_is_refused_by_name(which, pi):
    fine, over = torch.eye(2), torch.full((2, 2), math.inf)
    A, G = (over, fine) if which == "A" else (fine, over)
    with pytest.raises(NonFiniteMatrixError, match="NaN or infinite"):
        FactoredTikhonov(0.1, pi).factors(A, G)


def test_factored_damping_of_the_largest_finite_factors_works():
    """The trace of entries of 3e38 is beyond float32."""
    G = torch.eye(4) * 3e38
    A, damped = FactoredTikhonov(1.0).factors(torch.eye(3), G)
    assert A.isfinite().all()
    assert damped.isfinite().all()


@pytest.mark.parametrize(
    "ask",
    [
        lambda: eigenvalues(torch.full((3, 3), math.nan)),
        lambda: Diagonal(torch.tensor([1.0, math.nan])).solve(torch.ones(2)),
        lambda: Dense(torch.full((3, 3), math.inf)).norm("spectral"),
        lambda: Kronecker(torch.eye(2) * 1e30, torch.diag(torch.tensor([1e30, 0.0]))).solve(torch.ones(4)),
    ],
)
def test_what_is_not_finite_is_told_in_a_sentence(ask):
    with pytest.raises(NonFiniteMatrixError, match=r"holds NaN or infinite entries; look at .*\.$"):
        ask()


# ---- what a solve leaves ------------------------------------------------------------------------


def near_singular(n, least, seed=0):
    turn = torch.linalg.qr(normal(n, n, seed=seed, dtype=torch.float64))[0]
    M = ((turn * torch.logspace(math.log10(least), 0, n, dtype=torch.float64)) @ turn.T).float()
    return torch.maximum(M, M.T)


@pytest.mark.parametrize("n", [4, 30, 120])
@pytest.mark.parametrize("least", [1e-2, 1e-4, 3e-6, 1e-6, 1e-7])
def test_a_solve_is_near_or_warned_of_or_refused(n, least):
    outcomes = set()
    for seed in range(3):
        M = near_singular(n, least, seed)
        operator = DirectSum([Dense(M)], ["layer 'x'"])
        v = normal(n, seed=seed + 9)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                x = operator.solve(v)
            except SingularMatrixError as error:
                assert "layer 'x'" in str(error)  # noqa: PT017 — one of three right ends
                outcomes.add("refused")
                continue
        if said:
            assert "layer 'x': a " in str(said[0].message)
            assert said[0].filename == __file__
            outcomes.add("warned")
            continue
        assert float((M.double() @ x.double() - v.double()).norm()) <= 1.5 * LARGE * float(v.norm())
        outcomes.add("near")
    if least >= 1e-4:
        assert outcomes == {"near"}


@pytest.mark.parametrize("seed", range(4))
def test_the_damping_that_a_warning_names_leaves_little(seed):
    M = Dense(near_singular(60, 1e-6, seed))
    with pytest.warns(UserWarning, match=r"of the block in float32 leaves 0\.5 of its right-hand side") as said:
        tell(0.5, "the block", torch.float32, M.norm)
    named = float(str(said[0].message).split("at least ")[1].split(",")[0])
    v = normal(60, seed=seed)
    damped = M.damped(named)
    assert residual_of(damped @ damped.solve(v).unsqueeze(1), v.unsqueeze(1)) <= LARGE


@every_scale
def test_a_residual_does_not_hang_on_the_scale(scale):
    v = normal(6, 2)
    assert residual_of(0.9 * v * scale, v * scale) == pytest.approx(0.1, rel=1e-5)
    assert residual_of(torch.zeros(3, 1), torch.zeros(3, 1)) == 0


def test_a_trusted_solve_makes_no_further_product(monkeypatch):
    operator = Dense(moment(5)).trust()
    monkeypatch.setattr(Dense, "_matmul", lambda *given: pytest.fail("optimizers' steps would pay for it"))
    operator.solve(normal(5))
