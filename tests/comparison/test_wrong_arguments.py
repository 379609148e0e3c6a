"""Arguments that mean nothing are refused in one sentence, and a look that can measure nothing ends no training."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv

ASKED = {
    "a step between two": (lambda f, m: m.measure(1.5), "step must be a whole number, got 1.5"),
    "a module for layers": (lambda f, m: fv.cumulants(f, layers=m.probe.model), "layers= takes names or positions"),
    "a number for layers": (lambda f, m: fv.cumulants(f, layers=1.5), "layers= takes names or positions"),
    "a list of metrics in a list": (
        lambda f, m: fv.compare(f, ["kfac"], metrics=[["relative_frobenius"]], progress=False),
        r"metrics= takes names of metrics, got \['relative_frobenius'\]",
    ),
    "a label beyond int64": (lambda f, m: fv.Categorical(ignore_index=10**30), "ignore_index must be a label"),
    "an infinite tolerance": (
        lambda f, m: fv.approximate(f, "nearest-kronecker", tolerance=float("inf")),
        "tolerance must be above 0 and at most 1",
    ),
    "a tolerance that is no number": (
        lambda f, m: fv.approximate(f, "nearest-kronecker", tolerance=float("nan")),
        "tolerance must be above 0 and at most 1",
    ),
    "a negative tolerance": (
        lambda f, m: fv.approximate(f, "nearest-kronecker", tolerance=-1.0),
        "tolerance must be above 0 and at most 1",
    ),
    "a complex prior": (
        lambda f, m: f.sample(torch.full((12,), 1 + 5j), 2),
        "prior_precision must be a real number or a tensor of them, got a complex tensor",
    ),
    "a negative factor": (lambda f, m: fv.approximate(f, "kfac").scale(-1), "factor must be a positive number"),
    "a vector of NaN": (lambda f, m: fv.approximate(f, "kfac") @ torch.full((12,), float("nan")), "must be finite"),
    "an infinite vector": (
        lambda f, m: fv.approximate(f, "kfac").solve(torch.full((12,), float("inf")), 0.1),
        "must be finite",
    ),
}


@pytest.fixture
def asked():
    torch.manual_seed(0)
    net, x, y = nn.Linear(3, 3), torch.randn(8, 3), torch.randint(3, (8,))
    probe = fv.Probe(net, "categorical")
    return probe.fisher(x, y), fv.Monitor(probe, ["kfac", "identity"], data=(x, y))


@pytest.mark.parametrize("what", ASKED)
def test_what_means_nothing_is_refused_in_a_sentence(what, asked):
    ask, said = ASKED[what]
    with pytest.raises((ValueError, TypeError), match=said) as caught:
        ask(*asked)
    assert "\n" not in str(caught.value)


def test_whole_numbers_of_numpy_and_sparse_gradients_are_taken(asked):
    fisher, monitor = asked
    assert set(monitor.measure(np.int64(3))["step"]) == {3}
    slope = fisher.gradient()
    dense, sparse = (
        fv.compare(fisher, ["kfac"], gradient=g, metrics=["direction_cosine"], progress=False).frame
        for g in (slope, slope.to_sparse())
    )
    assert dense.equals(sparse)


def test_a_look_at_a_fisher_of_zeros_is_a_note():
    """A fit so confident that every probability is 0 or 1 in float32."""
    net, x, y = nn.Linear(3, 3), torch.randn(8, 3), torch.zeros(8, dtype=torch.long)
    with torch.no_grad():
        net.weight.zero_()
        net.bias.copy_(torch.tensor([200.0, 0, 0]))
    monitor = fv.Monitor(fv.Probe(net, "categorical"), ["kfac"], data=(x, y), every=1)
    frame = monitor.step()
    assert frame[frame["metric"] == "damping"]["value"].tolist() == [0.0]
    assert any(re.match("step 1: nothing of .* can be measured", note) for note in monitor.notes)


class Tagger(nn.Module):
    """The textbook's: packed by length, and as long as the longest sequence of the batch afterwards."""

    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.LSTM(3, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(nn.utils.rnn.pad_packed_sequence(self.layers(packed)[0], batch_first=True)[0])


@pytest.mark.parametrize("lengths", [[2, 4, 1, 3], [1, 2, 3], [4, 2]])
def test_an_output_as_long_as_the_longest_of_the_batch_says_what_to_change(lengths):
    inputs = {"x": torch.randn(len(lengths), 4, 3), "lengths": torch.tensor(lengths)}
    with pytest.raises(ValueError, match=r"as long as the longest of the batch; .* total_length"):
        fv.Probe(Tagger(), "categorical").fisher(inputs).norm()
