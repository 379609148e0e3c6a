"""What earlier requests to an exact Fisher have left for later ones."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fisherviz.capture.batch import Batch
from fisherviz.capture.captures import AnyCapture
from fisherviz.capture.joined import concatenate
from fisherviz.network.layers import Layer
from fisherviz.operators.factorise import DampedCholesky
from fisherviz.statistics import Statistic
from fisherviz.statistics.examples import Woodbury
from fisherviz.support.processes import Processes


@dataclass
class Held:
    """Captures of all examples: this process's batch by batch, and all as one where somebody has read them so.

    Args:
        own: of this process's share of each batch of the data.
        vectors: the most backpropagated vectors of an example, in any process.
        uneven: whether batches differ in their numbers of these.
        ragged: whether batches differ in their numbers of positions, so that passes must not read them as one.
        processes: that hold the others.
        slopes: whether they were taken with slopes.
        formed: layers of which per-example gradients are kept alone, by name.
    """

    own: list[Batch]
    vectors: int
    uneven: bool
    ragged: bool
    processes: Processes
    slopes: bool = False
    formed: Collection[str] = ()
    _whole: dict[str, AnyCapture] | None = None

    def whole(self, device: torch.device) -> dict[str, AnyCapture]:
        """One capture of all processes' examples for each layer, in the order of the data; all processes ask for it."""
        if self._whole is None:
            with self.processes.agreeing("the captures of all examples"):
                alone, equal = self.processes.count == 1, not (self.ragged or self.uneven)
                self._whole = self._joined() if alone and equal else self._gathered(device)
            if alone:
                self.own = [Batch(self._whole, sum(batch.examples for batch in self.own))]  # not two copies
        return self._whole

    def _gathered(self, device: torch.device) -> dict[str, AnyCapture]:
        """The same of all processes, or of batches that differ in their shapes."""
        gathered = self.processes.gather(self.own, device)
        batches = sorted((batch for part in gathered for batch in part), key=lambda batch: batch.first)
        return {name: concatenate([batch.captures[name] for batch in batches]) for name in batches[0].captures}

    def _joined(self) -> dict[str, AnyCapture]:
        """The same of equal batches of one process, layer by layer: of one alone there are two copies at a time."""
        whole: dict[str, AnyCapture] = {}
        for name in list(self.own[0].captures):
            sizes = [batch.captures[name].examples for batch in self.own]
            whole[name] = concatenate([batch.captures[name] for batch in self.own])
            places = itertools.pairwise(itertools.accumulate(sizes, initial=0))
            self.own = [
                replace(batch, captures=batch.captures | {name: whole[name].select(*place)})
                for batch, place in zip(self.own, places, strict=True)
            ]
        return whole

    def show(self, statistics: Iterable[Statistic]) -> bool:
        """Whether statistics can be made from them, with no pass over the data."""
        return not self.ragged and not any(
            (s.needs_slopes and not self.slopes) or (s.needs_rows and any(name in self.formed for name in s.layers))
            for s in statistics
        )

    def of_vectors(self, start: int, stop: int) -> Held:
        """Those of vectors start..stop."""
        own = [replace(batch, captures=_of_vectors(batch.captures, start, stop)) for batch in self.own]
        whole = None if self._whole is None else _of_vectors(self._whole, start, stop)
        return replace(self, own=own, vectors=stop - start, _whole=whole)


def _of_vectors(captures: Mapping[str, AnyCapture], start: int, stop: int) -> dict[str, AnyCapture]:
    return {name: capture.select_vectors(start, stop) for name, capture in captures.items()}


@dataclass
class Kept:
    """What is kept, valid for one set of the layers' paths."""

    layers: tuple[Layer, ...]
    statistics: dict[Hashable, tuple[Statistic, int]] = field(default_factory=dict)
    held: Held | None = None
    """Captures of all examples, where they fit."""
    verified: bool = False
    """Whether forward mode has agreed with reverse mode on all of the data."""
    joint: dict[str, AnyCapture] | None = None
    """Captures with the scores of the data's labels as the last vector."""
    square_norms: dict[tuple[int, int], float] = field(default_factory=dict)
    """Of blocks, squared Frobenius norms without the scale, by positions i <= j."""
    gradient: Tensor | None = None
    """Summed over the examples, flat in torch order."""
    matrix: Tensor | None = None
    """Dense, in torch order; never handed out."""
    solver: tuple[tuple[str, float], DampedCholesky | Woodbury] | None = None

    def knows(self, key: Hashable) -> bool:
        """Whether a statistic is there, as it was made."""
        if key not in self.statistics:
            return False
        statistic, version = self.statistics[key]
        return version == version_of(statistic)


def version_of(statistic: Statistic) -> int:
    """Counts in-place changes; tensors made under inference mode have no counter."""
    total = statistic.total
    return 0 if total is None or total.is_inference() else total._version
