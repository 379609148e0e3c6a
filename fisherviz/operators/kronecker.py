"""One Kronecker product, plain and in its eigenbasis.

`Kronecker(A, G)` maps V (d_g', d_a') to G V Aᵀ; as a matrix in unit order it is kron(G, A), which the KFAC
paper writes A ⊗ G in its input order. `KroneckerEigen` is Q diag(S) Qᵀ, Q = Q_G ⊗ Q_A: EKFAC, or A ⊗ G + λI.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fisherviz.operators.base import NormOrder, Operator, Symmetric
from fisherviz.operators.dense import spectral_norm_of
from fisherviz.operators.factorise import (
    SingularMatrixError,
    cholesky,
    eigh,
    fault_of,
    plus_identity,
    require_positive,
    rounding_floor,
    sufficient_damping,
    symmetric,
    trusted_cholesky,
)
from fisherviz.operators.triangular import log_determinant_of, root_solve, solve_columns, solve_rows


def act(A: Tensor, G: Tensor, v: Tensor) -> Tensor:
    """Apply kron(G, A) to the columns of v without forming it.

    Args:
        A: (d_a, d_a').
        G: (d_g, d_g').
        v: (d_g' d_a', k).

    Returns:
        (d_g d_a, k): each column is G V Aᵀ, row-major.
    """
    V = v.mT.reshape(v.shape[1], G.shape[1], A.shape[1])
    return (G @ V @ A.mT).reshape(v.shape[1], G.shape[0] * A.shape[0]).mT


def kron(G: Tensor, A: Tensor) -> Tensor:
    """Write out a Kronecker product; torch's own fails on factors with a side of one and strides from elsewhere.

    Args:
        G: (d_g, d_g').
        A: (d_a, d_a').

    Returns:
        (d_g d_a, d_g' d_a').
    """
    blocks = G.contiguous()[:, None, :, None] * A.contiguous()[None, :, None, :]
    return blocks.reshape(G.shape[0] * A.shape[0], G.shape[1] * A.shape[1])


class Kronecker(Operator):
    """The Kronecker product that maps V to G V Aᵀ.

    Args:
        A: (d_a, d_a') input factor.
        G: (d_g, d_g') output factor; a number d_g: the identity, written down only if somebody asks for it (FOOF).
    """

    factored = True

    _G: Tensor | None

    def __init__(self, A: Tensor, G: Tensor | int) -> None:
        """Keep the two factors."""
        if isinstance(G, int):
            self._G, self._outputs = None, (G, G)
        else:
            if A.ndim != 2 or G.ndim != 2:
                raise ValueError(f"Kronecker takes two matrices, not shapes {tuple(A.shape)} and {tuple(G.shape)}.")
            if A.dtype != G.dtype or A.device != G.device:
                raise TypeError(
                    f"A is {A.dtype} on {A.device} and G {G.dtype} on {G.device}; bring them together first."
                )
            self._G, self._outputs = G, (G.shape[0], G.shape[1])
        self.A = A
        self.shape = self._outputs[0] * len(A), self._outputs[1] * A.shape[1]
        self.tensors = (A,) if self._G is None else (A, self._G)

    @classmethod
    def over_units(cls, A: Tensor, units: int) -> Kronecker:
        """A ⊗ I with an identity that is not written down: solves and Tikhonov damping touch A alone (FOOF).

        Args:
            A: (d_a, d_a') input factor.
            units: d_g, the number of output units that share it.

        Returns:
            The product.
        """
        return cls(A, units)

    def arguments(self) -> dict[str, Any]:
        """What its constructor takes again."""
        return {"A": self.A, "G": self._outputs[0] if self._G is None else self._G}

    @property
    def first_alone(self) -> bool:
        """Whether it was made as A ⊗ I, by `over_units`."""
        return self._G is None

    @property
    def G(self) -> Tensor:
        """The (d_g, d_g') output factor."""
        if self._G is None:
            return torch.eye(self._outputs[0], dtype=self.A.dtype, device=self.A.device)
        return self._G

    @property
    def T(self) -> Kronecker:
        """The transpose."""
        if self._G is None:
            return Kronecker.over_units(self.A.mT, self._outputs[0])
        return Kronecker(self.A.mT, self._G.mT)

    def _matmul(self, v: Tensor) -> Tensor:
        if self._G is None:
            V = v.mT.reshape(v.shape[1] * self._outputs[0], self.A.shape[1])
            return (V @ self.A.mT).reshape(v.shape[1], self.shape[0]).mT
        return act(self.A, self._G, v)

    def to_dense(self) -> Tensor:
        """Return kron(G, A)."""
        return kron(self.G, self.A)

    def diagonal(self) -> Tensor:
        """Return the main diagonal; the factors themselves need not be square."""
        self.require_square("diagonal")
        entry = torch.arange(self.shape[0], device=self.device)
        (d_a, d_a_), G, A = self.A.shape, self.G, self.A
        return G[entry // d_a, entry // d_a_] * A[entry % d_a, entry % d_a_]

    def scale(self, factor: float) -> Kronecker:
        """Multiply by a number (it goes into G, or into A where G is the identity)."""
        if self._G is None:
            return Kronecker.over_units(self.A * factor, self._outputs[0])
        return Kronecker(self.A, self._G * factor)

    def map_factors(self, function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Kronecker:
        """Return the product of the changed factors."""
        return Kronecker(*function(self.A, self.G))

    def shifted(self, value: float) -> KroneckerEigen | Kronecker:
        """Add a multiple of the identity in the eigenbasis, which is computed once for all values.

        A ⊗ I keeps its form: it becomes (A + value I) ⊗ I.
        """
        if self._G is not None:
            return self.eigen.shifted(value)
        return Kronecker.over_units(plus_identity(self.A, value), self._outputs[0])

    @cached_property
    def eigen(self) -> KroneckerEigen:
        """The same matrix in its eigenbasis; both factors must be symmetric."""
        values_a, basis_a = eigh(self.A, "the A factor")
        values_g, basis_g = eigh(self.G, "the G factor")
        return KroneckerEigen(basis_a, basis_g, torch.outer(values_g, values_a))

    def _norm(self, order: NormOrder) -> float:
        A, G = self.A.double(), self.G.double()
        if order == "fro":
            return float(A.norm() * G.norm())
        if order == "spectral":
            return spectral_norm_of(A) * spectral_norm_of(G)
        if A.shape[0] == A.shape[1]:
            return float(A.trace() * G.trace())
        return float(self.diagonal().sum(dtype=torch.float64))

    @cached_property
    def _choleskys(self) -> tuple[Tensor, Tensor | None]:
        factorise = trusted_cholesky if self._trusted else cholesky
        try:
            L_a = factorise(self.A, "the A factor")
            return L_a, None if self._G is None else factorise(self._G, "the G factor")
        except SingularMatrixError as error:
            # The damping that helps is added to the product, so its eigenvalues decide how much.
            S = self.eigen.S
            damping = sufficient_damping(float(S.min()), float(S.abs().max()), self.dtype)
            what, size = "the Kronecker product", self.shape[0]
            raise SingularMatrixError(what, size, float(S.min()), damping, fault_of(error)) from error

    def inverse(self) -> Kronecker:
        """Return the product of the factors' inverses."""
        L_a, L_g = self._choleskys
        if L_g is None:
            return Kronecker.over_units(torch.cholesky_inverse(L_a), self._outputs[0])
        return Kronecker(torch.cholesky_inverse(L_a), torch.cholesky_inverse(L_g))

    def log_determinant(self) -> float:
        """From both factors: d_g log det A + d_a log det G."""
        L_a, L_g = self._choleskys
        own = self._outputs[0] * log_determinant_of(L_a)
        return own if L_g is None else own + len(L_a) * log_determinant_of(L_g)

    def _solve(self, v: Tensor) -> Tensor:
        L_a, L_g = self._choleskys
        d_g, d_a, k = self._outputs[0], L_a.shape[0], v.shape[1]
        half = v if L_g is None else solve_columns(L_g, v.reshape(d_g, d_a * k))
        if k == 1:
            return solve_rows(L_a, half.reshape(d_g, d_a)).reshape(d_g * d_a, 1)
        rows = half.reshape(d_g, d_a, k).transpose(1, 2).reshape(d_g * k, d_a)
        return solve_rows(L_a, rows).reshape(d_g, k, d_a).transpose(1, 2).reshape(d_g * d_a, k)

    def _inverse_root(self, z: Tensor) -> Tensor:
        L_a, L_g = self._choleskys
        Z = z.mT.reshape(z.shape[1], self._outputs[0], len(L_a))
        half = Z if L_g is None else root_solve(L_g, Z)
        return torch.linalg.solve_triangular(L_a, half, upper=False, left=False).flatten(1).mT

    def act_rows(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Rows a Aᵀ and g Gᵀ whose product is this operator times gᵀ a (Martens & Grosse 2015, end of section 8).

        Args:
            a: (R, d_a) inputs, one row per example or position.
            g: (R, d_g) gradients at the outputs.

        Returns:
            (R, d_a) and (R, d_g).
        """
        return a @ self.A.mT, g if self._G is None else g @ self._G.mT

    def solve_rows(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Rows a A⁻¹ and g G⁻¹ whose product is the inverse times gᵀ a (Martens & Grosse 2015, end of section 8).

        Args:
            a: (R, d_a) inputs.
            g: (R, d_g) gradients at the outputs.

        Returns:
            (R, d_a) and (R, d_g).
        """
        L_a, L_g = self._choleskys
        return solve_rows(L_a, a), g if L_g is None else solve_rows(L_g, g)


class KroneckerEigen(Symmetric):
    """Q diag(vec S) Qᵀ with the orthogonal Q = Q_G ⊗ Q_A (George et al. 2018).

    Args:
        QA: (d_a, d_a) orthogonal, eigenvectors of A in columns; None: the identity, of a diagonal A.
        QG: (d_g, d_g) orthogonal, eigenvectors of G in columns.
        S: (d_g, d_a) eigenvalues.
    """

    def __init__(self, QA: Tensor | None, QG: Tensor, S: Tensor) -> None:
        """Keep the bases and the eigenvalues."""
        inputs = (S.shape[-1],) * 2 if QA is None else tuple(QA.shape)
        if inputs != (S.shape[-1],) * 2 or QG.shape != (S.shape[0],) * 2 or S.ndim != 2:
            raise ValueError(
                f"KroneckerEigen takes QA (d_a, d_a), QG (d_g, d_g) and S (d_g, d_a), not {inputs}, "
                f"{tuple(QG.shape)} and {tuple(S.shape)}."
            )
        self.QA, self.QG, self.S = QA, QG, S
        self.shape, self.tensors = (S.numel(), S.numel()), (S, QG, *([] if QA is None else [QA]))

    def _apply(self, S: Tensor, v: Tensor) -> Tensor:
        if self.QA is None:
            V = v.mT.reshape(v.shape[1], *S.shape)
            return (self.QG @ (S * (self.QG.mT @ V))).flatten(1).mT
        return act(self.QA, self.QG, S.reshape(-1, 1) * act(self.QA.mT, self.QG.mT, v))

    def _matmul(self, v: Tensor) -> Tensor:
        return self._apply(self.S, v)

    def to_dense(self) -> Tensor:
        """Return Q diag(S) Qᵀ, one factor after the other: the smaller one mixes the larger one's blocks."""
        QA = torch.eye(self.S.shape[1], dtype=self.dtype, device=self.device) if self.QA is None else self.QA
        outer = len(self.QG) <= len(QA)
        few, many, S = (self.QG, QA, self.S) if outer else (QA, self.QG, self.S.mT)
        blocks = (many * S.unsqueeze(1)) @ many.mT
        pairs = few.unsqueeze(1) * few
        M = (pairs.flatten(0, 1) @ blocks.flatten(1)).view(len(few), len(few), len(many), len(many))
        return symmetric(M.permute((0, 2, 1, 3) if outer else (2, 0, 3, 1)).reshape(self.shape))

    def diagonal(self) -> Tensor:
        """Return the main diagonal."""
        S = self.S if self.QA is None else self.S @ self.QA.square().mT
        return (self.QG.square() @ S).reshape(-1)

    def scale(self, factor: float) -> KroneckerEigen:
        """Multiply by a number."""
        return KroneckerEigen(self.QA, self.QG, self.S * factor)

    def shifted(self, value: float) -> KroneckerEigen:
        """Add a multiple of the identity; the bases are shared, not copied."""
        return KroneckerEigen(self.QA, self.QG, self.S + value)

    def _norm(self, order: NormOrder) -> float:
        S = self.S.double()
        if order == "spectral":
            return float(S.abs().max()) if S.numel() else 0.0
        return float(S.norm() if order == "fro" else S.sum())

    def _positive(self) -> Tensor:
        require_positive(self.S, "the Kronecker-eigen matrix", self.shape[0], rounding_floor(1.0, self.dtype))
        return self.S

    def inverse(self) -> KroneckerEigen:
        """Return the inverse, in the same bases."""
        return KroneckerEigen(self.QA, self.QG, 1 / self._positive())

    def log_determinant(self) -> float:
        """Sum of the eigenvalues' logarithms."""
        return float(self._positive().double().log().sum())

    def _solve(self, v: Tensor) -> Tensor:
        return self._apply(1 / self._positive(), v)

    def _inverse_root(self, z: Tensor) -> Tensor:
        return self._apply(self._positive().rsqrt(), z)
