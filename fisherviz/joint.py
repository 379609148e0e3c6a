"""The dense Fisher of all probed layers together, accumulated over batches (DESIGN section 6, "Exact blocks").

Pairs of layers with one position each take the outer-product identity; the rest multiply their stacked per-example
gradients once for all pairs. Only the blocks on and above the diagonal are accumulated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisherviz.captures import AnyCapture, Batch
from fisherviz.layers import ParameterSpace
from fisherviz.products import GRADIENT_ENTRIES, block, gram


class JointBlocks:
    """Running sum of the whole Fisher in unit order; only its upper block triangle is kept up to date."""

    def __init__(self, space: ParameterSpace) -> None:
        self.space = space
        self.total: Tensor | None = None

    def update(self, batch: Batch) -> None:
        """Add a batch."""
        captures = [batch.captures[name] for name in self.space.names]
        if self.total is None:
            example = captures[0].gradients if not captures[0].factored else captures[0].a  # type: ignore[union-attr]
            dtype = torch.promote_types(example.dtype, torch.float32)
            self.total = torch.zeros(self.space.size, self.space.size, dtype=dtype, device=example.device)
        stacked = [i for i, capture in enumerate(captures) if not capture.factored]
        for i, row in enumerate(captures):
            for j in range(i, len(captures)):
                if i not in stacked and j not in stacked:
                    self._view(i, j).add_(block(row, captures[j]))
        if stacked:
            self._add_stacked(captures, stacked, batch.examples)

    def _view(self, i: int, j: int) -> Tensor:
        assert self.total is not None
        offsets = self.space.offsets
        return self.total[offsets[i] : offsets[i + 1], offsets[j] : offsets[j + 1]]

    def _add_stacked(self, captures: list[AnyCapture], stacked: list[int], n: int) -> None:
        """Pairs with an unfactored layer: one product of stacked gradients, then its blocks."""
        width = sum(self.space.sizes)
        step = max(1, GRADIENT_ENTRIES // (captures[0].vectors * width))
        sizes = [self.space.sizes[i] for i in stacked]
        for start in range(0, n, step):
            parts = [c.select(start, start + step) for c in captures]
            gradients = torch.cat([parts[i].gradients.flatten(0, 1) for i in stacked], 1)
            rows = [part for part in gram(gradients).split(sizes, 0)]
            for i, row in zip(stacked, rows, strict=True):
                for j, piece in zip(stacked, row.split(sizes, 1), strict=True):
                    if i <= j:
                        self._view(i, j).add_(piece)
            for i, part in enumerate(parts):
                if i in stacked:
                    continue
                cross = part.gradients.flatten(0, 1).T @ gradients
                for j, piece in zip(stacked, cross.split(sizes, 1), strict=True):
                    if i < j:
                        self._view(i, j).add_(piece)
                    else:
                        self._view(j, i).add_(piece.T)

    def finish(self, scale: float) -> Tensor:
        """The whole symmetric matrix in torch order, times `scale`."""
        assert self.total is not None
        out = self.total.mul_(scale)
        for i in range(len(self.space.layers)):
            for j in range(i + 1, len(self.space.layers)):
                self._view(j, i).copy_(self._view(i, j).T)
        index = torch.cat(
            [layer.torch_from_unit + start for layer, start in zip(self.space.layers, self.space.offsets, strict=False)]
        ).to(out.device)
        return out[index][:, index]
