"""What Sang et al. 2022 say of table I and figure 5, as rules of what was trained.

Their accuracy may be that after an epoch or the mean over its batches that Keras reports; their COST a sum or a mean
over the batch. The first row of a claim takes algorithm 1 as written and the accuracy after the epoch; the rows below
it take the other readings and are not counted again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

from fisherviz.papers.ledger.claims import Claim
from fisherviz.papers.trials.problems import Trained
from fisherviz.papers.trials.words import spread

LITERAL, MEAN_COST = "CW-NGD", "CW-NGD, mean cost"
READINGS = {LITERAL: "algorithm 1 as written", MEAN_COST: "COST a mean"}
ACCURACIES = {"train_accuracy": "accuracy after the epoch", "running_accuracy": "Keras's running mean"}
VALIDATION = "validation_accuracy"

CONVERGED = 0.9999
"""Training accuracy, rounded to 100.0 %, from which on a run has converged; the paper does not define it."""
# table I: accuracy after epochs 1 and 2, epochs until convergence, final training and validation accuracy
TABLE = {
    "CW-NGD": (0.8797, 0.9803, 13, 1.0, 0.9896),
    "Adam": (0.8585, 0.9589, 49, 1.0, 0.9868),
    "K-FAC": (0.9032, 0.9568, 38, 1.0, 0.9832),
}
CLOSE = {"first": 0.03, "second": 0.01, "validation": 0.003}
"""How near measured accuracies must be; the first epoch depends most on the sizes, which we don't know."""
NEAR = 1.5
"""Factor within which numbers of epochs must be."""
DIGIT = 1e-4
"""The last digit of the table: accuracies that are no further apart count as equal."""
FALL = 1e-3
"""What counts as a fluctuation: a fall between two epochs that is a hundredth of what figure 5 spans."""

percent = partial(spread, digits=".2f", factor=100.0, unit=" %")


def epochs_to_converge(run: Mapping[str, Any], epoch: int, key: str = "train_accuracy") -> float:
    """Epochs until the training accuracy stays converged; infinite where it does not.

    Args:
        run: one seed's.
        epoch: its steps.
        key: which accuracy.
    """
    lines = _lines(run, key)
    if run["stopped"] is not None or not lines:
        return math.inf
    below = [line["step"] for line in lines if line[key] < CONVERGED]
    return math.inf if below and below[-1] == lines[-1]["step"] else (below[-1] / epoch + 1 if below else 1.0)


def falls(run: Mapping[str, Any], key: str) -> list[float]:
    """How much an accuracy falls from each epoch to the next, 0 where it does not; infinitely where the run breaks off.

    Args:
        run: one seed's.
        key: which accuracy.
    """
    values = [line[key] for line in _lines(run, key)]
    found = [max(0.0, before - after) for before, after in pairwise(values)]
    return [*found, 0.0 if run["stopped"] is None else math.inf]


def course(one: Trained, key: str) -> list[float]:
    """The seeds' median of an accuracy after each epoch.

    Args:
        one: the method.
        key: which accuracy.
    """
    look = one.effort.look
    return [median(one.at(key, step)) for step in range(look, one.effort.steps + 1, look)]


def _lines(run: Mapping[str, Any], key: str) -> list[Mapping[str, float]]:
    """The evaluations after whole epochs: not that of the initial weights."""
    return [line for line in run["curve"] if line["step"] > 0 and key in line]


# ---- rows ------------------------------------------------------------------------------------------------------------

Found = Mapping[str, Trained]
Departures = tuple[str, ...]


def each_reading(
    row: Callable[[Found, str, str, Departures], Claim],
    found: Found,
    departures: Departures,
    accuracies: Iterable[str] = tuple(ACCURACIES),
) -> list[Claim]:
    """A claim in each reading of COST that was trained and of the accuracy; the first one is counted.

    Args:
        row: the claim for one reading of CW-NGD beside the others, its name, an accuracy and the departures.
        found: name to method.
        departures: of the exhibit.
        accuracies: which ones make a difference.
    """
    owns = [name for name in READINGS if name in found]
    rows: list[Claim] = []
    for own in owns:
        group = {own: found[own], **others(found)}
        for key in accuracies:
            claim = row(group, own, key, departures)
            reading = [READINGS[own], *([ACCURACIES[key]] if key in ACCURACIES else [])]
            rows.append(replace(claim, statement=f"{claim.statement}; {', '.join(reading)}", repeats=bool(rows)))
    return rows


def others(found: Found) -> dict[str, Trained]:
    """The methods that CW-NGD is compared with."""
    return {name: one for name, one in found.items() if name not in READINGS}


def a_third_of(found: Found, own: str, key: str, departures: Departures) -> Claim:
    """Section VI's reading of how much sooner CW-NGD converges."""
    statement = "CW-NGD only requires one-third of the iterations required by KFAC or Adam to converge (section VI)"
    rule = "its median is at most half of each other's"
    return _sooner(statement, rule, 0.5, found, key, departures)


