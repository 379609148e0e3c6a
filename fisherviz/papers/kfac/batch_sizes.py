"""Martens & Grosse 2015, figure 9: progress per iteration and per training case against the mini-batch size m.

MNIST autoencoder, K-FAC with and without momentum and Nesterov's momentum, at several fixed m. How an m changes the
rate of progress is an exponent: with iterations ∝ m^−p to one error, p > 1 is a superlinear rate, and fewer training
cases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fisherviz.papers.kfac.deep import ETA, deep_autoencoder, departures
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.pictures import draw
from fisherviz.papers.trials.curves import STYLES, logarithmic
from fisherviz.papers.trials.problems import Effort, Method, Trained
from fisherviz.papers.trials.tuning import tuned
from fisherviz.papers.trials.words import protocol, spread
from fisherviz.papers.trials.work import Run
from fisherviz.plotting.style import tidy

ERROR = "train_squared_error"
BASELINE, DIAGONAL, TRIDIAGONAL = "Nesterov", "K-FAC diagonal", "K-FAC tridiagonal"
STILL = ", no momentum"
WITH, WITHOUT = (DIAGONAL, TRIDIAGONAL), (f"{DIAGONAL}{STILL}", f"{TRIDIAGONAL}{STILL}")
WIDTHS = (0.9, 1.5, 2.3)
"""Of lines, from the smallest m to the largest."""


@dataclass(frozen=True)
class Scale:
    """How much is run.

    Args:
        effort: of each method at each m.
        limit: training images; None: all.
        sizes: m.
        inverses: of K-FAC.
    """

    effort: Effort
    limit: int | None
    sizes: tuple[int, ...]
    inverses: tuple[str, ...] = ("block-diagonal", "block-tridiagonal")


SCALES = {
    "smoke": Scale(Effort(steps=2, look=1, seeds=1, trials=1, trial_steps=1), 60, (10, 30), ("block-diagonal",)),
    "desk": Scale(Effort(steps=24, look=3, seeds=2, trials=2, trial_steps=8), 2000, (100, 400), ("block-diagonal",)),
    "paper": Scale(Effort(steps=1000, look=10, seeds=1, trials=6, trial_steps=200), None, (1000, 2000, 4000)),
}
Found = dict[tuple[str, int], Trained]


def methods(inverses: tuple[str, ...]) -> tuple[Method, ...]:
    """The baseline, and K-FAC with momentum and without; λ₀ is tuned as the baseline's learning rate is."""
    rates = tuple(float(f"{a}e{i}") for i in range(-5, 0) for a in (1, 3))
    fixed: dict[str, Any] = {"weight_decay": ETA}
    found = [Method(BASELINE, "nesterov", {**fixed, "momentum": 0.99}, {"lr": rates}, {"lr": 0.01})]
    names = {"block-diagonal": DIAGONAL, "block-tridiagonal": TRIDIAGONAL}
    for words, momentum in (("", None), (STILL, 0.0)):
        for inverse in inverses:
            options = {**fixed, "inverse": inverse, "momentum": momentum}
            grid = {"damping": (0.015, 0.15, 1.5, 15.0, 150.0)}
            found.append(Method(f"{names[inverse]}{words}", "kfac", options, grid, {"damping": 1.5}))
    return tuple(found)


@exhibit(
    "kfac.fig9", "figure 9: progress against the mini-batch size, with and without momentum",
    shows="training error over iterations and over training cases at several mini-batch sizes",
    desk=0.05, paper=10.0,
)  # fmt: skip
def fig9(run: Run) -> Outcome:
    """Train the MNIST autoencoder at several mini-batch sizes.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    scale = SCALES[run.scale]
    problems = {m: deep_autoencoder(run, m, scale.limit, averaging=0.99) for m in scale.sizes}
    keys = [(method, m) for method in methods(scale.inverses) for m in scale.sizes]
    trained = tuned([(problems[m], method, scale.effort) for method, m in keys], run)
    found = {(method.name, m): one for (method, m), one in zip(keys, trained, strict=True)}
    first = problems[scale.sizes[0]]
    steps = scale.effort.steps
    other = (
        *departures(first),
        *([f"{steps} iterations"] if run.scale != "paper" else []),
        *(["the block-diagonal version alone"] if len(scale.inverses) == 1 else []),
        "mini-batch sizes that the text does not give",
    )
    details = (
        f"{first.title} autoencoder, {first.examples:,} training images; m = {', '.join(map(str, scale.sizes))}; η = "
        f"{ETA:g}; K-FAC with T₁ = 5, T₂ = T₃ = 20, τ₁ = 1/8, τ₂ = 1/4; Nesterov's momentum on Sutskever's "
        f"schedule; the better of the iterate and its average with ξ = 0.99 counts; {scale.effort}"
    )
    caption = (
        "Squared reconstruction error of the training images over iterations (left) and over training cases (right); "
        "the thicker the line, the larger m (median of the seeds)."
    )
    shown = {f"{name}, m = {m}": one for (name, m), one in found.items()}
    picture = draw(9.2, 4.0, lambda figure: _fill(figure, found, scale.sizes))
    setting = f"{first.title} autoencoder, {steps} iterations, {scale.effort.seeds} seeds"
    return Outcome(claims_of(found, scale.sizes, other), setting, details, caption, picture, protocol(shown))


def needed(run: Mapping[str, Any], error: float) -> float:
    """Iterations until a run's error is first as low as given, between two looks in proportion; infinite if never."""
    lines = run["curve"]
    if lines[0][ERROR] <= error:
        return 0.0
    for before, after in pairwise(lines):
        if after[ERROR] <= error:
            share = (before[ERROR] - error) / (before[ERROR] - after[ERROR])
            return before["step"] + share * (after["step"] - before["step"])
    return math.inf


