"""What each number of a comparison means: its name in words, its formula, its best value.

Written once here and read by the tables, the axes' labels and the page's definitions.
F is the exact Fisher, F̂ the approximation, λ the damping, ∇h the gradient (K-FAC, section 6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One number that a comparison may hold.

    Args:
        name: as in the `metric` column.
        label: in words, for axes and definitions.
        short: a word or two, for table heads.
        formula: in Unicode.
        meaning: one or two sentences for the reader of a page.
        best: "zero", "one", "small" (costs) or "none" (a property, neither good nor bad).
        unit: what the value is measured in; "" for plain numbers.
    """

    name: str
    label: str
    short: str
    formula: str
    meaning: str
    best: str
    unit: str = ""

    @property
    def title(self) -> str:
        """The label at the beginning of a sentence."""
        return self.label[:1].upper() + self.label[1:]

    @property
    def axis_label(self) -> str:
        """The label with its unit."""
        return f"{self.label} [{self.unit}]" if self.unit else self.label


_METRICS = (
    Metric("relative_frobenius", "relative error in Frobenius norm", "Frobenius",
           "‖F − F̂‖_F / ‖F‖_F",
           "All entries count alike. 0 is exact; 1 is as wrong as calling every entry zero.", "zero"),
    Metric("relative_spectral", "relative error in spectral norm", "spectral",
           "‖F − F̂‖₂ / ‖F‖₂",
           "The worst direction decides: the largest singular value of the difference.", "zero"),
    Metric("relative_nuclear", "relative error in nuclear norm", "nuclear",
           "‖F − F̂‖_* / ‖F‖_*",
           "All directions count alike: the sum of the singular values of the difference.", "zero"),
    Metric("relative_max", "relative error of the worst entry", "worst entry",
           "max|F − F̂| / max|F|",
           "The single worst entry, measured against the largest entry of F.", "zero"),
    Metric("frobenius_cosine", "cosine with F", "cosine",
           "⟨F, F̂⟩ / (‖F‖_F ‖F̂‖_F)",
           "The same shape, whatever the scale: 1 if F̂ is a positive multiple of F.", "one"),
    Metric("inverse_frobenius", "relative error of the damped inverse", "inverse, Frobenius",
           "‖(F + λI)⁻¹ − (F̂ + λI)⁻¹‖_F / ‖(F + λI)⁻¹‖_F",
           "What an optimizer applies is the inverse, so this is closer to its quality than the error of F̂. "
           "With factored damping each approximation takes its own damped inverse.", "zero"),
    Metric("direction_cosine", "cosine of the natural gradients", "step, cosine",
           "cos((F̂ + λI)⁻¹∇h, (F + λI)⁻¹∇h)",
           "Does the approximate natural gradient point where the exact damped one points? 1 if so.", "one"),
    Metric("direction_error", "relative error of the natural gradient", "step, error",
           "‖δ̂ − δ‖ / ‖δ‖,  δ = −(F + λI)⁻¹∇h",
           "Direction and length of the approximate natural gradient against the exact damped one.", "zero"),
    Metric("model_decrease", "share of the possible decrease", "share of decrease",
           "M(δ̂) / M(δ),  M(δ) = ½ δᵀ(F + λI)δ + ∇hᵀδ",
           "How much of the best decrease of the quadratic model the approximate step takes. 1 is all of it; "
           "below 0 the step makes the model worse.", "one"),
    Metric("model_decrease_rescaled", "share of the decrease, best step length", "decrease, rescaled",
           "min_c M(c δ̂) / M(δ)",
           "The same with the best multiple of the approximate step (K-FAC, section 6.4).", "one"),
    Metric("kl", "divergence of the posteriors", "KL, nats",
           "KL(N(0, (F + λI)⁻¹) ‖ N(0, (F̂ + λI)⁻¹))",
           "How different the two Gaussian (Laplace) posteriors with these precisions are.", "zero", "nats"),
    Metric("off_unit_share", "share of ‖F‖² off the unit blocks", "off-unit share",
           "1 − Σ_units ‖F_unit‖² / ‖F‖²",
           "What CW-NGD's assumption of independent gradients throws away (Sang et al. 2022, eqs. 5–7). "
           "A property of the exact Fisher.", "none"),
    Metric("seconds", "time to build", "time",
           "wall-clock time of fitting the approximation",
           "Measured once on this machine: compare rows with each other, not across machines.", "small", "s"),
    Metric("bytes", "memory held", "memory",
           "bytes of the arrays that the approximation keeps",
           "What stays in memory once it is built.", "small", "bytes"),
    Metric("passes", "cost to build", "passes",
           "time to build / time of one forward and backward pass on the data",
           "The machine drops out: 1 costs as much as one gradient.", "small", "forward + backward passes"),
)  # fmt: skip

METRICS: dict[str, Metric] = {metric.name: metric for metric in _METRICS}


def metric(name: str) -> Metric:
    """The entry of one metric; a metric that nobody described (a user's own) gets its bare name.

    Args:
        name: as in the `metric` column.

    Returns:
        Its `Metric`.
    """
    words = name.replace("_", " ")
    return METRICS.get(name) or Metric(name, words, words, "", "", "none")


def show(name: str, value: float) -> str:
    """A value as people read it: three significant digits, bytes and seconds with their unit.

    Args:
        name: of the metric.
        value: the number.

    Returns:
        Short text, for tables and the terminal.
    """
    if name == "bytes":
        return show_bytes(value)
    if name == "seconds":
        return f"{value:.3g} s" if value >= 0.1 else f"{1000 * value:.3g} ms"
    return show_number(value)


def show_number(value: float) -> str:
    """Three significant digits, without an exponent where that stays short."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "∞" if value > 0 else "−∞"
    if 1e-3 <= abs(value) < 1e5:
        text = f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:#.3g}".rstrip(".")
        return text.replace("-", "−")
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}·10{superscript(int(exponent))}".replace("-", "−")


def superscript(exponent: int) -> str:
    """A power's exponent in raised digits."""
    return str(exponent).translate(_SUPERSCRIPTS)


def show_bytes(value: float) -> str:
    """A number of bytes with a binary unit."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" or value >= 100 else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
