"""Shrestha 2023, figures 2, 3 and 4: how fast the methods converge on the weather table.

Networks, batch sizes and methods are those that captions and section 4 name; where they name none, the exhibit says
what was taken. A method is faster where each of its seeds reaches SGD's final loss before each of SGD's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import median

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.pictures import draw
from fisherviz.papers.shrestha.setting import (
    DECAYING,
    METHODS,
    along_rates,
    apart,
    departures,
    iterations,
    lead,
    logs,
    race,
    weather_problem,
    width,
)
from fisherviz.papers.trials.curves import STYLES, draw_curves, logarithmic
from fisherviz.papers.trials.problems import Effort, Method, Problem, Trained
from fisherviz.papers.trials.tuning import tuned
from fisherviz.papers.trials.words import protocol, spread, stopped_words
from fisherviz.papers.trials.work import Run
from fisherviz.plotting.style import tidy

GRID = 21  # learning rates times dampings: every setting is tried
EFFORTS = {
    "smoke": Effort(steps=4, look=2, seeds=2, trials=1, trial_steps=2),
    "desk": Effort(steps=600, look=20, seeds=3, trials=GRID, trial_steps=100),
    "paper": Effort(steps=3000, look=20, seeds=5, trials=GRID, trial_steps=500),
}
APPROXIMATE = ("block-wise NGD", "TENGraD", "K-FAC", "EKFAC", "K-BFGS")
NETWORKS = {"deep": (16,) * 6, "wide": (256,), "deep and wide": (64,) * 4}
"""Hidden layers of figure 3, whose caption gives no sizes."""
SMALL = "one of 4"
BATCHES = (8, 32, 128, 512)
"""Batch sizes of figure 4, whose caption gives none."""
PAIR = ("SGD", "TENGraD")
SOONER = "every seed of {} reaches the loss at which SGD's last seed ends in fewer iterations than every seed of SGD"
Found = Mapping[str, Trained]


@exhibit(
    "shrestha.fig2", "figure 2: convergence of all methods, one hidden layer of 4, batch 128",
    shows="the training loss of all methods on the weather data (a), and what a grid of learning rates makes of it (b)",
    desk=0.07, paper=0.35,
)  # fmt: skip
def fig2(run: Run) -> Outcome:
    """Train SGD, exact natural gradient and all its approximations, and walk over learning rates.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    problem, effort = weather_problem((4,), run), EFFORTS[run.scale]
    found = _trained({"": problem}, METHODS.values(), effort, run)[""]
    decaying = _trained({"": problem}, DECAYING.values(), effort, run)[""]
    other = departures(problem.dataset, f"{effort.steps} steps", run)
    claims = (
        _sooner(found, other),
        _ends_lower(found, other),
        _decaying(decaying, other),
        _exact_is_best(found, problem.dataset, other),
        _sensitive(found, other),
    )

    def fill(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        draw_curves(left, found, "train_loss", over="step")
        for name, one in found.items():
            rates = {rate: loss for rate, loss in along_rates(one).items() if loss < math.inf}
            look = STYLES[name]
            right.plot(
                list(rates), list(rates.values()), color=look.color, linestyle=look.line, marker=look.marker,
                markersize=3.5, linewidth=1.4,
            )  # fmt: skip
        right.set_xscale("log")
        for ax, title in ((left, "(a) best settings"), (right, "(b) learning rates")):
            logarithmic(ax)
            ax.set_ylabel("training loss (nll)")
            ax.set_title(title, fontsize=10)
        right.set_xlabel("learning rate")
        tidy(right)
        figure.legend(fontsize=8, loc="outside upper center", ncols=len(found))

    caption = (
        "(a) Training loss of the best setting of each method, medians and ranges of the seeds. (b) Final training "
        f"loss of trials of {effort.trial_steps} steps against the learning rate, at the damping that was chosen; "
        "settings that diverged are left out."
    )
    return Outcome(
        claims, f"{problem.title}, hidden layer of 4, batch 128, {effort.steps} steps, {effort.seeds} seeds",
        _details(problem, effort, found), caption, draw(9.6, 4.0, fill),
        protocol({**found, **{f"{name}, decaying": one for name, one in decaying.items()}}),
    )  # fmt: skip


@exhibit(
    "shrestha.fig3", "figure 3: convergence in deep and wide networks, batch 128",
    shows="the training loss of SGD and TENGraD in deep and in wide networks on the weather data",
    desk=0.03, paper=0.25,
)  # fmt: skip
def fig3(run: Run) -> Outcome:
    """Train SGD and TENGraD in deep, wide, and deep and wide networks, and in one with a hidden layer of 4.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    shapes = {SMALL: (4,), **NETWORKS}
    if run.scale == "smoke":
        shapes = {SMALL: (4,), "deep": (4, 4), "wide": (8,)}
    problems = {name: weather_problem(hidden, run) for name, hidden in shapes.items()}
    effort, problem = EFFORTS[run.scale], problems[SMALL]
    found = _trained(problems, [METHODS[name] for name in PAIR], effort, run)
    other = departures(problem.dataset, f"{effort.steps} steps", run)
    other = (*other, "depths and widths of our choice; the paper gives none")
    large = {name: row for name, row in found.items() if name != SMALL}
    claims = (_holds_too(large, other), _degrades(found, problem.dataset, other))
    sizes = "; ".join(f"{name}: {_layers(hidden)}" for name, hidden in shapes.items())
    return Outcome(
        claims, f"{problem.title}, {len(large)} networks, batch 128, {effort.steps} steps, {effort.seeds} seeds",
        f"hidden layers {sizes}; {_details(problem, effort, _flat(found))}",
        "Training loss of SGD and TENGraD with their best settings, medians and ranges of the seeds.",
        draw(9.6, 3.6, lambda figure: _panels(figure, large)), protocol(_flat(found)),
    )  # fmt: skip


@exhibit(
    "shrestha.fig4", "figure 4: impact of the batch size, hidden layers 32 and 16",
    shows="the training loss of SGD and TENGraD on the weather data for several batch sizes",
    desk=0.04, paper=0.3,
)  # fmt: skip
def fig4(run: Run) -> Outcome:
    """Train SGD and TENGraD with small and large batches.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    sizes = (8, 32) if run.scale == "smoke" else BATCHES
    problems = {f"batch {size}": weather_problem((32, 16), run, size) for size in sizes}
    effort, problem = EFFORTS[run.scale], problems[f"batch {sizes[0]}"]
    found = _trained(problems, [METHODS[name] for name in PAIR], effort, run)
    other = departures(problem.dataset, f"{effort.steps} steps", run)
    other = (*other, "batch sizes of our choice; the paper gives none")
    claims = _batches(found, problem.dataset, other)
    return Outcome(
        claims, f"{problem.title}, hidden layers 32-16, {effort.steps} steps, {effort.seeds} seeds",
        f"batches of {', '.join(map(str, sizes))}, each tuned by itself and trained for the same number of "
        f"iterations; {_details(problem, effort, _flat(found))}",
        "Training loss of SGD and TENGraD with their best settings, medians and ranges of the seeds.",
        draw(9.6, 3.4, lambda figure: _panels(figure, found)), protocol(_flat(found)),
    )  # fmt: skip


def _trained(problems: Mapping[str, Problem], methods: Iterable[Method], effort: Effort, run: Run) -> dict[str, Found]:
    """Each method tuned and trained on each problem, all in one go."""
    keys = [(key, method) for key in problems for method in methods]
    all_of_them = tuned([(problems[key], method, effort) for key, method in keys], run)
    found: dict[str, dict[str, Trained]] = {key: {} for key in problems}
    for (key, method), one in zip(keys, all_of_them, strict=True):
        found[key][method.name] = one
    return dict(found)


def _flat(found: Mapping[str, Found]) -> dict[str, Trained]:
    return {f"{name}, {key}": one for key, row in found.items() for name, one in row.items()}


def _layers(hidden: tuple[int, ...]) -> str:
    return f"{len(hidden)} of {hidden[0]}" if len(hidden) > 1 else str(hidden[0])


def _details(problem: Problem, effort: Effort, found: Found) -> str:
    return (
        f"{problem.title}; ReLU networks with He's initialisation (the paper does not say which), float64; exact, "
        "block-wise and TENGraD's natural gradient with the empirical Fisher of each batch, the others with averaged "
        f"factors; no momentum, which the paper leaves to future work; {effort}. The paper gives no numbers of "
        f"steps, no rates and no β{stopped_words(found)}"
    )


def _sooner(found: Found, other: tuple[str, ...]) -> Claim:
    mine, sgd = race(found, "natural gradient")
    return Claim(
        "the natural gradient method converges faster than SGD (section 4.1)",
        "figure 2a (no number)",
        f"iterations to SGD's final loss: natural gradient {iterations(mine)}, SGD {iterations(sgd)}",
        SOONER.format("the natural gradient"),
        apart(mine, sgd),
        other,
        values={"iterations": median(mine), "sgd": median(sgd)},
    )


def _ends_lower(found: Found, other: tuple[str, ...]) -> Claim:
    mine, sgd = (found[name].last("train_loss") for name in ("natural gradient", "SGD"))
    return Claim(
        "even with the best learning rates, the natural gradient method still performs better than SGD (section 4.1)",
        "figure 2b (no number)",
        f"final training loss: natural gradient {spread(mine)}, SGD {spread(sgd)}",
        "every seed of the natural gradient ends below every seed of SGD",
        apart(mine, sgd),
        other,
        values={"natural gradient": median(mine), "sgd": median(sgd)},
    )


def _decaying(found: Found, other: tuple[str, ...]) -> Claim:
    mine, sgd = race(found, "natural gradient")
    ends = {name: one.last("train_loss") for name, one in found.items()}
    return Claim(
        "... both with learning rates that decay, which stabilised natural gradients (section 4.3)",
        "figure 2, read another way",
        f"iterations to SGD's final loss: natural gradient {iterations(mine)}, SGD {iterations(sgd)}; final training "
        f"loss: {', '.join(f'{name} {spread(values)}' for name, values in ends.items())}",
        "every seed of the natural gradient is there before every seed of SGD, and ends below it",
        apart(mine, sgd) and apart(ends["natural gradient"], ends["SGD"]),
        other,
        values={"iterations": median(mine), "sgd": median(sgd)},
        repeats=True,
    )


def _exact_is_best(found: Found, dataset: str, other: tuple[str, ...]) -> Claim:
    ends = {name: logs(found[name], dataset) for name in ("natural gradient", *APPROXIMATE)}
    exact = median(ends["natural gradient"])
    return Claim(
        "the exact natural gradient performs better than the methods that approximate it (section 4.1)",
        "figure 2a (no number)",
        "ln loss: " + ", ".join(f"{name} {spread(values, '.2f')}" for name, values in ends.items()),
        "its median is below that of each approximation",
        all(exact < median(ends[name]) for name in APPROXIMATE),
        other,
        values={name: median(values) for name, values in ends.items()},
    )


def _sensitive(found: Found, other: tuple[str, ...]) -> Claim:
    widths = {name: width(one) for name, one in found.items()}
    natural = [name for name in ("natural gradient", "block-wise NGD", "TENGraD") if name in widths]
    return Claim(
        "natural gradient methods are very sensitive to the learning rate (section 4.3)",
        "no number",
        "decades of learning rates whose trials end within twice the best loss: "
        + ", ".join(f"{name} {value:.1f}" for name, value in widths.items()),
        f"fewer decades for each of {', '.join(natural)} than for SGD",
        all(widths[name] < widths["SGD"] for name in natural),
        other,
        values=widths,
    )


def _holds_too(found: Mapping[str, Found], other: tuple[str, ...]) -> Claim:
    races = {name: race(row, "TENGraD") for name, row in found.items()}
    shown = (f"{name}: TENGraD {iterations(mine)}, SGD {iterations(sgd)}" for name, (mine, sgd) in races.items())
    return Claim(
        "this convergence property holds for deep models with wide layers too (section 4.1)",
        "figure 3 (no number)",
        f"iterations to SGD's final loss: {'; '.join(shown)}",
        f"in each network, {SOONER.format('TENGraD')}",
        all(apart(*one) for one in races.values()),
        other,
        values={name: lead(*one) for name, one in races.items()},
    )


def _degrades(found: Mapping[str, Found], dataset: str, other: tuple[str, ...]) -> Claim:
    ends = {name: logs(row["TENGraD"], dataset) for name, row in found.items()}
    small = median(ends[SMALL])
    return Claim(
        "the performance degrades as models get complex (section 4.2)",
        "figures 2 and 3 (no number)",
        "ln loss of TENGraD: " + ", ".join(f"{name} {spread(values, '.2f')}" for name, values in ends.items()),
        "its median in each larger network is above that with one hidden layer of 4",
        all(median(values) > small for name, values in ends.items() if name != SMALL),
        other,
        values={name: median(values) for name, values in ends.items()},
    )


def _batches(found: Mapping[str, Found], dataset: str, other: tuple[str, ...]) -> tuple[Claim, ...]:
    keys = list(found)
    small, large = keys[0], keys[-1]
    ends = {m: {key: logs(row[m], dataset) for key, row in found.items()} for m in PAIR}
    middle = {m: [median(values) for values in row.values()] for m, row in ends.items()}
    rises = {m: values[0] - values[-1] for m, values in middle.items()}
    races = {key: race(row, "TENGraD") for key, row in found.items()}
    gains = {key: lead(*one) for key, one in races.items()}
    shown = "; ".join(f"{key}: TENGraD {iterations(mine)}, SGD {iterations(sgd)}" for key, (mine, sgd) in races.items())
    losses = ", ".join(f"{key} {spread(values, '.2f')}" for key, values in ends["TENGraD"].items())
    numbers = {f"TENGraD {key}": value for key, value in zip(keys, middle["TENGraD"], strict=True)}
    numbers |= {f"SGD {key}": value for key, value in zip(keys, middle["SGD"], strict=True)}
    return (
        Claim(
            "natural gradient methods converge very much faster than SGD when the batch size is high (section 4.1)",
            "figure 4 (no number)",
            f"iterations to SGD's final loss: {shown}",
            f"with {large}, TENGraD's median is at most half of SGD's",
            gains[large] >= 2,
            other,
            values=gains,
        ),
        Claim(
            "their convergence significantly worsens when the batch size is reduced (section 4.1)",
            "figure 4 (no number)",
            "iterations of SGD over those of TENGraD: "
            + ", ".join(f"{key} {value:.2g}" for key, value in gains.items()),
            f"TENGraD's lead with {small} is at most half of that with {large}",
            gains[small] <= gains[large] / 2,
            other,
            values=gains,
        ),
        Claim(
            "their loss at convergence is better for larger batches (section 4.2)",
            "figure 4 (no number)",
            f"ln loss of TENGraD: {losses}",
            "its median falls from each batch size to the next",
            all(later < sooner for sooner, later in zip(middle["TENGraD"], middle["TENGraD"][1:], strict=False)),
            other,
            values=numbers,
        ),
        Claim(
            "the natural gradient is impacted more by the batch size than SGD (section 4.1)",
            "figure 4 (no number)",
            f"ln loss with {small} above that with {large}: "
            + ", ".join(f"{name} {value:.2f}" for name, value in rises.items()),
            "TENGraD's median rises more than SGD's",
            rises["TENGraD"] > rises["SGD"],
            other,
            values=rises,
        ),
    )


def _panels(figure: Figure, found: Mapping[str, Found]) -> None:
    axes = np.atleast_1d(figure.subplots(1, len(found), sharey=True))
    for ax, (title, row) in zip(axes, found.items(), strict=True):
        _curves(ax, row, title)
    axes[0].set_ylabel("training loss (nll)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, [label.partition(" (")[0] for label in labels], fontsize=8, loc="outside upper center", ncols=2
    )


def _curves(ax: Axes, row: Found, title: str) -> None:
    draw_curves(ax, row, "train_loss", over="step")
    logarithmic(ax)
    ax.set_title(title, fontsize=10)
    broke_off = [f"{name}: {one.stopped} of {len(one.runs)} diverged" for name, one in row.items() if one.stopped]
    ax.text(0.97, 0.96, "\n".join(broke_off), transform=ax.transAxes, ha="right", va="top", fontsize=7)
