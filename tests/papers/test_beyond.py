"""Exhibits beyond the papers: what is followed along training, against plain torch; the rules."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fisherviz.papers.beyond import along, speed
from fisherviz.papers.beyond.speed import EXACT, OWN_NAMES
from fisherviz.papers.kfac.network import MIDDLE
from fisherviz.papers.trials.problems import Effort, Method, Trained, build
from fisherviz.papers.trials.work import Run

RUN = Run("smoke", progress=False)
EFFORT = Effort(steps=30, look=10, seeds=1, trials=0, trial_steps=0)


def ended(loss):
    line = {"step": 30, "train_loss": loss}
    return Trained(Method("M", "sgd"), EFFORT, {}, (), ({"curve": [line], "stopped": None},))


def scores(model, x, y, weights=None):
    """Each example's gradient of −ln p(y) for the middle four layers, unit by unit, the bias last; (N, layers, ...)."""
    layers = [getattr(model, name) for name in MIDDLE]
    rows = []
    for one, label in zip(x, y, strict=True):
        loss = nn.functional.cross_entropy(model(one[None]), label[None])
        found = torch.autograd.grad(loss, [p for layer in layers for p in (layer.weight, layer.bias)])
        rows.append([torch.cat([w, b[:, None]], 1) for w, b in zip(found[::2], found[1::2], strict=True)])
    return rows


@pytest.fixture(scope="module")
def look():
    problem = along.problem_of(RUN)
    data = problem.data()
    model = build(problem, data, 0)
    return model.double(), data, along._look(model, data, replace(along.SCALES["smoke"], examples=40))


def test_shares_off_the_units_blocks_are_those_of_plain_gradients(look):
    model, data, found = look
    rows = scores(model, data.train.inputs[:40].double(), data.train.targets[:40])
    for layer, share in enumerate(found["empirical"]["off_unit_share"]):
        g = torch.stack([row[layer] for row in rows])  # (N, units, inputs)
        flat = g.flatten(1)
        whole = (flat.T @ flat / len(g)).square().sum()
        units = sum((g[:, i].T @ g[:, i] / len(g)).square().sum() for i in range(g.shape[1]))
        assert share == pytest.approx(float(1 - units / whole), rel=1e-9)


def test_the_two_fishers_are_compared_as_plain_matrices(look):
    model, data, found = look
    x, y = data.train.inputs[:40].double(), data.train.targets[:40]
    matrices = {}
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in scores(model, x, y)])
    matrices["empirical"] = flat.T @ flat / len(x)
    p = model(x).detach().softmax(1)
    matrices["exact"] = torch.zeros_like(matrices["empirical"])
    for label in range(p.shape[1]):
        rows = scores(model, x, torch.full((len(x),), label))
        flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]) * p[:, label, None].sqrt()
        matrices["exact"] += flat.T @ flat / len(x)
    exact, empirical = matrices["exact"], matrices["empirical"]
    assert found["scale"] == pytest.approx(float(empirical.norm() / exact.norm()), rel=1e-9)
    cosine = (exact * empirical).sum() / (exact.norm() * empirical.norm())
    assert found["cosine"] == pytest.approx(float(cosine), rel=1e-9)


def test_following_leaves_the_training_as_it_was(look):
    problem, scale = along.problem_of(RUN), along.SCALES["smoke"]
    looks = along._follow(problem, scale, 3, RUN)
    first = along._look(build(problem, problem.data(), 3), problem.data(), scale)
    assert looks[0] == first
    assert looks[0] != looks[1]


@pytest.mark.parametrize(("order", "holds"), [(1, True), (-1, False)])
def test_closeness_and_speed_are_compared_by_ranks(order, holds):
    titles = list(OWN_NAMES)
    cosines = {OWN_NAMES[title]: [0.1 * i] for i, title in enumerate(titles, 1)}
    found = {title: ended(10.0 - order * i) for i, title in enumerate(titles)}
    claim = speed._alike(found, cosines, ())
    assert claim.values["rank_correlation"] == pytest.approx(-order)
    assert claim.holds is holds


@pytest.mark.parametrize(("exact", "holds"), [(0.2, True), (0.05, False)])
def test_the_exact_natural_gradient_is_judged_against_k_fac(exact, holds):
    found = {title: ended(0.1) for title in OWN_NAMES} | {EXACT: ended(exact)}
    assert speed._exact_is_fastest(found, ()).holds is holds
