"""Attention over another batch than the model's: windows, single examples, shared queries; by brute force."""

import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.oracles import exact, laws, nets
from tests.oracles.checks import assert_matches

E, T = 4, 3


class Placed(nn.Module):
    """Attention over (N, 2 T, E) in windows, along an axis, for one example at a time, or among shared queries."""

    def __init__(self, how, **options):
        super().__init__()
        self.first, self.attention, self.last = nn.Linear(E, E), nn.MultiheadAttention(E, 2, **options), nn.Linear(E, 2)
        self.how = how
        self.queries = nn.Parameter(torch.zeros(2, E)) if how == "shared queries" else None

    def attend(self, x, y=None):
        x, y = (z if z is None or self.attention.batch_first or z.dim() == 2 else z.transpose(0, 1) for z in (x, y))
        z, _ = self.attention(x, x if y is None else y, x if y is None else y)
        return z if self.attention.batch_first or z.dim() == 2 else z.transpose(0, 1)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        halves = x.unflatten(1, (2, T))
        match self.how:
            case "windows":
                z = self.attend(halves.flatten(0, 1)).unflatten(0, (-1, 2))
            case "shifted windows":
                z = self.attend(x.roll(1, 1).unflatten(1, (2, T)).flatten(0, 1)).unflatten(0, (-1, 2))
            case "along the other axis":
                z = self.attend(halves.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, T))
            case "windows before examples":
                z = self.attend(halves.transpose(0, 1).flatten(0, 1)).unflatten(0, (2, -1)).transpose(0, 1)
            case "one at a time":
                z = torch.cat([self.attend(row.unsqueeze(0)) for row in x]).unsqueeze(1)
            case "without a batch":
                z = torch.stack([self.attend(row) for row in x]).unsqueeze(1)
            case "window by window":
                z = torch.stack([self.attend(window) for window in halves], 0)
            case "shared queries":
                first = self.attend(self.queries.unsqueeze(0)).expand(len(x), -1, -1)
                z = self.attend(first, x).unsqueeze(1)
        return self.last(torch.tanh(z)).mean((1, 2))


PLACES = {
    "windows": "structured",
    "shifted windows": "structured",
    "along the other axis": "structured",
    "windows before examples": "generic",
    "one at a time": "generic",
    "without a batch": "generic",
    "window by window": "generic",
    "shared queries": "generic",
}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("how", PLACES)
def test_attention_over_another_batch_than_the_model_s(how, batch_first):
    net = nets.randomised(Placed(how, batch_first=batch_first))
    batches = [torch.randn(n, 2 * T, E, dtype=torch.float64) for n in (3, 1, 5, 2)]
    F = exact.fisher(net, torch.cat(batches), laws.Gaussian())
    whole = fv.Probe(net, "gaussian").fisher(torch.cat(batches))
    parts = fv.Probe(net, "gaussian").fisher([(x, None) for x in batches])
    for fisher in (whole, parts):
        assert_matches(fisher.to_dense(), F)
        assert_matches(fisher @ torch.ones(len(F), dtype=torch.float64), F.sum(1))
        found = {layer.path for layer in fisher.layers if layer.name.startswith("attention")}
        assert found == {PLACES[how]}


@pytest.mark.parametrize("method", ["exact", "layer", "diagonal"])
@pytest.mark.parametrize("how", PLACES)
def test_steps_of_attention_over_another_batch_than_the_model_s(how, method):
    net = nets.randomised(Placed(how, batch_first=True)).train()
    options = {"kind": "exact", "lr": 0.1, "damping": 0.1, "momentum": 0.0, "decay": 0.0, "kl_clip": float("inf")}
    optimizer = fv.optim.NaturalGradient(net, "gaussian", method, **options)
    for n in (3, 4, 2):
        x = torch.randn(n, 2 * T, E, dtype=torch.float64)
        F = torch.from_numpy(exact.fisher(net, x, laws.Gaussian()))
        before = torch.cat([p.detach().flatten() for p in net.parameters()])
        optimizer.zero_grad()
        net(x).square().sum(1).mean().mul(0.5).backward()
        gradient = torch.cat([p.grad.flatten() for p in net.parameters()])
        optimizer.step()
        moved = before - torch.cat([p.detach().flatten() for p in net.parameters()])
        own = torch.cat([torch.full((p.numel(),), k) for k, p in zip(owners(net), net.parameters(), strict=True)])
        kept = {"exact": torch.ones_like(F), "layer": (own == own.unsqueeze(1)).to(F), "diagonal": torch.eye(len(F))}
        expected = torch.linalg.solve(F * kept[method] + 0.1 * torch.eye(len(F)).to(F), gradient)
        assert_matches(moved, (0.1 * expected).numpy())


def owners(net):
    """A number for the layer of each parameter, in order."""
    names = [
        name.replace("_weight", ".").replace("_bias", ".").rpartition(".")[0] for name, _ in net.named_parameters()
    ]
    return [sorted(set(names)).index(name) for name in names]
