"""Benzing 2021, what its training comparisons have in common: panels of curves, words, and the order of losses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from fisherviz.papers.benzing.setting import ONE_BATCH, SETTING, departures
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.pictures import draw
from fisherviz.papers.trials.curves import draw_curves, logarithmic
from fisherviz.papers.trials.problems import Problem, Trained, at_hand
from fisherviz.papers.trials.tuning import compare
from fisherviz.papers.trials.words import protocol, spread, stopped_words
from fisherviz.papers.trials.work import Run

Found = Mapping[str, Trained]


@dataclass(frozen=True)
class Comparison:
    """Methods that were tuned and trained on one problem.

    Args:
        problem: what was trained.
        found: the methods by name.
    """

    problem: Problem
    found: Found

    @property
    def departures(self) -> tuple[str, ...]:
        """Where the problem differs from the paper's."""
        return departures(self.problem)

    @property
    def title(self) -> str:
        """What it is called above its picture."""
        (_, hidden), *_ = self.problem.model_options
        batches = f"batches of {self.problem.batch}" if self.problem.batch else f"{self.problem.limit:,} images at once"
        return f"{self.problem.title}, {'' if hidden else 'one layer, '}{batches}"

    @property
    def words(self) -> str:
        """What was trained, by which effort, and what broke off."""
        (_, hidden), *_ = self.problem.model_options
        network = f"three hidden layers of {hidden[0]}" if hidden else "no hidden layer"
        effort = next(iter(self.found.values())).effort
        return f"{self.title}, {network}: {effort}{stopped_words(self.found)}"

    def only(self, *names: str) -> Comparison:
        """Some of the methods."""
        return Comparison(self.problem, {name: self.found[name] for name in names})

    def and_also(self, others: Found) -> Comparison:
        """With further methods."""
        return Comparison(self.problem, {**self.found, **others})

    def losses(self, name: str) -> list[float]:
        """A method's final training losses, one for each seed."""
        return self.found[name].last("train_loss")

    def ratio(self, above: str, below: str) -> float:
        """Of the medians of two methods; what diverged is infinitely far behind."""
        first, second = median(self.losses(above)), median(self.losses(below))
        if math.isinf(second):
            return 1.0 if math.isinf(first) else 0.0
        return first / second

    def below(self, name: str, others: Iterable[str]) -> bool:
        """Whether every seed of a method ends below every seed of each other."""
        return max(self.losses(name)) < min(min(self.losses(other)) for other in others)

    def shown(self, names: Iterable[str]) -> str:
        """Losses of methods in words."""
        return ", ".join(f"{name} {spread(self.losses(name))}" for name in names)


def trained(setting: SETTING, names: Sequence[str], run: Run) -> Comparison:
    """Tune and train some methods of a setting.

    Args:
        setting: problem, methods, effort.
        names: of the methods.
        run: how.

    Returns:
        The comparison.
    """
    problem, methods, effort = setting
    return Comparison(problem, compare(problem, [methods[name] for name in names], effort, run))


def untuned(setting: SETTING, names: Sequence[str], run: Run) -> Comparison:
    """Train some methods of a setting where their searches begin, without tuning.

    Args:
        setting: problem, methods, effort.
        names: of the methods.
        run: how.

    Returns:
        The comparison, of methods named by `begun`.
    """
    problem, methods, effort = setting
    chosen = [
        replace(methods[name], name=begun(name), fixed={**methods[name].fixed, **methods[name].start}, grid={})
        for name in names
    ]
    return Comparison(problem, compare(problem, chosen, effort, run))


def begun(name: str) -> str:
    """What a method is called that was not tuned."""
    return f"{name}, not tuned"


def data_sets(names: Sequence[str], run: Run) -> list[str]:
    """Those of the paper's data sets that are to be used, or digits."""
    return [name for name in names if at_hand(name, run)] or ["digits"]


def outcome(claims: Sequence[Claim], panels: Mapping[str, Comparison], compared: Sequence[Comparison]) -> Outcome:
    """The picture, words and protocol of an exhibit.

    Args:
        claims: its rows.
        panels: what is drawn, side by side, by the letters of the paper's panels.
        compared: all that was trained, each method once.

    Returns:
        The outcome.
    """
    rows = tuple({"setting": one.title, **row} for one in compared for row in protocol(one.found))
    details = (
        "images standardised to mean 0 and variance 1, ReLU networks without biases, constant learning rates and "
        "dampings (for means over the batch); K-FAC's damping shared as in equation 3, averages with decay 0.95, for "
        f"“{ONE_BATCH}” and on images at once of the step's own batch; matrices renewed at every step unless the "
        "protocol gives T; the natural gradient's Fisher, one label drawn for each image, on an independent "
        "mini-batch; "
    ) + "; ".join(one.words for one in compared)
    efforts = [next(iter(one.found.values())).effort for one in compared]
    trials = " or ".join(str(count) for count in dict.fromkeys(effort.trials for effort in efforts))
    setting = f"{efforts[0].seeds} seeds, {trials} trials of each method"

    def fill(figure: Figure) -> None:
        labels: dict[str, Artist] = {}
        for ax, (letter, one) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
            draw_curves(ax, one.found, "train_loss", over="epoch" if one.problem.batch else "step")
            logarithmic(ax)
            ax.set_title(f"{letter}: {one.title}", fontsize=9)
            labels |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
            if ax.get_subplotspec().is_first_col():
                ax.set_ylabel("training loss")
        figure.legend(
            list(labels.values()), list(labels), fontsize=8, loc="outside lower center", ncols=min(4, 2 * len(panels))
        )

    caption = "Training loss of the tuned optimizers (median and range of the seeds)."
    return Outcome(tuple(claims), setting, details, caption, draw(max(5.2, 4.2 * len(panels)), 3.9, fill), rows)
