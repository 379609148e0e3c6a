"""Vectors and matrices over layers that leave the precision's range, told with the layer where they do."""

from __future__ import annotations

from torch import Tensor

from fisherviz.network.space import ParameterSpace
from fisherviz.operators.finite import is_finite, require_finite


def require_finite_vector(flat: Tensor, space: ParameterSpace, what: str) -> Tensor:
    """Refuse a vector, or rows of a matrix, that are not finite.

    Args:
        flat: in torch order, (P,) or (P, k).
        space: the parameters.
        what: it in words.

    Returns:
        The vector.

    Raises:
        NonFiniteMatrixError: the sentence names the first layer where it is not.
    """
    if not is_finite(flat):
        for name, part in zip(space.names, space.split(flat.reshape(len(flat), -1)), strict=True):
            require_finite(part, f"layer {name!r}: {what}")
    return flat
