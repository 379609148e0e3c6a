"""Benzing 2021, figures 4A and 8A: K-FAC's similarity to FOOF against damping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from fisherviz.approximations import approximate
from fisherviz.comparison.monitor import SIMILARITIES, similarity
from fisherviz.datasets import Dataset
from fisherviz.network.likelihoods import resolve
from fisherviz.operators.damping import FactoredTikhonov
from fisherviz.papers.benzing.balanced import BALANCED
from fisherviz.papers.benzing.setting import DAMPINGS, SCALES
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.pictures import draw
from fisherviz.papers.trials.curves import STYLES, draw_band
from fisherviz.papers.trials.problems import TITLES, Problem, at_hand, build
from fisherviz.papers.trials.steps import advance
from fisherviz.papers.trials.words import spread
from fisherviz.papers.trials.work import Run, kept
from fisherviz.plotting.style import tidy
from fisherviz.probe import Probe
from fisherviz.results.comparison import WHOLE
from fisherviz.training.data import Batches
from fisherviz.training.evaluation import evaluate
from fisherviz.training.optimizers import make_optimizer

WORDS = {"foof_cosine_factored": "factors damped", "foof_cosine_eigenvalues": "product damped"}
BALANCE = "traces"
"""Of the factors' dampings: the paper's equation 3, λ_A / λ_E = tr(AAᵀ) / tr(EEᵀ)."""
OTHER_BALANCE = "trace-norm"
"""The K-FAC paper's, which divides the traces by the factors' sizes."""
BALANCES = (BALANCE, OTHER_BALANCE)
TRAINERS: dict[str, tuple[str, dict[str, Any]]] = {
    "K-FAC": (BALANCED, {"lr": 3e-3, "damping": 0.01, "T": 10}),
    "SGD": ("sgd", {"lr": 0.01, "momentum": 0.9}),
}
"""What trains the networks that are looked at; K-FAC's options are the author's, for means over the batch."""
STEPS = {"smoke": 2, "desk": 100, "paper": 300}
"""Of training before the look."""
EXAMPLES = {"smoke": 60, "desk": 500, "paper": 1000}
"""That the factors are taken over."""
Curves = dict[str, np.ndarray]


@dataclass(frozen=True)
class Looks:
    """Cosines against damping on a data set.

    Args:
        name: of the data set.
        width: of the hidden layers.
        steps: of training before the look.
        examples: that the factors are taken over.
        cosines: trainer and balance to the metrics' cosines (seeds, dampings).
        losses: of the training set then, by trainer.
        limit: first training examples that were kept; None: all.
    """

    name: str
    width: int
    steps: int
    examples: int
    cosines: Mapping[tuple[str, str], Curves]
    losses: Mapping[str, list[float]]
    limit: int | None

    @property
    def paper(self) -> Curves:
        """Along K-FAC's own training, with the paper's balance."""
        return self.cosines["K-FAC", BALANCE]

    @property
    def seeds(self) -> int:
        """How many networks."""
        return len(self.losses["K-FAC"])

    def departures(self, wanted: str) -> tuple[str, ...]:
        """From the paper's data and network."""
        found = [] if self.name == wanted else [f"{TITLES[self.name]} instead of {TITLES[wanted]}"]
        found += [f"hidden layers of {self.width} instead of 1000"] if self.width != 1000 else []
        found += [f"{self.limit} training images"] if self.limit is not None else []
        return tuple(found)

    @property
    def details(self) -> str:
        """The setting in a sentence without its full stop."""
        losses = " and ".join(f"{spread(values)} by {name}" for name, values in self.losses.items())
        return (
            f"{TITLES[self.name]} standardised, ReLU network with three hidden layers of {self.width}, no biases, "
            f"after {self.steps} steps of K-FAC (equation 3's damping with λ = 0.01, rate 0.003, inverses every "
            f"10 steps) or of SGD (learning rate 0.01, momentum 0.9), batch 100; training loss {losses}; factors over "
            f"{self.examples} training images with one label drawn for each, gradient over the same; FOOF has "
            f"K-FAC's own damping of A, π√λ with π² = tr A / tr G (equation 3); one cosine over the parameters of all "
            f"layers together; {self.seeds} seeds (SGD: one). Dampings are for means over the batch"
        )

    @property
    def caption(self) -> str:
        """What the picture shows."""
        return (
            "Cosine between the directions of K-FAC and FOOF over all layers together, along K-FAC's own training "
            "(median and range of the seeds). Thin: with the K-FAC paper's π (medians)."
        )

    @property
    def sensitivity(self) -> str:
        """What other choices give."""
        return "; ".join(
            f"{words}: {_rising(self.cosines[key])}"
            for key, words in (
                (("K-FAC", OTHER_BALANCE), "with the K-FAC paper's π, which divides the traces by the factors' sizes"),
                (("SGD", BALANCE), "along SGD's training"),
            )
        )


