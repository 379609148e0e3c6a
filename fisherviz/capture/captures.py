"""What one batch shows at one layer: inputs a with the homogeneous coordinate, pseudo-gradients g at its output.

The per-example gradient of vector k is ∇_nk = Σ_t g_nkt a_ntᵀ (Martens & Grosse 2015, eq. 1); statistics read it alone.
Shapes: a (N, T, da), g (K, N, T, dg); grouped convolutions a (N, T, groups, da), g (K, N, T, groups, dg).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from fisherviz.capture.tokens import TokenCapture, some
from fisherviz.support.memory import at_once

DENSE_ENTRIES = 2**24
"""Entries of per-example gradients that are formed at once where their squares alone are wanted."""


@dataclass(frozen=True, eq=False)
class Capture:
    """Inputs and pseudo-gradients of a structured layer for one batch.

    Attributes:
        a: inputs with the 1 appended, (N, T, da) or (N, T, groups, da).
        g: pseudo-gradients of K backpropagated vectors, (K, N, T, dg) or (K, N, T, groups, dg).
        counted: positions (N, T) that averages are taken over, where some are left out, at which g is zero; None: all.
        slopes: derivatives (N, dg) of an element-wise function that the output goes to, in the type that they were
            computed in, where they are wanted and there are such.
    """

    a: Tensor
    g: Tensor
    counted: Tensor | None = None
    slopes: Tensor | None = None

    @property
    def examples(self) -> int:
        """Number N of examples."""
        return self.a.shape[0]

    @property
    def vectors(self) -> int:
        """Number K of backpropagated vectors per example."""
        return self.g.shape[0]

    @property
    def positions(self) -> int:
        """Number T of weight-sharing positions."""
        return self.a.shape[1]

    @property
    def grouped(self) -> bool:
        """Whether the layer is a grouped convolution."""
        return self.a.dim() == 4

    @property
    def width(self) -> int:
        """Of W̄, or of a group's rows of it."""
        return self.a.shape[-1]

    @property
    def factored(self) -> bool:
        """Whether every per-example gradient is a single outer product g aᵀ."""
        return self.positions == 1 and not self.grouped

    @property
    def size(self) -> int:
        """Number of parameters."""
        groups = self.a.shape[2] if self.grouped else 1
        return groups * self.g.shape[-1] * self.a.shape[-1]

    @property
    def bytes(self) -> int:
        """Memory held by a, g and slopes."""
        held = self.tensors if self.slopes is None else (*self.tensors, self.slopes)
        return sum(t.numel() * t.element_size() for t in held)

    @property
    def gradients(self) -> Tensor:
        """Per-example gradients in unit order, (K, N, P)."""
        k, n = self.g.shape[:2]
        if self.factored:
            return (self.g[:, :, 0, :, None] * self.a[:, 0, None, :]).reshape(k, n, -1)
        if self.grouped:
            return torch.einsum("kntho,nthi->knhoi", self.g, self.a).reshape(k, n, -1)
        return self._by_example().transpose(0, 1)

    def _by_example(self) -> Tensor:
        """Gradients (N, K, P) by one (K dg x T)(T x da) product per example."""
        n, t = self.a.shape[:2]
        stacked = self.g.permute(1, 0, 3, 2).reshape(n, -1, t)
        return torch.bmm(stacked, self.a).reshape(n, self.vectors, -1)

    @property
    def rows(self) -> Tensor:
        """Per-example gradients (K N, P) for sums over all of them: in no particular order."""
        if self.factored or self.grouped:
            return self.gradients.flatten(0, 1)
        return self._by_example().flatten(0, 1)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors held."""
        return (self.a, self.g)

    def square_sum(self) -> Tensor:
        """Sum over examples and vectors of each gradient entry's square, (P,) in unit order."""
        if self.factored:
            return (self.g[:, :, 0].square().sum(0).T @ self.a[:, 0].square()).reshape(-1)
        return _square_sum(self)

    def sum(self) -> Tensor:
        """Sum of the gradient over examples and vectors, (P,) in unit order."""
        if self.grouped:
            return torch.einsum("nho,nhi->hoi", self.g.sum(0).flatten(0, 1), self.a.flatten(0, 1)).reshape(-1)
        return (self.g.sum(0).flatten(0, 1).T @ self.a.flatten(0, 1)).reshape(-1)

    def units(self, start: int, stop: int) -> Capture:
        """Rows start..stop of W̄; of a grouped convolution, whole groups."""
        if not self.grouped:
            return replace(self, g=self.g[..., start:stop])
        groups = slice(start // self.g.shape[-1], stop // self.g.shape[-1])
        return replace(self, a=self.a[:, :, groups], g=self.g[:, :, :, groups])

    def select_vectors(self, start: int, stop: int) -> Capture:
        """Vectors start..stop."""
        return replace(self, g=self.g[start:stop])

    def to(self, dtype: torch.dtype) -> Capture:
        """In another precision."""
        return replace(self, a=self.a.to(dtype), g=self.g.to(dtype))

    def select(self, start: int, stop: int) -> Capture:
        """Examples start..stop."""
        here = slice(start, stop)
        return Capture(self.a[here], self.g[:, here], some(self.counted, here), some(self.slopes, here))

    def take(self, rows: Tensor) -> Capture:
        """Examples by their positions (R,)."""
        return Capture(self.a[rows], self.g[:, rows], some(self.counted, rows), some(self.slopes, rows))


@dataclass(frozen=True, eq=False)
class GenericCapture:
    """Per-example gradients of a layer without structure, (K, N, P)."""

    gradients: Tensor

    @property
    def examples(self) -> int:
        """Number N of examples."""
        return self.gradients.shape[1]

    @property
    def vectors(self) -> int:
        """Number K of backpropagated vectors per example."""
        return self.gradients.shape[0]

    @property
    def factored(self) -> bool:
        """Whether every per-example gradient is a single outer product: never."""
        return False

    @property
    def size(self) -> int:
        """Number of parameters."""
        return self.gradients.shape[2]

    @property
    def bytes(self) -> int:
        """Memory held by the gradients."""
        return self.gradients.numel() * self.gradients.element_size()

    @property
    def rows(self) -> Tensor:
        """Per-example gradients (K N, P)."""
        return self.gradients.flatten(0, 1)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors held."""
        return (self.gradients,)

    def square_sum(self) -> Tensor:
        """Sum over examples and vectors of each gradient entry's square, (P,)."""
        total, rows = self.gradients.new_zeros(self.size), self.rows
        for part in rows.split(max(1, at_once(DENSE_ENTRIES, total) // max(1, self.size))):
            total += part.square().sum(0)
        return total

    def sum(self) -> Tensor:
        """Sum of the gradient over examples and vectors, (P,)."""
        return self.gradients.sum((0, 1))

    def select_vectors(self, start: int, stop: int) -> Self:
        """Vectors start..stop."""
        return replace(self, gradients=self.gradients[start:stop])

    def to(self, dtype: torch.dtype) -> Self:
        """In another precision."""
        return replace(self, gradients=self.gradients.to(dtype))

    def select(self, start: int, stop: int) -> Self:
        """Examples start..stop."""
        return replace(self, gradients=self.gradients[:, start:stop])

    def take(self, rows: Tensor) -> Self:
        """Examples by their positions (R,)."""
        return replace(self, gradients=self.gradients[:, rows])


@dataclass(frozen=True, eq=False)
class TiedCapture:
    """An embedding whose table is a Linear's weight too: per-example gradients are the sum of both uses.

    Attributes:
        read: the use as a table, with W̄ (da, V).
        used: the use as a weight, with W̄ (V, da).
        transposed: whether the layer's own W̄ is (da, V), an embedding's.
    """

    read: TokenCapture
    used: Capture
    transposed: bool

    def each(self, change: Callable[[Any], Any]) -> TiedCapture:
        """With both uses changed."""
        return TiedCapture(change(self.read), change(self.used), self.transposed)

    @property
    def examples(self) -> int:
        """Number N of examples."""
        return self.used.examples

    @property
    def vectors(self) -> int:
        """Number K of backpropagated vectors per example."""
        return self.used.vectors

    @property
    def width(self) -> int:
        """Of the layer's W̄."""
        return self.read.width if self.transposed else self.used.a.shape[-1]

    @property
    def positions(self) -> int:
        """Number T of weight-sharing positions of both uses."""
        return self.read.positions + self.used.positions

    @property
    def factored(self) -> bool:
        """Whether every per-example gradient is a single outer product: never."""
        return False

    @property
    def size(self) -> int:
        """Number of parameters."""
        return self.used.size

    @property
    def bytes(self) -> int:
        """Memory held."""
        return self.read.bytes + self.used.bytes

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors held, those in working precision first."""
        return (*self.used.tensors, *self.read.tensors)

    @property
    def gradients(self) -> Tensor:
        """Per-example gradients in unit order, (K, N, P), dense."""
        found, used = self.read.sparse, self.used
        if self.transposed:  # formed as it is wanted: another layout would be a copy
            out = (used.a.mT @ used.g).mT
        else:
            out = used.gradients.unflatten(2, (self.read.vocabulary, -1))
        out[:, found.example, found.token] += found.g  # each row once per example
        return (out.mT if self.transposed else out).flatten(2)

    @property
    def rows(self) -> Tensor:
        """Per-example gradients (K N, P), dense."""
        return self.gradients.flatten(0, 1)

    def used_at(self, tokens: Tensor) -> Capture:
        """The use as a weight at some rows of the table."""
        return replace(self.used, g=self.used.g[..., tokens])

    def turned(self, basis: Tensor) -> TiedCapture:
        """With the width that both uses share times a basis (d, d)."""
        return replace(
            self, read=replace(self.read, g=self.read.g @ basis), used=replace(self.used, a=self.used.a @ basis)
        )

    def units(self, start: int, stop: int) -> TiedCapture:
        """Rows start..stop of the layer's W̄."""
        read, used, some = self.read, self.used, slice(start, stop)
        if self.transposed:
            return replace(self, read=replace(read, g=read.g[..., some]), used=replace(used, a=used.a[..., some]))
        inside = (read.tokens >= start) & (read.tokens < stop)
        tokens = torch.where(inside, read.tokens - start, 0)
        read = replace(read, tokens=tokens, weights=read.weights * inside, vocabulary=stop - start)
        return replace(self, read=read, used=replace(used, g=used.g[..., some]))

    def slices(self, entries: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As of `read`, with the gradients of both uses."""
        return self.read.slices(entries, lambda tokens: self.used_at(tokens).gradients)

    def square_sum(self) -> Tensor:
        """Sum over examples and vectors of each gradient entry's square, (P,) in unit order."""
        return _square_sum(self)

    def sum(self) -> Tensor:
        """Sum of the gradient over examples and vectors, (P,) in unit order."""
        return self.joined(self.read.sum(), self.used.sum())

    def apart(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """A unit-order vector (P, ...) in the unit orders of `read` and `used`."""
        turned = self._turned(v, self.transposed)
        return (v, turned) if self.transposed else (turned, v)

    def joined(self, read: Tensor, used: Tensor) -> Tensor:
        """The sum of vectors (P, ...) in the unit orders of `read` and `used`, in the layer's."""
        if self.transposed:
            return read + self._turned(used, False)
        return used + self._turned(read, True)

    def _turned(self, v: Tensor, table: bool) -> Tensor:
        """Entries (P, ...) of a matrix as those of its transpose; `table`: (da, V) as (V, da)."""
        vocabulary = self.read.vocabulary
        shape = (-1, vocabulary) if table else (vocabulary, -1)
        return v.unflatten(0, shape).transpose(0, 1).flatten(0, 1)

    def select_vectors(self, start: int, stop: int) -> TiedCapture:
        """Vectors start..stop."""
        return self.each(lambda part: part.select_vectors(start, stop))

    def to(self, dtype: torch.dtype) -> TiedCapture:
        """In another precision."""
        return self.each(lambda part: part.to(dtype))

    def select(self, start: int, stop: int) -> TiedCapture:
        """Examples start..stop."""
        return self.each(lambda part: part.select(start, stop))

    def take(self, rows: Tensor) -> TiedCapture:
        """Examples by their positions (R,)."""
        return self.each(lambda part: part.take(rows))


def _square_sum(capture: Capture | TiedCapture) -> Tensor:
    """From per-example gradients, of as many examples at a time as fit."""
    total = capture.tensors[0].new_zeros(capture.size)
    step = max(1, at_once(DENSE_ENTRIES, total) // max(1, capture.vectors * capture.size))
    for start in range(0, capture.examples, step):
        total += capture.select(start, start + step).gradients.square_().sum((0, 1))
    return total


StructuredCapture = Capture | TokenCapture | TiedCapture
AnyCapture = StructuredCapture | GenericCapture
