"""Benzing 2021, figure 4A: K-FAC's similarity to FOOF against damping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from fisherviz.approximations import approximate
from fisherviz.comparison.monitor import SIMILARITIES, similarity
from fisherviz.network.likelihoods import resolve
from fisherviz.operators.damping import FactoredTikhonov
from fisherviz.papers.benzing.setting import DAMPINGS, SCALES
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.pictures import draw
from fisherviz.papers.trials.curves import STYLES, draw_band
from fisherviz.papers.trials.problems import TITLES, Problem, at_hand, build
from fisherviz.papers.trials.words import spread
from fisherviz.papers.trials.work import Run, kept
from fisherviz.plotting.style import tidy
from fisherviz.probe import Probe
from fisherviz.results.comparison import WHOLE
from fisherviz.training.data import Batches, Position
from fisherviz.training.evaluation import evaluate

SIMILAR = {"foof_cosine_factored": 0.7, "foof_cosine_eigenvalues": 0.1}
"""K-FAC's cosine with FOOF, read off the same."""
TUNED_DAMPING = 0.01
"""The damping of K-FAC at which they were (the author's 1, for sums over a batch of 100)."""
WORDS = {"foof_cosine_factored": "factors damped", "foof_cosine_eigenvalues": "product damped"}
BALANCE = "traces"
"""Of the factors' dampings: the paper's equation 3, λ_A / λ_E = tr(AAᵀ) / tr(EEᵀ)."""
OTHER_BALANCE = "trace-norm"
"""The K-FAC paper's, which divides the traces by the factors' sizes."""


