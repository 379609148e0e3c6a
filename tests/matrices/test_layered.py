"""Matrices over layers: vectors by name, what is no vector, and numbers that leave the precision's range."""

import math

import pytest
import torch

import fisherviz as fv
from fisherviz.matrices.finite import require_finite_vector
from fisherviz.matrices.layered import block_diagonal
from fisherviz.operators import Diagonal
from fisherviz.operators.finite import NonFiniteMatrixError
from tests.oracles import nets

NET = nets.mlp(3, 4, 2)
PROBE = fv.Probe(NET, "categorical")
MATRIX = fv.approximate(PROBE.fisher(nets.vectors(5, 3)), "kfac").damped(0.1)
SPACE = MATRIX.space


def test_products_and_solutions_by_name_are_those_of_the_flat_vector():
    named = {name: torch.randn_like(p) for name, p in NET.named_parameters()}
    flat = torch.cat([t.reshape(-1) for t in named.values()])
    dense = MATRIX.to_dense()
    for found, expected in (
        (MATRIX @ named, dense @ flat),
        (MATRIX.solve(named), torch.linalg.solve(dense, flat)),
        (MATRIX.solve(named, 0.3), torch.linalg.solve(dense + 0.3 * torch.eye(len(dense)).double(), flat)),
    ):
        assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in named.items()}
        torch.testing.assert_close(torch.cat([t.reshape(-1) for t in found.values()]), expected)


@pytest.mark.parametrize("call", [lambda v: MATRIX @ v, MATRIX.solve, MATRIX.inverse_root])
@pytest.mark.parametrize(
    ("vector", "message"),
    [
        ([1.0] * 26, "a vector is a tensor or a dictionary name -> tensor, got list"),
        (torch.ones(26, dtype=torch.complex128), "a vector must be real, got a complex tensor"),
    ],
)
def test_what_is_no_vector_is_refused(call, vector, message):
    with pytest.raises(TypeError, match=message):
        call(vector)


@pytest.mark.parametrize("position", [0, 1])
def test_numbers_out_of_range_are_told_with_their_layer(position):
    """Entries of 1e200 are finite, and their product is not."""
    entries = [torch.ones(size, dtype=torch.float64) for size in SPACE.sizes]
    entries[position][1] = 1e200
    large = block_diagonal(SPACE, [Diagonal(d) for d in entries])
    name = SPACE.names[position]
    with pytest.raises(NonFiniteMatrixError, match=f"layer '{name}': a product with DirectSum"):
        large @ torch.full((26,), 1e200, dtype=torch.float64)
    for number in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"a vector must be finite in torch\.float64"):
            large @ torch.full((26,), number, dtype=torch.float64)
    entries[position][1] = math.inf
    with pytest.raises(NonFiniteMatrixError, match=f"layer '{name}': DirectSum"):
        block_diagonal(SPACE, [Diagonal(d) for d in entries]).to_dense()


def test_a_finite_vector_is_handed_on_and_another_one_is_told():
    v = torch.zeros(26, 2, dtype=torch.float64)
    assert require_finite_vector(v, SPACE, "it") is v
    v[25, 1] = math.inf
    with pytest.raises(NonFiniteMatrixError, match=f"layer '{SPACE.names[-1]}': it"):
        require_finite_vector(v, SPACE, "it")


@pytest.mark.parametrize(
    ("entries", "call", "said"),
    [
        (16 * 10, lambda: MATRIX.block(0, 1), r"block '0', '2' \(16 x 10\)"),
        (16 * 16, lambda: MATRIX.block(0), r"block '0', '0' \(16 x 16\)"),
        (26 * 26, MATRIX.to_dense, "the dense 26 x 26 matrix"),
        (26 * 7, lambda: MATRIX @ torch.ones(26, 7, dtype=torch.float64), "a product with 7 vectors"),
    ],
)
def test_what_does_not_fit_three_times_is_refused_before_it_is_begun(entries, call, said, monkeypatch):
    monkeypatch.setattr(fv.config, "_memory_budget", 3 * 8 * entries)
    call()
    monkeypatch.setattr(fv.config, "_memory_budget", 3 * 8 * entries - 1)
    with pytest.raises(MemoryError, match=f"^{said} takes"):
        call()
