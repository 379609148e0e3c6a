"""What takes a second moment of pseudo-gradients from a layer to the one before it: slopes, weights, and the evidence.

g = f'(h) ∘ Wᵀ g₊ holds for each example where the output h goes through an element-wise f to the next layer alone,
which is a matrix W and nothing else (Botev et al. 2017, equation 8 for the Gauss-Newton matrix).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisherviz.capture.agreement import close
from fisherviz.capture.captures import AnyCapture, Capture
from fisherviz.statistics.base import Statistic
from fisherviz.statistics.products import gram


class SlopeMoment(Statistic):
    """Second moment E[f'(h) f'(h)ᵀ] of the slopes behind a layer (dg, dg); zero where `Misfit` finds none."""

    needs_gradients = False
    needs_slopes = True

    def contribution(self, *captures: AnyCapture) -> Tensor:
        """Sum over the batch."""
        row = captures[0]
        assert isinstance(row, Capture)
        if row.slopes is None:
            return row.g.new_zeros(row.g.shape[-1], row.g.shape[-1])
        return gram(row.slopes.to(row.g.dtype))


class _OfWeight(Statistic):
    """A statistic of two layers and the second one's weight.

    Args:
        row: name of the layer before.
        col: name of the layer whose weight it is.
        weight: (d_out, d_in).
    """

    def __init__(self, row: str, col: str, weight: Tensor) -> None:
        super().__init__(row, col)
        self.weight = weight


class NextWeight(_OfWeight):
    """The weight of the next layer as it was in the passes, with a 1: flat, (d_out d_in + 1).

    A mean over examples of which some have not run the layer, or one that wanes, is divided by its last entry.
    """

    needs_gradients = False

    def contribution(self, *captures: AnyCapture) -> Tensor:
        """The weight for each example of the batch."""
        entries = self.weight.detach().reshape(-1).to(captures[0].tensors[0].dtype)
        return torch.cat([entries, entries.new_ones(1)]) * captures[0].examples

    def blend(self, other: Statistic, decay: float) -> None:
        """The newest: averages of squares of earlier weights are in nothing else."""
        super().blend(other, 0.0)


class Misfit(_OfWeight):
    """The share of examples in batches of which g = f'(h) ∘ Wᵀ g₊ does not hold, (1,)."""

    needs_slopes = True

    def contribution(self, *captures: AnyCapture) -> Tensor:
        """The examples of the batch, or none."""
        row, col = captures
        assert isinstance(row, Capture)
        assert isinstance(col, Capture)
        fits = False
        if row.slopes is not None:
            expected = row.slopes * (col.g[:, :, 0] @ self.weight.detach().to(col.g.dtype))
            fits = close(row.g[:, :, 0].to(row.slopes.dtype), expected.to(row.slopes.dtype))
        return row.g.new_full((1,), 0.0 if fits else row.examples)
