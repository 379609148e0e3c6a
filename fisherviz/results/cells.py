"""From a matrix of any size to a few hundred cells per side: each cell is the largest |entry| that it covers.

Used where arrays are gathered for pictures (comparison) and where matrices are drawn (plotting).
"""

from __future__ import annotations

import numpy as np

LIMIT = 600
"""Most cells per side of a picture."""


def reduce_matrix(matrix: np.ndarray, factor: int, signed: bool = False) -> np.ndarray:
    """Cells of `factor` × `factor` entries, each holding the entry of largest magnitude.

    Args:
        matrix: (rows, cols).
        factor: entries per cell and side; the last cell may cover fewer.
        signed: keep the sign of that entry instead of its magnitude.

    Returns:
        (ceil(rows / factor), ceil(cols / factor)) float32.
    """
    if not signed:
        return _strided(np.maximum, np.abs(matrix), factor).astype(np.float32)
    high, low = _strided(np.maximum, matrix, factor), _strided(np.minimum, matrix, factor)
    return np.where(high >= -low, high, low).astype(np.float32)


def _strided(operation: np.ufunc, values: np.ndarray, factor: int) -> np.ndarray:
    """Reduce both axes by whole strided slices: a fifth of the time of `ufunc.reduceat`."""
    for _ in range(2):
        whole = len(values) - len(values) % factor
        found = values[:whole:factor].copy()
        for k in range(1, factor):
            operation(found, values[k:whole:factor], out=found)
        if whole < len(values):
            found = np.concatenate([found, operation.reduce(values[whole:], axis=0, keepdims=True)])
        values = found.T
    return values
