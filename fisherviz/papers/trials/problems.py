"""What is compared: the problem that is trained, the methods with their grids, and the effort that each gets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fisherviz import datasets, models
from fisherviz.papers.trials.work import Run
from fisherviz.support.importing import imported

Options = Mapping[str, Any]
TITLES = {"fashion-mnist": "Fashion-MNIST", "mnist": "MNIST", "digits": "digits", "weather-apparent": "weather"}
_load = lru_cache(maxsize=4)(datasets.load)


@dataclass(frozen=True)
class Problem:
    """What is trained.

    Args:
        dataset: name of a data set.
        model: name of a network, or "pkg.mod:factory" called with the number of inputs and `generator`.
        model_options: of the network, as pairs.
        batch: examples per step.
        limit: first training examples that are kept.
        size: side that images are scaled to.
        task: of the data set; None: its usual one.
        standardise: as for `datasets.load`.
        full_at: step at which growing batches hold all examples.
        averaging: ξ of the averaged iterate; the better of it and the last iterate counts.
        evaluated: most examples of each part that are evaluated; None: all.
        dtype: floating-point type.
    """

    dataset: str
    model: str
    model_options: tuple[tuple[str, Any], ...] = ()
    batch: int = 100
    limit: int | None = None
    size: int | None = None
    task: str | None = None
    standardise: bool | None = None
    full_at: int | None = None
    averaging: float | None = None
    evaluated: int | None = None
    dtype: str = "float32"

    def data(self) -> datasets.Dataset:
        """The data set."""
        found = _load(self.dataset, limit=self.limit, size=self.size, task=self.task, standardise=self.standardise)
        return found if self.dtype == "float32" else found.to(dtype=getattr(torch, self.dtype))

    @property
    def title(self) -> str:
        """What the data set is called in sentences."""
        return TITLES.get(self.dataset, self.dataset)

    @property
    def examples(self) -> int:
        """How many training examples there are."""
        return len(self.data().train.inputs)

    def effort(self, epochs: int, trial_epochs: int, trials: int, seeds: int) -> Effort:
        """An effort counted in epochs, with an evaluation after each."""
        epoch = -(-self.examples // self.batch)
        return Effort(epochs * epoch, epoch, seeds, trials, trial_epochs * epoch)


@dataclass(frozen=True)
class Method:
    """One line of a comparison.

    Args:
        name: in tables and legends.
        optimizer: as for `fisherviz train`.
        fixed: options that are not tuned.
        grid: options that are tuned, each with its values in order.
        start: where tuning begins, a value of each.
    """

    name: str
    optimizer: str
    fixed: Options = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    start: Options = field(default_factory=dict)


@dataclass(frozen=True)
class Effort:
    """How much training each method gets.

    Args:
        steps: of a run that counts.
        look: steps between evaluations.
        seeds: how many runs count.
        trials: settings tried.
        trial_steps: steps of a trial.
    """

    steps: int
    look: int
    seeds: int
    trials: int
    trial_steps: int

    def __str__(self) -> str:
        seeds = f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"
        return (
            f"{self.trials} trials of {self.trial_steps} steps for each tuned method, chosen by final training loss, "
            f"then {self.steps} steps from each of {seeds} that no trial saw; medians, ranges in brackets"
        )


@dataclass(frozen=True)
class Trained:
    """A method after tuning.

    Args:
        method: which.
        effort: that it got.
        options: those that were chosen.
        trials: options and final training loss of every trial.
        runs: one for each seed.
    """

    method: Method
    effort: Effort
    options: Options
    trials: tuple[tuple[Options, float], ...]
    runs: tuple[dict[str, Any], ...]

    def last(self, key: str) -> list[float]:
        """A metric at the end of each seed's run; a run that broke off counts as the worst that it can be."""
        return [final(run, key) for run in self.runs]

    def at(self, key: str, step: int) -> list[float]:
        """A metric at a step of each seed's run."""
        return [next((line[key] for line in run["curve"] if line["step"] == step), worst(key)) for run in self.runs]

    @property
    def stopped(self) -> int:
        """How many runs broke off."""
        return sum(run["stopped"] is not None for run in self.runs)


def worst(key: str) -> float:
    """What a run that broke off counts as."""
    return -math.inf if key.endswith("accuracy") else math.inf


def final(run: Mapping[str, Any], key: str) -> float:
    """A metric at the end of a run."""
    return worst(key) if run["stopped"] is not None else float(run["curve"][-1][key])


def build(problem: Problem, data: datasets.Dataset, seed: int) -> nn.Module:
    """The network of a problem with a seed's weights."""
    options = dict(problem.model_options)
    if ":" in problem.model:
        return imported(problem.model)(data.inputs, generator=torch.Generator().manual_seed(seed), **options)
    return models.build(problem.model, seed=seed, dataset=data, **options)


def at_hand(name: str, run: Run) -> bool:
    """Whether a data set is to be used: at "paper" always, at "desk" if its files are there, at "smoke" never."""
    return run.scale == "paper" or (run.scale == "desk" and datasets.where(name) is not None)
