"""Iterations stop at the tolerance that they were given, not before."""

import pytest
import torch

from fisherviz.operators import cg


def spread(n, condition, dtype):
    """A symmetric positive definite matrix with eigenvalues from 1/condition to 1, evenly in their logarithm."""
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), n, dtype=torch.float64)
    return ((Q * values) @ Q.mT).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "tol", "promised"),
    [
        (torch.float64, 1e-3, 1e-3),
        (torch.float64, 1e-6, 1e-6),
        (torch.float64, None, 1e-8),
        (torch.float32, 1e-3, 1e-3),
        (torch.float32, None, 1e-5),
    ],
)
def test_the_residual_of_every_column_is_within_the_tolerance(dtype, tol, promised):
    # what float32's rounding does to the residual that is carried along stays below the tolerance
    M = spread(60, 1e3 if dtype == torch.float64 else 10.0, dtype)
    b = torch.randn(60, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    x = cg(lambda v: M @ v, b, tol)
    residual = (b.double() - M.double() @ x.double()).norm(dim=0) / b.double().norm(dim=0)
    assert float(residual.max()) <= 1.5 * promised


def test_a_looser_tolerance_takes_fewer_products():
    M, b = spread(60, 1e3, torch.float64), torch.ones(60, dtype=torch.float64)
    products = []
    for tol in (1e-2, 1e-5, 1e-8):
        products.append(0)

        def product(v):
            products[-1] += 1
            return M @ v

        cg(product, b, tol)
    assert products[0] < products[1] < products[2]
