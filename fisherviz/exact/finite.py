"""Numbers of the exact Fisher that leave the precision's range, told with the layer that they come from."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from fisherviz.capture.captures import AnyCapture
from fisherviz.operators.finite import NonFiniteMatrixError, is_finite, not_finite, require_finite
from fisherviz.statistics import Statistic

Captures = Callable[[], Mapping[str, AnyCapture]]
"""Gives the captures of all examples by layer, when they are asked for."""


def require_finite_statistic(statistic: Statistic) -> None:
    """Refuse a statistic that is not finite.

    Args:
        statistic: of all examples.

    Raises:
        NonFiniteMatrixError: it holds NaN or infinite entries; the sentence names its layers.
    """
    if isinstance(statistic.total, Tensor):
        words = re.sub(r"(?<!^)(?=[A-Z])", " ", type(statistic).__name__.strip("_")).lower()
        layers = " and ".join(dict.fromkeys(f"layer {name!r}" for name in statistic.layers))
        require_finite(statistic.total, f"{layers}: the {words}")


def require_finite_number(value: float, what: str, dtype: torch.dtype, captures: Captures) -> float:
    """Refuse a norm or a form that is not finite.

    Args:
        value: the number.
        what: it in words.
        dtype: that the matrix was computed in.
        captures: of the matrix.

    Returns:
        The number.

    Raises:
        NonFiniteMatrixError: the sentence names a layer with such a block.
    """
    if not math.isfinite(value):
        with blaming(captures):
            raise NonFiniteMatrixError(not_finite(what, dtype))
    return value


@contextmanager
def blaming(captures: Captures) -> Iterator[None]:
    """Put a layer in front of what is said of a Gram matrix over all of them.

    Args:
        captures: of the matrix.

    Raises:
        NonFiniteMatrixError: the one that was raised inside, with the first layer whose own block is not finite.
    """
    try:
        yield
    except NonFiniteMatrixError as error:
        for name, capture in captures().items():
            if not all(map(is_finite, (*capture.tensors, capture.square_sum()))):
                raise NonFiniteMatrixError(f"layer {name!r}: {error}") from error
        raise


def finite_gram(gram: Tensor, captures: Captures) -> Tensor:
    """A Gram matrix that holds nothing else.

    Args:
        gram: of the gradients.
        captures: of the matrix.

    Returns:
        It.

    Raises:
        NonFiniteMatrixError: it holds NaN or infinite entries; the sentence names a layer.
    """
    with blaming(captures):
        require_finite(gram, "the Gram matrix of the gradients")
    return gram
