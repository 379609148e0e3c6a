"""Weights out of the files that people have: wrappers × formats, refusals with the names that are there and missing."""

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fisherviz.commands.weights import load_weights
from fisherviz.support.errors import OptionError


def network():
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Sequential(nn.Tanh(), nn.Linear(2, 2)))


def tied():
    net = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    net[1].weight = net[0].weight
    return net


def trained(build=network):
    net = build()
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.add_(torch.ones_like(tensor))
    return net


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def average(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.optim.swa_utils.AveragedModel(net)


FLAT = {  # what a network's wrapper calls its weights
    "as they are": (lambda net: net.state_dict(), ""),
    "DataParallel": (lambda net: nn.DataParallel(net).state_dict(), "without the prefix 'module.'"),
    "compile": (lambda net: torch.compile(net).state_dict(), "without the prefix '_orig_mod.'"),
    "both": (
        lambda net: nn.DataParallel(torch.compile(net)).state_dict(),
        "without the prefix 'module._orig_mod.'",
    ),
    "Lightning's field": (lambda net: under("net.", net.state_dict()), "without the prefix 'net.'"),
    "beside a loss": (
        lambda net: {**under("model.", net.state_dict()), "loss.weight": torch.ones(2)},
        "without the prefix 'model.', 1 other tensor left out",
    ),
    "beside an average": (
        lambda net: {**under("model.", net.state_dict()), **under("model_ema.", network().state_dict())},
        "without the prefix 'model.', 9 other tensors left out",
    ),
    "average": (lambda net: average(net).state_dict(), "without the prefix 'module.', 1 other tensor left out"),
}
NESTED = {  # what a trainer's checkpoint has around them
    "nothing": (lambda net, state: state, ""),
    "Lightning": (
        lambda net, state: {"state_dict": state, "epoch": 3, "hyper_parameters": {"lr": 0.1}},
        "its entry 'state_dict'",
    ),
    "model": (
        lambda net, state: {"model": state, "optimizer": torch.optim.Adam(net.parameters()).state_dict()},
        "its entry 'model'",
    ),
    "model_state_dict": (lambda net, state: {"model_state_dict": state, "loss": 0.5}, "its entry 'model_state_dict'"),
    "an average beside it": (
        lambda net, state: {"model": state, "ema": network().state_dict()},
        "its entry 'model'",
    ),
    "an average alone": (lambda net, state: {"ema": {"shadow": state, "decay": 0.9}}, "its entry 'ema/shadow'"),
}


def same(first, second):
    states = first.state_dict(), second.state_dict()
    return states[0].keys() == states[1].keys() and all(map(torch.equal, *map(dict.values, states)))


@pytest.mark.parametrize("nest", NESTED)
@pytest.mark.parametrize("flat", FLAT)
def test_checkpoints_load_whatever_is_around_the_weights(tmp_path, flat, nest):
    net = trained()
    (wrap, prefix), (put, entry) = FLAT[flat], NESTED[nest]
    torch.save(put(net, wrap(net)), tmp_path / "net.pt")
    fresh = network()
    assert not same(fresh, net)
    assert load_weights(fresh, tmp_path / "net.pt") == ", ".join(part for part in (entry, prefix) if part)
    assert same(fresh, net)


@pytest.mark.parametrize("flat", FLAT)
def test_safetensors_load_whatever_the_weights_are_called(tmp_path, flat):
    net = trained()
    wrap, prefix = FLAT[flat]
    save_file({name: tensor.clone() for name, tensor in wrap(net).items()}, tmp_path / "net.safetensors")
    fresh = network()
    assert load_weights(fresh, tmp_path / "net.safetensors") == prefix
    assert same(fresh, net)


def test_files_of_one_index_are_one_state(tmp_path):
    net = trained()
    state = net.state_dict()
    places = {name: f"model-{k % 2}.safetensors" for k, name in enumerate(state)}
    for file in set(places.values()):
        save_file({name: state[name] for name in state if places[name] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    fresh = network()
    assert load_weights(fresh, index) == ""
    assert same(fresh, net)
    index.write_text("{}")
    with pytest.raises(OptionError, match="is no index of"):
        load_weights(fresh, index)


def test_a_tensor_of_two_names_may_be_saved_under_one(tmp_path):
    net = trained(tied)
    save_file({"0.weight": net[0].weight.detach().clone()}, tmp_path / "tied.safetensors")
    fresh = tied()
    load_weights(fresh, tmp_path / "tied.safetensors")
    assert same(fresh, net)
    assert fresh[0].weight is fresh[1].weight


def lacking(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("1.")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda s: {"model": s, "best": s}, "holds weights of this network in 'model' and 'best'; save the ones meant"),
        (lambda s: {**under("student.", s), **under("teacher.", s)}, "in 'student.' and 'teacher.'"),
        (lacking, "it lacks '1.weight', '1.bias', '1.running_mean', '1.running_var' and 1 more."),
        (
            lambda s: {"state_dict": under("net.", lacking(s))},
            "(its entry 'state_dict', without the prefix 'net.') does not fit the network of --model: it lacks '1.w",
        ),
        (lambda s: {**s, "extra": torch.ones(1)}, "it has 'extra', which the network lacks."),
        (lambda s: {"a": torch.ones(1)}, "and 5 more; it has 'a', which the network lacks."),
        (
            lambda s: {**s, "0.weight": torch.ones(2, 5), "0.bias": torch.ones(3)},
            "'0.weight' has the shape (2, 5), the network's (2, 3); '0.bias' has the shape (3,), the network's (2,).",
        ),
        (lambda s: {"epoch": 3}, "holds no state_dict"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path, content, message):
    net = network()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    torch.save(content(trained().state_dict()), tmp_path / "net.pt")
    with pytest.raises(OptionError) as told:
        load_weights(net, tmp_path / "net.pt")
    assert message in str(told.value)
    assert str(told.value).startswith("--weights: ")
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_files_that_are_no_weights_are_named(tmp_path):
    (tmp_path / "net.safetensors").write_bytes(b"damaged")
    for path, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "net.safetensor", "did you mean 'net.safetensors'?"),
        (tmp_path / "net.safetensors", "is no .safetensors file, or a damaged one"),
    ):
        with pytest.raises(OptionError, match=message):
            load_weights(network(), path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.complex64])
def test_weights_of_another_kind_of_numbers_are_refused(tmp_path, dtype):
    """Whole numbers of a quantised file were taken for the weights; of complex ones the real parts were."""
    net, path = network(), tmp_path / "net.pt"
    before = {name: value.clone() for name, value in net.state_dict().items()}
    real = trained().state_dict()
    torch.save({name: t.to(dtype) if t.is_floating_point() else t for name, t in real.items()}, path)
    said = "complex" if dtype.is_complex else "whole"
    with pytest.raises(OptionError, match=f"'0.weight' and 7 more holds {said} numbers .* not quantised"):
        load_weights(net, path)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_converted(tmp_path, dtype):
    net, path = network(), tmp_path / "net.pt"
    real = trained().state_dict()
    torch.save({name: t.to(dtype) if t.is_floating_point() else t for name, t in real.items()}, path)
    load_weights(net, path)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, real[name], rtol=1e-2, atol=1e-2)
