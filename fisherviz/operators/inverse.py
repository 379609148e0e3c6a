"""The inverse of an operator, never formed for products: these are solves; entries come from the dense inverse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NoReturn

from torch import Tensor

from fisherviz.operators.base import NormOrder, Operator, Symmetric
from fisherviz.operators.dense import Dense


class Inverse(Symmetric):
    """M⁻¹ for a symmetric positive definite M.

    Args:
        operator: M.
        sizes: lengths of its segments.
        form: writes out M⁻¹, when its entries are asked for.
    """

    def __init__(self, operator: Operator, sizes: Sequence[int], form: Callable[[], Tensor]) -> None:
        self.operator, self.sizes, self.form = operator, list(sizes), form
        self.shape, self.tensors = operator.shape, operator.tensors

    def block(self, row: int, col: int) -> Dense:
        """Return the block between two segments.

        Args:
            row: position of a segment.
            col: position of another.

        Returns:
            Its entries.
        """
        return Dense(self.to_dense().split(self.sizes)[row].split(self.sizes, 1)[col])

    def _matmul(self, v: Tensor) -> Tensor:
        return self.operator.solve(v)

    @property
    def direct(self) -> bool:
        """As the operator that is inverted."""
        return self.operator.direct

    def log_determinant(self) -> float:
        """Minus that of the operator."""
        return -self.operator.log_determinant()

    def _solve(self, v: Tensor) -> Tensor:
        return self.operator @ v

    def _tell_residual(self, solution: Tensor, v: Tensor, where: str = "") -> None:
        """Nothing: what is solved here is known by its products."""

    @cached_property
    def _dense(self) -> Dense:
        return Dense(self.form())

    def to_dense(self) -> Tensor:
        """Return the matrix, formed once."""
        return self._dense.M

    def diagonal(self) -> Tensor:
        """Return the main diagonal."""
        return self._dense.diagonal()

    def scale(self, factor: float) -> Operator:
        """Multiply by a number."""
        return self.operator.scale(1 / factor).inverse()

    def shifted(self, value: float) -> NoReturn:
        """Refuse: damping belongs to the matrix before it is inverted."""
        raise NotImplementedError("damp the matrix before inverting it: approx.inverse(damping).")

    def _norm(self, order: NormOrder) -> float:
        return self._dense.norm(order)

    def inverse(self) -> Operator:
        """Return the operator that is inverted."""
        return self.operator
