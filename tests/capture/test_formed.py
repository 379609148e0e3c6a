"""Captures that are kept are the smaller of what gradients are made of and of these; nothing else changes."""

import itertools
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.capture.captures import Capture
from fisherviz.capture.formed import FormedCapture, formed
from fisherviz.exact import kept
from fisherviz.statistics import Block, Diagonal, EigenMoment, GradientSum, InputFactor, OutputFactor, UnitBlocks
from fisherviz.support.counting import counting
from tests.oracles import exact, laws

CLASSES = 3


def networks():
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(2), nn.Flatten()
    plain = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), *head, nn.Linear(12, CLASSES))
    yield "few channels", plain, (2, 6, 6)
    normed = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2), nn.GroupNorm(2, 4),
        *head, nn.Linear(16, CLASSES),
    )  # fmt: skip
    yield "normalised, in groups", normed.eval(), (2, 8, 8)
    deep = nn.Sequential(nn.Conv2d(2, 12, 2), nn.Tanh(), nn.Conv2d(12, 9, 2), nn.Tanh(), *head, nn.Linear(36, CLASSES))
    yield "both kinds", deep, (2, 5, 5)
    up = nn.Sequential(nn.ConvTranspose2d(2, 3, 3, stride=2), nn.Tanh(), *head, nn.Linear(12, CLASSES))
    yield "transposed", up, (2, 4, 4)
    yield "lines", nn.Sequential(nn.Conv1d(2, 3, 3), nn.PReLU(3), nn.Flatten(), nn.Linear(21, CLASSES)), (2, 9)


NETWORKS = {name: (model.double(), shape) for name, model, shape in networks()}
every_network = pytest.mark.parametrize("name", NETWORKS)
every_kind = pytest.mark.parametrize("kind", ["exact", "mc"])


def made(name, *, kind="exact", n=6, batch=None):
    model, shape = NETWORKS[name]
    x = torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    data = x if batch is None else [x[i : i + batch] for i in range(0, n, batch)]
    return fv.Probe(model, "categorical").fisher(data, kind=kind), model, x


@every_network
@every_kind
def test_what_is_kept_of_a_layer_is_the_smaller(name, kind):
    fisher, _, x = made(name, kind=kind)
    seen = {}
    fisher._pass(lambda: lambda batch: seen.update(batch.captures))
    found = fisher.example_space()
    shared = 0
    for layer in fisher.space.layers:
        shown, gradients = seen[layer.name], seen[layer.name].vectors * len(x) * layer.size
        assert isinstance(shown, Capture)
        if shown.factored:
            assert isinstance(found[layer.name], Capture)
            continue
        shared += 1
        held = sum(t.numel() for t in found[layer.name].tensors)
        assert held == min(gradients, shown.a.numel() + shown.g.numel())
    assert shared


@every_network
def test_all_of_the_fisher_is_as_by_definition_from_what_is_kept(name):
    fisher, model, x = made(name)
    F = exact.fisher(model, x, laws.Categorical())
    fisher.example_space()
    v = torch.randn(len(F), 3, dtype=torch.float64)
    assert np.abs(fisher.to_dense().numpy() - F).max() <= 1e-12 * np.abs(F).max()
    assert torch.allclose(fisher @ v, torch.from_numpy(F) @ v, atol=1e-12)
    assert fisher.norm() == pytest.approx(np.linalg.norm(F), rel=1e-12)
    solved = np.linalg.solve(F + 0.1 * np.eye(len(F)), v.numpy())
    assert np.abs(fisher.solve(v, 0.1).numpy() - solved).max() <= 1e-10 * np.abs(solved).max()


@every_network
def test_sums_over_gradients_are_the_same_from_either(name):
    fisher, _, _ = made(name)
    seen = {}
    fisher._pass(lambda: lambda batch: seen.update(batch.captures))
    for layer in fisher.space.layers:
        shown = seen[layer.name]
        own = formed(shown)
        assert isinstance(own, FormedCapture)
        dg = layer.d_out // layer.groups
        qa, qg = (torch.linalg.qr(torch.randn(layer.groups, d, d, dtype=torch.float64))[0] for d in (layer.da, dg))
        bases = (qa, qg) if layer.groups > 1 else (qa[0], qg[0])
        wanted = [UnitBlocks(layer.name), Diagonal(layer.name), GradientSum(layer.name)]
        wanted += [Block(layer.name, layer.name), EigenMoment(layer.name, *bases)]
        for statistic in wanted:
            assert not statistic.needs_rows
            pair = (own,) * len(statistic.layers), (shown,) * len(statistic.layers)
            one, other = (statistic.contribution(*captures) for captures in pair)
            assert one.shape == other.shape
            assert torch.allclose(one, other, rtol=1e-12, atol=1e-14), type(statistic).__name__


