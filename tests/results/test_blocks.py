"""Blocks as they are saved: rounding has a bound, structure is found by what a block is, streams are short."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fisherviz.results import blocks

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


@given(arrays.arrays(np.float32, st.integers(1, 20), elements=FLOATS), st.integers(1, 22))
def test_rounding_keeps_so_many_digits_the_sign_and_zero(values, bits):
    found = blocks.rounded(values, bits)
    assert np.all(np.abs(found.astype(float) - values) <= 2.0 ** -(bits + 1) * np.abs(values.astype(float)))
    assert np.all(found.view(np.uint32) % (1 << (23 - bits)) == 0)
    assert np.array_equal(np.sign(found), np.sign(values))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5))
def test_mean_cells_are_the_means_of_what_they_cover(rows, cols, factor):
    matrix = np.arange(rows * cols, dtype=float).reshape(rows, cols) ** 2
    found = blocks.mean_cells(matrix, factor)
    for (i, j), value in np.ndenumerate(found):
        part = matrix[i * factor : (i + 1) * factor, j * factor : (j + 1) * factor]
        assert value == pytest.approx(part.mean())


def symmetric(rng, n):
    root = rng.standard_normal((n, n))
    return root @ root.T


def kinds(matrix, exact, cut):
    """The kind of each block, read from the stream of factors."""
    factors, _ = blocks.pack(matrix, exact, cut)
    found, at = [], 0
    for i, j, _, _ in cut.blocks():
        (g, a), (h, b) = cut.shapes[i], cut.shapes[j]
        kind = int(factors[at])
        found.append(kind)
        at += 1 + {blocks.OUTER: g * h + a * b, blocks.BASIS: g * g + a * a + g * a}.get(kind, 0)
    assert at == len(factors)
    return found


def test_what_is_built_of_factors_is_held_as_factors():
    rng = np.random.default_rng(0)
    cut = blocks.Layout(((3, 4), (2, 5)), 1, 1)
    exact = symmetric(rng, 22)
    (G, A), (H, B) = ((symmetric(rng, n) for n in shape) for shape in cut.shapes)
    product, other = np.kron(G, A), np.kron(H, B)
    across = np.kron(rng.standard_normal((3, 2)), rng.standard_normal((4, 5)))
    whole = np.block([[product, across], [across.T, other]])
    assert kinds(whole, exact, cut) == [blocks.OUTER] * 3
    shifted = np.block([[product + np.eye(12), 0 * across], [0 * across.T, np.diag(rng.random(10))]])
    assert kinds(shifted, exact, cut) == [blocks.BASIS, blocks.ZERO, blocks.BASIS]
    assert kinds(exact, None, cut) == [blocks.ENTRIES] * 3
    assert kinds(exact, exact, cut) == [blocks.SAME] * 3
    near = exact + 1e-3 * symmetric(rng, 22)
    assert kinds(near, exact, cut) == [blocks.GAPS] * 3
    assert kinds(near, exact, blocks.Layout(cut.shapes, 2, 3)) == [blocks.CELLS] * 3


def test_small_networks_are_held_entry_by_entry_and_large_ones_as_cells():
    assert blocks.layout([(20, 21)]) == blocks.Layout(((20, 21),), 1, 1)
    assert blocks.layout([(20, 21)] * 4) == blocks.Layout(((20, 21),) * 4, 1, 6)
    assert blocks.layout([(50, 60)]) == blocks.Layout(((50, 60),), 11, 11)
