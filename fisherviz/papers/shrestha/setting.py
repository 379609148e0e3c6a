"""What the exhibits of Shrestha 2023 share: methods with their grids, networks, departures, measures.

Algorithm 1 and equation 37 take the empirical Fisher of each mini-batch; momentum is "reserved for future work"
(section 5), so that no method has it unless an exhibit says so. The paper names neither its learning rates nor β.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from fisherviz.papers.trials.problems import Method, Problem, Trained, at_hand
from fisherviz.papers.trials.work import Run

RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
BETAS = (0.01, 0.1, 1.0)
"""β of equation 36."""
EACH_BATCH = {"kind": "empirical", "decay": 0.0, "momentum": 0.0}
SMOKE_EXAMPLES = 300
DTYPE = "float64"
"""Large rates make Fishers whose eigenvalues exceed a β of 0.01 more than ten million times."""


def _natural(name: str, optimizer: str, **fixed: Any) -> Method:
    return Method(name, optimizer, fixed, {"lr": RATES, "damping": BETAS}, {"lr": 0.1, "damping": 0.1})


METHODS = {
    one.name: one
    for one in (
        Method("SGD", "sgd", grid={"lr": RATES}, start={"lr": 0.1}),
        _natural("natural gradient", "natural-gradient", method="exact", **EACH_BATCH),
        _natural("block-wise NGD", "natural-gradient", method="layer", **EACH_BATCH),
        _natural("TENGraD", "tengrad", kind="empirical", momentum=0.0),
        _natural("K-FAC", "kfac", rescale=False, adapt=False, momentum=0.0, T=1),
        _natural("EKFAC", "ekfac", momentum=0.0, T=1),
        _natural("K-BFGS", "kbfgs", momentum=0.0),
    )
}
"""By name; the paper's EBFGS is Goldfarb et al.'s K-BFGS."""
HALVED = 100
_OURS = "fisherviz.papers.shrestha.optimizers"
DECAYING = {
    one.name: one
    for one in (
        Method("SGD", f"{_OURS}:DecayedSGD", {"halved": HALVED}, {"lr": RATES}, {"lr": 0.1}),
        _natural("natural gradient", f"{_OURS}:DecayedNaturalGradient", method="exact", halved=HALVED),
        _natural(
            "TENGraD", f"{_OURS}:DecayedNaturalGradient", method="layer", dense_parameters=0, halved=HALVED
        ),
    )
}  # fmt: skip
"""At rates that decay as 1 / (1 + k / `HALVED`), another reading: section 4.3 found that a decaying α helped."""
WEATHER = "weather-apparent"
COLUMNS = {
    WEATHER: "weather: rows with missing values left out, dates and bearings as points on circles",
    "house": "house prices: the sale's date as days, years of renovation filled, id, zipcode and basement left out",
}
"""Where inputs are not the published columns; ecoli's are. The paper does not say how it prepared them."""


def weather_problem(hidden: Sequence[int], run: Run, batch: int = 128) -> Problem:
    """Regression of the temperature; on the embedded digits where the weather is not at hand, and at scale smoke."""
    name = WEATHER if at_hand(WEATHER, run) else "digits"
    limit = SMOKE_EXAMPLES if run.scale == "smoke" else None
    return Problem(name, "shrestha-mlp", (("hidden", tuple(hidden)),), batch=batch, limit=limit, dtype=DTYPE)


def departures(dataset: str, shortened: str, run: Run) -> tuple[str, ...]:
    """Where a training comparison differs from the paper's setting.

    Args:
        dataset: that was trained on.
        shortened: what stands in place of training to convergence, below scale paper.
        run: its scale.

    Returns:
        One phrase for each.
    """
    found = ["digits instead of the paper's tables"] if dataset == "digits" else []
    found += [COLUMNS[dataset]] if dataset in COLUMNS else []
    return tuple(found if run.scale == "paper" else [*found, shortened])


def logs(one: Trained, dataset: str) -> list[float]:
    """Natural logarithm of each seed's final training loss, mean squared error where the likelihood is Gaussian."""
    return [loss_log(value, dataset) for value in one.last("train_loss")]


def loss_log(value: float, dataset: str) -> float:
    """Natural logarithm of a training loss; ∞ where training broke off."""
    twice = 1.0 if dataset in ("ecoli", "digits") else 2.0  # the nll is half the squared error
    return math.log(twice * value) if 0 < value < math.inf else math.inf


def apart(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether every seed of the first is below every seed of the second."""
    return max(first) < min(second)


def reaches(one: Trained, target: float) -> list[float]:
    """Iterations after which each seed's training loss is first at most a target; ∞ where it never is."""
    return [next((line["step"] for line in run["curve"] if line["train_loss"] <= target), math.inf) for run in one.runs]


def race(found: Mapping[str, Trained], method: str) -> tuple[list[float], list[float]]:
    """Iterations of a method, then of SGD, to the loss at which the last of SGD's seeds that did not diverge ends."""
    target = max((loss for loss in found["SGD"].last("train_loss") if loss < math.inf), default=-math.inf)
    return reaches(found[method], target), reaches(found["SGD"], target)


def lead(mine: Sequence[float], sgd: Sequence[float]) -> float:
    """How many times as many iterations SGD takes, by medians; 0 where the method does not get there."""
    return 0.0 if math.isinf(median(mine)) else median(sgd) / max(median(mine), 1)


def iterations(values: Sequence[float]) -> str:
    """Median and range of iterations in words."""
    shown = ["never" if math.isinf(v) else f"{v:.0f}" for v in (median(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def width(one: Trained, factor: float = 2.0) -> float:
    """Decades of learning rates whose trials end within a factor of the best, at the damping that was chosen."""
    losses = along_rates(one)
    good = [rate for rate, loss in losses.items() if loss <= factor * min(losses.values())]
    return math.log10(max(good) / min(good))


def along_rates(one: Trained) -> dict[float, float]:
    """Final training loss of each learning rate's trial, at the damping that was chosen."""
    beta = one.options.get("damping")
    return {options["lr"]: loss for options, loss in sorted(one.trials, key=lambda t: t[0]["lr"])
            if options.get("damping") == beta}  # fmt: skip
