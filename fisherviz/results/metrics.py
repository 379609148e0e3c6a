"""The one list of metrics: what each number is called, what it means, what it takes to measure it.

A new metric is an entry here and a function of its name in `comparison.measures`; `compare`, the monitor, the tables,
the axes' labels and the page's definitions go by this list.
F is the exact Fisher, F̂ the approximation, λ the damping, ∇h the gradient (K-FAC, section 6).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fisherviz.support.choices import did_you_mean
from fisherviz.support.numbers import human, show_number, superscript


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
        needs: what it takes beside F and F̂: "matrix" (both dense), "damping", "direction" (damping and a gradient),
            "cost" (what fitting took), or "exact" (F alone, layer by layer).
        brief: whether it stands where there is room for a few only, as in a terminal.
    """

    name: str
    label: str
    short: str
    formula: str
    meaning: str
    best: str
    unit: str = ""
    needs: str = ""
    brief: bool = False

    @property
    def title(self) -> str:
        """The label at the beginning of a sentence."""
        return self.label[:1].upper() + self.label[1:]

    @property
    def axis_label(self) -> str:
        """The label with its unit."""
        return f"{self.label} [{self.unit}]" if self.unit else self.label

    def away(self, value: Any) -> Any:
        """How far a value, or an array or table of them, is from the best: |1 - value| where 1 is, else the value."""
        return abs(1.0 - value) if self.best == "one" else value


_METRICS = (
    Metric("relative_frobenius", "relative error in Frobenius norm", "Frobenius",
           "‖F − F̂‖_F / ‖F‖_F",
           "All entries count alike. 0 is exact; 1 is as wrong as calling every entry zero.", "zero", brief=True),
    Metric("relative_spectral", "relative error in spectral norm", "spectral",
           "‖F − F̂‖₂ / ‖F‖₂",
           "The worst direction decides: the largest singular value of the difference.", "zero"),
    Metric("relative_nuclear", "relative error in nuclear norm", "nuclear",
           "‖F − F̂‖_* / ‖F‖_*",
           "All directions count alike: the sum of the singular values of the difference.", "zero", needs="matrix"),
    Metric("relative_max", "relative error of the worst entry", "worst entry",
           "max|F − F̂| / max|F|",
           "The single worst entry, measured against the largest entry of F.", "zero", needs="matrix"),
    Metric("frobenius_cosine", "cosine with F", "cosine",
           "⟨F, F̂⟩ / (‖F‖_F ‖F̂‖_F)",
           "The same shape, whatever the scale: 1 if F̂ is a positive multiple of F.", "one", brief=True),
    Metric("inverse_frobenius", "relative error of the damped inverse", "inverse, Frobenius",
           "‖(F + λI)⁻¹ − (F̂ + λI)⁻¹‖_F / ‖(F + λI)⁻¹‖_F",
           "What an optimizer applies is the inverse, so this is closer to its quality than the error of F̂. "
           "With factored damping each approximation takes its own damped inverse. "
           "± is one standard error, where random probes estimated it.",
           "zero", needs="damping", brief=True),
    Metric("direction_cosine", "cosine of the natural gradients", "step, cosine",
           "cos((F̂ + λI)⁻¹∇h, (F + λI)⁻¹∇h)",
           "Does the approximate natural gradient point where the exact damped one points? 1 if so.",
           "one", needs="direction", brief=True),
    Metric("direction_error", "relative error of the natural gradient", "step, error",
           "‖δ̂ − δ‖ / ‖δ‖,  δ = −(F + λI)⁻¹∇h",
           "Direction and length of the approximate natural gradient against the exact damped one.",
           "zero", needs="direction"),
    Metric("model_decrease", "share of the possible decrease", "share of decrease",
           "M(δ̂) / M(δ),  M(δ) = ½ δᵀ(F + λI)δ + ∇hᵀδ",
           "How much of the best decrease of the quadratic model the approximate step takes. 1 is all of it; "
           "below 0 the step makes the model worse.", "one", needs="direction"),
    Metric("model_decrease_rescaled", "share of the decrease, best step length", "decrease, rescaled",
           "min_c M(c δ̂) / M(δ)",
           "The same with the best multiple of the approximate step (K-FAC, section 6.4).", "one", needs="direction"),
    Metric("kl", "divergence of the posteriors", "KL, nats",
           "KL(N(0, (F + λI)⁻¹) ‖ N(0, (F̂ + λI)⁻¹))",
           "How different the two Gaussian (Laplace) posteriors with these precisions are. "
           "± is one standard error, where random probes estimated it.",
           "zero", "nats", needs="damping"),
    Metric("off_unit_share", "share of ‖F‖² off the unit blocks", "off-unit share",
           "1 − Σ_units ‖F_unit‖² / ‖F‖²",
           "What CW-NGD's assumption of independent gradients throws away (Sang et al. 2022, eqs. 5–7). "
           "A property of the exact Fisher.", "none", needs="exact"),
    Metric("seconds", "time to build", "time",
           "updates of its statistics + building + a pass of the captures",
           "What the approximation takes on its own on this machine: the median of several fits, ± half the range "
           "between the fastest and the slowest; without ± it was fitted once. Statistics and passes that several "
           "share count for each. The pass runs forward alone where only inputs are read; what refines itself pays a "
           "second one, unless all captures were kept in memory.", "small", "s", needs="cost"),
    Metric("passes", "cost to build", "passes",
           "multiply-adds to build / multiply-adds of one forward and backward pass on the data",
           "Counted, not timed, and the same on every machine: 1 costs as much as one gradient. Forwards, "
           "backpropagated vectors, statistics and the factorisations of building count, for each method as if it were "
           "alone, with a pass for each round of statistics. Element-wise work, look-ups and later solves do not.",
           "small", "forward + backward passes", needs="cost", brief=True),
    Metric("bytes", "memory held", "memory",
           "bytes of the arrays that the approximation keeps",
           "What stays in memory once it is built.", "small", "bytes", needs="cost", brief=True),
)  # fmt: skip

