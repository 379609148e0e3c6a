"""Martens & Grosse 2015, figure 11 on the MNIST autoencoder: reconstruction error over iterations.

784-1000-500-250-30 and back, logistic units, sparse initialisation, η = 1e-5, averaged iterates with ξ = 0.99. K-FAC
complete, diagonal and tridiagonal, with momentum and growing batches and without; against Nesterov's momentum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from fisherviz import models
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.pictures import draw
from fisherviz.papers.trials.curves import draw_curves, logarithmic
from fisherviz.papers.trials.problems import Effort, Method, Problem, Trained, at_hand
from fisherviz.papers.trials.tuning import tuned
from fisherviz.papers.trials.words import protocol, settings_words, spread, stopped_words
from fisherviz.papers.trials.work import Run

ERROR = "train_squared_error"
ETA = 1e-5
BASELINE = "Nesterov"
DIAGONAL, TRIDIAGONAL = "K-FAC diagonal", "K-FAC tridiagonal"
STILL = ", no momentum"
# slow and fast methods, at least and at most how many times faster, claim, paper's figure, rule
CLAIMS = (
    (
        ((BASELINE, DIAGONAL), (BASELINE, TRIDIAGONAL)), 10.0, math.inf,
        "with momentum, K-FAC's progress per iteration is orders of magnitude higher than the baseline's",
        "orders of magnitude (figure 11)",
        "both versions need at least 10 times fewer iterations to the baseline's lowest error",
    ),
    (
        ((f"{DIAGONAL}{STILL}", DIAGONAL), (f"{TRIDIAGONAL}{STILL}", TRIDIAGONAL)), 2.0, math.inf,
        "K-FAC's momentum is what makes the difference",
        "without it K-FAC was not significantly faster than the baseline (section 13)",
        "both versions need at least 2 times fewer iterations than without momentum",
    ),
    (
        ((DIAGONAL, TRIDIAGONAL),), 1.25, 1.4,
        "the block-tridiagonal version's progress per iteration is larger than the block-diagonal one's",
        "typically 25 % to 40 %",
        "1.25 to 1.4 times fewer iterations to the block-diagonal version's lowest error",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """How much of the paper's setting is run; None: all."""

    effort: Effort
    limit: int | None
    first: int  # m₁ of K-FAC's growing batches
    full_at: int  # iteration at which they hold all examples
    batch: int  # of the others


SCALES = {
    "smoke": Scale(Effort(steps=3, look=1, seeds=2, trials=1, trial_steps=1), 120, 40, 3, 40),
    "desk": Scale(Effort(steps=40, look=4, seeds=3, trials=2, trial_steps=20), 2000, 250, 40, 250),
    "paper": Scale(Effort(steps=2000, look=20, seeds=3, trials=12, trial_steps=500), None, 1000, 500, 500),
}


def small_autoencoder(inputs: int, *, generator: torch.Generator) -> nn.Sequential:
    """An autoencoder of the same make in small, for tests.

    Args:
        inputs: pixels.
        generator: where the weights come from.
    """
    model = nn.Sequential(
        nn.Linear(inputs, 12), nn.Sigmoid(), nn.Linear(12, 3), nn.Linear(3, 12), nn.Sigmoid(), nn.Linear(12, inputs)
    )
    return models.sparse_init(model, generator=generator)


def methods() -> tuple[Method, ...]:
    """Nesterov's momentum and four versions of K-FAC; for these λ₀ is what the paper leaves to the application."""
    rates = tuple(float(f"{a}e{i}") for i in range(-5, 0) for a in (1, 3))
    found = [
        Method(
            BASELINE, "nesterov", {"weight_decay": ETA},
            {"lr": rates, "momentum": (0.9, 0.99, 0.995, 0.999)}, {"lr": 0.003, "momentum": 0.99},
        )
    ]  # fmt: skip
    for words, momentum in (("", None), (STILL, 0.0)):
        for name, inverse in ((DIAGONAL, "block-diagonal"), (TRIDIAGONAL, "block-tridiagonal")):
            fixed = {"inverse": inverse, "weight_decay": ETA, "momentum": momentum}
            grid = {"damping": (1.5, 15.0, 150.0, 1500.0)}
            found.append(Method(f"{name}{words}", "kfac", fixed, grid, {"damping": 150.0}))
    return tuple(found)


