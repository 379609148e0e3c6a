"""How large a layer's captures are, and what the identities behind the statistics cost on them, before anything runs.

Counts are multiply-adds of matrix products and factorisations, symmetric ones halved as `products` halves them; entries
are numbers held. Both follow `capture.captures`, `statistics.products` and `statistics.gradients` case by case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fisherviz.network.layers import Layer
from fisherviz.statistics.gradients import pairwise_is_cheaper
from fisherviz.statistics.products import GRADIENT_ENTRIES, STRIP, STRIP_ENTRIES, strip_width

CaptureKind = Literal["outer", "shared", "grouped", "tokens", "gradients"]
EIGEN = 4.5
"""Multiply-adds of a product that take as long as an eigendecomposition, over n³."""
CHOLESKY = 1 / 6
"""Multiply-adds of a Cholesky factorisation, over n³."""


@dataclass(frozen=True)
class LayerCosts:
    """What one layer's captures over all examples hold, and what is made of them costs.

    Attributes:
        kind: "outer" where every gradient is one outer product, "shared" where positions share the weight, "grouped",
            "tokens" for one-hot inputs, "gradients" where these are captured themselves.
        size: P, parameters of the layer.
        da: width of W̄, or of a group's rows.
        dg: rows of W̄, or of a group's.
        positions: T.
        groups: of a grouped convolution, or 1.
        examples: N.
        vectors: K.
    """

    kind: CaptureKind
    size: int
    da: int
    dg: int
    positions: int
    groups: int
    examples: int
    vectors: int

    @property
    def columns(self) -> int:
        """K N, gradients of all examples and vectors."""
        return self.vectors * self.examples

    @property
    def captured(self) -> int:
        """Entries of the captures."""
        if self.kind == "gradients":
            return self.columns * self.size
        inputs = 2 if self.kind == "tokens" else self.groups * self.da
        return self.positions * (self.examples * inputs + self.columns * self.groups * self.dg)

    @property
    def forming(self) -> float:
        """Multiply-adds that form all gradients."""
        if self.kind in ("gradients", "tokens"):
            return 0
        return self.columns * self.positions * self.size

    @property
    def formed(self) -> int:
        """Entries held while gradients are formed, as many as are formed at once, with a copy by vectors."""
        if self.kind == "outer":
            return 0
        gradients = min(self.columns * self.size, GRADIENT_ENTRIES)
        several = self.vectors > 1
        copied = self.columns * self.positions * self.dg * self.groups if several and self.kind == "shared" else 0
        return (2 if several else 1) * gradients + min(copied, gradients)

    @property
    def product(self) -> float:
        """Multiply-adds of Uᵀ v, and of U w, for one column."""
        if self.kind in ("outer", "shared"):
            return self.examples * self.positions * self.dg * (self.da + self.vectors)
        if self.kind == "tokens":
            return self.columns * self.positions * self.dg
        return self.forming + self.columns * self.size

    def gram(self, whole: bool = True) -> float:
        """Multiply-adds of UᵀU, all of it at once or by tiles."""
        n, k, t = self.examples, self.vectors, self.positions
        if self.kind == "outer" and whole:
            own, others = k * symmetric_cost(self.dg, n), k * (k - 1) // 2 * n * n * self.dg
            return symmetric_cost(self.da, n) + own + others
        if self.kind == "outer":
            return n * n * self.da + self.columns**2 * self.dg
        if self.pairwise:
            return n * n * t * t * (self.da + k * k * (self.dg + 1))
        if whole and self.columns * self.size <= GRADIENT_ENTRIES:
            return self.forming + symmetric_cost(self.size, self.columns)
        return self.forming + self.columns**2 * self.size

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


def layer_costs(
    layers: tuple[Layer, ...], positions: Mapping[str, int], examples: int, vectors: int
) -> list[LayerCosts]:
    """Of the probed layers, in order.

    Args:
        layers: of a network that has been looked at.
        positions: weight-sharing positions by layer name.
        examples: N.
        vectors: K.
    """
    return [_costs_of(layer, positions.get(layer.name, 1), examples, vectors) for layer in layers]


def _costs_of(layer: Layer, positions: int, examples: int, vectors: int) -> LayerCosts:
    if not layer.structured:
        return LayerCosts("gradients", layer.size, layer.size, 1, 1, 1, examples, vectors)
    kind: CaptureKind = "tokens" if layer.one_hot else "grouped" if layer.groups > 1 else "shared"
    if kind == "shared" and positions == 1:
        kind = "outer"
    groups = layer.groups
    return LayerCosts(kind, layer.size, layer.da, layer.d_out // groups, positions, groups, examples, vectors)
