"""Operators that hold their entries: a dense matrix, and blocks that couple the weights of one output unit.

`UnitBlocks` is CW-NGD's structure (Sang et al. 2022): B (d_out, d_a, d_a), one block per output unit, all
factorised in one batched call. `Dense` also serves off-diagonal blocks, rectangular or not symmetric.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fisherviz.operators.base import NormOrder, Operator
from fisherviz.operators.factorise import cholesky, eigenvalues, is_symmetric, plus_identity, trusted_cholesky
from fisherviz.operators.triangular import log_determinant_of, root_solve, solve_columns


class _Entries(Operator):
    """One tensor of entries, a matrix or a batch of blocks.

    Args:
        entries: (..., n, m).
    """

    what: ClassVar[str]
    """The matrix in words, for errors."""
    shift = 0.0
    """A multiple of the identity that is not yet in the tensor."""

    def __init__(self, entries: Tensor) -> None:
        self.tensors = (entries,)

    @property
    def entries(self) -> Tensor:
        """All that is held, (..., n, m)."""
        return plus_identity(self.tensors[0], self.shift) if self.shift else self.tensors[0]

    @property
    def T(self) -> Self:
        """The transpose."""
        return type(self)(self.entries.mT)

    def scale(self, factor: float) -> Self:
        """Multiply by a number."""
        return type(self)(self.entries * factor)

    def _norm(self, order: NormOrder) -> float:
        if order == "fro":
            return float(torch.linalg.vector_norm(self.entries, dtype=torch.float64))
        if order == "trace":
            return float(self.diagonal().sum(dtype=torch.float64))
        return spectral_norm_of(self.entries)

    def log_determinant(self) -> float:
        """From the Cholesky factors' diagonals."""
        self.require_square("the determinant")
        return log_determinant_of(self._cholesky)

    @cached_property
    def _cholesky(self) -> Tensor:
        return (trusted_cholesky if self._trusted else cholesky)(self.tensors[0], self.what, shift=self.shift)


class Dense(_Entries):
    """A matrix held entry by entry.

    Args:
        M: (rows, cols).
    """

    what = "the dense matrix"

    def __init__(self, M: Tensor) -> None:
        """Keep the matrix."""
        if M.ndim != 2:
            raise ValueError(f"Dense takes a matrix, not a tensor of shape {tuple(M.shape)}.")
        super().__init__(M)
        self.M, self.shape = M, (M.shape[0], M.shape[1])

    def _matmul(self, v: Tensor) -> Tensor:
        return self.M @ v

    def to_dense(self) -> Tensor:
        """Return the matrix."""
        return self.M

    def diagonal(self) -> Tensor:
        """Return the main diagonal."""
        self.require_square("diagonal")
        return self.M.diagonal()

    def shifted(self, value: float) -> Dense:
        """Add a multiple of the identity."""
        self.require_square("shifting")
        return Dense(plus_identity(self.M, value))

    def inverse(self) -> Dense:
        """Return the inverse, by Cholesky."""
        self.require_square("inverse")
        return Dense(torch.cholesky_inverse(self._cholesky))

    def _solve(self, v: Tensor) -> Tensor:
        return solve_columns(self._cholesky, v)

    def _inverse_root(self, z: Tensor) -> Tensor:
        return root_solve(self._cholesky, z)


class UnitBlocks(_Entries):
    """A block-diagonal matrix with one block per output unit.

    Args:
        B: (d_out, d_a, d_a), each block symmetric.
        shift: a multiple of the identity to add, without a copy of the blocks: those of a wide layer are the largest
            thing that a method holds.
    """

    what = "the block of unit"

    def __init__(self, B: Tensor, shift: float = 0.0) -> None:
        """Keep the blocks."""
        if B.ndim != 3 or B.shape[1] != B.shape[2]:
            raise ValueError(f"UnitBlocks takes blocks of shape (d_out, d_a, d_a), not {tuple(B.shape)}.")
        super().__init__(B)
        self.shift, self.shape = shift, (B.shape[0] * B.shape[1],) * 2

    @property
    def B(self) -> Tensor:
        """The blocks, (d_out, d_a, d_a)."""
        return self.entries

    def arguments(self) -> dict[str, Any]:
        """What its constructor takes again."""
        return {"B": self.B}

    def _units(self, v: Tensor) -> Tensor:
        return v.reshape(*self.tensors[0].shape[:2], v.shape[1])

    def _matmul(self, v: Tensor) -> Tensor:
        product = (self.tensors[0] @ self._units(v)).reshape(v.shape)
        return product.add_(v, alpha=self.shift) if self.shift else product

    def to_dense(self) -> Tensor:
        """Return the matrix."""
        B = self.B
        d_out, d_a, _ = B.shape
        M = B.new_zeros(d_out, d_a, d_out, d_a)
        unit = torch.arange(d_out, device=self.device)
        M[unit, :, unit, :] = B
        return M.reshape(self.shape)

    def diagonal(self) -> Tensor:
        """Return the main diagonal."""
        held = self.tensors[0].diagonal(dim1=1, dim2=2).reshape(-1)
        return held + self.shift if self.shift else held

    def shifted(self, value: float) -> UnitBlocks:
        """Add a multiple of the identity."""
        return UnitBlocks(self.tensors[0], self.shift + value)

    def inverse(self) -> UnitBlocks:
        """Return the blocks' inverses, by one batched Cholesky."""
        return UnitBlocks(torch.cholesky_inverse(self._cholesky))

    def _solve(self, v: Tensor) -> Tensor:
        return solve_columns(self._cholesky, self._units(v)).reshape(v.shape)

    def _inverse_root(self, z: Tensor) -> Tensor:
        return root_solve(self._cholesky, self._units(z)).reshape(z.shape)


def spectral_norm_of(matrix: Tensor) -> float:
    """Largest singular value of a matrix or of a batch; by eigenvalues, which cost less, if symmetric.

    Args:
        matrix: (..., n, m).

    Returns:
        The largest over the batch.
    """
    if matrix.numel() == 0:
        return 0.0
    values = eigenvalues(matrix) if is_symmetric(matrix) else torch.linalg.svdvals(matrix)
    return float(values.abs().max())
