"""What a loader of one's own may return for --data, whole or its first examples, and what is guessed from it."""

import sys
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import fisherviz as fv
from fisherviz.commands.inputs import load_data
from fisherviz.network.batches import Batches
from fisherviz.support.errors import OptionError

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


@pytest.mark.parametrize("examples", [2, 5, 7, None])
def test_a_loader_of_the_command_line_may_return_a_list_of_inputs_and_targets(tmp_path, examples):
    """Of a list, the first examples were the inputs alone, or targets were taken for a second batch."""
    (tmp_path / f"pairs_{examples}.py").write_text(
        "import torch\nX, Y = torch.arange(10.0).reshape(5, 2), torch.arange(5) % 3\ndef load():\n    return [X, Y]\n"
    )
    data = load_data(f"{tmp_path}/pairs_{examples}.py:load", examples)
    (inputs, targets), *others = Batches(data.batches)
    assert not others
    assert len(inputs) == len(targets) == min(examples or 5, 5)


@pytest.mark.parametrize("likelihood", [None, fv.Gaussian(), fv.Categorical()], ids=str)
def test_a_loader_of_the_command_line_may_return_two_batches_that_can_be_no_targets(tmp_path, likelihood):
    name = f"two_{type(likelihood).__name__}"
    (tmp_path / f"{name}.py").write_text(
        "import torch\nX = torch.arange(24.0).reshape(8, 3)\ndef load():\n    return [X[:4], X[4:]]\n"
    )
    if isinstance(likelihood, fv.Categorical):
        data = load_data(f"{tmp_path}/{name}.py:load", None, likelihood=likelihood)
        assert [len(x) for x, _ in Batches(data.batches, likelihood=likelihood)] == [4, 4]
    else:
        with pytest.raises(OptionError, match=r"--data: a list of two tensors .* may be inputs with their targets"):
            load_data(f"{tmp_path}/{name}.py:load", None, likelihood=likelihood)


def test_true_and_false_are_no_classes(tmp_path):
    (tmp_path / "truths.py").write_text("import torch\ndef load():\n    return torch.zeros(4, 2), torch.ones(4) > 0\n")
    data = load_data(f"{tmp_path / 'truths.py'}:load", None)
    assert data.likelihood_for(None, None)[0] == "bernoulli"
