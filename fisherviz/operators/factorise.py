"""Guarded factorisations of symmetric positive matrices: Cholesky, and the sentence for when it fails.

Every solve of the package goes through here; others rely on `SingularMatrixError` carrying the size, the
smallest eigenvalue and a damping that would do, so that they can put the layer's name in front.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DENSE_LIMIT = 200_000_000
"""Entries above which no operator is made dense behind the caller's back."""


class SingularMatrixError(RuntimeError):
    """A matrix that had to be positive definite is not.

    Args:
        what: the matrix in words ("the A factor").
        size: its number of rows.
        smallest: its smallest eigenvalue.
        damping: a Tikhonov damping with which the factorisation succeeds.
        why: an optional clause on the cause.
    """

    def __init__(self, what: str, size: int, smallest: float, damping: float, why: str = "") -> None:
        """Compose the sentence and keep the figures as attributes."""
        self.what, self.size, self.smallest, self.damping, self.why = what, size, smallest, damping, why
        super().__init__(
            f"{what} ({size} x {size}) is not positive definite{': ' + why if why else ''}: its smallest "
            f"eigenvalue is {smallest:.3g}; solve with a damping of at least {damping:.0e}."
        )


def rounding_floor(largest: float, dtype: torch.dtype) -> float:
    """Eigenvalues at or below this are rounding noise of a matrix whose scale is `largest`.

    Args:
        largest: its largest diagonal entry or eigenvalue.
        dtype: the precision that the matrix came in.

    Returns:
        Four units of rounding at that scale.
    """
    return 4 * torch.finfo(dtype).eps * abs(largest)


def sufficient_damping(smallest: float, largest: float, dtype: torch.dtype) -> float:
    """Return a power of ten that lifts `smallest` clearly above the rounding of `largest`.

    Args:
        smallest: smallest eigenvalue.
        largest: largest eigenvalue in magnitude.
        dtype: the precision that the matrix came in.

    Returns:
        A positive damping.
    """
    needed = max(4 * rounding_floor(largest, dtype) - 2 * min(smallest, 0.0), torch.finfo(dtype).tiny * 1e8)
    return float(10.0 ** math.ceil(math.log10(needed)))


def is_symmetric(matrix: Tensor) -> bool:
    """Whether a square matrix, or each of a batch, equals its transpose up to rounding.

    Args:
        matrix: (..., n, m).

    Returns:
        False for rectangular matrices.
    """
    if matrix.shape[-1] != matrix.shape[-2]:
        return False
    if matrix.numel() == 0:
        return True
    slack = torch.finfo(matrix.dtype).eps ** 0.5 * matrix.abs().max()
    return bool((matrix - matrix.mT).abs().max() <= slack)


def cholesky(matrix: Tensor, what: str, precision: torch.dtype | None = None) -> Tensor:
    """Lower Cholesky factor of one symmetric positive definite matrix or of a batch of them.

    A float32 matrix that breaks down is tried again in float64 before it is called singular.

    Args:
        matrix: (..., n, n).
        what: the matrix in words, for the error.
        precision: dtype of the work and of the result; None: the matrix's own. What counts as singular always
            follows from the matrix's own, which is what its entries are good to.

    Returns:
        L of the same shape, L Lᵀ = matrix.

    Raises:
        SingularMatrixError: when the smallest eigenvalue is not above the rounding of the matrix.
        ValueError: when the matrix is not symmetric or holds NaN.
    """
    _require_symmetric(matrix, what)
    if matrix.numel() == 0:
        return matrix.to(precision)
    floor = rounding_floor(1.0, matrix.dtype) * matrix.diagonal(dim1=-2, dim2=-1).amax(-1)
    precision = matrix.dtype if precision is None else precision
    for attempt in dict.fromkeys((precision, torch.float64)):
        factor, info = torch.linalg.cholesky_ex(matrix.to(attempt))
        if not bool(info.any()) and bool((_smallest_eigenvalue(factor) > floor).all()):
            return factor.to(precision)
    raise _singular(matrix, what)


