"""Structure: the verdict on a network, which layer takes which path and how; frozen, and replaced as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from fisherviz.capture.calls import Layout
from fisherviz.capture.formed import are_smaller
from fisherviz.capture.ways import Ways
from fisherviz.network.layers import Layer
from fisherviz.network.space import ParameterSpace


@dataclass(frozen=True, eq=False)
class Structure:
    """What is known of a network, from its classes alone until it has been looked at.

    Attributes:
        layers: the probed layers, each with its path.
        space: their parameters as one vector.
        looked: whether the network has been seen running.
        looks: how often it was looked at.
        layouts: where the examples of each structured layer stand, as evidence has it.
        positions: weight-sharing positions of each structured layer.
        neighbours: names of structured layers that follow one another in execution (K-FAC's chain).
        is_chain: whether each layer is fed by the one before it alone.
        one_at_a_time: whether per-example gradients loop over examples, because `vmap` was found wrong.
        forward_mode: whether forward-mode derivatives are right; None: not tried yet.
        undecided: structured layers whose gradients vanished on all examples that were looked at.
        ways: which ways forwards have gone that layers were looked at in.
        example_output: output of one example, (1, ...).
        example_bytes: memory of one example's captures: fixed, and per backpropagated vector.
    """

    layers: tuple[Layer, ...]
    space: ParameterSpace
    looked: bool = False
    looks: int = 0
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    positions: Mapping[str, int] = field(default_factory=dict)
    neighbours: tuple[tuple[str, str], ...] = ()
    is_chain: bool = True
    one_at_a_time: bool = False
    forward_mode: bool | None = None
    undecided: frozenset[str] = frozenset()
    ways: Ways = frozenset()
    example_output: Tensor | None = None
    example_bytes: tuple[int, int] = (1, 1)

    @property
    def generic(self) -> tuple[Layer, ...]:
        """Layers without structure."""
        return tuple(layer for layer in self.layers if not layer.structured)

    def forming(self, vectors: int) -> frozenset[str]:
        """Names of the layers whose per-example gradients are smaller than what they are made of.

        Args:
            vectors: backpropagated vectors K of an example.
        """
        return frozenset(x.name for x in self.layers if are_smaller(x, self.positions.get(x.name, 1), vectors))

    def without(self, whys: Mapping[str, str]) -> Structure:
        """The verdict that layers have no structure after all.

        Args:
            whys: the reason by the layer's name; layers that have none already keep theirs.
        """
        layers = tuple(
            replace(layer, structured=False, note=whys[layer.name])
            if layer.structured and layer.name in whys
            else layer
            for layer in self.layers
        )
        gone = {layer.name for layer in layers if not layer.structured}
        return replace(
            self,
            layers=layers,
            space=self.space.over(layers),
            positions={name: T for name, T in self.positions.items() if name not in gone},
            neighbours=tuple(pair for pair in self.neighbours if not gone & set(pair)),
            undecided=self.undecided - gone,
        )


class PathChanged(Exception):
    """Layers left the structured path in the middle of a pass: what was summed so far must be summed again."""

    def __init__(self, structure: Structure) -> None:
        super().__init__("the structure of the network changed during a pass.")
        self.structure = structure
