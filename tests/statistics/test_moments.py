"""Second moments of rows that lie in memory in different orders."""

import pytest
import torch

from fisherviz.statistics import InputFactor, OutputFactor
from fisherviz.statistics.products import second_moment
from tests import captures


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "x",
    [
        lambda: torch.randn(5, 4, 9, 3),
        lambda: torch.randn(5, 4, 3, 9).mT,
        lambda: torch.randn(700, 2, 40, 30).mT,
        lambda: torch.randn(6, 40, 3).mT,
        lambda: torch.randn(3, 40).mT,
    ],
    ids=["rows", "pixels", "many examples", "few positions", "a matrix"],
)
def test_second_moment_is_the_sum_of_outer_products_however_rows_lie_in_memory(x, dtype):
    torch.manual_seed(0)
    x = x().to(dtype)
    expected = torch.einsum("...i,...j->ij", x.double(), x.double())
    found = second_moment(x)
    assert found.dtype == dtype
    assert torch.equal(found, found.mT)
    assert (found - expected).norm() <= 10 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("use", ["read", "used"])
def test_a_factor_of_one_use_takes_the_whole_of_a_capture_that_has_one_use_alone(use):
    plain = captures.capture()
    for factor in (InputFactor, OutputFactor):
        assert torch.equal(factor("0", use=use).contribution(plain), factor("0").contribution(plain))
