"""What leaves a precision's range: entries that are not finite are refused, and sums of products are taken in float64.

Entries of 1e20 are within float32's range and their squares are not; those of 1e-23 lose their squares to zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PIECE_ENTRIES = 2**20
"""Entries that are widened to float64 at once."""


class NonFiniteMatrixError(ValueError):
    """A matrix, a product or a norm that had to be finite holds NaN or infinite entries."""


def is_finite(values: Tensor) -> bool:
    """Whether all entries are finite.

    Args:
        values: of any shape.
    """
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())  # a sum may overflow


def first_not_finite(tensors: Sequence[Tensor]) -> int | None:
    """The position of the first tensor with an entry that is not finite; None where there is none.

    Args:
        tensors: of any shapes and types, on one device, from which one number is read where all are finite.
    """
    parts = [t._values() if t.is_sparse else t for t in tensors]
    sums = [part.sum().double() for part in parts]
    if not sums or bool(torch.isfinite(torch.stack(sums)).all()):
        return None
    broken = (i for i, part in enumerate(parts) if not bool(torch.isfinite(part).all()))  # a sum may overflow
    return next(broken, None)


def require_finite(values: Tensor, what: str) -> None:
    """Refuse entries that are not finite.

    Args:
        values: of any shape.
        what: what they are, for the sentence.

    Raises:
        NonFiniteMatrixError: when one is NaN or infinite.
    """
    if not is_finite(values):
        raise NonFiniteMatrixError(not_finite(what, values.dtype))


def not_finite(what: str, dtype: torch.dtype) -> str:
    """The sentence on what is not finite.

    Args:
        what: what it is in words.
        dtype: that it was computed in.
    """
    name, most = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
    return (
        f"{what} holds NaN or infinite entries; look at the data and the activations that made it, whose products must "
        f"stay below {most:.0e} in {name}."
    )


def dot(x: Tensor, y: Tensor) -> float:
    """Σ x_i y_i, the products in float64 too.

    Args:
        x: of any shape.
        y: of the same.

    Returns:
        The sum.
    """
    pairs = zip(x.reshape(-1).split(PIECE_ENTRIES), y.reshape(-1).split(PIECE_ENTRIES), strict=True)
    return sum(float(torch.dot(a.double(), b.double())) for a, b in pairs)


def inner_products(tensors: Sequence[Tensor]) -> Tensor:
    """Σ x_i y_i of all pairs of some tensors, the products in float64 too.

    Args:
        tensors: of the same shape.

    Returns:
        (tensors, tensors), in float64.
    """
    rows = [x.reshape(-1) for x in tensors]
    total = rows[0].new_zeros(len(rows), len(rows), dtype=torch.float64)
    for parts in zip(*(x.split(max(1, PIECE_ENTRIES // len(rows))) for x in rows), strict=True):
        part = torch.stack(parts).double()
        total.addmm_(part, part.T)
    return total


def square_sum(x: Tensor) -> float:
    """Σ x_i², likewise.

    Args:
        x: of any shape.

    Returns:
        The sum.
    """
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
