"""Benzing 2021, final training losses over dampings, with the learning rate tuned for each of them alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from fisherviz.papers.benzing.balanced import BALANCED
from fisherviz.papers.benzing.setting import DAMPINGS
from fisherviz.papers.trials.curves import logarithmic
from fisherviz.papers.trials.problems import TITLES, Effort, Method, Problem, Trained, at_hand
from fisherviz.papers.trials.tuning import tuned
from fisherviz.papers.trials.words import protocol
from fisherviz.papers.trials.work import Run
from fisherviz.plotting.style import MethodStyle, tidy

RATES = tuple(float(f"{a}e{i}") for i in range(-10, 7) for a in (1, 3))
NATURAL_DAMPINGS = tuple(float(f"1e{i}") for i in range(-6, 7, 2))
"""Appendix B.1's grid; the other methods' `DAMPINGS` are the same for means over the batch."""
KFAC, PRODUCT, FOOF = "K-FAC", "K-FAC, product damped", "FOOF"
INDEPENDENT, SAME = "independent mini-batches", "same mini-batch"
ALL = 10
"""Learning rates from which on the search has seen what there is to see: five decades around its start."""
STARTS = {
    KFAC: (1e-7, 3e-6, 1e-4, 1e-2, 1.0, 10.0, 1e3),
    PRODUCT: (1e-9, 1e-7, 3e-5, 3e-3, 0.1, 10.0, 1e3),
    FOOF: (1e-8, 1e-6, 1e-4, 1e-2, 1.0, 10.0, 1e3),
    INDEPENDENT: (1e-7, 1e-5, 1e-3, 0.1, 10.0, 1e3, 1e5),
}
"""Where the search for a learning rate begins, for each damping: from looks at 60 steps with rates a decade apart."""


@dataclass(frozen=True)
class Scale:
    """How much of the paper's setting is run; None: all."""

    width: int
    limit: int | None
    epochs: int
    trial_epochs: int
    trials: int
    seeds: int
    amortised: int
    every: int = 1  # which dampings of the grid
    size: int | None = None  # side that images are scaled to


SCALES = {
    "smoke": Scale(10, 100, 1, 1, 1, 2, 1, every=3),
    "desk": Scale(128, 2000, 5, 3, 4, 3, 10, size=14),
    "paper": Scale(1000, None, 10, 10, 10, 3, 10),
}


@dataclass(frozen=True)
class Sweep:
    """A method at every damping.

    Args:
        name: of the method.
        dampings: in order.
        found: the method after tuning its learning rate, for each damping.
    """

    name: str
    dampings: tuple[float, ...]
    found: tuple[Trained, ...]

    @property
    def losses(self) -> np.ndarray:
        """Final training losses (dampings, seeds), infinite where a run broke off."""
        return np.array([one.last("train_loss") for one in self.found])

    @property
    def medians(self) -> list[float]:
        """Over the seeds, for each damping."""
        return [median(row) for row in self.losses.tolist()]

    @property
    def best(self) -> int:
        """The place of the damping with the smallest median."""
        return int(np.argmin(self.medians))

    @property
    def words(self) -> str:
        """Smallest, best and largest damping with their losses."""
        ends = dict.fromkeys((0, self.best, len(self.dampings) - 1))
        return ", ".join(f"{_loss(self.medians[i])} at λ = {self.dampings[i]:g}" for i in ends)


