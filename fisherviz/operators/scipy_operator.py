"""A symmetric matrix as scipy's `LinearOperator`, for its iterative solvers and eigensolvers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor


def linear_operator(
    product: Callable[[Tensor], Tensor], size: int, dtype: torch.dtype, device: torch.device
) -> LinearOperator:
    """Wrap a product with columns.

    Args:
        product: maps (P, k) to (P, k), with a symmetric matrix.
        size: P.
        dtype: that products are made in; half precision is float32 for numpy.
        device: where products are made.

    Returns:
        The operator, its own adjoint.
    """
    working = torch.promote_types(dtype, torch.float32)

    def columns(v: np.ndarray) -> np.ndarray:
        # scipy's solvers hand over views that they write into later, and transposed ones
        given = torch.tensor(np.ascontiguousarray(v).reshape(size, -1), dtype=working, device=device)
        return product(given).cpu().numpy()

    def vector(v: np.ndarray) -> np.ndarray:
        return columns(v)[:, 0]

    kind = np.dtype(str(working).removeprefix("torch."))
    return LinearOperator((size, size), vector, vector, columns, kind, columns)