_MONITORED = (
    Metric("damping", "damping λ", "λ", "", "The λ of directions and condition numbers at this step.", "none"),
    Metric("lambda", "λ of the optimizer", "λ", "", "As the optimizer has it at this step.", "none"),
    Metric("gamma", "γ of the optimizer", "γ", "", "The damping of its Kronecker factors.", "none"),
    Metric("condition_number", "condition number of the damped matrix", "condition", "(λ_max + λ) / (λ_min + λ)",
           "Of F, and of each block-diagonal approximation.", "none"),
    Metric("similarity", "KFAC's cosine with FOOF", "similarity", "", "Under both dampings.", "none"),
    Metric("foof_cosine_factored", "KFAC's cosine with FOOF, factored damping", "factored damping", "",
           "Benzing 2021, figure 4A.", "none"),
    Metric("foof_cosine_eigenvalues", "KFAC's cosine with FOOF, eigenvalue damping", "eigenvalue damping", "",
           "Benzing 2021, figure 4A.", "none"),
)  # fmt: skip

MISSING = "–"
"""In tables, where a number does not exist."""
ROUNDING = 1e-6
"""An error below this is rounding: pictures draw it as exact, sentences call it so."""
METRICS: dict[str, Metric] = {metric.name: metric for metric in _METRICS}
"""Of a comparison, by name, in the order of tables."""
BRIEF = tuple(metric.name for metric in _METRICS if metric.brief)
"""Those that stand where there is room for a few only."""
MONITORED: dict[str, Metric] = {metric.name: metric for metric in _MONITORED}
"""What a monitor records beside them."""


def needing(*needs: str) -> set[str]:
    """Names of the metrics of a comparison that need one of these.

    Args:
        needs: as `Metric.needs` has them.
    """
    return {entry.name for entry in _METRICS if entry.needs in needs}


def check_metrics(names: Iterable[str] | str | None) -> set[str]:
    """The names as a set, each of them on the list.

    Args:
        names: some, one, or None for all.

    Returns:
        The names.

    Raises:
        TypeError: they are no names.
        ValueError: there is none, or one is unknown.
    """
    if names is None:
        return set(METRICS)
    if not isinstance(names, Iterable):
        raise TypeError(f"metrics= takes names of metrics, got {type(names).__name__}.")
    found = [names] if isinstance(names, str) else list(names)
    if not found:
        raise ValueError("metrics= names no metric; leave it out for all of them.")
    for name in found:
        if not isinstance(name, str):
            raise TypeError(f"metrics= takes names of metrics, got {name!r} among them.")
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}; metrics are {', '.join(METRICS)}{did_you_mean(name, METRICS)}")
    return set(found)


def metric(name: str) -> Metric:
    """The entry of one metric; a metric that nobody described (a user's own) gets its bare name.

    Args:
        name: as in the `metric` column.

    Returns:
        Its `Metric`.
    """
    words = name.replace("_", " ")
    return METRICS.get(name) or MONITORED.get(name) or Metric(name, words, words, "", "", "none")


def show(name: str, value: float, error: float = 0.0) -> str:
    """A value as people read it: three significant digits, bytes and seconds with their unit.

    Args:
        name: of the metric.
        value: the number.
        error: its standard error or spread, said where it is not 0.

    Returns:
        Short text, for tables and the terminal.
    """
    if name == "bytes":
        return human(value)
    if name == "seconds":
        unit, value, error = ("s", value, error) if value >= 0.1 else ("ms", 1000 * value, 1000 * error)
        if value >= 999.5:
            return f"{show_number(value)}{f' ± {show_number(error, 2)}' if error else ''} {unit}"
        return f"{value:.3g}{f' ± {error:.2g}' if error else ''} {unit}"
    if not error:
        return show_number(value)
    if value == 0 or 1e-3 <= abs(value) < 1e5 or not 1e-300 < abs(value) < math.inf:
        return f"{show_number(value)} ± {show_number(error, 2)}"
    exponent = math.floor(math.log10(abs(value)))
    value, error = value / 10.0**exponent, error / 10.0**exponent
    return f"({show_number(value)} ± {show_number(error, 2)})·10{superscript(exponent)}"
