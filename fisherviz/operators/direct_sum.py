"""Operators side by side: a block-diagonal matrix over consecutive segments of the vector.

The segments are the groups of a grouped convolution or the layers of a network; everything is done segment by
segment, so that each keeps its own structure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fisherviz.operators.base import NormOrder, Operator
from fisherviz.operators.factorise import located
from fisherviz.operators.simple import Zero


class DirectSum(Operator):
    """A block-diagonal matrix whose blocks are operators.

    Args:
        operators: one per segment, in order; rectangular ones are allowed.
        places: what the blocks are in words ("layer '0'"), for errors.
    """

    def __init__(self, operators: Sequence[Operator], places: Sequence[str] = ()) -> None:
        """Keep the blocks."""
        if not operators:
            raise ValueError("DirectSum needs at least one operator.")
        if len({(op.dtype, op.device) for op in operators}) > 1:
            raise TypeError("DirectSum takes operators of one dtype on one device; cast them first.")
        self.operators = tuple(operators)
        self.places = tuple(places) or tuple(f"block {i}" for i in range(len(operators)))
        self.rows, self.cols = [op.shape[0] for op in operators], [op.shape[1] for op in operators]
        """Rows and columns of each block."""
        self.shape = sum(self.rows), sum(self.cols)
        self.tensors = tuple(t for op in operators for t in op.tensors)

    def _map(self, function: Callable[[Operator], Operator]) -> DirectSum:
        return DirectSum([function(op) for op in self.operators], self.places)

    def block(self, row: int, col: int) -> Operator:
        """Return the block between two segments: zero off the diagonal.

        Args:
            row: position of a segment.
            col: position of another.

        Returns:
            The operator that was given, or a `Zero`.
        """
        return self.operators[row] if row == col else Zero(self.rows[row], self.cols[col], self.dtype, self.device)

    @property
    def T(self) -> DirectSum:
        """The transpose."""
        return self._map(lambda op: op.T)

    def _matmul(self, v: Tensor) -> Tensor:
        return torch.cat([op @ part for op, part in zip(self.operators, v.split(self.cols), strict=True)])

    def to_dense(self) -> Tensor:
        """Return the matrix."""
        return torch.block_diag(*[op.to_dense() for op in self.operators])

    def diagonal(self) -> Tensor:
        """Return the main diagonal; every block must be square."""
        return torch.cat([op.diagonal() for op in self.operators])

    def scale(self, factor: float) -> DirectSum:
        """Multiply by a number."""
        return self._map(lambda op: op.scale(factor))

    def shifted(self, value: float) -> DirectSum:
        """Add a multiple of the identity."""
        return self._map(lambda op: op.shifted(value))

    def map_factors(self, function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> DirectSum:
        """Change the factors of each block by themselves."""
        return self._map(lambda op: op.map_factors(function))

    def each(self, function: Callable[[Operator], Operator]) -> DirectSum:
        """Change each block by itself."""
        return self._map(lambda op: op.each(function))

    def trust(self) -> DirectSum:
        """Trust every block."""
        for op in self.operators:
            op.trust()
        return self

    def _norm(self, order: NormOrder) -> float:
        norms = [op.norm(order) for op in self.operators]
        if order == "fro":
            return sum(value**2 for value in norms) ** 0.5
        return max(norms) if order == "spectral" else sum(norms)

    def inverse(self) -> DirectSum:
        """Return the direct sum of the inverses."""
        inverses = []
        for op, place in zip(self.operators, self.places, strict=True):
            with located(place):
                inverses.append(op.inverse())
        return DirectSum(inverses, self.places)

    @property
    def direct(self) -> bool:
        """Whether every block is."""
        return all(op.direct for op in self.operators)

    def log_determinant(self) -> float:
        """Sum of the blocks'."""
        total = 0.0
        for op, place in zip(self.operators, self.places, strict=True):
            with located(place):
                total += op.log_determinant()
        return total

    def _solve(self, v: Tensor) -> Tensor:
        return self._by_parts(lambda op, part: op._solve(part), v)

    def _tell_residual(self, solution: Tensor, v: Tensor, where: str = "") -> None:
        parts = solution.split(self.rows), v.split(self.rows)
        for op, place, x, right in zip(self.operators, self.places, *parts, strict=True):
            op._tell_residual(x, right, f"{where}{place}: ")

    def _inverse_root(self, z: Tensor) -> Tensor:
        return self._by_parts(lambda op, part: op._inverse_root(part), z)

    def _by_parts(self, function: Callable[[Operator, Tensor], Tensor], v: Tensor) -> Tensor:
        """Something of every block and its segment of the vectors; errors say which block."""
        found = []
        for op, place, part in zip(self.operators, self.places, v.split(self.rows), strict=True):
            with located(place):
                op.require_square("a solve")
                found.append(function(op, part))
        return torch.cat(found)
