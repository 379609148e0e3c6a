"""What every reader hands over: arrays as they are in the source, split into training and test examples.

Pixels are in [0, 1], table columns in the units of the source; nothing is standardised here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Raw:
    """One data set as read.

    Args:
        train_inputs: (N, C, H, W) pixels in [0, 1] or (N, D) columns.
        train_targets: (N,) int64 labels, (N, 1) values, or None where the inputs are all there is.
        test_inputs: like `train_inputs`.
        test_targets: like `train_targets`.
        features: names of the columns of a table.
        classes: names of the classes.
        notes: what was done to the source, one sentence each.
    """

    train_inputs: NDArray[np.floating]
    train_targets: NDArray[np.generic] | None
    test_inputs: NDArray[np.floating]
    test_targets: NDArray[np.generic] | None
    features: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def shuffled(count: int, seed: int) -> NDArray[np.int64]:
    """A permutation of `count` rows that depends on nothing but the seed."""
    return np.random.default_rng(seed).permutation(count)
