"""What every test starts from: one seed, one thread unless OMP_NUM_THREADS says another number, in children too."""

import os

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def seed():
    """Every test draws its own network and data from the same seed."""
    torch.manual_seed(0)
