"""Sums of Kronecker products, Σ_k A_k ⊗ G_k (nearest Kronecker products of rank r), and the inverse of a sum of two.

Products, norms and inner products stay factored. Two terms have a factored inverse where one of them is definite
(Martens & Grosse 2015, appendix B, with Cholesky factors in place of symmetric roots): with A = L Lᵀ,
L⁻¹ C L⁻ᵀ = E diag(s) Eᵀ and K = L⁻ᵀ E, that of A ⊗ G − C ⊗ D is (K_A ⊗ K_G) (I − S_A ⊗ S_G)⁻¹ (K_A ⊗ K_G)ᵀ. Other sums
are solved densely while that is small, and by conjugate gradients beyond.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fisherviz.operators.base import NormOrder, Operator, Symmetric
from fisherviz.operators.dense import Dense
from fisherviz.operators.diagonal_kronecker import DiagonalKronecker
from fisherviz.operators.factorise import (
    SingularMatrixError,
    cholesky,
    eigenvalues,
    eigh,
    is_symmetric,
    symmetric,
)
from fisherviz.operators.kronecker import Kronecker, KroneckerEigen, act
from fisherviz.operators.lanczos import cg, spectral_norm
from fisherviz.support.memory import DENSE_LIMIT, require_dense

INCONSISTENT = 1.01
"""A whitened second moment beyond this cannot come from one set of examples; rounding stays far below."""
MOST_CONDITION = 1e8
"""Of the product that two terms are whitened by: half of float64's digits are left."""


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
    def _inverted(self) -> KroneckerDifferenceInverse | None:
        """The inverse of two terms in closed form, in float64; None where neither is safely definite."""
        return KroneckerDifferenceInverse.from_sum(*self.terms) if len(self.terms) == 2 else None

    @cached_property
    def _factorised(self) -> Operator | None:
        """One term as it is, several dense while that is small, or None."""
        if len(self.terms) == 1:
            return self.terms[0]
        return Dense(self.to_dense()) if self.shape[0] ** 2 <= DENSE_LIMIT else None

    def inverse(self) -> Operator:
        """Return the inverse: factored for one term or a definite pair, dense (and refused when large) for others."""
        self.require_square("inverse")
        if self._inverted is not None:
            return self._inverted.to(self.dtype)
        if self._factorised is None:
            require_dense(*self.shape, "the inverse of a sum of Kronecker products", self.tensors[0])
            return Dense(self.to_dense()).inverse()
        return self._factorised.inverse()

    @property
    def direct(self) -> bool:
        """While the terms have a factorisation of their own, or the matrix is small enough to be dense."""
        return self._inverted is not None or self._factorised is not None

    def log_determinant(self) -> float:
        """Of the one term or the definite pair, or dense where that is small."""
        if self._inverted is not None:
            return -self._inverted.log_determinant()
        return super().log_determinant() if self._factorised is None else self._factorised.log_determinant()

    def _solve(self, v: Tensor) -> Tensor:
        if self._inverted is not None:
            return (self._inverted @ v.double()).to(v.dtype)
        return cg(self.__matmul__, v) if self._factorised is None else self._factorised._solve(v)

    def _inverse_root(self, z: Tensor) -> Tensor:
        if self._inverted is not None:
            return self._inverted.root(z.double()).to(z.dtype)
        return super()._inverse_root(z) if self._factorised is None else self._factorised.inverse_root(z)


