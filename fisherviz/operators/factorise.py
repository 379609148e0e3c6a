"""Guarded factorisations of symmetric matrices, and all that is decided by precision.

Every solve and every eigendecomposition of the package goes through here. A matrix is judged by the precision that it
was computed in, whatever precision the work is done in; products that are symmetric by their making are made so bit for
bit (`symmetric`), because a CPU's kernels round the two triangles differently. Others rely on `SingularMatrixError`
carrying the size, the smallest eigenvalue and a damping that would do; `located` puts the layer's name in front.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fisherviz.operators.finite import NonFiniteMatrixError, not_finite, require_finite
from fisherviz.operators.triangular import log_determinant_of, solve_columns
from fisherviz.support.memory import require

MIRRORED = 128
"""Rows of a symmetric product that are mirrored at once: a tile that stays in the cache."""

SMALLER = "probe fewer layers=, or take a method without eigenvectors"


class SingularMatrixError(RuntimeError):
    """A matrix that had to be positive definite is not.

    Args:
        what: the matrix in words ("the A factor").
        size: its number of rows.
        smallest: its smallest eigenvalue.
        damping: a Tikhonov damping with which the factorisation succeeds.
        why: an optional clause on the cause.
        remedy: what is to be of that size, in words.
    """

    def __init__(
        self, what: str, size: int, smallest: float, damping: float, why: str = "", remedy: str = "solve with a damping"
    ) -> None:
        """Compose the sentence and keep the figures as attributes."""
        self.what, self.size, self.smallest, self.damping, self.why = what, size, smallest, damping, why
        self.remedy = remedy
        super().__init__(
            f"{what} ({size} x {size}) is not positive definite{': ' + why if why else ''}: its smallest "
            f"eigenvalue is {smallest:.3g}; {remedy} of at least {damping:.0e}."
        )


def fault_of(error: SingularMatrixError) -> str:
    """A clause on the eigenvalue that an error is about; a positive one is within the rounding of the largest."""
    rounding = ", which is within rounding of zero" if error.smallest > 0 else ""
    return f"{error.what} has the eigenvalue {error.smallest:.3g}{rounding}"


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Put a place in front of what a factorisation has to say.

    Args:
        where: the place in words ("layer '0'").

    Raises:
        SingularMatrixError: the one that was raised inside, with the place.
        NonFiniteMatrixError: likewise.
        RuntimeError: likewise, for any other; running out of memory passes as it is.
    """
    try:
        yield
    except NonFiniteMatrixError as error:
        raise NonFiniteMatrixError(f"{where}: {error}") from error
    except SingularMatrixError as error:
        raise SingularMatrixError(
            f"{where}: {error.what}", error.size, error.smallest, error.damping, error.why, error.remedy
        ) from error
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(f"{where}: {error}") from error


def symmetric(product: Tensor) -> Tensor:
    """Make a product that is symmetric by its making, XᵀX or X S Xᵀ, symmetric bit for bit.

    Args:
        product: (..., n, n), symmetric up to rounding.

    Returns:
        The larger rounding of each pair near the diagonal, the upper triangle's elsewhere; a large product is
        overwritten.
    """
    if product.shape[-1] <= MIRRORED:
        return torch.maximum(product, product.mT)
    for low in range(0, product.shape[-1], MIRRORED):
        high = low + MIRRORED
        own = product[..., low:high, low:high]
        own.copy_(torch.maximum(own, own.mT))
        product[..., low:high, :low] = product[..., :low, low:high].mT
    return product


def plus_identity(matrix: Tensor, value: float) -> Tensor:
    """Add a multiple of the identity.

    Args:
        matrix: (..., n, n).
        value: the multiple.

    Returns:
        A new tensor.
    """
    matrix = matrix.clone()
    matrix.diagonal(dim1=-2, dim2=-1).add_(value)
    return matrix


def require_positive(values: Tensor, what: str, size: int, floor: float = 0.0) -> None:
    """Refuse a matrix by its eigenvalues.

    Args:
        values: they, of any shape.
        what: the matrix in words, for the error.
        size: its number of rows.
        floor: what the smallest one must exceed, in units of the largest.

    Raises:
        SingularMatrixError: when it does not.
        NonFiniteMatrixError: when one is NaN or infinite.
    """
    if values.numel():
        require_finite(values, what)
        smallest, largest = float(values.min()), float(values.abs().max())
        if not smallest > floor * largest:
            raise SingularMatrixError(what, size, smallest, sufficient_damping(smallest, largest, values.dtype))


def rounding_floor(largest: float, dtype: torch.dtype, size: int = 1) -> float:
    """Eigenvalues at or below this are rounding noise of a matrix whose scale is `largest`.

    Args:
        largest: its largest diagonal entry, or its largest eigenvalue, which grows with the size by itself.
        dtype: the precision that the matrix came in.
        size: its number of rows, where `largest` is an entry: the norm of n² independent roundings grows as √n.

    Returns:
        4 (1 + √size) units of rounding at that scale.
    """
    return 4 * (1 + size**0.5) * torch.finfo(dtype).eps * abs(largest)


