"""A layer's exact block, and its unit blocks, as operators that never form them: sums over examples plus λI.

Shrestha 2023, eq. 37-43 (Woodbury); Sang et al. 2022 for the unit blocks. Used where the matrices are too large.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from fisherviz.operators import Dense, Operator, UnitBlocks
from fisherviz.operators.base import NormOrder, Symmetric
from fisherviz.operators.factorise import SingularMatrixError, eigenvalues, plus_identity, require_dense
from fisherviz.statistics.examples import Examples, Woodbury
from fisherviz.statistics.gradients import block_square_norm
from fisherviz.statistics.products import block, weighted_moments, weighted_moments_square_norm

_UNIT_ENTRIES = 2**26
"""Entries of unit blocks that are formed at once."""


class ExampleSpace(Symmetric):
    """s U Uᵀ + shift I, with U's columns the per-example gradients of a layer.

    Args:
        examples: s U Uᵀ, over one layer.
        shift: damping that has been added.
    """

    def __init__(self, examples: Examples, shift: float = 0.0) -> None:
        (self.capture,) = examples.captures
        self.examples, self.shift = examples, shift
        self.factor = examples.scale
        self.shape, self.tensors = (self.capture.size,) * 2, self.capture.tensors

    def _matmul(self, v: Tensor) -> Tensor:
        return self.examples.product([v])[0] + self.shift * v

    def to_dense(self) -> Tensor:
        """The block; MemoryError where it is too large."""
        require_dense(*self.shape, "the dense block")
        out = block(self.capture, self.capture) * self.factor
        out.diagonal().add_(self.shift)
        return out

    def diagonal(self) -> Tensor:
        """Second moment of each gradient entry."""
        return self.capture.square_sum() * self.factor + self.shift

    def scale(self, factor: float) -> ExampleSpace:
        """Times a number."""
        return ExampleSpace(Examples([self.capture], self.factor * factor), self.shift * factor)

    def shifted(self, value: float) -> ExampleSpace:
        """Plus a multiple of the identity; the Gram matrix is kept."""
        return ExampleSpace(self.examples, self.shift + value)

    def _norm(self, order: NormOrder) -> float:
        if order == "trace":
            return float(self.diagonal().sum(dtype=torch.float64))
        if order == "spectral":
            return self._largest_eigenvalue()
        plain = self.factor**2 * block_square_norm(self.capture, self.capture)
        trace = self.factor * float(self.capture.square_sum().sum(dtype=torch.float64))
        return float(plain + 2 * self.shift * trace + self.shift**2 * self.shape[0]) ** 0.5

    def inverse(self) -> Operator:
        """The dense inverse, where it fits."""
        return Dense(self.to_dense()).inverse()

    def log_determinant(self) -> float:
        """By Sylvester's identity, from the Gram matrix."""
        return self._damped.log_determinant

    def _solve(self, v: Tensor) -> Tensor:
        return self._damped.solve([v])[0]

    @cached_property
    def _damped(self) -> Woodbury:
        if self.shift <= 0:
            why = "it is solved in example space, where its rank is at most the number of gradients"
            advised = 1e-6 * float(self.diagonal().max())
            raise SingularMatrixError("the exact layer block", self.shape[0], 0.0, advised, why)
        return Woodbury(self.examples, self.shift)


class ExampleUnits(Symmetric):
    """Unit blocks E[g_o² ā āᵀ] + shift I that are never formed, for factored captures (CW-NGD of wide layers).

    Args:
        a: inputs (N, da).
        weights: g_o² summed over vectors, times 1/N (N, d_out).
        shift: damping that has been added.
    """

    def __init__(self, a: Tensor, weights: Tensor, shift: float = 0.0) -> None:
        self.a, self.weights, self.shift = a, weights, shift
        self.shape, self.tensors = (a.shape[1] * weights.shape[1],) * 2, (a, weights)

    def _matmul(self, v: Tensor) -> Tensor:
        units = v.T.reshape(v.shape[1], self.weights.shape[1], self.a.shape[1])
        out = [(self.weights * (self.a @ matrix.T)).T @ self.a for matrix in units]
        return torch.stack(out).reshape(v.shape[1], -1).T + self.shift * v

    def blocks(self, start: int, stop: int) -> Tensor:
        """Blocks of output units start..stop, (stop - start, da, da)."""
        return plus_identity(weighted_moments(self.a, self.weights[:, start:stop]), self.shift)

    def to_dense(self) -> Tensor:
        """The matrix; MemoryError where it is too large."""
        require_dense(*self.shape, "the dense matrix of unit blocks")
        return UnitBlocks(self.blocks(0, self.weights.shape[1])).to_dense()

    def diagonal(self) -> Tensor:
        """Second moment of each gradient entry."""
        return (self.weights.T @ self.a.square()).reshape(-1) + self.shift

    def scale(self, factor: float) -> ExampleUnits:
        """Times a number."""
        return ExampleUnits(self.a, self.weights * factor, self.shift * factor)

    def shifted(self, value: float) -> ExampleUnits:
        """Plus a multiple of the identity."""
        return ExampleUnits(self.a, self.weights, self.shift + value)

    def _norm(self, order: NormOrder) -> float:
        trace = float((self.diagonal() - self.shift).sum(dtype=torch.float64))
        if order == "trace":
            return trace + self.shift * self.shape[0]
        if order == "spectral":
            return max(float(eigenvalues(part).max()) for part in self._parts())
        plain = weighted_moments_square_norm(self.a, self.weights)
        return (plain + 2 * self.shift * trace + self.shift**2 * self.shape[0]) ** 0.5

    def _parts(self) -> Iterator[Tensor]:
        """Blocks of a few units at a time."""
        step = max(1, _UNIT_ENTRIES // self.a.shape[1] ** 2)
        for start in range(0, self.weights.shape[1], step):
            yield self.blocks(start, min(start + step, self.weights.shape[1]))

    def inverse(self) -> Operator:
        """The inverse of all blocks, formed; MemoryError where they do not fit."""
        require_dense(self.shape[0], self.a.shape[1], "the inverse of all unit blocks")
        return UnitBlocks(self.blocks(0, self.weights.shape[1])).inverse()

    def log_determinant(self) -> float:
        """Sum of the blocks'."""
        return sum(UnitBlocks(part).log_determinant() for part in self._parts())

    def _solve(self, v: Tensor) -> Tensor:
        units = v.reshape(self.weights.shape[1], self.a.shape[1], v.shape[1])
        solved, start = [], 0
        for part in self._parts():
            right = units[start : start + len(part)].reshape(-1, v.shape[1])
            solved.append(UnitBlocks(part).solve(right))
            start += len(part)
        return torch.cat(solved)
