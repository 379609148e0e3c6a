"""Krylov subspace descent against dense matrices, explicit powers and the minimum itself."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherviz as fv
from fisherviz import optim
from fisherviz.optim.ksd import Search
from tests.oracles.checks import assert_matches
from tests.oracles.steps import (
    closure_of,
    data,
    exact_vectors,
    eye,
    gradient,
    matrices,
    moments,
    net,
    per_example,
)


def flat(Ws):
    return torch.cat([W.reshape(-1) for W in Ws])


def regression(distinct, d=8, N=40, seed=0):
    """Inputs with a second moment of so many distinct eigenvalues, and targets."""
    generator = torch.Generator().manual_seed(seed)
    orthogonal = torch.linalg.qr(torch.randn(N, d, generator=generator, dtype=torch.float64)).Q
    turned = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    scales = torch.tensor([float(1 + i % distinct) for i in range(d)]).double()
    return (orthogonal * scales) @ turned * N**0.5, torch.randn(N, 2, generator=generator, dtype=torch.float64)


def least_squares(opt, model, x, y, eta=0.0):
    def closure():
        opt.zero_grad()
        loss = 0.5 * (model(x) - y).square().sum(1).mean()
        loss.backward()
        return loss

    before = float(closure().detach())
    opt.step(closure)
    A = x.T @ x / len(x) + eta * torch.eye(x.shape[1]).double()
    return before, float(closure().detach()), torch.linalg.solve(A, x.T @ y / len(x)).T


def linear(seed=3):
    torch.manual_seed(seed)
    return nn.Linear(8, 2, bias=False).double()


@pytest.mark.parametrize("distinct", [1, 2, 3, 8])
def test_as_many_directions_as_eigenvalues_reach_the_minimum_of_a_quadratic(distinct):
    model, (x, y) = linear(), regression(distinct)
    opt = optim.KSD.paper(model, "gaussian", dimension=distinct)
    _, after, minimum = least_squares(opt, model, x, y)
    assert_matches(model.weight.detach(), minimum, 1e-8)
    assert after == pytest.approx(float(0.5 * (x @ minimum.T - y).square().sum(1).mean()), rel=1e-12)
    assert opt.last["dimension"] == distinct


def test_a_direction_less_does_not():
    model, (x, y) = linear(), regression(8)
    opt = optim.KSD.paper(model, "gaussian", dimension=4)
    before, after, minimum = least_squares(opt, model, x, y)
    assert after < before
    assert (model.weight - minimum).norm() > 1e-6 * minimum.norm()


@pytest.mark.parametrize("preconditioner", ["kfac", "diagonal"])
def test_preconditioned_and_with_weight_decay(preconditioner):
    model, (x, y), eta = linear(), regression(8), 0.1
    opt = optim.KSD.paper(
        model, "gaussian", preconditioner=preconditioner, kind="exact", dimension=8, weight_decay=eta, damping=0.1
    )
    _, _, minimum = least_squares(opt, model, x, y, eta)
    assert_matches(model.weight.detach(), minimum, 1e-8)


def test_the_exact_block_as_preconditioner_takes_one_direction():
    model, (x, y) = linear(), regression(8)
    opt = optim.KSD.paper(model, "gaussian", preconditioner="kfac", kind="exact", dimension=1, damping=1e-10)
    _, _, minimum = least_squares(opt, model, x, y)
    assert_matches(model.weight.detach(), minimum, 1e-6)


def spaces_of(monkeypatch):
    """What the searches are over from now on."""
    seen, search = [], Search._minimum

    def watched(self, step, space, *given):
        seen.append(space)
        return search(self, step, space, *given)

    monkeypatch.setattr(Search, "_minimum", watched)
    return seen


def columns(space, model):
    """The basis (P, r) in the order of the oracle's matrices."""
    of = [m for m in model if isinstance(m, nn.Linear)]
    return torch.stack(
        [torch.cat([torch.cat([v[m.weight], v[m.bias][:, None]], 1).reshape(-1) for m in of]) for v in space.basis], 1
    )


def projector(V):
    Q = torch.linalg.qr(V).Q
    return Q @ Q.T


@pytest.mark.parametrize("preconditioner", [None, "diagonal", "kfac"])
def test_the_subspace_is_krylovs_with_the_last_step(monkeypatch, preconditioner):
    model, eta, lam, K = net(), 1e-2, 0.3, 4
    opt = optim.KSD(
        model, "categorical", weight_decay=eta, preconditioner=preconditioner, kind="exact", dimension=K, decay=0.0,
        damping=lam,
    )  # fmt: skip
    seen, before = spaces_of(monkeypatch), None
    for k in range(3):
        x, y = data(20, seed=k)
        J = per_example(moments(model, x, exact_vectors))
        W = matrices(model)
        B = J.T @ J / len(x) + eta * eye(J.shape[1])
        g = flat([G + eta * M for G, M in zip(gradient(model, x, y), W, strict=True)])
        P = eye(len(g))
        if preconditioner is not None:
            fisher = fv.Probe(model.eval(), "categorical").fisher(x)
            P = fv.approximate(fisher, preconditioner).to_dense(order="unit") + (lam + eta) * P
        powers = [torch.linalg.solve(P, g)]
        for _ in range(K - 1):
            powers.append(torch.linalg.solve(P, B @ powers[-1]))
            powers[-1] = powers[-1] / powers[-1].norm()
        powers += [] if before is None else [before]
        opt.step(closure_of(opt, model.train(), x, y))
        V = columns(seen[-1], model)
        assert V.shape[1] == len(powers)
        assert_matches(V.T @ V, eye(V.shape[1]), 1e-10)
        assert_matches(projector(V), projector(torch.stack(powers, 1)), 1e-6)
        assert_matches(seen[-1].B, V.T @ B @ V, 1e-8)
        step = flat(matrices(model)) - flat(W)
        assert_matches(projector(V) @ step, step, 1e-10)
        before = step


