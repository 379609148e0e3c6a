"""Ways in which a model may call its layers: by keywords in any order, with nested or sparse tensors."""

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.oracles import exact, laws, nets
from tests.oracles.checks import assert_matches
from tests.training_runs import half_squares

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*chain", "ignore:.*no structure", "ignore:.*nested", "ignore:Sparse CSR"
)


class Calling(nn.Module):
    """A layer that is called in some way, between two that are called plainly."""

    def __init__(self, layer, call, width):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(4, 4), layer, nn.Linear(width, 2)
        self.call = call

    def forward(self, x):
        return self.last(torch.tanh(self.call(self.layer, torch.tanh(self.first(x)))))


def nested(layout):
    def call(layer, h):
        parts = torch.nested.as_nested_tensor([row[: 1 + int(row[0, 0] > 0)] for row in h], layout=layout)
        return torch.nested.to_padded_tensor(layer(parts), 0.0).sum(1)

    return call


BY_KEYWORD = {
    "output size first": (
        lambda: nn.ConvTranspose1d(3, 2, 3, stride=2),
        lambda layer, h: layer(output_size=[10], input=h).mean(2),
        2,
    ),
    "input alone": (lambda: nn.Linear(4, 4), lambda layer, h: layer(input=h).sum(1), 4),
    "after something else": (
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        lambda layer, h: layer(need_weights=False, value=h, key=h, query=h)[0].sum(1),
        4,
    ),
}
OTHER_TENSORS = {
    "jagged": (lambda: nn.Linear(4, 4), nested(torch.jagged), 4),
    "nested": (lambda: nn.Linear(4, 4), nested(torch.strided), 4),
    "nested, two layers": (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), nested(torch.jagged), 4),
    "sparse": (lambda: nn.Linear(4, 4), lambda layer, h: layer(h[:, 0].relu().to_sparse()), 4),
    "compressed rows": (lambda: nn.Linear(4, 4), lambda layer, h: layer(h[:, 0].detach().relu().to_sparse_csr()), 4),
}


def made(layer, call, width):
    torch.manual_seed(0)
    return nets.randomised(Calling(layer(), call, width)), torch.randn(5, 3, 4, dtype=torch.float64)


def assert_exact(fisher, F):
    v = torch.randn(len(F), dtype=torch.float64)
    assert_matches(fisher @ v, F @ v.numpy())
    assert_matches(fisher.solve(v, 0.1), np.linalg.solve(F + 0.1 * np.eye(len(F)), v.numpy()))
    assert_matches(fisher.to_dense(), F)


@pytest.mark.parametrize("way", BY_KEYWORD.values(), ids=BY_KEYWORD)
def test_by_keyword(way):
    net, x = made(*way)
    fisher = fv.Probe(net, "gaussian").fisher(x)
    assert_exact(fisher, exact.fisher(net, x, laws.Gaussian()))
    assert {layer.path for layer in fisher.layers} == {"structured"}


def test_a_forward_in_the_place_of_the_class_s_own():
    net, x = made(lambda: nn.Linear(4, 4), lambda layer, h: layer(times=2.0, vector=h).sum(1), 4)
    layer = net.layer
    layer.forward = lambda times, vector: times * nn.functional.linear(vector, layer.weight, layer.bias)
    fisher = fv.Probe(net, "gaussian").fisher(x)
    assert_exact(fisher, exact.fisher(net, x, laws.Gaussian()))


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("way", OTHER_TENSORS.values(), ids=OTHER_TENSORS)
def test_nested_and_sparse_tensors(way, hooked):
    """With a hook of the user's, too, whose doing is looked at."""
    net, x = made(*way)
    if hooked:
        net.layer.register_forward_hook(lambda *given: None)
    fisher = fv.Probe(net, "gaussian").fisher(x)
    assert_exact(fisher, exact.fisher(net, x, laws.Gaussian()))


@pytest.mark.parametrize("way", [*OTHER_TENSORS.values(), *BY_KEYWORD.values()], ids=[*OTHER_TENSORS, *BY_KEYWORD])
@pytest.mark.parametrize("optimizer", ["FOOF", "EKFAC"])
def test_optimizers_step(way, optimizer):
    net, x = made(*way)
    loss, made_of = half_squares(x, torch.ones(5, 2).double()), getattr(fv.optim, optimizer)(net.train(), "gaussian")
    before = loss(net).item()
    for _ in range(2):
        made_of.zero_grad()
        loss(net).backward()
        made_of.step()
    assert loss(net).item() < before
