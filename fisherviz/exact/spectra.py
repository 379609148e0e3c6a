"""Norms and spectra of the exact Fisher without materialising it: Gram matrices, diagonals, Lanczos on products.

‖F_ij‖² = N⁻² Σ H^i ∘ H^j; the spectrum is that of Σ_i H^i / N.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fisherviz.exact.passes import Passes
from fisherviz.exact.planning import require_fits
from fisherviz.operators.lanczos import spectral_norm
from fisherviz.statistics import Diagonal
from fisherviz.statistics.examples import Examples
from fisherviz.statistics.gradients import block_square_norm, block_square_norms, tile_ranges

FULL = 3000
"""Spectra of matrices up to this size come from a full eigendecomposition, larger ones from Lanczos."""

Pair = tuple[int, int] | None


def trace(fisher: Passes, pair: Pair) -> float:
    """Sum of the diagonal of the whole matrix or of one diagonal block."""
    if pair is not None and pair[0] != pair[1]:
        raise ValueError("an off-diagonal block has no trace; ask for the block (i, i).")
    names = fisher.space.names if pair is None else (fisher.space.names[pair[0]],)
    found = fisher.collect([Diagonal(name) for name in names])
    return fisher.weight * sum(float(s.mean.sum(dtype=torch.float64)) for s in found)


def frobenius(fisher: Passes, pair: Pair) -> float:
    """Frobenius norm from Gram matrices, in tiles, accumulated in float64."""
    examples = fisher.in_example_space()
    require_fits(fisher, "norm")
    if pair is None:
        ranges = tile_ranges(examples.captures)
        return sum(fisher.deal(ranges, lambda rows: examples.square_norm([rows]), "tiles of Gram matrices")) ** 0.5
    norms, (i, j) = fisher.known_square_norms, sorted(pair)
    if (i, j) not in norms:
        norms[i, j] = block_square_norm(examples.captures[i], examples.captures[j])
    return fisher.scale * norms[i, j] ** 0.5


def square_norms(fisher: Passes) -> dict[tuple[int, int], float]:
    """Squared Frobenius norms of all blocks (i, j), i <= j, by layers' positions."""
    captures, norms = fisher.in_example_space().captures, fisher.known_square_norms
    ranges = tile_ranges(captures)
    parts = fisher.deal(ranges, lambda rows: block_square_norms(captures, [rows]), "tiles of Gram matrices")
    norms |= {pair: sum(part[pair] for part in parts) for pair in parts[0]}
    return {pair: fisher.scale**2 * norms[pair] for pair in parts[0]}


def spectral(fisher: Passes, pair: tuple[int, int]) -> float:
    """Largest singular value of one block."""
    examples = fisher.in_example_space()
    row, col = (examples.only([i]) for i in pair)

    def times(left: Examples, right: Examples) -> Callable[[Tensor], Tensor]:
        return lambda x: left.combine(right.project([x]) * fisher.scale)[0]

    shape = row.size, col.size
    return spectral_norm(times(row, col), times(col, row), shape, dtype=examples.dtype, device=fisher.network.device)


def clean(values: Tensor, rank: int, size: int, dtype: torch.dtype) -> Tensor:
    """Eigenvalues, descending, without what rounding leaves of zero ones.

    Args:
        values: of a matrix (P, P), descending.
        rank: that the matrix has at most: of the eigenproblem that was solved.
        size: P, the length of the sums in it, whose rounding grows with its square root.
        dtype: that these were computed in.

    Returns:
        Those above rounding, in float64.
    """
    values = values.double().clamp(min=0)
    floor = torch.finfo(dtype).eps * max(rank, size**0.5) * float(values[0])
    return values[values > floor]
