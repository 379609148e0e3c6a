"""Unit blocks that are never formed against the dense matrix of per-example gradients, in every way to solve them."""

from dataclasses import replace

import pytest
import torch

from fisherviz.approximations import example_units
from fisherviz.approximations.example_units import ExampleUnits
from fisherviz.operators import SingularMatrixError
from tests.captures import capture, tied, tokens, written_out
from tests.oracles.checks import assert_matches

F64 = torch.float64
MADE = {
    "one position": lambda n: capture(examples=n),
    "positions": lambda n: capture(examples=n, positions=2),
    "groups": lambda n: capture(examples=n, positions=2, groups=3),
    "tokens": lambda n: tokens(examples=n, vectors=1),
    "a table that is a weight too": lambda n: tied(False, examples=n, vectors=1),
    "a weight that is a table too": lambda n: tied(True, examples=n, vectors=1),
}
every_capture = pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())
few_or_many = pytest.mark.parametrize("examples", [1, 20])
"""Solved over the rows, or over the width."""


def dense(made, factor, shift):
    """Unit blocks of s Jᵀ J, and what is added to them."""
    J = written_out(made.to(F64))
    whole = (factor * J.T @ J).view(-1, made.width, J.shape[1] // made.width, made.width)
    blocks = [whole[unit, :, unit] for unit in range(len(whole))]
    return torch.block_diag(*blocks) + shift * torch.eye(J.shape[1], dtype=F64)


@pytest.fixture(autouse=True, params=[2**26, 1], ids=["all units", "one by one"])
def entries(request, monkeypatch):
    monkeypatch.setattr(example_units, "_ENTRIES", request.param)


@every_capture
@few_or_many
def test_every_operation_is_that_of_the_dense_matrix(make, examples):
    made = make(examples)
    operator, expected = ExampleUnits(made, 0.3, 0.05), dense(made, 0.3, 0.05)
    v = torch.randn(len(expected), 3, dtype=F64)
    assert_matches(operator.to_dense(), expected, 1e-12)
    assert_matches(operator.diagonal(), expected.diagonal(), 1e-12)
    assert_matches(operator @ v, expected @ v, 1e-12)
    assert_matches(operator.solve(v), torch.linalg.solve(expected, v), 1e-9)
    assert_matches(operator.inverse().to_dense(), torch.linalg.inv(expected), 1e-9)
    assert operator.log_determinant() == pytest.approx(float(torch.linalg.slogdet(expected).logabsdet), rel=1e-9)
    S = operator.inverse_root(torch.eye(len(expected), dtype=F64))
    assert_matches(S @ S.T, torch.linalg.inv(expected), 1e-9)
    assert operator.norm("trace") == pytest.approx(float(expected.trace()), rel=1e-12)
    assert operator.norm("fro") == pytest.approx(float(expected.norm()), rel=1e-12)
    assert operator.norm("spectral") == pytest.approx(float(torch.linalg.matrix_norm(expected, 2)), rel=1e-9)
    assert operator.square_sum() == pytest.approx(float(dense(made, 1.0, 0.0).square().sum()), rel=1e-12)
    assert_matches(operator.scale(2.0).to_dense(), 2 * expected, 1e-12)
    assert_matches(operator.damped(0.1).to_dense(), dense(made, 0.3, 0.15), 1e-12)


@every_capture
@pytest.mark.parametrize("relative", [1e-1, 1e-4, 1e-7])
def test_a_small_damping_does_not_drown_in_single_precision(make, relative):
    """Beside blocks of very different size, of which some are rounded far below the damping and others are not."""
    made = make(20)
    size = float(dense(made, 0.3, 0.0).diagonal().max())
    single = made.to(torch.float32)
    operator, expected = ExampleUnits(single, 0.3, relative * size), dense(single, 0.3, relative * size)
    v = torch.randn(len(expected), 2)
    found, right = operator.solve(v).double(), torch.linalg.solve(expected, v.double())
    assert found.isfinite().all()
    assert float((found - right).norm() / right.norm()) < 0.01
    assert operator.log_determinant() == pytest.approx(float(torch.linalg.slogdet(expected).logabsdet), rel=1e-3)


@every_capture
def test_undamped_blocks_of_fewer_rows_than_columns_are_refused(make):
    operator = ExampleUnits(make(1), 0.3)
    with pytest.raises(SingularMatrixError, match="damping of at least"):
        operator.solve(torch.ones(operator.shape[0], dtype=F64))


WIDE = {
    "one position": capture(examples=100, da=120),
    "positions": capture(examples=100, positions=2, vectors=1, da=120),
    "groups": capture(examples=100, positions=2, groups=3, vectors=1, da=120),
    "tokens": tokens(examples=100, vectors=1, vocabulary=120),
}


@pytest.mark.parametrize("made", WIDE.values(), ids=WIDE.keys())
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_wide_units_are_solved_for_by_products_alone(made, dtype, monkeypatch):
    expected = dense(made, 0.3, 0.0)
    shift = 3 * float(expected.diagonal().max())
    expected += shift * torch.eye(len(expected), dtype=F64)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *_: pytest.fail("a block was factorised"))
    v = torch.randn(len(expected), generator=torch.Generator().manual_seed(0), dtype=F64).to(dtype)
    found = ExampleUnits(made.to(dtype), 0.3, shift).solve(v)
    right = torch.linalg.solve(dense(made.to(dtype).to(F64), 0.3, shift), v.double())
    assert float((found.double() - right).norm() / right.norm()) < {torch.float32: 3e-7, F64: 1e-10}[dtype]


@pytest.mark.parametrize("made", WIDE.values(), ids=WIDE.keys())
def test_wide_units_that_products_do_not_solve_are_factorised(made):
    expected = dense(made, 0.3, 1e-6)
    v = torch.randn(len(expected), generator=torch.Generator().manual_seed(0), dtype=F64)
    assert_matches(ExampleUnits(made, 0.3, 1e-6).solve(v), torch.linalg.solve(expected, v), 1e-7)


def test_a_factorisation_that_is_there_is_used(monkeypatch):
    operator = ExampleUnits(WIDE["positions"], 0.3, 1.0)
    operator.log_determinant()
    monkeypatch.setattr(example_units, "cg", lambda *_: pytest.fail("products were taken"))
    if example_units._ENTRIES > 1:  # one by one nothing is kept
        operator.solve(torch.ones(operator.shape[0], dtype=F64))


def test_an_error_that_is_not_of_conjugate_gradients_is_not_swallowed(monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(example_units, "cg", fails)
    with pytest.raises(torch.OutOfMemoryError):
        ExampleUnits(WIDE["positions"], 0.3, 1.0).solve(torch.ones(WIDE["positions"].size, dtype=F64))


@pytest.mark.parametrize("made", WIDE.values(), ids=WIDE.keys())
def test_gradients_that_are_no_numbers_are_refused_by_products_too(made):
    """A residual that has no bound is not one that has been reached: zeros came back."""
    g = made.g.clone()
    g.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        ExampleUnits(replace(made, g=g), 0.3, 1.0).solve(torch.ones(made.size, dtype=F64))
