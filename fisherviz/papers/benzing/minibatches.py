"""Benzing 2021, figures 9 and 10: Fisher and gradient of independent mini-batches, or of the same.

Beside training, the bias itself is measured (appendix E.5): the mean direction over many mini-batches against
(λI + F)⁻¹ g of all examples, in float64 on a network that is small enough for F.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from fisherviz.network.likelihoods import resolve
from fisherviz.papers.benzing.sweeps import (
    INDEPENDENT,
    SAME,
    Sweep,
    dataset,
    departures,
    draw_sweep,
    rows,
    setting_words,
    sweeps,
)
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.pictures import draw
from fisherviz.papers.trials.curves import STYLES
from fisherviz.papers.trials.problems import TITLES, Problem, build
from fisherviz.papers.trials.words import spread
from fisherviz.papers.trials.work import Run, kept
from fisherviz.probe import Probe
from fisherviz.training.data import permutation

LOOKS = {INDEPENDENT: STYLES["natural gradient"], SAME: STYLES["K-FAC"]}
BIAS_DAMPINGS = (1e-4, 1e-2, 1.0)


@dataclass(frozen=True)
class Scale:
    """Of the bias: examples that stand for the whole data, mini-batches of 100, seeds, width."""

    examples: int
    draws: int
    seeds: int
    width: int
    size: int | None


SCALES = {
    "smoke": Scale(120, 4, 2, 4, None),
    "desk": Scale(1000, 200, 3, 20, 8),
    "paper": Scale(1000, 2000, 5, 20, 8),
}


@exhibit(
    "benzing.fig9", "figure 9: Fisher and gradient of independent or the same mini-batches, Fashion-MNIST",
    shows="natural gradients' training loss against damping, with Fishers of independent or the same mini-batches",
    desk=0.04, paper=36.0,
)  # fmt: skip
def fig9(run: Run) -> Outcome:
    """Compare both choices on Fashion-MNIST.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    return _ablation("fashion-mnist", 9, run)


