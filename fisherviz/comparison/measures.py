"""The numbers of a comparison: norms of errors, damped inverses, directions, the quadratic model, divergences.

Two ways to the same numbers: dense in float64 where the matrix is small, and inner products in example space where it
is not (DESIGN section 5, "Norms and directions"). A number that does not exist is absent, never NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

DENSE = ("relative_frobenius", "relative_spectral", "relative_nuclear", "relative_max", "frobenius_cosine")
DAMPED = ("inverse_frobenius", "kl")
DIRECTIONS = ("direction_cosine", "direction_error", "model_decrease", "model_decrease_rescaled")


@dataclass(frozen=True, eq=False)
class DenseExact:
    """An exact matrix (or block) with its own norms, computed once for all approximations.

    Attributes:
        matrix: float64, square for diagonal blocks.
        damping: λ of its inverse; 0 leaves the inverse out.
        gradient: (P,) float64, or None.
    """

    matrix: Tensor
    damping: float = 0.0
    gradient: Tensor | None = None

    @cached_property
    def frobenius(self) -> float:
        """‖F‖_F."""
        return float(torch.linalg.matrix_norm(self.matrix))

    @cached_property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues of a symmetric matrix, ascending."""
        return torch.linalg.eigvalsh(self.matrix)

    @cached_property
    def singular_values(self) -> Tensor:
        """Singular values; moduli of eigenvalues where the matrix is symmetric."""
        return self.eigenvalues.abs() if _symmetric(self.matrix) else torch.linalg.svdvals(self.matrix)

    @cached_property
    def largest(self) -> float:
        """Largest modulus of an entry."""
        return float(self.matrix.abs().max())

    @cached_property
    def damped(self) -> Tensor:
        """F + λI."""
        out = self.matrix.clone()
        out.diagonal().add_(self.damping)
        return out

    @cached_property
    def factor(self) -> Tensor | None:
        """Cholesky factor of F + λI, None where it is not positive definite."""
        factor, info = torch.linalg.cholesky_ex(self.damped)
        return None if int(info) else factor

    @cached_property
    def inverse(self) -> Tensor | None:
        """(F + λI)⁻¹."""
        return None if self.factor is None else torch.cholesky_inverse(self.factor)

    @cached_property
    def step(self) -> Tensor | None:
        """(F + λI)⁻¹ ∇h."""
        if self.factor is None or self.gradient is None:
            return None
        return torch.cholesky_solve(self.gradient.unsqueeze(1), self.factor)[:, 0]


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values; by eigenvalues where the matrix is symmetric."""
    return torch.linalg.eigvalsh(matrix).abs() if _symmetric(matrix) else torch.linalg.svdvals(matrix)


def _symmetric(matrix: Tensor) -> bool:
    return matrix.shape[0] == matrix.shape[1] and torch.equal(matrix, matrix.T)


def error_measures(exact: DenseExact, approximation: Tensor, wanted: set[str]) -> dict[str, float]:
    """Relative errors in four norms and the cosine.

    Args:
        exact: the exact matrix or block.
        approximation: F̂, float64, same shape.
        wanted: names of metrics.

    Returns:
        Metric to value; nothing relative where F is zero.
    """
    out: dict[str, float] = {}
    if exact.frobenius == 0:
        return out
    difference = exact.matrix - approximation
    if difference.shape[0] == difference.shape[1]:
        symmetric = (difference + difference.T) / 2
        if float((symmetric - difference).abs().max()) <= 1e-5 * exact.largest:  # rounding of float32 factors
            difference = symmetric
    if "relative_frobenius" in wanted:
        out["relative_frobenius"] = float(torch.linalg.matrix_norm(difference)) / exact.frobenius
    if "relative_max" in wanted:
        out["relative_max"] = float(difference.abs().max()) / exact.largest
    size = float(torch.linalg.matrix_norm(approximation))
    if "frobenius_cosine" in wanted and size > 0:
        out["frobenius_cosine"] = float((exact.matrix * approximation).sum()) / (exact.frobenius * size)
    if {"relative_spectral", "relative_nuclear"} & wanted:
        values, own = singular_values(difference), exact.singular_values
        if "relative_spectral" in wanted:
            out["relative_spectral"] = float(values.max() / own.max())
        if "relative_nuclear" in wanted:
            out["relative_nuclear"] = float(values.sum() / own.sum())
    return out


def damped_measures(exact: DenseExact, damped: Tensor, wanted: set[str]) -> tuple[dict[str, float], Tensor | None]:
    """Error of the damped inverse, divergence and directions.

    Args:
        exact: the exact matrix with its damping and gradient.
        damped: F̂ with its damping, float64.
        wanted: names of metrics.

    Returns:
        Metric to value, and the damped inverse of F̂; both empty where F̂ with damping is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info) or exact.factor is None or exact.inverse is None:
        return {}, None
    inverse = torch.cholesky_inverse(factor)
    out: dict[str, float] = {}
    if "inverse_frobenius" in wanted:
        gap = torch.linalg.matrix_norm(exact.inverse - inverse)
        out["inverse_frobenius"] = float(gap / torch.linalg.matrix_norm(exact.inverse))
    if "kl" in wanted:
        log_determinants = 2 * (exact.factor.diagonal().log().sum() - factor.diagonal().log().sum())
        trace = (damped * exact.inverse).sum()
        out["kl"] = max(0.0, 0.5 * float(trace - len(damped) + log_determinants))
    if exact.step is not None and exact.gradient is not None:
        step = inverse @ exact.gradient
        curvature = float(step @ (exact.damped @ step))
        out |= direction_measures(exact.gradient, exact.step, step, curvature, wanted)
    return out, inverse


def direction_measures(
    gradient: Tensor, exact: Tensor, step: Tensor, curvature: float, wanted: set[str]
) -> dict[str, float]:
    """The approximate damped natural gradient against the exact one.

    Args:
        gradient: ∇h.
        exact: (F + λI)⁻¹ ∇h.
        step: (F̂ + λI)⁻¹ ∇h.
        curvature: stepᵀ (F + λI) step.
        wanted: names of metrics.

    Returns:
        Metric to value. The decrease of M(-step) is relative to M(-exact); rescaled: with the best multiple of step.
    """
    exact, step, gradient = exact.double(), step.double(), gradient.double()
    norm, size, best = float(exact.norm()), float(step.norm()), float(gradient @ exact)
    if norm == 0 or size == 0 or best <= 0:
        return {}
    slope = float(gradient @ step)
    found = {
        "direction_cosine": float(exact @ step) / (norm * size),
        "direction_error": float((step - exact).norm()) / norm,
        "model_decrease": (2 * slope - curvature) / best,
        "model_decrease_rescaled": slope**2 / (curvature * best) if curvature > 0 else math.nan,
    }
    return {name: value for name, value in found.items() if name in wanted and math.isfinite(value)}
