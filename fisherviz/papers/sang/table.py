"""Sang et al. 2022, table I and figure 5: CW-NGD against Adam and K-FAC on MNIST, as in the paper and all tuned.

Convolution, max-pooling, two dense layers (sizes chosen here, see `models.cwngd_convnet`), batch 1024. The paper
gives Adam and K-FAC options that were tuned on CIFAR-10; the second comparison tunes all three on the task itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from matplotlib.figure import Figure

from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.pictures import draw
from fisherviz.papers.sang import rules
from fisherviz.papers.sang.optimizers import DecayedAdam, DecayedKFAC, MeanCostCWNGD
from fisherviz.papers.sang.rules import LITERAL, MEAN_COST, VALIDATION, each_reading
from fisherviz.papers.trials.curves import draw_curves
from fisherviz.papers.trials.problems import Effort, Method, Problem, Trained, at_hand
from fisherviz.papers.trials.tuning import tuned as tuned_trials
from fisherviz.papers.trials.words import protocol, settings_words, stopped_words
from fisherviz.papers.trials.work import Run

ADAM, KFAC, MEAN = (f"{__name__}:{cls.__name__}" for cls in (DecayedAdam, DecayedKFAC, MeanCostCWNGD))
"""As `Method` names them; kept runs are found by these names."""
LOWEST = 80.0
"""Accuracy in % that pictures begin at."""
SIZES = "the paper's layer sizes are not known"
"""They are in a picture that is not at hand; everything that was trained depends on them."""


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


SCALES = {"smoke": Scale(2, 1, 1, 2, 130), "desk": Scale(7, 2, 6, 3), "paper": Scale(100, 20, 20, 3)}


@dataclass(frozen=True)
class Setup:
    """What the exhibits run."""

    scale: Scale
    problem: Problem
    effort: Effort

    @property
    def departures(self) -> tuple[str, ...]:
        """From the paper's setting; every row depends on each of them."""
        found = ["digits instead of MNIST"] if self.problem.dataset == "digits" else []
        found += [f"the first {self.scale.limit:,} images"] if self.scale.limit else []
        found += [f"{self.scale.epochs} epochs instead of 100"] if self.scale.epochs < 100 else []
        return (*found, SIZES)

    def outcome(
        self, claims: Sequence[Claim], caption: str, more: str, found: dict[str, Trained], drawing: bytes | None = None
    ) -> Outcome:
        """The exhibit with its setting in words."""
        details = (
            f"{self.problem.title}, {self.problem.examples:,} training images, batch {self.problem.batch}, "
            f"{self.scale.epochs} epochs; convolution 8 of 5 × 5, stride 2, max-pooling 3 × 3, dense 128-64-10 (the "
            f"paper's sizes are in a picture that is not at hand), He's initialisation; the paper's iterations are "
            f"epochs; CW-NGD's summed Fisher in float64; {more}; {self.effort.seeds} seeds, medians, ranges in "
            f"brackets{stopped_words(found)}"
        )
        setting = f"{self.problem.title}, {self.scale.epochs} epochs, {self.scale.seeds} seeds"
        return Outcome(tuple(claims), setting, details, caption, drawing, protocol(found))


def _setup(run: Run) -> Setup:
    scale = SCALES[run.scale]
    name = "mnist" if at_hand("mnist", run) else "digits"
    batch = 1024 if run.scale != "smoke" else 64
    problem = Problem(name, "cwngd-convnet", batch=batch, limit=scale.limit, size=28 if name == "digits" else None)
    return Setup(scale, problem, problem.effort(scale.epochs, scale.trial_epochs, scale.trials, scale.seeds))


GIVEN = (
    'CW-NGD with α = 1, γ = 1e-4, its Fisher summed over the batch as algorithm 1 is written; "mean cost": the '
    "same where COST is the batch's mean, so that every derivative carries a 1/P (the text leaves it open); Adam and "
    "K-FAC with the paper's rates tuned on CIFAR-10, which decay with each step (K-FAC is the one of this library, "
    "without the re-scaling of steps, inverses at every step); not tuned. The paper does not say whether its training "
    "accuracy is that after the epoch or the mean over the epoch's batches that Keras reports: both are here"
)


@exhibit(
    "sang.table1", "table I: CW-NGD, Adam and K-FAC with the paper's options",
    shows="accuracies after one and two epochs and at the end, and 13 epochs to converge for CW-NGD where Adam needs "
    "49 and K-FAC 38",
    desk=0.16, paper=2.3,
)  # fmt: skip
def table1(run: Run) -> Outcome:
    """Train with the options that the paper gives.

    Args:
        run: scale, seed and device.

    Returns:
        Its claims; figure 5 has the picture.
    """
    setup = _setup(run)
    found, departures = _compare(setup, as_in_the_paper(setup.problem.batch), run), setup.departures
    claims = each_reading(rules.a_third_of, found, departures)
    claims += [replace(row, repeats=True) for row in each_reading(rules.a_third_fewer, found, departures)]
    claims += each_reading(rules.starts_between, found, departures)
    claims += each_reading(rules.ahead_from_the_second, found, departures)
    claims += each_reading(rules.highest_validation, found, departures, (VALIDATION,))
    for name, one in found.items():
        claims += rules.table_rows(name, one, departures)
    caption = "The numbers of table I and what the text says of them; the curves are figure 5's."
    return setup.outcome(claims, caption, GIVEN, found)


