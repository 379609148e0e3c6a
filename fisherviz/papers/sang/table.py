"""Sang et al. 2022, figure 5 and table I: CW-NGD against Adam and K-FAC on MNIST, as in the paper and all tuned.

Convolution, max-pooling, two dense layers (sizes chosen here, see `models.cwngd_convnet`), batch 1024. The paper
gives Adam and K-FAC options that were tuned on CIFAR-10; the second comparison tunes all three on the task itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.pictures import draw
from fisherviz.papers.sang.optimizers import DecayedAdam, DecayedKFAC, MeanCostCWNGD
from fisherviz.papers.trials.curves import draw_curves
from fisherviz.papers.trials.problems import Effort, Method, Problem, Trained, at_hand
from fisherviz.papers.trials.tuning import tuned as tuned_trials
from fisherviz.papers.trials.words import settings_words, spread, stopped_words
from fisherviz.papers.trials.work import Run

CONVERGED = 0.9999
"""Training accuracy, rounded to 100.0 %, from which on a run has converged; the paper does not define it."""
# table I: accuracy after epochs 1 and 2, epochs until convergence, final training and validation accuracy
TABLE = {
    "CW-NGD": (0.8797, 0.9803, 13, 1.0, 0.9896),
    "Adam": (0.8585, 0.9589, 49, 1.0, 0.9868),
    "K-FAC": (0.9032, 0.9568, 38, 1.0, 0.9832),
}
CLOSE = {"first": 0.03, "second": 0.01, "validation": 0.003}
"""How near measured accuracies must be; the first epoch depends most on the sizes, which we don't know."""


ADAM, KFAC, MEAN = (f"{__name__}:{cls.__name__}" for cls in (DecayedAdam, DecayedKFAC, MeanCostCWNGD))
"""As `Method` names them; kept runs are found by these names."""
LITERAL, MEAN_COST = "CW-NGD", "CW-NGD, mean cost"


def as_in_the_paper(batch: int) -> tuple[Method, ...]:
    """The paper's options, with algorithm 1 in both readings of its COST."""
    return (
        Method(LITERAL, "cw-ngd", {"lr": 1.0, "damping": 1e-4}),
        Method(MEAN_COST, MEAN, {"batch": batch}),
        Method("Adam", ADAM),
        Method("K-FAC", KFAC),
    )


RATES = tuple(float(f"{a}e{i}") for i in range(-4, 1) for a in (1, 3))


