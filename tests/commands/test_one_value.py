"""A layer's numbers in the joint view and in that of single layers are the same numbers."""

import numpy as np
import pytest
import torch

from fisherviz.commands.job import Job
from fisherviz.commands.report import run
from tests.pages import undrawn

MODULE = """
import random
import torch
from torch import nn

random.seed({seed})
SIZES = [random.randint(2, 6) for _ in range(random.randint(3, 4))]
ACTIVATION = random.choice([nn.Tanh, nn.ReLU, nn.Sigmoid])
LINEAR, CHANNELS = {linear}, random.randint(1, 3)

def build():
    torch.manual_seed({seed})
    body = [module for a, b in zip(SIZES, SIZES[1:]) for module in (nn.Linear(a, b, bias={bias}), ACTIVATION())]
    if LINEAR:
        return nn.Sequential(*body[:-1])
    return nn.Sequential(nn.Conv2d(1, CHANNELS, 2), nn.Tanh(), nn.Conv2d(CHANNELS, 2, 2), nn.Flatten(), nn.Linear(8, 3))

def data():
    torch.manual_seed({seed} + 1)
    x = torch.randn(14, SIZES[0]) if LINEAR else torch.randn(14, 1, 4, 4)
    return x, torch.randint(SIZES[-1] if LINEAR else 3, (14,))
"""


KINDS = ("exact", "mc", "empirical")
# the network with convolutions and a dense layer; the others, and other kinds, in the long run
CASES = [
    pytest.param(seed, kind, marks=[] if (seed, kind) == (2, "empirical") else pytest.mark.soak)
    for seed in range(3) for kind in KINDS
]  # fmt: skip


@pytest.mark.parametrize(("seed", "kind"), CASES)
def test_what_both_sections_show_has_one_value(tmp_path, monkeypatch, seed, kind):
    undrawn(monkeypatch)
    name = f"net_{seed}_{kind}"
    text = MODULE.format(seed=seed, linear=seed != 2, bias=seed != 1)
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(seed)
    job = Job(model=f"{name}:build", data=f"{name}:data", out=tmp_path / "out", kind=kind, quiet=True)
    jointly, alone = (section.comparison for section in run(job, say=lambda line: None))
    assert jointly.meta["damping"] == alone.meta["damping"]
    keys = ["method", "row", "col", "metric"]
    both = jointly.frame.merge(alone.frame, on=keys, suffixes=("", "_alone"))
    both = both[both["method"] != "kfra"]  # whose recursion begins at the last layer there is, as a note says
    assert {"direction_cosine", "inverse_frobenius", "kl", "relative_frobenius"} <= set(both["metric"])
    assert set(both["row"]) == set(jointly.layers)
    assert len(set(both["method"])) > 5
    np.testing.assert_allclose(both["value_alone"], both["value"], rtol=2e-4, atol=1e-5)
