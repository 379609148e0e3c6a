"""CW-NGD: the blocks of one output unit (dense) or one output channel (convolution) with its bias; all else is zero.

Sang et al. 2022, eqs. 1-7 and algorithm 1; the paper puts the bias first, here it is last.
"""

from __future__ import annotations

from fisherviz.approximations.base import Approximation, Values
from fisherviz.approximations.example_units import ExampleUnits
from fisherviz.network.layers import Layer
from fisherviz.operators import Diagonal as DiagonalOperator
from fisherviz.operators import Operator
from fisherviz.operators import UnitBlocks as UnitBlocksOperator
from fisherviz.statistics import Diagonal as DiagonalStatistic
from fisherviz.statistics import Statistic, UnitBlocks
from fisherviz.statistics.products import working
from fisherviz.support.choices import flag

FORMED_ENTRIES = 2**27
"""Unit blocks of a layer are formed while they have at most this many entries."""


class CWNGD(Approximation):
    """Component-wise: one exact block per output unit or channel, its bias included (Sang et al. 2022).

    Args:
        entrywise: keep the diagonal alone (the paper's special case).
    """

    def __init__(self, entrywise: bool = False) -> None:
        super().__init__()
        flag("entrywise", entrywise)
        self.entrywise = entrywise

    def takes_tied(self, layer: Layer) -> bool:
        """Unit blocks are exact, whatever the uses of a weight."""
        return True

    def wants_capture(self, layer: Layer) -> bool:
        """Wide layers keep their inputs instead of their blocks."""
        return not self.entrywise and layer.structured and layer.d_out * layer.da**2 > FORMED_ENTRIES

    def statistics(self, layer: Layer) -> dict[str, Statistic]:
        """Unit blocks, or the diagonal."""
        if self.entrywise:
            return {"diagonal": DiagonalStatistic(layer.name)}
        return {} if self.wants_capture(layer) else {"units": UnitBlocks(layer.name)}

    def operator_for(self, layer: Layer, values: Values) -> Operator:
        """E[g_o² ā āᵀ] for each unit o."""
        if self.entrywise:
            return DiagonalOperator(values["diagonal"])
        if not self.wants_capture(layer):
            return UnitBlocksOperator(values["units"])
        capture = values["capture"]
        return ExampleUnits(capture.to(working(capture.tensors[0])), 1 / capture.examples)
