"""The exhibits that `fisherviz papers` knows, by name, and the way to run them.

A paper's module marks each function with `@exhibit("kfac.fig2", "title")`; it takes a `Run` and returns an
`Outcome`. Importing a module is what registers its exhibits, so `MODULES` names every paper's module.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from fisherviz._version import __version__
from fisherviz.papers.claims import Outcome, record
from fisherviz.support.choices import one_of, unknown

MODULES = ("kfac", "sang", "benzing", "shrestha", "autoencoders")
SCALES = ("smoke", "desk", "paper")
RUNS = ".runs"
"""Folder of training runs beside the pictures: a command that was interrupted goes on from there."""


@dataclass(frozen=True)
class Run:
    """How exhibits are run.

    Args:
        scale: "smoke" (seconds, for tests), "desk" (a desktop's minutes) or "paper" (the full setting).
        seed: of initial weights and whatever else is random.
        device: where to compute.
        progress: show progress bars.
        work: folder where finished training runs are kept; None: nowhere.
    """

    scale: str = "desk"
    seed: int = 0
    device: str = "cpu"
    progress: bool = True
    work: Path | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Exhibit:
    """A figure, table or set of numbers of a paper, and the function that measures it."""

    name: str
    title: str
    measure: Callable[[Run], Outcome]


_EXHIBITS: dict[str, Exhibit] = {}


def exhibit(name: str, title: str) -> Callable[[Callable[[Run], Outcome]], Callable[[Run], Outcome]]:
    """Register a function as the one that measures an exhibit.

    Args:
        name: "paper.figure", for example "kfac.fig2".
        title: heading of its section.

    Returns:
        The decorator; the function stays as it is.
    """

    def register(measure: Callable[[Run], Outcome]) -> Callable[[Run], Outcome]:
        _EXHIBITS[name] = Exhibit(name, title, measure)
        return measure

    return register


def exhibits() -> dict[str, Exhibit]:
    """All exhibits by name, in the order of the papers."""
    for module in MODULES:
        importlib.import_module(f"fisherviz.papers.{module}")
    # somebody may have imported the modules before, in another order
    ordered = sorted(_EXHIBITS, key=lambda name: MODULES.index(name.partition(".")[0]))
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
    outcome = one.measure(replace(run, work=run.work or out / RUNS))
    kept = {key: value for key, value in asdict(run).items() if key not in ("progress", "work")}
    record(out, one.name, one.title, outcome, fisherviz=__version__, **kept)
    return outcome
