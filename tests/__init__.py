"""Tests mirror the package; what they compare with lives in `tests/oracles`."""
