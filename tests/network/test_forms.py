"""Targets, batches, layers and variances of another form are named with the way out."""

import pytest
import torch
from torch import nn

import fisherviz as fv


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


@pytest.fixture
def data():
    return torch.randn(7, 3).double(), torch.randint(3, (7,))


def test_layers_are_counted_once_and_none_is_refused(net, data):
    fisher = fv.Probe(net, "categorical").fisher(data[0])
    assert fv.cumulants(fisher, ["0", "0"]).error == fv.cumulants(fisher, ["0"]).error
    with pytest.raises(ValueError, match="no layer"):
        fv.cumulants(fisher, [])


def test_parameters_of_several_types_are_refused_by_name(net):
    net[2].float()
    with pytest.raises(ValueError, match="several types"):
        fv.Probe(net, "categorical")


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (torch.tensor(1), "first dimension"), (1, "first dimension"), (["a"] * 7, "list.*class indices"),
        ([[1], [1, 2]], "list.*class indices"), ({"a": 1}, "dict.*class indices"), (len, "builtin"),
    ],
    ids=range(6),
)  # fmt: skip
def test_odd_targets_are_named(net, data, targets, words):
    probe = fv.Probe(net, "categorical")
    for source in ((data[0], targets), [(data[0], targets)]):
        with pytest.raises((TypeError, ValueError), match=words):
            probe.fisher(source, kind="empirical").norm()


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (lambda x, y: x.float(), r"parameters are float64 and the data is float32.*inputs.to\(torch.float64\)"),
        (lambda x, y: x.round().long(), "parameters are float64 and the data is int64"),
        (lambda x, y: x.numpy(), "ndarray; convert them with torch.as_tensor"),
        (lambda x, y: (x, y, y), r"too many positional arguments.*a pair \(inputs, targets\)"),
        (lambda x, y: [(x, y, y)], r"too many positional arguments.*a pair \(inputs, targets\)"),
        (lambda x, y: [{"input": x, "label": y}], r"keyword argument 'label'.*\(\{'x': x\}, labels\)"),
        (lambda x, y: {"images": x}, r"Sequential.forward does not take"),
    ],
    ids=range(7),
)
def test_batches_of_another_form_are_named_with_the_way_out(net, data, batch, words):
    with pytest.raises((TypeError, ValueError), match=words):
        fv.Probe(net, "categorical").fisher(batch(*data)).norm()


class Broken(nn.Linear):
    def forward(self, input):
        raise RuntimeError("out of luck")


def test_a_model_that_fails_by_itself_is_not_explained_away(data):
    with pytest.raises(RuntimeError, match=r"^out of luck$"):
        fv.Probe(Broken(3, 3).double(), "categorical").fisher(data[0]).norm()


@pytest.mark.parametrize("layers", [0, [0], []], ids=str)
def test_layers_that_are_none(net, layers):
    with pytest.raises((TypeError, ValueError), match="layers="):
        fv.Probe(net, "categorical", layers=layers)


@pytest.mark.parametrize("variance", ["a", None, True, [1], 1j, 0, float("inf")], ids=str)
def test_variances_that_are_none(variance):
    with pytest.raises(ValueError, match="variance"):
        fv.Gaussian(variance)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.MultiheadAttention(4, 1, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.inner(x, x, x)[0].mean(1))


def test_a_module_stands_for_all_layers_inside_it():
    attention = Attention()
    inside = ("inner", "inner.out_proj")
    assert fv.Probe(attention, "categorical", layers=["inner"]).space.names == inside
    assert fv.Probe(attention, "categorical", layers=[""]).space.names == (*inside, "last")
