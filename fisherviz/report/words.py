"""The comparison in plain words: which approximation is closest, in which sense, and at which cost.

Sentences are templates with names to fill in, so that the page can escape and emphasise what users named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fisherviz.plotting.fronts import EXACT, pareto_info
from fisherviz.results import metrics
from fisherviz.results.comparison import Comparison


@dataclass(frozen=True)
class Sentence:
    """A template with `{}` where names go, and the names."""

    template: str
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.template.format(*self.names)


def verdict(comparison: Comparison) -> list[Sentence]:
    """One paragraph about the whole matrix, or about the layers one by one where there is no whole.

    Args:
        comparison: what to judge.

    Returns:
        Its sentences; empty if nothing was measured.
    """
    errors, cosines = _values(comparison, "relative_frobenius"), _values(comparison, "direction_cosine")
    if not errors:
        return []
    direction = [_direction(cosines, comparison.meta.get("damping"))] if cosines else []
    return [_closest(errors, comparison), *direction, *_cost(comparison)]


def paragraph(sentences: list[Sentence]) -> str:
    """The sentences as plain text."""
    return " ".join(str(sentence) for sentence in sentences)


def _values(comparison: Comparison, metric: str) -> dict[str, float]:
    """The whole matrix's values, or the medians over the layers where there are none."""
    whole = {name: value for name, value in comparison.whole(metric).items() if np.isfinite(value)}
    if whole:
        return whole
    blocks = comparison.blocks(metric)
    blocks = blocks[np.isfinite(blocks["value"])]
    return {str(k): float(v) for k, v in blocks.groupby("method", sort=False)["value"].median().items()}


def _closest(errors: Mapping[str, float], comparison: Comparison) -> Sentence:
    kind = {"mc": "sampled", "empirical": "empirical"}.get(str(comparison.meta.get("kind")), "exact")
    fisher, where = (
        f"the {kind} Fisher",
        "" if comparison.whole("relative_frobenius") else ", in the median over the layers",
    )
    ranked = sorted(errors, key=lambda name: errors[name])
    exact = [name for name in ranked if errors[name] < EXACT]
    rest = [name for name in ranked if errors[name] >= EXACT]
    if exact and not rest:
        return Sentence(f"Every approximation equals {fisher} to rounding.")
    best, head = rest[0], ""
    if exact:
        listed = " and ".join(["{}"] * len(exact))
        head = f"{listed} equal{'s' if len(exact) == 1 else ''} {fisher} to rounding. Of the others, "
    template = (
        f"{head}{{}} is closest to {fisher}: its relative Frobenius error is {metrics.show_number(errors[best])}{where}"
    )
    names = [*exact, best]
    shapes = {name: cosine for name, cosine in _values(comparison, "frobenius_cosine").items() if name in rest}
    if best in shapes:
        similar = max(shapes, key=lambda name: shapes[name])
        template += f", its cosine with it {metrics.show_number(shapes[best])}"
        if shapes[similar] - shapes[best] > 0.01:
            template += f"; closer in shape, whatever the scale, is {{}} ({metrics.show_number(shapes[similar])})"
            names.append(similar)
    return Sentence(template + ".", tuple(names))


def _direction(cosines: Mapping[str, float], damping: object) -> Sentence:
    best = max(cosines, key=lambda name: cosines[name])
    near = [name for name in cosines if name != best and cosines[best] - cosines[name] < 0.01]
    strength = f" at damping {_damping(damping)}" if damping is not None else ""
    template = (
        f"What an optimizer would feel is the direction of the step{strength}: there {{}} agrees best with "
        f"the exact natural gradient (cosine {metrics.show_number(cosines[best])})"
    )
    if near:
        listed = ", ".join(["{}"] * len(near[:3]))
        more = f" and {len(near) - 3} more" if len(near) > 3 else ""
        template += f", with {listed}{more} within 0.01 of it"
    plain = cosines.get("identity")
    if plain is not None and best != "identity":
        template += f"; the plain gradient has {metrics.show_number(plain)}"
    return Sentence(template + ".", (best, *near[:3]))


def _damping(value: object) -> str:
    if isinstance(value, int | float):
        return metrics.show_number(float(value))
    return re.sub(r"[^\w.=(), -]", "", str(value))  # a sentence's template holds no braces and no markup


def _cost(comparison: Comparison) -> list[Sentence]:
    try:
        front = pareto_info(comparison)
    except ValueError:
        return []
    members = tuple(np.asarray(front.methods)[front.on_front].tolist())
    costs = [metrics.show_number(cost) for cost in front.costs[front.on_front]]
    unit = "forward and backward passes over the same data"
    if len(members) == 1:
        template = f"Nothing that costs more is closer than {{}}, which takes {costs[0]} {unit}."
    else:
        spent = ", ".join(f"{{}} ({cost})" for cost in costs)
        template = (
            f"In {unit}, the worthwhile trade-offs of error against cost are {spent}: "
            "for every other method one of these is both cheaper and closer."
        )
    return [Sentence(template, members)]
