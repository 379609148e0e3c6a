"""What one batch shows at an embedding: which rows of the table it reads, and the pseudo-gradients at its output.

The inputs a_nt are one-hot and never written down: ∇_nk = Σ_t w_nt g_nkt e_{x_nt}ᵀ has a few columns for each example.
Shapes: tokens x and weights w (N, T), g (K, N, T, d); W̄ (d, V) is the table's transpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tokens:
    """The columns of W̄ that some examples have a gradient in, each once per example, and these gradients.

    Attributes:
        example: (R,).
        token: (R,), ascending.
        g: (K, R, d).
    """

    example: Tensor
    token: Tensor
    g: Tensor


@dataclass(frozen=True, eq=False)
class TokenCapture:
    """Tokens and pseudo-gradients of an embedding for one batch.

    Attributes:
        tokens: columns of W̄ that are read, (N, T).
        weights: what they are multiplied by, (N, T); 0 where nothing is read (padding).
        g: pseudo-gradients of K backpropagated vectors, (K, N, T, d).
        vocabulary: number V of columns.
        counted: positions (N, T) that averages are taken over, where some are left out, at which g is zero; None: all.
    """

    tokens: Tensor
    weights: Tensor
    g: Tensor
    vocabulary: int
    counted: Tensor | None = None

    @property
    def examples(self) -> int:
        """Number N of examples."""
        return self.tokens.shape[0]

    @property
    def vectors(self) -> int:
        """Number K of backpropagated vectors per example."""
        return self.g.shape[0]

    @property
    def positions(self) -> int:
        """Number T of weight-sharing positions."""
        return self.tokens.shape[1]

    @property
    def width(self) -> int:
        """Of W̄: the vocabulary."""
        return self.vocabulary

    @property
    def factored(self) -> bool:
        """Whether the products of dense outer products g aᵀ apply: never."""
        return False

    @property
    def size(self) -> int:
        """Number of parameters."""
        return self.vocabulary * self.g.shape[-1]

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors held, those in working precision first."""
        return (self.g, self.weights, self.tokens)

    @property
    def gradients(self) -> Tensor:
        """Per-example gradients in unit order, (K, N, P), dense."""
        found = self.sparse
        k, d = self.vectors, self.g.shape[-1]
        out = self.g.new_zeros(k, self.examples, d, self.vocabulary)
        out[:, found.example, :, found.token] = found.g.transpose(0, 1)
        return out.reshape(k, self.examples, -1)

    @property
    def rows(self) -> Tensor:
        """Per-example gradients (K N, P), dense."""
        return self.gradients.flatten(0, 1)

    @cached_property
    def sparse(self) -> Tokens:
        """Per-example gradients by the columns of W̄ that they are not zero in."""
        n = self.examples
        read = self.weights != 0
        example = torch.arange(n, device=self.tokens.device).unsqueeze(1).expand_as(self.tokens)
        pairs, where = torch.unique(self.tokens[read] * n + example[read], return_inverse=True)
        weighted = self.g[:, read] * self.weights[read].unsqueeze(1)
        g = weighted.new_zeros(self.vectors, len(pairs), self.g.shape[-1]).index_add_(1, where, weighted)
        return Tokens(pairs % n, pairs // n, g)

    def slices(self, entries: int, others: Callable[[Tensor], Tensor] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """All columns (m,) of W̄ that some example reads, some at a time, and per-example gradients (K, N, m, d) there.

        Args:
            entries: of a slice, at most, unless a single column has more.
            others: gives new gradients (K, N, m d) at such columns, of another use, which are written into.
        """
        found = self.sparse
        used, column = torch.unique(found.token, return_inverse=True)
        k, _, d = found.g.shape
        step = max(1, entries // (k * self.examples * d))
        for start in range(0, len(used), step):
            stop = min(start + step, len(used))
            first, last = torch.searchsorted(column, torch.tensor([start, stop], device=column.device)).tolist()
            mine = slice(first, last)
            shape = k, self.examples, stop - start, d
            out = found.g.new_zeros(shape) if others is None else others(used[start:stop]).view(shape)
            out[:, found.example[mine], column[mine] - start] += found.g[:, mine]  # each column once per example
            yield used[start:stop], out
            del out  # before there is another

    def square_sum(self) -> Tensor:
        """Sum over examples and vectors of each gradient entry's square, (P,) in unit order."""
        found = self.sparse
        return self._summed(found.token, found.g.square().sum(0))

    def sum(self) -> Tensor:
        """Sum of the gradient over examples and vectors, (P,) in unit order."""
        found = self.sparse
        return self._summed(found.token, found.g.sum(0))

    def _summed(self, token: Tensor, rows: Tensor) -> Tensor:
        """Rows (R, d) added up in W̄, in unit order."""
        return rows.new_zeros(self.vocabulary, rows.shape[1]).index_add_(0, token, rows).T.reshape(-1)

    def counts(self, shares: Tensor | None = None) -> Tensor:
        """Σ_nt s_nt w_nt², the diagonal of the second moment of the inputs, (V,); s (N, T) is 1 where it is None."""
        squares = self.weights.square() if shares is None else self.weights.square() * shares
        return self.weights.new_zeros(self.vocabulary).index_add_(0, self.tokens.reshape(-1), squares.reshape(-1))

    def units(self, start: int, stop: int) -> TokenCapture:
        """Rows start..stop of W̄."""
        return replace(self, g=self.g[..., start:stop])

    def select_vectors(self, start: int, stop: int) -> TokenCapture:
        """Vectors start..stop."""
        return replace(self, g=self.g[start:stop])

    def to(self, dtype: torch.dtype) -> TokenCapture:
        """In another precision."""
        return replace(self, weights=self.weights.to(dtype), g=self.g.to(dtype))

    def select(self, start: int, stop: int) -> TokenCapture:
        """Examples start..stop."""
        return self._at(slice(start, stop))

    def take(self, rows: Tensor) -> TokenCapture:
        """Examples by their positions (R,)."""
        return self._at(rows)

    def _at(self, rows: slice | Tensor) -> TokenCapture:
        counted = some(self.counted, rows)
        return replace(self, tokens=self.tokens[rows], weights=self.weights[rows], g=self.g[:, rows], counted=counted)


def some(t: Tensor | None, rows: slice | Tensor) -> Tensor | None:
    """Some rows of a tensor, where there is one."""
    return None if t is None else t[rows]
