"""The dense Fisher of all probed layers together, accumulated over batches.

Pairs of layers with one position each take the outer-product identity and are kept as their products come out; the rest
multiply their stacked per-example gradients once for all pairs. Everything is written once, straight into torch order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisherviz.capture.batch import Batch
from fisherviz.capture.captures import AnyCapture, Capture
from fisherviz.network.space import ParameterSpace
from fisherviz.operators.finite import require_finite
from fisherviz.statistics.products import GRADIENT_ENTRIES, block, cross_block, gram, half_block, write_half
from fisherviz.support.memory import at_once
from fisherviz.support.processes import Processes


class JointBlocks:
    """Running sums of blocks; `finish` writes the whole matrix, `finish_block` a single one.

    Args:
        space: the layers.
        pair: the one block that is wanted; None: all on and above the diagonal.
    """

    def __init__(self, space: ParameterSpace, pair: tuple[int, int] | None = None) -> None:
        self.space = space
        self.pair = pair
        self.blocks: dict[tuple[int, int], Tensor] = {}
        self.factored: set[int] = set(range(len(space.layers)))
        """Layers whose blocks among themselves are kept by output and input pairs, not by parameters."""

    def update(self, batch: Batch) -> None:
        """Add a batch."""
        captures = [batch.smaller(name) for name in self.space.names]
        stacked = [i for i, capture in enumerate(captures) if not capture.factored]
        self._settle(stacked)
        stacked = [i for i in range(len(captures)) if i not in self.factored]
        if self.pair is not None and stacked:
            i, j = self.pair
            self._add(i, j, block(captures[i], captures[j]))
            return
        for i, row in enumerate(captures):
            for j in range(i, len(captures)):
                col = captures[j]
                if i in self.factored and j in self.factored and self.pair in (None, (i, j)):
                    assert isinstance(row, Capture)
                    assert isinstance(col, Capture)
                    self._add(i, j, half_block(row) if i == j else cross_block(row, col))
        if stacked:
            self._add_stacked(captures, stacked, batch.examples)

    def _settle(self, stacked: list[int]) -> None:
        """A layer that turns out to have several positions leaves the factored ones; its sums are rewritten."""
        leaving = self.factored & set(stacked)
        for i, j in [pair for pair in self.blocks if set(pair) & leaving and set(pair) <= self.factored]:
            self.blocks[i, j] = self._unit_block(i, j)
        self.factored -= leaving

    def _add(self, i: int, j: int, part: Tensor) -> None:
        if (i, j) in self.blocks:
            self.blocks[i, j] += part
        else:
            self.blocks[i, j] = part.float() if part.dtype in (torch.float16, torch.bfloat16) else part

    def _add_stacked(self, captures: list[AnyCapture], stacked: list[int], n: int) -> None:
        """Pairs with an unfactored layer: one product of stacked gradients, then its blocks."""
        step = max(1, at_once(GRADIENT_ENTRIES, captures[0].tensors[0]) // (captures[0].vectors * self.space.size))
        sizes = [self.space.sizes[i] for i in stacked]
        for start in range(0, n, step):
            parts = [c.select(start, start + step) for c in captures]
            gradients = torch.cat([parts[i].gradients.flatten(0, 1) for i in stacked], 1)
            for i, row in zip(stacked, gram(gradients).split(sizes, 0), strict=True):
                for j, piece in zip(stacked, row.split(sizes, 1), strict=True):
                    if i <= j:
                        self._add(i, j, piece.clone())
            for i in self.factored:
                cross = parts[i].gradients.flatten(0, 1).T @ gradients
                for j, piece in zip(stacked, cross.split(sizes, 1), strict=True):
                    self._add(min(i, j), max(i, j), piece.clone() if i < j else piece.T.clone())

    def _unit_block(self, i: int, j: int) -> Tensor:
        """A block kept by pairs, by parameters in unit order."""
        kept = self.blocks[i, j]
        rows, cols = self.space.layers[i].matrix_shape, self.space.layers[j].matrix_shape
        out = kept.new_empty(self.space.sizes[i], self.space.sizes[j])
        if i == j:
            write_half(kept, [(out.view(*rows, *cols), slice(None), slice(None))], *rows)
        else:
            out.view(*rows, *cols).copy_(kept.transpose(1, 2))
        return out

    def add_up(self, processes: Processes) -> None:
        """Make of this process's sums those of all; a layer counts as factored where it is in all of them."""
        if processes.count == 1:
            return
        self._settle(list(self.factored.difference(self.factored.intersection(*processes.exchange(self.factored)))))
        pairs = sorted(set().union(*processes.exchange(set(self.blocks))))
        totals = processes.add_up([self.blocks.get(pair) for pair in pairs])
        self.blocks = {pair: total for pair, total in zip(pairs, totals, strict=True) if total is not None}

    def finish(self, scale: float) -> Tensor:
        """The whole symmetric matrix in torch order, times `scale`."""
        example = next(iter(self.blocks.values()))
        out = example.new_empty(self.space.size, self.space.size)
        for i, j in list(self.blocks):
            units = self._popped(i, j)
            self._write(out, units, i, j, scale, whole=True)
            if i != j:
                for p in self.space.of(i):
                    for q in self.space.of(j):
                        out[q.flat, p.flat] = out[p.flat, q.flat].T
        return out

    def finish_block(self, scale: float) -> Tensor:
        """The wanted block in torch order, times `scale`."""
        assert self.pair is not None
        i, j = self.pair
        units = self._popped(i, j)
        out = units.new_empty(self.space.sizes[i], self.space.sizes[j])
        self._write(out, units, i, j, scale, whole=False)
        return out

    def _popped(self, i: int, j: int) -> Tensor:
        names = " and ".join(dict.fromkeys(f"layer {self.space.names[k]!r}" for k in (i, j)))
        require_finite(self.blocks[i, j], f"{names}: the exact block")
        return self.blocks.pop((i, j))

    def _write(self, out: Tensor, kept: Tensor, i: int, j: int, scale: float, *, whole: bool) -> None:
        """Write a block as it was kept into a torch-order matrix; see `ParameterSpace.targets`."""
        row, col = self.space.layers[i], self.space.layers[j]
        if i == j and i in self.factored and not self.space.lies_as_matrix(i):
            self.blocks[i, i] = kept
            kept = self._unit_block(i, i).view(*row.matrix_shape, *col.matrix_shape).transpose(1, 2)
            self.space.write_block(out, kept.transpose(1, 2), i, i, scale, whole=whole)
        elif not {i, j} <= self.factored:
            self.space.write_block(out, kept.view(*row.matrix_shape, *col.matrix_shape), i, j, scale, whole=whole)
        elif i == j:
            write_half(kept, self.space.targets(out, i, i, whole), *row.matrix_shape, scale)
        else:
            self.space.write_block(out, kept.transpose(1, 2), i, j, scale, whole=whole)
