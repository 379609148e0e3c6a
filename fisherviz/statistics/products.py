"""The matrix products behind the statistics, with the field's identities.

For T = 1 an exact block is one (dg² x N)(N x da²) product, halved by symmetry on the diagonal; Gram matrices are
computed on one side of their diagonal. Results are sums over examples and vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisherviz.capture.captures import AnyCapture, Capture
from fisherviz.operators.factorise import MIRRORED, symmetric
from fisherviz.support.counting import counted_as
from fisherviz.support.memory import at_once

GRADIENT_ENTRIES = 2**26
"""Entries of stacked per-example gradients that are held at once."""
ROW_ENTRIES = 2**22
"""Entries of per-example gradients that are multiplied at once for one block: memory that is used again, not fresh."""
OUTER_ENTRIES = 2**19
"""Entries of per-example outer products that are held at once."""
WHOLE_ENTRIES = 2**22
"""Diagonal blocks up to this many entries are expanded whole before they are written."""
STRIP = MIRRORED
"""Least number of rows of a Gram matrix that are computed at once, from the diagonal to the right; others are multiples
of it."""
STRIP_ENTRIES = 2**16
"""Rows with fewer entries are multiplied whole: many small products cost more than half of a large one."""


def gram(x: Tensor, total: Tensor | None = None) -> Tensor:
    """Second moment xᵀ x of rows (R, d), or (..., R, d), symmetric bit for bit; added to `total` in place.

    Where it pays one triangle is computed, strip by strip, and mirrored.
    """
    d = x.shape[-1]
    if d <= 2 * STRIP or x.shape[-2] * d < STRIP_ENTRIES:
        product = symmetric(x.mT @ x)
        return product if total is None else total.add_(product)
    out = x.new_empty(*x.shape[:-2], d, d) if total is None else total
    width = strip_width(d)
    with counted_as(2 * x.numel() * d):
        for low in range(0, d, width):
            high = min(low + width, d)
            rows, strip = x[..., low:high].mT, out[..., low:high, low:]
            if x.dim() > 2:
                strip.copy_(rows @ x[..., low:]) if total is None else strip.add_(rows @ x[..., low:])
            elif total is None:
                torch.mm(rows, x[:, low:], out=strip)
            else:
                strip.addmm_(rows, x[:, low:])
    return symmetric(out)


def second_moment(x: Tensor) -> Tensor:
    """Second moment (d, d) of all rows of x (..., d), symmetric bit for bit.

    Where positions stand closer in memory than a row's entries, as pixels do, each example's product is taken by
    itself: to bring all rows into order costs as much as the product.
    """
    d = x.shape[-1]
    if x.dim() < 3 or x.stride(-1) == 1 or x.stride(-2) != 1 or 2 * x.shape[-2] < d:
        return gram(x.flatten(0, -2))
    total, examples = x.new_zeros(d, d), x.flatten(0, -3)
    for part in examples.split(max(1, OUTER_ENTRIES // d**2)):
        total += torch.bmm(part.mT, part).sum(0)
    return symmetric(total)


def strip_width(d: int) -> int:
    """Rows of a symmetric (d, d) product that are computed at once."""
    return STRIP * max(1, min(3, d // (6 * STRIP)))


def working(x: Tensor) -> torch.dtype:
    """At least float32, which sums over examples are taken in."""
    return torch.promote_types(x.dtype, torch.float32)


def unpack_index(d: int, device: torch.device) -> Tensor:
    """Where entry (i, j) of a symmetric (d, d) matrix stands in its packed upper triangle, flat (d²,)."""
    i, j = torch.triu_indices(d, d, device=device)
    index = torch.empty(d, d, dtype=torch.long, device=device)
    index[i, j] = index[j, i] = torch.arange(len(i), device=device)
    return index.reshape(-1)


def summed_outer(row: Tensor, col: Tensor, out: Tensor | None = None) -> Tensor:
    """Σ_k g_nk h_nkᵀ, (N, d, e), from (K, N, d) and (K, N, e)."""
    if len(row) == 1:
        return torch.mul(row[0].unsqueeze(2), col[0].unsqueeze(1), out=out)
    return torch.bmm(row.permute(1, 2, 0), col.transpose(0, 1), out=out)


def weighted_moments(a: Tensor, weights: Tensor) -> Tensor:
    """Σ_n w_no a_n a_nᵀ for each column o of the weights (N, d): (d, da, da).

    A few columns i of all of them are one product of the weighted inputs a_i with a; one triangle is computed.
    """
    da = a.shape[1]
    out = a.new_empty(weights.shape[1], da, da)
    rows, columns = weights.T.contiguous(), a.T.contiguous()
    step = max(1, OUTER_ENTRIES // max(1, rows.numel()))
    with counted_as(2 * rows.numel() * da**2):
        for i in range(0, da, step):
            weighted = (columns[i : i + step].unsqueeze(1) * rows).flatten(0, 1)
            part = (weighted @ a[:, i:]).unflatten(0, (-1, len(rows))).transpose(0, 1)
            width = part.shape[1]
            part[..., :width] = symmetric(part[..., :width])
            out[:, i : i + step, i:] = part
            out[:, i:, i : i + step] = part.mT
    return out


def weighted_moments_square_norm(a: Tensor, weights: Tensor) -> float:
    """‖weighted_moments‖² = Σ_nm (a_n·a_m)² Σ_o w_no w_mo, in tiles of examples, accumulated in float64."""
    total, step = 0.0, max(1, min(512, at_once(GRADIENT_ENTRIES, a) // max(1, len(a))))
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        inputs = (a[rows] @ a.T).double()
        total += float(inputs.square_().mul_(weights[rows] @ weights.T).sum())
    return total


def block(row: AnyCapture, col: AnyCapture) -> Tensor:
    """Exact Fisher block Σ_nk vec ∇ᵢ vec ∇ⱼᵀ in unit order, (P_row, P_col); one capture twice: a diagonal block."""
    if isinstance(row, Capture) and isinstance(col, Capture) and row.factored and col.factored:
        out = row.a.new_empty(row.size, col.size)
        view = out.view(row.g.shape[-1], row.a.shape[-1], col.g.shape[-1], col.a.shape[-1])
        if row is col:
            whole = slice(None)
            write_half(half_block(row), [(view, whole, whole)], row.g.shape[-1], row.a.shape[-1])
        else:
            view.copy_(cross_block(row, col).transpose(1, 2))
        return out
    total: Tensor | None = None
    if row is col:
        x, each = row.tensors[0], row.vectors * row.size
        most = min(2048 // row.vectors, at_once(GRADIENT_ENTRIES, x) // each)
        step = max(1, at_once(ROW_ENTRIES, x) // each, most)
        step = -(-row.examples // -(-row.examples // step))  # equal parts: a short last one would cost as much
        for start in range(0, row.examples, step):
            total = gram(row.select(start, start + step).rows, total)
        assert total is not None
        return total
    step = max(1, at_once(GRADIENT_ENTRIES, row.tensors[0]) // (row.vectors * (row.size + col.size)))
    for start in range(0, row.examples, step):
        left = row.select(start, start + step).gradients.flatten(0, 1)
        part = left.T @ col.select(start, start + step).gradients.flatten(0, 1)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def cross_block(row: Capture, col: Capture) -> Tensor:
    """A block between two factored layers as Σ_n (Σ_k g gᵀ) ⊗ (a aᵀ), axes (dg_row, dg_col, da_row, da_col)."""
    a, b = row.a[:, 0], col.a[:, 0]
    shape = (row.g.shape[-1], col.g.shape[-1], a.shape[-1], b.shape[-1])
    total = a.new_empty(shape[0] * shape[1], shape[2] * shape[3])
    step = _outer_step(len(a), shape[0] * shape[1] + shape[2] * shape[3])
    inputs, outputs = a.new_empty(step, *shape[2:]), a.new_empty(step, *shape[:2])
    for start in range(0, len(a), step):
        rows, n = slice(start, start + step), min(step, len(a) - start)
        torch.mul(a[rows].unsqueeze(2), b[rows].unsqueeze(1), out=inputs[:n])
        summed_outer(row.g[:, rows, 0], col.g[:, rows, 0], out=outputs[:n])
        total.addmm_(outputs[:n].flatten(1).T, inputs[:n].flatten(1), beta=float(start > 0))
    return total.view(shape)


def _outer_step(n: int, entries: int) -> int:
    """Examples per tile: equal tiles whose outer products stay in the cache where the result is small."""
    tiles = -(-n // max(512, OUTER_ENTRIES // entries))
    return -(-n // tiles)


def half_block(capture: Capture) -> Tensor:
    """A diagonal block from the halves of both symmetric factors: (pairs of outputs, pairs of inputs)."""
    a, g = capture.a[:, 0], capture.g[:, :, 0]
    da, dg = a.shape[-1], g.shape[-1]
    pairs_a, pairs_g = da * (da + 1) // 2, dg * (dg + 1) // 2
    total = a.new_empty(pairs_g, pairs_a)
    step = _outer_step(len(a), pairs_a + pairs_g)
    inputs = a.new_empty(pairs_a, step)
    for start in range(0, len(a), step):
        rows, n = slice(start, start + step), min(step, len(a) - start)
        _half_products(a[rows], inputs[:, :n])
        total.addmm_(_half_outputs(g[:, rows]), inputs[:, :n].T, beta=float(start > 0))
    return total


def _half_products(x: Tensor, out: Tensor) -> None:
    """x_i x_j for i <= j of each row of (N, d), packed row by row of the upper triangle: (d (d + 1) / 2, N)."""
    columns, d = x.T.contiguous(), x.shape[1]
    position = 0
    for i in range(d):
        torch.mul(columns[i], columns[i:], out=out[position : position + d - i])
        position += d - i


def _half_outputs(g: Tensor) -> Tensor:
    """Upper triangle of Σ_k g gᵀ, (dg (dg + 1) / 2, N)."""
    _, n, d = g.shape
    if len(g) == 1:
        out = g.new_empty(d * (d + 1) // 2, n)
        _half_products(g[0], out)
        return out
    i, j = torch.triu_indices(d, d, device=g.device)
    return summed_outer(g, g).flatten(1).index_select(1, i * d + j).T


def write_half(half: Tensor, targets: list[tuple[Tensor, slice, slice]], dg: int, da: int, scale: float = 1.0) -> None:
    """Write a half block, one row of output units at a time: the expanded half never stands beside the whole.

    Args:
        half: (pairs of outputs, pairs of inputs) as `half_block` gives it.
        targets: views (dg, ., dg, .) with the columns of W̄ on either side that they take.
        dg: output units.
        da: width of W̄.
        scale: a factor.
    """
    index = unpack_index(da, half.device)
    if (dg * da) ** 2 <= at_once(WHOLE_ENTRIES, half):  # many small writes would cost more than the products
        whole = half.index_select(0, unpack_index(dg, half.device)).index_select(1, index).reshape(dg, dg, da, da)
        for out, rows, cols in targets:
            torch.mul(whole[:, :, rows, cols].transpose(1, 2), scale, out=out)
        return
    start = 0
    for o in range(dg):
        expanded = half[start : start + dg - o].index_select(1, index).reshape(dg - o, da, da)
        if scale != 1.0:
            expanded.mul_(scale)
        for out, rows, cols in targets:
            part = expanded[:, rows, cols]
            out[o, :, o:] = part.transpose(0, 1)
            out[o + 1 :, :, o] = part[1:]
        start += dg - o
