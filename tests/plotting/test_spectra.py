"""Spectra of whatever heatmaps are drawn of."""

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import fisherviz as fv


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


@pytest.fixture
def data():
    return torch.randn(7, 3).double(), torch.randint(3, (7,))


def test_spectra_are_drawn_of_all_that_heatmaps_are_drawn_of(net, data):
    fisher = fv.Probe(net, "categorical").fisher(data[0])
    dense, kfac = fisher.to_dense(), fv.approximate(fisher, "kfac")
    exact = torch.linalg.eigvalsh(dense).flip(0)[:14].numpy()
    for source in (fisher, dense, dense.float(), dense.numpy(), fisher.spectrum()):
        (line,) = fv.plot.spectrum(source, ax=Figure().subplots()).lines
        assert line.get_ydata()[:14] == pytest.approx(exact, rel=1e-6, abs=1e-6)
    expected = torch.linalg.eigvalsh(kfac.to_dense()).flip(0)
    for source in (kfac, {"kfac": kfac}, {"kfac": kfac.to_dense()}, {"kfac": expected}):
        (line,) = fv.plot.spectrum(source, ax=Figure().subplots()).lines
        assert line.get_label() == "kfac"
        assert line.get_ydata()[:14] == pytest.approx(expected[:14].numpy(), rel=1e-6)
    for source, words in ((dense[:3], "square"), (dense.triu(), "symmetric"), (net, "cannot take the spectrum")):
        with pytest.raises((TypeError, ValueError), match=words):
            fv.plot.spectrum(source)
