"""The numbers of a comparison: one function per metric, over F and F̂ as dense matrices or as sums in example space.

A function is named like its entry in `results.metrics` and reads a `Pair`; a number that does not exist is None, and
absent from the result, never NaN. Dense matrices are float64. The quadratic model is Martens & Grosse 2015,
equation 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from fisherviz.approximations.example_units import ExampleUnits
from fisherviz.capture.captures import Capture
from fisherviz.capture.formed import FormedCapture
from fisherviz.capture.tokens import TokenCapture
from fisherviz.exact.fisher import Fisher
from fisherviz.exact.spectra import frobenius
from fisherviz.operators.damping import Damping
from fisherviz.operators.factorise import definite_factor, eigenvalues
from fisherviz.operators.triangular import log_determinant_of, solve_columns
from fisherviz.results.metrics import METRICS


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error.

    Args:
        value: the number.
        error: one standard deviation of what random probes leave open; 0 where there were none.
    """

    value: float
    error: float = 0.0


def as_estimate(value: float | Estimate) -> Estimate:
    """A number as an exact estimate."""
    return value if isinstance(value, Estimate) else Estimate(value)


Measure = Callable[..., float | Estimate | None]
MEASURES: dict[str, Measure] = {}
"""The functions by the names of their metrics; one that needs "exact" takes the Fisher and a layer's position."""


def measure(function: Measure) -> Measure:
    """Make a function the measure of the metric of its name."""
    MEASURES[METRICS[function.__name__].name] = function
    return function


def measured(pair: Pair, wanted: set[str]) -> list[tuple[str, float, float]]:
    """What can be said of a pair.

    Args:
        pair: F and F̂.
        wanted: names of metrics.

    Returns:
        Metric, value and standard error, without those that do not exist.
    """
    names = [name for name in MEASURES if name in wanted and METRICS[name].needs != "exact"]
    found = {name: MEASURES[name](pair) for name in names}
    estimates = [(name, as_estimate(value)) for name, value in found.items() if value is not None]
    return [(name, each.value, each.error) for name, each in estimates if not math.isnan(each.value)]


# ---- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Question:
    """What a comparison is about.

    Args:
        fisher: the exact Fisher.
        rule: the damping.
        strength: its λ.
        gradient: ∇h, flat in torch order, or None.
        wanted: names of metrics.
        explicit: whether they were asked for by name, whatever they cost.
        why_not_dense: why matrices are not written out by themselves; "" where they are.
    """

    fisher: Fisher
    rule: Damping
    strength: float
    gradient: Tensor | None
    wanted: set[str]
    explicit: bool
    why_not_dense: str = ""


@dataclass(frozen=True)
class Cost:
    """What an approximation took.

    Args:
        seconds: of fitting, with half the range of several fits.
        passes: operations of fitting over those of a forward and backward pass of the loss; None: not counted.
        bytes: held by its operators.
    """

    seconds: Estimate
    passes: float | None
    bytes: float


@dataclass(frozen=True, eq=False)
class Step:
    """The approximate damped natural gradient beside the exact one, in float64.

    Args:
        gradient: ∇h.
        exact: (F + λI)⁻¹ ∇h.
        step: (F̂ + λI)⁻¹ ∇h.
        curvature: stepᵀ (F + λI) step.
    """

    gradient: Tensor
    exact: Tensor
    step: Tensor
    curvature: float

    @property
    def slope(self) -> float:
        """∇hᵀ step."""
        return float(self.gradient @ self.step)

    @property
    def best(self) -> float:
        """Twice what the exact step takes off the quadratic model."""
        return float(self.gradient @ self.exact)

    @property
    def exists(self) -> bool:
        """Whether both steps lead somewhere."""
        return bool(self.exact.any()) and bool(self.step.any()) and self.best > 0


