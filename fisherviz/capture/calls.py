"""One forward call of a structured module, and which of its rows are which example's.

Most layers have the examples first. What no example changes (a table of positions that is read once for all) has none:
its output is added to something of every example, and at that sum the gradient is still each example's own.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from fisherviz.network.layers import Layer, reads, units

VIEWS = {
    "AliasBackward0", "ReshapeAliasBackward0", "SqueezeBackward0", "SqueezeBackward1", "SqueezeBackward2",
    "UnsafeViewBackward0", "UnsqueezeBackward0", "ViewBackward0",
}  # fmt: skip
"""Nodes of the graph that leave entries and their order alone."""
SUMS = {"AddBackward0", "ExpandBackward0", "RepeatBackward0"}
"""Nodes that have an operand's entries for each example, at which its gradient is not yet summed over them."""

CHOICES = {
    "GatherBackward0", "IndexAddBackward0", "IndexBackward0", "IndexCopyBackward0", "IndexPutBackward0",
    "IndexSelectBackward0", "MaskedScatterBackward0", "MaskedSelectBackward0", "PackPaddedSequenceBackward0",
    "ScatterAddBackward0", "ScatterBackward0", "TakeBackward0",
}  # fmt: skip
"""Nodes that may choose rows, or their order, by what the examples hold; those below may along the first axis."""
CHOICES_OF_ROWS = {
    "CatBackward0", "SliceBackward0", "SortBackward0", "SplitBackward0", "SplitWithSizesBackward0", "StackBackward0",
    "TopkBackward0",
}  # fmt: skip


class Layout(Enum):
    """Where a layer's examples stand."""

    FIRST = "first"
    SECOND = "second"
    """Behind the positions: (T, N, d), or (T N, d)."""
    MERGED = "merged"
    """Before the positions, as one with them: (N T, d), windows and frames."""
    SHARED = "shared"
    """Nowhere: the layer acts once for all of them."""