def exponents(small: Trained, large: Trained, sizes: tuple[int, int]) -> list[float]:
    """P of iterations ∝ m^−p, by seed, to the lowest error that both sizes reach.

    Args:
        small: trained with the smaller m.
        large: trained with the larger.
        sizes: both m.
    """
    found = []
    for one, other in zip(small.runs, large.runs, strict=True):
        error = max(min(line[ERROR] for line in run["curve"]) for run in (one, other))
        slow, fast = needed(one, error), needed(other, error)
        found.append(math.log(slow / fast) / math.log(sizes[1] / sizes[0]) if min(slow, fast) > 0 else 0.0)
    return found


def claims_of(found: Found, sizes: tuple[int, ...], other: tuple[str, ...]) -> tuple[Claim, ...]:
    """The rows.

    Args:
        found: method and m to runs.
        sizes: m, rising.
        other: departures.
    """
    ends = (sizes[0], sizes[-1])
    names = list(dict.fromkeys(name for name, _ in found))
    powers = {name: exponents(found[name, ends[0]], found[name, ends[1]], ends) for name in names}
    middle = {name: median(values) for name, values in powers.items()}
    moving, still = ([name for name in group if name in powers] for group in (WITH, WITHOUT))
    more = f"between m = {ends[0]} and m = {ends[1]}"

    def words(*which: str) -> str:
        return ", ".join(f"{name}: p = {spread(powers[name], '.2f')}" for name in which) + f" {more}"

    least = min(middle[name] for name in moving)
    rate = "the rate of progress is taken to be ∝ m^p, by the iterations to the lowest error that both m reach"
    return (
        Claim(
            "the per-iteration rate of progress of K-FAC tends to a superlinear function of m",
            "section 13 and figure 9", words(*moving), f"the median p is above 1 ({rate})", least > 1, other,
            values={name: middle[name] for name in moving},
        ),
        Claim(
            "increasing m has a much smaller effect on the baseline's per-iteration rate of progress",
            "section 13 and figure 9", words(BASELINE, *moving), "the baseline's median p is at most half of K-FAC's",
            middle[BASELINE] <= least / 2, other, values={name: middle[name] for name in (BASELINE, *moving)},
        ),
        Claim(
            "K-FAC without momentum has a per-iteration rate of progress that is a linear or slightly sublinear "
            "function of m",
            "section 13 and figure 9", words(*still), "the median p is from 0.5 to 1.1",
            all(0.5 <= middle[name] <= 1.1 for name in still), other, values={name: middle[name] for name in still},
        ),
    )  # fmt: skip


def _fill(figure: Figure, found: Found, sizes: tuple[int, ...]) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    for name, m in found:
        steps, errors = _median(found[name, m])
        width = WIDTHS[-1] if m == sizes[-1] else WIDTHS[sizes.index(m)]
        look = STYLES[name]
        for ax, factor in ((left, 1), (right, m)):
            ax.plot(
                factor * steps, errors, color=look.color, linestyle=look.line, linewidth=width, marker=look.marker,
                ms=3, markevery=max(1, len(steps) // 6), label=f"{name}, m = {m}",
            )  # fmt: skip
    for ax, word in ((left, "iteration"), (right, "training cases")):
        tidy(ax)
        ax.set_xlabel(word)
    logarithmic(left)
    left.set_ylabel("squared error of an image")
    _legend(figure, left)


def _median(one: Trained) -> tuple[np.ndarray, np.ndarray]:
    length = min(len(run["curve"]) for run in one.runs)
    steps = np.array([line["step"] for line in one.runs[0]["curve"][:length]])
    errors = np.array([[line[ERROR] for line in run["curve"][:length]] for run in one.runs])
    return steps, np.median(errors, axis=0)


def _legend(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
