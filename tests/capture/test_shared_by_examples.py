"""Layers that act once for all examples, such as tables of positions: gradients of each example, by evidence."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.oracles import exact, laws, nets
from tests.oracles.checks import FLOAT32, assert_matches
from tests.training_runs import assert_resumes, half_squares, trained

pytestmark = pytest.mark.filterwarnings("ignore:.*chain", "ignore:.*exact 2 x 2")

V, T, D = 5, 4, 3


class Positions(nn.Module):
    """Tokens (N, T) and their positions; `added` brings both together."""

    def __init__(self, added, **options):
        super().__init__()
        self.tokens, self.places = nn.Embedding(V, D), nn.Embedding(T + 1, D, **options)
        self.mix, self.head, self.added = nn.Linear(D, D), nn.Linear(D, 2), added

    def forward(self, x):
        h = self.added(self.tokens(x), self.places, torch.arange(x.shape[1], device=x.device))
        return self.head(torch.tanh(self.mix(h.cumsum(1))).mean(1))


def in_place(h, table, at):
    h = h.clone()
    h += table(at)
    return h


ADDED = {
    "(1, T) ids": lambda h, table, at: h + table(at[None]),
    "(T,) ids": lambda h, table, at: h + table(at),
    "on the left": lambda h, table, at: table(at) + h,
    "in place": in_place,
    "unsqueezed": lambda h, table, at: h + table(at).unsqueeze(0),
    "viewed": lambda h, table, at: h + table(at).view(1, *h.shape[1:]),
    "expanded": lambda h, table, at: h * 2 + table(at).expand_as(h).tanh(),
    "repeated": lambda h, table, at: torch.cat([h, table(at[None]).repeat(len(h), 1, 1)], 1),
    "added twice": lambda h, table, at: (h + table(at)).tanh() + table(at[None]),
    "its output added twice": lambda h, table, at: (lambda p: (h + p).tanh() + p)(table(at)),
    "two rows each": lambda h, table, at: h + (table(at[None]) + table((at + 1)[None])),
    "for all and for each": lambda h, table, at: (h + table(at)).tanh() * table(at.expand(len(h), -1)),
}
added = pytest.mark.parametrize("added", ADDED.values(), ids=ADDED)


def made(added, **options):
    torch.manual_seed(0)
    return nets.randomised(Positions(added, **options)), torch.randint(V, (6, T))


def structured_only(monkeypatch):
    monkeypatch.setattr("fisherviz.capture.take.generic_captures", None)


@added
def test_exact_quantities(added, monkeypatch):
    net, x = made(added, padding_idx=1)
    structured_only(monkeypatch)
    F = exact.fisher(net, x, laws.Gaussian())
    fisher = fv.Probe(net, "gaussian").fisher(x)
    assert_matches(fisher.to_dense(), F)
    v = torch.randn(len(F), 2, dtype=torch.float64)
    for asked in (fisher.fresh(), fisher.fresh().with_captures()):
        assert_matches(asked @ v, F @ v.numpy())
        assert_matches(asked.solve(v[:, 0], 0.1), np.linalg.solve(F + 0.1 * np.eye(len(F)), v[:, 0].numpy()), 1e-9)
        assert_matches(asked.diagonal(), np.diag(F))
    first, last = V * D, V * D + (T + 1) * D
    assert_matches(fisher.fresh().block("places"), F[first:last, first:last])
    assert_matches(fisher.fresh().block("tokens", "places"), F[:first, first:last])
    where = np.arange(last - first) % D
    for unit, block in enumerate(fisher.units("places")):
        assert_matches(block, F[first:last, first:last][np.ix_(where == unit, where == unit)])
    assert {layer.path for layer in fisher.layers} == {"structured"}


@pytest.mark.covering
@added
@pytest.mark.parametrize("kind", ["mc", "empirical"])
def test_labels_single_precision_and_other_batches(added, kind, monkeypatch):
    net, x = made(added)
    structured_only(monkeypatch)
    parts, y = [x, x[:1], x[1:, :2], x[:T]], [torch.arange(n) % 2 for n in (6, 1, 5, T)]
    fisher = fv.Probe(net, "categorical").fisher(list(zip(parts, y, strict=True)), kind=kind)
    found = fisher.to_dense()
    if kind == "mc":
        at, labels = 0, []
        for part in parts:
            labels.append(fisher.vectors.labels(net(part).detach(), at)[0])
            at += len(part)
        y = labels
    sums = [exact.fisher(net, p, laws.Categorical(), targets=t, reduction="sum") for p, t in zip(parts, y, strict=True)]
    F = sum(sums) / sum(map(len, parts))
    assert_matches(found, F)
    if kind == "empirical":
        single = fv.Probe(copy.deepcopy(net).float(), "categorical").fisher(list(zip(parts, y, strict=True)), kind=kind)
        assert_matches(single.to_dense(), F, FLOAT32)


@pytest.mark.parametrize("bytes_", [1, 10**9])
def test_in_pieces_of_single_examples(bytes_, monkeypatch):
    net, x = made(ADDED["(T,) ids"])
    structured_only(monkeypatch)
    monkeypatch.setattr("fisherviz.capture.network.CAPTURE_BYTES", bytes_)
    F = exact.fisher(net, x, laws.Gaussian())
    fisher = fv.Probe(net, "gaussian").fisher(x)
    v = torch.randn(len(F), dtype=torch.float64)
    assert_matches(fisher.solve(v, 0.1), np.linalg.solve(F + 0.1 * np.eye(len(F)), v), 1e-9)
    assert_matches(fisher.to_dense(), F)


def test_as_many_positions_as_examples():
    for n in (1, 2, T, 32):
        net, _ = made(ADDED["(T,) ids"])
        net.places = nets.randomised(nn.Embedding(n, D))
        x = torch.randint(V, (n, n))
        F = exact.fisher(net, x, laws.Gaussian())
        assert_matches(fv.Probe(net, "gaussian").fisher(x).to_dense(), F)


def twins():
    """Positions that are read once for all, and for each."""
    net, x = made(ADDED["(T,) ids"])
    other = copy.deepcopy(net)
    other.added = lambda h, table, at: h + table(at.expand(len(h), -1))
    return net, other, x


@pytest.mark.parametrize("method", list(fv.approximations))
def test_methods_are_those_of_positions_that_are_read_for_each_example(method):
    net, other, x = twins()
    one, two = (fv.approximate(fv.Probe(model, "gaussian").fisher(x), method).to_dense() for model in (net, other))
    assert_matches(one, two)


OPTIMIZERS = ["KFAC", "EKFAC", "FOOF", "CWNGD", "TENGraD", "HessianFree"]


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "empirical", "layer"])
def test_optimizers_step_as_with_positions_that_are_read_for_each_example(optimizer):
    net, other, x = twins()
    loss = half_squares(x, torch.linspace(-1, 1, 12).double().view(6, 2))

    def build(model):
        if hasattr(fv.optim, optimizer):
            return getattr(fv.optim, optimizer)(model, "gaussian")
        kind = {"kind": "empirical"} if optimizer == "empirical" else {}
        return fv.optim.NaturalGradient(model, "gaussian", "layer", damping=0.1, lr=0.1, **kind)

    assert_matches(trained(build, net, loss), trained(build, other, loss), 1e-9)


@pytest.mark.parametrize("batch", [6, T])
def test_an_optimizer_without_evidence_of_single_examples(batch):
    """Under dropout no example's output is its own: the graph tells what is shared."""
    net, other, x = twins()
    weights = []
    for model in (net, other):
        torch.manual_seed(2)
        whole = nn.Sequential(model, nn.Dropout(0.5)).double().train()
        optimizer = fv.optim.NaturalGradient(whole, "gaussian", "layer", damping=0.1, lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            whole(x[:batch]).square().sum(1).mean().backward()
            optimizer.step()
        assert all(layer.structured for layer in optimizer.layers)
        weights.append(torch.cat([p.detach().reshape(-1) for p in whole.parameters()]))
    assert_matches(*weights, 1e-9)


def test_an_optimizer_resumes(tmp_path):
    net, _, x = twins()

    def build(model):
        return fv.optim.NaturalGradient(model, "gaussian", "layer", lr=0.1, damping=0.1, T=3)

    assert_resumes(build, net.train(), lambda model: model(x).square().mean(), tmp_path)


def test_outputs_stay_bit_for_bit_what_they_were():
    net, _, x = twins()
    before = net(x)
    fv.Probe(net, "gaussian").fisher(x).to_dense()
    optimizer = fv.optim.FOOF(net.train(), "gaussian", lr=0.0)
    for _ in range(2):
        assert torch.equal(net(x), before)
        net(x).sum().backward()
        optimizer.step()


class Learned(nn.Module):
    """What a layer makes of a learned vector for each position, added to what is known of each example."""

    def __init__(self, layer, shape, frozen=False):
        super().__init__()
        self.start, self.layer = nn.Parameter(torch.randn(shape), requires_grad=not frozen), layer
        self.read, self.head = nn.Linear(2, D), nn.Linear(D, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.read(x).unsqueeze(1) * torch.ones(T, 1) + self.layer(self.start)).sum(1))


