"""The matrix products behind the statistics, with the field's identities (DESIGN section 6).

For T = 1 an exact block is one (da² x N)(N x dg²) product, halved by symmetry on the diagonal; Gram matrices are
computed on one side of their diagonal. Results are sums over examples and vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisherviz.captures import AnyCapture, Capture

GRADIENT_ENTRIES = 2**26
"""Entries of stacked per-example gradients that are held at once."""
_LEAF = 192
"""Widths up to this are multiplied whole; wider Gram matrices are halved."""


def gram(x: Tensor) -> Tensor:
    """X Xᵀ-style second moment: xᵀ x of rows (R, d), or (..., R, d), computing one triangle."""
    d = x.shape[-1]
    if d <= 2 * _LEAF or x.shape[-2] < d // 2:  # few rows: reflecting the triangle costs more than it saves
        return x.mT @ x
    out = x.new_empty(*x.shape[:-2], d, d)
    _gram_into(out, x, 0, d)
    return out


def _gram_into(out: Tensor, x: Tensor, low: int, high: int) -> None:
    if high - low <= _LEAF:
        part = x[..., low:high]
        out[..., low:high, low:high] = part.mT @ part
        return
    middle = (low + high) // 2
    cross = x[..., middle:high].mT @ x[..., low:middle]
    out[..., middle:high, low:middle] = cross
    out[..., low:middle, middle:high] = cross.mT
    _gram_into(out, x, low, middle)
    _gram_into(out, x, middle, high)


def pair_gram(x: Tensor, y: Tensor) -> Tensor:
    """Cross moment xᵀ y of (..., d) and (..., e) over all leading dimensions."""
    return x.flatten(0, -2).T @ y.flatten(0, -2)


def block(row: AnyCapture, col: AnyCapture) -> Tensor:
    """Exact Fisher block Σ_nk vec ∇ᵢ vec ∇ⱼᵀ in unit order, (P_row, P_col); one capture twice: a diagonal block."""
    if isinstance(row, Capture) and isinstance(col, Capture) and row.factored and col.factored:
        return _factored_diagonal_block(row) if row is col else _factored_block(row, col)
    total: Tensor | None = None
    step = max(1, GRADIENT_ENTRIES // (row.vectors * (row.size + col.size)))
    for start in range(0, row.examples, step):
        left = row.select(start, start + step).gradients.flatten(0, 1)
        part = gram(left) if row is col else left.T @ col.select(start, start + step).gradients.flatten(0, 1)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _summed_outer(row: Tensor, col: Tensor) -> Tensor:
    """Σ_k g_nk h_nkᵀ, (N, d, e), from (K, N, d) and (K, N, e)."""
    if len(row) == 1:
        return row[0].unsqueeze(2) * col[0].unsqueeze(1)
    return row.permute(1, 2, 0) @ col.transpose(0, 1)


def _factored_block(row: Capture, col: Capture) -> Tensor:
    n = row.examples
    inputs = (row.a[:, 0].unsqueeze(2) * col.a[:, 0].unsqueeze(1)).reshape(n, -1)
    outputs = _summed_outer(row.g[:, :, 0], col.g[:, :, 0]).reshape(n, -1)
    product = outputs.T @ inputs
    shape = (row.g.shape[-1], col.g.shape[-1], row.a.shape[-1], col.a.shape[-1])
    return product.reshape(shape).transpose(1, 2).reshape(row.size, col.size)


def _factored_diagonal_block(capture: Capture) -> Tensor:
    """Both factors are symmetric: multiply their halves and write the rest by reflection."""
    a, g = capture.a[:, 0], capture.g[:, :, 0]
    da, dg = a.shape[-1], g.shape[-1]
    ai, aj = torch.triu_indices(da, da, device=a.device)
    gi, gj = torch.triu_indices(dg, dg, device=a.device)
    inputs = a[:, ai] * a[:, aj]
    outputs = _summed_outer(g, g)[:, gi, gj]
    half = outputs.T @ inputs  # (pairs of outputs, pairs of inputs)
    unpack = torch.empty(da, da, dtype=torch.long, device=a.device)
    unpack[ai, aj] = unpack[aj, ai] = torch.arange(len(ai), device=a.device)
    flat = unpack.reshape(-1)
    out = half.new_empty(dg, da, dg, da)
    # one row of output units at a time: the expanded half never stands beside the block
    start = 0
    for o in range(dg):
        expanded = half[start : start + dg - o].index_select(1, flat).reshape(dg - o, da, da)
        out[o, :, o:] = expanded.transpose(0, 1)
        out[o + 1 :, :, o] = expanded[1:]
        start += dg - o
    return out.reshape(capture.size, capture.size)
