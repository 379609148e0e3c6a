"""A symmetric matrix with an operator for each pair of segments: what couples layers without further structure.

Products and norms stay with the blocks. Solving is dense while that is small, and beyond by conjugate gradients that
the diagonal blocks precondition, or what is known to be near the inverse.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fisherviz.operators.base import NormOrder, Operator, Symmetric
from fisherviz.operators.dense import Dense
from fisherviz.operators.direct_sum import DirectSum
from fisherviz.operators.factorise import SingularMatrixError
from fisherviz.operators.inverse import Inverse
from fisherviz.operators.lanczos import Product, cg
from fisherviz.operators.simple import Zero

DENSE_SOLVE = 6000
"""Matrices up to this size are solved by Cholesky, larger ones by conjugate gradients."""


class BlockMatrix(Symmetric):
    """A symmetric matrix of operators.

    Args:
        blocks: operators by (row, col) on and above the diagonal; those below are their transposes. Every diagonal
            block is there, a pair that is not is zero.
        near: for a λ > 0 an approximate inverse of the blocks plus λI, which preconditions; None: that of the diagonal
            blocks. It may raise `SingularMatrixError` for a λ that is too small for it.
        shift: multiple of the identity that the matrix has beside the blocks: products stay those of the blocks.

    Raises:
        ValueError: when a diagonal block is missing, or a pair is given that stands below the diagonal.
    """

    def __init__(
        self,
        blocks: Mapping[tuple[int, int], Operator],
        near: Callable[[float], Product] | None = None,
        shift: float = 0.0,
    ) -> None:
        self.blocks, self._near, self._shift = dict(blocks), near, shift
        count = 1 + max(col for _, col in self.blocks)
        wrong = [(i, i) for i in range(count) if (i, i) not in blocks] + [(i, j) for i, j in blocks if i > j]
        if wrong:
            raise ValueError(
                f"a BlockMatrix takes every diagonal block and pairs above the diagonal; look at {wrong[0]}."
            )
        self.sizes = [self.blocks[i, i].shape[0] for i in range(count)]
        self.shape = sum(self.sizes), sum(self.sizes)
        self.tensors = tuple(t for op in self.blocks.values() for t in op.tensors)

    def block(self, row: int, col: int) -> Operator:
        """Return the block between two segments.

        Args:
            row: position of a segment.
            col: position of another.

        Returns:
            The operator that was given, or its transpose, or a `Zero`.
        """
        if row == col:
            return self.blocks[row, row].shifted(self._shift) if self._shift else self.blocks[row, row]
        if (row, col) in self.blocks:
            return self.blocks[row, col]
        if (col, row) in self.blocks:
            return self.blocks[col, row].T
        return Zero(self.sizes[row], self.sizes[col], self.dtype, self.device)

    def arguments(self) -> dict[str, Any]:
        """What its constructor takes again."""
        return {"blocks": self.blocks, "near": self._near, "shift": self._shift}

    def _matmul(self, v: Tensor) -> Tensor:
        parts = v.split(self.sizes)
        out = [torch.zeros_like(part) for part in parts]
        for (i, j), op in self.blocks.items():
            if isinstance(op, Zero):
                continue
            out[i] += op @ parts[j]
            if i != j:
                out[j] += op.T @ parts[i]
        return torch.cat(out).add_(v, alpha=self._shift)

    def to_dense(self) -> Tensor:
        """Return the matrix."""
        return dense_from_blocks(len(self.sizes), self.block)

    def diagonal(self) -> Tensor:
        """Return the main diagonal."""
        return torch.cat([self.blocks[i, i].diagonal() for i in range(len(self.sizes))]) + self._shift

    def scale(self, factor: float) -> BlockMatrix:
        """Multiply by a number."""
        scaled = None if self._near is None or not factor > 0 else Rescaled(self._near, factor)
        blocks = {pair: op.scale(factor) for pair, op in self.blocks.items()}
        return BlockMatrix(blocks, scaled, self._shift * factor)

    def shifted(self, value: float) -> BlockMatrix:
        """Add a multiple of the identity."""
        return BlockMatrix(self.blocks, self._near, self._shift + value)

    def each(self, function: Callable[[Operator], Operator]) -> BlockMatrix:
        """Change the diagonal blocks; those between segments stay as they are."""
        return BlockMatrix(
            {(i, j): self.block(i, i).each(function) if i == j else op for (i, j), op in self.blocks.items()}
        )

    def _norm(self, order: NormOrder) -> float:
        if order == "trace":
            return sum(self.blocks[i, i].norm("trace") for i in range(len(self.sizes))) + self._shift * self.shape[0]
        if order == "fro":
            return sum((1 if i == j else 2) * self.block(i, j).norm("fro") ** 2 for i, j in self.blocks) ** 0.5
        return self._largest_eigenvalue()

    @cached_property
    def _dense(self) -> Dense:
        return Dense(self.to_dense())

    def inverse(self) -> Inverse:
        """Return the inverse, whose products are solves."""
        return Inverse(self, self.sizes, lambda: self._dense.inverse().M)

    @cached_property
    def _own(self) -> DirectSum:
        """The diagonal blocks alone."""
        return DirectSum([self.block(i, i) for i in range(len(self.sizes))])

    @cached_property
    def _factorised(self) -> Operator | None:
        """The diagonal blocks where nothing is coupled, the dense matrix while it is small, or None."""
        if all(i == j or isinstance(op, Zero) for (i, j), op in self.blocks.items()):
            return self._own
        return self._dense if self.shape[0] <= DENSE_SOLVE else None

    @property
    def direct(self) -> bool:
        """Without couplings as the blocks are, with them while the matrix is small."""
        return self._factorised is not None and self._factorised.direct

    def log_determinant(self) -> float:
        """From the blocks where nothing is coupled, dense while that is small."""
        return super().log_determinant() if self._factorised is None else self._factorised.log_determinant()

    def _solve(self, v: Tensor) -> Tensor:
        if self._factorised is not None:
            return self._factorised._solve(v)
        return cg(self.__matmul__, v, preconditioner=self._preconditioner)

    def _inverse_root(self, z: Tensor) -> Tensor:
        return super()._inverse_root(z) if self._factorised is None else self._factorised.inverse_root(z)

    @cached_property
    def _preconditioner(self) -> Product:
        if self._near is not None and self._shift > 0:
            with contextlib.suppress(SingularMatrixError):
                return self._near(self._shift)
        return self._own._solve


class Rescaled:
    """The approximate inverses of a multiple of a matrix.

    Args:
        near: those of the matrix plus λI, by λ.
        factor: the multiple.
    """

    def __init__(self, near: Callable[[float], Product], factor: float) -> None:
        self.near, self.factor = near, factor

    def __call__(self, value: float) -> Product:
        """Of the multiple plus a λ."""
        product = self.near(value / self.factor)
        return lambda v: product(v) / self.factor


def dense_from_blocks(count: int, block: Callable[[int, int], Operator]) -> Tensor:
    """Write out a matrix of operators.

    Args:
        count: segments on either side.
        block: (row, col) -> the operator between two segments.

    Returns:
        The matrix.
    """
    return torch.cat([torch.cat([block(i, j).to_dense() for j in range(count)], 1) for i in range(count)])
