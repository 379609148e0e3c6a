"""The MNIST autoencoder of section 13 as figures 7 and 9 train it, and where a run of it departs from the paper's."""

from __future__ import annotations

from fisherviz.papers.trials.problems import Problem, at_hand
from fisherviz.papers.trials.work import Run

ETA = 1e-5
SMALL = (("hidden", (12, 3, 12)), ("activation", "logistic"), ("init", "sparse"))
"""Of the network at scale "smoke"."""


def deep_autoencoder(
    run: Run, batch: int, limit: int | None, full_at: int | None = None, averaging: float | None = None
) -> Problem:
    """The problem: 784-1000-500-250-30 and back; "smoke" has digits and a small network.

    Args:
        run: its scale.
        batch: images of a mini-batch, or of the first.
        limit: training images; None: all.
        full_at: iteration at which growing batches hold all images.
        averaging: ξ of the averaged iterate.
    """
    name, small = ("mnist" if at_hand("mnist", run) else "digits"), run.scale == "smoke"
    return Problem(
        name, "kfac-mlp" if small else "mnist-autoencoder", SMALL if small else (), batch=batch, limit=limit,
        full_at=full_at, averaging=averaging, size=28 if name == "digits" and not small else None, task="autoencoder",
        evaluated=limit,
    )  # fmt: skip


def departures(problem: Problem) -> list[str]:
    """Where data and network are not the paper's."""
    found = [] if problem.dataset == "mnist" else [f"{problem.title} instead of MNIST"]
    found += ["a smaller network"] if problem.model_options else []
    return found + ([f"{problem.limit:,} training images instead of 60,000"] if problem.limit is not None else [])
