"""Shrestha 2023, table 1: the training loss that SGD and TENGraD reach on weather, house prices and ecoli.

Small networks with hidden layers 4; 32, 16; 32, 16, 16, batch 128, rates tuned. The loss is the mean squared error
of the standardised target, or the cross-entropy; logarithms are natural (the paper does not say which).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.pictures import draw
from fisherviz.papers.trials.curves import STYLES
from fisherviz.papers.trials.problems import Effort, Method, Problem, Trained, at_hand
from fisherviz.papers.trials.tuning import compare
from fisherviz.papers.trials.words import spread, stopped_words
from fisherviz.papers.trials.work import Run
from fisherviz.plotting.style import tidy

HIDDEN = {"4": (4,), "32-16": (32, 16), "32-16-16": (32, 16, 16)}
DATA = {"weather": "weather", "house": "house price", "ecoli": "ecoli"}
# rows of table 1: (SGD, TENGraD)
PAPER = {
    ("4", "weather"): (-0.45, -2.96), ("4", "house"): (-0.192, -1.120), ("4", "ecoli"): (-1.96, -0.16),
    ("32-16", "weather"): (-1.0, -3.68), ("32-16", "house"): (-0.794, -0.876), ("32-16", "ecoli"): (-1.37, 0.59),
    ("32-16-16", "weather"): (0.24, -1.65), ("32-16-16", "house"): (-0.16, -1.06), ("32-16-16", "ecoli"): (0.39, 0.25),
}  # fmt: skip
CLOSE = 0.3
METHODS = (
    Method(
        "SGD", "sgd",
        grid={"lr": (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0), "momentum": (0.0, 0.9)},
        start={"lr": 0.1, "momentum": 0.0},
    ),
    Method(
        "TENGraD", "tengrad",
        grid={"lr": (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0), "damping": (1e-3, 1e-2, 0.1, 1.0)},
        start={"lr": 0.01, "damping": 0.1},
    ),
)  # fmt: skip
EFFORTS = {
    "smoke": Effort(steps=4, look=2, seeds=2, trials=1, trial_steps=2),
    "desk": Effort(steps=1000, look=250, seeds=3, trials=6, trial_steps=300),
    "paper": Effort(steps=30_000, look=1000, seeds=5, trials=28, trial_steps=10_000),
}
Cells = dict[tuple[str, str], dict[str, Trained]]


@exhibit(
    "shrestha.table1", "table 1: log of the training loss at convergence, batch 128",
    shows="the logarithm of the training loss that SGD and TENGraD reach on three data sets, with three networks",
    desk=0.2, paper=10.0,
)  # fmt: skip
def table1(run: Run) -> Outcome:
    """Train SGD and TENGraD in each cell of the table.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    effort = EFFORTS[run.scale]
    names = [name for name in DATA if at_hand(name, run)]
    stand_in = not names
    columns = {"digits": "digits"} if stand_in else {name: DATA[name] for name in names}
    hidden = dict(list(HIDDEN.items())[:2]) if run.scale == "smoke" else HIDDEN
    cells: Cells = {}
    for key, widths in hidden.items():
        for name in columns:
            limit = 300 if run.scale == "smoke" else None
            problem = Problem(name, "shrestha-mlp", (("hidden", widths),), batch=128, limit=limit)
            cells[key, name] = compare(problem, METHODS, effort, run)
    other = ("digits instead of the paper's tables",) if stand_in else ()
    claims = [_order(key, name, columns[name], found, other) for (key, name), found in cells.items()]
    claims += [] if stand_in else [_numbers(name, cells, effort) for name in columns]
    if len(columns) == len(DATA):
        claims.append(_better_with_squares(cells))
    missing = [title for name, title in DATA.items() if name not in columns]
    details = (
        f"{', '.join(columns.values())}; ReLU networks with hidden layers {'; '.join(hidden)} and He's initialisation "
        f"(the paper does not say which), batch 128; TENGraD with momentum 0.9 and a new Fisher every step; "
        f"{effort}. The paper gives neither its numbers of steps nor its grids. The weather's apparent "
        f"temperature, nearly a copy of the target, is left out{'; not at hand: ' if missing else ''}"
        f"{', '.join(missing)}"
        f"{stopped_words({f'{m} on {n} {k}': one for (k, n), row in cells.items() for m, one in row.items()})}"
    )
    caption = (
        "Natural logarithm of the training loss at the end (median, bars from the smallest to the largest seed), and "
        "hollow the paper's numbers."
    )
    setting = f"batch 128, {effort.steps} steps, {effort.seeds} seeds, {effort.trials} trials each"
    return Outcome(tuple(claims), setting, details, caption, draw(9.6, 3.6, lambda f: _fill(f, cells, columns)))


def logs(one: Trained, name: str) -> list[float]:
    """Log of each seed's final training loss: mean squared error where the likelihood is Gaussian."""
    twice = 1.0 if name in ("ecoli", "digits") else 2.0  # the nll is half the squared error
    return [math.log(twice * value) if 0 < value < math.inf else math.inf for value in one.last("train_loss")]