def _loss(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "diverged"


def dataset(name: str, run: Run) -> str:
    """The paper's data set, or digits where that is not to be used."""
    return name if at_hand(name, run) else "digits"


def sweeps(name: str, kinds: Sequence[str], run: Run) -> dict[str, Sweep]:
    """Each method at every damping on a data set.

    Args:
        name: of the data set.
        kinds: the methods.
        run: scale, seed, device, processes, where runs are kept.

    Returns:
        Name of the method to its sweep.
    """
    scale = SCALES[run.scale]
    options = (("hidden", (scale.width,) * 3),)
    problem = Problem(
        name, "foof-mlp", options, batch=100, limit=scale.limit, standardise=True, evaluated=scale.limit,
        dtype="float64", size=scale.size,
    )  # fmt: skip
    effort = problem.effort(scale.epochs, scale.trial_epochs, scale.trials, scale.seeds)
    methods = {kind: _methods(kind, scale) for kind in kinds}
    tasks = [(problem, method, effort) for kind in kinds for method in methods[kind].values()]
    found = iter(tuned(tasks, run))
    return {kind: Sweep(kind, tuple(own), tuple(next(found) for _ in own)) for kind, own in methods.items()}


def _methods(kind: str, scale: Scale) -> dict[float, Method]:
    """Damping to the method with its learning rate to be tuned."""
    T = {"T": scale.amortised}
    natural = kind in (INDEPENDENT, SAME)
    known: dict[str, tuple[str, dict[str, Any]]] = {
        KFAC: (BALANCED, T),
        PRODUCT: ("kfac", {"rescale": False, "adapt": False, "heuristic_damping": False, **T}),
        FOOF: ("foof", T),
        INDEPENDENT: ("subsampled", {"fisher_data": "independent"}),
        SAME: ("subsampled", {"fisher_data": "same"}),
    }
    optimizer, fixed = known[kind]
    grid = NATURAL_DAMPINGS if natural else DAMPINGS
    pairs = list(zip(grid, STARTS[INDEPENDENT if natural else kind], strict=True))[:: scale.every]
    return {
        damping: Method(
            f"{kind}, λ = {damping:g}", optimizer, {**fixed, "damping": damping}, {"lr": RATES}, {"lr": start}
        )
        for damping, start in pairs
    }


def departures(wanted: str, name: str, run: Run) -> tuple[str, ...]:
    """Where a sweep differs from the paper's setting.

    Args:
        wanted: the paper's data set.
        name: the one that was taken.
        run: how.
    """
    scale = SCALES[run.scale]
    found = [] if name == wanted else [f"{TITLES[name]} instead of {TITLES[wanted]}"]
    found += [f"hidden layers of {scale.width} instead of 1000"] if scale.width != 1000 else []
    found += [f"{scale.limit:,} training images instead of 60,000"] if scale.limit is not None else []
    found += [f"images scaled to {scale.size} × {scale.size}"] if scale.size is not None else []
    found += [f"{scale.epochs} epochs instead of 10"] if scale.epochs != 10 else []
    found += [f"{scale.trials} learning rates tried at each damping"] if scale.trials < ALL else []
    return tuple(found)


def setting_words(name: str, swept: Mapping[str, Sweep], run: Run) -> tuple[str, str]:
    """A sweep's setting in a few words, and in a sentence without its full stop.

    Args:
        name: of the data set.
        swept: method to sweep.
        run: how.
    """
    scale = SCALES[run.scale]
    effort: Effort = next(iter(swept.values())).found[0].effort
    short = (
        f"{TITLES[name]}, width {scale.width}, {scale.epochs} epochs, {scale.seeds} seeds, {scale.trials} rates each"
    )
    images = "" if scale.limit is None else f" of the first {scale.limit:,} training images"
    long = (
        f"{TITLES[name]} standardised, ReLU network with three hidden layers of {scale.width}, no biases, batch 100, "
        f"float64 (the smallest dampings are below float32's rounding), {scale.epochs} epochs{images}; "
        f"learning rates of the form 1 and 3 times a power of ten, tuned for each damping alone: {effort}"
    )
    return short, long


def rows(swept: Mapping[str, Sweep]) -> tuple[Mapping[str, str], ...]:
    """How each method was tuned at each damping."""
    return protocol({one.method.name: one for sweep in swept.values() for one in sweep.found})


def draw_sweep(ax: Axes, sweep: Sweep, look: MethodStyle) -> None:
    """A line through the medians of what did not diverge, bars over the seeds."""
    x, losses, medians = np.array(sweep.dampings), sweep.losses, np.array(sweep.medians)
    ok = np.isfinite(medians)
    finite = np.where(np.isfinite(losses), losses, np.nan)
    bars = np.abs(np.stack([np.nanmin(finite[ok], 1), np.nanmax(finite[ok], 1)]) - medians[ok])
    ax.errorbar(
        x[ok], medians[ok], bars, color=look.color, linestyle=look.line, marker=look.marker, markersize=5,
        linewidth=1.4, capsize=2, label=sweep.name,
    )  # fmt: skip
    tidy(ax)
    ax.set_xscale("log")
    logarithmic(ax)
    ax.set_xlabel("damping λ")
    ax.set_ylabel("final training loss")
