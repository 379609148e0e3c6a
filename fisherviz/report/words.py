"""The comparison in plain words: which approximation is closest, in which sense, and at which cost.

Sentences are templates with names to fill in, so that the page can escape and emphasise what users named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fisherviz.plotting.fronts import pareto_info
from fisherviz.results.comparison import Comparison
from fisherviz.results.metrics import ROUNDING
from fisherviz.support.numbers import show_number

LISTED = 3
"""Names that a list spells out; of many more it tells the number."""
NEAR = 0.01
"""Cosines that differ by less are said to be near."""


@dataclass(frozen=True)
class Sentence:
    """A template with `{}` where names go, and the names."""

    template: str
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.template.format(*self.names)


def verdict(comparison: Comparison) -> list[Sentence]:
    """One paragraph about the whole matrix, or about the layers one by one where there is no whole.

    Numbers that read alike, to three digits, are ties: they are said together, and none is called the better.

    Args:
        comparison: what to judge.

    Returns:
        Its sentences; empty if nothing was measured.
    """
    errors = _values(comparison, "relative_frobenius")
    if not errors:
        return []
    found = [_closest(errors, comparison)]
    cosines = _values(comparison, "direction_cosine")
    if cosines and max(errors.values()) >= ROUNDING:
        found.append(_direction(cosines, comparison))
    return found + _cost(comparison)


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


def _where(comparison: Comparison, metric: str) -> str:
    return "" if comparison.whole(metric) else ", in the median over the layers"


def _listed(names: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """A template for some names, and those of them that it holds."""
    if len(names) > LISTED + 1:
        return ", ".join(["{}"] * LISTED) + f" and {len(names) - LISTED} more", tuple(names[:LISTED])
    return " and ".join(filter(None, [", ".join(["{}"] * (len(names) - 1)), "{}"])), tuple(names)


def _ties(values: Mapping[str, float], best: str) -> list[str]:
    """Names of the others whose values read like one's."""
    return [name for name in values if name != best and _reads(values[name]) == _reads(values[best])]


def _reads(value: float) -> str:
    return show_number(value)


