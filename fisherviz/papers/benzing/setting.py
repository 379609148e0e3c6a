"""Benzing 2021, the setting that its exhibits share.

784-1000-1000-1000-10, ReLU, no biases, batch 100, data standardised. Learning rates and dampings of K-FAC and FOOF
are for means over the batch: the author's, which are for sums over it, divided by 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fisherviz.papers.trials.problems import Effort, Method, Problem

RATES = tuple(float(f"{a}e{i}") for i in range(-7, 1) for a in (1, 3))
DAMPINGS = tuple(float(f"1e{i}") for i in range(-8, 5, 2))


def methods(amortised: int) -> tuple[Method, ...]:
    """The five optimizers; those with matrices renew them every so many steps."""
    fixed = {"T": amortised}
    both: dict[str, Sequence[Any]] = {"lr": RATES, "damping": DAMPINGS}
    return (
        Method("SGD", "sgd", {}, {"lr": RATES, "momentum": (0.0, 0.9)}, {"lr": 0.01, "momentum": 0.9}),
        Method("Adam", "adam", {}, {"lr": RATES}, {"lr": 1e-4}),
        Method("natural gradient", "subsampled", fixed, both, {"lr": 1e-5, "damping": 1e-4}),
        Method("K-FAC", "kfac", {"rescale": False, "adapt": False, **fixed}, both, {"lr": 3e-3, "damping": 0.01}),
        Method("FOOF", "foof", fixed, both, {"lr": 0.3, "damping": 1.0}),
    )


@dataclass(frozen=True)
class Scale:
    """How much of the paper's setting is run; None: all."""

    width: int
    limit: int | None
    epochs: int
    trial_epochs: int
    trials: int
    amortised: int
    warm: tuple[int, ...]  # steps of training before figure 4A's looks
    examples: int  # that figure 4A's factors are taken over
    seeds: int = 3


SCALES = {
    "smoke": Scale(12, 200, 2, 1, 1, 2, (2,), 60, 2),
    "desk": Scale(400, 6000, 10, 4, 6, 10, (300,), 500),
    "paper": Scale(1000, None, 10, 10, 40, 1, (300, 6000), 1000),
}


def setup(name: str, scale: Scale) -> tuple[Problem, tuple[Method, ...], Effort]:
    """What is trained on a data set, by which methods, for how long."""
    options = (("hidden", (scale.width,) * 3),)
    problem = Problem(name, "foof-mlp", options, batch=100, limit=scale.limit, standardise=True)
    effort = problem.effort(scale.epochs, scale.trial_epochs, scale.trials, scale.seeds)
    return problem, methods(scale.amortised), effort


def departures(scale: Scale, names: Sequence[str]) -> tuple[str, ...]:
    """Where a scale differs from the paper's setting."""
    found = ["digits instead of Fashion-MNIST and MNIST"] if "digits" in names else []
    found += [f"hidden layers of {scale.width} instead of 1000"] if scale.width != 1000 else []
    found += [f"{scale.limit:,} training images instead of 60,000"] if scale.limit is not None else []
    return tuple(found)
