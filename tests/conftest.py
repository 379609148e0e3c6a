"""What every test starts from: one seed, one thread, warnings as the package gives them."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    """Every test draws its own network and data from the same seed."""
    torch.manual_seed(0)
