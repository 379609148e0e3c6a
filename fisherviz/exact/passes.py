"""One pass over the data feeds everything: the passes, statistics and kept captures behind an exact Fisher.

Checks on every pass that the data and the weights are still those of the first (DESIGN sections 2 and 4). `Fisher` adds
the matrix; approximations collect their statistics here.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Self

import torch
from torch import Tensor

from fisherviz.capture.captures import AnyCapture, Batch, concatenate, ragged
from fisherviz.capture.structure import restarting
from fisherviz.exact.solving import DampedCholesky
from fisherviz.network import guest
from fisherviz.network.batches import Batches
from fisherviz.network.layers import LayerInfo
from fisherviz.network.vectors import EmpiricalVectors, NoVectors, WithScores, make_vectors
from fisherviz.probe import Probe
from fisherviz.statistics.moments import GradientSum, Statistic, update_all
from fisherviz.support.memory import human, keep_limit

REDUCTIONS = ("mean", "sum")


class Passes:
    """A probe's data with one kind of Fisher in mind: passes, statistics, captures, and what they cost."""

    def __init__(
        self,
        probe: Probe,
        data: Any,
        targets: Tensor | None = None,
        *,
        kind: str = "exact",
        samples: int = 1,
        reduction: str = "mean",
        generator: torch.Generator | None = None,
    ) -> None:
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}.")
        self.probe = probe
        self.space = probe.space
        self.kind = kind
        self.samples = samples
        self.reduction = reduction
        if samples != 1 and kind in ("exact", "empirical"):
            raise ValueError(f"samples={samples!r} belongs to kind='mc'; kind={kind!r} draws no labels.")
        self.vectors = make_vectors(probe.likelihood, kind, samples, generator, probe.device)
        self.data = Batches(data, targets)
        if kind == "empirical" and self.data.certainly_without_targets:
            raise ValueError(
                "kind='empirical' needs the data's labels; pass targets=, a tuple (inputs, targets) or batches of them."
            )
        self._weights = guest.fingerprint(probe.model)
        self._examples: int | None = None
        self._statistics: dict[Hashable, tuple[Statistic, int]] = {}
        self.update_seconds: dict[Hashable, float] = {}
        """What the updates of each collected statistic took, by its key."""
        self._pass_seconds: dict[bool, float] = {}
        self._captures: dict[str, AnyCapture] | None = None
        self._ragged = False
        self._matrix: Tensor | None = None  # torch order
        self._dense_version = 0
        self._factors: dict[tuple[str, float], DampedCholesky] = {}
        self._largest: float | None = None

    # ---- what it is ------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return (self.space.size, self.space.size)

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """What the probed layers are, in torch order."""
        return self.probe.layers

    @property
    @restarting
    def examples(self) -> int:
        """Number N of examples; counting them may take a pass."""
        if self._examples is None:
            self._pass(lambda batch: None, gradients=False)
        assert self._examples is not None
        return self._examples

    @property
    def scale(self) -> float:
        """What sums over examples are multiplied with: 1/N for "mean", 1 for "sum"."""
        return 1.0 / self.examples if self.reduction == "mean" else 1.0

    @property
    def weights_fingerprint(self) -> str:
        """Digest of the model's parameters and buffers."""
        return guest.digest(self._weights)

    @property
    def _dense(self) -> Tensor | None:
        """The dense matrix in torch order, if made and not modified since it was handed out."""
        if self._matrix is not None and _version(self._matrix) != self._dense_version:
            self._matrix = None
        return self._matrix

    @_dense.setter
    def _dense(self, matrix: Tensor | None) -> None:
        self._matrix = matrix
        self._dense_version = 0 if matrix is None else _version(matrix)

    # ---- passes ----------------------------------------------------------------------------------------------------

    def check_unchanged(self) -> None:
        """Raise RuntimeError if the model's weights are not those that this Fisher was made for."""
        if guest.fingerprint(self.probe.model) != self._weights:
            raise RuntimeError(
                "the model changed since this Fisher was made (its parameters or buffers differ); "
                "make a new one with probe.fisher(...)."
            )

    def _pass(self, consume: Callable[[Batch], None], *, gradients: bool = True) -> None:
        """One pass over the data; captures stay in memory where they fit."""
        self.check_unchanged()
        if self._captures is not None and self.keeps_captures:
            consume(Batch(self._captures, self.examples))
            return
        kept: list[Batch] | None = [] if gradients else None
        vectors = self.vectors if gradients else NoVectors()
        held, limit, first = 0, keep_limit(self.probe.device), 0

        looked, began, consumed = self.probe.looked, self._clock(), 0.0

        def take(batch: Batch) -> None:
            nonlocal kept, held, consumed
            start = self._clock()
            consume(batch)
            consumed += self._clock() - start
            if kept is not None:
                held += batch.bytes
                kept = [*kept, batch] if held <= limit else None

        for inputs, targets in self.data:
            first += self.probe.capture(inputs, targets, vectors, take, first)
        self._examples = first
        if looked:  # the first look is no part of a pass
            spent = self._clock() - began - consumed
            self._pass_seconds[gradients] = min(spent, self._pass_seconds.get(gradients, spent))
        if kept and self._captures is None:
            made = {name: [batch.captures[name] for batch in kept] for name in self.space.names}
            self._ragged = any(ragged(captures) for captures in made.values())
            self._captures = {name: concatenate(captures) for name, captures in made.items()}

    def pass_with_scores(self, consume: Callable[[Batch], None]) -> None:
        """One pass that backpropagates the data's scores beside the kind's vectors, as the last one."""
        self.check_unchanged()
        vectors = WithScores(self.vectors, EmpiricalVectors(self.probe.likelihood))
        first = 0
        for inputs, targets in self.data:
            if targets is None:
                raise ValueError("the gradient needs the data's labels; pass targets= or tuples (inputs, targets).")
            first += self.probe.capture(inputs, targets, vectors, consume, first)
        self._examples = first

    def look(self) -> None:
        """Make sure that the probe has seen the model run: the layers' paths and positions are known."""
        if not self.probe.looked:
            inputs, _ = next(iter(self.data))
            self.probe.look(inputs)

    def fresh(self) -> Self:
        """The same Fisher with no statistic collected yet; what it collects goes with it. Kept captures are shared."""
        other = copy.copy(self)
        other._statistics, other.update_seconds = {}, {}
        return other

    @property
    def keeps_captures(self) -> bool:
        """Whether further passes read the captures of an earlier one, and the network runs no more."""
        return self._captures is not None and not self._ragged

    def pass_seconds(self, gradients: bool) -> float:
        """Seconds of one pass of captures, beside what is made of them; the best so far, or one made for this.

        Args:
            gradients: forward and backward of the kind's vectors; otherwise forward alone.

        Returns:
            Seconds.
        """
        if gradients not in self._pass_seconds:
            self.look()
            other = copy.copy(self)
            other._captures = None
            other._pass(lambda batch: None, gradients=gradients)
        return min(self._pass_seconds[gradients], self._pass_seconds.get(True, float("inf")))  # forward is a part

    def _clock(self) -> float:
        if self.probe.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @property
    def weight(self) -> float:
        """What means over examples are multiplied with: 1 for "mean", N for "sum"."""
        return 1.0 if self.reduction == "mean" else float(self.examples)

    def collect(self, statistics: Iterable[Statistic]) -> list[Statistic]:
        """Feed statistics by one pass over the data; those already known are not computed again.

        Args:
            statistics: what is wanted.

        Returns:
            Statistics of the same keys, in the same order, holding the means over all examples. Approximations share
            them without a copy; one that somebody modified is computed anew.
        """
        wanted = list(statistics)
        fresh = {s.key: s for s in wanted if not self._knows(s.key)}
        if fresh:
            gradients = any(s.needs_gradients for s in fresh.values())
            seconds = dict.fromkeys(fresh, 0.0)

            def update(batch: Batch) -> None:
                start = self._clock()
                for key, statistic in fresh.items():
                    statistic.update(batch)
                    seconds[key] += (now := self._clock()) - start
                    start = now

            self._pass(update, gradients=gradients)
            self.update_seconds |= seconds
            for key, statistic in fresh.items():
                statistic.normalise()
                self._statistics[key] = (statistic, _version_of(statistic))
        else:
            self.check_unchanged()
        return [self._statistics[s.key][0] for s in wanted]

    def _knows(self, key: Hashable) -> bool:
        if key not in self._statistics:
            return False
        statistic, version = self._statistics[key]
        return version == _version_of(statistic)

    @restarting
    def example_space(self) -> dict[str, AnyCapture]:
        """Captures of all examples by layer name.

        Raises:
            MemoryError: they do not fit in a quarter of the free memory.
        """
        if self._captures is None:
            self._pass(lambda batch: None)
        else:
            self.check_unchanged()
        if self._captures is None:
            raise MemoryError(
                f"the inputs and pseudo-gradients of {self.examples:,} examples exceed the "
                f"{human(keep_limit(self.probe.device))} meant for them; use fewer examples, or kind='mc'."
            )
        return self._captures

    @property
    def columns(self) -> int:
        """Number K N of columns of U, F = s U Uᵀ; taken from kept captures."""
        capture = next(iter(self.example_space().values()))
        return capture.vectors * capture.examples

    def has_targets(self) -> bool:
        """Whether every batch of the data carries targets; looks at one batch after the other until one has none."""
        return all(targets is not None for _, targets in self.data)

    @restarting
    def gradient(self) -> Tensor:
        """Gradient of the data's mean (or summed) negative log-likelihood, flat in torch order, (P,).

        Raises:
            ValueError: the data has no targets.
        """
        self.check_unchanged()
        sums = [GradientSum(name) for name in self.space.names]
        score, first = EmpiricalVectors(self.probe.likelihood), 0
        for inputs, targets in self.data:
            if targets is None:
                raise ValueError("the gradient needs the data's labels; pass targets= or tuples (inputs, targets).")
            first += self.probe.capture(inputs, targets, score, lambda batch: update_all(sums, batch), first)
        self._examples = first
        return self.space.join([s.total for s in sums if s.total is not None]) * self.scale

    def seconds_per_pass(self) -> float:
        """Seconds of one forward+backward pass of the mean loss over the data: the unit that costs are given in."""
        best = float("inf")
        for _ in range(3):
            start = self._clock()
            for inputs, targets in self.data:
                self.probe.loss_gradient(inputs, targets)
            best = min(best, self._clock() - start)
        return best


def _version_of(statistic: Statistic) -> int:
    return 0 if statistic.total is None else _version(statistic.total)


def _version(matrix: Tensor) -> int:
    """Counts in-place changes; tensors made under inference mode have no counter."""
    return 0 if matrix.is_inference() else matrix._version
