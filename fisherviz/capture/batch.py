"""Captures of one batch, layer by layer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from fisherviz.capture.captures import AnyCapture
from fisherviz.capture.formed import formed
from fisherviz.support.counting import counted_as


@dataclass(frozen=True, eq=False)
class Batch:
    """Captures of one batch by layer name, with its number of examples.

    Attributes:
        captures: by layer name.
        examples: their number.
        first: position of the batch's first example in the data.
        later: whether the batch before had the same examples with other vectors: neither they nor their inputs count
            again.
        forming: layers whose per-example gradients are smaller than their inputs and pseudo-gradients, by name.
    """

    captures: dict[str, AnyCapture]
    examples: int
    first: int = 0
    later: bool = False
    forming: Collection[str] = ()
    _formed: dict[str, AnyCapture] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Memory held by all captures."""
        return sum(c.bytes for c in self.captures.values())

    def smaller(self, name: str) -> AnyCapture:
        """What sums over gradients need of a layer, in the smaller form; forming is counted by those who read it."""
        if name not in self.forming:
            return self.captures[name]
        if name not in self._formed:
            with counted_as(0):
                self._formed[name] = formed(self.captures[name])
        return self._formed[name]

    def slim(self) -> Batch:
        """The same with no layer that gradients are still to be formed of."""
        return replace(self, captures={name: self.smaller(name) for name in self.captures}, forming=(), _formed={})