def tuned_methods(batch: int) -> tuple[Method, ...]:
    """All three with grids around usual settings; CW-NGD in the reading whose options do not hang on the batch."""
    return (
        Method(
            MEAN_COST, MEAN, {"batch": batch},
            {"lr": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), "damping": tuple(float(f"1e{i}") for i in range(-7, 2))},
            {"lr": 1.0, "damping": 1e-4},
        ),
        Method("Adam", "adam", {}, {"lr": RATES}, {"lr": 1e-3}),
        Method(
            "K-FAC", "kfac", {"rescale": False, "adapt": False, "momentum": 0.9},
            {"lr": RATES, "damping": tuple(float(f"1e{i}") for i in range(-5, 1))},
            {"lr": 0.01, "damping": 0.01},
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """How much of the paper's setting is run; None: all."""

    epochs: int
    trial_epochs: int
    trials: int
    seeds: int
    limit: int | None = None


SCALES = {"smoke": Scale(2, 1, 1, 2, 130), "desk": Scale(15, 3, 5, 3), "paper": Scale(100, 20, 20, 3)}


@dataclass(frozen=True)
class Setup:
    """What both exhibits run."""

    scale: Scale
    problem: Problem
    effort: Effort

    @property
    def departures(self) -> tuple[str, ...]:
        """From the paper's data."""
        found = ("digits instead of MNIST",) if self.problem.dataset == "digits" else ()
        return (*found, f"the first {self.scale.limit:,} images") if self.scale.limit else found

    @property
    def fewer(self) -> tuple[str, ...]:
        """From the paper's length, where that matters too."""
        epochs = self.scale.epochs
        return self.departures if epochs >= 100 else (*self.departures, f"{epochs} epochs instead of 100")

    def outcome(self, claims: Sequence[Claim], caption: str, more: str, drawing: bytes | None = None) -> Outcome:
        """The exhibit with its setting in words."""
        details = (
            f"{self.problem.title}, {self.problem.examples:,} training images, batch {self.problem.batch}, "
            f"{self.scale.epochs} epochs; convolution 8 of 5 × 5, stride 2, max-pooling 3 × 3, dense 128-64-10 (the "
            f"paper's sizes are in a picture that is not at hand), He's initialisation; the paper's iterations are "
            f"epochs; CW-NGD's summed Fisher in float64; {more}"
        )
        setting = f"{self.problem.title}, {self.scale.epochs} epochs, {self.scale.seeds} seeds"
        return Outcome(tuple(claims), setting, details, caption, drawing)


def _setup(run: Run) -> Setup:
    scale = SCALES[run.scale]
    name = "mnist" if at_hand("mnist", run) else "digits"
    batch = 1024 if run.scale != "smoke" else 64
    problem = Problem(name, "cwngd-convnet", batch=batch, limit=scale.limit, size=28 if name == "digits" else None)
    return Setup(scale, problem, problem.effort(scale.epochs, scale.trial_epochs, scale.trials, scale.seeds))


@exhibit(
    "sang.table1", "table I and figure 5: CW-NGD, Adam and K-FAC with the paper's options",
    shows="training and validation accuracy over 100 epochs; CW-NGD needs 13 epochs where Adam needs 49 and K-FAC 38",
    desk=0.3, paper=3.0,
)  # fmt: skip
def table1(run: Run) -> Outcome:
    """Train with the options that the paper gives.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    setup = _setup(run)
    found = _compare(setup, as_in_the_paper(setup.problem.batch), run)
    claims: list[Claim] = []
    for reading in (LITERAL, MEAN_COST):
        claims += _orders({name: found[name] for name in (reading, "Adam", "K-FAC")}, setup, reading)
    for name, one in found.items():
        claims += _row(name, one, setup)
    more = (
        'CW-NGD with α = 1, γ = 1e-4, its Fisher summed over the batch as algorithm 1 is written; "mean cost": the '
        "same where COST is the batch's mean, so that every derivative carries a 1/P (the text leaves it open); "
        "Adam and K-FAC with the paper's rates tuned on CIFAR-10, which decay with each "
        f"step (K-FAC without the re-scaling of steps, inverses at every step); not tuned; {setup.effort.seeds} seeds, "
        f"medians, ranges in brackets{stopped_words(found)}"
    )
    return setup.outcome(claims, _caption("the options that the paper gives"), more, _picture(found))


@exhibit(
    "sang.tuned", "figure 5 again: all three tuned on the task itself",
    shows="as above, with options that were tuned on CIFAR-10",
    desk=0.2, paper=6.0,
)  # fmt: skip
def tuned(run: Run) -> Outcome:
    """Train again, each method tuned with the same number of trials.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    setup = _setup(run)
    found = _compare(setup, tuned_methods(setup.problem.batch), run)
    more = (
        f"{setup.effort}; chosen: {settings_words(found)}; constant rates, K-FAC's momentum 0.9; "
        "CW-NGD where COST is the batch's mean, which is the other reading with α P and γ P²"
        f"{stopped_words(found)}"
    )
    claims = _orders(found, setup, MEAN_COST)
    return setup.outcome(claims, _caption("options tuned on the task itself"), more, _picture(found))


def _compare(setup: Setup, methods: Sequence[Method], run: Run) -> dict[str, Trained]:
    """CW-NGD in float64: with γ = 1e-4 beside sums over 1024 examples its blocks are out of float32's reach."""
    problems = {LITERAL: replace(setup.problem, dtype="float64")}
    tasks = [(problems.get(m.name, setup.problem), m, setup.effort) for m in methods]
    return {one.method.name: one for one in tuned_trials(tasks, run)}


def _caption(options: str) -> str:
    return f"Training (5a) and validation accuracy (5b) with {options}: median and range of the seeds."


def epochs_to_converge(run: Mapping[str, Any], epoch: int) -> float:
    """Epochs until the training accuracy stays converged; infinite where it does not.

    Args:
        run: one seed's.
        epoch: its steps.
    """
    if run["stopped"] is not None:
        return float("inf")
    lines = run["curve"]
    below = [line["step"] for line in lines if line["train_accuracy"] < CONVERGED]
    return float("inf") if below and below[-1] == lines[-1]["step"] else (below[-1] / epoch + 1 if below else 0.0)


def _orders(found: Mapping[str, Trained], setup: Setup, own: str) -> list[Claim]:
    """How one reading of CW-NGD stands among the others."""
    epochs = {n: [epochs_to_converge(run, setup.effort.look) for run in one.runs] for n, one in found.items()}
    finals = {n: one.last("validation_accuracy") for n, one in found.items()}
    second = {n: one.at("train_accuracy", 2 * setup.effort.look) for n, one in found.items()}
    most = setup.scale.epochs

    def shown(values: Sequence[float]) -> str:
        inside = [v for v in values if v <= most]
        return f"{median(values):g}" if len(inside) > len(values) / 2 else f"not within {most}"

    def highest(of: Mapping[str, Sequence[float]]) -> bool:
        return all(median(of[own]) > median(of[n]) for n in of if n != own)

    percent = partial(spread, digits=".2f", factor=100.0, unit=" %")
    third = median(epochs[own]) * 2 <= min(median(epochs["Adam"]), median(epochs["K-FAC"]))
    settled = median(epochs[own]) < float("inf")
    return [
        Claim(
            f"{own} needs about a third of the iterations that the others need to converge",
            "13, against 49 (Adam) and 38 (K-FAC)",
            ", ".join(f"{n} {shown(v)}" for n, v in epochs.items()) + " epochs",
            f"its median is at most half the others' (converged: training accuracy {CONVERGED:.2%} to the end)",
            third and settled,
            setup.departures if settled and third else setup.fewer,
            values={f"{n}_epochs": median(v) for n, v in epochs.items()},
        ),
        Claim(
            f"{own} has the highest training accuracy from the second iteration on",
            "98.03 % after the second, against 95.89 % (Adam) and 95.68 % (K-FAC)",
            ", ".join(f"{n} {percent(v)}" for n, v in second.items()),
            "its median is the highest after the second epoch",
            highest(second),
            setup.departures,
            values={n: median(v) for n, v in second.items()},
        ),
        Claim(
            f"{own} has the highest final validation accuracy",
            "98.96 %, against 98.68 % (Adam) and 98.32 % (K-FAC)",
            ", ".join(f"{n} {percent(v)}" for n, v in finals.items()),
            "its median is the highest",
            highest(finals),
            setup.fewer,
            values={n: median(v) for n, v in finals.items()},
        ),
    ]


def _row(name: str, one: Trained, setup: Setup) -> list[Claim]:
    first, second, _, _, validation = TABLE[LITERAL if name == MEAN_COST else name]
    epoch = setup.effort.look
    rows = (
        ("training accuracy after the first iteration", first, one.at("train_accuracy", epoch), "first"),
        ("after the second", second, one.at("train_accuracy", 2 * epoch), "second"),
        ("final validation accuracy", validation, one.last("validation_accuracy"), "validation"),
    )
    return [
        Claim(
            f"{name}: {words}",
            f"{100 * paper:.2f} %",
            spread(values, ".2f", 100.0, " %"),
            f"within {100 * CLOSE[kind]:g} percentage points",
            abs(median(values) - paper) <= CLOSE[kind],
            (*(setup.fewer if kind == "validation" else setup.departures), "the paper's layer sizes are not known"),
            values={"accuracy": median(values)},
        )
        for words, paper, values, kind in rows
    ]


def _picture(found: Mapping[str, Trained]) -> bytes:
    def fill(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        panels = {"train_accuracy": "training accuracy (5a)", "validation_accuracy": "validation accuracy (5b)"}
        for ax, (key, title) in zip((left, right), panels.items(), strict=True):
            draw_curves(ax, found, key, factor=100.0, first=1)
            ax.set_title(title, fontsize=10)
        left.set_ylabel("%")
        left.set_ylim(top=100.2)
        right.legend(fontsize=8, loc="lower right")

    return draw(9.2, 3.6, fill)
