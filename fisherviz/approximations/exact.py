"""The exact block of each layer: layer-wise natural gradient and TENGraD; everything between layers is zero.

Small blocks are dense; large ones stay in example space and are solved by Woodbury (Shrestha 2023, eq. 37-43).
"""

from __future__ import annotations

from fisherviz.approximations.base import Approximation, Values
from fisherviz.matrices.example_operator import ExampleSpace
from fisherviz.network.layers import Layer
from fisherviz.operators import Dense, Operator
from fisherviz.statistics import Block, Statistic
from fisherviz.statistics.examples import Examples
from fisherviz.statistics.products import block, working

DENSE_PARAMETERS = 4096
"""Blocks of at most this many parameters are held dense."""

MOST_DENSE_PARAMETERS = 10000
"""And up to this size where there are more gradients than parameters."""


class LayerWise(Approximation):
    """The exact Fisher block of every layer.

    Args:
        dense_parameters: blocks up to this size are dense, larger ones stay in example space.
    """

    handles_generic = True

    def __init__(self, dense_parameters: int = DENSE_PARAMETERS) -> None:
        super().__init__()
        self.dense_parameters = dense_parameters

    def wants_capture(self, layer: Layer) -> bool:
        """Large layers work from their capture."""
        return layer.size > self.dense_parameters

    def statistics(self, layer: Layer) -> dict[str, Statistic]:
        """The block itself, if small."""
        return {} if self.wants_capture(layer) else {"block": Block(layer.name, layer.name)}

    def operator_for(self, layer: Layer, values: Values) -> Operator:
        """F_ii."""
        if not self.wants_capture(layer):
            return Dense(values["block"])
        capture = values["capture"]
        capture = capture.to(working(capture.tensors[0]))
        if layer.size <= min(capture.vectors * capture.examples, MOST_DENSE_PARAMETERS):
            return Dense(block(capture, capture) / capture.examples)  # smaller than its Gram matrix
        return ExampleSpace(Examples([capture], 1.0 / capture.examples))
