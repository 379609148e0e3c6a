"""Martens & Grosse 2015, caption of figure 2: how many iterations of K-FAC in batch mode the example network takes.

The paper gives neither λ₀ nor the initialisation: λ₀ is tried on a grid with one seed for each of two initialisations,
and the fastest is trained on, from every seed, until no training example is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
from matplotlib.figure import Figure

from fisherviz.papers.kfac.descent import (
    LAMBDAS,
    SMOKE_LAMBDAS,
    Recipe,
    descend,
    iterations,
    recipe,
    taken_words,
    tried,
)
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.pictures import draw
from fisherviz.papers.trials.problems import TITLES
from fisherviz.papers.trials.words import spread
from fisherviz.papers.trials.work import Run
from fisherviz.plotting.style import tidy

INITS = {"xavier": "Glorot's initialisation", "sparse": "sparse initialisation"}
LOOKS = {"xavier": ("#D55E00", "-", "o"), "sparse": ("#0072B2", (0, (5, 1.5)), "^")}
MOST = {"smoke": 6, "desk": 44, "paper": 200}
SEEDS = {"smoke": 2, "desk": 3, "paper": 5}
FACTOR = 1.5
PAPER = ((0.05, 7, "the network was trained with 7 iterations of K-FAC in batch mode, achieving 5% error"),
         (0.0, 22, "the error reached 0% after 22 iterations"))  # fmt: skip
RULE = (
    "from the fastest λ₀ of the grid and with the faster of the two initialisations, the median of the seeds is at "
    f"most {FACTOR} times as many"
)


@dataclass(frozen=True)
class Descents:
    """The runs from one initialisation.

    Args:
        trials: of λ₀, with their iterations.
        errors: share of wrong training examples after each iteration, by seed.
    """

    trials: Mapping[Recipe, float]
    errors: tuple[tuple[float, ...], ...]

    @property
    def start(self) -> float:
        """The fastest λ₀."""
        return min(self.trials, key=self.trials.__getitem__).start

    def taken(self, error: float) -> list[float]:
        """Iterations to an error, by seed."""
        return [iterations({"errors": errors}, error) for errors in self.errors]

    def words(self, error: float, most: int) -> str:
        """The same in words."""
        taken = self.taken(error)
        arrived = [one for one in taken if one < math.inf]
        if not arrived:
            lowest = spread([min(errors) for errors in self.errors], ".2%")
            return f"none of {len(taken)} seeds in {most} iterations (lowest error {lowest})"
        late = f", {len(taken) - len(arrived)} of {len(taken)} seeds not in {most}" if len(arrived) < len(taken) else ""
        return f"{spread(arrived, '.0f')} iterations{late}"


@exhibit(
    "kfac.caption2", "caption of figure 2: K-FAC in batch mode to 5 % and to 0 % training error",
    shows="in words, that the example network has 5 % error after 7 iterations of batch K-FAC and 0 % after 22",
    desk=0.17, paper=0.8,
)  # fmt: skip
def caption2(run: Run) -> Outcome:
    """Train the example network by batch K-FAC until no example is wrong.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    smoke, most = run.scale == "smoke", MOST[run.scale]
    found = {init: _descents(recipe(run, init), SMOKE_LAMBDAS if smoke else LAMBDAS, run) for init in INITS}
    setting = recipe(run)
    claims = tuple(judged(found, *row, most, setting.departures) for row in PAPER)
    data = setting.load(run)
    sizes = "-".join(map(str, [data.inputs, *(setting.width,) * 5, data.outputs]))
    details = (
        f"{TITLES[setting.data]} scaled to 16 × 16, all {len(data.train.inputs):,} training examples in every "
        f"iteration; tanh network {sizes}; complete K-FAC, block-tridiagonal, η = 1e-05, τ₁ = τ₂ = 1; iterations to "
        f"{setting.error:.0%} error with seed {run.seed}: "
        + "; ".join(f"{INITS[init]}: {taken_words(one.trials)}" for init, one in found.items())
        + f"; then {SEEDS[run.scale]} seeds of at most {most} iterations from the fastest λ₀"
    )
    caption = (
        "Share of wrong training examples after each iteration of K-FAC in batch mode (median and range of the seeds); "
        "crosses: the paper's 5 % after 7 iterations and 0 % after 22."
    )
    picture = draw(6.4, 4.0, lambda figure: _fill(figure, found))
    return Outcome(claims, f"{TITLES[setting.data]} 16 × 16, {sizes}, batch K-FAC", details, caption, picture)


def _descents(setting: Recipe, lambdas: tuple[float, ...], run: Run) -> Descents:
    trials = tried(setting, lambdas, run)
    start = min(trials, key=trials.__getitem__).start
    long = replace(setting, start=start, error=0.0, most=MOST[run.scale])
    recipes = [replace(long, seed=seed) for seed in range(run.seed, run.seed + SEEDS[run.scale])]
    return Descents(trials, tuple(tuple(one["errors"]) for one in run.map(descend, recipes)))


def judged(
    found: Mapping[str, Descents], error: float, paper: int, statement: str, most: int, departures: tuple[str, ...]
) -> Claim:
    """The row of one of the caption's numbers.

    Args:
        found: the runs from each initialisation.
        error: that is to be reached.
        paper: the paper's iterations.
        statement: the paper's words.
        most: iterations at which runs stopped.
        departures: from the paper's setting.
    """
    taken = {init: median(one.taken(error)) for init, one in found.items()}
    measured = "; ".join(f"{INITS[init]}, λ₀ = {one.start:g}: {one.words(error, most)}" for init, one in found.items())
    holds = min(taken.values()) <= FACTOR * paper
    return Claim(statement, f"{paper} iterations", measured, RULE, holds, departures, values=taken)


def _fill(figure: Figure, found: Mapping[str, Descents]) -> None:
    ax = figure.subplots()
    for init, one in found.items():
        length = max(map(len, one.errors))
        # a run that came to 0 % has stopped there
        values = 100 * np.array([[*errors, *[errors[-1]] * (length - len(errors))] for errors in one.errors])
        color, line, marker = LOOKS[init]
        x = np.arange(1, length + 1)
        label = f"{INITS[init]}, λ₀ = {one.start:g}"
        ax.plot(x, np.median(values, 0), color=color, linestyle=line, marker=marker, markevery=5, ms=4, label=label)
        ax.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.18, linewidth=0)
    ax.plot([7, 22], [5, 0], "x", color="black", ms=9, mew=2, label="the paper", clip_on=False, zorder=5)
    ax.set_yscale("symlog", linthresh=0.1)
    ax.set_ylim(0, 100)
    ticks = (0, 0.1, 1, 5, 10, 100)
    ax.set_yticks(ticks, [f"{tick:g} %" for tick in ticks])
    ax.set_xlabel("iteration")
    ax.set_ylabel("training error")
    tidy(ax)
    ax.legend()
