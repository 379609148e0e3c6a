"""Networks of the user's own that cannot be trained as they are made, options of the wrong kind, and what resumes."""

import sys

import pytest
import torch
from torch import nn

from fisherviz import training
from fisherviz.support.errors import OptionError

BASE = {"dataset": "digits", "limit": 90, "batch_size": 20, "epochs": 3, "quiet": True, "tensorboard": False}
SOURCE = """
import torch
from torch import nn

def frozen():
    return nn.Linear(64, 10).requires_grad_(False)

def broken():
    net = nn.Linear(64, 10)
    net.weight.data.fill_(float("nan"))
    return net

def lazy():
    return nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(10))

def on_meta():
    with torch.device("meta"):
        return nn.Linear(64, 10)

class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.seen += 1
        return self.layer(x) / (1 + 0.1 * self.seen)
"""


@pytest.fixture
def networks(tmp_path, monkeypatch):
    (tmp_path / "unusual_networks.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "unusual_networks"
    sys.modules.pop("unusual_networks", None)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("frozen", "no parameter with requires_grad=True: there is nothing to train"),
        ("broken", "'weight' is not finite from the start"),
        ("lazy", r"'0\.weight', of a lazy layer, has no shape yet"),
        ("on_meta", "'weight' is on the meta device and holds no numbers"),
    ],
)
def test_a_network_that_cannot_be_trained_is_refused_before_a_folder_is_made(networks, name, said, tmp_path):
    with pytest.raises(OptionError, match=f"^model: .*{said}"):
        training.train(BASE | {"model": f"{networks}:{name}", "optimizer": "foof", "out": tmp_path / "run"})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("optimizer", "options", "said"),
    [
        ("adam", {"lr": "abc"}, "lr must be a number, got 'abc'"),
        ("adam", {"betas": 5}, r"betas must be 2 numbers, as \[0\.9, 0\.999\], got 5"),
        ("adam", {"betas": [0.9]}, r"betas must be 2 numbers, as \[0\.9, 0\.999\], got \[0\.9\]"),
        ("sgd", {"momentum": []}, r"momentum must be a number, got \[\]"),
    ],
)
def test_an_option_of_another_kind_is_refused_by_its_name(optimizer, options, said, tmp_path):
    with pytest.raises(OptionError, match=said):
        training.train(BASE | {"optimizer": optimizer, "optimizer_options": options, "out": tmp_path / "run"})


def test_a_run_with_a_buffer_that_states_leave_out_continues_bit_for_bit(networks, tmp_path):
    base = BASE | {"model": f"{networks}:Counting", "optimizer": "adam"}
    whole = training.train(base | {"out": tmp_path / "whole"})
    training.train(base | {"out": tmp_path / "parts", "max_steps": 4})
    parts = training.train(base | {"out": tmp_path / "parts"})
    assert parts.summary["final"] == whole.summary["final"]
    weights = [torch.load(tmp_path / name / "checkpoint.pt")["model"] for name in ("whole", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in nn.Linear(1, 1).state_dict(prefix="layer."))
