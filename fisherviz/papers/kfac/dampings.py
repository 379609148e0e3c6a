"""Claims on damped inverses, judged over seeds and over the γ that K-FAC could as well have had.

The paper's γ is K-FAC's own when it came to the weights. Its search (section 6.6) would next choose between γ, ω₂γ and
γ/ω₂, so a rule has to hold at all three; how it fares at a tenth and at ten times γ is said beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fisherviz.papers.kfac.network import FAR, NEAR, KFACNetwork, Measured, Networks
from fisherviz.papers.trials.words import spread

RULE = f"on every seed and at each γ that K-FAC's search compares ({NEAR[0]:.2f}, 1 and {NEAR[2]:.2f} times its own)"
EARLIER = "the same at K-FAC's own γ alone"
Found = Mapping[str, list[float]]


@dataclass(frozen=True)
class Sweep:
    """A number of each network at several multiples of its own γ.

    Args:
        values: multiple of γ to the number by seed.
        keeps: whether a number keeps the claim's rule.
        digits: of the numbers in words.
    """

    values: Mapping[float, list[float]]
    keeps: Callable[[float], bool]
    digits: str = ".2f"

    @property
    def own(self) -> list[float]:
        """By seed at K-FAC's own γ."""
        return self.values[1.0]

    @property
    def holds(self) -> bool:
        """Whether the rule holds on every seed at all γ that it speaks of."""
        return all(self.keeps(value) for factor in NEAR for value in self.values[factor])

    @property
    def held(self) -> bool:
        """Whether it holds on every seed at K-FAC's own γ."""
        return all(map(self.keeps, self.own))

    def words(self) -> str:
        """The numbers at other γ, and at which of them the rule breaks."""
        parts = []
        for factor in sorted({*NEAR, *FAR} - {1.0}):
            values = self.values[factor]
            broken = sum(not self.keeps(value) for value in values)
            outside = ", outside the rule" if factor in FAR else ""
            fate = f", which breaks the rule on {broken} of {len(values)} seeds{outside}" if broken else ""
            parts.append(f"at {factor:.2g} γ: {spread(values, self.digits)}{fate}")
        return "; ".join(parts)


def sweep(
    networks: Networks,
    measure: Callable[[KFACNetwork, float], Measured],
    number: Callable[[Found], list[float]],
    keeps: Callable[[float], bool],
    digits: str = ".2f",
) -> Sweep:
    """Measure the networks at every γ.

    Args:
        networks: which.
        measure: finds numbers of a network at a γ.
        number: the one that a claim is about, by seed.
        keeps: whether it keeps the rule.
        digits: of the numbers in words.
    """
    values = {factor: number(networks.damped(measure, factor)) for factor in (*NEAR, *FAR)}
    return Sweep(values, keeps, digits)
