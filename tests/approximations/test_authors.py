"""Authors of approximations learn where their class went wrong; what is no approximation is named."""

import copy

import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.operators import Identity


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


@pytest.fixture
def data():
    return torch.randn(7, 3).double(), torch.randint(3, (7,))


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("method", list(fv.approximations))
def test_half_precision_models_are_approximated_in_float32(net, data, dtype, method):
    fisher = fv.Probe(copy.deepcopy(net).to(dtype), "categorical").fisher(data[0].to(dtype))
    approximation = fv.approximate(fisher, method)
    double = fv.approximate(fv.Probe(copy.deepcopy(net), "categorical").fisher(data[0]), method).to_dense()
    v = torch.ones(31, dtype=dtype)
    assert torch.linalg.norm(approximation.to_dense().double() - double) < 0.05 * torch.linalg.norm(double)
    assert (approximation @ v).dtype == approximation.solve(v, 0.1).dtype == dtype


def test_a_users_operator_of_the_wrong_size_is_named_at_once(net, data):
    class Wrong(fv.Approximation):
        """Too small."""

        def statistics(self, layer):
            return {}

        def operator_for(self, layer, values):
            return torch.eye(2)

    with pytest.raises(TypeError, match=r"Wrong.operator_for\('0'\) must return an Operator of size 16 x 16"):
        fv.approximate(fv.Probe(net, "categorical").fisher(data[0]), Wrong)


def author(**methods):
    """An approximation with methods of its own over a complete one's."""
    complete = {"statistics": lambda self, layer: {}, "operator_for": lambda self, layer, values: Identity(layer.size)}
    return type("Mine", (fv.Approximation,), {"__doc__": "Mine.", **complete, **methods})


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ({"operator_for": lambda self, layer, values: values["zz"]}, r"Mine.operator_for\('0'\).*KeyError: 'zz'"),
        ({"operator_for": lambda self, layer, values: layer.nothing}, r"Mine.operator_for\('0'\).*AttributeError"),
        ({"statistics": lambda self, layer: [][0]}, r"Mine.statistics\('0'\).*IndexError"),
        ({"statistics": lambda self, layer: {"a": 3}}, r"Mine.statistics\('0'\).*name -> Statistic, got int"),
        ({"statistics": lambda self, layer: None}, r"Mine.statistics\('0'\).*name -> Statistic, got NoneType"),
        ({"pairs": lambda self, layers, adjacent: layers[9]}, r"Mine.pairs.*IndexError"),
        ({"operator_for": lambda self, layer, values: Identity(3)}, r"Mine.operator_for\('0'\).*16 x 16, got \(3, 3\)"),
    ],
    ids=range(7),
)  # fmt: skip
def test_what_fails_in_an_authors_method_names_it(net, data, methods, words):
    fisher = fv.Probe(net, "categorical").fisher(data[0])
    for call in (fv.approximate, lambda f, m: fv.compare(f, [m])):
        with pytest.raises((TypeError, RuntimeError), match=words):
            call(fisher, author(**methods))


def test_an_authors_own_refusal_stays_what_it_is_and_says_where(net, data):
    def refuse(self, layer, values):
        raise ValueError("not this layer.")

    with pytest.raises(ValueError, match="not this layer") as caught:
        fv.compare(fv.Probe(net, "categorical").fisher(data[0]), [author(operator_for=refuse)])
    assert str(caught.value) == "not this layer."
    assert caught.value.__notes__ == ["raised in Mine.operator_for('0')."]


def test_an_incomplete_approximation_says_what_is_missing(net, data):
    incomplete = type("Half", (fv.Approximation,), {"statistics": lambda self, layer: {}})
    for call in (lambda: fv.register("half", incomplete), lambda: fv.approximate(None, incomplete)):
        with pytest.raises(TypeError, match=r"Half is no complete approximation: it must define operator_for\."):
            call()
    assert "half" not in fv.approximations


def test_an_instance_takes_no_options(net, data):
    fisher = fv.Probe(net, "categorical").fisher(data[0])
    with pytest.raises(TypeError, match=r"options \(setting\).*this kfac is an instance"):
        fv.approximate(fisher, fv.approximate(fisher, "kfac"), setting="reduce")