def _order(key: str, name: str, title: str, found: Mapping[str, Trained], departures: tuple[str, ...]) -> Claim:
    """Whether the method that is ahead in the paper is ahead."""
    paper = PAPER[key, "ecoli" if name == "digits" else name]
    sgd, tengrad = (logs(found[m], name) for m in ("SGD", "TENGraD"))
    ahead = "TENGraD" if paper[1] < paper[0] else "SGD"
    first, second = (tengrad, sgd) if ahead == "TENGraD" else (sgd, tengrad)
    apart = _clear(first, second) or _clear(second, first)
    return Claim(
        f"{title}, hidden layers {key}: {ahead} reaches the lower training loss",
        f"SGD {paper[0]:g}, TENGraD {paper[1]:g}",
        f"SGD {spread(sgd, '.2f')}, TENGraD {spread(tengrad, '.2f')}; the seeds' ranges "
        f"{'are apart' if apart else 'overlap'}",
        f"every seed of {ahead} ends below every seed of the other",
        _clear(first, second),
        departures,
        values={"sgd": median(sgd), "tengrad": median(tengrad)},
    )


def _clear(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether all of the first are below all of the second."""
    return max(first) < min(second)


def _numbers(name: str, cells: Cells, effort: Effort) -> Claim:
    """Whether the numbers themselves come out."""
    off = {
        f"{method} {key}": abs(median(logs(found[method], column)) - number)
        for (key, column), found in cells.items()
        if column == name
        for method, number in zip(("SGD", "TENGraD"), PAPER[key, name], strict=True)
    }
    close = sum(value <= CLOSE for value in off.values())
    departures = ("without the apparent temperature",) if name == "weather" else ()
    shown = ", ".join(f"{k} {v:.2f}" if math.isfinite(v) else f"{k} diverged" for k, v in off.items())
    return Claim(
        f"{DATA[name]}: the logarithms of the losses",
        "the six numbers of the column",
        f"{close} of {len(off)} within {CLOSE}; distances: {shown}",
        f"all within {CLOSE}",
        close == len(off),
        (*departures, f"{effort.steps} steps; the paper's are not known"),
        values=off,
    )


def _better_with_squares(cells: Cells) -> Claim:
    """Section 4.2: TENGraD is better with least squares than with cross-entropy."""
    ahead = {
        (key, name): _clear(logs(found["TENGraD"], name), logs(found["SGD"], name))
        for (key, name), found in cells.items()
    }
    squares = [value for (_, name), value in ahead.items() if name != "ecoli"]
    entropy = [value for (_, name), value in ahead.items() if name == "ecoli"]
    return Claim(
        "TENGraD works better with least squares than with cross-entropy",
        "ahead of SGD in 6 of 6 regressions and 1 of 3 classifications",
        f"clearly ahead in {sum(squares)} of {len(squares)} regressions and {sum(entropy)} of {len(entropy)} "
        "classifications",
        "TENGraD, all seeds, is ahead of SGD in a larger share of the regressions",
        sum(squares) / len(squares) > sum(entropy) / len(entropy),
        values={"regressions": sum(squares), "classifications": sum(entropy)},
    )


def _fill(figure: Figure, cells: Cells, columns: Mapping[str, str]) -> None:
    axes = np.atleast_1d(figure.subplots(1, len(columns)))
    for ax, (name, title) in zip(axes, columns.items(), strict=True):
        _panel(ax, name, {key: found for (key, column), found in cells.items() if column == name})
        ax.set_title(title, fontsize=10)
    axes[0].set_ylabel("ln training loss")
    figure.legend(handles=_handles(), fontsize=8, loc="outside upper center", ncols=4)


def _panel(ax: Axes, name: str, rows: Mapping[str, Mapping[str, Trained]]) -> None:
    for x, (key, found) in enumerate(rows.items()):
        for m, method in enumerate(("SGD", "TENGraD")):
            look, place = STYLES[method], x + 0.24 * m - 0.12
            values = [v for v in logs(found[method], name) if math.isfinite(v)]
            if values:
                ax.vlines(place, min(values), max(values), color=look.color, linewidth=2)
                ax.plot(place, median(values), look.marker, color=look.color, markersize=6)
            if (key, name) in PAPER:
                ax.plot(place, PAPER[key, name][m], look.marker, mfc="none", color=look.color, markersize=8)
    ax.set_xticks(range(len(rows)), list(rows))
    ax.set_xlim(-0.5, len(rows) - 0.5)
    ax.set_xlabel("hidden layers")
    tidy(ax)
    ax.grid(False, axis="x")


def _handles() -> list[Line2D]:
    return [
        Line2D([], [], linestyle="", marker=look.marker, color=look.color, mfc=fill, label=title)
        for method, look in (("SGD", STYLES["SGD"]), ("TENGraD", STYLES["TENGraD"]))
        for title, fill in ((method, look.color), (f"{method}, paper", "none"))
    ]
