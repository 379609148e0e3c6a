"""The exact Fisher in parts: blocks, unit blocks, the diagonal, the whole matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisherviz.exact.blocks import JointBlocks
from fisherviz.exact.passes import Consumer
from fisherviz.exact.products import Products
from fisherviz.network.space import ORDERS, Order
from fisherviz.statistics import Block, Diagonal, Statistic, UnitBlocks
from fisherviz.support.choices import one_of
from fisherviz.support.memory import require

KEPT = 3000
"""Matrices of more than this squared entries are not kept beside what the caller holds."""


class Parts(Products):
    """The Fisher as entries that are computed when asked for."""

    def block(self, row: str | int, col: str | int | None = None) -> Tensor:
        """Exact block between two layers in torch order, (P_row, P_col).

        Args:
            row: a layer's name or position.
            col: another; None: the diagonal block.

        Returns:
            The block.

        Raises:
            ValueError: no such layer.
            MemoryError: the block does not fit.
        """
        i = self.space.position(row)
        j = i if col is None else self.space.position(col)
        if (whole := self._held()) is not None:
            return self.space.part(whole, i, j).clone()
        self._plan_block(i, j)
        layers = list(dict.fromkeys((i, j)))
        return self._blocks(layers, (0, len(layers) - 1)).finish_block(self.scale)

    def unit_block(self, i: int, j: int) -> Tensor:
        """Exact block between the layers at two positions in unit order."""
        if (whole := self._held()) is not None:
            units = self.space.split(torch.arange(self.space.size, device=whole.device))
            return whole[units[i]][:, units[j]]
        self._plan_block(i, j)
        return self._given_away(Block(self.space.names[i], self.space.names[j]))

    def _given_away(self, wanted: Statistic) -> Tensor:
        """The mean of a statistic for the caller, who may change it; a large one is not kept beside that."""
        (statistic,) = self.collect([wanted])
        if statistic.mean.numel() <= KEPT**2:
            return statistic.mean * self.weight
        self.forget([statistic])
        return statistic.mean.mul_(self.weight)

    def _plan_block(self, i: int, j: int) -> None:
        space = self.space
        self._plan(space.sizes[i] * space.sizes[j], f"block {space.names[i]!r}, {space.names[j]!r}")

    def _plan(self, entries: int, what: str, double: int = 0) -> None:
        """Three copies of an array must fit, or two and some in float64."""
        size = entries * max(3 * self.empty.element_size(), 8 * double + self.empty.element_size())
        way_out = "ask for products, norms or solves instead (they never form it), or probe fewer layers="
        with self.processes.agreeing("the memory for a matrix"):
            require(size, self.network.device, what, way_out)

    def units(self, layer: str | int) -> Tensor:
        """Exact blocks of each output unit's weights with its bias last, (d_out, fan_in [+ 1], fan_in [+ 1]).

        Raises:
            NotImplementedError: the layer takes the generic path and has no units.
            MemoryError: they do not fit.
        """
        return self._given_away(UnitBlocks(self.space.names[self.space.position(layer)]))

    def diagonal(self) -> Tensor:
        """Diagonal of the matrix, flat in torch order, (P,)."""
        found = self.collect([Diagonal(name) for name in self.space.names])
        return self.space.join([s.mean for s in found]) * self.weight

    def to_dense(self, order: Order = "torch") -> Tensor:
        """The whole matrix, (P, P).

        Args:
            order: "torch", "unit" (each output unit's weights with its bias) or "input" (K-FAC's vec(W̄)).

        Raises:
            ValueError: the order is unknown.
            MemoryError: the matrix does not fit.
        """
        one_of("order", order, ORDERS)
        if order != "torch":
            return self.space.reorder_dense(self._whole(), order)
        # what is handed out belongs to the caller, who may change it: it is not what is kept
        whole = self._held()
        return self._made() if whole is None else whole.clone()

    def _whole(self) -> Tensor:
        """The whole matrix in torch order, for this class alone; kept unless it is large."""
        matrix = self._held()
        if matrix is None:
            matrix = self._made()
            if self.space.size <= KEPT:
                self._kept.matrix = matrix
        return matrix

    def _made(self) -> Tensor:
        """The whole matrix in torch order, computed."""
        self._plan(self.space.size**2, f"the dense {self.space.size:,} x {self.space.size:,} Fisher")
        return self._blocks(range(len(self.space.layers))).finish(self.scale)

    def _blocks(self, layers: Sequence[int], pair: tuple[int, int] | None = None) -> JointBlocks:
        """The blocks among some layers, or one pair of them, fed by a pass."""
        made: list[JointBlocks] = []

        def begin() -> Consumer:
            made.append(JointBlocks(self.space.over([self.space.layers[i] for i in layers]), pair))
            return made[-1].update

        self._pass(begin)
        made[-1].add_up(self.processes)
        return made[-1]
