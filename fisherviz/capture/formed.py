"""Per-example gradients of a layer with structure, where these are smaller than what they are made of.

A convolution of few channels on many pixels holds T (da + K dg) numbers of an example as inputs and pseudo-gradients,
and K dg da as gradients; a normalisation likewise. Whatever is a sum over gradients is then cheaper from them, too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from fisherviz.capture.captures import AnyCapture, Capture, GenericCapture
from fisherviz.network.layers import Layer


@dataclass(frozen=True, eq=False)
class FormedCapture(GenericCapture):
    """Per-example gradients (K, N, P), in unit order, of a layer whose W̄ has a width.

    Attributes:
        width: of W̄, or of a group's rows of it.
        summed: number T of positions that each gradient is a sum over.
    """

    width: int
    summed: int

    @property
    def matrices(self) -> Tensor:
        """The gradients as matrices (K N, units, da)."""
        return self.rows.unflatten(1, (-1, self.width))

    @property
    def operations(self) -> int:
        """Of forming them, a multiply-add as two: of those who read what was formed before, each counts it."""
        return 2 * self.summed * self.gradients.numel()

    def units(self, start: int, stop: int) -> FormedCapture:
        """Rows start..stop of W̄."""
        return replace(self, gradients=self.gradients[..., start * self.width : stop * self.width])


def are_smaller(layer: Layer, positions: int, vectors: int) -> bool:
    """Whether an example's gradients of a layer have fewer entries than its inputs and pseudo-gradients.

    Args:
        layer: of a network that has been looked at.
        positions: weight-sharing positions T; where there is one, without groups, a gradient is an outer product.
        vectors: K.
    """
    outer = positions == 1 and layer.groups == 1
    if not layer.structured or layer.one_hot or layer.both_ways or outer:
        return False
    return vectors * layer.size < positions * (layer.groups * layer.da + vectors * layer.d_out)


def formed(capture: AnyCapture) -> AnyCapture:
    """The gradients of a capture of inputs and pseudo-gradients; others as they are."""
    return FormedCapture(capture.gradients, capture.width, capture.positions) if type(capture) is Capture else capture