@exhibit(
    "benzing.fig10", "figure 10: the same as figure 9 on MNIST",
    shows="natural gradients' training loss against damping, with Fishers of independent or the same mini-batches",
    desk=0.04, paper=36.0,
)  # fmt: skip
def fig10(run: Run) -> Outcome:
    """Compare both choices on MNIST.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    return _ablation("mnist", 10, run)


def _ablation(wanted: str, number: int, run: Run) -> Outcome:
    name = dataset(wanted, run)
    swept = sweeps(name, (INDEPENDENT, SAME), run)
    scale = SCALES[run.scale]
    items = [(name, scale, seed) for seed in range(run.seed, run.seed + scale.seeds)]
    seen = run.map(biases, items)
    problem = _small(name, scale)
    small = [] if name == wanted else [f"{TITLES[name]} instead of {TITLES[wanted]}"]
    small += [f"a network of {scale.width} units in each hidden layer", f"{problem.examples:,} examples"]
    claims = (_better(swept, number, departures(wanted, name, run)), *_biased(seen, tuple(small)))

    def fill(figure: Figure) -> None:
        ax = figure.subplots()
        for kind, sweep in swept.items():
            draw_sweep(ax, sweep, LOOKS[kind])
        ax.legend(fontsize=8)

    short, long = setting_words(name, swept, run)
    details = (
        f"{long}; the Fisher is taken anew at every step. Bias: {scale.draws} mini-batches of 100 of the first "
        f"{problem.examples:,} images{f', scaled to {scale.size} × {scale.size}' if scale.size else ''}, three hidden "
        f"layers of {scale.width} after {STEPS} steps of SGD, float64, one label drawn for each image"
    )
    caption = (
        "Final training loss against damping (median and range of the seeds); the learning rate is tuned for each."
    )
    return Outcome(claims, short, details, caption, draw(5.2, 3.6, fill), rows(swept))


def _better(swept: Mapping[str, Sweep], number: int, other: tuple[str, ...]) -> Claim:
    own, same = swept[INDEPENDENT], swept[SAME]
    first, second = own.medians[own.best], same.medians[same.best]
    ahead = sum(a < b for a, b in zip(own.medians, same.medians, strict=True))
    return Claim(
        "we propose using independent mini-batches to estimate Fisher and gradient (which train better)",
        f"appendix E.5, figure {number} (the text does not say what the figure shows)",
        "; ".join(
            f"{one.name} {spread(one.losses[one.best].tolist())} at λ = {one.dampings[one.best]:g}"
            for one in (own, same)
        ),
        "the smallest median loss with independent mini-batches is below the smallest with the same",
        first < second,
        other,
        f"independent ones are ahead at {ahead} of {len(own.medians)} dampings",
        {"independent": first, "same": second},
    )


def _biased(seen: list[dict[str, Any]], other: tuple[str, ...]) -> tuple[Claim, Claim]:
    """Of the whole bias, and of the part that the same mini-batch adds by itself."""
    pairs = {
        damping: [(one["squared"][str(damping)][INDEPENDENT], one["squared"][str(damping)][SAME]) for one in seen]
        for damping in BIAS_DAMPINGS
    }
    shown = "; ".join(
        f"λ = {damping:g}: {spread([a for a, _ in found])} independent, {spread([b for _, b in found])} same"
        for damping, found in pairs.items()
    )
    added = {damping: [one["added"][str(damping)] for one in seen] for damping in BIAS_DAMPINGS}
    statement = "using the same mini-batch to estimate Fisher F and gradient g will introduce additional bias"
    whole = Claim(
        statement,
        "appendix E.5",
        f"squared bias of the mean direction, relative to the direction of all examples: {shown}",
        "larger with the same mini-batch at every damping and seed",
        all(b > a for found in pairs.values() for a, b in found),
        other,
        values={f"same_{damping:g}": median(b for _, b in found) for damping, found in pairs.items()},
    )
    part = Claim(
        f"{statement}, read as that E[XY] is not E[X] E[Y], for the damped inverse X and the gradient Y",
        "appendix E.5",
        "squared difference of both, relative to E[X] E[Y]: "
        + "; ".join(f"λ = {damping:g}: {spread(found)}" for damping, found in added.items()),
        "at least 0.01 at every damping and seed",
        all(value >= 0.01 for found in added.values() for value in found),
        other,
        "a row that was added once the one above had been measured",
        values={f"added_{damping:g}": median(found) for damping, found in added.items()},
        repeats=True,
    )
    return whole, part


STEPS = 100
"""Of SGD before the bias is measured."""


def _small(name: str, scale: Scale) -> Problem:
    return Problem(
        name, "foof-mlp", (("hidden", (scale.width,) * 3),), batch=100, limit=scale.examples, size=scale.size,
        standardise=True, dtype="float64",
    )  # fmt: skip


def biases(item: tuple[str, Scale, int], run: Run) -> dict[str, Any]:
    """The squared bias of both choices at each damping.

    An independent Fisher's mean direction is E[(λI + F̄)⁻¹] g, which no draws of gradients are needed for.

    Args:
        item: data set, scale and seed.
        run: device, and where measurements are kept.
    """
    name, scale, seed = item
    problem = _small(name, scale)
    what = {"bias": ["whole", "added"], "problem": asdict(problem), "draws": scale.draws, "steps": STEPS, "seed": seed,
            "dampings": BIAS_DAMPINGS, "device": run.device}  # fmt: skip

    def measure() -> dict[str, Any]:
        data = problem.data().to(run.device)
        x, y = data.train
        model, likelihood = build(problem, data, seed).to(run.device, torch.float64), resolve(data.likelihood)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        batch = min(problem.batch, len(x) // 2)
        for step in range(STEPS):
            chosen = permutation(len(x), seed, step)[:batch]
            optimizer.zero_grad()
            likelihood.nll(model(x[chosen]), y[chosen]).mean().backward()
            optimizer.step()
        probe, generator = Probe(model, likelihood), torch.Generator(device=run.device).manual_seed(seed)
        whole = probe.fisher((x, y), kind="exact")
        gradient = whole.gradient()
        goals = {damping: whole.solve(gradient, damping) for damping in BIAS_DAMPINGS}
        sums = torch.zeros(len(BIAS_DAMPINGS), 2, 2, len(gradient), dtype=torch.float64)
        for draw_ in range(scale.draws):
            chosen = permutation(len(x), seed, draw_, STEPS)[:batch]
            few = probe.fisher((x[chosen], y[chosen]), kind="mc", generator=generator)
            right = torch.stack([gradient, few.gradient()], 1)
            for i, damping in enumerate(BIAS_DAMPINGS):
                sums[i, draw_ % 2] += few.solve(right, damping).mT.cpu()
        found: dict[str, Any] = {"squared": {}, "added": {}}
        for i, (damping, goal) in enumerate(goals.items()):
            halves = sums[i] / (scale.draws / 2)  # (half, choice, P)
            squared = squared_bias(halves, goal.cpu())
            apart = halves[:, 1] - halves[:, 0]
            found["added"][str(damping)] = float(apart[0] @ apart[1] / (halves[0, 0] @ halves[1, 0]))
            found["squared"][str(damping)] = dict(zip((INDEPENDENT, SAME), squared.tolist(), strict=True))
        return found

    return kept(what, measure, run)


def squared_bias(halves: Tensor, goal: Tensor) -> Tensor:
    """|E d - goal|² / |goal|² without its noise, which two halves of the draws don't share; it may be below 0.

    Args:
        halves: (2, choices, P) mean directions of each half.
        goal: (P,) the direction of all examples.

    Returns:
        One for each choice.
    """
    off = halves - goal
    return (off[0] * off[1]).sum(1) / goal.square().sum()
