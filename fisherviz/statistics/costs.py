"""How large a layer's captures are, and what the identities behind the statistics cost on them, before anything runs.

Counts are multiply-adds of matrix products and factorisations, symmetric ones halved as `products` halves them; entries
are numbers held. Both follow `capture.captures`, `statistics.products` and `statistics.gradients` case by case.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from fisherviz.capture.formed import are_smaller
from fisherviz.network.layers import Layer
from fisherviz.statistics.base import Statistic
from fisherviz.statistics.gradients import pairwise_is_cheaper
from fisherviz.statistics.moments import (
    Block,
    CrossInputFactor,
    CrossOutputFactor,
    InputFactor,
    OutputFactor,
    UnitBlocks,
)
from fisherviz.statistics.products import GRADIENT_ENTRIES, ROW_ENTRIES, STRIP, STRIP_ENTRIES, strip_width
from fisherviz.statistics.recursion import Misfit, NextWeight, SlopeMoment
from fisherviz.support.memory import require

CaptureKind = Literal["outer", "shared", "grouped", "tokens", "formed", "gradients"]
EIGEN = 4.5
"""Multiply-adds of a product that take as long as an eigendecomposition, over n³."""
CHOLESKY = 1 / 6
"""Multiply-adds of a Cholesky factorisation, over n³."""


@dataclass(frozen=True)
class LayerCosts:
    """What one layer's captures over all examples hold, and what is made of them costs.

    Attributes:
        kind: "outer" where every gradient is one outer product, "shared" where positions share the weight, "grouped",
            "tokens" for one-hot inputs, "formed" where gradients are smaller and kept in their place, "gradients" where
            these are captured themselves.
        size: P, parameters of the layer.
        da: width of W̄, or of a group's rows.
        dg: rows of W̄, or of a group's.
        positions: T.
        groups: of a grouped convolution, or 1.
        examples: N.
        vectors: K.
        most: entries of stacked gradients that are held at once.
        tied: whether half of the positions use W̄ as a Linear's weight, and not as a table.
    """

    kind: CaptureKind
    size: int
    da: int
    dg: int
    positions: int
    groups: int
    examples: int
    vectors: int
    most: int = GRADIENT_ENTRIES
    tied: bool = False

    @property
    def columns(self) -> int:
        """K N, gradients of all examples and vectors."""
        return self.vectors * self.examples

    @property
    def captured(self) -> int:
        """Entries of the captures."""
        return self.columns * self.size if self.kind == "formed" else self.shown

    @property
    def shown(self) -> int:
        """Entries of what a pass shows of the layer before gradients are formed."""
        if self.kind == "gradients":
            return self.columns * self.size
        if self.tied:  # positions and weights, and the width twice: as pseudo-gradients and as inputs
            width, vocabulary = self.dg, self.size // self.dg
            return self.positions // 2 * (self.examples * (2 + width) + self.columns * (width + vocabulary))
        inputs = 2 if self.kind == "tokens" else self.groups * self.da
        return self.positions * (self.examples * inputs + self.columns * self.groups * self.dg)

    @property
    def forming(self) -> float:
        """Multiply-adds that form all gradients of what is kept."""
        if self.tied:
            return self.columns * (self.positions // 2) * self.size
        if self.kind in ("formed", "gradients", "tokens"):
            return 0
        return self.columns * self.positions * self.size

    @property
    def acting(self) -> int:
        """Parameters that some example's gradient is not zero at: of a table the rows that are read, at most."""
        return self.dg * min(self.da, self.examples * self.positions) if self._read else self.size

    @property
    def _read(self) -> bool:
        """Whether it is a table whose rows are read alone."""
        return self.kind == "tokens" and not self.tied

    @property
    def formed(self) -> int:
        """Entries held while gradients are formed, as many as are formed at once, and then copied by vectors."""
        copied = 0 if self.vectors == 1 or self._read else max(self.gradients, self.stacked)
        return self.gradients + copied

    @property
    def gradients(self) -> int:
        """Entries of gradients that are formed at once."""
        most = min(self.most, ROW_ENTRIES) if self._read else self.most
        return 0 if self.kind in ("outer", "formed") else min(self.columns * self.acting, most)

    @property
    def squared(self) -> int:
        """Entries held while gradients are squared: of a table those of what is read, weighted, by rows, squared."""
        if self.kind == "outer":
            return self.columns * self.dg
        return 3 * self.columns * self.positions * self.dg if self._read else self.gradients + self.stacked

    @property
    def stacked(self) -> int:
        """Entries of pseudo-gradients in the order that gradients are formed in."""
        if self.kind != "shared" or self.vectors == 1:
            return 0
        return self.gradients * self.positions // self.da

    @property
    def product(self) -> float:
        """Multiply-adds of Uᵀ v, and of U w, for one column."""
        if self.kind in ("outer", "shared"):
            return self.examples * self.positions * self.dg * (self.da + self.vectors)
        if self.tied:
            read, used = self.columns * self.dg, self.examples * (self.size + self.size // self.dg * self.vectors)
            return self.positions // 2 * (read + used)
        if self.kind == "tokens":
            return self.columns * self.positions * self.dg
        return self.forming + self.columns * self.size

    @property
    def gram(self) -> float:
        """Multiply-adds of UᵀU."""
        n, k, t = self.examples, self.vectors, self.positions
        if self.kind == "outer":
            own, others = k * symmetric_cost(self.dg, n), k * (k - 1) // 2 * n * n * self.dg
            return symmetric_cost(self.da, n) + own + others
        if self.pairwise:
            return n * n * t * t * (self.da + k * k * (self.dg + 1))
        return self.forming + symmetric_cost(self.acting, self.columns)

    def strips(self, step: int) -> float:
        """Multiply-adds of UᵀU from the diagonal to the right, in strips of so many examples."""
        return sum(self._strip(n, min(step, n)) for n in range(self.examples, 0, -step))

    def _strip(self, n: int, m: int) -> float:
        """Rows of m examples against n."""
        if m == n:
            return replace(self, examples=n).gram
        k, t = self.vectors, self.positions
        if self.kind == "outer":
            return m * n * (self.da + k * k * self.dg)
        if replace(self, examples=n).pairwise:
            return m * n * t * t * (self.da + k * k * (self.dg + 1))
        return self.forming * n / self.examples + k * k * m * n * replace(self, examples=n).acting

    @property
    def pairwise(self) -> bool:
        """Whether the Gram matrix is made of products of positions, pair by pair."""
        sizes = self.examples, self.vectors, self.positions, self.da, self.dg
        return self.kind == "shared" and pairwise_is_cheaper(*sizes)

    @property
    def diagonal(self) -> float:
        """Multiply-adds of the diagonal."""
        return self.examples * self.size if self.kind == "outer" else self.forming

    @property
    def units(self) -> float:
        """Multiply-adds of the unit blocks."""
        if self.kind == "outer":
            return self.dg * symmetric_cost(self.examples, self.da)
        return self.forming + self.groups * self.dg * symmetric_cost(self.columns, self.da)


def symmetric_cost(rows: int, n: int) -> float:
    """Multiply-adds of a second moment (n, n) of rows, as `products.gram` halves it."""
    if n <= 2 * STRIP or rows * n < STRIP_ENTRIES:
        return rows * n * n
    return rows * n * (n + strip_width(n)) / 2


def block_cost(row: LayerCosts, col: LayerCosts) -> float:
    """Multiply-adds of the exact block between two layers, or of a layer's own."""
    if row.kind == col.kind == "outer":
        half = 2 if row is col else 1
        n, k = row.examples, row.vectors
        return n * (k * row.dg * col.dg + row.dg * col.dg * row.da * col.da / half) / half
    if row is col:
        return row.forming + symmetric_cost(row.columns, row.size)
    return row.forming + col.forming + row.columns * row.size * col.size


def entries(statistic: Statistic, row: Layer, col: Layer) -> int:
    """Entries that a statistic holds.

    Args:
        statistic: of two layers, or of one.
        row: the first.
        col: the last.
    """
    if not row.structured:
        return row.size * col.size if isinstance(statistic, Block) else row.size
    dg, width = row.d_out // row.groups, row.da
    if isinstance(statistic, InputFactor | OutputFactor) and row.both_ways:
        small, large = sorted((row.da, row.d_out))
        return large if isinstance(statistic, InputFactor) and statistic.use == "read" else small**2
    if isinstance(statistic, InputFactor):
        return width if row.one_hot else row.groups * width**2
    if isinstance(statistic, OutputFactor):
        return row.groups * dg**2
    if isinstance(statistic, CrossInputFactor):
        return width * col.da
    if isinstance(statistic, CrossOutputFactor):
        return dg * col.d_out
    if isinstance(statistic, UnitBlocks):
        return row.size * width
    if isinstance(statistic, SlopeMoment):
        return dg**2
    if isinstance(statistic, NextWeight):
        return dg * col.d_out + 1
    if isinstance(statistic, Misfit):
        return 1
    return row.size * col.size if isinstance(statistic, Block) else row.size


def require_statistics(statistics: Iterable[Statistic], layers: Sequence[Layer], like: Tensor, copies: int = 1) -> None:
    """Raise MemoryError if statistics do not fit, the largest twice: one batch's is added to the others'.

    Args:
        statistics: all that are collected together.
        layers: of the network, which has been looked at.
        like: a tensor of their type, where they will be.
        copies: of each that are held.
    """
    by_name = {layer.name: layer for layer in layers}
    held = {s.key: (entries(s, by_name[s.layers[0]], by_name[s.layers[-1]]), s) for s in statistics if s.layers}
    if not held:
        return
    most, largest = max(held.values(), key=lambda each: each[0])
    size = (copies * sum(each for each, _ in held.values()) + most) * like.element_size()
    what = f"{type(largest).__name__} of layer {largest.layers[0]!r}, {most:,} entries,"
    what += f" with {len(held) - 1} other statistics" if len(held) > 1 else " while it is summed"
    require(size, like.device, what, "probe fewer layers=, or take a method whose statistics are smaller")


def layer_costs(
    layers: tuple[Layer, ...], positions: Mapping[str, int], examples: int, vectors: int, most: int = GRADIENT_ENTRIES
) -> list[LayerCosts]:
    """Of the probed layers, in order.

    Args:
        layers: of a network that has been looked at.
        positions: weight-sharing positions by layer name.
        examples: N.
        vectors: K.
        most: entries of stacked gradients that are held at once.
    """
    return [replace(_costs_of(layer, positions.get(layer.name, 1), examples, vectors), most=most) for layer in layers]


def _costs_of(layer: Layer, positions: int, examples: int, vectors: int) -> LayerCosts:
    if not layer.structured:
        return LayerCosts("gradients", layer.size, layer.size, 1, 1, 1, examples, vectors)
    kind: CaptureKind = "tokens" if layer.one_hot else "grouped" if layer.groups > 1 else "shared"
    if kind == "shared" and positions == 1:
        kind = "outer"
    if are_smaller(layer, positions, vectors):
        kind = "formed"
    groups, tied = layer.groups, layer.both_ways
    dg = min(layer.da, layer.d_out) if tied else layer.d_out // groups
    return LayerCosts(kind, layer.size, layer.da, dg, positions, groups, examples, vectors, tied=tied)
