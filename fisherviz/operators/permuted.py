"""A direct sum whose parts cover segments of the vector that do not stand side by side.

A chain of layers in the order of execution, and what is left beside it, over layers in the order of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from fisherviz.operators.base import NormOrder, Operator, Symmetric
from fisherviz.operators.block_matrix import BlockMatrix, dense_from_blocks
from fisherviz.operators.damping import FactoredTikhonov, damp
from fisherviz.operators.direct_sum import DirectSum
from fisherviz.operators.inverse import Inverse
from fisherviz.operators.khatri_rao import LeadingPairs
from fisherviz.operators.lanczos import Product
from fisherviz.operators.simple import Zero
from fisherviz.operators.tridiagonal import BlockTridiagonal

TAIL = 30.0
"""Times the damping: left-out terms up to that cost conjugate gradients fewer products than the chain saves them."""


class Permuted(Symmetric):
    """A direct sum of symmetric operators over segments in another order.

    Args:
        parts: the sum; a part that covers several segments is a `BlockTridiagonal` over them.
        cover: for each part, the positions of its segments, in its own order.

    Raises:
        ValueError: when the parts do not cover every position once.
    """

    def __init__(self, parts: DirectSum, cover: Sequence[Sequence[int]]) -> None:
        self.parts = parts
        self.cover = tuple(tuple(positions) for positions in cover)
        self._order = [i for positions in self.cover for i in positions]
        if sorted(self._order) != list(range(len(self._order))) or len(self.cover) != len(parts.operators):
            raise ValueError(f"the parts must cover every segment once, got {self.cover} for {parts!r}.")
        lengths: list[int] = []
        for op in parts.operators:
            lengths += op.sizes if isinstance(op, BlockTridiagonal) else [op.shape[0]]
        self.sizes = [lengths[self._order.index(i)] for i in range(len(lengths))]
        self.shape, self.tensors = parts.shape, parts.tensors
        self._places = {at: (k, i) for k, positions in enumerate(self.cover) for i, at in enumerate(positions)}

    def block(self, row: int, col: int) -> Operator:
        """Return the block between two segments.

        Args:
            row: position of a segment.
            col: position of another.

        Returns:
            The part's own block; `Zero` between two parts.
        """
        (part, i), (other, j) = self._places[row], self._places[col]
        if part == other:
            op = self.parts.operators[part]
            return op.block(i, j) if isinstance(op, BlockTridiagonal) else op
        return Zero(self.sizes[row], self.sizes[col], self.dtype, self.device)

    @cached_property
    def _from_parts(self) -> Tensor:
        """Where each entry of the vector stands among the parts'."""
        stacked = torch.arange(self.shape[0], device=self.device).split([self.sizes[i] for i in self._order])
        return torch.cat([stacked[self._order.index(i)] for i in range(len(self.sizes))])

    @cached_property
    def _to_parts(self) -> Tensor:
        return self._from_parts.argsort()

    def _matmul(self, v: Tensor) -> Tensor:
        return (self.parts @ v[self._to_parts])[self._from_parts]

    def _solve(self, v: Tensor) -> Tensor:
        return self.parts._solve(v[self._to_parts])[self._from_parts]

    def _tell_residual(self, solution: Tensor, v: Tensor, where: str = "") -> None:
        self.parts._tell_residual(solution[self._to_parts], v[self._to_parts], where)

    def _inverse_root(self, z: Tensor) -> Tensor:
        return self.parts.inverse_root(z[self._to_parts])[self._from_parts]

    @property
    def direct(self) -> bool:
        """Whether every part is."""
        return self.parts.direct

    def log_determinant(self) -> float:
        """Sum of the parts'."""
        return self.parts.log_determinant()

    def to_dense(self) -> Tensor:
        """Return the matrix."""
        return dense_from_blocks(len(self.sizes), self.block)

    def diagonal(self) -> Tensor:
        """Return the main diagonal."""
        return self.parts.diagonal()[self._from_parts]

    def scale(self, factor: float) -> Permuted:
        """Multiply by a number."""
        return Permuted(self.parts.scale(factor), self.cover)

    def each(self, function: Callable[[Operator], Operator]) -> Permuted:
        """Change the parts, one by one."""
        return Permuted(self.parts.each(function), self.cover)

    def shifted(self, value: float) -> Operator:
        """Add a multiple of the identity: a chain loses its structure by it, and its blocks are kept by pairs."""
        return BlockMatrix(self.coupled_blocks(), NearChain(self)).shifted(value)

    def coupled_blocks(self) -> dict[tuple[int, int], Operator]:
        """The blocks on and above the diagonal that are not zero."""
        count = len(self.sizes)
        pairs = {(i, j): self.block(i, j) for j in range(count) for i in range(j + 1)}
        return {k: op for k, op in pairs.items() if not isinstance(op, Zero)}

    def _norm(self, order: NormOrder) -> float:
        return self.parts.norm(order)

    def inverse(self) -> Inverse:
        """Return the inverse, whose products are solves."""
        return Inverse(self, self.sizes, self._inverse_dense)

    def _inverse_dense(self) -> Tensor:
        parts = self.parts.operators
        inverses = [op.inverse_dense() if isinstance(op, BlockTridiagonal) else op.inverse().to_dense() for op in parts]
        return torch.block_diag(*inverses)[self._from_parts][:, self._from_parts]


class NearChain:
    """Approximate inverses of a chain plus λI: of its largest terms, or the chain's own with its factors damped.

    Args:
        chain: the matrix.
    """

    def __init__(self, chain: Permuted) -> None:
        self.chain = chain

    @cached_property
    def _pairs(self) -> LeadingPairs:
        return LeadingPairs(self.chain.coupled_blocks())

    def __call__(self, value: float) -> Product:
        """Of the chain plus a λ.

        Raises:
            SingularMatrixError: the λ is too small for it.
        """
        if self._pairs.reaches(value) or (self._pairs.cheap and self._pairs.reaches(TAIL * value)):
            return self._pairs(value)
        near = damp(self.chain, FactoredTikhonov(value**0.5))
        near._solve(self.chain.tensors[0].new_zeros(self.chain.shape[0], 1))  # factorised here, or refused
        return near._solve
