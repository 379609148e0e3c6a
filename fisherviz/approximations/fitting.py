"""Fitting of several approximations together: one pass for the first statistics of all, one for all that refine.

A recipe is a generator: it yields what it wants of the data, is sent it, and returns its matrix. What each one takes is
counted as if it were alone: its own statistics and building, and a pass for each round that the network has to run. In
operations every round has its pass, so that the count does not depend on the memory of a machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fisherviz.capture.captures import AnyCapture
from fisherviz.capture.formed import FormedCapture
from fisherviz.statistics import Statistic
from fisherviz.support.counting import is_counting
from fisherviz.support.timing import Effort, so_far

if TYPE_CHECKING:
    from fisherviz.exact.fisher import Fisher

FAILURES = (
    ValueError,
    TypeError,
    RuntimeError,
    MemoryError,
    ArithmeticError,
    LookupError,
    AttributeError,
    AssertionError,
)
"""What ends one approximation among several, not all of them: whatever an author's own code raises;
NotImplementedError is a RuntimeError."""


@dataclass(frozen=True)
class Wanted:
    """What a recipe wants of the data.

    Args:
        statistics: by name, for each layer or pair of layers.
        captures: positions among these, and the layer whose capture of all examples is wanted there too.
    """

    statistics: Sequence[Mapping[str, Statistic]]
    captures: Mapping[int, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Statistic]:
        return (statistic for named in self.statistics for statistic in named.values())


Found = list[dict[str, Any]]
"""Means of the statistics, by the names that they were given, with "capture" where it was wanted."""
Recipe = Generator[Wanted, Found, Any]


@dataclass
class Fit:
    """A recipe on its way.

    Args:
        recipe: the generator.
        wanted: what it waits for, None once it has ended.
        result: what it returned.
        error: what ended it instead.
        effort: what it would have taken alone; in operations, with a pass for each round whatever memory holds.
    """

    recipe: Recipe
    wanted: Wanted | None = None
    result: Any = None
    error: Exception | None = None
    effort: Effort = field(default_factory=Effort)

    def go_on(self, fisher: Fisher, found: Found | None = None) -> None:
        """Run the recipe up to what it wants next, or to its end."""
        self.wanted = None
        try:
            with fisher.processes.agreeing("a fit"):
                self._run(fisher, found)
        except FAILURES as error:
            self.wanted, self.error = None, error

    def _run(self, fisher: Fisher, found: Found | None) -> None:
        start = so_far(fisher.network.device)
        try:
            self.wanted = next(self.recipe) if found is None else self.recipe.send(found)
        except StopIteration as end:
            self.result = end.value
        finally:
            self.effort += so_far(fisher.network.device) - start

    def supply(self, fisher: Fisher, captures: Mapping[str, AnyCapture] | Exception, replayed: bool) -> None:
        """Give the recipe what it wants; of statistics that others wanted too, nothing is computed again."""
        assert self.wanted is not None
        wanted = list(self.wanted)
        try:
            if isinstance(captures, Exception):
                if self.wanted.captures:
                    raise captures
                captures = {}
            held = iter(fisher.collect(wanted) if wanted else [])
            found: Found = [{key: next(held).mean for key in named} for named in self.wanted.statistics]
        except FAILURES as error:
            self.wanted, self.error = None, error
            return
        for position, layer in self.wanted.captures.items():
            found[position]["capture"] = own = captures[layer]
            if isinstance(own, FormedCapture) and is_counting():
                self.effort += Effort(operations=own.operations)
        self.effort = sum((fisher.updates[key] for key in {statistic.key for statistic in wanted}), self.effort)
        if (wanted or self.wanted.captures) and (is_counting() or not replayed):
            gradients = bool(self.wanted.captures) or any(statistic.needs_gradients for statistic in wanted)
            one = fisher.pass_effort(gradients)
            self.effort += replace(one, seconds=0.0) if replayed else one
        self.go_on(fisher, found)


def run_together(fisher: Fisher, recipes: Sequence[Recipe]) -> list[Fit]:
    """Run recipes side by side; each round of statistics takes one pass for all of them.

    Args:
        fisher: whose data they are fitted on.
        recipes: one per approximation.

    Returns:
        How each one ended.
    """
    fits = [Fit(recipe) for recipe in recipes]
    for fit in fits:
        fit.go_on(fisher)
    replayed = False  # the first round counts its pass even where another call has kept the captures
    passing: list[Statistic] = []
    while waiting := [(fit, fit.wanted) for fit in fits if fit.wanted is not None]:
        passing += [statistic for _, wanted in waiting for statistic in wanted if not statistic.lasting]
        captures = _pass(fisher, [wanted for _, wanted in waiting])
        for fit, _ in waiting:
            fit.supply(fisher, captures, replayed)
        replayed = fisher.keeps_captures
    fisher.forget(passing)
    return fits


def _pass(fisher: Fisher, wanted: Sequence[Wanted]) -> Mapping[str, AnyCapture] | Exception:
    """Collect everything at once, captures first, so that the statistics come from the same pass; the captures.

    Statistics that fail here fail again, alone, where they were wanted.
    """
    captures: Mapping[str, AnyCapture] | Exception = {}
    if any(each.captures for each in wanted):
        try:
            captures = fisher.example_space()
        except FAILURES as error:
            captures = error
    if statistics := [statistic for each in wanted for statistic in each]:
        with contextlib.suppress(*FAILURES):
            fisher.collect(statistics)
    return captures
