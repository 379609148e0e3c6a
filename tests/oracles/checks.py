"""Comparing what the package gives with what the oracle gives.

The tolerance is relative to the largest entry of the expected array: entries are sums over examples of
products, so their rounding error scales with the largest of them and not with each entry.
"""

import numpy as np
import torch

FLOAT64 = 1e-9
FLOAT32 = 2e-5


def array(value):
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    return np.asarray(value, dtype=np.float64)


def assert_matches(actual, expected, tolerance=FLOAT64):
    """Same shape, finite, and equal to `tolerance` times the largest expected entry."""
    actual, expected = array(actual), array(expected)
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    scale = np.abs(expected).max() if expected.size else 0.0
    worst = np.abs(actual - expected).max() if expected.size else 0.0
    assert worst <= tolerance * scale, f"differs by {worst:.3e}, largest expected entry {scale:.3e}"