def a_third_fewer(found: Found, own: str, key: str, departures: Departures) -> Claim:
    """Section V's: the weaker one."""
    statement = "CW-NGD requires nearly one-third fewer iterations to converge than the other two (section V)"
    rule = "its median is at most three quarters of each other's"
    return _sooner(statement, rule, 0.75, found, key, departures)


def _sooner(statement: str, rule: str, share: float, found: Found, key: str, departures: Departures) -> Claim:
    own, *rest = (_epochs(one, key) for one in found.values())
    most = _length(found)
    holds = median(own) <= most and all(median(own) <= share * min(median(other), most + 1) for other in rest)
    return Claim(
        statement,
        "13, against 49 (Adam) and 38 (K-FAC)",
        ", ".join(f"{name} {_counted(_epochs(one, key), most)}" for name, one in found.items()) + " epochs",
        f"{rule} (converged: training accuracy {CONVERGED:.2%} to the end; what does not converge counts as the "
        "length of the run and one)",
        holds,
        departures,
        values={f"{name}_epochs": median(_epochs(one, key)) for name, one in found.items()},
    )


def starts_between(found: Found, own: str, key: str, departures: Departures) -> Claim:
    """The order after the first epoch."""
    first = {name: one.at(key, one.effort.look) for name, one in found.items()}
    low, middle, high = (median(first[name]) for name in ("Adam", own, "K-FAC"))
    return Claim(
        "CW-NGD starts with a lower training accuracy than KFAC, better than Adam (section V)",
        "87.97 % after the first iteration, against 85.85 % (Adam) and 90.32 % (K-FAC)",
        _listed(first),
        "its median lies between the others' after the first epoch, in that order",
        low < middle < high,
        departures,
        values={name: median(values) for name, values in first.items()},
    )


def ahead_from_the_second(found: Found, own: str, key: str, departures: Departures) -> Claim:
    """The order from the second epoch to the end."""
    second = {name: one.at(key, 2 * one.effort.look) for name, one in found.items()}
    highest = max(median(values) for name, values in second.items() if name != own)
    behind = _behind(found, own, key)
    where = f"behind by more than 0.01 points after {len(behind)} of the later epochs" if behind else "never behind"
    ahead = median(second[own]) > highest
    return Claim(
        "CW-NGD gets a better training accuracy than both from the second iteration (section V)",
        "98.03 % after the second, against 95.89 % (Adam) and 95.68 % (K-FAC)",
        f"after the second {_listed(second)}; {where}",
        "its median is the highest after the second epoch and later nowhere more than 0.01 points (the table's last "
        "digit) below another's",
        ahead and not behind,
        departures,
        values={name: median(values) for name, values in second.items()} | {"epochs_behind": float(len(behind))},
        earlier_rule="its median is the highest after the second epoch",
        earlier_holds=ahead,
    )


def highest_validation(found: Found, own: str, key: str, departures: Departures) -> Claim:
    """The order of the final validation accuracies."""
    finals = {name: one.last(key) for name, one in found.items()}
    return Claim(
        "CW-NGD clearly has the highest validation accuracy (section VI)",
        "98.96 %, against 98.68 % (Adam) and 98.32 % (K-FAC)",
        _listed(finals),
        "its median is the highest at the end",
        all(median(finals[own]) > median(values) for name, values in finals.items() if name != own),
        departures,
        values={name: median(values) for name, values in finals.items()},
    )


def rises_smoothly(found: Found, own: str, key: str, departures: Departures) -> Claim:
    """Whether CW-NGD's training curve falls anywhere."""
    largest = [max(falls(run, key)) for run in found[own].runs]
    return Claim(
        "CW-NGD's training curve smoothly and monotonically rises without fluctuating (section V)",
        "figure 5a (no number)",
        f"its largest fall between two epochs is {percent(largest)}",
        f"the seeds' median of the largest fall is at most {FALL:.1%}",
        median(largest) <= FALL,
        departures,
        values={"largest_fall": median(largest)},
    )


def others_fluctuate(found: Found, key: str, departures: Departures) -> Claim:
    """Whether the others' training curves do."""
    largest = {name: [max(falls(run, key)) for run in one.runs] for name, one in others(found).items()}
    return Claim(
        f"the other two methods' graphs fluctuate (section V); {ACCURACIES[key]}",
        "figure 5a (no number)",
        f"largest falls between two epochs: {_listed(largest)}",
        f"of both, the seeds' median of the largest fall is more than {FALL:.1%}",
        all(median(values) > FALL for values in largest.values()),
        departures,
        values={name: median(values) for name, values in largest.items()},
    )


def ahead_before_the_first_fluctuation(found: Found, own: str, key: str, departures: Departures) -> Claim:
    """The order from the second epoch until another's curve first falls."""
    most = _length(found)
    curves = [course(one, key) for one in others(found).values()]
    fallen = [epoch for values in curves for epoch in range(1, most) if values[epoch - 1] - values[epoch] > FALL]
    first = min([most, *fallen])
    behind = [epoch for epoch in _behind(found, own, key) if epoch < first]
    where = f"first fall by more than {FALL:.1%} after epoch {first}" if fallen else "never fall"
    ahead = f"behind after {len(behind)} of {first - 1} epochs from the second on"
    return Claim(
        "CW-NGD achieves a higher training accuracy than the other two even before the first fluctuation (section V)",
        "figure 5a (no number)",
        f"the others' medians {where}; until there CW-NGD is {ahead}",
        "from the second epoch until another's median first falls its own is nowhere more than 0.01 points below "
        "another's, and there is such an epoch",
        first > 1 and not behind,
        departures,
        values={"first_fluctuation": float(first), "epochs_behind": float(len(behind))},
    )