def _like(names: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Who else reads alike, or nothing where nobody does."""
    listed, held = _listed(names)
    return (f", like {listed}", held) if names else ("", ())


def _kind(comparison: Comparison) -> str:
    return {"mc": "sampled", "empirical": "empirical"}.get(str(comparison.meta.get("kind")), "exact")


def _closest(errors: Mapping[str, float], comparison: Comparison) -> Sentence:
    fisher, where = f"the {_kind(comparison)} Fisher", _where(comparison, "relative_frobenius")
    exact = [name for name in errors if errors[name] < ROUNDING]
    rest = {name: errors[name] for name in sorted(errors, key=lambda name: errors[name]) if errors[name] >= ROUNDING}
    if not rest:
        every = "{} equals" if len(exact) == 1 else "Every approximation equals"
        return Sentence(f"{every} {fisher} to rounding.", tuple(exact[:1]) if len(exact) == 1 else ())
    best, *others = rest
    head, names = "", [best]
    if exact:
        listed, held = _listed(exact)
        head = f"{listed} equal{'s' if len(exact) == 1 else ''} {fisher} to rounding. "
        names = [*held, best]
    like, held = _like(ties := _ties(rest, best))
    if ties and len(ties) == len(others):
        every = "Both" if len(ties) == 1 else f"All {len(rest)}"
        every = f"{'The others' if exact else every} are equally close to {fisher}"
        template = f"{head}{every}: the relative Frobenius error is {_reads(rest[best])}{where}"
        return Sentence(template + ".", tuple(names[:-1]))
    if others:
        closest = "closer" if len(others) == 1 else "closest"
        lead = f"{'Of the others, ' if exact else ''}{{}} is {closest} to {fisher}: its relative Frobenius error is "
    else:
        lead = f"The relative Frobenius error of {{}} to {fisher} is "
    template, names = f"{head}{lead}{_reads(rest[best])}{like}{where}", [*names, *held]
    shapes = {name: cosine for name, cosine in _values(comparison, "frobenius_cosine").items() if name in rest}
    if best in shapes:
        similar = max(shapes, key=lambda name: shapes[name])
        template += f", its cosine with it {_reads(shapes[best])}"
        if shapes[similar] - shapes[best] > NEAR:
            template += f"; closer in shape, whatever the scale, is {{}} ({_reads(shapes[similar])})"
            names.append(similar)
    return Sentence(template + ".", tuple(names))


def _direction(cosines: Mapping[str, float], comparison: Comparison) -> Sentence:
    where = _where(comparison, "direction_cosine")
    best = max(cosines, key=lambda name: cosines[name])
    strength = comparison.damping and f" at {comparison.damping}"
    head = f"What an optimizer would feel is the direction of the step{strength}: there "
    kind = _kind(comparison)
    target = "the exact natural gradient" if kind == "exact" else f"the natural gradient of the {kind} Fisher"
    ties, value = _ties(cosines, best), _reads(cosines[best])
    if len(cosines) == 1:
        return Sentence(f"{head}the cosine of {{}} with {target} is {value}{where}.", (best,))
    if len(ties) == len(cosines) - 1:
        alike = "both agree" if len(cosines) == 2 else "all approximations agree"
        return Sentence(f"{head}{alike} equally well with {target} (cosine {value}){where}.")
    like, alike_names = _like(ties)
    better = "better" if len(cosines) == 2 else "best"
    template = f"{head}{{}} agrees {better} with {target} (cosine {value}{like}){where}"
    near = [name for name in cosines if name not in (best, *ties) and cosines[best] - cosines[name] < NEAR]
    listed, near_names = _listed(near)
    if near:
        template += f", with {listed} within {NEAR} of it"
    if "identity" in cosines and "identity" not in (best, *ties, *near):
        template += f"; the plain gradient has {_reads(cosines['identity'])}"
    return Sentence(template + ".", (best, *alike_names, *near_names))


def _cost(comparison: Comparison) -> list[Sentence]:
    """The front of error against cost, without those on it that are no closer than a cheaper one to three digits."""
    cost = "passes" if comparison.whole("passes") else "seconds"
    try:
        front = pareto_info(comparison, cost=cost)
    except ValueError:
        return []
    errors = {
        name: error if error >= ROUNDING else 0.0 for name, error in zip(front.methods, front.errors, strict=True)
    }
    costs = dict(zip(front.methods, front.costs.tolist(), strict=True))
    members: list[str] = []
    for name in front.methods:  # cheapest first
        if all(errors[name] < errors[m] and _reads(errors[name]) != _reads(errors[m]) for m in members):
            members.append(name)
    unit = "forward and backward passes over the same data" if cost == "passes" else "seconds"
    others = [name for name in front.methods if name not in members]
    if len(front.methods) == 1:
        return [Sentence(f"{{}} costs {_reads(costs[members[0]])} {unit}.", tuple(members))]
    if len(members) == 1:
        return [_one_for_all(members[0], others, errors, f"{_reads(costs[members[0]])} {unit}")]
    spent = [f"{{}} ({_reads(costs[name])})" for name in members]
    template = f"In {unit}, the worthwhile trade-offs of error against cost are {', '.join(spent)}"
    names = tuple(members)
    if tied := [name for name in others if any(_reads(errors[name]) == _reads(errors[m]) for m in members)]:
        listed, held = _listed(tied)
        template, names = f"{template}; as close as one of these and no cheaper: {listed}", (*names, *held)
    beaten = [name for name in others if name not in tied]
    if 0 < len(beaten) <= LISTED:
        listed, held = _listed(beaten)
        template, names = f"{template}; for {listed} one of these is closer at no more cost", (*names, *held)
    elif beaten:
        template += f"; for each of the other {len(beaten)} one of these is closer at no more cost"
    return [Sentence(template + ".", names)]


def _one_for_all(best: str, others: Sequence[str], errors: Mapping[str, float], cost: str) -> Sentence:
    """Where one method is the cheapest and nobody is closer."""
    tied = [name for name in others if _reads(errors[name]) == _reads(errors[best])]
    listed, held = _listed(tied or others)
    if not tied:
        return Sentence(f"{{}} is closer than {listed} and costs no more: {cost}.", (best, *held))
    one = len(tied) == 1
    verbs = "is as close and costs" if one else "are as close and cost"
    return Sentence(f"{{}} costs {cost}; {listed} {verbs} no less.", (best, *held))
