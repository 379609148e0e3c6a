"""What every test starts from: one seed, one thread unless OMP_NUM_THREADS says another number, in children too."""

import gc
import os

import pytest
import torch

from tests.covering import mark_what_is_left

gc.disable()  # until all is collected: imports and thousands of cases are no garbage
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def seed():
    """Every test draws its own network and data from the same seed.

    `torch.manual_seed` keeps a call with its stack for each kind of device that is not in use, for every test again.
    """
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.hookimpl(tryfirst=True)  # before -m chooses by marks
def pytest_collection_modifyitems(items):
    mark_what_is_left(items)


def pytest_collection_finish():
    """What was imported and collected stays for the whole run; the collector need not look through it each time."""
    gc.collect()
    gc.freeze()
    gc.enable()
