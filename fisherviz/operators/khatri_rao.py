"""An approximate inverse of F̃ + λI for F̃_ij = A_ij ⊗ G_ij, from F̃'s leading terms of rank one.

With the eigenpairs of the joint matrices, A = Σ_p x_p x_pᵀ and G = Σ_q y_q y_qᵀ, F̃ is the sum of u_pq u_pqᵀ over all
pairs, whose segment l is x_p[l] ⊗ y_q[l] (the row-wise Khatri-Rao product of A's and G's roots). The largest of them
make most of F̃, and Woodbury inverts λI plus these. Conjugate gradients on F̃ + λI are preconditioned by it. F̂ with its
block-tridiagonal inverse is of the same form, A and G completed along the chain (Martens & Grosse 2015, figure 5).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, reduce

import torch
from torch import Tensor

from fisherviz.operators.base import Operator
from fisherviz.operators.factorise import DampedCholesky, eigh
from fisherviz.operators.kronecker import Kronecker

RANK = 1000
"""Of A and of G that is looked at, at most."""
PAIRS = 4000
"""Terms of rank one that are taken, at most: what is factorised has this size."""

GATHERED = 128
"""Up to this many rows the wanted columns are gathered, then multiplied; above it, all are multiplied before."""
TRIANGULAR = 20
"""Multiply-adds of large products that take as long as one of a triangular solve, which waits for its entries."""


class LeadingPairs:
    """Approximate inverses of a Khatri-Rao product with damping.

    They are applied in the operators' precision where its rounding leaves a digit of what Woodbury subtracts.

    Args:
        blocks: operators by (row, col) on and above the diagonal. Segments with a `Kronecker` on it are coupled by
            those of a positive semidefinite A and G, zero where there is none; others stand alone.
        rank: see `RANK`.
        pairs: see `PAIRS`.
    """

    def __init__(self, blocks: Mapping[tuple[int, int], Operator], rank: int = RANK, pairs: int = PAIRS) -> None:
        self.blocks, self.rank, self.pairs = blocks, rank, pairs
        self.count = 1 + max(col for _, col in blocks)
        self.coupled = [i for i in range(self.count) if isinstance(blocks[i, i], Kronecker)]

    @cached_property
    def _roots(self) -> tuple[list[Tensor], list[Tensor]]:
        """The x_p and y_q of the coupled segments, (d_a, rank) and (d_g, rank) each, longest first."""
        return self._leading(lambda block: block.A), self._leading(lambda block: block.G)

    def _leading(self, factor: Callable[[Kronecker], Tensor]) -> list[Tensor]:
        """Of one joint matrix: a pivoted Cholesky factor, turned so that its columns are orthogonal."""
        own = [self._factors(i, i, factor) for i in self.coupled]
        sizes = [len(block) for block in own]
        left = torch.cat([block.diagonal() for block in own]).double()
        least = torch.finfo(own[0].dtype).eps * float(left.sum())
        segment = [k for k, size in enumerate(sizes) for _ in range(size)]
        starts = [sum(sizes[:k]) for k in range(len(sizes))]
        root = left.new_zeros(min(self.rank, len(left)), len(left))
        for r in range(len(root)):
            pivot = int(left.argmax())
            if float(left[pivot]) <= 0 or float(left.clamp(min=0).sum()) <= least:
                root = root[:r]
                break
            at = segment[pivot]
            entry = pivot - starts[at]
            column = torch.cat([self._factors(i, self.coupled[at], factor)[:, entry] for i in self.coupled]).double()
            column -= root[:r, pivot] @ root[:r]
            root[r] = column / left[pivot].sqrt()
            left -= root[r].square()
            left[pivot] = 0
        _, turn = eigh(root @ root.mT, "the Gram matrix of a Cholesky factor")
        return list((root.mT @ turn.flip(1)).split(sizes))

    def _factors(self, row: int, col: int, factor: Callable[[Kronecker], Tensor]) -> Tensor:
        if row > col:
            return self._factors(col, row, factor).mT
        block = self.blocks.get((row, col))
        if isinstance(block, Kronecker):
            return factor(block)
        ends = (self.blocks[i, i] for i in (row, col))
        sides = [factor(own) for own in ends if isinstance(own, Kronecker)]
        return sides[0].new_zeros(len(sides[0]), len(sides[-1]))

    @cached_property
    def _largest(self) -> tuple[Tensor, Tensor]:
        """|u_pq|² of the largest terms, descending, and their places p · rank + q."""
        lengths = (torch.outer(x.square().sum(0), y.square().sum(0)) for x, y in zip(*self._roots, strict=True))
        sizes = reduce(Tensor.add_, lengths).flatten()
        found, places = sizes.topk(min(self.pairs, len(sizes)))
        return found, places

    def reaches(self, damping: float) -> bool:
        """Whether no term that is left out exceeds the damping."""
        found, _ = self._largest
        return len(found) < self.pairs or float(found[-1]) <= damping

    @cached_property
    def cheap(self) -> bool:
        """Whether an application costs less than a product with the matrix."""
        products = 0
        for (i, j), block in self.blocks.items():
            if isinstance(block, Kronecker):
                (rows, cols), width = block.G.shape, block.A.shape[1]
                products += (1 if i == j else 2) * rows * width * (cols + len(block.A))
        return products > 2 * TRIANGULAR * self.pairs**2

    def __call__(self, damping: float) -> Callable[[Tensor], Tensor]:
        """The approximate inverse of the whole matrix plus `damping` I, for columns (P, k) in unit order.

        Raises:
            SingularMatrixError: the damping drowns in rounding.
        """
        inputs, outputs = self._roots
        found, places = self._largest
        places = places[found > damping]
        p, q = places // outputs[0].shape[1], places % outputs[0].shape[1]
        ranks = (int(k.max()) + 1 if len(k) else 0 for k in (p, q))
        inputs, outputs = (
            [part[:, :rank] for part in roots] for roots, rank in zip((inputs, outputs), ranks, strict=True)
        )
        products = (_gram_at(x, p).mul_(_gram_at(y, q)) for x, y in zip(inputs, outputs, strict=True))
        gram = reduce(Tensor.add_, products)
        factor = DampedCholesky(gram, damping, "the leading part of a Khatri-Rao product")
        alone = {i: self.blocks[i, i].shifted(damping) for i in range(self.count) if i not in self.coupled}
        widths = [self.blocks[i, i].shape[0] for i in range(self.count)]
        given = self.blocks[0, 0].dtype
        enough = torch.finfo(given).eps * (float(found[0]) if len(found) else 0.0) < 0.1 * damping
        work = given if enough else torch.float64
        inputs, outputs = ([part.to(work) for part in roots] for roots in (inputs, outputs))

        def inverse(v: Tensor) -> Tensor:
            parts = list(v.split(widths))
            mine = [self._matrices(i, parts[i].to(work)) for i in self.coupled]
            products = (y.mT @ part @ x for part, x, y in zip(mine, inputs, outputs, strict=True))
            along = reduce(Tensor.add_, products)  # (k, rank of G, rank of A)
            mixed = torch.zeros_like(along)
            mixed[:, q, p] = factor.solve(along[:, q, p].mT).mT
            for i, part, x, y in zip(self.coupled, mine, inputs, outputs, strict=True):
                parts[i] = ((part - y @ mixed @ x.mT) / damping).flatten(1).mT.to(v.dtype)
            for i, own in alone.items():
                parts[i] = own._solve(parts[i])
            return torch.cat(parts)

        return inverse

    def _matrices(self, i: int, v: Tensor) -> Tensor:
        """Columns (P_i, k) as matrices (k, d_g, d_a)."""
        block = self.blocks[i, i]
        assert isinstance(block, Kronecker)
        return v.mT.reshape(v.shape[1], len(block.G), len(block.A))


def _gram_at(x: Tensor, columns: Tensor) -> Tensor:
    """Inner products of some columns of x, each of which may be taken several times."""
    if len(x) > GATHERED:
        return (x.mT @ x)[columns][:, columns]
    taken = x[:, columns]
    return taken.mT @ taken
