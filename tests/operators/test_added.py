"""Sums of two operators that keep their structure, against dense sums."""

import pytest
import torch

from fisherviz.operators import Dense, Diagonal, DirectSum, Identity, Kronecker, KroneckerSum, UnitBlocks, Zero
from fisherviz.operators.added import added


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CASES = {
    "identity": lambda s: Identity(6, 1.0 + s, dtype=torch.float64),
    "diagonal": lambda s: Diagonal(normal(6, seed=s)),
    "dense": lambda s: Dense(normal(6, 6, seed=s)),
    "units": lambda s: UnitBlocks(normal(2, 3, 3, seed=s)),
    "damped units": lambda s: UnitBlocks(normal(2, 3, 3, seed=s), 0.5 * s),
    "first factor": lambda s: Kronecker.over_units(normal(3, 3, seed=s), 2),
    "side by side": lambda s: DirectSum([Diagonal(normal(2, seed=s)), Dense(normal(4, 4, seed=s))]),
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_the_sum_of_one_structure_is_the_dense_sum(make):
    one, other = make(1), make(2)
    both = added(one, other)
    torch.testing.assert_close(both.to_dense(), one.to_dense() + other.to_dense())
    assert both.bytes == one.bytes


def test_sums_without_a_common_structure_are_none():
    pair = Kronecker(normal(3, 3), normal(2, 2))
    for one, other in [
        (pair, pair),
        (pair, CASES["first factor"](1)),
        (CASES["dense"](1), CASES["diagonal"](1)),
        (UnitBlocks(normal(2, 3, 3)), UnitBlocks(normal(3, 2, 2))),
        (CASES["dense"](1), Dense(normal(3, 3))),
        (Kronecker.over_units(normal(3, 3), 2), Kronecker.over_units(normal(2, 2), 3)),
        (DirectSum([pair]), DirectSum([pair])),
        (KroneckerSum([(pair.A, pair.G)]), KroneckerSum([(pair.A, pair.G)])),
        (Zero(3, 3), Zero(3, 3)),
        (CASES["side by side"](1), DirectSum([Diagonal(normal(4)), Dense(normal(2, 2))])),
    ]:
        assert added(one, other) is None