def trusted_cholesky(matrix: Tensor, what: str) -> Tensor:
    """Lower Cholesky factor of a damped second moment; only a breakdown asks for the checks of `cholesky`.

    Args:
        matrix: (..., n, n), symmetric by construction.
        what: the matrix in words, for the error.

    Returns:
        L of the same shape.

    Raises:
        SingularMatrixError: when it is not positive definite after all.
        ValueError: when it holds NaN.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    return cholesky(matrix, what) if bool(info.any()) else factor


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


def _smallest_eigenvalue(factor: Tensor) -> Tensor:
    """Estimate λ_min of L Lᵀ from above, by inverse iteration; sharp just where it matters, near singularity.

    Pivots alone do not do: a rank-deficient matrix often factorises with all of them far above rounding.
    """
    start = torch.randn(factor.shape[-1], 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (start / start.norm()).to(factor).expand(*factor.shape[:-1], 1)
    growth = x.new_ones(())
    for _ in range(3):
        x = torch.cholesky_solve(x, factor)
        growth = torch.linalg.vector_norm(x, dim=(-2, -1))
        x = x / growth[..., None, None]
    return 1 / growth


def eigh(matrix: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and orthonormal eigenvectors of a symmetric matrix.

    Args:
        matrix: (n, n).
        what: the matrix in words, for the error.

    Returns:
        (n,) and (n, n) with the vectors in columns.

    Raises:
        ValueError: when the matrix is not symmetric or holds NaN.
    """
    _require_symmetric(matrix, what)
    values, vectors = torch.linalg.eigh(matrix.to(torch.float64))
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


def require_dense(rows: int, cols: int, what: str) -> None:
    """Refuse a dense array that is larger than `DENSE_LIMIT` entries.

    Args:
        rows: number of rows.
        cols: number of columns.
        what: what would need it, in words.

    Raises:
        MemoryError: with the size and the way out.
    """
    if rows * cols > DENSE_LIMIT:
        raise MemoryError(
            f"{what} needs a dense {rows} x {cols} array ({rows * cols * 8 / 2**30:.1f} GiB in float64), "
            f"more than {DENSE_LIMIT:.0e} entries; take one layer at a time or a structured approximation."
        )


def _require_symmetric(matrix: Tensor, what: str) -> None:
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"{what} holds NaN or infinite entries; look at the data and the activations that made it.")
    if not is_symmetric(matrix):
        raise ValueError(
            f"{what} of shape {tuple(matrix.shape)} is not symmetric; only diagonal blocks can be factorised."
        )


def _singular(matrix: Tensor, what: str) -> SingularMatrixError:
    values = torch.linalg.eigvalsh(matrix.to(torch.float64)).reshape(-1, matrix.shape[-1])
    worst = int(values[:, 0].argmin())
    if matrix.ndim > 2:
        what = f"{what} {worst}"
    smallest, largest = float(values[worst, 0]), float(values.abs().max())
    return SingularMatrixError(what, matrix.shape[-1], smallest, sufficient_damping(smallest, largest, matrix.dtype))


class DampedCholesky:
    """Cholesky factor of M + damping I for a symmetric positive semidefinite M, in float64."""

    def __init__(self, matrix: Tensor, damping: float, what: str, unit: float = 1.0) -> None:
        damped = matrix.to(torch.float64, copy=True)
        damped.diagonal().add_(damping)
        factor, info = torch.linalg.cholesky_ex(damped)
        pivots = factor.diagonal()
        rank_lost = bool(info > 0) or (
            bool(pivots.min() ** 2 <= torch.finfo(matrix.dtype).eps * len(matrix) * pivots.max() ** 2) and damping == 0
        )
        if rank_lost:
            eigenvalues = torch.linalg.eigvalsh(damped)
            smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
            raise SingularMatrixError(
                what, len(matrix), unit * smallest, unit * sufficient_damping(smallest, largest, matrix.dtype)
            )
        self.factor = factor

    def solve(self, v: Tensor) -> Tensor:
        """(M + damping I)⁻¹ v for v (n, r)."""
        return torch.cholesky_solve(v.double(), self.factor).to(v.dtype)
