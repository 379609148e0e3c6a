"""What section 13 of Martens & Grosse 2015 says of figures 10 and 11, as rules on training runs.

How much faster a method is: how many times fewer iterations, or seconds, it needs to the slower one's lowest error.
Against the baseline that is judged where the baseline has left its plateau, the error of the mean image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from fisherviz.papers.ledger.claims import Claim
from fisherviz.papers.trials.problems import Trained
from fisherviz.papers.trials.words import spread

ERROR = "train_squared_error"
BASELINE, PLAIN = "Nesterov", "SGD, no momentum"
DIAGONAL, TRIDIAGONAL = "K-FAC diagonal", "K-FAC tridiagonal"
VERSIONS = (DIAGONAL, TRIDIAGONAL)
STILL = ", no momentum"
PLATEAU = 0.8
"""Share of the mean image's error that the baseline has to come down to."""
NOUNS = {"step": "iterations", "seconds": "seconds"}


@dataclass(frozen=True)
class Compared:
    """The methods on one of the problems.

    Args:
        found: name to method.
        mean_image: squared error of the training images' mean.
    """

    found: Mapping[str, Trained]
    mean_image: float

    @property
    def left(self) -> bool:
        """Whether the baseline has left its plateau, by the median of the seeds."""
        return median(lowest(run)[ERROR] for run in self.found[BASELINE].runs) <= PLATEAU * self.mean_image


@dataclass(frozen=True)
class Row:
    """A claim that one method is so and so many times faster than another.

    Args:
        statement: what the paper says.
        paper: where.
        rule: the bounds, in words.
        pairs: slower and faster methods.
        least: times that the faster one has to be faster.
        most: that it may be.
        over: "step" or "seconds".
        everywhere: whether each problem has to keep the bounds; False: the median of the problems.
        repeats: as for `Claim`.
    """

    statement: str
    paper: str
    rule: str
    pairs: tuple[tuple[str, str], ...]
    least: float
    most: float
    over: str
    everywhere: bool = True
    repeats: bool = False


SECONDS = (
    Row(
        "K-FAC has an overall much higher per-second rate of progress than the baseline", "figure 10, section 13",
        "both versions, with momentum, need at least 2 times fewer seconds to the baseline's lowest error",
        tuple((BASELINE, name) for name in VERSIONS), 2.0, math.inf, "seconds",
    ),
    Row(
        "without the momentum technique, K-FAC was not significantly faster than the baseline",
        "section 13, of figures 10 and 11",
        "both versions, without momentum, need more than half of the baseline's seconds to its lowest error",
        tuple((BASELINE, f"{name}{STILL}") for name in VERSIONS), 0.0, 2.0, "seconds",
    ),
    Row(
        "the block-tridiagonal version's per-second rate of progress is only moderately higher than the block-diagonal "
        "version's, depending on the problem", "section 13, of figure 10",
        "1 to 1.4 times fewer seconds to the block-diagonal version's lowest error, median of the problems",
        ((DIAGONAL, TRIDIAGONAL),), 1.0, 1.4, "seconds", everywhere=False,
    ),
    Row(
        "SGD without momentum is orders of magnitude slower than the baseline: it would not have appeared in figure 10",
        "section 13, after Sutskever et al. 2013",
        "the baseline needs at least 10 times fewer seconds to its lowest error",
        ((PLAIN, BASELINE),), 10.0, math.inf, "seconds",
    ),
)  # fmt: skip
ITERATIONS = (
    Row(
        "K-FAC has a per-iteration rate of progress that is orders of magnitude higher than the baseline's, provided "
        "that momentum is used", "orders of magnitude (figure 11, section 13)",
        "both versions need at least 10 times fewer iterations to the baseline's lowest error",
        tuple((BASELINE, name) for name in VERSIONS), 10.0, math.inf, "step",
    ),
    Row(
        "without the momentum technique, K-FAC was not significantly faster than the baseline",
        "section 13, of figures 10 and 11",
        "both versions, without momentum, need more than half of the baseline's iterations to its lowest error",
        tuple((BASELINE, f"{name}{STILL}") for name in VERSIONS), 0.0, 2.0, "step", repeats=True,
    ),
    Row(
        "the block-tridiagonal version's per-iteration rate of progress is typically 25 % to 40 % larger than the "
        "block-diagonal one's", "25 % to 40 % (section 13, of figure 11)",
        "1.25 to 1.4 times fewer iterations to the block-diagonal version's lowest error, median of the problems",
        ((DIAGONAL, TRIDIAGONAL),), 1.25, 1.4, "step", everywhere=False,
    ),
)  # fmt: skip


def lowest(run: Mapping[str, Any]) -> Mapping[str, Any]:
    """The line of a run's curve with the lowest error."""
    return min(run["curve"], key=lambda line: line[ERROR])


