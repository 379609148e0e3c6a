"""CW-NGD: the blocks of one output unit (dense) or one output channel (convolution) with its bias; all else is zero.

Sang et al. 2022, eqs. 1-7 and algorithm 1; the paper puts the bias first, here it is last. With few eigenpairs of each
block and kind "empirical" it is TONGA's matrix (Le Roux et al. 2008), whose multiple of the identity is the damping.
"""

from __future__ import annotations

from torch import Tensor

from fisherviz.approximations.base import Approximation, Values
from fisherviz.approximations.example_units import ExampleUnits
from fisherviz.network.layers import Layer
from fisherviz.operators import Diagonal as DiagonalOperator
from fisherviz.operators import Operator
from fisherviz.operators import UnitBlocks as UnitBlocksOperator
from fisherviz.operators.factorise import eigh, symmetric
from fisherviz.statistics import Diagonal as DiagonalStatistic
from fisherviz.statistics import Statistic, UnitBlocks
from fisherviz.statistics.products import working
from fisherviz.support.choices import count, flag

FORMED_ENTRIES = 2**27
"""Unit blocks of a layer are formed while they have at most this many entries."""


class CWNGD(Approximation):
    """Component-wise: one exact block per output unit or channel, its bias included (Sang et al. 2022).

    Args:
        entrywise: keep the diagonal alone (the paper's special case).
        rank: keep so many leading eigenpairs of each block; None: all of it.
    """

    def __init__(self, entrywise: bool = False, rank: int | None = None) -> None:
        super().__init__()
        flag("entrywise", entrywise)
        if rank is not None:
            count("rank", rank)
            if entrywise:
                raise ValueError("entrywise=True keeps a diagonal, which has no rank to choose; leave rank out.")
        self.entrywise, self.rank = entrywise, rank

    def takes_tied(self, layer: Layer) -> bool:
        """Unit blocks are exact, whatever the uses of a weight."""
        return True

    def wants_capture(self, layer: Layer) -> bool:
        """Wide layers keep their inputs instead of their blocks."""
        return not self.entrywise and self.rank is None and layer.structured and _wide(layer)

    def statistics(self, layer: Layer) -> dict[str, Statistic]:
        """Unit blocks, or the diagonal."""
        if self.entrywise:
            return {"diagonal": DiagonalStatistic(layer.name)}
        if self.rank is not None and _wide(layer):
            raise MemoryError(
                f"layer {layer.name!r} has {layer.d_out} unit blocks of {layer.da} x {layer.da}, more entries than are "
                f"formed ({FORMED_ENTRIES:,}) to take their eigenpairs; leave rank= out, or probe the other layers."
            )
        return {} if self.wants_capture(layer) else {"units": UnitBlocks(layer.name)}

    def operator_for(self, layer: Layer, values: Values) -> Operator:
        """E[g_o² ā āᵀ] for each unit o, or its leading eigenpairs."""
        if self.entrywise:
            return DiagonalOperator(values["diagonal"])
        if self.rank is not None:
            return UnitBlocksOperator(_leading(values["units"], self.rank))
        if not self.wants_capture(layer):
            return UnitBlocksOperator(values["units"])
        capture = values["capture"]
        return ExampleUnits(capture.to(working(capture.tensors[0])), 1 / capture.examples)


def _wide(layer: Layer) -> bool:
    return layer.d_out * layer.da**2 > FORMED_ENTRIES


def _leading(blocks: Tensor, rank: int) -> Tensor:
    """The best semidefinite matrices of a rank, in any unitarily invariant norm, for blocks (units, da, da)."""
    values, vectors = eigh(blocks, "the block of a unit")
    root = vectors[..., -rank:] * values[..., -rank:].clamp_min(0).sqrt().unsqueeze(-2)
    return symmetric(root @ root.mT)