@exhibit(
    "benzing.fig4a", "figure 4A: K-FAC's similarity to FOOF against damping, both kinds of damping",
    shows="the cosine between the updates of K-FAC and FOOF, which rises with the damping, most if factors are damped",
    desk=0.04, paper=0.1,
)  # fmt: skip
def fig4a(run: Run) -> Outcome:
    """Measure the cosine between K-FAC's and FOOF's directions for each damping on networks in training.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    seen = looks("mnist" if at_hand("mnist", run) else "digits", run)
    claims = similarity_claims(seen, "4A", seen.departures("mnist"))

    def fill(figure: Figure) -> None:
        draw_similarity(figure.subplots(), seen)

    setting = f"{TITLES[seen.name]}, width {seen.width}, {seen.steps} steps of K-FAC, {seen.seeds} seeds"
    return Outcome(claims, setting, seen.details, seen.caption, draw(5.2, 3.6, fill))


def looks(name: str, run: Run) -> Looks:
    """The cosines on a data set, for every seed, trainer and balance.

    Args:
        name: of the data set.
        run: scale, seed and device.
    """
    scale = SCALES[run.scale]
    width = scale.width if run.scale == "smoke" else 1000  # few steps: the paper's network is affordable
    limit = scale.limit if run.scale == "smoke" else None
    problem = Problem(name, "foof-mlp", (("hidden", (width,) * 3),), batch=100, limit=limit, standardise=True)
    steps, examples = STEPS[run.scale], EXAMPLES[run.scale]
    seeds = {"K-FAC": range(run.seed, run.seed + scale.seeds), "SGD": range(run.seed, run.seed + 1)}
    items = [(problem, trainer, steps, seed, examples) for trainer, own in seeds.items() for seed in own]
    found = run.map(_cosines, items)
    cosines: dict[tuple[str, str], Curves] = {}
    losses: dict[str, list[float]] = {}
    for trainer in TRAINERS:
        mine = [one for (_, by, *_), one in zip(items, found, strict=True) if by == trainer]
        losses[trainer] = [one["loss"] for one in mine]
        for balance in BALANCES:
            cosines[trainer, balance] = {
                metric: np.array([[row[metric] for row in one[balance]] for one in mine]) for metric in WORDS
            }
    return Looks(name, width, steps, examples, cosines, losses, limit)


def draw_similarity(ax: Axes, seen: Looks) -> None:
    """Both kinds of damping, with the paper's balance and thin with the other."""
    for (metric, values), look in zip(seen.paper.items(), (STYLES["K-FAC"], STYLES["natural gradient"]), strict=True):
        draw_band(ax, DAMPINGS, values, look, WORDS[metric], markersize=4)
        others = np.median(seen.cosines["K-FAC", OTHER_BALANCE][metric], axis=0)
        ax.plot(DAMPINGS, others, color=look.color, linestyle="--", linewidth=1)
    ax.set_xscale("log")
    ax.set_ylim(0, 1.03)
    ax.set_xlabel("damping λ")
    ax.set_ylabel("K-FAC's cosine with FOOF")
    ax.legend(fontsize=8)
    tidy(ax)


