"""F + λI and its inverse: by factorisation where one of its sizes is small enough, else by conjugate gradients.

Woodbury over a part of the examples preconditions them: it takes away most of what lies above λ, where K-FAC's factors
and the diagonal spread F's few large eigenvalues and cost products instead of saving them.
"""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from fisherviz.exact.fisher import Fisher
from fisherviz.operators.lanczos import cg
from fisherviz.statistics.examples import Examples, Woodbury

FACTORISED = 12_000
"""Parameters or gradients, whichever are fewer, up to which solves are factorisations."""


class DampedFisher:
    """F + λI, as far as it is known without a dense matrix.

    Args:
        fisher: F.
        strength: λ.
        factorised: largest size that is factorised: the number of parameters or of gradients, whichever is less.
        part: gradients whose Woodbury preconditions conjugate gradients.
        tol: residual of conjugate gradients, relative to the right-hand side.
        products: of F with a vector that conjugate gradients may take.
    """

    def __init__(
        self,
        fisher: Fisher,
        strength: float,
        *,
        factorised: int = FACTORISED,
        part: int = 4000,
        tol: float = 1e-4,
        products: int = 10_000,
    ) -> None:
        self.fisher, self.strength, self.part, self.tol, self.products = fisher, strength, part, tol, products
        self.direct = min(fisher.shape[0], fisher.columns) <= factorised
        """Whether solves are factorisations, with a determinant."""

    @cached_property
    def _examples(self) -> Examples:
        """F in float64: residuals of ill-conditioned systems drown in less."""
        return self.fisher.in_example_space().double()

    def __matmul__(self, v: Tensor) -> Tensor:
        """(F + λI) v for v (P, k), in float64."""
        space, v = self.fisher.space, v.double()
        return space.join(self._examples.product(space.split(v))) + self.strength * v

    def solve(self, v: Tensor) -> Tensor:
        """(F + λI)⁻¹ v for v (P,) or (P, k).

        Raises:
            RuntimeError: conjugate gradients have not converged.
        """
        if self.direct:
            return self.fisher.solve(v, self.strength)
        return cg(self.__matmul__, v.double(), self.tol, self.products, preconditioner=self._precondition)

    @cached_property
    def _of_a_part(self) -> Woodbury:
        examples = self._examples
        count = min(self.fisher.examples, max(1, self.part // examples.captures[0].vectors))
        scale = examples.scale * self.fisher.examples / count
        return Woodbury(Examples([capture.select(0, count) for capture in examples.captures], scale), self.strength)

    def _precondition(self, v: Tensor) -> Tensor:
        return self.fisher.space.join(self._of_a_part.solve(self.fisher.space.split(v)))
