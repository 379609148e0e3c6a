"""What the methods of a comparison cost: operations counted while they are fitted, seconds the median of several fits.

The count is the same on every machine and for any number of threads, and does not depend on what else is compared; only
an iteration that ends by a tolerance may take one step more on another processor.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field

from fisherviz.approximations import FAILURES, Approximation, fit_all
from fisherviz.comparison.measures import Cost, Estimate
from fisherviz.exact.fisher import Fisher
from fisherviz.statistics import needs_slopes
from fisherviz.support.counting import counting
from fisherviz.support.timing import Effort

TIMED = 5
"""Fits that seconds are the median of, where they are short."""
FOR_TIMING = 1.0
"""Seconds that fits may take that are made for nothing but their time."""
_PASSES = 2
"""Of the loss that are timed, after one that is counted."""


@dataclass
class Fits:
    """How the fits of a comparison went.

    Attributes:
        errors: what ended some of them.
        notes: what is to be said about the numbers.
        unit: one forward+backward pass of the loss.
        seconds: of each method that was fitted here, one number per fit.
        remarks: what is to be said about each of them.
    """

    errors: dict[str, Exception]
    notes: list[str]
    unit: Effort
    seconds: dict[str, list[float]] = field(default_factory=dict)
    remarks: dict[str, list[str]] = field(default_factory=dict)

    @property
    def timed(self) -> int:
        """Fits whose seconds are known, 0 where nothing was fitted."""
        return min(map(len, self.seconds.values()), default=0)

    def cost(self, label: str, fitted: Approximation) -> Cost:
        """What a method took: seconds with half their range, and passes where they were counted."""
        found = self.seconds.get(label, [fitted.seconds])
        seconds = Estimate(statistics.median(found), (max(found) - min(found)) / 2)
        counted = fitted.operations is not None and self.unit.operations > 0
        passes = fitted.operations / self.unit.operations if counted and fitted.operations is not None else None
        return Cost(seconds, passes, float(fitted.bytes))


def fit(
    fisher: Fisher, chosen: Mapping[str, Approximation], wanted: set[str], beside: Sequence[Approximation] = ()
) -> Fits:
    """Fit what is not fitted yet, with what it costs.

    Args:
        fisher: the exact Fisher.
        chosen: the approximations by label; those that are not fitted are fitted in place.
        wanted: names of metrics; operations are counted for "passes", fits repeated for "seconds".
        beside: fitted in place with them for the same passes, on which the last digits of sums hang: which captures
            they read, and whether batch by batch.
    """
    unfitted = {label: approximation for label, approximation in chosen.items() if not approximation.fitted}
    as_given = {label: copy.copy(approximation) for label, approximation in unfitted.items()}
    with counting():
        operations = fisher.loss_effort().operations
    unit = Effort(fisher.loss_effort(_PASSES).seconds, operations)
    start = time.perf_counter()
    with counting() if "passes" in wanted else nullcontext():
        # what is collected for this alone is not kept
        found = fit_all(fisher.with_captures(), [*unfitted.values(), *(beside if unfitted else ())])
    took = max(fisher.processes.exchange(time.perf_counter() - start))
    errors = {label: error for label, error in zip(unfitted, found, strict=False) if error is not None}
    made = {label: approximation for label, approximation in unfitted.items() if label not in errors}
    remarks = {label: own.remarks(fisher) for label, own in made.items()}
    fits = Fits(errors, [], unit, {label: [own.seconds] for label, own in made.items()}, remarks)
    if made and "seconds" in wanted:
        _repeat(fisher, {label: as_given[label] for label in made}, fits, took)
    for label, own in made.items():
        own.seconds = statistics.median(fits.seconds[label])
    if "passes" in wanted:
        before = [label for label, own in chosen.items() if label not in unfitted and own.operations is None]
        if not unit.operations:
            fits.notes.append("passes are left out: one of this network takes no multiply-adds that could be counted.")
        elif before:
            fits.notes.append(
                f"passes of {', '.join(before)} are left out: nobody counted when it was fitted; give its name."
            )
    return fits


def reads_otherwise(fisher: Fisher, approximation: Approximation) -> bool:
    """Whether a fit has the captures of all examples read as one, or taken anew, for whatever is fitted beside it.

    Args:
        fisher: whose data it is to be fitted on, of a network that has been looked at.
        approximation: is not changed.
    """
    own, layers = copy.copy(approximation), fisher.space.layers
    with suppress(*FAILURES):  # what it ends with is said where it is fitted
        own.prepare(layers, fisher.structure.positions)
        pairs = own.pairs(layers, fisher.structure.neighbours)
        named = [*map(own.needs, layers), *(own.pair_statistics(layers[i], layers[j]) for i, j in pairs)]
        return any(map(own.reads_capture, layers)) or any(needs_slopes(each.values()) for each in named)
    return False


def _repeat(fisher: Fisher, given: Mapping[str, Approximation], fits: Fits, took: float) -> None:
    """Fit again for the time alone, as often as a moment allows; the first fit was counted and the first to run."""
    times = min(TIMED, int(FOR_TIMING / took)) if took > 0 else TIMED
    for _ in range(times):
        again = {label: copy.copy(own) for label, own in given.items()}
        ended = fit_all(fisher.fresh(), list(again.values()))
        for (label, own), error in zip(again.items(), ended, strict=True):
            if error is None:
                fits.seconds[label].append(own.seconds)
    if times > 2:
        for label, found in fits.seconds.items():
            fits.seconds[label] = found[1:] or found


def together(remarks: Mapping[str, Sequence[str]]) -> list[str]:
    """What is to be said about methods, those together of whom the same is.

    Args:
        remarks: sentences by the method's label.
    """
    said: dict[str, list[str]] = {}
    for label, sentences in remarks.items():
        for sentence in sentences:
            said.setdefault(sentence, []).append(label)
    return [f"{', '.join(labels)}: {sentence}" for sentence, labels in said.items()]
