"""Benzing 2021, the setting that its exhibits share: problems, methods with their grids, scales.

784-1000-1000-1000-10, ReLU, no biases, batch 100, data standardised; on 1,000 images, full batches. Learning rates and
dampings of K-FAC and FOOF are for means over the batch: the author's, which are for sums over it, divided by its size.
"""

from __future__ import annotations

from dataclasses import dataclass

from fisherviz.papers.benzing.balanced import BALANCED
from fisherviz.papers.trials.problems import Effort, Method, Problem

RATES = tuple(float(f"{a}e{i}") for i in range(-7, 3) for a in (1, 3))
DAMPINGS = tuple(float(f"1e{i}") for i in range(-8, 5, 2))
"""Appendix B.1's, 1e-6 to 1e6, for means over a batch of 100."""
SUBSET_DAMPINGS = tuple(float(f"1e{i}") for i in range(-9, 4, 2))
"""The same for means over 1,000 images."""
SGD, ADAM, NATURAL, KFAC, FOOF = "SGD", "Adam", "natural gradient", "K-FAC", "FOOF"
RARELY, SAME, LAYERWISE = f"{NATURAL}, amortised", f"{NATURAL}, same batch", f"{NATURAL}, layer-wise"
ONE_BATCH = f"{KFAC}, one batch"
FOOF_RARELY, FOOF_TUNED = f"{FOOF}, amortised", f"{FOOF}, amortised, tuned so"
SETTING = tuple[Problem, dict[str, Method], Effort]


def larger(examples: int) -> str:
    """What the natural gradient is called whose Fisher is of so many examples."""
    return f"{NATURAL}, {examples} examples"


@dataclass(frozen=True)
class Scale:
    """How much of the paper's setting is run; None: all.

    Args:
        width: of the hidden layers.
        limit: training images of the mini-batch setting.
        epochs: of a run there.
        trial_epochs: of a trial there.
        trials: settings tried for each method.
        warm: steps of training before figure 4A's looks.
        examples: that figure 4A's factors are taken over.
        amortised: steps between inverses of the amortised versions.
        larger: examples of the larger Fishers of figure 2B.
        subset: images of the full-batch setting.
        subset_steps: of a run there.
        subset_trial_steps: of a trial there.
        one_layer: images with the network of one layer.
        one_layer_trials: settings tried for each method there.
        seeds: runs that count.
    """

    width: int
    limit: int | None
    epochs: int
    trial_epochs: int
    trials: int
    warm: tuple[int, ...]
    examples: int
    amortised: int
    larger: tuple[int, ...]
    subset: int
    subset_steps: int
    subset_trial_steps: int
    one_layer: int
    one_layer_trials: int
    seeds: int = 3


SCALES = {
    "smoke": Scale(12, 200, 2, 1, 1, (2,), 60, 2, (300,), 100, 4, 2, 100, 1, seeds=2),
    "desk": Scale(256, 3000, 10, 4, 5, (300,), 500, 10, (300,), 500, 100, 50, 1000, 8),
    "paper": Scale(1000, None, 10, 10, 140, (300, 6000), 1000, 100, (300, 1000), 1000, 100, 100, 1000, 140),
}
"""140 trials are all of a grid."""


def mini_batches(name: str, scale: Scale) -> SETTING:
    """What is trained in mini-batches of 100 on a data set, by which methods, for how long.

    Args:
        name: of the data set.
        scale: how much.

    Returns:
        The problem, the methods by name, the effort.
    """
    options = (("hidden", (scale.width,) * 3),)
    problem = Problem(
        name, "foof-mlp", options, batch=100, limit=scale.limit, standardise=True, evaluated=scale.limit
    )  # fmt: skip
    both = {"lr": RATES, "damping": DAMPINGS}
    natural, kfac = {"lr": 1e-5, "damping": 1e-4}, {"lr": 3e-3, "damping": 0.01}
    foof = {"lr": 0.3, "damping": 1.0}
    methods = (
        _sgd(0.01),
        Method(ADAM, "adam", {}, {"lr": RATES}, {"lr": 1e-4}),
        Method(NATURAL, "subsampled", {}, both, natural),
        Method(RARELY, "subsampled", {"T": scale.amortised}, both, natural),
        Method(SAME, "subsampled", {"fisher_data": "same"}, both, natural),
        Method(LAYERWISE, "subsampled", {"structure": "layer"}, both, {"lr": 10.0, "damping": 100.0}),
        *(Method(larger(count), "subsampled", {"fisher_data": count}, both, natural) for count in scale.larger),
        Method(KFAC, BALANCED, {}, both, kfac),
        Method(ONE_BATCH, BALANCED, {"decay": 0.0}, both, kfac),
        Method(FOOF, "foof", {}, both, foof),
        Method(FOOF_TUNED, "foof", {"T": scale.amortised}, both, foof),
    )
    effort = problem.effort(scale.epochs, scale.trial_epochs, scale.trials, scale.seeds)
    return problem, {method.name: method for method in methods}, effort


def full_batches(name: str, scale: Scale, hidden: bool = True) -> SETTING:
    """What is trained in full batches on a subset; K-FAC's factors are of the step's own images alone.

    Args:
        name: of the data set.
        scale: how much.
        hidden: whether there are the three hidden layers, or none.

    Returns:
        The problem, the methods by name, the effort.
    """
    widths, images = ((scale.width,) * 3, scale.subset) if hidden else ((), scale.one_layer)
    problem = Problem(
        name, "foof-mlp", (("hidden", widths),), batch=0, limit=images, standardise=True, evaluated=images
    )  # fmt: skip
    both = {"lr": RATES, "damping": DAMPINGS}
    natural = {"lr": 0.1, "damping": 1.0} if hidden else {"lr": 0.01, "damping": 0.01}
    kfac = {"lr": 1e-4, "damping": 1e-7} if hidden else {"lr": 0.1, "damping": 1e-3}
    methods = (
        _sgd(0.03),
        Method(NATURAL, "subsampled", {}, both, natural),
        Method(LAYERWISE, "subsampled", {"structure": "layer"}, both, natural),
        Method(KFAC, BALANCED, {"decay": 0.0}, {"lr": RATES, "damping": SUBSET_DAMPINGS}, kfac),
    )
    trials = scale.trials if hidden else scale.one_layer_trials
    steps = scale.subset_trial_steps if hidden else scale.subset_steps
    effort = Effort(scale.subset_steps, max(1, scale.subset_steps // 20), scale.seeds, trials, steps)
    return problem, {method.name: method for method in methods}, effort


def _sgd(lr: float) -> Method:
    return Method(SGD, "sgd", {}, {"lr": RATES, "momentum": (0.0, 0.9)}, {"lr": lr, "momentum": 0.9})


def departures(problem: Problem) -> tuple[str, ...]:
    """Where a problem differs from the paper's.

    Args:
        problem: of `mini_batches` or `full_batches`.
    """
    (_, hidden), *_ = problem.model_options
    wanted = 1000 if problem.batch == 0 else 60_000
    found = ["digits instead of Fashion-MNIST and MNIST"] if problem.dataset == "digits" else []
    found += [f"hidden layers of {width} instead of 1000" for width in dict.fromkeys(hidden) if width != 1000]
    found += [f"{problem.limit:,} training images instead of {wanted:,}"] if problem.limit not in (None, wanted) else []
    return tuple(found)