def _cosines(item: tuple[Problem, str, int, int, int], run: Run) -> dict[str, Any]:
    """Train, then both cosines for every damping, in float64 for the smallest of them."""
    problem, trainer, steps, seed, examples = item
    name, options = TRAINERS[trainer]
    what = {"cosines": True, "problem": asdict(problem), "optimizer": name, "options": options, "steps": steps,
            "seed": seed, "examples": examples, "dampings": DAMPINGS, "device": run.device}  # fmt: skip

    def measure() -> dict[str, Any]:
        data = problem.data().to(run.device)
        likelihood = resolve(data.likelihood)
        model = _in_training(problem, data, trainer, steps, seed)
        loss = evaluate(model, likelihood, (data.train.inputs, data.train.targets), 10_000)["loss"]
        few = (data.train.inputs[:examples].double(), data.train.targets[:examples])
        generator = torch.Generator(device=run.device).manual_seed(seed)
        fisher = Probe(model.double(), likelihood).fisher(few, kind="mc", generator=generator)
        kfac = approximate(fisher, "kfac")
        found: dict[str, Any] = {"loss": loss}
        for balance in BALANCES:
            rules = [FactoredTikhonov(damping**0.5, balance) for damping in DAMPINGS]
            found[balance] = [_whole(similarity(fisher, kfac, rule)) for rule in rules]
        return found

    return kept(what, measure, run)


def _in_training(problem: Problem, data: Dataset, trainer: str, steps: int, seed: int) -> nn.Module:
    """A network after some steps of a trainer."""
    model, likelihood = build(problem, data, seed).to(data.train.inputs.device), resolve(data.likelihood)
    batches = Batches(*data.train, problem.batch, None, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        optimizer: Any = make_optimizer(*TRAINERS[trainer], model, likelihood, batches, "paper")
        advance(model, likelihood, optimizer, batches, steps)
    return model


def _whole(rows: Sequence[tuple[str, str, str, float]]) -> dict[str, float]:
    """The cosines over all layers together."""
    found = {metric: value for _, layer, metric, value in rows if layer == WHOLE}
    return {metric: found[metric] for metric in SIMILARITIES}


def _medians(curves: Curves) -> dict[str, np.ndarray]:
    return {metric: np.median(values, axis=0) for metric, values in curves.items()}


def _rising(curves: Curves) -> str:
    """How the medians go from the smallest damping to the largest."""
    medians = _medians(curves)
    shown = "; ".join(f"{WORDS[metric]}: {values[0]:.2f} to {values[-1]:.2f}" for metric, values in medians.items())
    smallest = min(float(np.diff(values).min()) for values in medians.values())
    return f"from λ = {DAMPINGS[0]:g} to {DAMPINGS[-1]:g}: {shown}; smallest step between neighbours {smallest:+.3f}"


def similarity_claims(seen: Looks, figure: str, other: tuple[str, ...]) -> tuple[Claim, Claim]:
    """The paper's two statements about damping and similarity.

    Args:
        seen: the cosines.
        figure: "4A" or "8A".
        other: departures.
    """
    medians = _medians(seen.paper)
    smallest = min(float(np.diff(values).min()) for values in medians.values())
    gap = np.median(seen.paper["foof_cosine_factored"] - seen.paper["foof_cosine_eigenvalues"], axis=0)
    return (
        Claim(
            "damping increases the similarity of KFAC to FOOF (whole-network cosine)",
            f"section 3, figure {figure} (no number in the text)",
            _rising(seen.paper),
            "both medians are larger at the largest damping, and never fall by more than 0.02 between neighbours",
            all(values[-1] > values[0] for values in medians.values()) and smallest >= -0.02,
            other,
            seen.sensitivity,
            {"smallest_step": smallest},
        ),
        Claim(
            "damping factors increases similarity to FOOF more than damping the product",
            "section 3 (no number in the text)",
            f"cosine with damped factors minus that with the product damped: {gap.min():+.3f} to {gap.max():+.3f}",
            "the median difference is nowhere below -0.01 and at least 0.05 somewhere",
            bool(gap.min() >= -0.01 and gap.max() >= 0.05),
            other,
            values={"smallest": float(gap.min()), "largest": float(gap.max())},
        ),
    )
