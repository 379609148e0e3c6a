"""Passes of later steps that use a layer otherwise: steps stay those of the exact matrix, and restarts are told."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fisherviz as fv
from tests.oracles import exact, laws


class Extra(nn.Module):
    """From some step on its weight acts a second time, as a function, or instead of the layer."""

    def __init__(self, instead):
        super().__init__()
        self.a, self.head, self.extra, self.instead = nn.Linear(4, 4), nn.Linear(4, 3), False, instead

    def forward(self, x):
        if not self.extra:
            return self.head(self.a(x).tanh())
        other = F.linear(x, self.a.weight, self.a.bias)
        return self.head((other if self.instead else self.a(x) + other).tanh())


class Positions(nn.Module):
    """One layer on tokens and on positions."""

    def __init__(self):
        super().__init__()
        self.a, self.head, self.table = nn.Linear(4, 4), nn.Linear(4, 3), nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return self.head((self.a(x) + self.a(self.table)).tanh().mean(1))


def step_error(net, optimizer, x, y):
    """How far a step is from -lr g / (d + damping), d the exact diagonal of the batch."""
    d = torch.as_tensor(exact.fisher(net.eval(), x, laws.Categorical())).diagonal()
    before = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    optimizer.zero_grad()
    F.cross_entropy(net.train()(x), y).backward()
    g = torch.cat([p.grad.reshape(-1) for p in net.parameters()])
    optimizer.step()
    moved = torch.cat([p.detach().reshape(-1) for p in net.parameters()]) - before
    wanted = -0.1 * g / (d + 0.1)
    return float((moved - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("instead", [False, True])
def test_a_weight_that_acts_outside_its_layer_from_a_later_step_on(instead):
    torch.manual_seed(0)
    net, x, y = Extra(instead).double(), torch.randn(6, 4).double(), torch.arange(6) % 3
    optimizer = fv.optim.NaturalGradient(net, "categorical", "diagonal", lr=0.1, damping=0.1, decay=0.0, kind="exact")
    for k in range(5):
        assert step_error(net, optimizer, x, y) < 1e-10, k
    net.extra = True
    with pytest.warns(UserWarning, match="at step 6 layers 'a' turn out to have no structure .* begin anew"):
        assert step_error(net, optimizer, x, y) < 1e-10
    assert step_error(net, optimizer, x, y) < 1e-10


@pytest.mark.filterwarnings("ignore:at step")
@pytest.mark.parametrize("sizes", [[5, 5, 5, 5, 5, 3, 3], [1, 5, 5, 5, 5, 3], [3, 5, 3]])
def test_positions_that_are_as_many_as_the_examples_of_a_step(sizes):
    torch.manual_seed(0)
    net = Positions().double()
    optimizer = fv.optim.NaturalGradient(net, "categorical", "diagonal", lr=0.1, damping=0.1, decay=0.0, kind="exact")
    for n in sizes:
        x, y = torch.randn(n, 3, 4).double(), torch.arange(n) % 3
        assert step_error(net, optimizer, x, y) < 1e-10, n
