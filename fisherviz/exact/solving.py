"""Damped solves with the exact Fisher: dense Cholesky, or Woodbury in example space, whichever costs less.

(λI + s U Uᵀ)⁻¹ v = (v - U (λ/s I + UᵀU)⁻¹ Uᵀ v) / λ (Benzing eq. 18-21; Shrestha eq. 40-43). Factorisations run in
float64 and are kept for further right-hand sides.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fisherviz.operators.factorise import DampedCholesky

_REFINE_ABOVE = 1e4
"""Condition numbers above which a float32 Woodbury solve is refined by its residual."""


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
