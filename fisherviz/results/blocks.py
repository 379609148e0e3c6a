"""The blocks between layers as an explorer of matrices takes them: exactly where that is cheap, else as cells.

A block that vanishes, equals the exact one, or is built of Kronecker factors takes a few numbers and stays exact; any
other is held entry by entry while a network's blocks stay few, and as cells of several entries beyond. What is close to
the exact block is held as its difference from it, so that a small difference is never that of two rounded numbers.

`pack` writes what the page reads in the browser (report/blocks.js).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fisherviz.results.cells import reduce_matrix

ZERO, SAME, BASIS, OUTER, ENTRIES, GAPS, CELLS = range(7)
"""How a block is held: nothing (zero, or equal to the exact one), factors (numbers of a Kronecker-factored eigenbasis,
or of a Kronecker product), entries, differences from the exact ones, or cells."""
FULL = 400_000
"""Entries of one matrix, its lower triangle left out, up to which they are held one by one."""
SIDE = 280
"""Cells per side of a whole matrix, otherwise."""
BITS = 7
"""Binary digits behind the point that entries and cells keep: they are right to 1 part in 256."""
ROUNDING = 5e-5
"""Of a block's norm: what two ways to compute it in float32 may differ by."""
CLOSE = 0.2
"""Of the exact block's norm: an approximation within is held by its difference, whatever it is built of."""

_BASE = 2**16


@dataclass(frozen=True)
class Layout:
    """How blocks are cut.

    Args:
        shapes: of each layer's parameters as a matrix, (units, inputs); (size, 1) where they are none.
        within: entries per cell and side in a layer's own block.
        between: in a block between two layers.
    """

    shapes: tuple[tuple[int, int], ...]
    within: int
    between: int

    @property
    def sizes(self) -> list[int]:
        """Parameters of each layer."""
        return [rows * cols for rows, cols in self.shapes]

    def factor(self, i: int, j: int) -> int:
        """Entries per cell and side of a block."""
        return self.within if i == j else self.between

    def blocks(self) -> Iterator[tuple[int, int, slice, slice]]:
        """Positions and ranges of the blocks on and above the diagonal."""
        edges = np.concatenate([[0], np.cumsum(self.sizes)]).tolist()
        for i in range(len(self.shapes)):
            for j in range(i, len(self.shapes)):
                yield i, j, slice(edges[i], edges[i + 1]), slice(edges[j], edges[j + 1])

    def to_array(self) -> np.ndarray:
        """As a comparison saves it."""
        return np.array([(self.within, self.between), *self.shapes], dtype=np.float32)


