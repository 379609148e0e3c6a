"""Two approximations that only optimizers use: the dense exact Fisher, and unit blocks of one batch.

`ExactFisher` couples all layers (small networks). `BatchUnits` is CW-NGD's algorithm 1 (Sang et al. 2022); its
blocks stay unformed until the damping is known, which decides the precision that they need (`ExampleUnits`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from fisherviz.approximations import CWNGD as UnitApproximation
from fisherviz.approximations import Approximation, Values
from fisherviz.approximations.base import Couplings
from fisherviz.approximations.example_units import ExampleUnits
from fisherviz.matrices.layered import LayeredMatrix, full_matrix
from fisherviz.network.layers import Layer
from fisherviz.network.space import ParameterSpace
from fisherviz.operators import Dense, Operator
from fisherviz.statistics import Block, Statistic

DENSE_PARAMETERS = 6000


class ExactFisher(Approximation):
    """The exact Fisher of all layers together, dense."""

    name = "exact"
    handles_generic = True

    def prepare(self, layers: Sequence[Layer], positions: Mapping[str, int]) -> None:
        """Refuse networks whose Fisher is better not written down."""
        size = sum(layer.size for layer in layers)
        if size > DENSE_PARAMETERS:
            raise MemoryError(
                f"the dense Fisher of {size:,} parameters takes a {size:,} x {size:,} Cholesky "
                f"factorisation every step; "
                "use SubsampledNaturalGradient, which works in the space of the examples."
            )

    def statistics(self, layer: Layer) -> dict[str, Statistic]:
        """The layer's own block."""
        return {"block": Block(layer.name, layer.name)}

    def operator_for(self, layer: Layer, values: Values) -> Operator:
        """F_ii."""
        return Dense(values["block"])

    def pairs(self, layers: Sequence[Layer], adjacent: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
        """Every pair."""
        return list(itertools.combinations(range(len(layers)), 2))

    def pair_statistics(self, row: Layer, col: Layer) -> dict[str, Statistic]:
        """F_ij."""
        return {"block": Block(row.name, col.name)}

    def assemble(self, space: ParameterSpace, operators: Sequence[Operator], couplings: Couplings) -> LayeredMatrix:
        """F."""
        return full_matrix(space, operators, {pair: Dense(v["block"]) for pair, v in couplings.items()})


class BatchUnits(UnitApproximation):
    """CW-NGD's unit blocks of one batch, over fan-in or over examples."""

    name = "cw-ngd"

    def wants_capture(self, layer: Layer) -> bool:
        """The space is chosen from the capture's size."""
        return layer.structured

    def statistics(self, layer: Layer) -> dict[str, Statistic]:
        """None beside the capture."""
        return {}

    def operator_for(self, layer: Layer, values: Values) -> Operator:
        """E[g_o² ā āᵀ] for each unit o."""
        capture = values["capture"]
        return ExampleUnits(capture, 1.0 / capture.examples)