@exhibit(
    "sang.fig5", "figure 5: training and validation accuracy with the paper's options",
    shows="CW-NGD's training accuracy rises smoothly above the others', which fluctuate, and its validation accuracy "
    "fluctuates least",
    desk=0.0, paper=0.0,
)  # fmt: skip
def fig5(run: Run) -> Outcome:
    """Draw the runs of table I.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    setup = _setup(run)
    found, departures = _compare(setup, as_in_the_paper(setup.problem.batch), run), setup.departures
    claims = each_reading(rules.rises_smoothly, found, departures)
    fluctuate = [rules.others_fluctuate(found, key, departures) for key in rules.ACCURACIES]
    claims += [replace(row, repeats=bool(place)) for place, row in enumerate(fluctuate)]
    claims += each_reading(rules.ahead_before_the_first_fluctuation, found, departures)
    claims += each_reading(rules.steadier_validation, found, departures, (VALIDATION,))
    more = f"{GIVEN}; the runs are those of table I"
    return setup.outcome(claims, _caption("the options that the paper gives"), more, found, _picture(found))


@exhibit(
    "sang.tuned", "figure 5 again: all three tuned on the task itself",
    shows="as above, with options that were tuned on CIFAR-10, which, it says, only affect the early iterations",
    desk=0.13, paper=3.7,
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
    given = _compare(setup, as_in_the_paper(setup.problem.batch)[-2:], run)
    departures = (*setup.departures, "tuned on the task, as the paper's methods are not")
    claims = [_early(given, found, departures)]
    for row, accuracies in (
        (rules.a_third_of, tuple(rules.ACCURACIES)),
        (rules.ahead_from_the_second, tuple(rules.ACCURACIES)),
        (rules.highest_validation, (VALIDATION,)),
    ):
        again = each_reading(row, found, departures, accuracies)
        claims += [replace(claim, statement=f"{claim.statement}, tuned", repeats=True) for claim in again]
    more = (
        f"{setup.effort}; chosen: {settings_words(found)}; constant rates, K-FAC's momentum 0.9; "
        "CW-NGD where COST is the batch's mean, which is the other reading with α P and γ P²"
    )
    caption = _caption("options tuned on the task itself")
    return setup.outcome(claims, caption, more, found, _picture(found))


def _early(given: dict[str, Trained], found: dict[str, Trained], departures: tuple[str, ...]) -> Claim:
    """Whether Adam and K-FAC come to the same end with both options."""
    ends = {
        (name, key): (median(one.last(key)), median(found[name].last(key)))
        for name, one in given.items()
        for key in ("train_accuracy", VALIDATION)
    }
    words = {"train_accuracy": "training", VALIDATION: "validation"}
    close = rules.CLOSE["validation"]
    return Claim(
        "the hyperparameters only affect the early iterations of the training (section IV)",
        "no number",
        "medians at the end with the paper's options and tuned: "
        + ", ".join(
            f"{name} {words[key]} {as_given:.2%} and {after:.2%}" for (name, key), (as_given, after) in ends.items()
        ),
        f"training and validation accuracy of Adam and of K-FAC each end within {100 * close:g} percentage points of "
        "each other",
        all(abs(as_given - after) <= close for as_given, after in ends.values()),
        departures,
        values={f"{name}_{key}": after - as_given for (name, key), (as_given, after) in ends.items()},
    )


def _compare(setup: Setup, methods: Sequence[Method], run: Run) -> dict[str, Trained]:
    """CW-NGD in float64: with γ = 1e-4 beside sums over 1024 examples its blocks are out of float32's reach."""
    problems = {LITERAL: replace(setup.problem, dtype="float64")}
    tasks = [(problems.get(m.name, setup.problem), m, setup.effort) for m in methods]
    return {one.method.name: one for one in tuned_trials(tasks, run)}


def _caption(options: str) -> str:
    return (
        f"Training (5a), after each epoch and as the epoch's mean that Keras reports, and validation accuracy (5b) "
        f"with {options}: median and range of the seeds; drawn from {LOWEST:g} % on where a method gets far above."
    )


def _picture(found: dict[str, Trained]) -> bytes:
    """Training accuracy in both readings, and validation accuracy."""
    panels = {
        "train_accuracy": "training, after the epoch (5a)",
        "running_accuracy": "training, mean of the epoch (5a)",
        VALIDATION: "validation (5b)",
    }

    def fill(figure: Figure) -> None:
        axes = figure.subplots(1, 3)
        for ax, (key, title) in zip(axes, panels.items(), strict=True):
            draw_curves(ax, found, key, factor=100.0, first=1)
            low, high = ax.get_ylim()
            if high > 95:  # the first epochs would press the rest together
                ax.set_ylim(max(low, LOWEST), 100.3)
            ax.set_title(title, fontsize=10)
        axes[0].set_ylabel("accuracy in %")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)

    return draw(9.6, 3.7, fill)
