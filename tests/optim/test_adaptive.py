"""Complete KFAC against algorithm 2 written out with explicit matrices, and corollary 2's invariance."""

import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fisherviz import optim
from tests.oracles.steps import (
    assert_same,
    closure_of,
    damped_pair,
    data,
    exact_vectors,
    eye,
    factors,
    gradient,
    loss_backward,
    matrices,
    moments,
    moved,
    net,
    per_example,
)

ETA = 1e-2


def flat(parts):
    return torch.cat([p.reshape(-1) for p in parts])


def loss_at(model, W, x, y):
    h = x
    for i, M in enumerate(W):
        h = torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype)], 1) @ M.T
        h = torch.tanh(h) if i + 1 < len(W) else h
    return float(F.cross_entropy(h, y)) + ETA / 2 * float(flat(W).square().sum())


class Algorithm2:
    """Section 9 with dense matrices, for every step of one run.

    `exactly`: proposals are damped as in equation 6. `by_objective`: γ is the one that takes h lowest.
    """

    def __init__(self, lam, T1, T2, T3, momentum, exactly=False, by_objective=False):
        self.exactly, self.by_objective = exactly, by_objective
        self.lam, self.gamma = lam, math.sqrt(lam + ETA)
        self.T1, self.T2, self.T3, self.momentum = T1, T2, T3, momentum
        self.k, self.average, self.snapshot, self.previous = 0, None, None, None

    def proposal(self, v, gamma):
        pairs = list(zip(self.snapshot[::2], self.snapshot[1::2], strict=True))
        if self.exactly:
            blocks = [torch.kron(G, A) + gamma**2 * eye(len(G) * len(A)) for A, G in pairs]
            return flat([-torch.linalg.solve(M, g.reshape(-1)) for g, M in zip(v, blocks, strict=True)])
        pairs = [damped_pair(A, G, gamma) for A, G in pairs]
        return flat([-torch.linalg.inv(G) @ g @ torch.linalg.inv(A) for g, (A, G) in zip(v, pairs, strict=True)])

    def step(self, model, x, y):
        self.k += 1
        self.tried = []
        layers, N, W = moments(model, x, exact_vectors), len(x), matrices(model)
        e = min(1 - 1 / self.k, 0.95)
        now = [M for pair in factors(layers, N) for M in pair]
        self.average = (
            now if self.average is None else [e * a + (1 - e) * b for a, b in zip(self.average, now, strict=True)]
        )
        if self.k % self.T3 == 0 or self.k <= 3:
            self.snapshot = self.average
        J = per_example(layers)
        B = J.T @ J / N + (self.lam + ETA) * eye(J.shape[1])
        v = [g + ETA * M for g, M in zip(gradient(model, x, y), W, strict=True)]
        omega2 = (19 / 20) ** (self.T2 / 2)
        candidates = [self.gamma]
        if self.k % self.T2 == 0:
            candidates = [self.gamma, omega2 * self.gamma, self.gamma / omega2]
        best = None
        for gamma in candidates:
            proposal = self.proposal(v, gamma)
            D = proposal[:, None]
            if self.momentum and self.previous is not None:
                D = torch.stack([proposal, self.previous], 1)
            c = -torch.linalg.solve(D.T @ B @ D, D.T @ flat(v))
            delta = D @ c
            value = float(0.5 * delta @ B @ delta + flat(v) @ delta)
            quality = value
            if self.by_objective:
                pieces = delta.split([M.numel() for M in W])
                quality = loss_at(model, [M + d.reshape(M.shape) for M, d in zip(W, pieces, strict=True)], x, y)
            self.tried.append((quality, value))
            if best is None or quality < best[0]:
                best = quality, gamma, delta, value
        _, self.gamma, self.previous, value = best
        pieces = self.previous.split([M.numel() for M in W])
        delta = [p.reshape(M.shape) for p, M in zip(pieces, W, strict=True)]
        if self.k % self.T1 == 0:
            after = loss_at(model, [M + d for M, d in zip(W, delta, strict=True)], x, y)
            rho = (after - loss_at(model, W, x, y)) / value
            omega1 = (19 / 20) ** self.T1
            self.lam *= omega1 if rho > 0.75 else 1 / omega1 if rho < 0.25 else 1
        return delta


