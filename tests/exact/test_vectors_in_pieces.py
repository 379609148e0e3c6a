"""Many outputs: the vectors of an example come in pieces that fit, and no number depends on it."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.exact import passes, run
from tests.oracles import exact, laws, nets
from tests.oracles.checks import assert_matches

pytestmark = pytest.mark.filterwarnings("ignore:.*single features", "ignore:.*chain", "ignore:.*no structure")

NETS = {
    "perceptron": lambda: (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)), torch.randn(7, 3).double()),
    "convolution": lambda: (
        nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 5)),
        torch.randn(7, 1, 3, 3).double(),
    ),
    "tokens": lambda: (nn.Sequential(nn.Embedding(6, 3), nets.MeanTokens(), nn.Linear(3, 5)), torch.randint(6, (7, 4))),
    "no structure": lambda: (
        nn.Sequential(nn.EmbeddingBag(6, 3, mode="max"), nn.Tanh(), nn.Linear(3, 5)),
        torch.randint(6, (7, 4)),
    ),
}


def made(name):
    torch.manual_seed(0)
    net, x = NETS[name]()
    return nets.randomised(net), x, torch.randint(5, (7,))


WAYS = ["one vector", "some", "nearly all"]


def cut(way, monkeypatch):
    """Limits below one example's four vectors; whether a piece had vectors of the same examples as the one before."""
    taking, original, seen = sys.modules["fisherviz.capture.take"], run.take, []

    def limited(network, inputs, targets, vectors, consume, witness, first=0, share=None):
        def noted(batch):
            seen.append(batch.later)
            consume(batch)

        fixed, per_vector = network.structure.example_bytes
        most = {"one vector": 0, "some": fixed + 2 * per_vector, "nearly all": fixed + 4 * per_vector - 1}
        network.capture_bytes = most[way]
        return original(network, inputs, targets, vectors, noted, witness, first, share)

    monkeypatch.setattr(taking, "TOGETHER", 1)
    monkeypatch.setattr(run, "take", limited)
    return seen


@pytest.mark.covering
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NETS)
def test_exact_quantities(name, way, monkeypatch):
    net, x, y = made(name)
    F = exact.fisher(net, x, laws.Categorical())
    probe = fv.Probe(net, "categorical")
    probe.fisher(x).look()
    seen = cut(way, monkeypatch)

    def fresh():
        seen.clear()
        return probe.fisher((x, y))

    v = torch.randn(len(F), 2, dtype=torch.float64)
    assert_matches(fresh().to_dense(), F)
    assert any(seen)
    assert_matches(fresh().diagonal(), np.diag(F))
    assert any(seen)
    assert_matches(fresh().solve(v[:, 0], 0.1), np.linalg.solve(F + 0.1 * np.eye(len(F)), v[:, 0]), 1e-9)
    assert fresh().norm() == pytest.approx(np.linalg.norm(F))
    gradient = fresh().gradient().numpy()
    assert_matches(fresh().natural_gradient(damping=0.1), np.linalg.solve(F + 0.1 * np.eye(len(F)), gradient), 1e-9)
    assert any(seen)


@pytest.mark.parametrize("name", NETS)
def test_products_need_no_captures_of_all_vectors(name, monkeypatch):
    net, x, y = made(name)
    F = exact.fisher(net, x, laws.Categorical())
    probe = fv.Probe(net, "categorical")
    probe.fisher(x).look()
    probe.network.note(forward_mode=False)
    seen = cut("some", monkeypatch)
    monkeypatch.setattr(passes, "keep_limit", lambda device: 1)
    fisher = probe.fisher((x, y))
    v = torch.randn(len(F), 2, dtype=torch.float64)
    assert_matches(fisher @ v, F @ v.numpy(), 1e-10)
    assert fisher.quadratic(v[:, 0], v[:, 1]) == pytest.approx(float(v[:, 0] @ torch.as_tensor(F) @ v[:, 1]))
    assert any(seen)
    damped = torch.as_tensor(F) + 0.1 * torch.eye(len(F), dtype=torch.float64)
    assert_matches(fisher.solve(v, 0.1), torch.linalg.solve(damped, v), 1e-8)  # dense: captures do not fit


@pytest.mark.covering
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", list(fv.approximations))
@pytest.mark.parametrize("name", NETS)
def test_methods(name, method, way, monkeypatch):
    net, x, _ = made(name)
    probe = fv.Probe(net, "categorical")
    expected = fv.approximate(probe.fisher(x), method).to_dense()
    seen = cut(way, monkeypatch)
    assert_matches(fv.approximate(probe.fisher(x), method).to_dense(), expected)
    assert any(seen) or method in ("identity", "foof")


def test_positions_that_are_left_out_stay_so(monkeypatch):
    torch.manual_seed(0)
    net = nets.randomised(nn.Sequential(nn.Embedding(6, 3), nn.Tanh(), nn.Linear(3, 4)))
    x, y = torch.randint(6, (5, 3)), torch.randint(4, (5, 3))
    y[:, 2] = -100
    expected = [fv.approximate(fv.Probe(net, "categorical").fisher(x, y), m).to_dense() for m in ("layer", "kfac")]
    probe = fv.Probe(net, "categorical")
    probe.fisher(x, y).look()
    seen = cut("some", monkeypatch)
    for method, dense in zip(("layer", "kfac"), expected, strict=True):
        assert_matches(fv.approximate(probe.fisher(x, y), method).to_dense(), dense)
    assert any(seen)
