"""Tuning with equal effort: every method gets the same number of trials, then the same seeds.

A trial is a run with other options; the setting with the lowest final training loss is trained again from seeds that
no trial saw.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from fisherviz.papers.trials.problems import Effort, Method, Options, Problem, Trained, final
from fisherviz.papers.trials.running import trained
from fisherviz.papers.trials.work import Run

Task = tuple[Problem, Method, Effort]


def compare(problem: Problem, methods: Sequence[Method], effort: Effort, run: Run) -> dict[str, Trained]:
    """Tune each method with the same number of trials, then train it from the same seeds.

    Args:
        problem: what is trained.
        methods: the lines of the comparison; one without a grid is not tuned.
        effort: how much training.
        run: seed of the trials (those that count have the next ones), device, processes, where runs are kept.

    Returns:
        Name to method.
    """
    found = tuned([(problem, method, effort) for method in methods], run)
    return {one.method.name: one for one in found}


def tuned(tasks: Sequence[Task], run: Run) -> list[Trained]:
    """Tune and train several methods, each on its own problem; see `compare`.

    Args:
        tasks: problem, method and effort of each.
        run: how.

    Returns:
        One for each task.
    """
    trials = run.map(_trials, tasks)
    best = [min(one, key=lambda trial: trial[1])[0] if one else {} for one in trials]
    seeds = [range(run.seed + 1, run.seed + 1 + effort.seeds) for _, _, effort in tasks]
    items = [(*task, options, seed) for task, options, own in zip(tasks, best, seeds, strict=True) for seed in own]
    runs = iter(run.map(_run, items))
    return [
        Trained(method, effort, options, tuple(tried), tuple(next(runs) for _ in own))
        for (_, method, effort), options, tried, own in zip(tasks, best, trials, seeds, strict=True)
    ]


def _trials(task: Task, run: Run) -> list[tuple[Options, float]]:
    problem, method, effort = task

    def loss(options: Options) -> float:
        found = trained(problem, method, options, effort.trial_steps, effort.trial_steps, run.seed, run)
        return final(found, "train_loss")

    return search(method, effort.trials, loss) if method.grid else []


def _run(item: tuple[Problem, Method, Effort, Options, int], run: Run) -> dict[str, Any]:
    problem, method, effort, options, seed = item
    return trained(problem, method, options, effort.steps, effort.look, seed, run)


def search(method: Method, trials: int, loss: Callable[[Options], float]) -> list[tuple[Options, float]]:
    """Walk over a grid: from the start always to the nearest setting not tried yet around the best so far.

    Args:
        method: with its grid.
        trials: how many settings to try.
        loss: of a setting; lower is better.

    Returns:
        The settings in the order tried, with their losses.
    """
    places = list(itertools.product(*(range(len(values)) for values in method.grid.values())))
    tried: dict[tuple[int, ...], float] = {}
    best = tuple(list(values).index(method.start[name]) for name, values in method.grid.items())

    def chosen(place: Sequence[int]) -> Options:
        return {name: values[i] for (name, values), i in zip(method.grid.items(), place, strict=True)}

    for _ in range(min(trials, len(places))):
        left = [place for place in places if place not in tried]
        here = min(left, key=lambda place: sum(abs(i - j) for i, j in zip(place, best, strict=True)))
        tried[here] = loss(chosen(here))
        best = min(tried, key=lambda place: tried[place])
    return [(chosen(place), value) for place, value in tried.items()]
