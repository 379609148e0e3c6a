"""What a loader of the user's may return: every form that a Probe takes, whole or its first examples."""

import sys
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fisherviz.commands.inputs import load_data
from fisherviz.network.batches import Batches

X, Y = torch.arange(80.0).reshape(20, 4), torch.arange(20) % 3


class Pair(NamedTuple):
    inputs: torch.Tensor
    targets: torch.Tensor


def named(rows):
    return Pair(torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows]))


TARGETS = {
    "tensor": lambda y: y, "numpy": lambda y: y.numpy(), "list": lambda y: y.tolist(),
    "pandas": lambda y: pd.Series(y.numpy(), index=range(100, 100 + len(y))),
    "masked": lambda y: np.ma.array(y.numpy()),
}  # fmt: skip
FORMS = {
    "pair": lambda y: (X, y(Y)),
    "dictionary": lambda y: ({"input": X}, y(Y)),
    "batches": lambda y: [(X[:9], y(Y[:9])), (X[9:], y(Y[9:]))],
    "lists": lambda y: [[X[:9], y(Y[:9])], [X[9:], y(Y[9:])]],
    "named": lambda y: Pair(X, y(Y)),
    "dataset": lambda y: TensorDataset(X, Y),
    "named by a collate function": lambda y: DataLoader(TensorDataset(X, Y), 6, collate_fn=named),
}


@pytest.mark.parametrize("examples", [None, 1, 9, 12, 50])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("form", FORMS)
def test_the_first_examples_keep_their_targets(monkeypatch, form, targets, examples):
    """Of named tuples none were taken, and targets that are no tensors were left whole beside fewer inputs."""
    module = ModuleType("users_loader")
    module.load = lambda: FORMS[form](TARGETS[targets])
    monkeypatch.setitem(sys.modules, "users_loader", module)
    found = list(Batches(load_data("users_loader:load", examples).batches))
    count = min(examples or 20, 20)
    assert torch.equal(torch.cat([x["input"] if isinstance(x, dict) else x for x, _ in found]), X[:count])
    assert torch.equal(torch.cat([y for _, y in found]), Y[:count])
