"""Lanczos and conjugate gradients against dense factorisations, in the cases that break naive versions."""

import pytest
import torch

from fisherviz.operators import cg, extreme_eigenvalues, spectral_norm
from fisherviz.operators.lanczos import NotSolvedError, leading_eigenvector, log_quadratures

F64 = torch.float64


def symmetric(values, seed=0):
    values = torch.as_tensor(values, dtype=F64)
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=F64))[0]
    return Q @ torch.diag(values) @ Q.T


def counting(M):
    calls = []

    def product(v):
        calls.append(v.shape)
        return M @ v

    return product, calls


SPECTRA = {
    "decaying": [0.8**i for i in range(200)],
    "indefinite": torch.linspace(-3, 2, 150),
    "rank three": [5.0, 4.0, 3.0] + [0.0] * 147,
    "repeated": [2.0, 2.0, 2.0] + [1.0] * 100 + [0.5] * 47,
    "clustered": [1 - 1e-4 * i for i in range(120)],
    "identity": [1.0] * 100,
    "zero": [0.0] * 100,
    "tiny": [1e-12 / (1 + i) for i in range(100)],
    "small matrix": [3.0, -4.0, 1.0, 0.0, 2.0],
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("k", [1, 3, 5])
def test_extreme_eigenvalues(name, k):
    M = symmetric(SPECTRA[name])
    values = torch.linalg.eigvalsh(M)
    slack = 1e-8 * float(values.abs().max()) + 1e-30
    found = extreme_eigenvalues(lambda v: M @ v, len(M), k)
    torch.testing.assert_close(found, values.flip(0)[:k], rtol=0, atol=slack)
    found = extreme_eigenvalues(lambda v: M @ v, len(M), k, which="smallest")
    torch.testing.assert_close(found, values[:k], rtol=0, atol=slack)
    found = extreme_eigenvalues(lambda v: M @ v, len(M), k, which="magnitude")
    torch.testing.assert_close(found.abs(), values.abs().sort(descending=True)[0][:k], rtol=0, atol=slack)


def test_restarts_keep_memory_bounded_and_the_answer_right():
    values = torch.cat([torch.linspace(0, 1, 1999), torch.tensor([1.0005])]).to(F64)
    product, calls = counting(torch.diag(values))
    found = extreme_eigenvalues(product, 2000, 1)
    assert float(found[0]) == pytest.approx(float(values[-1]), rel=1e-8)
    assert len(calls) > 101  # the basis of 101 vectors was full at least once


def test_far_fewer_products_than_rows():
    product, calls = counting(symmetric(SPECTRA["decaying"]))
    extreme_eigenvalues(product, 200, 1)
    assert len(calls) < 40


def test_the_same_question_gets_the_same_answer_and_no_global_random_number_is_used():
    M = symmetric(SPECTRA["decaying"])
    state = torch.random.get_rng_state()
    first = extreme_eigenvalues(lambda v: M @ v, 200, 2)
    torch.manual_seed(17)
    assert torch.equal(first, extreme_eigenvalues(lambda v: M @ v, 200, 2))
    torch.random.set_rng_state(state)
    extreme_eigenvalues(lambda v: M @ v, 200, 2)
    assert torch.equal(state, torch.random.get_rng_state())


def test_more_eigenvalues_than_rows_are_all_of_them():
    M = symmetric(torch.linspace(1, 2, 70))
    torch.testing.assert_close(extreme_eigenvalues(lambda v: M @ v, 70, 90), torch.linalg.eigvalsh(M).flip(0))


@pytest.mark.parametrize("shape", [(150, 90), (90, 150), (100, 100), (7, 3), (300, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_spectral_norm(shape, dtype):
    M = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    expected = float(torch.linalg.svdvals(M)[0])
    M = M.to(dtype)
    found = spectral_norm(lambda v: M @ v, lambda v: M.T @ v, shape, dtype=dtype)
    assert found == pytest.approx(expected, rel=1e-8 if dtype == F64 else 1e-4)


def test_lanczos_in_float32():
    M = symmetric(SPECTRA["decaying"]).float()
    found = extreme_eigenvalues(lambda v: M @ v, 200, 3, dtype=torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([1.0, 0.8, 0.64]), rtol=1e-5, atol=1e-5)


def test_lanczos_that_does_not_converge_raises():
    M = torch.diag(torch.linspace(0, 1, 2000, dtype=F64))
    with pytest.raises(RuntimeError, match=r"did not converge.*raise maxiter or tol"):
        extreme_eigenvalues(lambda v: M @ v, 2000, 1, maxiter=5)


@pytest.mark.parametrize("columns", [None, 1, 4])
def test_cg_solves(columns):
    M = symmetric(torch.linspace(0.01, 3, 80))
    b = torch.randn(80, *([] if columns is None else [columns]), generator=torch.Generator().manual_seed(2), dtype=F64)
    torch.testing.assert_close(cg(lambda v: M @ v, b, tol=1e-12), torch.linalg.solve(M, b), rtol=1e-8, atol=1e-8)


def test_cg_leaves_zero_and_easy_columns_alone():
    M = symmetric(torch.linspace(0.01, 3, 80))
    b = torch.zeros(80, 3, dtype=F64)
    b[:, 1] = torch.linalg.eigh(M)[1][:, 0]  # found in one step
    b[:, 2] = 1.0
    torch.testing.assert_close(cg(lambda v: M @ v, b, tol=1e-12), torch.linalg.solve(M, b), rtol=1e-8, atol=1e-8)


def test_a_preconditioner_saves_products():
    M = symmetric([10.0**-i for i in range(5)] * 8)
    plain, plain_calls = counting(M)
    helped, helped_calls = counting(M)
    b = torch.ones(40, dtype=F64)
    cg(plain, b)
    cg(helped, b, preconditioner=lambda v: torch.linalg.solve(M, v))
    assert len(helped_calls) < len(plain_calls)


def test_cg_says_why_it_stops():
    M = symmetric(torch.logspace(-6, 0, 80))
    b = torch.ones(80, dtype=F64)
    with pytest.raises(RuntimeError, match=r"did not converge: relative residual"):
        cg(lambda v: M @ v, b, maxiter=3)
    with pytest.raises(RuntimeError, match="not positive definite"):
        cg(lambda v: -M @ v, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "values", [torch.linspace(0.01, 3, 300), [1e4, 1e3, 5.0] + [1.0] * 200, [2.0, 3.0, 7.0], [2.5]]
)
def test_log_quadratures(values, dtype):
    M = symmetric(values)
    lam, Q = torch.linalg.eigh(M)
    z = torch.randn(len(M), 3, generator=torch.Generator().manual_seed(2), dtype=F64)
    product, calls = counting(M.to(dtype))
    found = log_quadratures(product, z.to(dtype))
    torch.testing.assert_close(found, ((Q.T @ z).square() * lam.log()[:, None]).sum(0), rtol=1e-3, atol=1e-3)
    assert len(calls) < 100


def test_log_quadratures_say_why_they_stop():
    M, z = torch.diag(torch.logspace(-6, 0, 500, dtype=F64)), torch.ones(500, 1, dtype=F64)
    with pytest.raises(RuntimeError, match=r"did not converge: relative change"):
        log_quadratures(lambda v: M @ v, z, maxiter=25)
    with pytest.raises(RuntimeError, match="not positive definite; add damping"):
        log_quadratures(lambda v: -(M @ v), z)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: extreme_eigenvalues(lambda v: v, 5, which="best"), "must be one of"),
        (lambda: extreme_eigenvalues(lambda v: v, 0), "at least 1"),
        (lambda: extreme_eigenvalues(lambda v: v, 5, 0), "at least 1"),
        (lambda: extreme_eigenvalues(lambda v: v * float("nan"), 500), "NaN"),
        (lambda: cg(lambda v: v * float("inf"), torch.ones(5)), "NaN or infinity"),
    ],
)
def test_bad_input_gets_one_sentence(action, message):
    with pytest.raises(ValueError, match=message):
        action()


@pytest.mark.parametrize("kept", [40, 4])
def test_a_leading_eigenvector_also_after_starting_again(kept, monkeypatch):
    monkeypatch.setattr("fisherviz.operators.lanczos._SINGLE", kept)
    generator = torch.Generator().manual_seed(0)
    M = symmetric(torch.linspace(0, 1, 60).square())
    top = torch.linalg.eigh(M)[1][:, -1]
    start = torch.randn(60, generator=generator, dtype=torch.float64)
    found = leading_eigenvector(lambda v: M @ v, start, 1e-10)
    assert float((found @ top).abs()) == pytest.approx(1, abs=1e-12)
    with pytest.raises(RuntimeError, match=r"did not find the leading eigenvector to 1\.0e-10 in 3 products"):
        leading_eigenvector(lambda v: M @ v, start, 1e-10, 3)


def test_the_leading_eigenvector_of_zero_is_the_start():
    start = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert torch.allclose(leading_eigenvector(torch.zeros_like, start, 1e-10), start / 5)


@pytest.mark.parametrize("shape", [(0,), (0, 2)])
def test_conjugate_gradients_of_nothing_are_nothing(shape):
    assert cg(lambda v: v, torch.zeros(shape, dtype=torch.float64)).shape == shape


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_conjugate_gradients_keep_what_is_no_number_to_its_column(value):
    M, b = torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64)), torch.ones(5, 3, dtype=torch.float64)
    b[2, 1] = value
    x = cg(lambda v: M @ v, b)
    torch.testing.assert_close(x[:, [0, 2]], torch.linalg.solve(M, b[:, [0, 2]]))
    assert bool(x[:, 1].isnan().all())


def test_conjugate_gradients_do_not_take_a_tolerance_that_is_no_number_for_reached():
    with pytest.raises(NotSolvedError):
        cg(lambda v: 2 * v, torch.ones(5, dtype=torch.float64), tol=float("nan"))