@exhibit(
    "kfac.fig11", "figure 11, middle: K-FAC and Nesterov on the MNIST autoencoder",
    shows="training error over iterations, with and without momentum, both K-FACs far below the baseline",
    desk=0.5, paper=60.0,
)  # fmt: skip
def fig11(run: Run) -> Outcome:
    """Train the autoencoder with the baseline and four versions of K-FAC.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    scale = SCALES[run.scale]
    name = "mnist" if at_hand("mnist", run) else "digits"
    small = run.scale == "smoke"
    network = "fisherviz.papers.kfac.autoencoders:small_autoencoder" if small else "mnist-autoencoder"
    still = Problem(
        name, network, batch=scale.batch, limit=scale.limit, size=28 if name == "digits" and not small else None,
        task="autoencoder", averaging=0.99, evaluated=scale.limit,
    )  # fmt: skip
    growing = replace(still, batch=scale.first, full_at=scale.full_at)
    problems = {DIAGONAL: growing, TRIDIAGONAL: growing}
    tasks = [(problems.get(m.name, still), m, scale.effort) for m in methods()]
    found = {one.method.name: one for one in tuned(tasks, run)}
    other = _departures(scale, name, small)
    claims = tuple(_claim(found, other, *row) for row in CLAIMS)
    sizes = "64-12-3-12-64" if small else "784-1000-500-250-30 and back"
    details = (
        f"{growing.title}, {growing.examples:,} training images, {sizes}, logistic units, sparse initialisation, "
        f"η = {ETA:g}; K-FAC with T₁ = 5, T₂ = T₃ = 20, τ₁ = 1/8, τ₂ = 1/4, batches from {scale.first} growing to all "
        f"at iteration {scale.full_at} (without momentum: {scale.batch}), Nesterov's momentum on Sutskever's schedule "
        f"with batch {scale.batch}; the better of the iterate and its average with ξ = 0.99 counts; {scale.effort}; "
        f"chosen: {settings_words(found)}{stopped_words(found)}"
    )
    caption = "Squared reconstruction error of the training images over iterations (median and range of the seeds)."

    def fill(figure: Figure) -> None:
        ax = figure.subplots()
        draw_curves(ax, found, ERROR, over="step")
        logarithmic(ax)
        ax.set_ylabel("squared error of an image")
        ax.legend(fontsize=8)

    setting = f"{growing.title} autoencoder, {scale.effort.steps} iterations, {scale.effort.seeds} seeds"
    return Outcome(claims, setting, details, caption, draw(6.6, 4.2, fill), protocol(found))


def _departures(scale: Scale, name: str, small: bool) -> tuple[str, ...]:
    found = ["digits instead of MNIST"] if name == "digits" else []
    found += ["a smaller network"] if small else []
    found += [f"{scale.limit:,} training images instead of 60,000"] if scale.limit is not None else []
    steps = scale.effort.steps
    return (*found, f"{steps} iterations instead of about 2000") if steps < 2000 else tuple(found)


def iterations_to(run: Mapping[str, Any], error: float) -> float:
    """Iterations until a run's error is as low as given, between two looks in proportion; infinite if never.

    Args:
        run: one seed's.
        error: of an image.
    """
    lines = run["curve"]
    for before, after in pairwise(lines):
        if after[ERROR] <= error:
            drop = before[ERROR] - after[ERROR]
            share = min(max((before[ERROR] - error) / drop, 0.0), 1.0) if drop > 0 else 1.0
            return before["step"] + share * (after["step"] - before["step"])
    return math.inf


def ratios(slow: Trained, fast: Trained) -> list[float]:
    """How many times fewer iterations the fast method needs to the slow one's lowest error, by seed; 0: never."""
    found = []
    for first, second in zip(slow.runs, fast.runs, strict=True):
        lowest = min(first["curve"], key=lambda line: line[ERROR])
        needed = iterations_to(second, lowest[ERROR])
        found.append(iterations_to(first, lowest[ERROR]) / needed if lowest["step"] and needed < math.inf else 0.0)
    return found


def _claim(
    found: Mapping[str, Trained], other: tuple[str, ...], pairs: Sequence[tuple[str, str]], least: float, most: float,
    statement: str, paper: str, rule: str,
) -> Claim:  # fmt: skip
    measured = {f"{fast} against {slow}": ratios(found[slow], found[fast]) for slow, fast in pairs}
    ends = "; ".join(f"{name} {spread(found[name].last(ERROR))}" for name in dict.fromkeys(sum(pairs, ())))
    return Claim(
        statement,
        paper,
        ", ".join(f"{name}: {spread(values, '.3g')} times" for name, values in measured.items())
        + f" fewer iterations to the slower one's lowest error; errors at the end: {ends}",
        rule,
        all(least <= median(values) <= most for values in measured.values()),
        other,
        values={name: median(values) for name, values in measured.items()},
    )