def test_in_its_coordinates_the_fisher_is_the_identity(monkeypatch):
    seen, model = spaces_of(monkeypatch), net()
    opt = optim.KSD(model, "categorical", dimension=3)
    opt.step(closure_of(opt, model, *data(20)))
    S = seen[0].scaled
    assert_matches(S.T @ seen[0].B @ S, eye(3), 1e-10)


def test_with_time_it_finds_the_lowest_point_of_the_subspace(monkeypatch):
    """There the gradient is orthogonal to all directions."""
    seen, model, (x, y) = spaces_of(monkeypatch), net(), data(20)
    opt = optim.KSD.paper(model, "categorical", dimension=4, iterations=200)
    start = flat(gradient(model, x, y))
    opt.step(closure_of(opt, model, x, y))
    V = columns(seen[0], model)
    assert (V.T @ flat(gradient(model, x, y))).norm() < 1e-4 * (V.T @ start).norm()


@pytest.mark.covering
@pytest.mark.parametrize("lr", [1.0, 4.0])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("paper", [True, False])
def test_no_step_makes_the_loss_of_its_batch_higher(activation, paper, lr):
    model = net(activation=activation)
    opt = (optim.KSD.paper if paper else optim.KSD)(model, "categorical", dimension=6, lr=lr, weight_decay=1e-3)

    def objective(x, y):
        with torch.no_grad():
            squares = sum(p.square().sum() for p in model.parameters())
            return float(F.cross_entropy(model(x), y) + 1e-3 / 2 * squares)

    for k in range(12):
        x, y = data(40, seed=k % 3)
        before = objective(x, y)
        opt.step(closure_of(opt, model, x, y))
        assert objective(x, y) <= before + 1e-14
        assert before - objective(x, y) == pytest.approx(opt.last["decrease"], abs=1e-12)
        assert opt.last["decrease"] > 0


def test_objectives_that_are_no_numbers_are_gone_round():
    model, (x, y) = net(), data(20)
    opt = optim.KSD.paper(model, "categorical", dimension=4)
    start = flat(matrices(model))

    def closure():
        opt.zero_grad()
        far = (flat([p.detach() for p in model.parameters()]) - flat([p.clone() for p in kept])).norm() > 0.05
        loss = F.cross_entropy(model(x), y) * (math.nan if bool(far) else 1.0)
        loss.backward()
        return loss

    kept = [p.detach().clone() for p in model.parameters()]
    opt.step(closure)
    moved = (flat(matrices(model)) - start).norm()
    assert 0 < moved <= 0.05
    assert opt.last["decrease"] > 0


def test_steps_stay_in_the_region_of_the_damped_fisher():
    model, (x, y) = net(), data(12)
    J = per_example(moments(model, x, exact_vectors))
    W, kappa, lam, eta = flat(matrices(model)), 1e-4, 0.3, 0.01
    opt = optim.KSD(model, "categorical", kl_clip=kappa, damping=lam, weight_decay=eta)
    opt.step(closure_of(opt, model, x, y))
    step = flat(matrices(model)) - W
    form = (J @ step).square().sum() / len(x) + (lam + eta) * step.square().sum()
    assert float(form) == pytest.approx(kappa, rel=1e-6)


def test_a_share_of_the_examples_is_enough_for_its_products(monkeypatch):
    seen, model, (x, y) = spaces_of(monkeypatch), net(), data(20)
    whole = per_example(moments(model, x, exact_vectors))
    opt = optim.KSD.paper(model, "categorical", dimension=3, share=0.5)
    opt.step(closure_of(opt, model, x, y))
    assert opt.last["decrease"] > 0
    V = columns(seen[0], model)
    assert (V.T @ (whole.T @ whole / len(x)) @ V - seen[0].B).norm() > 1e-3 * seen[0].B.norm()


@pytest.mark.filterwarnings("ignore:the loss's gradient is zero")
def test_a_gradient_of_zero_leaves_all_as_it_is():
    model = linear()
    x, _ = regression(8)
    y = model(x).detach()
    opt = optim.KSD(model, "gaussian")
    before = model.weight.detach().clone()
    least_squares(opt, model, x, y)
    assert torch.equal(model.weight, before)
    assert opt.last["step"] in (0.0, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimension": 0}, "dimension must be"),
        ({"iterations": 0}, "iterations must be"),
        ({"share": 0.0}, "share must be"),
        ({"kl_clip": -1.0}, "kl_clip must be"),
        ({"damping": 0.0}, "damping must be a positive number"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        optim.KSD(net(), "categorical", **options)


def test_a_basis_that_does_not_fit_is_refused_before_it_is_made():
    model, (x, y) = net(), data(20)
    opt = optim.KSD(model, "categorical")
    closure = closure_of(opt, model, x, y)
    opt.step(closure)
    before = fv.config.memory_budget
    fv.config.memory_budget = 1000
    try:
        with pytest.raises(MemoryError, match="pass a smaller dimension"):
            opt.step(closure)
    finally:
        fv.config.memory_budget = before
