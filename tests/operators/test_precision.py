"""Symmetry, singularity and sizes of one: what may not depend on a CPU's kernels, a precision or a shape."""

import ast
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.capture.captures import Capture
from fisherviz.operators import BlockTridiagonal, Dense, Kronecker, KroneckerEigen, SingularMatrixError, UnitBlocks
from fisherviz.operators.factorise import DampedCholesky, eigh, trusted_cholesky
from fisherviz.operators.finite import NonFiniteMatrixError
from fisherviz.statistics.products import block, gram, weighted_moments

PACKAGE = Path(__file__).parents[2] / "fisherviz"
PRECISIONS = [torch.float32, torch.float64]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- one module factorises -------------------------------------------------------------------------------------------

FACTORISATIONS = {"cholesky", "cholesky_ex", "eigh", "eigvalsh"}


def test_only_one_module_factorises():
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if name.startswith("torch.linalg.") and name.split(".")[2] in FACTORISATIONS:
                found.add(path.relative_to(PACKAGE).as_posix())
    assert found == {"operators/factorise.py"}


# ---- symmetric bit for bit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("rows", [3, 100, 700])
@pytest.mark.parametrize("width", [1, 2, 5, 10, 33, 128, 257, 600])
def test_second_moments_are_symmetric(width, rows, dtype):
    x = normal(rows, width, dtype=dtype)
    expected = x.double().numpy().T @ x.double().numpy()
    total = gram(x)
    twice = gram(x, total.clone())
    for found, reference in ((total, expected), (twice, 2 * expected), (gram(torch.stack([x, x]))[1], expected)):
        assert torch.equal(found, found.mT)
        np.testing.assert_allclose(found.double(), reference, atol=8 * torch.finfo(dtype).eps * rows * 16, rtol=0)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("width", [1, 3, 10, 40])
def test_blocks_and_weighted_moments_are_symmetric(width, dtype):
    single = Capture(normal(50, 1, width, dtype=dtype), normal(2, 50, 1, 4, seed=1, dtype=dtype))
    units = weighted_moments(single.a[:, 0], single.g[:, :, 0].square().sum(0))
    assert torch.equal(units, units.mT)
    shared = Capture(normal(20, 3, width, dtype=dtype), normal(2, 20, 3, 4, seed=1, dtype=dtype))
    statistic = fv.statistics.UnitBlocks("layer")
    for M in (block(single, single), block(shared, shared), statistic.contribution(shared)):
        assert torch.equal(M, M.mT)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_operators_write_out_symmetric_matrices(dtype):
    A, G = gram(normal(30, 10, dtype=dtype)), gram(normal(30, 5, seed=1, dtype=dtype))
    cross = [normal(10, 10, seed=2, dtype=dtype)], [normal(5, 5, seed=3, dtype=dtype)]
    chain = BlockTridiagonal([A, A], [G, G], *cross)
    for M in (
        Kronecker(A, G).to_dense(),
        Kronecker(A, G).eigen.to_dense(),
        KroneckerEigen(*(eigh(M, "a factor")[1] for M in (A, G)), normal(5, 10, seed=4, dtype=dtype)).to_dense(),
        chain.covariances[0].to_dense(),
        chain.damped(fv.FactoredTikhonov(3.0)).inverse_dense(),
    ):
        assert torch.equal(M, M.mT)


def test_a_moment_is_judged_by_the_precision_that_it_was_computed_in():
    """Two triangles that differ by float32's rounding: no reason to refuse, whatever precision the work is done in."""
    A, G = gram(normal(40, 8, dtype=torch.float32)), gram(normal(40, 3, seed=1, dtype=torch.float32))
    uneven = A * (1 + 1e-6 * torch.triu(torch.ones_like(A), 1))
    chain = BlockTridiagonal([A, uneven], [G, G], [0.1 * A], [0.1 * G])
    assert torch.isfinite(chain.solve(torch.ones(48))).all()
    with pytest.raises(ValueError, match="not symmetric"):
        eigh(uneven.double(), "a moment that float64 would never make")


@pytest.mark.parametrize("kind", ["mc", "exact"])
@pytest.mark.parametrize("seed", range(5))
def test_tridiagonal_approximations_of_float32_networks_solve(seed, kind):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 10))
    fisher = fv.Probe(net, "categorical").fisher((torch.randn(200, 20), torch.randint(10, (200,))), kind=kind)
    approximation = fv.approximate(fisher, "kfac-tridiagonal")
    v = torch.ones(fisher.shape[0])
    solved = approximation.solve(v, fv.FactoredTikhonov(0.1))
    assert float((approximation.damped(fv.FactoredTikhonov(0.1)) @ solved - v).norm()) < 1e-3 * float(v.norm())


