"""What one batch shows at one layer: inputs a with the homogeneous coordinate, pseudo-gradients g at its output.

The per-example gradient of vector k is ∇_nk = Σ_t g_nkt a_ntᵀ (DESIGN section 2); statistics read nothing else.
Shapes: a (N, T, da), g (K, N, T, dg); grouped convolutions a (N, T, groups, da), g (K, N, T, groups, dg).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisherviz.capture.tokens import TokenCapture, some


@dataclass(frozen=True, eq=False)
class Capture:
    """Inputs and pseudo-gradients of a structured layer for one batch.

    Attributes:
        a: inputs with the 1 appended, (N, T, da) or (N, T, groups, da).
        g: pseudo-gradients of K backpropagated vectors, (K, N, T, dg) or (K, N, T, groups, dg).
        counted: positions (N, T) that averages are taken over, where some are left out, at which g is zero; None: all.
    """

    a: Tensor
    g: Tensor
    counted: Tensor | None = None

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
        """Memory held by a and g."""
        return self.a.numel() * self.a.element_size() + self.g.numel() * self.g.element_size()

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
        return self.gradients.square().sum((0, 1))

    def sum(self) -> Tensor:
        """Sum of the gradient over examples and vectors, (P,) in unit order."""
        if self.grouped:
            return self.gradients.sum((0, 1))
        return (self.g.sum(0).flatten(0, 1).T @ self.a.flatten(0, 1)).reshape(-1)

    def select_vectors(self, start: int, stop: int) -> Capture:
        """Vectors start..stop."""
        return Capture(self.a, self.g[start:stop], self.counted)

    def to(self, dtype: torch.dtype) -> Capture:
        """In another precision."""
        return Capture(self.a.to(dtype), self.g.to(dtype), self.counted)

    def select(self, start: int, stop: int) -> Capture:
        """Examples start..stop."""
        return Capture(self.a[start:stop], self.g[:, start:stop], some(self.counted, slice(start, stop)))

    def take(self, rows: Tensor) -> Capture:
        """Examples by their positions (R,)."""
        return Capture(self.a[rows], self.g[:, rows], some(self.counted, rows))


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
        return self.gradients.square().sum((0, 1))

    def sum(self) -> Tensor:
        """Sum of the gradient over examples and vectors, (P,)."""
        return self.gradients.sum((0, 1))

    def select_vectors(self, start: int, stop: int) -> GenericCapture:
        """Vectors start..stop."""
        return GenericCapture(self.gradients[start:stop])

    def to(self, dtype: torch.dtype) -> GenericCapture:
        """In another precision."""
        return GenericCapture(self.gradients.to(dtype))

    def select(self, start: int, stop: int) -> GenericCapture:
        """Examples start..stop."""
        return GenericCapture(self.gradients[:, start:stop])

    def take(self, rows: Tensor) -> GenericCapture:
        """Examples by their positions (R,)."""
        return GenericCapture(self.gradients[:, rows])


AnyCapture = Capture | GenericCapture | TokenCapture


def concatenate(captures: Sequence[AnyCapture]) -> AnyCapture:
    """One capture of all examples of several captures of the same layer.

    Captures with fewer vectors or positions than others are padded with zeros, which leave every gradient, and every
    sum over them, alone; averages over positions must not be taken from the result (see `ragged`).
    """
    if len(captures) == 1:
        return captures[0]
    vectors = max(c.vectors for c in captures)
    positions = max(_positions(c) for c in captures)
    if any(isinstance(c, GenericCapture) for c in captures):
        return GenericCapture(torch.cat([_padded(c.gradients, 0, vectors) for c in captures], 1))
    structured = [c for c in captures if isinstance(c, Capture)]
    read = [c for c in captures if isinstance(c, TokenCapture)]
    shown: Sequence[Capture | TokenCapture] = structured or read
    g = torch.cat([_padded(_padded(c.g, 2, positions), 0, vectors) for c in shown], 1)
    counted = None
    if any(c.counted is not None for c in shown):
        every = [c.g.new_ones(c.g.shape[1:3], dtype=torch.bool) if c.counted is None else c.counted for c in shown]
        counted = torch.cat([_padded(part, 1, positions) for part in every])
    if structured:
        return Capture(torch.cat([_padded(c.a, 1, positions) for c in structured]), g, counted)
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
    made: dict[str, AnyCapture] = {}
    for name, own in parts[0].captures.items():
        every = [part.captures[name] for part in parts]
        if isinstance(own, GenericCapture):
            made[name] = GenericCapture(torch.cat([c.gradients for c in every if isinstance(c, GenericCapture)]))
        else:
            made[name] = replace(own, g=torch.cat([c.g for c in every if not isinstance(c, GenericCapture)]))
    return Batch(made, parts[0].examples, parts[0].first)


def concatenated_bytes(captures: Sequence[AnyCapture]) -> int:
    """Memory that one capture of them all holds at most."""
    vectors, positions = max(c.vectors for c in captures), max(_positions(c) for c in captures)
    return sum(c.bytes * vectors * positions // (max(c.vectors, 1) * _positions(c)) for c in captures)


def _positions(capture: AnyCapture) -> int:
    return 1 if isinstance(capture, GenericCapture) else capture.positions


def ragged(captures: Sequence[AnyCapture]) -> bool:
    """Whether captures of the same layer differ in their numbers of positions, or in kind."""
    return len({-1 if isinstance(c, GenericCapture) else c.positions for c in captures}) > 1


def _padded(t: Tensor, axis: int, size: int) -> Tensor:
    if t.shape[axis] == size:
        return t
    shape = (*t.shape[:axis], size - t.shape[axis], *t.shape[axis + 1 :])
    return torch.cat([t, t.new_zeros(shape)], axis)


@dataclass(frozen=True, eq=False)
class Batch:
    """Captures of one batch by layer name, with its number of examples.

    Attributes:
        captures: by layer name.
        examples: their number.
        first: position of the batch's first example in the data.
        later: whether the batch before had the same examples with other vectors: neither they nor their inputs count
            again.
    """

    captures: dict[str, AnyCapture]
    examples: int
    first: int = 0
    later: bool = False

    @property
    def bytes(self) -> int:
        """Memory held by all captures."""
        return sum(c.bytes for c in self.captures.values())
