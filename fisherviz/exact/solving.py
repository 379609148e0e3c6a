"""Damped solves with the exact Fisher: dense Cholesky, or Woodbury in example space, whichever costs less.

(λI + s U Uᵀ)⁻¹ v = (v - U (λ/s I + UᵀU)⁻¹ Uᵀ v) / λ (Benzing eq. 18-21; Shrestha eq. 40-43). Factorisations run in
float64 and are kept for further right-hand sides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fisherviz.operators.factorise import SingularMatrixError, sufficient_damping

_REFINE_ABOVE = 1e4
"""Condition numbers above which a float32 Woodbury solve is refined by its residual."""


class DampedCholesky:
    """Cholesky factor of M + damping I for a symmetric positive semidefinite M, in float64."""

    def __init__(self, matrix: Tensor, damping: float, what: str) -> None:
        damped = matrix.to(torch.float64, copy=True)
        damped.diagonal().add_(damping)
        factor, info = torch.linalg.cholesky_ex(damped)
        pivots = factor.diagonal()
        rank_lost = bool(info > 0) or (
            bool(pivots.min() ** 2 <= torch.finfo(matrix.dtype).eps * len(matrix) * pivots.max() ** 2) and damping == 0
        )
        if rank_lost:
            eigenvalues = torch.linalg.eigvalsh(damped)
            smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
            raise SingularMatrixError(what, len(matrix), smallest, sufficient_damping(smallest, largest, matrix.dtype))
        self.factor = factor

    def solve(self, v: Tensor) -> Tensor:
        """(M + damping I)⁻¹ v for v (n, r)."""
        return torch.cholesky_solve(v.double(), self.factor).to(v.dtype)


def woodbury_solve(
    factor: DampedCholesky,
    v: Tensor,
    damping: float,
    rows: Callable[[Tensor], Tensor],
    columns: Callable[[Tensor], Tensor],
    product: Callable[[Tensor], Tensor],
    condition: float,
) -> Tensor:
    """(damping I + s U Uᵀ)⁻¹ v.

    Args:
        factor: Cholesky factor of UᵀU + damping / s I.
        v: right-hand sides (P, r).
        damping: a positive number.
        rows: v -> Uᵀ v.
        columns: w -> U w.
        product: v -> s U Uᵀ v, for residuals.
        condition: (largest eigenvalue + damping) / damping; a large one asks for refinement.

    Returns:
        The solution (P, r).
    """

    def once(b: Tensor) -> Tensor:
        return (b - columns(factor.solve(rows(b)))) / damping

    x = once(v)
    if condition > _REFINE_ABOVE:
        for _ in range(3):  # (v - U ...) / λ cancels: put the lost digits back from the residual
            x = x + once(v - product(x) - damping * x)
    return x
