"""What Cholesky factors are read for: determinants, solves of rows, roots of inverses."""

from __future__ import annotations

import torch
from torch import Tensor


def log_determinant_of(factor: Tensor) -> float:
    """Log determinant of L Lᵀ, or the sum of a batch's, in float64.

    Args:
        factor: (..., n, n) lower Cholesky factor L.

    Returns:
        2 Σ log L_ii.
    """
    return 2 * float(factor.diagonal(dim1=-2, dim2=-1).double().log().sum())


def solve_columns(factor: Tensor, v: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ v by two triangular solves; torch's `cholesky_solve` copies the factor each time.

    Args:
        factor: (..., n, n) lower Cholesky factor L.
        v: (..., n, k).

    Returns:
        (..., n, k).
    """
    return root_solve(factor, torch.linalg.solve_triangular(factor, v, upper=False))


def solve_rows(factor: Tensor, rows: Tensor) -> Tensor:
    """Rows times the inverse of L Lᵀ, without turning the rows into columns.

    Args:
        factor: (n, n) lower Cholesky factor L.
        rows: (R, n).

    Returns:
        (R, n), rows (L Lᵀ)⁻¹.
    """
    half = torch.linalg.solve_triangular(factor.mT, rows, upper=True, left=False)
    return torch.linalg.solve_triangular(factor, half, upper=False, left=False)


def root_solve(factor: Tensor, z: Tensor) -> Tensor:
    """L⁻ᵀ z, whose covariance is (L Lᵀ)⁻¹ for white z.

    Args:
        factor: (..., n, n) lower Cholesky factor L.
        z: (..., n, k).

    Returns:
        (..., n, k).
    """
    return torch.linalg.solve_triangular(factor.mT, z, upper=True)
