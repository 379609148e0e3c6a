"""Products of one layer's per-example gradients that are never formed: columns ∇_nk, numbered k N + n.

Gram matrices, products with vectors and combinations come from inputs and pseudo-gradients alone (Soori et al. 2021);
`examples` puts the layers together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from fisherviz.capture.captures import AnyCapture, Capture, GenericCapture, TiedCapture
from fisherviz.capture.tokens import TokenCapture
from fisherviz.operators.finite import dot, inner_products, square_sum
from fisherviz.statistics.products import GRADIENT_ENTRIES, ROW_ENTRIES, gram
from fisherviz.support.memory import at_once
from fisherviz.support.progress import progress_bar

TILE_ENTRIES = 2**24
V = TypeVar("V", float, Tensor)
Rows = tuple[int, int]
"""Examples start..stop."""


def columns_product(capture: AnyCapture, w: Tensor) -> Tensor:
    """Σ_nk w_nk ∇_nk for each column of w (K N, r): unit-order vectors (P, r)."""
    k, n = capture.vectors, capture.examples
    w = w.reshape(k, n, -1)
    if isinstance(capture, Capture) and not capture.grouped:
        a, g = capture.a.flatten(0, 1), capture.g.flatten(2).permute(1, 2, 0)  # (N, T dg, K)
        dg, out = capture.g.shape[-1], w.new_empty(w.shape[2], capture.size)
        for columns in _columns(capture, w.shape[2]):
            mixed = torch.bmm(g, w[:, :, columns].transpose(0, 1))  # (N, T dg, r)
            mixed = mixed.reshape(len(a), dg, -1).permute(2, 1, 0).flatten(0, 1)
            out[columns] = (mixed @ a).reshape(-1, capture.size)
        return out.T
    if isinstance(capture, TokenCapture):
        return _tokens_columns(capture, w)
    if isinstance(capture, TiedCapture):
        w = w.flatten(0, 1)
        return capture.joined(columns_product(capture.read, w), columns_product(capture.used, w))
    total = w.new_zeros(capture.size, w.shape[2])
    for start, stop in pieces(capture):
        total += capture.select(start, stop).gradients.flatten(0, 1).T @ w[:, start:stop].flatten(0, 1)
    return total


def rows_product(capture: AnyCapture, v: Tensor) -> Tensor:
    """∇_nkᵀ v for each column of v (P, r), unit order: (K N, r)."""
    r = v.shape[1]
    if isinstance(capture, Capture) and not capture.grouped:
        k, n, t, dg = capture.g.shape
        a, g = capture.a.flatten(0, 1), capture.g.flatten(2).transpose(0, 1)  # (N, K, T dg)
        found = v.new_empty(k, n, r)
        for columns in _columns(capture, r):
            matrices = v[:, columns].reshape(dg, a.shape[1], -1).permute(1, 0, 2).flatten(1)
            images = (a @ matrices).reshape(n, t * dg, -1)
            found[:, :, columns] = torch.bmm(g, images).transpose(0, 1)
        return found.reshape(-1, r)
    if isinstance(capture, TokenCapture):
        return _tokens_rows(capture, v)
    if isinstance(capture, TiedCapture):
        read, used = capture.apart(v)
        return rows_product(capture.read, read) + rows_product(capture.used, used)
    parts = [capture.select(*piece).gradients @ v for piece in pieces(capture)]
    return torch.cat(parts, 1).reshape(-1, r)


def _tokens_columns(capture: TokenCapture, w: Tensor) -> Tensor:
    """Σ_nk w_nk ∇_nk for w (K, N, r), by the columns of W̄ that are read: (P, r)."""
    found, (_, _, r) = capture.sparse, w.shape
    d, out = found.g.shape[-1], w.new_zeros(capture.vocabulary, capture.g.shape[-1], r)
    for rows in _rows(found.g, d * r):
        mixed = torch.bmm(found.g[:, rows].permute(1, 2, 0), w[:, found.example[rows]].transpose(0, 1))  # (R, d, r)
        out.index_add_(0, found.token[rows], mixed)
    return out.transpose(0, 1).reshape(-1, r)


def _tokens_rows(capture: TokenCapture, v: Tensor) -> Tensor:
    """∇_nkᵀ v for v (P, r), by the columns of W̄ that are read: (K N, r)."""
    found, (k, n, r) = capture.sparse, (capture.vectors, capture.examples, v.shape[1])
    d, out = found.g.shape[-1], v.new_zeros(n, k, r)
    table = v.reshape(d, capture.vocabulary, r)
    for rows in _rows(found.g, d * r):
        read = table[:, found.token[rows]].transpose(0, 1)  # (R, d, r)
        out.index_add_(0, found.example[rows], torch.bmm(found.g[:, rows].transpose(0, 1), read))
    return out.transpose(0, 1).reshape(-1, r)


def _rows(g: Tensor, entries: int) -> Iterator[slice]:
    """Slices of the rows of g (K, R, d), of which each brings so many entries, that fit."""
    count, step = g.shape[1], max(1, at_once(ROW_ENTRIES, g) // max(1, entries))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def example_gram(row: AnyCapture, start: int = 0, stop: int | None = None) -> Tensor:
    """H[(k,n),(l,m)] = ⟨∇_nk, ∇_ml⟩ for examples n in start..stop, all k: (K (stop - start), K N)."""
    stop = row.examples if stop is None else stop
    whole = start == 0 and stop == row.examples
    if isinstance(row, Capture) and row.factored:
        k, n = row.vectors, row.examples
        a, g = row.a[:, 0], row.g[:, :, 0]
        if whole:
            inputs, outputs = gram(a.T), gram(g.flatten(0, 1).T)
        else:
            inputs, outputs = a[start:stop] @ a.T, g[:, start:stop].flatten(0, 1) @ g.flatten(0, 1).T
        if k == 1:
            return outputs.mul_(inputs)
        return outputs.reshape(k, stop - start, k, n).mul_(inputs.unsqueeze(1)).reshape(k * (stop - start), k * n)
    if isinstance(row, TokenCapture):
        return _tokens_gram(row, start, stop)
    if isinstance(row, TiedCapture):
        return _tied_gram(row, start, stop)
    if isinstance(row, Capture) and _pairwise(row):
        return _pairwise_gram(row, start, stop)
    out = row.tensors[0].new_zeros(row.vectors * (stop - start), row.vectors * row.examples)
    _add_gram_of_parts(out, row, start, stop)
    return out


def add_example_gram(total: Tensor, row: AnyCapture) -> None:
    """Add `example_gram` of all examples in place, where that needs no second matrix of its size."""
    if isinstance(row, Capture) and row.factored:
        inputs, g = gram(row.a[:, 0].T), row.g[:, :, 0]
        tiles = total.view(row.vectors, row.examples, row.vectors, row.examples)
        for k in range(row.vectors):
            tiles[k, :, k] += gram(g[k].T).mul_(inputs)
            for other in range(k + 1, row.vectors):
                product = (g[k] @ g[other].T).mul_(inputs)
                tiles[k, :, other] += product
                tiles[other, :, k] += product.T
    elif isinstance(row, GenericCapture) or (isinstance(row, Capture) and not _pairwise(row)):
        _add_gram_of_parts(total, row, 0, row.examples)
    else:
        total += example_gram(row)


def _pairwise(row: Capture) -> bool:
    sizes = row.examples, row.vectors, row.positions, row.width, row.g.shape[-1]
    return not row.grouped and pairwise_is_cheaper(*sizes)


def _add_gram_of_parts(total: Tensor, row: AnyCapture, start: int, stop: int) -> None:
    """Add `example_gram` in place, from a few entries of all gradients at a time: each is formed once."""
    for part in _parts(row, at_once(TILE_ENTRIES, total)):
        rows = part.gradients.flatten(0, 1)
        if stop - start == row.examples:
            gram(rows.T, total)
        else:
            total.addmm_(rows.view(row.vectors, row.examples, -1)[:, start:stop].flatten(0, 1), rows.T)


def _parts(row: AnyCapture, entries: int) -> Iterator[AnyCapture]:
    """A layer by some of its parameters at a time, whose gradients together have so many entries."""
    step = max(1, entries // (row.vectors * row.examples))  # parameters
    if isinstance(row, GenericCapture):
        for low in range(0, row.size, step):
            yield GenericCapture(row.gradients[..., low : low + step])
    elif not isinstance(row, Capture):
        yield row
    elif row.grouped:
        units = row.g.shape[-1] * max(1, step // (row.g.shape[-1] * row.width))  # whole groups
        for low in range(0, row.size // row.width, units):
            yield row.units(low, low + units)
    else:
        units, inputs = max(1, step // row.width), min(step, row.width)
        for low in range(0, row.g.shape[-1], units):
            for left in range(0, row.width, inputs):
                yield replace(row.units(low, low + units), a=row.a[..., left : left + inputs])


def _tokens_gram(row: TokenCapture | TiedCapture, start: int, stop: int) -> Tensor:
    """The same by columns of W̄ that are read, some at a time."""
    k, n = row.vectors, row.examples
    out = row.tensors[0].new_zeros(k * (stop - start), k * n)
    for _, part in row.slices(at_once(ROW_ENTRIES, out)):
        every, some = part.flatten(0, 1).flatten(1), part[:, start:stop].flatten(0, 1).flatten(1)
        if stop - start == n:
            gram(every.T, out)
        else:
            out.addmm_(some, every.T)
        del part, every, some  # before there is another
    return out


def _tied_gram(row: TiedCapture, start: int, stop: int) -> Tensor:
    """The same: both uses together at the rows of the table that are read, and the weight's at the others."""
    out = _tokens_gram(row, start, stop)
    unread = torch.ones(row.read.vocabulary, dtype=torch.bool, device=out.device)
    unread[row.read.sparse.token] = False
    if bool(unread.any()):
        out += example_gram(row.used_at(unread), start, stop)
    return out


