"""F̂, the matrix with a block-tridiagonal inverse that agrees with F̃ on the tridiagonal blocks.

Martens & Grosse 2015, section 4.3: F̂⁻¹ = Ξᵀ Λ Ξ over a chain of layers, with Ψ_{i,i+1} = Ψ^A ⊗ Ψ^G and
Λ = diag(Σ_{i|i+1}⁻¹). Every block of F̂ itself is one Kronecker product; others rely on `solve` and `block`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from fisherviz.operators.base import NormOrder, Operator, Symmetric
from fisherviz.operators.dense import Dense
from fisherviz.operators.factorise import eigh, symmetric
from fisherviz.operators.kronecker import Kronecker
from fisherviz.operators.kronecker_sum import KroneckerDifferenceInverse, KroneckerSum
from fisherviz.operators.simple import Zero
from fisherviz.support.memory import require_dense


class BlockTridiagonal(Symmetric):
    """F̂ of a chain of layers, on their unit-order vectors one after the other.

    Where a cross moment is None the chain breaks: the two layers are uncoupled, and so is all on either side.

    Args:
        A: (d_a, d_a) moments of the inputs, one per layer in forward order, damped or not.
        G: (d_g, d_g) moments of the pseudo-gradients, likewise.
        A_next: (d_a, d_a') cross moments between each layer and the next; one fewer than layers.
        G_next: (d_g, d_g') likewise.

    Raises:
        ValueError: when numbers or shapes do not fit.
    """

    factored = True

    def __init__(
        self,
        A: Sequence[Tensor],
        G: Sequence[Tensor],
        A_next: Sequence[Tensor | None],
        G_next: Sequence[Tensor | None],
    ) -> None:
        if not len(A) == len(G) == len(A_next) + 1 == len(G_next) + 1:
            raise ValueError(
                f"a chain of n layers takes n moments and n - 1 cross moments, got {len(A)} A, {len(G)} G, "
                f"{len(A_next)} A_next and {len(G_next)} G_next."
            )
        for name, moments, crosses in (("A", A, A_next), ("G", G, G_next)):
            for i, cross in enumerate(crosses):
                fitting = (len(moments[i]), len(moments[i + 1]))
                if (cross is None) != (G_next[i] is None) or (cross is not None and cross.shape != fitting):
                    got = None if cross is None else tuple(cross.shape)
                    raise ValueError(f"{name}_next[{i}] must have its neighbours' shape {fitting}, not {got}.")
        self.A, self.G, self.A_next, self.G_next = tuple(A), tuple(G), tuple(A_next), tuple(G_next)
        self.layers = tuple(Kronecker(a, g) for a, g in zip(A, G, strict=True))
        self.crosses = tuple(
            None if a is None or g is None else Kronecker(a, g) for a, g in zip(A_next, G_next, strict=True)
        )
        """Between each layer and the next; None where the chain breaks."""
        self.sizes = [layer.shape[0] for layer in self.layers]
        self._last: tuple[int, list[Operator]] = -1, []
        self.shape = sum(self.sizes), sum(self.sizes)
        self.tensors = tuple(t for t in (*A, *G, *A_next, *G_next) if t is not None)

    @cached_property
    def psi(self) -> tuple[Kronecker | None, ...]:
        """Ψ_{i,i+1} = A_{i,i+1} A_{i+1}⁻¹ ⊗ G_{i,i+1} G_{i+1}⁻¹, the regression of a layer on the next."""
        return tuple(
            None if cross is None else Kronecker(_regression(cross.A, after.A), _regression(cross.G, after.G))
            for cross, after in zip(self.crosses, self.layers[1:], strict=True)
        )

    @cached_property
    def precisions(self) -> tuple[Operator, ...]:
        """Σ_{i|i+1}⁻¹ for each layer given the next: the blocks of Λ; the last layer's is its own inverse."""
        return tuple(
            layer.inverse()
            if cross is None
            else KroneckerDifferenceInverse.from_cross(layer.A, layer.G, cross.A, cross.G, after.A, after.G)
            for layer, cross, after in zip(
                self.layers, (*self.crosses, None), (*self.layers[1:], self.layers[0]), strict=True
            )
        )

    @cached_property
    def covariances(self) -> tuple[Operator, ...]:
        """Σ_{i|i+1} for each layer given the next."""
        blocks: list[Operator] = []
        for layer, psi, cross in zip(self.layers, (*self.psi, None), (*self.crosses, None), strict=True):
            if psi is None or cross is None:
                blocks.append(layer)
            else:
                explained = symmetric(psi.A @ cross.A.mT), symmetric(-psi.G @ cross.G.mT)
                blocks.append(KroneckerSum([(layer.A, layer.G), explained]))
        return tuple(blocks)

    def block(self, row: int, col: int) -> Operator:
        """Return block (row, col) of F̂: F̃'s own on the tridiagonal, Ψ_{i,i+1} F̂_{i+1,j} beyond (figure 5).

        Args:
            row: position of a layer in the chain.
            col: position of another.

        Returns:
            A `Kronecker` operator; `Zero` across a break of the chain.

        Raises:
            ValueError: when a position is outside the chain.
        """
        for position in (row, col):
            if not 0 <= position < len(self.layers):
                raise ValueError(f"layer position must be 0 to {len(self.layers) - 1}, not {position}.")
        if row > col:
            return self.block(col, row).T
        return self.column(col)[row]

    def column(self, col: int) -> list[Operator]:
        """Blocks (0 … col, col), made from the diagonal upwards by one product with Ψ each; the last is kept."""
        known, blocks = self._last  # read once: another thread may ask for another
        if known != col:
            blocks = self._upwards(col)
            self._last = col, blocks
        return blocks

    def _upwards(self, col: int) -> list[Operator]:
        blocks: list[Operator] = [self.layers[col]]
        for i in range(col - 1, -1, -1):
            cross, below, psi = self.crosses[i], blocks[0], self.psi[i]
            if cross is None or psi is None or not isinstance(below, Kronecker):
                blocks.insert(0, Zero(self.sizes[i], self.sizes[col], self.dtype, self.device))
            elif i == col - 1:
                blocks.insert(0, cross)
            else:
                blocks.insert(0, Kronecker(psi.A @ below.A, psi.G @ below.G))
        return blocks

    def _matmul(self, v: Tensor) -> Tensor:
        # F̂ = Ξ⁻¹ Λ⁻¹ Ξ⁻ᵀ: one sweep up the chain, the conditional covariances, one sweep down.
        parts = list(v.split(self.sizes))
        for i, psi in enumerate(self.psi):
            if psi is not None:
                parts[i + 1] = parts[i + 1] + psi.T @ parts[i]
        parts = [sigma @ part for sigma, part in zip(self.covariances, parts, strict=True)]
        for i in reversed(range(len(self.psi))):
            psi = self.psi[i]
            if psi is not None:
                parts[i] = parts[i] + psi @ parts[i + 1]
        return torch.cat(parts)

    def _solve(self, v: Tensor) -> Tensor:
        # F̂⁻¹ = Ξᵀ Λ Ξ.
        given = v.split(self.sizes)
        parts = list(given)
        for i, psi in enumerate(self.psi):
            if psi is not None:
                parts[i] = given[i] - psi @ given[i + 1]
        return self._down([precision @ part for precision, part in zip(self.precisions, parts, strict=True)])

    def _down(self, parts: Sequence[Tensor]) -> Tensor:
        """Ξᵀ of the layers' vectors, in one."""
        out = list(parts)
        for i, psi in enumerate(self.psi):
            if psi is not None:
                out[i + 1] = parts[i + 1] - psi.T @ parts[i]
        return torch.cat(out)

    def _inverse_root(self, z: Tensor) -> Tensor:
        # F̂⁻¹ = Ξᵀ Λ Ξ, so that Ξᵀ times a root of Λ is one.
        roots = [
            precision.root(part) if isinstance(precision, KroneckerDifferenceInverse) else layer.inverse_root(part)
            for layer, precision, part in zip(self.layers, self.precisions, z.split(self.sizes), strict=True)
        ]
        return self._down(roots)

    def log_determinant(self) -> float:
        """Of Λ alone: Ξ is unit triangular."""
        return -sum(precision.log_determinant() for precision in self.precisions)

    def solve_layers(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Solve for one vector per layer.

        Args:
            vectors: (P_i,) or (P_i, k) in unit order, one per layer.

        Returns:
            The solutions, likewise.
        """
        return list(self.solve(torch.cat(list(vectors))).split(self.sizes))

    def to_dense(self) -> Tensor:
        """Return F̂, from its Kronecker blocks."""
        require_dense(*self.shape, "F̂", self.tensors[0])
        columns = []
        for col in range(len(self.layers)):
            upper = self.column(col)
            lower = [self.block(row, col) for row in range(col + 1, len(self.layers))]
            columns.append(torch.cat([block.to_dense() for block in (*upper, *lower)]))
        return torch.cat(columns, 1)

    def diagonal(self) -> Tensor:
        """Return the main diagonal."""
        return torch.cat([layer.diagonal() for layer in self.layers])

    def inverse_dense(self) -> Tensor:
        """Return F̂⁻¹, block by block; blocks off the tridiagonal are exactly zero.

        Returns:
            (P, P).

        Raises:
            SingularMatrixError: when F̂ has no inverse.
            MemoryError: when the array would be too large.
        """
        require_dense(*self.shape, "the dense block-tridiagonal inverse", self.tensors[0])
        inverse = self.A[0].new_zeros(self.shape)
        start = 0
        for i, (size, precision) in enumerate(zip(self.sizes, self.precisions, strict=True)):
            end = start + size
            own = precision.to_dense()
            inverse[start:end, start:end] += own
            if i < len(self.psi) and (psi := self.psi[i]) is not None:
                after = end + self.sizes[i + 1]
                coupling = -(psi.T @ own)
                inverse[end:after, start:end] = coupling
                inverse[start:end, end:after] = coupling.mT
                inverse[end:after, end:after] -= symmetric(psi.T @ coupling.mT)
            start = end
        return inverse

    def inverse(self) -> Dense:
        """Return F̂⁻¹ as a dense operator; `solve` needs no such array."""
        return Dense(self.inverse_dense())

    def map_factors(self, function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> BlockTridiagonal:
        """Change every layer's own two factors; the cross moments stay as they are (section 6.3)."""
        pairs = [function(a, g) for a, g in zip(self.A, self.G, strict=True)]
        return BlockTridiagonal([a for a, _ in pairs], [g for _, g in pairs], self.A_next, self.G_next)

    def shifted(self, value: float) -> Operator:
        """Return self for zero; refuse any other shift.

        Args:
            value: multiple of the identity.

        Returns:
            The operator itself.

        Raises:
            NotImplementedError: F̂ + λI has no block-tridiagonal inverse of this form.
        """
        if value == 0:
            return self
        raise NotImplementedError(
            f"F̂ + {value:.3g} I has no block-tridiagonal inverse in closed form; use "
            f"FactoredTikhonov({value**0.5:.3g}), or conjugate gradients or a dense solve on F̃ + λI."
        )

    def scale(self, factor: float) -> BlockTridiagonal:
        """Multiply by a number (it goes into every G moment).

        Args:
            factor: a positive number.

        Returns:
            Another F̂.

        Raises:
            ValueError: for other numbers: F̂ is positive definite by construction.
        """
        if not factor > 0:
            raise ValueError(f"F̂ is positive definite and can be scaled by positive numbers only, not {factor}.")
        crosses = [None if G is None else G * factor for G in self.G_next]
        return BlockTridiagonal(self.A, [G * factor for G in self.G], self.A_next, crosses)

    def _norm(self, order: NormOrder) -> float:
        if order == "trace":
            return sum(layer.norm("trace") for layer in self.layers)
        if order == "spectral":
            return self._largest_eigenvalue()
        squares = 0.0
        for col in range(len(self.layers)):
            *above, own = (block.norm("fro") ** 2 for block in self.column(col))
            squares += own + 2 * sum(above)
        return squares**0.5


def _regression(cross: Tensor, moment: Tensor) -> Tensor:
    """Regression coefficients, cross · moment⁺, in float64 inside.

    A pseudo-inverse serves products: where the next layer's moment is 0, so is the cross moment.
    Solving goes through `precisions`, which refuse a singular moment.
    """
    values, vectors = eigh(moment, "the moment of the next layer", torch.float64)
    floor = torch.finfo(moment.dtype).eps * len(moment) * values.abs().max()
    reciprocals = torch.where(values > floor, 1 / values, torch.zeros_like(values))
    return (cross.double() @ vectors * reciprocals @ vectors.mT).to(cross.dtype)