@exhibit(
    "benzing.fig4a", "figure 4A: K-FAC's similarity to FOOF against damping, both kinds of damping",
    shows="the cosine between the updates of K-FAC and FOOF, which rises with the damping, most if factors are damped",
    desk=0.05, paper=0.5,
)  # fmt: skip
def fig4a(run: Run) -> Outcome:
    """Measure the cosine between K-FAC's and FOOF's directions for each damping on a network in training.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    scale = SCALES[run.scale]
    name = "mnist" if at_hand("mnist", run) else "digits"
    width = scale.width if run.scale == "smoke" else 1000  # few steps: the paper's network is affordable
    limit = scale.limit if run.scale == "smoke" else None
    problem = Problem(name, "foof-mlp", (("hidden", (width,) * 3),), batch=100, limit=limit, standardise=True)
    looks = [
        [_cosines(problem, steps, seed, scale.examples, run) for seed in range(run.seed, run.seed + scale.seeds)]
        for steps in scale.warm
    ]
    other = tuple(["digits instead of MNIST"] if name == "digits" else [])
    other += tuple([f"hidden layers of {width} instead of 1000"] if width != 1000 else [])
    curves, others = (
        {metric: np.array([[row[metric] for row in one[balance]] for one in looks[-1]]) for metric in WORDS}
        for balance in (BALANCE, OTHER_BALANCE)
    )
    steps = scale.warm[-1]
    early = (*other, f"after {steps} steps of SGD, not along K-FAC's training")
    claims = [_rises(curves, other), _factored(curves, other)]
    claims += [_cosine_number(metric, curves[metric], early) for metric in WORDS]
    losses = [one["loss"] for one in looks[-1]]
    details = (
        f"{TITLES[name]} standardised, ReLU network with three hidden layers of {width}, no biases, after {steps} "
        f"steps of SGD (learning rate 0.01, momentum 0.9, batch 100; training loss {spread(losses)}); factors over "
        f"{scale.examples} training images with one label drawn for each, gradient over the same images; FOOF has "
        f"K-FAC's own damping of A, π√λ with π² = tr A / tr G (equation 3); cosine over all layers together; "
        f"{scale.seeds} seeds. Dampings are for means over the batch. With the K-FAC paper's π, which divides the "
        f"traces by the factors' sizes: {_rising(others)}"
    )
    caption = (
        "Cosine between the directions of K-FAC and FOOF over all layers together (median and range of the seeds). "
        "Thin: with the K-FAC paper's π (medians)."
    )

    def fill(figure: Figure) -> None:
        ax = figure.subplots()
        for (metric, values), look in zip(curves.items(), (STYLES["K-FAC"], STYLES["natural gradient"]), strict=True):
            draw_band(ax, DAMPINGS, values, look, WORDS[metric], markersize=4)
            ax.plot(DAMPINGS, np.median(others[metric], axis=0), color=look.color, linestyle="--", linewidth=1)
        ax.set_xscale("log")
        ax.set_ylim(0, 1.03)
        ax.set_xlabel("damping λ")
        ax.set_ylabel("K-FAC's cosine with FOOF")
        ax.legend(fontsize=8)
        tidy(ax)

    setting = f"{TITLES[name]}, width {width}, {steps} steps of SGD, {scale.seeds} seeds"
    return Outcome(tuple(claims), setting, details, caption, draw(5.2, 3.6, fill))


def _cosines(problem: Problem, steps: int, seed: int, examples: int, run: Run) -> dict[str, Any]:
    """Train by SGD, then both cosines for every damping, in float64 for the smallest of them."""
    what = {"cosines": True, "dataset": problem.dataset, "model": problem.model_options, "limit": problem.limit,
            "steps": steps, "seed": seed, "examples": examples, "dampings": DAMPINGS, "device": run.device}  # fmt: skip

    def measure() -> dict[str, Any]:
        data = problem.data().to(run.device)
        model, likelihood = build(problem, data, seed).to(run.device), resolve(data.likelihood)
        batches, position = Batches(*data.train, problem.batch, None, seed), Position()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for step in range(1, steps + 1):
            x, y, position = batches.take(position, step)
            optimizer.zero_grad()
            likelihood.nll(model(x), y).mean().backward()
            optimizer.step()
        loss = evaluate(model, likelihood, (data.train.inputs, data.train.targets), 10_000)["loss"]
        few = (data.train.inputs[:examples].double(), data.train.targets[:examples])
        generator = torch.Generator(device=run.device).manual_seed(seed)
        fisher = Probe(model.double(), likelihood).fisher(few, kind="mc", generator=generator)
        kfac = approximate(fisher, "kfac")
        found: dict[str, Any] = {"loss": loss}
        for balance in (BALANCE, OTHER_BALANCE):
            rules = [FactoredTikhonov(damping**0.5, balance) for damping in DAMPINGS]
            found[balance] = [_whole(similarity(fisher, kfac, rule)) for rule in rules]
        return found

    return kept(what, measure, run)


def _whole(rows: Sequence[tuple[str, str, str, float]]) -> dict[str, float]:
    """The cosines over all layers together."""
    found = {metric: value for _, layer, metric, value in rows if layer == WHOLE}
    return {metric: found[metric] for metric in SIMILARITIES}


def _rising(curves: Mapping[str, np.ndarray]) -> str:
    """How the medians go from the smallest damping to the largest."""
    medians = {metric: np.median(values, axis=0) for metric, values in curves.items()}
    shown = "; ".join(f"{WORDS[metric]}: {values[0]:.2f} to {values[-1]:.2f}" for metric, values in medians.items())
    smallest = min(float(np.diff(values).min()) for values in medians.values())
    return f"from λ = {DAMPINGS[0]:g} to {DAMPINGS[-1]:g}: {shown}; smallest step between neighbours {smallest:+.3f}"


def _rises(curves: Mapping[str, np.ndarray], other: tuple[str, ...]) -> Claim:
    ranges = {metric: np.median(values, axis=0) for metric, values in curves.items()}
    smallest = min(float(np.diff(values).min()) for values in ranges.values())
    return Claim(
        "damping increases the similarity of K-FAC to FOOF",
        "figure 4A (no number in the text)",
        _rising(curves),
        "both medians are larger at the largest damping, and never fall by more than 0.02 between neighbours",
        all(values[-1] > values[0] for values in ranges.values()) and smallest >= -0.02,
        other,
        values={"smallest_step": smallest},
    )


def _factored(curves: Mapping[str, np.ndarray], other: tuple[str, ...]) -> Claim:
    gap = np.median(curves["foof_cosine_factored"] - curves["foof_cosine_eigenvalues"], axis=0)
    return Claim(
        "damping the factors increases the similarity to FOOF more than damping the product",
        "section 4 (no number in the text)",
        f"cosine with factored damping minus cosine with damping of the product: {gap.min():+.3f} to {gap.max():+.3f}",
        "the median difference is nowhere below -0.01 and at least 0.05 somewhere",
        bool(gap.min() >= -0.01 and gap.max() >= 0.05),
        other,
        values={"smallest": float(gap.min()), "largest": float(gap.max())},
    )


def _cosine_number(metric: str, values: np.ndarray, other: tuple[str, ...]) -> Claim:
    at = values[:, DAMPINGS.index(TUNED_DAMPING)].tolist()
    return Claim(
        f"the cosine with FOOF at K-FAC's tuned damping, {WORDS[metric]}",
        f"about {SIMILAR[metric]:g} (read off a plot of the paper's later version)",
        f"{spread(at, '.2f')} at λ = {TUNED_DAMPING:g}",
        "within 0.1",
        abs(median(at) - SIMILAR[metric]) <= 0.1,
        other,
        values={"cosine": median(at)},
    )
