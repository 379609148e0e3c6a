"""Sang et al. 2022: what inverting costs, against closed forms."""

import pytest

from fisherviz.papers.sang import complexity
from fisherviz.papers.sang.complexity import METHODS, equal_layers, exponent, inversion


def test_exponents_are_those_of_powers():
    assert exponent({8: 3 * 8**4, 2: 7, 4: 3 * 4**4}) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("method", "blocks"),
    [
        ("CW-NGD", lambda n, layers: [n] * (n * layers)),
        ("K-FAC", lambda n, layers: [n] * (2 * layers)),
        ("layers", lambda n, layers: [n * n] * layers),
        ("all", lambda n, layers: [layers * n * n]),
    ],
)
def test_an_inverse_takes_the_cube_of_each_block(method, blocks):
    n, layers = 12, 3
    cubes = sum(size**3 for size in blocks(n, layers))  # Cholesky n³/3 and 2 n³/3 for the inverse of its factor
    squares = sum(size**2 for size in blocks(n, layers))
    found = inversion(*equal_layers("dense", n=n, layers=layers), METHODS[method])
    assert cubes - squares <= found <= cubes + 8 * squares  # rounding down each; the look at the smallest eigenvalue


def test_filters_make_blocks_of_their_fan_in():
    c, k = 3, 3
    found = inversion(*equal_layers("convolution", layers=2, c=c, k=k), METHODS["CW-NGD"])
    size = c * k * k
    assert 2 * c * size**3 - 2 * c * size**2 <= found <= 2 * c * (size**3 + 8 * size**2)


def test_both_verdicts_can_be_reached():
    slopes = {"n": {"CW-NGD": 3.9, "all": 4.0}, "L": {"CW-NGD": 1.0, "all": 3.0}}
    assert complexity._powers("", "CW-NGD", slopes, {"n": 4, "L": 1}).verdict == "reproduced"
    assert complexity._powers("", "all", slopes, {"n": 6, "L": 3}).verdict == "not reproduced"
    assert complexity._apart({8: 2 * 8**4, 16: 2 * 16**4}).verdict == "reproduced"
    assert complexity._apart({8: 2 * 8**6, 16: 2 * 16**6}).verdict == "not reproduced"
    steps = {64: {"forming": 1, "inverting": 9}, 1024: {"forming": 9, "inverting": 1}}
    assert complexity._dominant(steps, ()).verdict == "not reproduced"
    assert complexity._dominant({64: steps[64]}, ()).verdict == "reproduced"


def test_what_is_saved_is_a_ratio_of_counts():
    def counts(power):
        return {size: size**power for size in (4, 8, 16)}

    found = {what: {"CW-NGD": counts(4), "all": counts(6)} for what in ("n", "c")}
    depth = {"CW-NGD": counts(1), "all": counts(3)}
    assert complexity._saved({**found, "L": depth}).verdict == "reproduced"
    assert complexity._saved({**found, "L": {"CW-NGD": counts(1), "all": counts(1)}}).verdict == "not reproduced"