@dataclass(eq=False)
class Pair:
    """F, or a block of it, and F̂ there: what the measures read.

    Args:
        size: ‖F‖_F.
        error: ‖F - F̂‖_F.
        inner: ⟨F, F̂⟩.
        own: ‖F̂‖_F.
        spectral: largest singular values of F - F̂ and of F, if known.
        step: natural gradients, if there is a gradient and both matrices are positive definite with their damping.
        inverse_error: ‖(F + λI)⁻¹ - (F̂ + λI)⁻¹‖_F to ‖(F + λI)⁻¹‖_F, if both are positive definite.
        divergence: KL of the damped Gaussians, likewise.
        cost: what F̂ took; of the whole matrix only.
    """

    size: float
    error: float
    inner: float
    own: float
    spectral: tuple[float, float] | None = None
    step: Step | None = None
    inverse_error: Estimate | float | None = None
    divergence: Estimate | float | None = None
    cost: Cost | None = None


@dataclass(frozen=True, eq=False)
class DenseMatrix:
    """A matrix (or block) with its own norms and factors, each computed once.

    Args:
        matrix: float64.
        symmetric: whether it is a whole matrix or a layer's own block.
        damped: the same with its damping; None leaves the inverse out.
    """

    matrix: Tensor
    symmetric: bool
    damped: Tensor | None = None

    @cached_property
    def frobenius(self) -> float:
        """Its Frobenius norm."""
        return float(torch.linalg.matrix_norm(self.matrix))

    @cached_property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues of a symmetric matrix, ascending."""
        return eigenvalues(self.matrix)

    @cached_property
    def singular_values(self) -> Tensor:
        """Singular values; moduli of eigenvalues where the matrix is symmetric."""
        return self.eigenvalues.abs() if self.symmetric else torch.linalg.svdvals(self.matrix)

    @cached_property
    def factor(self) -> Tensor | None:
        """Cholesky factor of the damped matrix, None where it is not positive definite."""
        return None if self.damped is None else definite_factor(self.damped)

    @cached_property
    def inverse(self) -> Tensor | None:
        """Inverse of the damped matrix."""
        return None if self.factor is None else torch.cholesky_inverse(self.factor)


class DensePair(Pair):
    """A pair of dense matrices.

    Args:
        exact: F with its norms.
        approximate: F̂ with its own, without damping where F is not positive definite with it.
        gradient: (P,) float64, or None.
        cost: what F̂ took.
    """

    def __init__(
        self, exact: DenseMatrix, approximate: DenseMatrix, gradient: Tensor | None = None, cost: Cost | None = None
    ) -> None:
        self.exact, self.approximate, self.gradient, self.cost = exact, approximate, gradient, cost
        self.difference = DenseMatrix(exact.matrix - approximate.matrix, exact.symmetric)
        self.size, self.error, self.own = exact.frobenius, self.difference.frobenius, approximate.frobenius
        self.inner = float((exact.matrix * approximate.matrix).sum())

    @cached_property
    def spectral(self) -> tuple[float, float]:  # type: ignore[override]
        """Largest singular values of F - F̂ and of F."""
        return float(self.difference.singular_values.max()), float(self.exact.singular_values.max())

    @cached_property
    def step(self) -> Step | None:  # type: ignore[override]
        """Both natural gradients."""
        exact, inverse, gradient = self.exact, self.approximate.inverse, self.gradient
        if inverse is None or exact.factor is None or exact.damped is None or gradient is None:
            return None
        step = inverse @ gradient
        best = solve_columns(exact.factor, gradient.unsqueeze(1))[:, 0]
        return Step(gradient, best, step, float(step @ (exact.damped @ step)))

    @cached_property
    def inverse_error(self) -> float | None:  # type: ignore[override]
        """Of both inverses, entry by entry."""
        exact, own = self.exact.inverse, self.approximate.inverse
        if exact is None or own is None:
            return None
        return float(torch.linalg.matrix_norm(exact - own) / torch.linalg.matrix_norm(exact))

    @cached_property
    def divergence(self) -> float | None:  # type: ignore[override]
        """From both Cholesky factors."""
        exact, own = self.exact, self.approximate
        if own.factor is None or own.damped is None or exact.factor is None or exact.inverse is None:
            return None
        log_determinants = log_determinant_of(exact.factor) - log_determinant_of(own.factor)
        trace = float((own.damped * exact.inverse).sum())
        return max(0.0, 0.5 * (trace - len(own.damped) + log_determinants))


# ---- errors ----------------------------------------------------------------------------------------------------------


@measure
def relative_frobenius(pair: Pair) -> float | None:
    """‖F - F̂‖_F / ‖F‖_F."""
    return pair.error / pair.size if pair.size > 0 else None


@measure
def relative_spectral(pair: Pair) -> float | None:
    """‖F - F̂‖₂ / ‖F‖₂."""
    return pair.spectral[0] / pair.spectral[1] if pair.size > 0 and pair.spectral is not None else None


@measure
def relative_nuclear(pair: DensePair) -> float | None:
    """‖F - F̂‖_* / ‖F‖_*."""
    return float(pair.difference.singular_values.sum() / pair.exact.singular_values.sum()) if pair.size > 0 else None


@measure
def relative_max(pair: DensePair) -> float | None:
    """max|F - F̂| / max|F|."""
    return float(pair.difference.matrix.abs().max() / pair.exact.matrix.abs().max()) if pair.size > 0 else None


@measure
def frobenius_cosine(pair: Pair) -> float | None:
    """⟨F, F̂⟩ / (‖F‖_F ‖F̂‖_F)."""
    size = pair.size * pair.own
    return min(1.0, pair.inner / size) if size > 0 else None


# ---- damped inverses and directions ----------------------------------------------------------------------------------


@measure
def inverse_frobenius(pair: Pair) -> Estimate | float | None:
    """‖(F + λI)⁻¹ - (F̂ + λI)⁻¹‖_F / ‖(F + λI)⁻¹‖_F."""
    return pair.inverse_error


@measure
def direction_cosine(pair: Pair) -> float | None:
    """cos((F̂ + λI)⁻¹∇h, (F + λI)⁻¹∇h)."""
    s = pair.step
    return float(s.exact @ s.step) / float(s.exact.norm() * s.step.norm()) if s and s.exists else None


@measure
def direction_error(pair: Pair) -> float | None:
    """‖δ̂ - δ‖ / ‖δ‖."""
    s = pair.step
    return float((s.step - s.exact).norm() / s.exact.norm()) if s and s.exists else None


@measure
def model_decrease(pair: Pair) -> float | None:
    """M(δ̂) / M(δ)."""
    s = pair.step
    return (2 * s.slope - s.curvature) / s.best if s and s.exists else None


@measure
def model_decrease_rescaled(pair: Pair) -> float | None:
    """M(c δ̂) / M(δ) with the best c."""
    s = pair.step
    return s.slope**2 / (s.curvature * s.best) if s and s.exists and s.curvature > 0 else None


@measure
def kl(pair: Pair) -> Estimate | float | None:
    """KL(N(0, (F + λI)⁻¹) ‖ N(0, (F̂ + λI)⁻¹))."""
    return pair.divergence


# ---- of the exact Fisher alone ---------------------------------------------------------------------------------------


@measure
def off_unit_share(fisher: Fisher, i: int) -> float | None:
    """Share of a structured layer's ‖F_l‖² off its unit blocks (Sang et al. 2022, eqs. 5-7)."""
    capture = fisher.example_space()[fisher.space.names[i]]
    if not isinstance(capture, Capture | FormedCapture | TokenCapture):
        return None
    total = frobenius(fisher, (i, i)) ** 2
    units = fisher.scale**2 * ExampleUnits(capture, 1.0).square_sum()
    return max(0.0, 1.0 - units / total) if total > 0 else None


# ---- costs -----------------------------------------------------------------------------------------------------------


def _cost(name: str, pair: Pair) -> Estimate | float | None:
    return None if pair.cost is None else getattr(pair.cost, name)


MEASURES |= {name: partial(_cost, name) for name in ("seconds", "passes", "bytes")}
