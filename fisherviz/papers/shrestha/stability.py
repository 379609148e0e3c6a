"""Shrestha 2023, section 4.3: what makes natural gradients unstable, and what helps, on the networks of table 1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import Any

import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fisherviz.operators.factorise import eigenvalues
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.pictures import draw
from fisherviz.papers.shrestha.matrices import in_training, tengrad_step
from fisherviz.papers.shrestha.setting import DECAYING, DTYPE, HALVED, METHODS, SMOKE_EXAMPLES, WEATHER, departures
from fisherviz.papers.trials.curves import logarithmic
from fisherviz.papers.trials.problems import Effort, Problem, Trained, at_hand
from fisherviz.papers.trials.tuning import tuned
from fisherviz.papers.trials.words import protocol, spread, stopped_words
from fisherviz.papers.trials.work import Run, kept
from fisherviz.plotting.style import tidy
from fisherviz.probe import Probe

HIDDEN = {"4": (4,), "32-16": (32, 16), "32-16-16": (32, 16, 16)}
BETAS = (1e-4, 1e-2, 1.0, 1e2, 1e4)
"""β of the step that is compared with the gradient."""
STEPS, SMOKE_STEPS = 300, 10
ILL = 1e6
"""Largest eigenvalue to the smallest that is not 0 by rounding, from which a matrix counts as ill-conditioned."""
ZERO = 1e-12
"""Share of the largest eigenvalue below which one counts as 0."""
ROSE = 10.0
"""Times its smallest value to which a training loss rises again where training counts as diverged after it."""
EFFORTS = {
    "smoke": Effort(steps=4, look=2, seeds=2, trials=2, trial_steps=2),
    "desk": Effort(steps=600, look=20, seeds=3, trials=21, trial_steps=100),
    "paper": Effort(steps=3000, look=20, seeds=5, trials=21, trial_steps=500),
}
CONSTANT, DECAYED, REGULARISED = "constant rate", "decaying rate", "regularised"
DECAY = 1e-3
"""Coefficient of the regularisation."""


@exhibit(
    "shrestha.stability", "section 4.3: what makes the natural gradient unstable",
    shows="that the empirical Fisher is ill-conditioned, that a large β makes SGD of it, and what helped",
    desk=0.02, paper=0.2,
)  # fmt: skip
def stability(run: Run) -> Outcome:
    """Measure spectra of empirical Fishers, TENGraD's step against β, and training with and without what helped.

    Args:
        run: scale and seed.

    Returns:
        The picture and its claims.
    """
    names = [name for name in (WEATHER, "ecoli") if at_hand(name, run)]
    names = names if len(names) == 2 else ["digits"]
    steps, effort = SMOKE_STEPS if run.scale == "smoke" else STEPS, EFFORTS[run.scale]
    looks = {
        (name, key): _kept(_problem(name, hidden, run), steps, key, run)
        for name in names
        for key, hidden in HIDDEN.items()
    }
    problems = {name: _problem(name, HIDDEN["32-16"], run) for name in names}
    walked = dict(zip(names, tuned([(p, METHODS["TENGraD"], effort) for p in problems.values()], run), strict=True))
    other = tuple(dict.fromkeys(phrase for name in names for phrase in departures(name, f"{effort.steps} steps", run)))
    longer = _longer(problems[names[-1]], walked[names[-1]], effort, run)
    claims = (
        *_spectra(looks, other),
        _large_beta(looks, other),
        *([_classification(walked, other)] if len(names) == 2 else []),
        *_continued(longer, other),
    )
    details = (
        f"{' and '.join('weather' if name == WEATHER else name for name in names)}, the networks of table 1 after "
        f"{steps} steps of SGD, empirical Fisher of one mini-batch of 128, float64, seed {run.seed}; TENGraD on hidden "
        f"layers 32-16 without momentum, {effort}; continued training on {names[-1]} with the largest learning rate "
        f"whose trial ended within twice the best loss, alone, decaying as 1 / (1 + k / {HALVED}), and with "
        f"an ℓ₂ coefficient of {DECAY:g}{stopped_words(longer)}"
    )
    caption = (
        "(a) Eigenvalues of the empirical Fisher of one mini-batch, networks of table 1. (b) Cosine of TENGraD's step "
        f"with the gradient against β. (c) Training loss of TENGraD on {names[-1]}, one line for each seed."
    )
    setting = f"networks of table 1, batch 128, {effort.steps} steps, {effort.seeds} seeds"
    picture = draw(9.6, 3.5, lambda figure: _fill(figure, looks, longer))
    return Outcome(claims, setting, details, caption, picture, protocol({**walked, **longer}))


def _problem(name: str, hidden: tuple[int, ...], run: Run) -> Problem:
    limit = SMOKE_EXAMPLES if run.scale == "smoke" else None
    return Problem(name, "shrestha-mlp", (("hidden", hidden),), batch=128, limit=limit, dtype=DTYPE)


def _kept(problem: Problem, steps: int, key: str, run: Run) -> Mapping[str, Any]:
    what = {"stability": key, "dataset": problem.dataset, "limit": problem.limit, "steps": steps, "seed": run.seed,
            "betas": BETAS}  # fmt: skip

    def measure() -> dict[str, Any]:
        model, batch, likelihood = in_training(problem, steps, run.seed)
        fisher = Probe(model, likelihood).fisher(batch, kind="empirical")
        gradient = fisher.gradient()
        directions = {beta: tengrad_step(model, batch, likelihood, beta) for beta in BETAS}
        return {
            "eigenvalues": eigenvalues(fisher.to_dense()).flip(0).clamp(min=0).tolist(),
            "cosines": [float(F.cosine_similarity(step, gradient, dim=0)) for step in directions.values()],
            "apart": [float((beta * step - gradient).norm() / gradient.norm()) for beta, step in directions.items()],
        }

    return kept(what, measure, run)


def _longer(problem: Problem, walked: Trained, effort: Effort, run: Run) -> dict[str, Trained]:
    """TENGraD trained on at a large rate: as it is, with a rate that decays, and with regularised weights."""
    options = large_rate(walked)
    alone = replace(METHODS["TENGraD"], name=CONSTANT, grid={}, start={})
    methods = (
        replace(alone, fixed={**alone.fixed, **options}),
        replace(DECAYING["TENGraD"], name=DECAYED, fixed={**DECAYING["TENGraD"].fixed, **options}, grid={}, start={}),
        replace(alone, name=REGULARISED, fixed={**alone.fixed, **options, "weight_decay": DECAY}),
    )
    untuned = replace(effort, trials=0, trial_steps=0)
    return {one.method.name: one for one in tuned([(problem, method, untuned) for method in methods], run)}


def large_rate(walked: Trained) -> dict[str, float]:
    """The setting with the largest learning rate whose trial ended within twice the best loss."""
    best = min(loss for _, loss in walked.trials)
    good = [options for options, loss in walked.trials if loss <= 2 * best]
    return dict(max(good, key=lambda options: (options["lr"], -options["damping"])))


def rank_and_condition(eigenvalues: Sequence[float]) -> tuple[int, float]:
    """How many eigenvalues are not 0 by rounding, and the largest to the smallest of them."""
    there = [value for value in eigenvalues if value > ZERO * max(eigenvalues)]
    return len(there), max(there) / min(there)


def rise(run: Mapping[str, Any]) -> float:
    """Largest training loss of a run to the smallest before it; ∞ where the run broke off."""
    if run["stopped"] is not None:
        return math.inf
    smallest, worst = math.inf, 1.0
    for line in run["curve"]:
        smallest = min(smallest, line["train_loss"])
        worst = max(worst, line["train_loss"] / smallest)
    return worst


def _spectra(looks: Mapping[tuple[str, str], Mapping[str, Any]], other: tuple[str, ...]) -> tuple[Claim, ...]:
    found = {key: (len(one["eigenvalues"]), *rank_and_condition(one["eigenvalues"])) for key, one in looks.items()}
    titles = {(name, key): f"{'weather' if name == WEATHER else name} {key}" for name, key in found}
    return (
        Claim(
            "the empirical Fisher is very likely to be rank deficient",
            "no number",
            "rank: " + ", ".join(f"{titles[key]} {rank} of {size}" for key, (size, rank, _) in found.items()),
            "its rank is below the number of parameters on every network",
            all(rank < size for size, rank, _ in found.values()),
            other,
            values={f"{titles[key]} rank": rank for key, (_, rank, _) in found.items()},
        ),
        Claim(
            "it is very common for it to be ill-conditioned",
            "no number",
            "largest to smallest eigenvalue that is not 0: "
            + ", ".join(f"{titles[key]} {condition:.1e}" for key, (_, _, condition) in found.items()),
            f"at least {ILL:g} on most networks",
            fmean(condition >= ILL for _, _, condition in found.values()) > 0.5,
            other,
            values={f"{titles[key]} condition": condition for key, (_, _, condition) in found.items()},
        ),
    )


def _large_beta(looks: Mapping[tuple[str, str], Mapping[str, Any]], other: tuple[str, ...]) -> Claim:
    cosines = [one["cosines"] for one in looks.values()]
    apart = [one["apart"][-1] for one in looks.values()]
    by_beta = {beta: [values[i] for values in cosines] for i, beta in enumerate(BETAS)}
    shown = ", ".join(f"β = {beta:g}: {spread(values, '.4f')}" for beta, values in by_beta.items())
    return Claim(
        "with a high β it is a scaled version of SGD",
        "no number",
        f"cosine of TENGraD's step with the gradient: {shown}; at the largest, β times the step is within "
        f"{max(apart):.1e} of the gradient",
        "the cosine rises with β on every network, to 0.999 at least",
        all(values == sorted(values) and values[-1] >= 0.999 for values in cosines),
        other,
        values={f"at {beta:g}": median(values) for beta, values in by_beta.items()},
    )


def _classification(walked: Mapping[str, Trained], other: tuple[str, ...]) -> Claim:
    begins = {name: median(run["curve"][0]["train_loss"] for run in one.runs) for name, one in walked.items()}
    worse = {name: fmean(loss > begins[name] for _, loss in one.trials) for name, one in walked.items()}
    return Claim(
        "the instability is more serious with classification and cross-entropy",
        "no number",
        f"share of settings of TENGraD that end above the initial loss or diverge: ecoli {worse['ecoli']:.0%}, weather "
        f"{worse[WEATHER]:.0%}",
        "a larger share for the classification",
        worse["ecoli"] > worse[WEATHER],
        other,
        values={"ecoli": worse["ecoli"], "weather": worse[WEATHER]},
    )


def _continued(longer: Mapping[str, Trained], other: tuple[str, ...]) -> tuple[Claim, ...]:
    rises = {name: [rise(run) for run in one.runs] for name, one in longer.items()}
    shown = ", ".join(f"{name} {spread(values, '.3g')}" for name, values in rises.items())
    words = "largest training loss to the smallest before it"
    return (
        Claim(
            "occasionally the model diverges if training continues after converging",
            "no number",
            f"{words}: {CONSTANT} {spread(rises[CONSTANT], '.3g')}",
            f"at least {ROSE:g} on one seed or more at a constant rate",
            max(rises[CONSTANT]) >= ROSE,
            other,
            values={"median": median(rises[CONSTANT]), "largest": max(rises[CONSTANT])},
        ),
        Claim(
            "a decaying rate and a regularisation of the weights help to stabilise training",
            "no number",
            f"{words}: {shown}",
            "the median is smaller with either than without",
            max(median(rises[DECAYED]), median(rises[REGULARISED])) < median(rises[CONSTANT]),
            other,
            values={name: median(values) for name, values in rises.items()},
        ),
    )


def _fill(figure: Figure, looks: Mapping[tuple[str, str], Mapping[str, Any]], longer: Mapping[str, Trained]) -> None:
    left, middle, right = figure.subplots(1, 3)
    marks = ("o", "s", "^", "o", "s", "^")
    colors = ("#0072B2", "#0072B2", "#0072B2", "#D55E00", "#D55E00", "#D55E00")
    for ((name, key), one), mark, color in zip(looks.items(), marks, colors, strict=False):
        title = f"{'weather' if name == WEATHER else name} {key}"
        top = one["eigenvalues"][0]
        values = [value / top for value in one["eigenvalues"] if value > ZERO * top]
        line = {"color": color, "marker": mark, "markersize": 3, "linewidth": 1.0}
        left.plot(range(1, len(values) + 1), values, markevery=max(1, len(values) // 8), label=title, **line)
        middle.plot(BETAS, one["cosines"], **line)
    left.set_yscale("log")
    middle.set_xscale("log")
    _entitle(left, "(a) spectrum", "eigenvalue's number", "eigenvalue, to the largest")
    _entitle(middle, "(b) large β", "β", "cosine with the gradient")
    looks_of = {CONSTANT: ("#009E73", "-"), DECAYED: ("#E69F00", (0, (5, 1.5))), REGULARISED: ("#CC79A7", (0, (1, 1)))}
    for name, (color, dash) in looks_of.items():
        for place, run in enumerate(longer[name].runs):
            steps, losses = zip(*((line["step"], line["train_loss"]) for line in run["curve"]), strict=True)
            right.plot(steps, losses, color=color, linestyle=dash, linewidth=1.0, label="" if place else name)
    logarithmic(right)
    _entitle(right, "(c) continued training", "iteration", "training loss")
    figure.legend(fontsize=7.5, loc="outside upper center", ncols=5)
    for ax in (left, middle, right):
        tidy(ax)


def _entitle(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=10)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