class KroneckerDifferenceInverse(Symmetric):
    """The inverse of A ⊗ G − C ⊗ D, known by what diagonalises both products; see `from_difference`.

    Args:
        KA: (d_a, d_a) with K_Aᵀ A K_A = I and K_Aᵀ C K_A = diag(sA).
        sA: (d_a,), in [0, 1] where A and C are moments.
        KG: (d_g, d_g) with K_Gᵀ G K_G = I and K_Gᵀ D K_G = diag(sG).
        sG: (d_g,), likewise.
        weight: a number that the inverse is multiplied with.

    Raises:
        SingularMatrixError: when the difference is not positive definite.
    """

    def __init__(self, KA: Tensor, sA: Tensor, KG: Tensor, sG: Tensor, weight: float = 1.0) -> None:
        if KA.shape != (len(sA),) * 2 or KG.shape != (len(sG),) * 2:
            raise ValueError(
                f"KroneckerDifferenceInverse takes KA (d_a, d_a), sA (d_a,), KG (d_g, d_g) and sG (d_g,), "
                f"not {tuple(KA.shape)}, {tuple(sA.shape)}, {tuple(KG.shape)}, {tuple(sG.shape)}."
            )
        # 1 - sG sA is small where it matters, so it is formed before anything is rounded to KA's dtype.
        gap = 1 - torch.outer(sG.double(), sA.double())
        smallest = float(gap.min())
        if not smallest > 100 * torch.finfo(KA.dtype).eps:
            raise SingularMatrixError(
                "the covariance of a layer given the next one, in whitened coordinates,",
                gap.numel(),
                smallest,
                1e-3 if KA.dtype == torch.float32 else 1e-6,
                "a combination of the layer's inputs (the bias coordinate, say) and one of its "
                "pseudo-gradients are linear functions of the next layer's, so that no block-tridiagonal "
                "inverse exists without factored Tikhonov damping",
            )
        self.KA, self.sA, self.KG, self.sG, self.weight = KA, sA, KG, sG, weight
        self.S = (weight / gap).to(KA.dtype)
        self._product = KroneckerEigen(KA, KG, self.S)
        self.shape, self.tensors = (gap.numel(), gap.numel()), (KA, KG, self.S)

    @classmethod
    def from_difference(cls, A: Tensor, G: Tensor, C: Tensor, D: Tensor) -> KroneckerDifferenceInverse:
        """Invert A ⊗ G − C ⊗ D.

        Args:
            A: (d_a, d_a) positive definite.
            G: (d_g, d_g) positive definite.
            C: (d_a, d_a) positive semidefinite, at most A.
            D: (d_g, d_g) positive semidefinite, at most G.

        Returns:
            The inverse, in the inputs' dtype; the work is done in float64.

        Raises:
            SingularMatrixError: when A, G or the difference is not positive definite.
            ValueError: when C exceeds A or D exceeds G.
        """
        L_a = cholesky(A, "the A factor", torch.float64)
        L_g = cholesky(G, "the G factor", torch.float64)
        return cls._from_whitened(L_a, _both_sides(L_a, C.double()), L_g, _both_sides(L_g, D.double()), A.dtype)

    @classmethod
    def from_sum(cls, *terms: Operator) -> KroneckerDifferenceInverse | None:
        """Invert A ⊗ G + C ⊗ D by the better conditioned of the two.

        Args:
            *terms: the two products.

        Returns:
            The inverse in float64; None where no term is definite with a condition below `MOST_CONDITION`, or the sum
            is not.
        """
        if not all(isinstance(t, Kronecker) and is_symmetric(t.A) and is_symmetric(t.G) for t in terms):
            return None
        pairs = [(t.A.double(), t.G.double()) for t in terms if isinstance(t, Kronecker)]
        conditions = [_condition(A) * _condition(G) for A, G in pairs]
        if not min(conditions) <= MOST_CONDITION:
            return None
        if conditions[1] < conditions[0]:
            pairs.reverse()
        (A, G), (C, D) = pairs
        L_a, L_g = (cholesky(M, f"the {name} factor") for M, name in ((A, "A"), (G, "G")))
        (KA, sA), (KG, sG) = (_diagonalised(L, _both_sides(L, M), "terms") for L, M in ((L_a, C), (L_g, D)))
        if not float(1 + torch.outer(sG, sA).min()) > 100 * torch.finfo(terms[0].dtype).eps:
            return None
        return cls(KA, sA, KG, -sG)

    @classmethod
    def from_cross(
        cls, A: Tensor, G: Tensor, A_cross: Tensor, G_cross: Tensor, A_next: Tensor, G_next: Tensor
    ) -> KroneckerDifferenceInverse:
        """Invert Σ_{i|i+1} = A ⊗ G − A× A₊⁻¹ A×ᵀ ⊗ G× G₊⁻¹ G×ᵀ (section 4.3).

        C and D are never formed: they are squares of the cross moments whitened on both sides.

        Args:
            A: (d_a, d_a) moment of this layer's inputs, damped or not.
            G: (d_g, d_g) moment of its pseudo-gradients.
            A_cross: (d_a, d_a') moment between this layer's inputs and the next one's.
            G_cross: (d_g, d_g').
            A_next: (d_a', d_a') moment of the next layer.
            G_next: (d_g', d_g').

        Returns:
            The inverse, in the inputs' dtype; the work is done in float64.

        Raises:
            SingularMatrixError: when a moment or Σ is not positive definite.
            ValueError: when the moments are not those of one set of examples.
        """
        whitened: list[tuple[Tensor, Tensor]] = []
        for M, cross, M_next, name in ((A, A_cross, A_next, "A"), (G, G_cross, G_next, "G")):
            L = cholesky(M, f"the {name} factor", torch.float64)
            L_next = cholesky(M_next, f"the next layer's {name} factor", torch.float64)
            half = torch.linalg.solve_triangular(L, cross.double(), upper=False)
            X = torch.linalg.solve_triangular(L_next, half.mT, upper=False).mT
            whitened.append((L, symmetric(X @ X.mT)))
        (L_a, C), (L_g, D) = whitened
        return cls._from_whitened(L_a, C, L_g, D, A.dtype)

    @classmethod
    def _from_whitened(
        cls, L_a: Tensor, C: Tensor, L_g: Tensor, D: Tensor, dtype: torch.dtype
    ) -> KroneckerDifferenceInverse:
        """From Cholesky factors of A and G, and C and D in whitened coordinates."""
        parts: list[Tensor] = []
        for L, W, name in ((L_a, C, "inputs"), (L_g, D, "pseudo-gradients")):
            K, s = _diagonalised(L, W, name)
            if float(s.max()) > INCONSISTENT:
                raise ValueError(
                    f"the moments of the {name} have a squared correlation of {float(s.max()):.4g}, above 1; "
                    f"take all A and G moments from the same examples with the same weights."
                )
            parts += [K.to(dtype), s.clamp(0, 1)]
        KA, sA, KG, sG = parts
        return cls(KA, sA, KG, sG)

    def _matmul(self, v: Tensor) -> Tensor:
        return self._product @ v

    def to_dense(self) -> Tensor:
        """Return K diag(S) Kᵀ."""
        return self._product.to_dense()

    def diagonal(self) -> Tensor:
        """Return the main diagonal."""
        return self._product.diagonal()

    def scale(self, factor: float) -> KroneckerDifferenceInverse:
        """Multiply by a number."""
        return KroneckerDifferenceInverse(self.KA, self.sA, self.KG, self.sG, self.weight * factor)

    def shifted(self, value: float) -> Dense:
        """Add a multiple of the identity; the result has no such structure and is dense."""
        require_dense(*self.shape, "damping the inverse of a Kronecker difference", self.tensors[0])
        return Dense(self.to_dense()).shifted(value)

    def _norm(self, order: NormOrder) -> float:
        if order == "spectral":
            return self._largest_eigenvalue()
        if order == "trace":
            return float(self.diagonal().sum(dtype=torch.float64))
        overlap_a, overlap_g = (K.double().mT @ K.double() for K in (self.KA, self.KG))
        S = self.S.double()
        return float((S * (overlap_g.square() @ S @ overlap_a.square())).sum().sqrt())

    @cached_property
    def _difference(self) -> KroneckerSum:
        root_a, root_g = (torch.linalg.inv(K.double()) for K in (self.KA, self.KG))
        pairs = [
            (root_a.mT @ root_a, root_g.mT @ root_g / self.weight),
            (root_a.mT * self.sA @ root_a, root_g.mT * self.sG @ root_g / -self.weight),
        ]
        return KroneckerSum([(symmetric(A).to(self.dtype), symmetric(G).to(self.dtype)) for A, G in pairs])

    def inverse(self) -> KroneckerSum:
        """Return the difference A ⊗ G − C ⊗ D itself."""
        return self._difference

    def log_determinant(self) -> float:
        """Of K diag(S) Kᵀ with K = K_G ⊗ K_A."""
        own_a, own_g = (2 * float(torch.linalg.slogdet(K.double()).logabsdet) for K in (self.KA, self.KG))
        return float(self.S.double().log().sum()) + len(self.KG) * own_a + len(self.KA) * own_g

    def _solve(self, v: Tensor) -> Tensor:
        return self._difference @ v

    def _inverse_root(self, z: Tensor) -> Tensor:
        root_a, root_g = (torch.linalg.inv(K.double()).mT.to(self.dtype) for K in (self.KA, self.KG))
        return act(root_a, root_g, z / self.S.sqrt().reshape(-1, 1))

    def root(self, z: Tensor) -> Tensor:
        """Apply K diag(√S), a root of this matrix itself.

        Args:
            z: (rows, k).

        Returns:
            (rows, k).
        """
        return act(self.KA, self.KG, self.S.sqrt().reshape(-1, 1) * z)

    def to(self, dtype: torch.dtype) -> KroneckerDifferenceInverse:
        """Return the same in another precision.

        Args:
            dtype: of the factors.

        Returns:
            The operator.
        """
        return KroneckerDifferenceInverse(self.KA.to(dtype), self.sA, self.KG.to(dtype), self.sG, self.weight)


def _diagonalised(L: Tensor, W: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """K = L⁻ᵀ E and s for the eigenpairs of a matrix in coordinates that L whitens."""
    s, E = eigh(W, f"the whitened moment of the {name}")
    return torch.linalg.solve_triangular(L.mT, E, upper=True), s


def _condition(M: Tensor) -> float:
    """Condition number of a symmetric matrix; infinite where it is not positive definite."""
    values = eigenvalues(M)
    return float(values[-1] / values[0]) if values[0] > 0 else math.inf


def _both_sides(L: Tensor, M: Tensor) -> Tensor:
    """Whiten: L⁻¹ M L⁻ᵀ."""
    half = torch.linalg.solve_triangular(L, M, upper=False)
    return symmetric(torch.linalg.solve_triangular(L, half.mT, upper=False))
