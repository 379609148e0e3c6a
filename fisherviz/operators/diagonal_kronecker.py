"""A Kronecker product A ⊗ G with a diagonal A, given as (d_a,): it maps V (d_g, d_a) to G V A.

What one-hot inputs leave of a Kronecker product (embeddings): the (d_a, d_a) factor is never written down.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from fisherviz.operators.base import NormOrder, Symmetric
from fisherviz.operators.dense import spectral_norm_of
from fisherviz.operators.factorise import (
    SingularMatrixError,
    cholesky,
    eigh,
    fault_of,
    sufficient_damping,
    trusted_cholesky,
)
from fisherviz.operators.kronecker import KroneckerEigen, kron
from fisherviz.operators.triangular import log_determinant_of, root_solve, solve_columns


class DiagonalKronecker(Symmetric):
    """The Kronecker product of a diagonal and a symmetric matrix.

    Args:
        A: (d_a,) diagonal of the input factor.
        G: (d_g, d_g) output factor.
    """

    factored = True

    def __init__(self, A: Tensor, G: Tensor) -> None:
        """Keep the two factors."""
        if A.ndim != 1 or G.ndim != 2 or G.shape[0] != G.shape[1]:
            raise ValueError(
                f"DiagonalKronecker takes a diagonal and a square matrix, not shapes {tuple(A.shape)} and "
                f"{tuple(G.shape)}."
            )
        self.A, self.G = A, G
        self.shape, self.tensors = (len(A) * len(G),) * 2, (A, G)

    def _matmul(self, v: Tensor) -> Tensor:
        V = v.mT.reshape(v.shape[1], len(self.G), len(self.A))
        return ((self.G @ V) * self.A).reshape(v.shape[1], -1).mT

    def to_dense(self) -> Tensor:
        """Return kron(G, diag(a))."""
        return kron(self.G, torch.diag(self.A))

    def diagonal(self) -> Tensor:
        """Return the main diagonal."""
        return torch.outer(self.G.diagonal(), self.A).reshape(-1)

    def scale(self, factor: float) -> DiagonalKronecker:
        """Multiply by a number (it goes into G)."""
        return DiagonalKronecker(self.A, self.G * factor)

    def map_factors(self, function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> DiagonalKronecker:
        """Return the product of the changed factors."""
        return DiagonalKronecker(*function(self.A, self.G))

    def shifted(self, value: float) -> KroneckerEigen:
        """Add a multiple of the identity in G's eigenbasis, which is computed once for all values."""
        return self.eigen.shifted(value)

    @cached_property
    def eigen(self) -> KroneckerEigen:
        """The same matrix in its eigenbasis."""
        values, basis = eigh(self.G, "the G factor")
        return KroneckerEigen(None, basis, torch.outer(values, self.A))

    def _norm(self, order: NormOrder) -> float:
        A, G = self.A.double(), self.G.double()
        if order == "fro":
            return float(A.norm() * G.norm())
        if order == "spectral":
            return float(A.abs().max()) * spectral_norm_of(G)
        return float(A.sum() * G.trace())

    @cached_property
    def _cholesky(self) -> Tensor:
        """Of G, once it is known that A is positive too."""
        found: SingularMatrixError | None = None
        try:
            L = (trusted_cholesky if self._trusted else cholesky)(self.G, "the G factor")
            if (smallest := float(self.A.min())) > 0:
                return L
            why = f"the A factor, a diagonal, has the entry {smallest:.3g}"
        except SingularMatrixError as error:
            found, why = error, fault_of(error)
        S = self.eigen.S
        damping = sufficient_damping(float(S.min()), float(S.abs().max()), self.dtype)
        raise SingularMatrixError("the Kronecker product", self.shape[0], float(S.min()), damping, why) from found

    def inverse(self) -> DiagonalKronecker:
        """Return the product of the factors' inverses."""
        return DiagonalKronecker(1 / self.A, torch.cholesky_inverse(self._cholesky))

    def log_determinant(self) -> float:
        """From both factors: d_g log det A + d_a log det G."""
        own = len(self.A) * log_determinant_of(self._cholesky)
        return own + len(self.G) * float(self.A.double().log().sum())

    def _solve(self, v: Tensor) -> Tensor:
        d_g, d_a, k = len(self.G), len(self.A), v.shape[1]
        half = solve_columns(self._cholesky, v.reshape(d_g, d_a * k)).view(d_g, d_a, k)
        return half.div_(self.A.unsqueeze(1)).reshape(-1, k)

    def _inverse_root(self, z: Tensor) -> Tensor:
        Z = z.mT.reshape(z.shape[1], len(self.G), len(self.A))
        return (root_solve(self._cholesky, Z) / self.A.sqrt()).flatten(1).mT