def reached(run: Mapping[str, Any], error: float, over: str = "step") -> float:
    """When a run's error is as low as given, between two looks in proportion; infinite if never.

    Args:
        run: one seed's.
        error: of an image.
        over: "step" or "seconds".
    """
    for before, after in pairwise(run["curve"]):
        if after[ERROR] <= error:
            drop = before[ERROR] - after[ERROR]
            share = min(max((before[ERROR] - error) / drop, 0.0), 1.0) if drop > 0 else 1.0
            return before[over] + share * (after[over] - before[over])
    return math.inf


def ratios(slow: Trained, fast: Trained, over: str = "step") -> list[float]:
    """How many times sooner the fast method has the slow one's lowest error, by seed; 0: never.

    Args:
        slow: the slower method.
        fast: the faster one.
        over: "step" or "seconds".
    """
    found = []
    for first, second in zip(slow.runs, fast.runs, strict=True):
        line = lowest(first)
        needed = reached(second, line[ERROR], over)
        known = line["step"] and 0 < needed < math.inf
        found.append(reached(first, line[ERROR], over) / needed if known else 0.0)
    return found


def judged(row: Row, problems: Mapping[str, Compared], other: tuple[str, ...]) -> Claim:
    """A row beside what was measured.

    Args:
        row: the claim.
        problems: title to methods.
        other: departures.
    """
    against = any(BASELINE in pair for pair in row.pairs)
    counted = {title: one for title, one in problems.items() if one.left or not against}
    words, medians = [], []
    values: dict[str, float] = {}
    for title, one in counted.items():
        shown = []
        for slow, fast in row.pairs:
            times = ratios(one.found[slow], one.found[fast], row.over)
            values[f"{title}: {fast} against {slow}"] = median(times)
            shown.append(f"{fast} {spread(times)}")
        words.append(f"{title}: {', '.join(shown)}")
    medians = list(values.values())
    kept = medians if row.everywhere else [median(medians)] if medians else []
    measured = f"times fewer {NOUNS[row.over]} than {row.pairs[0][0]} (0: never as low): {'; '.join(words)}"
    stayed = [title for title in problems if title not in counted]
    if stayed:
        none = f"{', '.join(stayed)}: the baseline has not left its plateau, not judged"
        measured = f"{measured}; {none}" if counted else none
    where = (
        f", on every problem where the baseline comes below {PLATEAU:g} of the mean image's error" if against else ""
    )
    return Claim(
        row.statement, row.paper, measured, f"{row.rule}; median of the seeds{where}",
        bool(kept) and all(row.least <= value <= row.most for value in kept),
        other, values=values, repeats=row.repeats,
    )  # fmt: skip


def costlier(problems: Mapping[str, Compared], other: tuple[str, ...]) -> Claim:
    """The cost of an iteration of both versions.

    Args:
        problems: title to methods.
        other: departures.
    """
    values = {title: _cost(one.found[TRIDIAGONAL]) / _cost(one.found[DIAGONAL]) for title, one in problems.items()}
    return Claim(
        "the iterations of the block-tridiagonal version cost more", "section 13 (no number)",
        f"times the block-diagonal version's seconds: {_listed(values)}",
        "more than the block-diagonal version's seconds on every problem, medians of the seeds",
        all(value > 1 for value in values.values()), other, values=values,
    )  # fmt: skip


def averaging(problems: Mapping[str, Compared], other: tuple[str, ...]) -> Claim:
    """What the averaged iterate is worth where batches grow.

    Args:
        problems: title to methods.
        other: departures.
    """
    values = {
        f"{title}: {name}": median(
            run["curve"][-1][f"average_{ERROR}"] / run["curve"][-1][f"iterate_{ERROR}"] for run in one.found[name].runs
        )
        for title, one in problems.items()
        for name in VERSIONS
    }
    steps = min(run["curve"][-1]["step"] for one in problems.values() for run in one.found[DIAGONAL].runs)
    return Claim(
        "Polyak averaging did not produce a significant increase in convergence rate of K-FAC with growing batches "
        "(actually, it hurt a bit)", "section 13 (no number)",
        f"error of the average over the iterate's at the end: {_listed(values)}",
        "at least 0.98 for both versions on every problem, medians of the seeds",
        all(value >= 0.98 for value in values.values()), other, values=values,
        sensitivity=f"runs of {steps:.0f} iterations are no longer than what ξ = 0.99 remembers" if steps < 200 else "",
    )  # fmt: skip


def ends(problems: Mapping[str, Compared]) -> str:
    """The errors at the end of all runs, in words."""
    return "; ".join(
        f"{title} (mean image {one.mean_image:.3g}): "
        + ", ".join(f"{name} {spread(method.last(ERROR))}" for name, method in one.found.items())
        for title, one in problems.items()
    )


def _cost(one: Trained) -> float:
    return median(run["curve"][-1]["seconds"] / max(run["curve"][-1]["step"], 1) for run in one.runs)


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())


def rows(rules: Sequence[Row], problems: Mapping[str, Compared], other: tuple[str, ...]) -> tuple[Claim, ...]:
    """All of an exhibit's rows.

    Args:
        rules: of the exhibit.
        problems: title to methods.
        other: departures.
    """
    return tuple(judged(row, problems, other) for row in rules)
