"""One pass over the data feeds everything: the passes, statistics and kept captures behind an exact Fisher.

Every pass checks that data and weights are those of the first. Approximations collect their statistics here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor

from fisherviz.capture.batch import Batch
from fisherviz.capture.captures import AnyCapture
from fisherviz.capture.look import look
from fisherviz.capture.structure import Structure
from fisherviz.capture.take import VectorSource, loss_gradient
from fisherviz.capture.witness import Witness
from fisherviz.exact.feeding import feed
from fisherviz.exact.finite import require_finite_statistic
from fisherviz.exact.kept import Held, Kept, version_of
from fisherviz.exact.run import Run, View
from fisherviz.network import guest
from fisherviz.network.batches import Batches
from fisherviz.network.layers import LayerInfos
from fisherviz.network.space import ParameterSpace
from fisherviz.network.vectors import NoVectors, SampledVectors, make_vectors
from fisherviz.statistics import Statistic, add_up, needs_slopes
from fisherviz.statistics.costs import require_statistics
from fisherviz.statistics.examples import Examples
from fisherviz.support.choices import one_of
from fisherviz.support.counting import is_counting
from fisherviz.support.memory import keep_limit
from fisherviz.support.numbers import human
from fisherviz.support.processes import ALONE, Processes
from fisherviz.support.timing import Effort, so_far

REDUCTIONS = ("mean", "sum")

Consumer = Callable[[Batch], None]
T = TypeVar("T")
R = TypeVar("R")


class Passes:
    """A probe's data with one kind of Fisher in mind: passes, statistics, captures, and what they cost."""

    def __init__(
        self,
        probe: View,
        data: Any,
        targets: Tensor | str | None = None,
        *,
        kind: str = "exact",
        samples: int = 1,
        reduction: str = "mean",
        generator: torch.Generator | None = None,
        processes: bool = False,
    ) -> None:
        one_of("reduction", reduction, REDUCTIONS)
        self.processes = Processes.of_group() if processes else ALONE
        self.probe: Any = probe
        self.network = probe.network
        self.kind = kind
        self.samples = samples
        self.reduction = reduction
        if samples != 1 and kind in ("exact", "empirical"):
            raise ValueError(f"samples={samples!r} belongs to kind='mc'; kind={kind!r} draws no labels.")
        self.vectors = make_vectors(self.network.likelihood, kind, samples, generator, self.network.device)
        if isinstance(self.vectors, SampledVectors):  # processes may have been seeded differently
            self.vectors.seed = self.processes.exchange(self.vectors.seed)[0]
        likelihood, belongs = self.network.likelihood, self.network.could_be_targets
        self.data = Batches(data, targets, counted=likelihood.counted, likelihood=likelihood, belongs=belongs)
        if kind == "empirical" and self.data.certainly_without_targets:
            raise ValueError(
                "kind='empirical' needs the data's labels; pass targets=, a tuple (inputs, targets) or batches of them."
            )
        self._weights = guest.fingerprint(self.network.model)
        self.witness = Witness()  # of what every pass must show again
        self.seen: int | None = None
        self.updates: dict[Hashable, Effort] = {}  # of each collected statistic, by its key
        self._pass_seconds: dict[bool, float] = {}
        self._pass_operations: dict[bool, int] = {}
        self.__kept = Kept(self.network.layers)

    # ---- what it is ------------------------------------------------------------------------------------------------

    @property
    def structure(self) -> Structure:
        """What is known of the network: the layers' paths, positions, neighbours."""
        return self.network.structure

    @property
    def space(self) -> ParameterSpace:
        """The probed parameters as one vector."""
        return self.network.space

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return (self.space.size, self.space.size)

    @property
    def layers(self) -> LayerInfos:
        """What the probed layers are, in torch order."""
        return LayerInfos(layer.info() for layer in self.network.layers)

    @property
    def examples(self) -> int:
        """Number N of examples, but those of which targets leave out every position; counting may take a pass."""
        if self.seen is None:
            self._pass(lambda: lambda batch: None, gradients=False)
        return cast(int, self.seen)

    @property
    def scale(self) -> float:
        """What sums over examples are multiplied with: 1/N for "mean", 1 for "sum"."""
        return 1.0 / self.examples if self.reduction == "mean" else 1.0

    @property
    def weight(self) -> float:
        """What means over examples are multiplied with: 1 for "mean", N for "sum"."""
        return 1.0 if self.reduction == "mean" else float(self.examples)

    @property
    def weights_fingerprint(self) -> str:
        """Digest of the model's parameters and buffers."""
        return guest.digest(self._weights)

    @property
    def _kept(self) -> Kept:
        """What is kept; nothing where another Fisher of the same probe has changed the layers' paths since."""
        if self.__kept.layers != self.network.layers:
            self.__kept = Kept(self.network.layers)
        return self.__kept

    @property
    def empty(self) -> Tensor:
        """A tensor without entries, of the results' type."""
        return torch.empty(0, dtype=self.network.precision, device=self.network.device)

    # ---- passes ----------------------------------------------------------------------------------------------------

    def check_unchanged(self) -> None:
        """Raise RuntimeError if the model's weights are not those that this Fisher was made for."""
        if guest.fingerprint(self.network.model) != self._weights:
            raise RuntimeError(
                "the model changed since this Fisher was made (its parameters or buffers differ); "
                "make a new one with probe.fisher(...)."
            )

    def _pass(
        self, begin: Callable[[], Consumer], statistics: Sequence[Statistic] = (), *, gradients: bool = True
    ) -> None:
        """One pass over the data, or over the captures of an earlier one; they stay in memory where they fit.

        Args:
            begin: gives what consumes the batches; asked again where the pass starts anew.
            statistics: what the consumer makes.
            gradients: whether vectors are backpropagated.
        """
        held, slopes = self._kept.held, needs_slopes(statistics)
        if held is not None and held.show(statistics):
            consume = begin()
            with self.processes.agreeing("captures that are kept"):
                self.check_unchanged()
                for batch in held.own:
                    consume(batch)
            return
        with self.network.showing(slopes):
            keep = gradients and (held is None or (slopes and not held.slopes))
            forms = not statistics or any(s.forms for s in statistics)
            found = self._over(self.vectors if gradients else NoVectors(), begin, keep=keep, forms=forms)
        self._kept.held = found or self._kept.held

    def _over(
        self,
        vectors: VectorSource,
        begin: Callable[[], Consumer],
        *,
        keep: bool,
        labels: bool = False,
        forms: bool = True,
    ) -> Held | None:
        """Hand all batches to a consumer; the captures of all examples, where they fit.

        Gradients that nobody forms are not formed to be kept: that would cost more than a later pass.
        The one place that starts again: where a layer turns out to have no structure, what was summed is worth nothing.
        """
        gradients = not isinstance(vectors, NoVectors)
        while True:
            run = Run(self.network, self.data, vectors, self.witness, self.processes)
            consume, looked = begin(), self.structure.looked
            with self.processes.agreeing("a pass over the data") as check:
                self.check_unchanged()
                began, run.check = so_far(self.network.device), check
                run.go(consume, keep_limit(self.network.device) if keep else 0, labels=labels, forms=forms)
                spent = so_far(self.network.device) - began - run.consumed
            if whys := run.agreed(lambda: self.weights_fingerprint):
                self.network.settle(self.structure.without(whys))
                continue
            self.seen = run.examples
            if looked and not labels:  # the first look is no part of a pass
                self._pass_seconds[gradients] = min(spent.seconds, self._pass_seconds.get(gradients, spent.seconds))
                if is_counting():
                    self._pass_operations[gradients] = sum(self.processes.exchange(spent.operations))
            return run.held() if keep else None

    def look(self) -> None:
        """Make sure that the network has been seen running: the layers' paths and positions are known."""
        if not self.structure.looked:
            with self.processes.agreeing("a first look at the network"):
                look(self.network, next(iter(self.data))[0])

    def fresh(self) -> Self:
        """The same Fisher with nothing computed and no pass timed yet."""
        other = self._copied(Kept(self.network.layers))
        other._pass_seconds = {}
        return other

    def with_captures(self) -> Self:
        """The same Fisher with the captures that are kept, but no statistic yet: what it collects goes with it."""
        return self._copied(replace(self._kept, statistics={}))

    def _copied(self, kept: Kept) -> Self:
        other = copy.copy(self)
        other.__kept, other.updates = kept, {}
        return other

    @property
    def keeps_captures(self) -> bool:
        """Whether further passes read the captures of an earlier one, and the network runs no more."""
        return self._kept.held is not None and not self._kept.held.ragged

    def pass_effort(self, gradients: bool) -> Effort:
        """What one pass of captures takes, beside what is made of them; the fastest so far, or one made for this.

        Args:
            gradients: forward and backward of the kind's vectors; otherwise forward alone.

        Returns:
            Seconds, and the operations of all processes together where somebody counts.
        """
        known = gradients in self._pass_seconds and (not is_counting() or gradients in self._pass_operations)
        if not known:
            self.look()
            self._over(self.vectors if gradients else NoVectors(), lambda: lambda batch: None, keep=False)
        seconds = min(self._pass_seconds[gradients], self._pass_seconds.get(True, float("inf")))  # forward is a part
        return Effort(seconds, self._pass_operations.get(gradients, 0))

    def collect(self, statistics: Iterable[Statistic]) -> list[Statistic]:
        """Feed statistics by one pass over the data; those already known are not computed again.

        Args:
            statistics: what is wanted.

        Returns:
            Means over all examples, in the same order; shared without a copy, and anew where somebody modified one.
        """
        given = list(statistics)
        wanted = {s.key: s for s in given}
        held, unknown = self._kept.held, self._unknown(wanted)
        # what captures that are kept show is read from them, whatever else is wanted: its sum has the same order then
        if held is not None and (shown := {s.key: s for s in unknown if held.show([s])}) and len(shown) < len(unknown):
            self._feed(shown)
        if unknown:
            self._feed(wanted)
        else:
            self.check_unchanged()
        return [self._kept.statistics[s.key][0] for s in given]

    def _unknown(self, wanted: Mapping[Hashable, Statistic]) -> list[Statistic]:
        return [s for key, s in wanted.items() if not self._kept.knows(key)]

    def _feed(self, wanted: Mapping[Hashable, Statistic]) -> None:
        """Make those statistics that are not known by one pass."""
        fresh: dict[Hashable, Statistic] = {}

        def begin() -> Consumer:
            nonlocal fresh
            fresh = {s.key: s.empty() for s in self._unknown(wanted)}
            self.updates |= dict.fromkeys(fresh, Effort())
            return update

        def update(batch: Batch) -> None:
            if all(s.total is None for s in fresh.values()):  # the first batch: only now it is known what fits
                require_statistics(fresh.values(), self.space.layers, self.empty)
            feed(fresh, batch, self.updates, self.network.device)

        unknown = self._unknown(wanted)
        self._pass(begin, unknown, gradients=any(s.needs_gradients for s in unknown))
        add_up(fresh.values(), self.processes)
        if is_counting():
            counts = zip(*self.processes.exchange([self.updates[key].operations for key in fresh]), strict=True)
            for key, of_all in zip(fresh, counts, strict=True):
                self.updates[key] = replace(self.updates[key], operations=sum(of_all))
        for key, statistic in fresh.items():
            statistic.normalise()
            require_finite_statistic(statistic)
            self._kept.statistics[key] = (statistic, version_of(statistic))

    def forget(self, statistics: Iterable[Statistic]) -> None:
        """Keep these no longer."""
        for statistic in statistics:
            self._kept.statistics.pop(statistic.key, None)
            self.updates.pop(statistic.key, None)

    def example_space(self) -> dict[str, AnyCapture]:
        """Captures of all examples by layer name.

        Raises:
            MemoryError: they do not fit in a quarter of the free memory.
        """
        if self._kept.held is None:
            self._pass(lambda: lambda batch: None)
        else:
            self.check_unchanged()
        if self._kept.held is None:
            raise MemoryError(
                f"the inputs and pseudo-gradients of {self.examples:,} examples exceed the "
                f"{human(keep_limit(self.network.device))} meant for them; use fewer examples, or kind='mc'."
            )
        return self._kept.held.whole(self.network.device)

    def in_example_space(self) -> Examples:
        """The Fisher as F = s U Uᵀ."""
        return Examples(list(self.example_space().values()), self.scale)

    @property
    def known_square_norms(self) -> dict[tuple[int, int], float]:
        """‖Σ_nk ∇ᵢ ∇ⱼᵀ‖² of blocks i <= j, as far as somebody has asked; more may be noted."""
        return self._kept.square_norms

    @property
    def columns(self) -> int:
        """Number K N of columns of U, F = s U Uᵀ; taken from kept captures."""
        if self._kept.held is None:
            self.example_space()
        assert self._kept.held is not None
        return self._kept.held.vectors * self.examples

    def loss_effort(self, times: int = 1) -> Effort:
        """What one forward+backward pass of the mean loss over the data takes: the unit that costs are given in.

        Args:
            times: passes, of which the fastest counts.

        Returns:
            Seconds, of several processes those of the slowest; operations of all together, where somebody counts.
        """
        found = []
        for _ in range(times):
            with self.processes.agreeing("the seconds of a pass"):
                start = so_far(self.network.device)
                run = Run(self.network, self.data, NoVectors(), self.witness, self.processes)
                for inputs, targets, _ in run.shares():
                    loss_gradient(self.network, inputs, targets)
                found.append(so_far(self.network.device) - start)
        of_all = self.processes.exchange(min(found, key=lambda each: each.seconds))
        return Effort(max(each.seconds for each in of_all), sum(each.operations for each in of_all))

    # ---- several processes -----------------------------------------------------------------------------------------

    def deal(self, items: Sequence[T], work: Callable[[T], R], what: str) -> list[R]:
        """The work's result for each item, in order and in all processes, each item done by one of them.

        Args:
            items: the same in all processes.
            work: what it asks of this Fisher is the affair of the process that does it, and is forgotten afterwards.
            what: the work in words.
        """
        if self.processes.count == 1:
            return [work(item) for item in items]
        processes = self.processes
        with self._on_its_own():
            return processes.deal(items, work, what)

    @contextmanager
    def _on_its_own(self) -> Iterator[None]:
        """Requests are answered by this process alone and leave nothing behind, since the others have not made them."""
        kept, structure, examples = self._kept, self.structure, self.examples
        before = self.processes, self._pass_seconds, self._pass_operations
        alone = replace(kept, statistics=dict(kept.statistics), square_norms=dict(kept.square_norms))
        if kept.held is not None:
            whole = kept.held.whole(self.network.device)
            alone.held = replace(kept.held, own=[Batch(whole, examples)], processes=ALONE)
        self.__kept, self.processes = alone, ALONE
        self._pass_seconds, self._pass_operations = dict(self._pass_seconds), dict(self._pass_operations)
        try:
            yield
        finally:
            self.__kept, (self.processes, self._pass_seconds, self._pass_operations) = kept, before
            self.network.settle(structure)