def steadier_validation(found: Found, own: str, key: str, departures: Departures) -> Claim:
    """Whose validation curve falls least, all its falls together."""
    total = {name: [sum(falls(run, key)) for run in one.runs] for name, one in found.items()}
    return Claim(
        "CW-NGD's validation accuracy curve fluctuates less than the other two methods (section V)",
        "figure 5b (no number)",
        f"all falls between epochs together: {_listed(total)}",
        "the seeds' median of the sum of all falls is smaller than each other's",
        all(median(total[own]) < median(values) for name, values in total.items() if name != own),
        departures,
        values={name: median(values) for name, values in total.items()},
    )


def table_rows(name: str, one: Trained, departures: Departures) -> list[Claim]:
    """The numbers of table I of one method; the sensitivity is the other reading of the accuracy.

    Args:
        name: of the method.
        one: its runs.
        departures: of the exhibit.
    """
    first, second, converged, _, validation = TABLE[LITERAL if name == MEAN_COST else name]
    look, steps = one.effort.look, one.effort.steps
    most, (key, other) = steps // look, ACCURACIES
    title = f"CW-NGD ({READINGS[name]})" if name in READINGS else name

    def near(values: Sequence[float], paper: float, close: float) -> bool:
        return abs(median(values) - paper) <= close

    def epochs_near(values: Sequence[float]) -> bool:
        return converged / NEAR <= median(values) <= converged * NEAR

    def whole(values: Sequence[float]) -> bool:
        return median(values) >= CONVERGED

    def points(close: float) -> str:
        return f"within {100 * close:g} percentage points"

    def row(
        words: str,
        paper: str,
        values: Callable[[str], list[float]],
        rule: str,
        holds: Callable[[Sequence[float]], bool],
        shown: Callable[[Sequence[float]], str] = percent,
    ) -> Claim:
        mine, running = values(key), values(other)
        kept = "keeps" if holds(running) else "breaks"
        return Claim(
            f"{title}: {words}, {ACCURACIES[key]}", paper, shown(mine), rule, holds(mine), departures,
            f"{ACCURACIES[other]}: {shown(running)}, which {kept} the rule",
            {"measured": median(mine), "running_mean": median(running)}, repeats=name == MEAN_COST,
        )  # fmt: skip

    finals = one.last(VALIDATION)
    return [
        row(
            "training accuracy after the first iteration", f"{100 * first:.2f} %", lambda k: one.at(k, look),
            points(CLOSE["first"]), lambda values: near(values, first, CLOSE["first"]),
        ),
        row(
            "after the second", f"{100 * second:.2f} %", lambda k: one.at(k, 2 * look),
            points(CLOSE["second"]), lambda values: near(values, second, CLOSE["second"]),
        ),
        row(
            "number of iterations needed for convergence", str(converged), lambda k: _epochs(one, k),
            f"within a factor of {NEAR:g} (converged: {CONVERGED:.2%} to the end)", epochs_near,
            lambda values: _counted(values, most),
        ),
        row(
            "final training accuracy", "100 %", lambda k: one.at(k, most * look),
            f"at least {CONVERGED:.2%}, which rounds to 100.0 %", whole,
        ),
        Claim(
            f"{title}: final validation accuracy",
            f"{100 * validation:.2f} %", percent(finals), points(CLOSE["validation"]),
            near(finals, validation, CLOSE["validation"]), departures,
            values={"measured": median(finals)}, repeats=name == MEAN_COST,
        ),
    ]  # fmt: skip


def _listed(found: Mapping[str, Sequence[float]]) -> str:
    return ", ".join(f"{name} {percent(values)}" for name, values in found.items())


def _epochs(one: Trained, key: str) -> list[float]:
    return [epochs_to_converge(run, one.effort.look, key) for run in one.runs]


def _length(found: Found) -> int:
    """Epochs of each run."""
    effort = next(iter(found.values())).effort
    return effort.steps // effort.look


def _counted(epochs: Sequence[float], most: int) -> str:
    """Numbers of epochs in words."""
    if median(epochs) > most:
        return f"not within {most}"
    if min(epochs) == max(epochs):
        return f"{median(epochs):g}"
    high = f"{max(epochs):g}" if max(epochs) <= most else f"not within {most}"
    return f"{median(epochs):g} ({min(epochs):g} to {high})"


def _behind(found: Found, own: str, key: str) -> list[int]:
    """Places of the epochs from the second on after which another's median is higher by more than the last digit."""
    mine = course(found[own], key)
    best = [max(values) for values in zip(*(course(one, key) for one in others(found).values()), strict=True)]
    return [epoch for epoch in range(1, len(mine)) if best[epoch] - mine[epoch] > DIGIT]
