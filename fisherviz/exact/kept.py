"""What earlier requests to an exact Fisher have left for later ones."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor

from fisherviz.capture.captures import AnyCapture, Batch
from fisherviz.capture.joined import concatenate
from fisherviz.network.layers import Layer
from fisherviz.operators.factorise import DampedCholesky
from fisherviz.statistics import Statistic
from fisherviz.statistics.examples import Woodbury


@dataclass
class Held:
    """Captures of all examples, batch by batch until somebody reads them as one: that copies them all.

    Args:
        batches: of the data.
        ragged: whether they differ in their numbers of positions, so that passes must not read them as one batch.
    """

    batches: list[Batch]
    ragged: bool

    @property
    def columns(self) -> int:
        """Examples times backpropagated vectors, of the batch that has most of these."""
        vectors = max(next(iter(batch.captures.values())).vectors for batch in self.batches)
        return vectors * sum(batch.examples for batch in self.batches)

    def whole(self) -> dict[str, AnyCapture]:
        """One capture for each layer."""
        if len(self.batches) > 1:
            names = self.batches[0].captures
            made = {name: concatenate([batch.captures[name] for batch in self.batches]) for name in names}
            self.batches = [Batch(made, sum(batch.examples for batch in self.batches))]
        return self.batches[0].captures


@dataclass
class Kept:
    """What is kept, valid for one set of the layers' paths."""

    layers: tuple[Layer, ...]
    statistics: dict[Hashable, tuple[Statistic, int]] = field(default_factory=dict)
    held: Held | None = None
    """Captures of all examples, where they fit."""
    joint: dict[str, AnyCapture] | None = None
    """Captures with the scores of the data's labels as the last vector."""
    gradient: Tensor | None = None
    """Summed over the examples, flat in torch order."""
    matrix: Tensor | None = None
    """Dense, in torch order; never handed out."""
    solver: tuple[tuple[str, float], DampedCholesky | Woodbury] | None = None
