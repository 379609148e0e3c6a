"""The leading one of several nearest Kronecker products is positive semidefinite, as Perron's theorem has it."""

import pytest
import torch

from fisherviz.approximations.nearest import nearest_factors
from fisherviz.capture.captures import Capture


@pytest.mark.parametrize("positions", [1, 3])
def test_both_factors_of_the_leading_product_are_positive_semidefinite(positions):
    """The decomposition fixes their product alone; with both signs turned neither could be damped or inverted."""
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(6, positions, 5, generator=generator, dtype=torch.float64)
        g = torch.randn(2, 6, positions, 4, generator=generator, dtype=torch.float64)
        for factors in nearest_factors(Capture(a, g), 2):
            assert float(torch.linalg.eigvalsh(factors[0]).min()) >= -1e-9 * float(factors[0].norm())
