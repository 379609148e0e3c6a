"""A sum of Kronecker products, Σ_k A_k ⊗ G_k: what the nearest-Kronecker approximation of rank r is.

Products, norms and inner products stay factored. A sum of two or more has no factored inverse in general:
solving is dense while that is small, and by conjugate gradients beyond.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fisherviz.operators.base import NormOrder, Operator
from fisherviz.operators.dense import Dense
from fisherviz.operators.diagonal_kronecker import DiagonalKronecker
from fisherviz.operators.factorise import DENSE_LIMIT, require_dense
from fisherviz.operators.kronecker import Kronecker
from fisherviz.operators.lanczos import cg, spectral_norm


class KroneckerSum(Operator):
    """Σ_k of the Kronecker products that map V to G_k V A_kᵀ.

    Args:
        factors: pairs (A_k, G_k), all of one shape.
    """

    def __init__(self, factors: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Keep one `Kronecker` per pair."""
        if not factors:
            raise ValueError("KroneckerSum needs at least one pair of factors.")
        self.terms = tuple((DiagonalKronecker if A.ndim == 1 else Kronecker)(A, G) for A, G in factors)
        if len({(term.A.shape, term.G.shape, term.dtype, term.device) for term in self.terms}) > 1:
            raise ValueError("KroneckerSum takes pairs of one shape, dtype and device.")
        self.shape = self.terms[0].shape
        self.tensors = tuple(t for term in self.terms for t in term.tensors)

    def arguments(self) -> dict[str, Any]:
        """What its constructor takes again."""
        return {"factors": [(term.A, term.G) for term in self.terms]}

    @property
    def T(self) -> KroneckerSum:
        """The transpose."""
        return KroneckerSum([(term.T.A, term.T.G) for term in self.terms])

    def _matmul(self, v: Tensor) -> Tensor:
        return torch.stack([term @ v for term in self.terms]).sum(0)

    def to_dense(self) -> Tensor:
        """Return the matrix."""
        return torch.stack([term.to_dense() for term in self.terms]).sum(0)

    def diagonal(self) -> Tensor:
        """Return the main diagonal."""
        return torch.stack([term.diagonal() for term in self.terms]).sum(0)

    def scale(self, factor: float) -> KroneckerSum:
        """Multiply by a number."""
        return KroneckerSum([(term.A, term.G * factor) for term in self.terms])

    def shifted(self, value: float) -> KroneckerSum:
        """Add a multiple of the identity, as one more term."""
        A, G = self.terms[0].A, self.terms[0].G
        if len(set(A.shape)) > 1 or len(set(G.shape)) > 1:
            raise ValueError(f"damping needs square factors, these are {tuple(A.shape)} and {tuple(G.shape)}.")
        eye_a, eye_g = (
            torch.ones_like(M) if M.ndim == 1 else torch.eye(len(M), dtype=M.dtype, device=M.device) for M in (A, G)
        )
        return KroneckerSum([*((term.A, term.G) for term in self.terms), (eye_a, value * eye_g)])

    def _norm(self, order: NormOrder) -> float:
        if order == "trace":
            return sum(term.norm("trace") for term in self.terms)
        if order == "spectral":
            return spectral_norm(self.__matmul__, self.T.__matmul__, self.shape, dtype=self.dtype, device=self.device)
        A = torch.stack([term.A.double().reshape(-1) for term in self.terms])
        G = torch.stack([term.G.double().reshape(-1) for term in self.terms])
        return float(((A @ A.mT) * (G @ G.mT)).sum().clamp_min(0).sqrt())

    @cached_property
    def _as_dense(self) -> Dense:
        return Dense(self.to_dense())

    def inverse(self) -> Operator:
        """Return the inverse: factored for one term, dense (and refused when large) for more."""
        if len(self.terms) == 1:
            return self.terms[0].inverse()
        self.require_square("inverse")
        require_dense(*self.shape, "the inverse of a sum of Kronecker products")
        return self._as_dense.inverse()

    @property
    def direct(self) -> bool:
        """While one term has its own factorisation, or the matrix is small enough to be dense."""
        return len(self.terms) == 1 or self.shape[0] ** 2 <= DENSE_LIMIT

    def log_determinant(self) -> float:
        """Of the one term, or dense where that is small."""
        if not self.direct:
            return super().log_determinant()
        return (self.terms[0] if len(self.terms) == 1 else self._as_dense).log_determinant()

    def _solve(self, v: Tensor) -> Tensor:
        if self.direct:
            return (self.terms[0] if len(self.terms) == 1 else self._as_dense).solve(v)
        return cg(self.__matmul__, v)