def pairwise_is_cheaper(n: int, k: int, t: int, da: int, dg: int) -> bool:
    """Products of positions pair by pair, or of whole per-example gradients?

    Args:
        n: examples.
        k: vectors.
        t: positions.
        da: width of the inputs.
        dg: of the pseudo-gradients.
    """
    pairwise = n * n * t * t * (da + k * k * dg)
    gradients = n * k * t * da * dg + (n * k) ** 2 * da * dg
    return pairwise < gradients


def _pairwise_gram(row: Capture, start: int, stop: int) -> Tensor:
    """Σ_tt' (ā_nt·ā_mt') (g_nkt·g_mlt'), in tiles of examples."""
    k, n, t = row.vectors, row.examples, row.positions
    out = row.a.new_empty(k, stop - start, k, n)
    step = max(1, int((at_once(TILE_ENTRIES, out) / (t * t * k * k)) ** 0.5))
    for s in range(start, stop, step):
        e = min(s + step, stop)
        for low in range(0, n, step):
            high = min(low + step, n)
            inputs = torch.einsum("nti,mui->nmtu", row.a[s:e], row.a[low:high])
            outputs = torch.einsum("knto,lmuo->knlmtu", row.g[:, s:e], row.g[:, low:high])
            out[:, s - start : e - start, :, low:high] = torch.einsum("nmtu,knlmtu->knlm", inputs, outputs)
    return out.reshape(k * (stop - start), k * n)


