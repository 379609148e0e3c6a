"""What requests to an exact Fisher will take, from the sizes of its layers alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from fisherviz.capture.take import loss_gradient
from fisherviz.exact.passes import Passes
from fisherviz.network.batches import count_examples, select
from fisherviz.statistics.costs import CHOLESKY, EIGEN, LayerCosts, block_cost, layer_costs
from fisherviz.statistics.gradients import TILE_ENTRIES, tile
from fisherviz.statistics.products import GRADIENT_ENTRIES, WHOLE_ENTRIES
from fisherviz.support.memory import at_once, config, keep_limit, require
from fisherviz.support.plan import Plan, Step

FORWARD_MODE = 1.7
"""Passes of a product by forward and reverse mode."""
_TIMED = 32
"""Examples whose forward+backward pass is timed."""
DOUBLE = 8
"""Bytes of a number in float64."""


@dataclass(frozen=True)
class Sizes:
    """What the counts of a Fisher come from.

    Attributes:
        layers: what their captures hold and cost.
        item: bytes of a number.
        kept: whether captures of an earlier request are there.
        forward_mode: whether products run on the network itself until there are captures; None: not tried yet.
        limit: bytes of captures that may be kept.
        capture_bytes: of a piece.
        tiles: entries of Gram matrices that are held at once.
        whole: entries of a diagonal block that is expanded whole.
    """

    layers: Sequence[LayerCosts]
    item: int
    kept: bool
    forward_mode: bool | None
    limit: int
    capture_bytes: int
    tiles: int
    whole: int

    @property
    def size(self) -> int:
        """P."""
        return sum(layer.size for layer in self.layers)

    @property
    def columns(self) -> int:
        """K N."""
        return self.layers[0].columns

    @property
    def captured(self) -> int:
        """Bytes of all captures."""
        return self.item * sum(layer.captured for layer in self.layers)

    @property
    def product(self) -> float:
        """Multiply-adds of a product from captures."""
        return 2 * sum(layer.product for layer in self.layers)

    @property
    def gram(self) -> float:
        """Multiply-adds of the Gram matrix."""
        return sum(layer.gram for layer in self.layers)

    @property
    def tile(self) -> int:
        """Examples whose rows of all layers' Gram matrices are held together."""
        n, k, count = self.layers[0].examples, self.layers[0].vectors, len(self.layers)
        return min(n, tile(n, k, count, self.tiles))

    @property
    def dense(self) -> float:
        """Multiply-adds of the whole matrix."""
        pairs = ((i, j) for i in range(len(self.layers)) for j in range(i, len(self.layers)))
        return sum(block_cost(self.layers[i], self.layers[j]) for i, j in pairs)

    @property
    def gram_bytes(self) -> int:
        """Of the Gram matrix while its layers' parts are added up."""
        return self.item * max(self._gram_entries(layer) for layer in self.layers)

    def _gram_entries(self, layer: LayerCosts) -> int:
        square = self.columns**2
        if layer.kind == "outer":
            return square + 3 * layer.examples**2
        in_place = layer.kind != "tokens" and not (layer.tied or layer.pairwise)
        return self._part(layer, square) if in_place else square + self._part(layer, square)

    def _part(self, layer: LayerCosts, result: int) -> int:
        """Entries of a layer's part of a Gram matrix, and held while it is made."""
        if layer.pairwise:
            return result + 2 * self.tiles
        if layer.tied or layer.kind == "tokens":
            return max(layer.formed, layer.gradients + result)
        return result + replace(layer, most=self.tiles).formed

    @property
    def tile_bytes(self) -> int:
        """Of all layers' Gram matrices by tiles, one after the other, with their square and a copy."""
        tile = self.columns * self.layers[0].vectors * self.tile
        made = max(i * tile + self._part(layer, tile) for i, layer in enumerate(self.layers))
        return self.item * max(made, (len(self.layers) + 2) * tile)

    @property
    def dense_bytes(self) -> int:
        """Of the whole matrix beside its blocks while it is written, or of these while gradients are multiplied."""
        outer = [layer for layer in self.layers if layer.kind == "outer"]
        stacked = [layer for layer in self.layers if layer.kind != "outer"]
        kept = sum(a.size * b.size for i, a in enumerate(self.layers) for b in self.layers[i:])
        kept -= sum(3 * layer.size**2 // 4 for layer in outer)
        whole = max((layer.size**2 for layer in outer if layer.size**2 <= self.whole), default=0)
        among = sum(layer.size for layer in stacked)
        gradients = 2 * min(self.columns * among, self.layers[0].most)
        return self.item * (kept + max(self.size**2 + whole, among**2 + gradients))

    @property
    def held(self) -> int:
        """Bytes of captures that stay."""
        return self.captured if self.captured <= self.limit else 0

    def step(self, what: str, how: str, multiply_adds: float, size: float, at_most: bool = False) -> Step:
        """A step that reads captures, and holds so many bytes beside them."""
        return Step(what, how, multiply_adds, self.held + size, at_most=at_most)

    def capture(self, together: bool = True) -> list[Step]:
        """The pass that makes captures, where there are none.

        Args:
            together: whether those of all examples are needed at once.
        """
        if self.kept:
            return []
        passes, smaller = (1 + self.layers[0].vectors) / 3, [x for x in self.layers if x.kind == "formed"]
        count = sum(x.columns * x.positions * x.size for x in smaller)
        if together or self.held:
            piece = min(self.item * sum(x.shown for x in self.layers), self.capture_bytes) if smaller else 0
            how, size, allowed = "of all examples, kept", self.captured + piece, self.limit + piece
        else:
            how, size, allowed = "batch by batch", min(self.captured, self.capture_bytes), None
        return [Step("captures", how, count, size, passes, allowed=allowed)]


def sizes_of(fisher: Passes) -> Sizes:
    """Look at the network and count the data; neither takes a pass of the network."""
    fisher.look()
    structure, network = fisher.structure, fisher.network
    count = _count(fisher)
    assert structure.example_output is not None
    vectors = fisher.vectors.count(structure.example_output)
    like = torch.empty((), dtype=network.precision, device=network.device)
    most = at_once(GRADIENT_ENTRIES, like)
    return Sizes(
        layer_costs(structure.layers, structure.positions, count, vectors, most),
        like.element_size(),
        fisher.keeps_captures,
        structure.forward_mode,
        keep_limit(network.device),
        at_once(network.capture_bytes, like.to(torch.uint8)),
        at_once(TILE_ENTRIES, like),
        at_once(WHOLE_ENTRIES, like),
    )


def _count(fisher: Passes) -> int:
    """Examples in the data; where no pass has counted them, those included that targets leave out."""
    if fisher.seen is not None:
        return fisher.seen
    return sum(count_examples(inputs) for inputs, _ in fisher.data)


def pass_seconds(fisher: Passes, examples: int) -> float:
    """Seconds of one forward+backward pass over so many examples, from a few of them."""
    inputs, targets = next(iter(fisher.data))
    n = min(_TIMED, count_examples(inputs))
    part = select(inputs, 0, n), None if targets is None else targets[:n]
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        loss_gradient(fisher.network, *part)
        if fisher.network.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best * examples / n


def plan(fisher: Passes, requests: Sequence[str]) -> Plan:
    """The steps of some requests, each as if it came first; see `Fisher.plan`."""
    sizes = sizes_of(fisher)
    steps = [step for request in requests for step in REQUESTS[request](sizes)]
    unique = list(dict.fromkeys(steps))  # the pass for captures is made once
    return Plan(unique, fisher.network.device, fisher.network.precision, pass_seconds(fisher, sizes.layers[0].examples))


def require_fits(fisher: Passes, request: str) -> None:
    """Raise MemoryError if a request that reads captures, which are there, does not fit beside them."""
    sizes = sizes_of(fisher)
    step = REQUESTS[request](sizes)[-1]
    there = 0 if config.memory_budget is not None or not sizes.kept else sizes.held
    what = f"{request} by {step.how}" + f", {sizes.columns:,} gradients of {sizes.size:,} parameters,"
    with fisher.processes.agreeing("the memory for a request"):
        require(int(step.bytes) - there, fisher.network.device, what, "use fewer examples or kind='mc'")


def _product(s: Sizes) -> list[Step]:
    if not s.kept and s.forward_mode is not False:
        return [Step("product", "forward and reverse mode", passes=FORWARD_MODE)]
    from_positions = [layer for layer in s.layers if layer.kind not in ("formed", "gradients")]
    images = max((x.examples * x.positions * x.dg * x.groups for x in from_positions), default=0)
    copied = max((layer.vectors * images for layer in from_positions if layer.kind != "outer"), default=0)
    return [
        *s.capture(together=False),
        s.step("product", "from captures", s.product, s.item * (4 * s.size + images + copied)),
    ]


def _diagonal(s: Sizes) -> list[Step]:
    count = sum(layer.diagonal for layer in s.layers)
    squares = max(layer.squared for layer in s.layers)
    size = s.item * max(3 * s.size, s.size + squares)
    return [*s.capture(together=False), s.step("diagonal", "squares summed", count, size)]


def _dense(s: Sizes) -> list[Step]:
    return [*s.capture(together=False), s.step("to_dense", "blocks over examples", s.dense, s.dense_bytes)]


def _gram(s: Sizes) -> list[Step]:
    return [*s.capture(), s.step("example_gram", "inner products of gradients", s.gram, s.gram_bytes)]


def _norm(s: Sizes) -> list[Step]:
    count = sum(layer.strips(s.tile) for layer in s.layers)
    return [*s.capture(), s.step("norm", "Gram matrices by tiles", count, s.tile_bytes)]


def _solve(s: Sizes) -> list[Step]:
    n = min(s.size, s.columns)
    if s.size <= s.columns:  # F, and the damped copy in float64 that becomes the factor
        count, size = s.dense + CHOLESKY * n**3, max(s.dense_bytes, (s.item + DOUBLE) * n**2)
        return [*s.capture(together=False), s.step("solve", f"dense Cholesky, {n:,}", count, size)]
    count = s.gram + CHOLESKY * n**3 + 2 * s.product  # of the solution, and of what it leaves
    size = s.gram_bytes
    if s.item < DOUBLE:  # in float64 at a small damping, which the trace tells, or once more where the norm alone does
        count += sum(layer.diagonal for layer in s.layers)
        converted = s.item * max(layer.captured for layer in s.layers)
        size = max(DOUBLE // s.item * (converted + s.gram_bytes), (s.item + DOUBLE) * n**2)
    return [*s.capture(), s.step("solve", f"Woodbury, {n:,} gradients", count, size, at_most=s.item < DOUBLE)]


def _spectrum(s: Sizes) -> list[Step]:
    n, dense = min(s.size, s.columns), s.size <= s.columns
    how = f"eigenvalues, {n:,} x {n:,}"
    count = (s.dense if dense else s.gram) + EIGEN * n**3
    made = s.dense_bytes if dense else s.gram_bytes
    return [*s.capture(together=not dense), s.step("spectrum", how, count, max(made, (s.item + 2 * DOUBLE) * n**2))]


REQUESTS: dict[str, Callable[[Sizes], list[Step]]] = {
    "diagonal": _diagonal,
    "product": _product,
    "norm": _norm,
    "example_gram": _gram,
    "solve": _solve,
    "spectrum": _spectrum,
    "to_dense": _dense,
}
"""By the name of the method that is asked."""