# ---- singular matrices -----------------------------------------------------------------------------------------------


def singular_moment(kind, size, seed, dtype):
    """A second moment without full rank: of few rows, of dependent or repeated columns, of a softmax's scores."""
    if kind == "few rows":
        x = normal(size - 1, size, seed=seed)
    elif kind == "softmax":
        p = torch.softmax(2 * normal(50, size, seed=seed), 1).to(dtype)
        x = (torch.diag_embed(p.sqrt()) - p.unsqueeze(2) * p.sqrt().unsqueeze(1)).mT.reshape(-1, size)
    else:
        x = normal(3 * size, size, seed=seed)
        x = (x + 2).relu() if kind == "dependent" else x
        x[:, 0] = x[:, 1:].mean(1) if kind == "dependent" else x[:, -1]
    x = x.to(dtype)
    return gram(x) / len(x)


@pytest.mark.covering
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("kind", ["few rows", "dependent", "repeated", "softmax"])
@pytest.mark.parametrize("size", [2, 3, 5, 10, 30, 100, 200])
def test_singular_systems_are_refused_and_the_advised_damping_solves_them(kind, size, dtype):
    for seed in range(20 if size <= 30 else 5):
        M = singular_moment(kind, size, seed, dtype)
        v = normal(size, seed=seed + 1, dtype=dtype)
        for make in (Dense, lambda M: UnitBlocks(M[None])):
            with pytest.raises(SingularMatrixError, match=rf"{size} x {size}.*smallest eigenvalue") as error:
                make(M).solve(v)
        with pytest.raises(SingularMatrixError):
            DampedCholesky(M, 0.0, "the matrix")
        damping = error.value.damping
        damped = M.double() + damping * torch.eye(size, dtype=torch.float64)
        residual = float((damped @ Dense(M).damped(damping).solve(v).double() - v).norm())
        assert residual < 0.2 * float(v.norm())
        assert damping < 1e5 * torch.finfo(dtype).eps * float(M.diagonal().max())


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_the_floor_grows_with_the_size(dtype):
    """Activations that share a mean: the least eigenvalue of 500 x 500 is ten units of rounding, not four."""
    for seed in range(12):
        M = singular_moment("dependent", 500, seed, dtype)
        for refuse in (lambda: Dense(M).solve(M[0]), lambda: DampedCholesky(M, 0.0, "the matrix")):  # noqa: B023
            with pytest.raises(SingularMatrixError):
                refuse()


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_chain_with_a_singular_moment_is_refused(dtype):
    """The scores of a softmax sum to zero: a solve without damping once gave 2e18."""
    for seed in range(10):
        G = singular_moment("softmax", 10, seed, dtype)
        first = gram(normal(60, 4, seed=seed, dtype=dtype)) / 60
        A = [gram(normal(60, d, seed=seed + d, dtype=dtype)) / 60 for d in (6, 5)]
        chain = BlockTridiagonal(A, [first, G], [A[0][:, :5] * 0.1], [G[:4] * 0.1])
        with pytest.raises(SingularMatrixError, match="G factor"):
            chain.solve(torch.ones(74, dtype=dtype))


def test_positive_definite_matrices_down_to_the_floor_are_solved():
    """Refusing everything would pass the tests above: a matrix a hundred times above its rounding is solved."""
    for size in (2, 10, 50, 200):
        Q, _ = torch.linalg.qr(normal(size, size))
        M = (Q * torch.logspace(-12, 0, size, dtype=torch.float64)) @ Q.T
        M, x = (M + M.T) / 2, normal(size, seed=1)
        found = Dense(M).solve(M @ x)
        assert float((M @ found - M @ x).norm()) < 1e-12 * size**0.5


@pytest.mark.parametrize("method", ["kfac", "kfac-tridiagonal", "layer"])
def test_the_error_keeps_its_class_and_names_the_layer(method):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    fisher = fv.Probe(net, "categorical").fisher(torch.randn(30, 3).double())
    with pytest.raises(SingularMatrixError, match=r"layer.*'2'.*smallest eigenvalue") as error:
        fv.approximate(fisher, method).solve(torch.ones(fisher.shape[0]).double())
    assert error.value.damping > 0
    assert error.value.size > 1


@pytest.mark.parametrize("unit", [1.0, 1 / 300, 7.0])
def test_errors_are_stated_in_the_callers_units(unit):
    """F = unit U Uᵀ with a Gram matrix of rank 5: eigenvalues and dampings are those of F."""
    x = normal(5, 12)
    M = x.T @ x
    with pytest.raises(SingularMatrixError) as plain:
        DampedCholesky(M, 0.0, "M")
    with pytest.raises(SingularMatrixError) as error:
        DampedCholesky(M, 0.0, "M", unit)
    assert error.value.smallest == pytest.approx(unit * plain.value.smallest, rel=1e-6, abs=0)
    assert unit / 10 < error.value.damping / plain.value.damping < 10 * unit
    v = normal(12, 1, seed=1)
    solved = DampedCholesky(M, error.value.damping / unit, "M", unit).solve(v)
    damped = M + error.value.damping / unit * torch.eye(12, dtype=torch.float64)
    assert float((damped @ solved - v).norm()) < 0.1 * float(v.norm())


