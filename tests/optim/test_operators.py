"""What the optimizers' speed rests on: products of low rank, A ⊗ I without I, trusted Cholesky factors, Woodbury."""

import sys

import pytest
import torch

from fisherviz import optim
from fisherviz.approximations.example_units import ExampleUnits
from fisherviz.capture.captures import Capture
from fisherviz.capture.tokens import TokenCapture
from fisherviz.operators import Kronecker, SingularMatrixError, inner
from fisherviz.operators.factorise import trusted_cholesky
from fisherviz.operators.triangular import solve_rows
from tests.oracles.steps import assert_same, data, eye, loss_backward, matrices, moved, net


def spd(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(2 * n, n, generator=generator, dtype=torch.float64)
    return X.T @ X / (2 * n) + 0.1 * eye(n)


@pytest.mark.parametrize("n", [5, 300, 513, 700])
def test_trusted_cholesky_has_the_lower_factor_below(n):
    A = spd(n)
    assert torch.allclose(trusted_cholesky(A, "A").tril(), torch.linalg.cholesky(A), atol=1e-12)
    rows = torch.randn(3, n, dtype=torch.float64)
    assert torch.allclose(solve_rows(trusted_cholesky(A, "A"), rows), torch.linalg.solve(A, rows.T).T, atol=1e-10)


@pytest.mark.parametrize("n", [5, 700])
def test_trusted_cholesky_still_says_what_is_singular(n):
    A = spd(n)
    A[-1] = A[:, -1] = 0
    A[-1, -1] = -1.0
    with pytest.raises(SingularMatrixError, match="not positive definite"):
        trusted_cholesky(A, "the A factor")
    with pytest.raises(ValueError, match="NaN"):
        trusted_cholesky(A * torch.nan, "the A factor")


def test_a_kronecker_product_over_units_is_the_one_with_the_identity():
    A = spd(4)
    short, full = Kronecker.over_units(A, 3), Kronecker(A, eye(3))
    v = torch.randn(12, 2, dtype=torch.float64)
    assert short.shape == full.shape
    assert short.bytes < full.bytes
    for one, two in (
        (short.to_dense(), full.to_dense()),
        (short @ v, full @ v),
        (short.T @ v, full.T @ v),
        (short.solve(v), full.solve(v)),
        (short.solve(v[:, 0]), full.solve(v[:, 0])),
        (short.damped(0.3).to_dense(), full.damped(0.3).to_dense()),
        (short.inverse().to_dense(), full.inverse().to_dense()),
        (short.scale(2.0).to_dense(), full.scale(2.0).to_dense()),
        (short.diagonal(), full.diagonal()),
    ):
        assert torch.allclose(one, two, atol=1e-12)
    assert isinstance(short.damped(0.3), Kronecker)
    assert inner(short, full) == pytest.approx(inner(full, full))


@pytest.mark.parametrize("rows", [2, 9])
def test_low_rank_products_are_the_dense_ones(rows):
    a, g = torch.randn(rows, 4, dtype=torch.float64), torch.randn(rows, 3, dtype=torch.float64)
    v = (g.T @ a).reshape(-1)
    for op in (Kronecker(spd(4), spd(3, 1)), Kronecker.over_units(spd(4), 3)):
        for (right, left), expected in ((op.act_rows(a, g), op @ v), (op.solve_rows(a, g), op.solve(v))):
            assert torch.allclose((left.T @ right).reshape(-1), expected, atol=1e-12)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


SHOWN = {  # captures of two examples and two vectors, with more and fewer rows than fan-in
    "one position": lambda wide: Capture(normal(2, 1, 6 if wide else 1), normal(2, 2, 1, 4)),
    "positions": lambda wide: Capture(normal(2, 3, 6 if wide else 2), normal(2, 2, 3, 4)),
    "groups": lambda wide: Capture(normal(2, 3, 2, 6 if wide else 2), normal(2, 2, 3, 2, 2)),
    "tokens": lambda wide: TokenCapture(
        torch.tensor([[0, 1, 1], [1, 2, 0]]), torch.ones(2, 3).double(), normal(2, 2, 3, 4), 6 if wide else 3
    ),
}


@pytest.mark.parametrize("entries", [2**26, 1, 40])
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("name", SHOWN)
def test_unit_blocks_in_example_space_are_the_blocks(name, wide, entries, monkeypatch):
    monkeypatch.setattr(sys.modules[ExampleUnits.__module__], "_ENTRIES", entries)
    torch.manual_seed(0)
    capture = SHOWN[name](wide)
    op = ExampleUnits(capture, 0.5).scale(2.0).shifted(1e-3)
    rows = capture.gradients.flatten(0, 1).unflatten(1, (4, -1))  # (K N, units, da)
    blocks = torch.einsum("roi,roj->oij", rows, rows)
    dense = torch.block_diag(*blocks) + 1e-3 * torch.eye(capture.size, dtype=torch.float64)
    v = normal(len(dense), 2)
    assert torch.allclose(op.to_dense(), dense)
    assert torch.allclose(op @ v, dense @ v, atol=1e-10)
    assert torch.allclose(op.solve(v), torch.linalg.solve(dense, v), rtol=1e-6)
    assert torch.allclose(op.diagonal(), dense.diagonal())
    assert op.log_determinant() == pytest.approx(float(torch.linalg.slogdet(dense).logabsdet), rel=1e-8)
    assert op.norm("fro") == pytest.approx(float(dense.norm()))
    assert op.norm("trace") == pytest.approx(float(dense.trace()))
    assert op.norm("spectral") == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]))
    if wide:
        with pytest.raises(SingularMatrixError):
            ExampleUnits(capture, 1.0).solve(v)


def test_woodbury_keeps_its_digits_in_float32_at_small_damping():
    directions = []
    for dtype in (torch.float64, torch.float32):
        model = net().to(dtype)
        opt = optim.SubsampledNaturalGradient(
            model, "categorical", fisher_data="same", lr=1e-4, damping=1e-5, kind="exact"
        )
        x, y = data(40)
        before = matrices(model)
        loss_backward(opt, model, x.to(dtype), y)
        opt.step()
        directions.append([d.double() for d in moved(before, matrices(model))])
    assert_same(directions[1], directions[0], 2e-2)
