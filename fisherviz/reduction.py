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
    rows = np.arange(0, matrix.shape[0], factor)
    cols = np.arange(0, matrix.shape[1], factor)

    def by(operation: np.ufunc, values: np.ndarray) -> np.ndarray:
        return operation.reduceat(operation.reduceat(values, rows, axis=0), cols, axis=1)

    if not signed:
        return by(np.maximum, np.abs(matrix)).astype(np.float32)
    high, low = by(np.maximum, matrix), by(np.minimum, matrix)
    return np.where(high >= -low, high, low).astype(np.float32)
