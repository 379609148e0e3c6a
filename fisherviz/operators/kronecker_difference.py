"""The inverse of a difference of Kronecker products, A ⊗ G − C ⊗ D, without forming it.

Appendix B of Martens & Grosse 2015, with Cholesky factors in place of symmetric roots: A = L Lᵀ,
L⁻¹ C L⁻ᵀ = E diag(s) Eᵀ, K = L⁻ᵀ E, and the inverse is (K_A ⊗ K_G) (I − S_A ⊗ S_G)⁻¹ (K_A ⊗ K_G)ᵀ.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fisherviz.operators.base import NormOrder, Symmetric
from fisherviz.operators.dense import Dense
from fisherviz.operators.factorise import SingularMatrixError, cholesky, eigh, require_dense, symmetric
from fisherviz.operators.kronecker import KroneckerEigen
from fisherviz.operators.kronecker_sum import KroneckerSum

INCONSISTENT = 1.01
"""A whitened second moment beyond this cannot come from one set of examples; rounding stays far below."""


class KroneckerDifferenceInverse(Symmetric):
    """The inverse of A ⊗ G − C ⊗ D, known by what diagonalises both products; see `from_difference`.

    Args:
        KA: (d_a, d_a) with K_Aᵀ A K_A = I and K_Aᵀ C K_A = diag(sA).
        sA: (d_a,) in [0, 1].
        KG: (d_g, d_g) with K_Gᵀ G K_G = I and K_Gᵀ D K_G = diag(sG).
        sG: (d_g,) in [0, 1].
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
        parts = []
        for L, W, name in ((L_a, C, "inputs"), (L_g, D, "pseudo-gradients")):
            s, E = eigh(W, f"the whitened moment of the {name}")
            if float(s.max()) > INCONSISTENT:
                raise ValueError(
                    f"the moments of the {name} have a squared correlation of {float(s.max()):.4g}, above 1; "
                    f"take all A and G moments from the same examples with the same weights."
                )
            parts += [torch.linalg.solve_triangular(L.mT, E, upper=True).to(dtype), s.clamp(0, 1)]
        return cls(*parts)

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
        require_dense(*self.shape, "damping the inverse of a Kronecker difference")
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


def _both_sides(L: Tensor, M: Tensor) -> Tensor:
    """Whiten: L⁻¹ M L⁻ᵀ."""
    half = torch.linalg.solve_triangular(L, M, upper=False)
    return symmetric(torch.linalg.solve_triangular(L, half.mT, upper=False))