def tile(n: int, k: int, layers: int, entries: int) -> int:
    """Examples whose rows of all layers' Gram matrices (K n, K n) have so many entries, of up to four layers each."""
    return max(1, entries // (k * k * n * max(1, layers // 4)))


def tile_ranges(captures: Sequence[AnyCapture]) -> list[Rows]:
    """Ranges of examples whose rows of every layer's Gram matrix are small enough to be held together."""
    n, k = captures[0].examples, captures[0].vectors
    step = tile(n, k, len(captures), at_once(TILE_ENTRIES, captures[0].tensors[0]))
    return [(start, min(start + step, n)) for start in range(0, n, step)]


def gram_strips(captures: Sequence[AnyCapture], ranges: Sequence[Rows] | None = None) -> Iterator[list[Tensor]]:
    """Strips (K, m, K, m + r) of every layer's Gram matrix, from the diagonal to the right, of `tile_ranges` or some.

    What is left of a strip stands in those before it: see `mirrored`.
    """
    for start, stop in progress_bar(tile_ranges(captures) if ranges is None else ranges, "Gram matrices", "tile"):
        m, k = stop - start, captures[0].vectors
        yield [example_gram(c.select(start, c.examples), 0, m).view(k, m, k, -1) for c in captures]


def mirrored(product: Callable[[list[Tensor]], V], strips: Sequence[Tensor]) -> V:
    """What sums over strips are in the whole matrices: all that is right of the diagonal tile counts twice.

    Args:
        product: a sum over entries.
        strips: of several matrices, as of `gram_strips`.
    """
    m, found = strips[0].shape[1], product(list(strips))
    if strips[0].shape[3] == m:
        return found
    return 2 * found - product([strip[..., :m] for strip in strips])


def block_square_norm(row: AnyCapture, col: AnyCapture) -> float:
    """Σ H_row ∘ H_col, which is ‖Σ_nk vec ∇ᵢ vec ∇ⱼᵀ‖²; accumulated in float64."""
    if row is col and isinstance(row, Capture) and row.factored:
        return _factored_square_norm(row)
    total = 0.0
    for strips in gram_strips([row] if row is col else [row, col]):
        total += mirrored(lambda each: dot(each[0], each[-1]), strips)
    return total


def block_square_norms(
    captures: Sequence[AnyCapture], ranges: Sequence[Rows] | None = None
) -> dict[tuple[int, int], float]:
    """`block_square_norm` of all pairs (i, j), i <= j, each Gram matrix computed once; what some ranges give of it."""
    total = sum(mirrored(inner_products, strips) for strips in gram_strips(captures, ranges))
    assert isinstance(total, Tensor)
    return {(i, j): float(total[i, j]) for i in range(len(captures)) for j in range(i, len(captures))}


def _factored_square_norm(capture: Capture) -> float:
    """The same over pairs of examples n <= m only, each off-diagonal pair twice."""
    a, g = capture.a[:, 0], capture.g[:, :, 0]
    n, k = capture.examples, capture.vectors
    step = max(1, min(256, at_once(TILE_ENTRIES, g) // (k * k * n)))
    total = 0.0
    for start in range(0, n, step):
        stop = min(start + step, n)
        outputs = g[:, start:stop].flatten(0, 1) @ g[:, start:].flatten(0, 1).T
        outputs = torch.linalg.vector_norm(outputs.view(k, stop - start, k, n - start), dim=(0, 2))
        pairs = outputs.mul_(a[start:stop] @ a[start:].T)  # their squares may leave the range
        total += 2 * square_sum(pairs) - square_sum(pairs[:, : stop - start])
    return total


def _columns(capture: Capture, r: int) -> Iterator[slice]:
    """Slices of r right-hand sides whose images at a layer's outputs fit."""
    _, n, t, dg = capture.g.shape
    step = max(1, at_once(GRADIENT_ENTRIES, capture.g) // (n * t * dg))
    for start in range(0, r, step):
        yield slice(start, min(start + step, r))


def pieces(capture: AnyCapture, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
    """Ranges of examples whose stacked per-example gradients fit."""
    stop = capture.examples if stop is None else stop
    step = max(1, at_once(GRADIENT_ENTRIES, capture.tensors[0]) // max(1, capture.vectors * capture.size))
    for low in range(start, stop, step):
        yield low, min(low + step, stop)


def gram_and_cross(capture: AnyCapture, k: int) -> tuple[Tensor, Tensor]:
    """⟨∇, ∇⟩ of the first k vectors, and their ⟨∇, ∇'⟩ with the L others: (k N, k N) and (k N, L N).

    The inputs are the same, and so is their Gram matrix.
    """
    row, other = capture.select_vectors(0, k), capture.select_vectors(k, capture.vectors)
    if isinstance(row, Capture) and isinstance(other, Capture) and row.factored:
        inputs = gram(row.a[:, 0].T)
        mine, its = row.g[:, :, 0].flatten(0, 1), other.g[:, :, 0].flatten(0, 1)
        return _times(gram(mine.T), inputs), _times(mine @ its.T, inputs)
    n, parts = other.examples, []
    if isinstance(capture, TokenCapture | TiedCapture):
        pairs = example_gram(capture).view(capture.vectors, n, capture.vectors, n)
        own = pairs[:k].flatten(0, 1)
        return own[:, :k].reshape(k * n, -1), own[:, k:].reshape(k * n, -1)
    for low, high in pieces(other):
        right = other.select(low, high).gradients.flatten(0, 1).T
        parts.append(rows_product(row, right).unflatten(1, (other.vectors, high - low)))
    return example_gram(row), torch.cat(parts, 2).reshape(-1, other.vectors * n)


def _times(outputs: Tensor, inputs: Tensor) -> Tensor:
    """Products of output gradients (K N, L N) times those of the inputs (N, N), in place."""
    n = len(inputs)
    if len(outputs) == n == outputs.shape[1]:
        return outputs.mul_(inputs)
    tiles = outputs.view(len(outputs) // n, n, -1, n)
    return tiles.mul_(inputs.unsqueeze(1)).view(outputs.shape)
