"""Saved states: what is wrong with one is said when it is loaded, and later steps leave it as it is."""

import copy

import pytest
import torch

from fisherviz import optim
from tests.oracles.steps import closure_of, data, net

ALL = {
    "foof": optim.FOOF,
    "cw-ngd": optim.CWNGD,
    "ekfac": optim.EKFAC,
    "tengrad": optim.TENGraD,
    "kfac": optim.KFAC,
    "kbfgs": optim.KBFGS,
    "subsampled": optim.SubsampledNaturalGradient,
    "hessian-free": optim.HessianFree,
    "ksd": optim.KSD,
}


def entries(state, place=""):
    """All tensors and numbers of a state by their places, but for the generator's."""
    if isinstance(state, dict):
        found = [pair for key, each in state.items() for pair in entries(each, f"{place}.{key}").items()]
        return {key: each for key, each in found if "generator" not in key}
    if isinstance(state, list | tuple):
        return {key: each for i, part in enumerate(state) for key, each in entries(part, f"{place}.{i}").items()}
    return {place: state.clone() if isinstance(state, torch.Tensor) else state}


SPOILED_STATES = {
    "a group without lr": (lambda s: s["param_groups"][0].pop("lr"), "param_groups cannot be read"),
    "a group without approximation": (
        lambda s: s["param_groups"][0].pop("approximation"),
        "param_groups cannot be read",
    ),
    "a group without params": (lambda s: s["param_groups"][0].pop("params"), "param_groups cannot be read"),
    "lr that is no number": (lambda s: s["param_groups"][0].update(lr=float("nan")), "lr must be a number"),
    "a momentum below zero": (lambda s: s["param_groups"][0].update(momentum=-3.0), "momentum must be"),
    "no damping": (lambda s: s["param_groups"][0].update(damping=None), "param_groups cannot be read"),
    "no state": (lambda s: s.update(state=None), "'state' is no mapping"),
    "nothing of a parameter": (lambda s: s["state"].update({0: None}), "'state' is no mapping"),
    "no momentum": (lambda s: s["state"].update({0: {"momentum_buffer": None}}), "momentum of a parameter"),
}


@pytest.mark.parametrize(("spoil", "words"), SPOILED_STATES.values(), ids=SPOILED_STATES)
@pytest.mark.parametrize("name", ["foof", "kbfgs"])
def test_what_is_not_in_torch_s_part_of_a_state_is_said_when_it_is_loaded(name, spoil, words):
    model, (x, y) = net(), data()
    opt = ALL[name](model, "categorical")
    opt.step(closure_of(opt, model, x, y))
    before = entries(opt.state_dict())
    spoilt = copy.deepcopy(opt.state_dict())
    spoil(spoilt)
    with pytest.raises(ValueError, match=words):
        opt.load_state_dict(spoilt)
    assert all(torch.equal(t, before[k]) for k, t in entries(opt.state_dict()).items() if isinstance(t, torch.Tensor))
    opt.step(closure_of(opt, model, x, y))


@pytest.mark.parametrize(("there", "here"), [(3, None), (None, 3)])
def test_a_state_of_kbfgs_with_another_memory_is_refused(there, here):
    model, (x, y) = net(), data()
    opt = optim.KBFGS(model, "categorical", memory=there)
    opt.step(closure_of(opt, model, x, y))
    other = optim.KBFGS(net(), "categorical", memory=here)
    with pytest.raises(ValueError, match="another memory="):
        other.load_state_dict(opt.state_dict())
    assert other.k == 0


@pytest.mark.parametrize("name", ALL)
def test_a_saved_state_does_not_change_with_later_steps(name):
    model, (x, y) = net(), data()
    opt = ALL[name](model, "categorical")
    for _ in range(2):
        opt.step(closure_of(opt, model, x, y))
    state, weights = opt.state_dict(), copy.deepcopy(model.state_dict())
    first = []
    for _ in range(2):  # on, and on again from the same state
        for _ in range(3):
            opt.step(closure_of(opt, model, x, y))
        first.append(copy.deepcopy(model.state_dict()))
        model.load_state_dict(weights)
        opt.load_state_dict(state)
    assert all(torch.equal(first[0][key], first[1][key]) for key in weights)
