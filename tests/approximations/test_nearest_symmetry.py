"""nearest-kronecker in both precisions: symmetric factors, and the error of the SVD of the rearranged block."""

import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.approximations.nearest import nearest_factors
from fisherviz.capture.captures import Capture

FIT = {torch.float32: 1e-6, torch.float64: 1e-13}
"""Excess of the squared error over the optimum's, as a share of ‖F‖²."""


def captured(seed, positions, dtype, examples=6, da=5, dg=4, vectors=2):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(examples, positions, da, generator=generator, dtype=torch.float64)
    g = torch.randn(vectors, examples, positions, dg, generator=generator, dtype=torch.float64)
    return Capture(a.to(dtype), g.to(dtype))


def block(capture):
    """F (dg, da, dg, da) and its rearrangement (dg², da²), in float64."""
    nabla = torch.einsum("knto,nti->knoi", capture.g.double(), capture.a.double()).flatten(0, 1)
    F = torch.einsum("noi,npj->oipj", nabla, nabla) / capture.examples
    return F, F.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)


def product(A, G):
    return torch.einsum("kop,kij->oipj", G.double(), A.double())


def assert_best(capture, rank=1):
    A, G = nearest_factors(capture, rank)
    F, R = block(capture)
    singular = torch.linalg.svdvals(R)
    best = float(singular[rank:].square().sum().sqrt())
    found = float((F - product(A, G)).norm())
    assert found >= best - 1e-6 * float(F.norm())
    assert found**2 - best**2 <= FIT[capture.a.dtype] * float(F.square().sum())
    return A, G


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("positions", [1, 3])
def test_one_product_is_symmetric_semidefinite_and_the_best(positions, dtype):
    for seed in range(40):
        for factor in assert_best(captured(seed, positions, dtype)):
            assert torch.equal(factor, factor.mT)
            assert float(torch.linalg.eigvalsh(factor.double()).min()) >= -10 * torch.finfo(dtype).eps * factor.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [2, 3])
def test_several_products_are_the_best_and_each_keeps_the_block_symmetric(rank, dtype):
    for seed in range(10):
        for A, G in zip(*assert_best(captured(seed, 3, dtype), rank), strict=True):
            same = torch.equal(A, A.mT) and torch.equal(G, G.mT)
            assert same or (torch.equal(A, -A.mT) and torch.equal(G, -G.mT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("positions", [1, 2])
def test_equal_leading_singular_values_give_one_of_the_best_semidefinite_pairs(positions, dtype):
    """Two halves of the units that see two halves of the inputs, alike: F = A₁ ⊗ G₁ + A₂ ⊗ G₂ with equal norms."""
    half = captured(0, positions, dtype, da=2, dg=2)
    a, g = torch.zeros(12, positions, 4, dtype=dtype), torch.zeros(2, 12, positions, 4, dtype=dtype)
    a[:6, :, :2], a[6:, :, 2:] = half.a, half.a
    g[:, :6, :, :2], g[:, 6:, :, 2:] = half.g, half.g
    capture = Capture(a, g)
    singular = torch.linalg.svdvals(block(capture)[1])
    assert float(singular[0] - singular[1]) <= 1e-6 * float(singular[0])
    for factor in assert_best(capture):
        assert torch.equal(factor, factor.mT)
        assert float(torch.linalg.eigvalsh(factor.double()).min()) >= -10 * torch.finfo(dtype).eps * factor.norm()


@pytest.mark.parametrize("seeds", [range(5), pytest.param(range(5, 20), marks=pytest.mark.soak)], ids=str)
@pytest.mark.parametrize("kind", ["linear", "convolution", "grouped"])
def test_damped_factors_precondition_every_network(kind, seeds):
    layer = {
        "linear": lambda: nn.Linear(4, 3),
        "convolution": lambda: nn.Conv1d(1, 3, 2),
        "grouped": lambda: nn.Conv1d(2, 4, 2, groups=2),
    }[kind]
    shape = {"linear": (4,), "convolution": (1, 4), "grouped": (2, 3)}[kind]
    for seed in seeds:
        torch.manual_seed(seed)
        model = nn.Sequential(layer(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
        x, y = torch.randn(8, *shape), torch.randint(3, (8,))
        model(x)
        opt = fv.optim.NaturalGradient(model, "categorical", "nearest-kronecker", lr=0.1, damping=0.1)
        for _ in range(3):
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
        assert all(p.isfinite().all() for p in model.parameters())


def test_no_gradient_at_all_gives_zero_factors():
    for positions in (1, 2):
        capture = captured(0, positions, torch.float64)
        A, G = nearest_factors(Capture(capture.a, torch.zeros_like(capture.g)), 1)
        assert not product(A, G).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_terms_where_every_gradient_has_rank_one(dtype: torch.dtype) -> None:
    # positions with outputs of their own: what is antisymmetric is rounding alone
    torch.manual_seed(0)
    fisher = fv.Probe(nn.Linear(3, 3, bias=False).to(dtype), "categorical").fisher(torch.randn(6, 4, 3, dtype=dtype))
    dense = fisher.to_dense().double()
    values = torch.linalg.svdvals(dense.reshape(3, 3, 3, 3).permute(0, 2, 1, 3).reshape(9, 9))
    for rank in (2, 3):
        found = fv.approximate(fisher, "nearest-kronecker", rank=rank).to_dense().double()
        error = torch.linalg.matrix_norm(found - dense)
        torch.testing.assert_close(error, torch.linalg.vector_norm(values[rank:]), rtol=1e-3, atol=1e-6)