def sufficient_damping(smallest: float, largest: float, dtype: torch.dtype, size: int = 1) -> float:
    """Return a power of ten that lifts `smallest` clearly above the rounding of `largest`.

    Args:
        smallest: smallest eigenvalue.
        largest: as for `rounding_floor`.
        dtype: the precision that the matrix came in.
        size: as for `rounding_floor`.

    Returns:
        A positive damping.

    Raises:
        NonFiniteMatrixError: when there is none.
    """
    # of a matrix of zeros any damping is enough whose inverse is in range, in float32 too
    least = torch.finfo(dtype).tiny * 1e8 if largest else torch.finfo(torch.float32).tiny ** 0.5
    needed = max(4 * rounding_floor(largest, dtype, size) - 2 * min(smallest, 0.0), least)
    if not math.isfinite(needed):
        raise NonFiniteMatrixError(not_finite("a matrix that is to be damped", dtype))
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
    if matrix.numel() == 0 or torch.equal(matrix, matrix.mT):  # bit for bit, as our own products are
        return True
    slack = torch.finfo(matrix.dtype).eps ** 0.5 * matrix.abs().max()
    return bool((matrix - matrix.mT).abs().max() <= slack)


def cholesky(matrix: Tensor, what: str, precision: torch.dtype | None = None, shift: float = 0.0) -> Tensor:
    """Lower Cholesky factor of M + shift I for one symmetric M or a batch, where it is positive definite.

    A float32 matrix that breaks down is tried again in float64 before it is called singular.

    Args:
        matrix: M (..., n, n).
        what: the matrix in words, for the error.
        precision: dtype of the work and of the result; None: the matrix's own. What counts as singular always
            follows from the matrix's own, which is what its entries are good to.
        shift: a multiple of the identity; the factor is made in the shifted copy's place.

    Returns:
        L of the same shape, L Lᵀ = M + shift I.

    Raises:
        SingularMatrixError: when the smallest eigenvalue is not above the rounding of the matrix.
        ValueError: when the matrix is not symmetric or holds NaN.
    """
    _require_symmetric(matrix, what)
    if matrix.numel() == 0:
        return matrix.to(precision)
    floor = _floors(matrix, shift)
    require_finite(floor, what)
    precision = matrix.dtype if precision is None else precision
    for attempt in dict.fromkeys((precision, torch.float64)):
        factor, info = _shifted_factor(matrix.to(attempt), shift)
        if not bool(info.any()) and bool((_smallest_eigenvalue(factor) > floor).all()):
            return factor.to(precision)
    raise _singular(matrix, what, shift)


