"""Shrestha 2023, table 1: the training loss that SGD and TENGraD reach on weather, house prices and ecoli.

Small networks with hidden layers 4; 32, 16; 32, 16, 16, batch 128, rates tuned. The loss is the mean squared error
of the standardised target, or the cross-entropy; logarithms are natural (the paper does not say which).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.pictures import draw
from fisherviz.papers.shrestha.setting import DECAYING, DTYPE, METHODS, SMOKE_EXAMPLES, WEATHER, apart, departures, logs
from fisherviz.papers.trials.curves import STYLES
from fisherviz.papers.trials.problems import Effort, Method, Problem, Trained, at_hand
from fisherviz.papers.trials.tuning import tuned
from fisherviz.papers.trials.words import protocol, spread, stopped_words
from fisherviz.papers.trials.work import Run
from fisherviz.plotting.style import tidy

HIDDEN = {"4": (4,), "32-16": (32, 16), "32-16-16": (32, 16, 16)}
DATA = {WEATHER: "weather", "house": "house price", "ecoli": "ecoli"}
# rows of table 1: (SGD, TENGraD)
PAPER = {
    ("4", WEATHER): (-0.45, -2.96), ("4", "house"): (-0.192, -1.120), ("4", "ecoli"): (-1.96, -0.16),
    ("32-16", WEATHER): (-1.0, -3.68), ("32-16", "house"): (-0.794, -0.876), ("32-16", "ecoli"): (-1.37, 0.59),
    ("32-16-16", WEATHER): (0.24, -1.65), ("32-16-16", "house"): (-0.16, -1.06), ("32-16-16", "ecoli"): (0.39, 0.25),
}  # fmt: skip
CLOSE = 0.3
EFFORTS = {
    "smoke": Effort(steps=4, look=2, seeds=2, trials=1, trial_steps=2),
    "desk": Effort(steps=800, look=400, seeds=3, trials=6, trial_steps=100),
    "paper": Effort(steps=30_000, look=1000, seeds=5, trials=21, trial_steps=3000),
}
PAIR = ("SGD", "TENGraD")
BELOW = "every seed of {} ends below every seed of {}"
READ_TWICE = "32-16"
"""Hidden layers with which momentum is tried as well, on the first data set."""
WITH_MOMENTUM = {name: replace(METHODS[name], fixed={**METHODS[name].fixed, "momentum": 0.9}) for name in PAIR}
READINGS = (
    ("without the apparent temperature", "weather", METHODS),
    ("at learning rates that decay", WEATHER, DECAYING),
)
"""Others of the weather's column: title, data set, methods. Section 4.3 found that a decaying α helped."""
Cells = dict[tuple[str, str], dict[str, Trained]]


