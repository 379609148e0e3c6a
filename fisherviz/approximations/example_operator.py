"""A layer's exact block as an operator that never forms it: a sum over examples plus λI (Shrestha 2023, eq. 37-43)."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fisherviz.operators import Dense, Operator
from fisherviz.operators.base import NormOrder, Symmetric
from fisherviz.operators.factorise import SingularMatrixError, require_dense
from fisherviz.statistics.examples import Examples, Woodbury
from fisherviz.statistics.gradients import block_square_norm
from fisherviz.statistics.products import block


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
        """Plus a multiple of the identity."""
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
