"""Heatmaps of layers whose weights do not lie in memory row by row: tables, transposed convolutions, biases first."""

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz import plotting as plot
from fisherviz.results.cells import reduce_matrix
from tests.oracles import nets


class BiasFirst(nn.Linear):
    """A Linear that registers its bias before its weight."""

    def __init__(self, *shape):
        super().__init__(*shape)
        weight = self.weight
        del self.weight
        self.weight = weight


class TableAsHead(nn.Module):
    """A bias of the second layer is the first's: torch order goes from one layer to the other and back."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        self.other.bias = self.one.bias

    def forward(self, x):
        return self.other(torch.tanh(self.one(x)))


NETS = {
    "table": lambda: (nn.Sequential(nn.Embedding(5, 3), nets.MeanTokens(), nn.Linear(3, 2)), torch.randint(5, (4, 3))),
    "transposed convolution": lambda: (
        nn.Sequential(nn.ConvTranspose1d(4, 6, 2, groups=2), nn.Tanh(), nets.MeanPixels(), nn.Linear(6, 2)),
        torch.randn(4, 4, 3).double(),
    ),
    "bias first": lambda: (nn.Sequential(BiasFirst(3, 4), nn.Tanh(), BiasFirst(4, 2)), nets.vectors(5, 3)),
    "shared bias": lambda: (TableAsHead(), nets.vectors(5, 3)),
}


def expected(matrix, order, places):
    """The dense matrix of some layers, one after the other, each in an order."""
    space = matrix.space
    if order == "torch":
        return np.block([[matrix.block(i, j).numpy() for j in places] for i in places])
    starts = np.concatenate([[0], np.cumsum(space.sizes)])
    index = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in places])
    return matrix.to_dense(order).numpy()[np.ix_(index, index)]


@pytest.mark.parametrize("order", ["torch", "unit", "input"])
@pytest.mark.parametrize("name", NETS)
def test_a_heatmap_shows_the_entries_of_the_matrix_in_its_order(monkeypatch, name, order):
    """By blocks, as large matrices and some layers= are drawn, weights were read row by row whatever their layout."""
    net, x = NETS[name]()
    fisher = fv.Probe(nets.randomised(net), "gaussian").fisher(x)
    every = tuple(range(len(fisher.layers)))
    for matrix in (fisher, fv.approximate(fisher, "cw-ngd")):
        for dense in (3000, 0):
            monkeypatch.setattr("fisherviz.plotting.reduce.DENSE", dense)
            for places in (every, every[::-1], every[:1]):
                given = None if places == every else [fisher.space.names[i] for i in places]
                for limit in (600, 7):
                    found = plot.heatmap_info(matrix, order=order, layers=given, limit=limit, signed=True)
                    want = reduce_matrix(expected(matrix, order, places), found.factor, True)
                    np.testing.assert_allclose(np.abs(found.values), np.abs(want), rtol=1e-5, atol=1e-9)
                    sizes = [fisher.space.sizes[i] for i in places]
                    np.testing.assert_allclose(found.edges * found.factor, np.concatenate([[0], np.cumsum(sizes)]))