@exhibit(
    "shrestha.table1", "table 1: log of the training loss at convergence, batch 128",
    shows="the logarithm of the training loss that SGD and TENGraD reach on three data sets, with three networks",
    desk=0.09, paper=4.0,
)  # fmt: skip
def table1(run: Run) -> Outcome:
    """Train SGD and TENGraD in each cell of the table, and in other readings of what the paper leaves open.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    effort = EFFORTS[run.scale]
    names = [name for name in DATA if at_hand(name, run)]
    columns = {name: DATA[name] for name in names} if names else {"digits": "digits"}
    hidden = dict(list(HIDDEN.items())[:2]) if run.scale == "smoke" else HIDDEN
    cells = _trained([(key, name) for key in hidden for name in columns], METHODS, effort, run)
    others = {name: departures(name, f"{effort.steps} steps instead of convergence", run) for name in columns}
    moving = _trained([(READ_TWICE, next(iter(columns)))], WITH_MOMENTUM, effort, run)
    claims = [
        _order(key, name, columns[name], found, others[name], moving.get((key, name)))
        for (key, name), found in cells.items()
    ]
    claims += [_numbers(name, cells, others[name]) for name in names]
    if WEATHER in columns:
        for title, name, methods in READINGS:
            read = _trained([(key, name) for key in hidden], methods, effort, run)
            claims.append(_reading(title, read, others[WEATHER]))
    if len(columns) == len(DATA):
        every = tuple(dict.fromkeys(phrase for other in others.values() for phrase in other))
        claims.append(_better_with_squares(cells, every))
    missing = [title for name, title in DATA.items() if name not in columns]
    named = {f"{m}, {columns[n]}, {k}": one for (k, n), row in cells.items() for m, one in row.items()}
    details = (
        f"{', '.join(columns.values())}; ReLU networks with hidden layers {'; '.join(hidden)} and He's initialisation "
        f"(the paper does not say which), float64, batch 128; TENGraD with a new Fisher every step, neither method "
        f"with momentum, which the paper leaves to future work; {effort}. The paper gives neither its numbers of "
        f"steps nor its grids; it names no column that it leaves out, so that the weather keeps its apparent "
        f"temperature, nearly a copy of the target{'; not at hand: ' if missing else ''}{', '.join(missing)}"
        f"{stopped_words(named)}"
    )
    caption = (
        "Natural logarithm of the training loss at the end (median, bars from the smallest to the largest seed), and "
        "hollow the paper's numbers."
    )
    setting = f"batch 128, {effort.steps} steps, {effort.seeds} seeds, {effort.trials} trials each"
    picture = draw(9.6, 3.6, lambda figure: _fill(figure, cells, columns))
    return Outcome(tuple(claims), setting, details, caption, picture, protocol(named))


def _trained(keys: Sequence[tuple[str, str]], methods: Mapping[str, Method], effort: Effort, run: Run) -> Cells:
    """SGD and TENGraD, tuned and trained in several cells in one go."""
    limit = SMOKE_EXAMPLES if run.scale == "smoke" else None
    tasks = [
        (
            Problem(name, "shrestha-mlp", (("hidden", HIDDEN[key]),), batch=128, limit=limit, dtype=DTYPE),
            methods[m],
            effort,
        )
        for key, name in keys
        for m in PAIR
    ]
    found = iter(tuned(tasks, run))
    return {key: {m: next(found) for m in PAIR} for key in keys}


def _order(
    key: str, name: str, title: str, found: Mapping[str, Trained], departures: tuple[str, ...],
    moving: Mapping[str, Trained] | None = None,
) -> Claim:  # fmt: skip
    """Whether the method that is ahead in the paper is ahead."""
    paper = PAPER[key, "ecoli" if name == "digits" else name]
    sgd, tengrad = (logs(found[m], name) for m in PAIR)
    ahead, behind = PAIR[::-1] if paper[1] < paper[0] else PAIR
    first, second = (tengrad, sgd) if ahead == "TENGraD" else (sgd, tengrad)
    clear = apart(first, second) or apart(second, first)
    return Claim(
        f"{title}, hidden layers {key}: {ahead} reaches the lower training loss",
        f"SGD {paper[0]:g}, TENGraD {paper[1]:g}",
        f"{_both(found, name)}; the seeds' ranges {'are apart' if clear else 'overlap'}",
        BELOW.format(ahead, behind),
        apart(first, second),
        departures,
        f"with momentum 0.9 for both: {_both(moving, name)}" if moving else "",
        values={"sgd": median(sgd), "tengrad": median(tengrad)},
        earlier_rule=f"{ahead}'s median is the lower one",
        earlier_holds=median(first) < median(second),
    )


def _both(found: Mapping[str, Trained], name: str) -> str:
    return ", ".join(f"{m} {spread(logs(found[m], name), '.2f')}" for m in PAIR)


def _reading(title: str, cells: Cells, departures: tuple[str, ...]) -> Claim:
    """The weather's cells in another reading of what the paper leaves open."""
    ends = {key: tuple(logs(found[m], name) for m in PAIR) for (key, name), found in cells.items()}
    return Claim(
        f"weather {title}: TENGraD reaches the lower training loss with each network",
        "the column, read another way",
        "; ".join(f"{key}: {_both(found, name)}" for (key, name), found in cells.items()),
        f"{BELOW.format('TENGraD', 'SGD')}, with each network",
        all(apart(tengrad, sgd) for sgd, tengrad in ends.values()),
        departures,
        values={f"{m} {key}": median(one) for key, both in ends.items() for m, one in zip(PAIR, both, strict=True)},
        repeats=True,
        earlier_rule="TENGraD's median is the lower one, with each network",
        earlier_holds=all(median(tengrad) < median(sgd) for sgd, tengrad in ends.values()),
    )


def _numbers(name: str, cells: Cells, departures: tuple[str, ...]) -> Claim:
    """Whether the numbers themselves come out."""
    off = {
        f"{method} {key}": abs(median(logs(found[method], column)) - number)
        for (key, column), found in cells.items()
        if column == name
        for method, number in zip(PAIR, PAPER[key, name], strict=True)
    }
    close = sum(value <= CLOSE for value in off.values())
    shown = ", ".join(f"{k} {v:.2f}" if math.isfinite(v) else f"{k} diverged" for k, v in off.items())
    return Claim(
        f"{DATA[name]}: the logarithms of the losses",
        "the six numbers of the column",
        f"{close} of {len(off)} within {CLOSE}; distances: {shown}",
        f"all within {CLOSE}",
        close == len(off),
        departures,
        values=off,
        repeats=True,
    )


def _better_with_squares(cells: Cells, departures: tuple[str, ...]) -> Claim:
    """Section 4.2: TENGraD is better with least squares than with cross-entropy."""
    rules: dict[str, Callable[[Sequence[float], Sequence[float]], bool]] = {
        "clearly": apart, "by medians": lambda first, second: median(first) < median(second)
    }  # fmt: skip
    ahead = {
        word: {key: rule(logs(found["TENGraD"], key[1]), logs(found["SGD"], key[1])) for key, found in cells.items()}
        for word, rule in rules.items()
    }
    squares = {word: [value for (_, name), value in row.items() if name != "ecoli"] for word, row in ahead.items()}
    entropy = {word: [value for (_, name), value in row.items() if name == "ecoli"] for word, row in ahead.items()}
    larger = {word: fmean(squares[word]) > fmean(entropy[word]) for word in rules}
    return Claim(
        "TENGraD works better with least squares than with cross-entropy (section 4.2)",
        "ahead of SGD in 6 of 6 regressions and 1 of 3 classifications",
        "; ".join(
            f"{word} ahead in {sum(squares[word])} of {len(squares[word])} regressions and {sum(entropy[word])} of "
            f"{len(entropy[word])} classifications"
            for word in rules
        ),
        "TENGraD, all seeds, is ahead of SGD in a larger share of the regressions",
        larger["clearly"],
        departures,
        values={"regressions": sum(squares["clearly"]), "classifications": sum(entropy["clearly"])},
        earlier_rule="TENGraD, by medians, is ahead of SGD in a larger share of the regressions",
        earlier_holds=larger["by medians"],
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
        for m, method in enumerate(PAIR):
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