@every_network
def test_factors_after_captures_are_those_of_a_fresh_fisher(name):
    """Inputs and pseudo-gradients that were not kept are shown by another pass, and are not kept twice."""
    fisher, _, _ = made(name, batch=2)
    fisher.example_space()
    before = fisher._kept.held
    for layer in fisher.space.layers:
        if layer.own_inputs:
            continue
        for statistic in (InputFactor(layer.name), OutputFactor(layer.name)):
            (found,) = fisher.collect([statistic])
            (fresh,) = made(name, batch=2)[0].collect([statistic.empty()])
            assert torch.allclose(found.mean, fresh.mean, rtol=1e-12, atol=1e-14)
    assert fisher._kept.held is before


def test_what_is_read_from_kept_captures_does_not_hang_on_what_else_is_wanted():
    """Bit for bit, as resumed comparisons need it."""
    name = "normalised, in groups"
    alone, together = (made(name, n=12, batch=5)[0] for _ in range(2))
    alone.example_space()
    together.example_space()
    (one,) = alone.collect([UnitBlocks("3")])
    found = together.collect([InputFactor("3"), UnitBlocks("3"), InputFactor("0"), Diagonal("0")])
    assert torch.equal(one.mean, found[1].mean)


def test_of_one_layer_alone_there_are_two_copies_while_batches_become_one():
    """And if that is interrupted, what is kept is as it was."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 80), nn.Tanh(), nn.Linear(80, 80), nn.Tanh(), nn.Linear(80, 4))
    batches = [torch.randn(50, 80) for _ in range(8)]

    def held():
        fisher = fv.Probe(model, "gaussian").fisher(batches)
        fisher._pass(lambda: lambda batch: None)
        return fisher

    fisher = held()
    own = {name: [weakref.ref(b.captures[name].g) for b in fisher._kept.held.own] for name in fisher.space.names}
    there = []

    def seen(parts):
        there.append([name for name in own if any(ref() is not None for ref in own[name])])
        return whole(parts)

    whole = kept.concatenate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "concatenate", seen)
        fisher.example_space()
    assert there == [["0", "2", "4"], ["2", "4"], ["4"]]
    again = held()
    counter = itertools.count()

    def interrupted(parts):
        if next(counter) == 1:
            raise KeyboardInterrupt
        return whole(parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "concatenate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            again.example_space()
    assert torch.equal(again.to_dense(), held().to_dense())


def test_nothing_is_formed_for_factors_alone():
    """Another pass costs less than gradients that nobody may ask for; where no layer has smaller ones all is kept."""
    fisher, _, _ = made("few channels")
    fisher.collect([InputFactor("0"), OutputFactor("0")])
    assert fisher._kept.held is None
    fisher.collect([Diagonal("0")])
    assert isinstance(fisher.example_space()["0"], FormedCapture)
    wide = fv.Probe(nn.Linear(4, 3), "gaussian").fisher(torch.randn(5, 4))
    wide.collect([InputFactor("")])
    assert wide._kept.held is None  # it ran forward alone
    wide.collect([OutputFactor("")])
    assert wide._kept.held is not None


@every_network
def test_operations_do_not_hang_on_what_is_kept_or_asked_beside(name):
    """Each statistic counts the gradients that it reads as its own."""

    def counted(fisher, wanted):
        with counting():
            fisher.collect(wanted)
        return {key: effort.operations for key, effort in fisher.updates.items()}

    layers = [layer.name for layer in made(name)[0].space.layers]
    wanted = [kind(name) for name in layers for kind in (UnitBlocks, Diagonal)]
    together = counted(made(name)[0], wanted)
    kept_before, _, _ = made(name)
    kept_before.example_space()
    assert counted(kept_before, wanted) == together
    for statistic in wanted:
        assert counted(made(name)[0], [statistic.empty()])[statistic.key] == together[statistic.key]
