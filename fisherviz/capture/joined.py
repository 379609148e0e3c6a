"""Captures of the same layer put together: other examples, or other vectors of the same ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fisherviz.capture.batch import Batch
from fisherviz.capture.captures import AnyCapture, Capture, GenericCapture, TiedCapture
from fisherviz.capture.tokens import TokenCapture


def concatenate(captures: Sequence[AnyCapture]) -> AnyCapture:
    """One capture of all examples of several captures of the same layer.

    Captures with fewer vectors or positions than others are padded with zeros, which leave every gradient, and every
    sum over them, alone; averages over positions must not be taken from the result (see `ragged`).
    """
    if len(captures) == 1:
        return captures[0]
    vectors = max(c.vectors for c in captures)
    positions = max(1 if isinstance(c, GenericCapture) else c.positions for c in captures)
    if generic := [c for c in captures if isinstance(c, GenericCapture)]:
        return replace(generic[0], gradients=torch.cat([_padded(c.gradients, 0, vectors) for c in captures], 1))
    if tied := [c for c in captures if isinstance(c, TiedCapture)]:
        table, weight = concatenate([c.read for c in tied]), concatenate([c.used for c in tied])
        assert isinstance(table, TokenCapture)
        assert isinstance(weight, Capture)
        return TiedCapture(table, weight, tied[0].transposed)
    structured = [c for c in captures if isinstance(c, Capture)]
    read = [c for c in captures if isinstance(c, TokenCapture)]
    shown: Sequence[Capture | TokenCapture] = structured or read
    g = torch.cat([_padded(_padded(c.g, 2, positions), 0, vectors) for c in shown], 1)
    counted = None
    if any(c.counted is not None for c in shown):
        every = [c.g.new_ones(c.g.shape[1:3], dtype=torch.bool) if c.counted is None else c.counted for c in shown]
        counted = torch.cat([_padded(part, 1, positions) for part in every])
    if structured:
        slopes = [c.slopes for c in structured if c.slopes is not None]
        found = torch.cat(slopes) if len(slopes) == len(structured) else None
        return Capture(torch.cat([_padded(c.a, 1, positions) for c in structured]), g, counted, found)
    tokens = torch.cat([_padded(c.tokens, 1, positions) for c in read])
    weights = torch.cat([_padded(c.weights, 1, positions) for c in read])
    return TokenCapture(tokens, weights, g, read[0].vocabulary, counted)


def with_later(batches: Sequence[Batch]) -> list[Batch]:
    """The batches with all vectors of the same examples together."""
    starts = [i for i, batch in enumerate(batches) if not batch.later] + [len(batches)]
    return [_together(batches[start:stop]) for start, stop in itertools.pairwise(starts)]


def _together(parts: Sequence[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    made = {name: _vectors_of([part.captures[name] for part in parts]) for name in parts[0].captures}
    return Batch(made, parts[0].examples, parts[0].first)


def _vectors_of(parts: Sequence[AnyCapture]) -> AnyCapture:
    """One capture with all vectors of several captures of the same inputs."""
    if isinstance(first := parts[0], TiedCapture):
        tied = [c for c in parts if isinstance(c, TiedCapture)]
        read, used = torch.cat([c.read.g for c in tied]), torch.cat([c.used.g for c in tied])
        return replace(first, read=replace(first.read, g=read), used=replace(first.used, g=used))
    if isinstance(first, GenericCapture):
        return replace(first, gradients=torch.cat([c.gradients for c in parts if isinstance(c, GenericCapture)]))
    return replace(first, g=torch.cat([c.g for c in parts if isinstance(c, Capture | TokenCapture)]))


class Extent(NamedTuple):
    """What is to be known of a capture before it is put together with others of the same layer.

    Attributes:
        part: "read" or "used" of a tied one, otherwise "".
        bytes: of memory.
        vectors: number of backpropagated vectors.
        positions: number of weight-sharing positions, 0 where there are none.
    """

    part: str
    bytes: int
    vectors: int
    positions: int


def extents(capture: AnyCapture) -> list[Extent]:
    """Of a capture's parts."""
    if isinstance(capture, TiedCapture):
        parts: dict[str, Capture | TokenCapture] = {"read": capture.read, "used": capture.used}
        return [Extent(part, c.bytes, c.vectors, c.positions) for part, c in parts.items()]
    positions = 0 if isinstance(capture, GenericCapture) else capture.positions
    return [Extent("", capture.bytes, capture.vectors, positions)]


def concatenated_bytes(of_layer: Sequence[Extent]) -> int:
    """Memory that one capture of them all holds at most."""
    total = 0
    for part in {extent.part for extent in of_layer}:
        mine = [extent for extent in of_layer if extent.part == part]
        most = max(e.vectors for e in mine) * max(max(e.positions, 1) for e in mine)
        total += sum(e.bytes * most // (max(e.vectors, 1) * max(e.positions, 1)) for e in mine)
    return total


def ragged(of_layer: Sequence[Extent]) -> bool:
    """Whether captures of the same layer differ in their numbers of positions, or in kind."""
    parts = {extent.part for extent in of_layer}
    return len({(e.part, e.positions) for e in of_layer}) > len(parts) or {"", "used"} <= parts


def _padded(t: Tensor, axis: int, size: int) -> Tensor:
    if t.shape[axis] == size:
        return t
    shape = (*t.shape[:axis], size - t.shape[axis], *t.shape[axis + 1 :])
    return torch.cat([t, t.new_zeros(shape)], axis)