@pytest.mark.parametrize("momentum", [None, 0.0])
def test_complete_kfac_is_algorithm_2(momentum):
    model = net()
    lam = 0.5
    opt = optim.KFAC.paper(
        model, "categorical", damping=lam, weight_decay=ETA, T=2, T1=2, T2=4, tau1=1.0, tau2=1.0, kind="exact",
        momentum=momentum,
    )  # fmt: skip
    oracle = Algorithm2(lam, T1=2, T2=4, T3=2, momentum=momentum is None)
    for k in range(13):
        x, y = data(9, seed=20 + k)
        before = matrices(model)
        expected = oracle.step(model, x, y)
        opt.step(closure_of(opt, model, x, y))
        assert_same(moved(before, matrices(model)), expected, 1e-6)
        assert opt.lam == pytest.approx(oracle.lam, rel=1e-6)
        assert opt.gamma == pytest.approx(oracle.gamma, rel=1e-6)
    assert opt.lam != lam
    assert opt.gamma != pytest.approx(math.sqrt(lam + ETA))


@pytest.mark.parametrize(
    ("options", "otherwise"),
    [
        ({"heuristic_damping": False}, {"exactly": True}),
        ({"gamma_by": "objective"}, {"by_objective": True}),
        ({"heuristic_damping": False, "gamma_by": "objective"}, {"exactly": True, "by_objective": True}),
    ],
    ids=["equation 6", "gamma by the objective", "both"],
)
def test_the_alternatives_that_the_paper_names_are_those_of_brute_force(options, otherwise):
    """Section 6.3's exact Tikhonov damping of the proposals, and section 6.6's h(θ + δ) as γ's measure."""
    model = net()
    opt = optim.KFAC.paper(
        model, "categorical", damping=0.5, weight_decay=ETA, T=2, T1=2, T2=4, tau1=1.0, tau2=1.0, kind="exact",
        **options,
    )  # fmt: skip
    oracle = Algorithm2(0.5, T1=2, T2=4, T3=2, momentum=True, **otherwise)
    disagreed = False
    for k in range(17):
        x, y = data(9, seed=20 + k)
        before = matrices(model)
        expected = oracle.step(model, x, y)
        opt.step(closure_of(opt, model, x, y))
        assert_same(moved(before, matrices(model)), expected, 1e-6)
        assert opt.lam == pytest.approx(oracle.lam, rel=1e-6)
        assert opt.gamma == pytest.approx(oracle.gamma, rel=1e-6)
        disagreed |= min(oracle.tried) != min(oracle.tried, key=lambda pair: pair[1])
    assert opt.gamma != pytest.approx(math.sqrt(0.5 + ETA))
    assert disagreed is oracle.by_objective  # otherwise the two measures had not been told apart


def test_the_search_by_the_objective_evaluates_it_once_for_each_candidate():
    """Besides the step's own evaluation and that for λ."""
    model, (x, y) = net(), data(9)
    opt = optim.KFAC.paper(model, "categorical", damping=1.0, T=1, T1=1, T2=2, gamma_by="objective")
    counts = []
    for _ in range(4):
        evaluated = []
        inner = closure_of(opt, model, x, y)

        def closure(inner=inner, evaluated=evaluated):
            evaluated.append(1)
            return inner()

        opt.step(closure)
        counts.append(len(evaluated))
    assert counts == [2, 5, 2, 5]


def test_a_candidate_whose_objective_is_not_finite_is_not_taken():
    model, (x, y) = net(), data(9)
    opt = optim.KFAC.paper(model, "categorical", damping=1.0, T=1, T1=1, T2=1, gamma_by="objective")
    start, inner, calls = opt.gamma, closure_of(opt, model, x, y), []

    def closure():
        calls.append(1)
        loss = inner()
        return loss * float("nan") if len(calls) in (2, 3) else loss  # at γ and ω₂ γ

    before = matrices(model)
    opt.step(closure)
    assert opt.gamma == pytest.approx(start / (19 / 20) ** 0.5)
    assert all(torch.isfinite(M).all() for M in moved(before, matrices(model)))