def layout(shapes: list[tuple[int, int]]) -> Layout:
    """The finest layout that a page has room for.

    Args:
        shapes: of each layer's parameters as a matrix.
    """
    sizes = [rows * cols for rows, cols in shapes]
    size = sum(sizes)
    coarse = -(-size // SIDE)
    if size * (size + 1) // 2 <= FULL:
        return Layout(tuple(shapes), 1, 1)
    own = sum(n * (n + 1) // 2 for n in sizes)
    return Layout(tuple(shapes), 1 if own <= FULL else coarse, coarse)


def pack(matrix: np.ndarray, exact: np.ndarray | None, cut: Layout) -> tuple[np.ndarray, np.ndarray]:
    """A matrix as two streams of numbers.

    Args:
        matrix: symmetric, (P, P), in unit order.
        exact: what it approximates; None: it is the exact one.
        cut: how blocks are cut.

    Returns:
        Each block's kind followed by its factors; and entries and cells, rounded. Blocks on and above the diagonal, row
        by row; of those on it the entries and cells on and above it.
    """
    factors: list[np.ndarray] = []
    entries: list[np.ndarray] = []
    for i, j, rows, cols in cut.blocks():
        own = np.ascontiguousarray(matrix[rows, cols])
        other = None if exact is None else np.ascontiguousarray(exact[rows, cols])
        kind, few, many = _packed(own, other, cut.shapes[i], cut.shapes[j], cut.factor(i, j), i == j)
        factors += [np.array([kind]), *(part.reshape(-1) for part in few)]
        entries += [part[np.triu_indices(len(part))] if i == j else part.reshape(-1) for part in many]
    return (
        np.concatenate(factors).astype(np.float32),
        rounded(np.concatenate([np.zeros(0), *entries]).astype(np.float32), BITS),
    )


def _packed(
    own: np.ndarray, exact: np.ndarray | None, rows: tuple[int, int], cols: tuple[int, int], factor: int, diagonal: bool
) -> tuple[int, list[np.ndarray], list[np.ndarray]]:
    """A block's kind, its factors, its entries or cells."""
    if not own.any():
        return ZERO, [], []
    gap = own if exact is None else exact - own
    near = False
    if exact is not None:
        distance, size = np.linalg.norm(gap), np.linalg.norm(exact)
        if distance <= ROUNDING * size:
            return SAME, [], []
        near = factor == 1 and distance <= CLOSE * size
    away = [] if exact is None or factor == 1 else [reduce_matrix(gap, factor, True)]
    parts = own.reshape(*rows, *cols)
    if not near and (few := _outer(parts)) is not None:
        return OUTER, few, away
    if not near and diagonal and (few := _basis(parts)) is not None:
        return BASIS, few, away
    if factor == 1:
        return (GAPS, [], [gap]) if near else (ENTRIES, [], [own])
    return CELLS, [], [reduce_matrix(own, factor, True), mean_cells(gap, factor), *away]


def _outer(parts: np.ndarray) -> list[np.ndarray] | None:
    """G and A of a block (units, inputs, units', inputs') that is G ⊗ A."""
    i, a, j, b = np.unravel_index(int(np.abs(parts).argmax()), parts.shape)
    G, A = parts[:, a, :, b], parts[i, :, j, :] / parts[i, a, j, b]
    far = np.linalg.norm(parts - G[:, None, :, None] * A[None, :, None, :])
    return [G, A] if far <= ROUNDING * np.linalg.norm(parts) else None


def _basis(parts: np.ndarray) -> list[np.ndarray] | None:
    """Q, R and S of a symmetric block (Q ⊗ R) diag(S) (Q ⊗ R)ᵀ, with orthogonal Q and R."""
    size = np.linalg.norm(parts)
    if np.abs(parts - parts.transpose(2, 1, 0, 3)).max() > ROUNDING * size:
        return None
    Q = np.linalg.eigh(np.einsum("iaja->ij", parts))[1]
    R = np.linalg.eigh(np.einsum("iaib->ab", parts))[1]
    units, inputs = len(Q), len(R)
    turned = (parts.reshape(-1, inputs) @ R).reshape(units, inputs, units, inputs)
    turned = (turned.transpose(0, 2, 3, 1).reshape(-1, inputs) @ R).reshape(units, units, inputs, inputs)
    turned = (Q.T @ turned.reshape(units, -1)).reshape(units, units, -1)  # k, j, (b a)
    turned = np.matmul(Q.T, turned).reshape(units, units, inputs, inputs)
    S = np.einsum("kkll->kl", turned).copy()
    far = np.square(turned).sum() - np.square(S).sum()
    return [Q, R, S] if far <= ROUNDING**2 * size**2 + 1e-13 * size**2 else None


def digits(positions: np.ndarray) -> np.ndarray:
    """Whole numbers as two digits of base 2^16, (2, n), which float32 holds exactly; `of_digits` reads them."""
    return np.stack(np.divmod(positions, _BASE)).astype(np.float32)


def of_digits(saved: np.ndarray) -> np.ndarray:
    """The whole numbers (n,) that `digits` wrote."""
    high, low = saved.astype(np.int64)
    return high * _BASE + low


def mean_cells(matrix: np.ndarray, factor: int) -> np.ndarray:
    """Cells of `factor` × `factor` entries, each holding their mean; the last cell may cover fewer."""
    starts = [np.arange(0, side, factor) for side in matrix.shape]
    sums = np.add.reduceat(np.add.reduceat(matrix, starts[0], axis=0), starts[1], axis=1)
    counts = [np.minimum(factor, side - start) for side, start in zip(matrix.shape, starts, strict=True)]
    return sums / np.outer(*counts)


def rounded(values: np.ndarray, bits: int) -> np.ndarray:
    """Numbers with so many binary digits behind the point, right to 2^-(bits + 1); zero stays zero.

    Args:
        values: float32.
        bits: from 1 to 22.
    """
    drop = 23 - bits
    whole = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((whole + np.uint32(1 << (drop - 1))) & np.uint32(0xFFFFFFFF << drop & 0xFFFFFFFF)).view(np.float32)
