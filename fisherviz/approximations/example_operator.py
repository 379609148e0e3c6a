"""A layer's exact block as an operator that never forms it: s U Uᵀ + λI in example space."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fisherviz.captures import AnyCapture
from fisherviz.examplespace import block_square_norm, columns_product, example_gram, rows_product
from fisherviz.operators import Dense, Operator, extreme_eigenvalues
from fisherviz.operators.factorise import SingularMatrixError, require_dense
from fisherviz.operators.base import NormOrder
from fisherviz.products import block
from fisherviz.solving import DampedCholesky, woodbury_solve


class ExampleSpace(Operator):
    """s U Uᵀ + shift I, with U's columns the per-example gradients of a capture.

    Args:
        capture: inputs and pseudo-gradients (or per-example gradients) of one layer.
        factor: s, 1/N for a mean over examples.
        shift: damping that has been added.
    """

    def __init__(self, capture: AnyCapture, factor: float, shift: float = 0.0) -> None:
        self.capture = capture
        self.factor = factor
        self.shift = shift

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return (self.capture.size, self.capture.size)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The capture's tensors."""
        return self.capture.tensors

    @property
    def T(self) -> ExampleSpace:
        """Itself: it is symmetric."""
        return self

    def _matmul(self, v: Tensor) -> Tensor:
        return self.factor * columns_product(self.capture, rows_product(self.capture, v)) + self.shift * v

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
        return ExampleSpace(self.capture, self.factor * factor, self.shift * factor)

    def shifted(self, value: float) -> ExampleSpace:
        """Plus a multiple of the identity; the Gram matrix is kept."""
        out = ExampleSpace(self.capture, self.factor, self.shift + value)
        if "_gram" in self.__dict__:
            out.__dict__["_gram"] = self._gram
        return out

    @cached_property
    def _gram(self) -> Tensor:
        return example_gram(self.capture)

    @cached_property
    def _factor(self) -> DampedCholesky:
        return DampedCholesky(self._gram, self.shift / self.factor, "the Gram matrix of the examples")

    def _norm(self, order: NormOrder) -> float:
        if order == "trace":
            return float(self.diagonal().sum(dtype=torch.float64))
        if order == "spectral":
            top = extreme_eigenvalues(self._matmul, self.shape[0], dtype=self.dtype, device=self.device)
            return float(top[0])
        plain = self.factor**2 * block_square_norm(self.capture, self.capture)
        trace = self.factor * float(self.capture.square_sum().sum(dtype=torch.float64))
        return float(plain + 2 * self.shift * trace + self.shift**2 * self.shape[0]) ** 0.5

    def inverse(self) -> Operator:
        """The dense inverse, where it fits."""
        return Dense(self.to_dense()).inverse()

    def _solve(self, v: Tensor) -> Tensor:
        if self.shift <= 0:
            raise SingularMatrixError(
                "the exact layer block", self.shape[0], 0.0, 1e-6 * float(self.diagonal().max()),
                "it is solved in example space, where its rank is at most the number of gradients",
            )
        plain = ExampleSpace(self.capture, self.factor)
        return woodbury_solve(
            self._factor,
            v,
            self.shift,
            lambda x: rows_product(self.capture, x),
            lambda w: columns_product(self.capture, w),
            plain._matmul,
            1 + self.factor * float(self._gram.diagonal().max()) / self.shift,
        )
