"""Claims of the papers beside what was measured.

A verdict is computed, never typed in: from whether the measurement keeps the claim's rule, and from where the
setting departs from the paper's in a way that matters to the claim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

REPRODUCED, NOT_REPRODUCED, DIFFERENT = "reproduced", "not reproduced", "different setting"


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper beside its measurement.

    Args:
        statement: what the paper says.
        paper: the paper's own figure, or where it says so if it gives none.
        measured: the measured figure, in words.
        rule: what has to be true of the measurement for the claim to hold.
        holds: whether it is.
        departures: where the setting differs from the paper's in a way that matters to this claim.
        sensitivity: how the measurement moves with choices that the paper leaves open.
        values: the measured numbers by name; those that are infinite, of what diverged, are not kept.
        repeats: whether the row gives another reading of a claim that a row before it already counts.
        earlier_rule: the rule that a first run was judged by, if it was changed after it; empty: none.
        earlier_holds: whether the measurement keeps that one.
    """

    statement: str
    paper: str
    measured: str
    rule: str
    holds: bool
    departures: tuple[str, ...] = ()
    sensitivity: str = ""
    values: Mapping[str, float] = field(default_factory=dict)
    repeats: bool = False
    earlier_rule: str = ""
    earlier_holds: bool = False

    @property
    def verdict(self) -> str:
        """The verdict: "reproduced", "not reproduced" or "different setting"."""
        if self.departures:
            return DIFFERENT
        return REPRODUCED if self.holds else NOT_REPRODUCED


@dataclass(frozen=True)
class Outcome:
    """What an exhibit's function returns.

    Args:
        claims: rows of the table.
        setting: what was run, in a few words for each row.
        details: the same in a sentence without its full stop.
        caption: what the picture shows.
        picture: PNG, or None where the exhibit is numbers alone.
        protocol: of a training comparison, a row for each method; see `trials.words.protocol`.
    """

    claims: tuple[Claim, ...]
    setting: str
    details: str
    caption: str
    picture: bytes | None = None
    protocol: tuple[Mapping[str, str], ...] = ()