@dataclass(eq=False)
class Call:
    """One forward call of a structured module."""

    layer: Layer
    module: nn.Module
    """The layer's, or one that is tied to it."""
    x: Tensor
    version: int
    edge: GradientEdge
    shape: torch.Size
    origin: GradientEdge | None = None
    """Where the input stands in the graph; None for data."""
    layout: Layout = Layout.FIRST
    examples: int = 0
    """N; 0 as long as it is not known which rows are whose."""
    attended: int = 0
    """Inside attention, whose rows are (T, N'): its own batch N', examples or windows of them; 0 elsewhere."""
    joins: tuple[GradientEdge, ...] = ()
    """Where the output of a shared layer becomes each example's, (N, ...); none where there is one example."""
    slopes: Tensor | None = None
    """Derivatives (N, d) of an element-wise function between its output and the next layer; see `capture.slopes`."""

    @property
    def source(self) -> Node | None:
        """The node at `origin`."""
        return None if self.origin is None else self.origin.node

    @property
    def intact(self) -> bool:
        """Whether the input still holds what the layer saw."""
        return self.x._version == self.version

    @property
    def inputs(self) -> Tensor:
        """What the layer's matrix multiplies, examples first."""
        rows = self.layer.inputs(self.x, self.shape, self.module)
        if self.layout is not Layout.SHARED:
            return self.by_example(rows, 0)
        rows = rows.flatten(0, 1)
        return rows.expand(self.examples, *rows.shape)

    @property
    def one_hot(self) -> bool:
        """Whether it reads rows of a table."""
        return reads(self.module)

    @property
    def stacked(self) -> bool:
        """Whether it acts on several vectors or images, of examples or positions, along the first axis."""
        return self.x.shape[:1] == self.shape[:1] and self.shape[1:].numel() >= units(self.module)

    @property
    def positions(self) -> int:
        """Weight-sharing positions."""
        return self.of_one(self.shape) // units(self.module)

    def of_one(self, shape: torch.Size) -> int:
        """Entries of one example in a tensor of all."""
        return shape.numel() if self.layout is Layout.SHARED else shape.numel() // (self.examples or shape[0])

    @property
    def edges(self) -> tuple[GradientEdge, ...]:
        """Where gradients are taken."""
        return self.joins or (self.edge,)

    @property
    def gradient_shape(self) -> torch.Size:
        """Of the gradients there, put together."""
        copies = self.examples if self.layout is Layout.SHARED else 1
        return torch.Size((copies * self.shape[0], *self.shape[1:])) if self.shape else self.shape

    def together(self, found: Sequence[Tensor | None], leading: int) -> Tensor | None:
        """Gradients at the edges as one of `gradient_shape`, behind so many dimensions of vectors; None for zero."""
        there = [g.reshape(*g.shape[:leading], *self.gradient_shape) for g in found if g is not None]
        return sum(there[1:], there[0]) if there else None

    def output_gradients(self, g: Tensor) -> Tensor:
        """Gradients (K, *gradient_shape) as (K, N, T, dg) or (K, N, T, groups, dg)."""
        return self.by_example(self.layer.output_gradients(g, self.module), 1)

    @property
    def given(self) -> Tensor | None:
        """What each example gave the module, (N, ...) of the input as it came; None where it is nobody's own."""
        if not self.examples or self.layout is Layout.SHARED:
            return None
        second = self.attended or (self.examples if self.layout is Layout.SECOND else 0)
        vectors = self.shape.numel() // units(self.module)
        if not second:
            return self.x.reshape(self.examples, -1)
        if self.x.numel() % vectors:
            return None
        rows = self.x.reshape(-1, second, self.x.numel() // vectors).transpose(0, 1)
        return rows.reshape(self.examples, -1)

    def by_example(self, rows: Tensor, leading: int) -> Tensor:
        """(..., N, T, ...) from rows of all examples, (..., L, L', ...)."""
        if not self.examples or (self.layout is Layout.FIRST and self.examples == rows.shape[leading]):
            return rows
        rows = rows.flatten(leading, leading + 1)
        if second := self.attended or (self.examples if self.layout is Layout.SECOND else 0):
            rows = rows.unflatten(leading, (-1, second)).transpose(leading, leading + 1).flatten(leading, leading + 1)
        return rows.unflatten(leading, (self.examples, -1))


def placed(calls: Mapping[str, Sequence[Call]], z: Tensor, layouts: Mapping[str, Layout]) -> dict[str, list[Call]]:
    """Calls that know their examples, as far as that can be told.

    Args:
        calls: by layer.
        z: the output with its graph, (N, ...).
        layouts: of the layers that have been looked at.
    """
    graph = Graph(z)
    return {name: [_placed(call, graph, layouts.get(name)) for call in made] for name, made in calls.items()}


def _placed(call: Call, graph: Graph, known: Layout | None) -> Call:
    if call.attended == graph.examples:
        call = rearranged(call, graph, Layout.SECOND)
    elif known is Layout.SECOND or known is Layout.MERGED:
        call = rearranged(call, graph, known)
    elif not call.attended:
        call = _in_front(call, graph, known)
    if call.examples:
        graph.known.add(call.edge.node)
    return call


def rearranged(call: Call, graph: Graph, layout: Layout) -> Call:
    """The call with its examples behind the positions, or as one with them, where it can have them there."""
    n, length = graph.examples, call.shape[0]
    vectors = call.shape[1:].numel() // units(call.module)
    if call.attended:
        second, merged = call.attended == n, layout is Layout.MERGED and call.attended % n == 0
    else:
        second = layout is Layout.SECOND and vectors == n and call.x.shape[1:2] == (n,) == call.shape[1:2]
        merged = length % n == 0 and (vectors == 1 or layout is Layout.MERGED)
    fits = call.stacked and (second or (merged and not graph.selects(call.source)))
    return replace(call, layout=layout, examples=n if fits else 0, joins=())


def _in_front(call: Call, graph: Graph, known: Layout | None) -> Call:
    n = graph.examples
    first = call.stacked and call.shape[:1] == (n,)
    # one row of positions (T,) may be as long as the batch
    ambiguous = known is None and call.one_hot and call.x.dim() == 1
    if known is Layout.SHARED or not first or ambiguous:
        if n == 1 and not first and call.stacked:  # all is the one example's
            return replace(call, layout=Layout.SHARED, examples=1)
        if joins := graph.joins(call.edge, call.shape):
            return replace(call, layout=Layout.SHARED, examples=n, joins=joins)
    elif known is None and n > 1 and graph.joins(call.edge, call.shape):
        first = False  # rows of positions, which happen to be as many as the examples that they are added to
    return replace(call, layout=Layout.FIRST, examples=n if first and (known is not Layout.SHARED or n == 1) else 0)


class Graph:
    """What depends on what behind an output (N, ...)."""

    def __init__(self, z: Tensor) -> None:
        self.z, self.examples = z, len(z) if z.dim() else 1
        self.known: set[Node] = set()
        """Outputs of calls that know their examples."""

    def selects(self, source: Node | None) -> bool:
        """Whether rows may have been chosen, so that their number does not tell whose they are."""
        if source is None:
            return True
        for node in behind(source, self.known):
            name = node.name()
            ours = name == "torch::autograd::AccumulateGrad" or name[:-1].endswith("Backward")
            choice = name in CHOICES or (name in CHOICES_OF_ROWS and _along_rows(node))
            if node not in self.known and (not ours or (choice and not _of_parameters(node))):
                return True
        return False

    @cached_property
    def users(self) -> dict[tuple[Node, int], list[Node]]:
        """The nodes that take each output of a node."""
        found: dict[tuple[Node, int], list[Node]] = {}
        for node in behind(self.z.grad_fn):
            for before in node.next_functions:
                if before[0] is not None:
                    found.setdefault((before[0], before[1]), []).append(node)
        return found

    def joins(self, edge: GradientEdge, shape: torch.Size) -> tuple[GradientEdge, ...]:
        """Where what all examples share is added to what is each one's; none where it acts in another way too."""
        found, pending = [], [(edge, shape)]
        while pending:
            at, before = pending.pop()
            for user in self.users.get((at.node, at.output_nr), ()):
                shapes = _shapes(user)
                plain = user.name() in VIEWS or (user.name() in SUMS and getattr(user, "_saved_alpha", 1) == 1)
                if not plain or len(shapes) != 1:
                    return ()
                after = shapes[0]
                own = before[1:] if before[:1] == (1,) else before
                if after.numel() == before.numel():
                    pending.append((GradientEdge(user, 0), after))
                elif after == (self.examples, *own):
                    found.append(GradientEdge(user, 0))
                else:
                    return ()
        return tuple(found)


def _along_rows(node: Node) -> bool:
    """Whether a node acts along the first axis, as far as torch tells."""
    dim, shapes = getattr(node, "_saved_dim", 0), _shapes(node)
    return (
        not shapes or (dim if dim < 2**63 else dim - 2**64) % max(1, len(shapes[0])) == 0
    )  # negative ones are unsigned


def _of_parameters(node: Node) -> bool:
    """Whether a node only moves entries of parameters."""
    leaf = "torch::autograd::AccumulateGrad"
    return all(other is node or other.name() in VIEWS or other.name() == leaf for other in behind(node))


def _shapes(node: Node) -> list[torch.Size]:
    """Of a node's outputs; none where torch does not tell."""
    told: list[Any] = getattr(node, "_input_metadata", [])
    try:
        return [torch.Size(map(int, one.shape)) for one in told]
    except (AttributeError, RuntimeError):
        return []  # nested tensors have no numbers there


def made(output: Tensor) -> GradientEdge:
    """Where an output's entries were made, in their order.

    Of a view that is beneath the view: a change of it in place makes a new node of it, and the one that it had is no
    part of the graph any more. Whether a Linear gives a view hangs on the layout of its input.
    """
    edge = get_gradient_edge(output)
    while output._is_view() and edge.node.name() in VIEWS:
        node, number = edge.node.next_functions[0]
        if node is None or node.name() == "torch::autograd::AccumulateGrad":
            break
        edge = GradientEdge(node, number)
    return edge


def given(output: Tensor, source: Node | None, module: nn.Module) -> tuple[GradientEdge, torch.Size] | None:
    """Where a module's matrix has acted, though the module did more, and the shape there; None where that is not found.

    Args:
        output: of the module.
        source: where its input stands in the graph.
        module: owns the parameters.
    """
    own = {p for p in module.parameters(recurse=False) if p.requires_grad}
    for node in behind(output.grad_fn, () if source is None else {source}):
        here = {getattr(before, "variable", None) for before, _ in node.next_functions}
        if own & here:
            shapes = _shapes(node)  # of a normalisation, then perhaps those of its moments
            return (GradientEdge(node, 0), shapes[0]) if own <= here and shapes else None
    return None


def feeders(source: Node | None, calls: Sequence[Call]) -> set[str]:
    """Names of the layers whose outputs a place in the graph depends on directly, through no other layer."""
    names = {call.edge.node: call.layer.name for call in calls}
    return {names[node] for node in behind(source, names) if node in names}


def behind(source: Node | None, until: Container[Node] = ()) -> Iterator[Node]:
    """A place in the graph and what it depends on.

    Args:
        source: the place; None: data.
        until: where to stop: what lies behind these is left out.

    Yields:
        Each node once.
    """
    pending, seen = [source], set[Node]()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if node not in until and not empty(node):  # nothing is behind what has no entries
            pending += [following for following, _ in node.next_functions]


def empty(node: Node) -> bool:
    """Whether nothing stands at a place in the graph: no row was sent there."""
    shapes = _shapes(node)
    return bool(shapes) and not any(shape.numel() for shape in shapes)


def counts_examples(calls: Sequence[Call]) -> bool:
    """Whether it is known of every call which rows are whose."""
    return all(call.examples for call in calls)


def layouts(calls: Mapping[str, Sequence[Call]]) -> dict[str, Layout]:
    """Where the examples of each layer stand whose calls all have them in the same place; one example tells nothing."""
    found = {name: {call.layout for call in made} for name, made in calls.items() if made[0].examples > 1}
    return {name: several.pop() for name, several in found.items() if len(several) == 1}
