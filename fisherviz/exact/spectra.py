"""Norms and spectra of the exact Fisher without materialising it: Gram matrices, diagonals, Lanczos on products.

‖F_ij‖² = N⁻² Σ H^i ∘ H^j; the spectrum is that of Σ_i H^i / N (DESIGN sections 5 and 6).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fisherviz.operators.lanczos import extreme_eigenvalues
from fisherviz.statistics.examples import block_square_norm, columns_product, gram_tiles, rows_product
from fisherviz.statistics.moments import Diagonal

if TYPE_CHECKING:
    from fisherviz.exact.fisher import Fisher

_FULL_SPECTRUM = 3000
"""Spectra of matrices up to this size come from a full eigendecomposition, larger ones from Lanczos."""

Pair = tuple[int, int] | None


def trace(fisher: Fisher, pair: Pair) -> float:
    """Sum of the diagonal of the whole matrix or of one diagonal block."""
    if pair is not None and pair[0] != pair[1]:
        raise ValueError("an off-diagonal block has no trace; ask for the block (i, i).")
    names = fisher.space.names if pair is None else (fisher.space.names[pair[0]],)
    found = fisher.collect([Diagonal(name) for name in names])
    return fisher.weight * sum(float(s.mean.sum(dtype=torch.float64)) for s in found)


def frobenius(fisher: Fisher, pair: Pair) -> float:
    """Frobenius norm from Gram matrices, in tiles, accumulated in float64."""
    captures = fisher.example_space()
    if pair is not None:
        row, col = (captures[fisher.space.names[i]] for i in pair)
        return fisher.scale * block_square_norm(row, col) ** 0.5
    total = 0.0
    for tiles in gram_tiles(list(captures.values())):
        whole = tiles[0]
        for tile in tiles[1:]:
            whole += tile
        total += float(whole.square_().sum(dtype=torch.float64))
    return fisher.scale * total**0.5


def spectral(fisher: Fisher, pair: Pair) -> float:
    """Largest singular value of the whole matrix or of one block."""
    if pair is None:
        return float(fisher.spectrum(1)[0])
    row, col = (fisher.example_space()[fisher.space.names[i]] for i in pair)
    scale, size = fisher.scale, fisher.space.sizes[pair[0]]

    def squared(x: Tensor) -> Tensor:  # F_ij F_ijᵀ x
        y = columns_product(col, rows_product(row, x.reshape(size, -1)))
        return columns_product(row, rows_product(col, y)).reshape(x.shape) * scale**2

    top = extreme_eigenvalues(squared, size, 1, dtype=fisher.probe.precision, device=fisher.probe.device)
    return max(float(top[0]), 0.0) ** 0.5


def spectrum(fisher: Fisher, k: int | None, dense: bool) -> Tensor:
    """Eigenvalues in descending order; see `Fisher.spectrum`."""
    size = fisher.space.size
    rank = size if dense else min(size, fisher.columns)
    if k is not None and rank > _FULL_SPECTRUM and k < rank // 10:
        values = extreme_eigenvalues(
            lambda x: fisher @ x, size, k, dtype=fisher.probe.precision, device=fisher.probe.device
        )
    elif dense or size <= fisher.columns:
        values = torch.linalg.eigvalsh(fisher.to_dense().double()).flip(0)
    else:
        values = torch.linalg.eigvalsh(fisher.example_gram().double()).flip(0) * fisher.scale
    values = values.double().clamp(min=0)
    # what rounding leaves of a zero eigenvalue is no eigenvalue
    floor = torch.finfo(fisher.probe.precision).eps * max(size, len(values)) * float(values[0])
    return values[values > floor][:k]