def test_sampled_labels_and_subsets_lower_the_loss():
    model = net()
    opt = optim.KFAC.paper(model, "categorical", inverse="block-tridiagonal", damping=1.0)
    x, y = data(64)
    losses = [float(opt.step(closure_of(opt, model, x, y)).detach()) for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("inverse", ["block-diagonal", "block-tridiagonal"])
def test_complete_kfac_resumes_bit_for_bit(inverse):
    model = net()

    def make(m):
        return optim.KFAC.paper(m, "categorical", inverse=inverse, damping=1.0, T=4, T1=2, T2=4)

    opt = make(model)
    x, y = data(32)
    for _ in range(5):
        opt.step(closure_of(opt, model, x, y))
    file = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file)
    torch.manual_seed(77)
    other = net(seed=9)
    other.load_state_dict(weights)
    resumed = make(other)
    resumed.load_state_dict(state)
    for _ in range(9):
        opt.step(closure_of(opt, model, x, y))
        resumed.step(closure_of(resumed, other, x, y))
    assert (resumed.lam, resumed.gamma, resumed.last) == (opt.lam, opt.gamma, opt.last)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_closure_is_asked_for_and_its_second_evaluation_leaves_no_trace():
    model = net()
    opt = optim.KFAC.paper(model, "categorical", damping=1.0, T1=1)
    x, y = data()
    loss_backward(opt, model, x, y)
    with pytest.raises(RuntimeError, match=r"call step\(closure\)"):
        opt.step()
    start = [p.grad.clone() for p in model.parameters()]
    opt.step(closure_of(opt, model, x, y))
    assert "rho" in opt.last
    for p, g in zip(model.parameters(), start, strict=True):
        assert torch.equal(p.grad, g)
    optim.KFAC.paper(net(), "categorical", adapt=False, damping=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rescale": False}, "adapted by the re-scaled quadratic model"),
        ({"inverse": "diagonal"}, "inverse must be one of"),
        ({"heuristic_damping": False, "inverse": "block-tridiagonal"}, "no closed form"),
        ({"gamma_by": "loss"}, "gamma_by must be one of"),
        ({"T": 3}, "T2 must be a multiple of T"),
        ({"tau1": 0.0}, "tau1 must be above 0"),
        ({"kind": "empirical"}, "without labels"),
    ],
)
def test_contradicting_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        optim.KFAC.paper(net(), "categorical", **options)


@pytest.mark.parametrize("inverse", ["block-diagonal", "block-tridiagonal"])
def test_corollary_2_tanh_and_logistic_networks_follow_the_same_path(inverse):
    """tanh(s) = 2 σ(2s) − 1: with Φ = 2 and Ω that affine map, undamped KFAC makes the same functions."""
    widths = (3, 2, 2, 3)
    tanh, logistic = net(widths=widths), net(widths=widths, activation=nn.Sigmoid)
    with torch.no_grad():
        layers = [[m for m in model if isinstance(m, nn.Linear)] for model in (tanh, logistic)]
        for i, (one, two) in enumerate(zip(*layers, strict=True)):
            W, b = one.weight.clone(), one.bias.clone()
            if i > 0:  # inputs are 2σ − 1
                W, b = 2 * W, b - W.sum(1)
            if i + 1 < len(layers[0]):  # pre-activations are halved by Φ
                W, b = 2 * W, 2 * b
            two.weight.copy_(W)
            two.bias.copy_(b)
    # "categorical" has a singular last G, for which no undamped KFAC exists; a Gaussian has none
    x = torch.randn(200, 3, dtype=torch.float64)
    y = torch.randn(200, 3, dtype=torch.float64)
    assert torch.allclose(tanh(x), logistic(x), atol=1e-12)
    opts = [
        optim.KFAC.paper(
            m,
            "gaussian",
            inverse=inverse,
            rescale=False,
            adapt=False,
            lr=0.1,
            damping=0.0,
            kind="exact",
            decay=0.5,
        )
        for m in (tanh, logistic)
    ]
    start = tanh(x).detach()
    for _ in range(6):
        for model, opt in zip((tanh, logistic), opts, strict=True):
            opt.zero_grad()
            (0.5 * (model(x) - y).square().sum(1)).mean().backward()
            opt.step()
        assert torch.allclose(tanh(x), logistic(x), atol=1e-7)
    assert (tanh(x) - start).abs().max() > 0.1