LAYERS = {
    "linear": lambda: nn.Linear(D, D),
    "linear without bias": lambda: nn.Linear(D, D, bias=False),
    "layer norm": lambda: nn.LayerNorm(D),
}


@pytest.mark.covering
@pytest.mark.parametrize("shape", [(T, D), (1, T, D)])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("frozen", [True, False])
def test_layers_of_learned_constants(layer, shape, frozen):
    torch.manual_seed(0)
    net, x = nets.randomised(Learned(layer(), shape, frozen).double()), torch.randn(5, 2, dtype=torch.float64)
    F = exact.fisher(net, x, laws.Gaussian())
    fisher = fv.Probe(net, "gaussian").fisher(x)
    assert_matches(fisher.to_dense(), F)
    v = torch.randn(len(F), dtype=torch.float64)
    assert_matches(fisher.fresh().solve(v, 0.1), np.linalg.solve(F + 0.1 * np.eye(len(F)), v.numpy()), 1e-9)
    assert {layer.name: layer.path for layer in fisher.layers}["layer"] == "structured"


OTHERWISE = {
    "multiplied": lambda h, table, at: h * table(at),
    "subtracted": lambda h, table, at: h - table(at),
    "weighted": lambda h, table, at: torch.add(h, table(at), alpha=2),
    "for all features": lambda h, table, at: h + table(at).sum(-1, keepdim=True),
    "by its transpose": lambda h, table, at: h + (table(at).mT @ table(at)).sum(0),
    "added and multiplied": lambda h, table, at: (lambda p: (h + p) * p.tanh())(table(at)),
}


@pytest.mark.parametrize("added", OTHERWISE.values(), ids=OTHERWISE)
def test_other_uses_are_exact_on_the_generic_path(added):
    net, x = made(added)
    F = exact.fisher(net, x, laws.Gaussian())
    fisher = fv.Probe(net, "gaussian").fisher(x)
    assert_matches(fisher.to_dense(), F)
    assert {layer.name: layer.path for layer in fisher.layers}["places"] == "generic"
    optimizer = fv.optim.FOOF(net.train(), "gaussian")
    with pytest.warns(UserWarning, match="layers 'places' have no structure"):
        net(x).square().sum(1).mean().backward()
    optimizer.step()
