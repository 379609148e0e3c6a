"""The exhibits that `fisherviz papers` knows, by name, and the way to run them.

A paper's module marks each function with `@exhibit("kfac.fig2", "figure 2: ...", ...)`; it takes a `Run` and returns
an `Outcome`. Importing a module is what registers its exhibits, so `MODULES` names every module of every paper.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fisherviz.papers.ledger.claims import Outcome
from fisherviz.papers.ledger.records import record
from fisherviz.papers.trials.work import SCALES, Run
from fisherviz.support.choices import one_of, unknown

PAPERS = {
    "kfac": "Martens & Grosse 2015",
    "sang": "Sang et al. 2022",
    "benzing": "Benzing 2021",
    "shrestha": "Shrestha 2023",
    "beyond": "Beyond the papers",
}
"""First part of the exhibits' names, and the paper that they are of."""
MODULES = (
    "kfac.matrices", "kfac.labels", "kfac.batch_mode", "kfac.invariance", "kfac.rescaling", "kfac.batch_sizes",
    "kfac.autoencoders",
    "sang.table", "sang.matrices", "sang.complexity",
    "benzing.training", "benzing.ablations", "benzing.timings", "benzing.similarity", "benzing.damping",
    "benzing.minibatches", "benzing.posterior",
    "shrestha.matrices", "shrestha.convergence", "shrestha.table", "shrestha.stability", "shrestha.depth",
    "beyond.along", "beyond.speed",
)  # fmt: skip
RUNS = ".runs"
"""Folder of measurements beside the pictures: a command that was interrupted goes on from there."""


@dataclass(frozen=True)
class Exhibit:
    """A figure, table or set of numbers of a paper, and the function that measures it.

    Args:
        name: "paper.figure".
        title: its heading, without the paper's name.
        shows: what the paper shows there, in a sentence without its full stop.
        hours: core-hours that it takes at each scale longer than "smoke".
        measure: the function.
    """

    name: str
    title: str
    shows: str
    hours: Mapping[str, float]
    measure: Callable[[Run], Outcome]

    @property
    def paper(self) -> str:
        """Authors and year."""
        return PAPERS[self.name.partition(".")[0]]


_EXHIBITS: dict[str, Exhibit] = {}


def exhibit(
    name: str, title: str, *, shows: str, desk: float, paper: float
) -> Callable[[Callable[[Run], Outcome]], Callable[[Run], Outcome]]:
    """Register a function as the one that measures an exhibit.

    Args:
        name: "paper.figure", for example "kfac.fig2".
        title: heading of its section, for example "figure 2: F, F̃ and their difference".
        shows: what the paper shows there, in a sentence without its full stop.
        desk: core-hours at scale "desk", as measured.
        paper: core-hours at scale "paper", measured or estimated from steps.

    Returns:
        The decorator; the function stays as it is.
    """

    def register(measure: Callable[[Run], Outcome]) -> Callable[[Run], Outcome]:
        _EXHIBITS[name] = Exhibit(name, title, shows, {"smoke": 0.0, "desk": desk, "paper": paper}, measure)
        return measure

    return register


def exhibits() -> dict[str, Exhibit]:
    """All exhibits by name, in the order of the papers and of `MODULES`."""
    for module in MODULES:
        importlib.import_module(f"fisherviz.papers.{module}")
    # somebody may have imported the modules before, in another order
    place = {f"fisherviz.papers.{module}": place for place, module in enumerate(MODULES)}
    ordered = sorted(_EXHIBITS, key=lambda name: place[_EXHIBITS[name].measure.__module__])
    return {name: _EXHIBITS[name] for name in ordered}


def chosen(only: Sequence[str] | None) -> list[Exhibit]:
    """The exhibits that names stand for; a name without a figure ("kfac") is all of its paper's.

    Args:
        only: names; None: all.

    Returns:
        The exhibits, each once.

    Raises:
        ValueError: a name stands for nothing.
    """
    known = exhibits()
    if not only:
        return list(known.values())
    for name in only:
        if not any(name in (key, key.partition(".")[0]) for key in known):
            raise ValueError(unknown("exhibit", name, known))
    return [found for key, found in known.items() if {key, key.partition(".")[0]} & set(only)]


def measure(one: Exhibit, run: Run, out: Path) -> Outcome:
    """Measure one exhibit and record it.

    Args:
        one: the exhibit.
        run: how.
        out: folder of pictures and claims.

    Returns:
        What was found.

    Raises:
        ValueError: an unknown scale.
    """
    one_of("scale", run.scale, SCALES)
    run = replace(run, work=run.work or out / RUNS, used={})
    outcome = one.measure(run)
    record(out, one.name, f"{one.paper}, {one.title}", one.shows, outcome, run)
    return outcome
