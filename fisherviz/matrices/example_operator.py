"""Exact blocks as an operator that never forms them: a sum over examples plus λI (Shrestha 2023, eq. 37-43)."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fisherviz.capture.captures import AnyCapture
from fisherviz.operators import Dense, Operator
from fisherviz.operators.base import NormOrder, Symmetric
from fisherviz.operators.factorise import SingularMatrixError, sufficient_damping, symmetric
from fisherviz.statistics.examples import Examples, Woodbury, root_correction
from fisherviz.statistics.gradients import block_square_norm
from fisherviz.statistics.products import block
from fisherviz.support.memory import require_dense


class ExampleSpace(Symmetric):
    """s U Uᵀ + shift I, with U's columns the per-example gradients of one layer, or of several together.

    Args:
        examples: s U Uᵀ.
        shift: damping that has been added.
        solver: of the damped matrix, where it is known.
    """

    def __init__(self, examples: Examples, shift: float = 0.0, solver: Woodbury | None = None) -> None:
        self.examples, self.shift = examples, shift
        self.factor, self._solver = examples.scale, solver
        self.sizes = [capture.size for capture in examples.captures]
        self.shape = (examples.size, examples.size)
        self.tensors = tuple(tensor for capture in examples.captures for tensor in capture.tensors)

    def arguments(self) -> dict[str, Any]:
        """Without the solver, which is made again from the rest."""
        return {"examples": self.examples, "shift": self.shift}

    @property
    def capture(self) -> AnyCapture:
        """Of the one layer."""
        (capture,) = self.examples.captures
        return capture

    def _matmul(self, v: Tensor) -> Tensor:
        return torch.cat(self.examples.product(v.split(self.sizes))) + self.shift * v

    def to_dense(self) -> Tensor:
        """The matrix; MemoryError where it is too large."""
        require_dense(*self.shape, "the dense block", self.tensors[0])
        captures = self.examples.captures
        out = torch.cat([torch.cat([block(row, col) for col in captures], 1) for row in captures])
        out.mul_(self.factor).diagonal().add_(self.shift)
        return out if len(captures) == 1 else symmetric(out)

    def diagonal(self) -> Tensor:
        """Second moment of each gradient entry."""
        return self._squares() * self.factor + self.shift

    def _squares(self) -> Tensor:
        return torch.cat([capture.square_sum() for capture in self.examples.captures])

    def scale(self, factor: float) -> ExampleSpace:
        """Times a number."""
        return ExampleSpace(Examples(self.examples.captures, self.factor * factor), self.shift * factor)

    def shifted(self, value: float) -> ExampleSpace:
        """Plus a multiple of the identity."""
        return ExampleSpace(self.examples, self.shift + value)

    def _norm(self, order: NormOrder) -> float:
        if order == "trace":
            return float(self.diagonal().sum(dtype=torch.float64))
        if order == "spectral":
            return self._largest_eigenvalue()
        if len(self.sizes) == 1:
            plain = self.factor**2 * block_square_norm(self.capture, self.capture)
        else:
            plain = self.examples.square_norm()
        trace = self.factor * float(self._squares().sum(dtype=torch.float64))
        return float(plain + 2 * self.shift * trace + self.shift**2 * self.shape[0]) ** 0.5

    def inverse(self) -> Operator:
        """The dense inverse, where it fits."""
        return Dense(self.to_dense()).inverse()

    def log_determinant(self) -> float:
        """By Sylvester's identity, from the Gram matrix."""
        return self._damped.log_determinant

    def _solve(self, v: Tensor) -> Tensor:
        return torch.cat(self._damped.solve(v.split(self.sizes)))

    def _inverse_root(self, z: Tensor) -> Tensor:
        examples, root = self._damped.examples, self.shift**0.5
        given = [part.to(examples.dtype) for part in z.split(self.sizes)]
        turned = examples.combine((self._root @ examples.project(given).double()).to(examples.dtype))
        return torch.cat([part / root + own for part, own in zip(given, turned, strict=True)]).to(z.dtype)

    @cached_property
    def _root(self) -> Tensor:
        gram = symmetric(self._damped.examples.make_gram().double())
        return root_correction(gram, self.factor, self.shift, "the Gram matrix of the layer's gradients")

    @cached_property
    def _damped(self) -> Woodbury:
        if self._solver is not None:
            return self._solver
        if self.shift <= 0:
            why = "it is solved in example space, where its rank is at most the number of gradients"
            advised = 1e-6 * float(self.diagonal().max()) or sufficient_damping(0.0, 0.0, self.dtype)
            raise SingularMatrixError("the exact layer block", self.shape[0], 0.0, advised, why)
        return Woodbury(self.examples, self.shift)