# ---- sizes of one ----------------------------------------------------------------------------------------------------

NARROW = {
    "one output": (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), (3,)),
    "no bias": (nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 1, bias=False)), (3,)),
    "one hidden unit": (nn.Sequential(nn.Linear(3, 1, bias=False), nn.Tanh(), nn.Linear(1, 4, bias=False)), (3,)),
    "bottleneck": (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Tanh(), nn.Linear(1, 4)), (3,)),
    "one channel": (nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Flatten(), nn.Linear(9, 1)), (1, 3, 3)),
    "one weight": (nn.Sequential(nn.Linear(1, 1, bias=False)), (1,)),
}


@pytest.mark.covering
@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", NARROW)
def test_sizes_of_one(name, dtype, kind):
    """Every approximation writes itself out in every order, and its product says the same."""
    model, shape = NARROW[name]
    model = model.to(dtype)
    x = normal(8, *shape, dtype=dtype)
    fisher = fv.Probe(model, "gaussian").fisher(x, torch.ones_like(model(x)), kind=kind)
    space = fisher.space
    v = normal(space.size, seed=1, dtype=dtype)
    for method in fv.approximations:
        approximation = fv.approximate(fisher, method)
        dense = approximation.to_dense()
        scale = max(float(dense.abs().max()), 1e-30)
        torch.testing.assert_close(approximation @ v, dense @ v, atol=2e-5 * scale * space.size, rtol=0)
        for order in ("unit", "input"):
            index = space.permutation(order)
            torch.testing.assert_close(approximation.to_dense(order), dense[index][:, index], atol=0, rtol=0)
        for row in range(len(space.layers)):
            for col in range(len(space.layers)):
                assert approximation.block(row, col).shape == (space.sizes[row], space.sizes[col])
        if method != "kfac-tridiagonal":
            solved = approximation.damped(1.0) @ approximation.solve(v, 1.0)
            torch.testing.assert_close(solved, v, atol=1e-3 * (1 + scale), rtol=0)


# ---- half precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["layer", "cw-ngd", "kfac", "kfac-full", "ekfac", "nearest-kronecker"])
def test_operators_of_half_precision_models_are_float32(method, dtype):
    """A first layer too large to be held dense beside a small one, both in the precision of sums over examples."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(80, 60), nn.Tanh(), nn.Linear(60, 3)).to(dtype)
    fisher = fv.Probe(net, "categorical").fisher(torch.randn(10, 80).to(dtype))
    approximation = fv.approximate(fisher, method)
    assert {operator.dtype for operator in approximation.matrix.operators} == {torch.float32}
    v = torch.ones(fisher.shape[0], dtype=dtype)
    damped = approximation.damped(0.1) if method != "kfac-full" else approximation.damped(fv.FactoredTikhonov(0.3))
    product = damped @ v
    assert product.dtype == dtype
    if method != "kfac-full":
        assert float((damped.solve(product) - v).float().norm()) < 0.1 * float(v.float().norm())


@pytest.mark.parametrize("place", [(0, 0), (0, 1)])
@pytest.mark.parametrize("factorise", [partial(DampedCholesky, damping=0.1), eigh])
def test_a_matrix_that_is_not_finite_is_told_as_such(factorise, place):
    M = torch.eye(3)
    M[place] = M.T[place] = math.nan
    with pytest.raises(NonFiniteMatrixError, match="the matrix holds NaN or infinite entries"):
        factorise(M, what="the matrix")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_damped_moment_that_breaks_down_all_the_same_is_no_factor(dtype):
    matrices = torch.stack([torch.eye(3, dtype=dtype), torch.diag(torch.tensor([1.0, -1.0, 1.0], dtype=dtype))])
    with pytest.raises(SingularMatrixError, match="the moment"):
        trusted_cholesky(matrices, "the moment")
    assert torch.equal(trusted_cholesky(matrices[0], "the moment"), torch.eye(3, dtype=dtype))


def test_an_eigendecomposition_that_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    matrix = torch.eye(200)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    monkeypatch.setattr(fv.config, "memory_budget", 4 * 200**2 * 8 - 1)
    with pytest.raises(MemoryError, match="the eigendecomposition of the A factor, 200 rows, takes"):
        eigh(matrix, "the A factor")