def _shifted_factor(matrix: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factor of M + shift I and LAPACK's verdict, for a symmetric M; the one copy becomes the factor."""
    if shift == 0:
        return torch.linalg.cholesky_ex(matrix)
    own = matrix.clone(memory_format=torch.contiguous_format)
    own.diagonal(dim1=-2, dim2=-1).add_(shift)
    return _factor_in_place(own)


def _factor_in_place(own: Tensor) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factor of a symmetric M, which it replaces, and LAPACK's verdict."""
    factor, info = own.mT, torch.empty(own.shape[:-2], dtype=torch.int32, device=own.device)
    try:
        torch.linalg.cholesky_ex(own.mT, out=(factor, info))  # M is its transpose, whose columns lie as LAPACK's
    except KeyError:  # under torch's allow_mutation_on_saved_tensors, which looks for an output called "out"
        return torch.linalg.cholesky_ex(own.mT)
    return factor, info


def definite_factor(matrix: Tensor) -> Tensor | None:
    """Lower Cholesky factor of a symmetric matrix, or None where it is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    return None if bool(info) else factor


def trusted_cholesky(matrix: Tensor, what: str, shift: float = 0.0) -> Tensor:
    """Lower Cholesky factor of a damped second moment; only a breakdown asks for the checks of `cholesky`.

    Args:
        matrix: (..., n, n), symmetric by construction.
        what: the matrix in words, for the error.
        shift: as for `cholesky`.

    Returns:
        L of the same shape.

    Raises:
        SingularMatrixError: when it is not positive definite after all.
        ValueError: when it holds NaN.
    """
    factor, info = _shifted_factor(matrix, shift)
    return cholesky(matrix, what, shift=shift) if bool(info.any()) else factor


def _smallest_eigenvalue(factor: Tensor) -> Tensor:
    """Estimate λ_min of L Lᵀ from above, by inverse iteration; sharp just where it matters, near singularity.

    Pivots alone do not do: a rank-deficient matrix often factorises with all of them far above rounding.
    """
    start = torch.randn(
        factor.shape[-1], 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu"
    )
    x = (start / start.norm()).to(factor).expand(*factor.shape[:-1], 1)
    growth = x.new_ones(())
    for _ in range(3):
        x = solve_columns(factor, x)
        growth = torch.linalg.vector_norm(x, dim=(-2, -1))
        x = x / growth[..., None, None]
    return 1 / growth


class DampedCholesky:
    """Cholesky factor of M + damping I for a symmetric positive semidefinite M, in float64.

    Args:
        matrix: M (n, n); without damping its rank is judged by its own precision.
        damping: a number of at least 0, in the units of M.
        what: the matrix in words, for the error.
        unit: what errors multiply M's eigenvalues and dampings by, to state them in the caller's units (s, where M
            is the Gram matrix of F = s U Uᵀ).
        again: gives M once more, for the error, where M is the factorisation's own to write into; in float64 no second
            matrix is made then.

    Raises:
        SingularMatrixError: when the sum is not positive definite; ValueError where it is not finite.
    """

    def __init__(
        self,
        matrix: Tensor,
        damping: float,
        what: str,
        unit: float = 1.0,
        again: Callable[[], Tensor] | None = None,
    ) -> None:
        floor = _floors(matrix) if damping == 0 else None
        own = matrix.to(torch.float64, copy=again is None, memory_format=torch.contiguous_format)
        own.diagonal().add_(damping)
        self.factor, info = _factor_in_place(own)
        if bool(info > 0) or (floor is not None and not bool(_smallest_eigenvalue(self.factor) > floor)):
            raise _singular(matrix if again is None else again(), what, damping, unit)

    @property
    def log_determinant(self) -> float:
        """Log det(M + damping I)."""
        return log_determinant_of(self.factor)

    def solve(self, v: Tensor) -> Tensor:
        """(M + damping I)⁻¹ v.

        Args:
            v: (n, r).

        Returns:
            (n, r), in v's precision.
        """
        return solve_columns(self.factor, v.double()).to(v.dtype)

    def inverse(self) -> Tensor:
        """(M + damping I)⁻¹, (n, n), float64: a third of the operations of n solves, one matrix beside the factor."""
        return torch.cholesky_inverse(self.factor)


def eigh(matrix: Tensor, what: str, precision: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and orthonormal eigenvectors of a symmetric matrix, or of each of a batch.

    Args:
        matrix: (..., n, n).
        what: the matrix in words, for the error.
        precision: dtype of the result; None: the matrix's own. The work is done in float64.

    Returns:
        (..., n) and (..., n, n) with the vectors in columns.

    Raises:
        ValueError: when the matrix is not symmetric or holds NaN.
        MemoryError: when it, its vectors and LAPACK's room, which is twice that of one matrix, do not fit.
    """
    _require_symmetric(matrix, what)
    held = (2 * matrix.numel() + 2 * matrix.shape[-1] ** 2) * torch.float64.itemsize
    require(held, matrix.device, f"the eigendecomposition of {what}, {matrix.shape[-1]:,} rows,", SMALLER)
    values, vectors = torch.linalg.eigh(matrix.to(torch.float64))
    precision = matrix.dtype if precision is None else precision
    return values.to(precision), vectors.to(precision)


def eigenvalues(matrix: Tensor) -> Tensor:
    """Eigenvalues, ascending, of a matrix that is known to be symmetric, or of each of a batch.

    Args:
        matrix: (..., n, n); one triangle is read.

    Returns:
        (..., n), in the matrix's precision.

    Raises:
        NonFiniteMatrixError: when it holds NaN or infinite entries.
    """
    require_finite(matrix, "a matrix whose eigenvalues are wanted")
    return torch.linalg.eigvalsh(matrix)


def _require_symmetric(matrix: Tensor, what: str) -> None:
    require_finite(matrix, what)
    if not is_symmetric(matrix):
        raise ValueError(
            f"{what} of shape {tuple(matrix.shape)} is not symmetric; only diagonal blocks can be factorised."
        )


def _floors(matrix: Tensor, shift: float = 0.0) -> Tensor:
    """The rounding floor of M + shift I, or of each of a batch."""
    return rounding_floor(1.0, matrix.dtype, matrix.shape[-1]) * (matrix.diagonal(dim1=-2, dim2=-1).amax(-1) + shift)


def _singular(matrix: Tensor, what: str, damping: float = 0.0, unit: float = 1.0) -> SingularMatrixError:
    """The error for matrix + damping I, which may not be finite; all figures are multiplied by `unit`."""
    require_finite(matrix, what)
    values = unit * eigenvalues(matrix.to(torch.float64)).reshape(-1, matrix.shape[-1])
    worst, size = int(values[:, 0].argmin()), matrix.shape[-1]
    if matrix.ndim > 2:
        what = f"{what} {worst}"
    smallest, largest = float(values[worst, 0]), unit * float(matrix.diagonal(dim1=-2, dim2=-1).max())
    enough = sufficient_damping(smallest, largest, matrix.dtype, size)
    return SingularMatrixError(what, size, smallest + unit * damping, enough)
