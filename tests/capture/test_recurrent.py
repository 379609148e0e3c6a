"""Recurrent networks: exact without structure, and without a loop over examples."""

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.capture import per_example
from tests.oracles import exact, laws, nets
from tests.oracles.checks import FLOAT32, assert_matches


class Tagger(nn.Module):
    """A recurrent module, and an output from the mean of its states."""

    def __init__(self, kind, **options):
        super().__init__()
        self.states = kind(2, 3, **options)
        self.last = nn.Linear(6 if options.get("bidirectional") else 3, 2)

    def forward(self, x):
        if self.states.batch_first:
            return self.last(self.states(x)[0].mean(1))
        return self.last(self.states(x.transpose(0, 1))[0].mean(0))


class Stepping(nn.Module):
    """A cell in a loop of one's own, from zeros that torch or the model makes."""

    def __init__(self, kind, given):
        super().__init__()
        self.cell, self.last, self.given = kind(2, 3), nn.Linear(3, 2), given

    def forward(self, x):
        state = x.new_zeros(len(x), 3) if self.given else None
        if self.given and isinstance(self.cell, nn.LSTMCell):
            state = (state, state)
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.last(state[0] if isinstance(state, tuple) else state)


class First(nn.Module):
    def forward(self, found):
        return found[0]


class FromData(Tagger):
    """States that begin at the data."""

    def forward(self, x):
        first = torch.sin(x[:, 0, :1]).repeat(1, 3).unsqueeze(0)
        return self.last(self.states(x.transpose(0, 1), first)[0].mean(0))


NETWORKS = {
    **{f"{kind.__name__}, {options}": lambda kind=kind, options=options: Tagger(kind, **options)
       for kind in (nn.RNN, nn.GRU, nn.LSTM)
       for options in ({}, {"batch_first": True, "bidirectional": True}, {"num_layers": 2, "bias": False})},
    "relu": lambda: Tagger(nn.RNN, nonlinearity="relu"),
    "projected": lambda: nn.Sequential(nn.LSTM(2, 3, proj_size=2, batch_first=True), First(), nets.MeanTokens()),
    **{f"{kind.__name__}, {given}": lambda kind=kind, given=given: Stepping(kind, given)
       for kind in (nn.RNNCell, nn.GRUCell, nn.LSTMCell) for given in (False, True)},
    "from data": lambda: FromData(nn.GRU),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_loop(monkeypatch):
    def loop(*_):
        pytest.fail("went through the examples one by one")

    monkeypatch.setattr(per_example, "_one_at_a_time", loop)


every = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS.keys())


@every
def test_exact_quantities(build):
    net, x = nets.randomised(build()), torch.randn(4, 3, 2, dtype=torch.float64)
    dense = exact.fisher(net, x, laws.Categorical())
    fisher = fv.Probe(net, "categorical").fisher(x)
    assert_matches(fisher.to_dense(), dense)
    v = torch.randn(len(dense), dtype=torch.float64)
    assert_matches(fisher @ v, dense @ v.numpy())
    assert_matches(fisher.diagonal(), np.diag(dense))


@every
def test_float32(build):
    net, x = nets.randomised(build()), torch.randn(4, 3, 2)
    dense = exact.fisher(net, x.double(), laws.Categorical())
    assert_matches(fv.Probe(net.float(), "categorical").fisher(x).to_dense(), dense, FLOAT32)


@pytest.mark.filterwarnings("ignore:.*no structure")
def test_optimizers_take_the_exact_diagonal():
    net, x = nets.randomised(Tagger(nn.GRU)).train(), torch.randn(4, 3, 2, dtype=torch.float64)
    opt = fv.optim.KFAC.paper(net, "categorical", rescale=False, adapt=False, lr=0.1, damping=0.1, kind="exact")
    nn.functional.cross_entropy(net(x), torch.arange(4) % 2).backward()
    F = exact.fisher(net, x, laws.Categorical())
    before, g = net.states.weight_hh_l0.detach().clone(), net.states.weight_hh_l0.grad.clone()
    opt.step()
    diagonal = torch.from_numpy(np.diag(F)[18:45].copy()).view(9, 3)
    assert_matches(net.states.weight_hh_l0, before - 0.1 * g / (diagonal + 0.1))
