"""Step rules: plain groups, algorithm 2 for any approximation, its decisions, and the groups that it joins."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherviz as fv
from fisherviz import optim
from fisherviz.approximations import KFAC as KFACApproximation
from fisherviz.operators import Dense
from fisherviz.optim.preconditioner import Preconditioner
from fisherviz.optim.quadratic import minimise
from fisherviz.statistics import Block
from tests.oracles.steps import (
    assert_same,
    damped_pair,
    data,
    exact_vectors,
    eye,
    factors,
    gradient,
    matrices,
    moments,
    moved,
    net,
    per_example,
)

ETA = 1e-2


def closure_of(opt, model, x, y, parts=(slice(None),)):
    """The mean loss over the batch, backpropagated in one pass or in several."""

    def closure():
        opt.zero_grad()
        total = 0.0
        for part in parts:
            loss = F.cross_entropy(model(x[part]), y[part], reduction="sum") / len(x)
            loss.backward()
            total += loss.detach()
        return total

    return closure


def flat(parts):
    return torch.cat([p.reshape(-1) for p in parts])


# ---- plain groups ----------------------------------------------------------------------------------------------------

PLAIN_BESIDE = {
    "natural gradient": lambda m, g: optim.NaturalGradient(m, "categorical", "kfac", params=g, lr=0.1, damping=0.1),
    "ekfac": lambda m, g: optim.EKFAC.paper(m, "categorical", params=g),
    "plain kfac": lambda m, g: optim.KFAC.paper(
        m, "categorical", params=g, rescale=False, adapt=False, lr=0.1, damping=0.1
    ),
    "complete kfac": lambda m, g: optim.KFAC.paper(m, "categorical", params=g),
    "kbfgs": lambda m, g: optim.KBFGS(m, "categorical", params=g),
    "hessian-free": lambda m, g: optim.HessianFree.paper(m, "categorical", params=g, iterations=3),
    "ksd": lambda m, g: optim.KSD.paper(m, "categorical", params=g, iterations=3),
    "sub-sampled": lambda m, g: optim.SubsampledNaturalGradient.paper(m, "categorical", params=g),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN_BESIDE)
def test_a_plain_group_is_sgd_with_its_own_momentum_lr_and_weight_decay(name):
    model, (x, y) = net(), data()
    own = {"approximation": "none", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
    opt = PLAIN_BESIDE[name](
        model, [{"params": list(model[:4].parameters())}, {"params": list(model[4].parameters())} | own]
    )
    buffer = None
    for _ in range(4):
        before = matrices(model)
        g = gradient(model, x, y)[-1] + 0.05 * before[-1]
        buffer = g if buffer is None else 0.9 * buffer + g
        opt.step(closure_of(opt, model, x, y))
        after = matrices(model)
        assert_same([after[-1] - before[-1]], [-0.1 * buffer], 1e-12)
        assert (after[0] - before[0]).norm() > 0


# ---- algorithm 2 -----------------------------------------------------------------------------------------------------


class Blocks(fv.Approximation):
    """A user's own: the exact block of each layer."""

    name = "own blocks"

    def statistics(self, layer):
        return {"F": Block(layer.name, layer.name)}

    def operator_for(self, layer, values):
        return Dense(values["F"])


def by_blocks(layers, N, gradients, averages):
    blocks = averages([per_example([layer]).T @ per_example([layer]) / N for layer in layers])
    return lambda gamma: [
        torch.linalg.solve(B + gamma**2 * eye(len(B)), g.reshape(-1)) for B, g in zip(blocks, gradients, strict=True)
    ]


def by_diagonal(layers, N, gradients, averages):
    diagonals = averages([per_example([layer]).square().sum(0) / N for layer in layers])
    return lambda gamma: [g.reshape(-1) / (d + gamma**2) for d, g in zip(diagonals, gradients, strict=True)]


def by_eigenbasis(layers, N, gradients, averages):
    pairs = averages([M for pair in factors(layers, N) for M in pair])
    found = []
    for (a, g), A, G, v in zip(layers, pairs[::2], pairs[1::2], gradients, strict=True):
        QA, QG = torch.linalg.eigh(A)[1], torch.linalg.eigh(G)[1]
        S = torch.einsum("kni,nj->ij", (g @ QG).square(), (a @ QA).square()) / N
        found.append((QA, QG, S, QG.T @ v @ QA))
    return lambda gamma: [QG @ (v / (S + gamma**2)) @ QA.T for QA, QG, S, v in found]


def by_factors(layers, N, gradients, averages):
    pairs = averages([M for pair in factors(layers, N) for M in pair])

    def propose(gamma):
        damped = [damped_pair(A, G, gamma) for A, G in zip(pairs[::2], pairs[1::2], strict=True)]
        return [
            torch.linalg.solve(G, torch.linalg.solve(A, g.T).T) for g, (A, G) in zip(gradients, damped, strict=True)
        ]

    return propose


class Algorithm2:
    """Section 9 of the K-FAC paper with dense matrices, whatever proposes, new statistics at each step."""

    def __init__(self, proposal, lam, T1, T2, lr):
        self.lr, self.proposal, self.lam, self.gamma, self.T1, self.T2 = lr, proposal, lam, math.sqrt(lam + ETA), T1, T2
        self.k, self.average, self.previous, self.rhos = 0, None, None, []

    def averages(self, now):
        e = min(1 - 1 / self.k, 0.95)
        old = self.average
        self.average = now if old is None else [e * a + (1 - e) * b for a, b in zip(old, now, strict=True)]
        return self.average

    def step(self, model, x, y):
        self.k += 1
        layers, W = moments(model, x, exact_vectors), matrices(model)
        J = per_example(layers)
        B = J.T @ J / len(x) + (self.lam + ETA) * eye(J.shape[1])
        v = [g + ETA * M for g, M in zip(gradient(model, x, y), W, strict=True)]
        propose = self.proposal(layers, len(x), v, self.averages)
        omega2 = (19 / 20) ** (self.T2 / 2)
        candidates = [self.gamma, omega2 * self.gamma, self.gamma / omega2][: 3 if self.k % self.T2 == 0 else 1]
        best = None
        for gamma in candidates:
            D = -flat(propose(gamma))[:, None]
            D = D if self.previous is None else torch.cat([D, self.previous[:, None]], 1)
            delta = D @ -torch.linalg.solve(D.T @ B @ D, D.T @ flat(v))
            value = float(0.5 * delta @ B @ delta + flat(v) @ delta)
            best = (value, gamma, delta) if best is None or value < best[0] else best
        _, self.gamma, delta = best
        self.previous = step = self.lr * delta
        value = float(0.5 * step @ B @ step + flat(v) @ step)
        delta = [p.reshape(M.shape) for p, M in zip(self.previous.split([M.numel() for M in W]), W, strict=True)]
        if self.k % self.T1 == 0:
            new = [M + d for M, d in zip(W, delta, strict=True)]
            rho = (self.objective(new, x, y) - self.objective(W, x, y)) / value
            self.rhos.append(rho)
            omega1 = (19 / 20) ** self.T1
            self.lam *= omega1 if rho > 0.75 else 1 / omega1 if rho < 0.25 else 1
        return delta

    def objective(self, W, x, y):
        for i, M in enumerate(W):
            x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1) @ M.T
            x = torch.tanh(x) if i + 1 < len(W) else x
        return float(F.cross_entropy(x, y)) + ETA / 2 * float(flat(W).square().sum())


PROPOSALS = {"diagonal": by_diagonal, "ekfac": by_eigenbasis, "kfac": by_factors, Blocks: by_blocks}
WHOLE, UNEVEN = (slice(None),), (slice(0, 2), slice(2, 9))


@pytest.mark.covering
@pytest.mark.parametrize("parts", [WHOLE, UNEVEN], ids=["one pass", "two uneven passes"])
@pytest.mark.parametrize("method", PROPOSALS)
@pytest.mark.parametrize("lr", [1.0, 0.5])
def test_any_approximation_takes_the_steps_of_algorithm_2(method, parts, lr):
    model = net()
    opt = optim.NaturalGradient(
        model, "categorical", method, lr=lr, damping=0.5, momentum=0.9, weight_decay=ETA, kind="exact", ramp=True,
        rescale=True, adapt=True, T1=1, T2=3, tau1=1.0, tau2=1.0,
    )  # fmt: skip
    oracle = Algorithm2(PROPOSALS[method], 0.5, T1=1, T2=3, lr=lr)
    gammas = {opt.gamma}
    for k in range(9):
        x, y = data(9, seed=20 + k)
        before = matrices(model)
        expected = oracle.step(model, x, y)
        opt.step(closure_of(opt, model, x, y, parts))
        assert_same(moved(before, matrices(model)), expected, 1e-6)
        assert opt.last["rho"] == pytest.approx(oracle.rhos[-1], rel=1e-5)
        assert opt.lam == pytest.approx(oracle.lam, rel=1e-6)
        assert opt.gamma == pytest.approx(oracle.gamma, rel=1e-6)
        gammas.add(opt.gamma)
    assert opt.lam != 0.5
    assert len(gammas) > 1


@pytest.mark.parametrize(
    ("rho", "factor"),
    [(-1.0, 1 / 0.95), (0.2, 1 / 0.95), (0.3, 1.0), (0.6, 1.0), (0.7, 1.0), (0.8, 0.95), (math.nan, 1 / 0.95)],
)
def test_lambda_follows_the_reduction_ratio(rho, factor):
    """The closure's second value is made such that the ratio to the model's own decrease is ρ."""
    model, (x, y) = net(), data()
    opt = optim.KFAC.paper(model, "categorical", damping=2.0, weight_decay=0.0, T1=1, omega1=0.95)
    values = []

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        values.append(float(loss.detach()) if not values else values[0] - rho * opt.last["decrease"])
        return values[-1]

    opt.step(closure)
    assert len(values) == 2
    assert opt.last["rho"] == pytest.approx(rho, nan_ok=True)
    assert opt.lam == pytest.approx(2.0 * factor, rel=1e-12)


@pytest.mark.parametrize(
    ("bits", "joint"),
    [(0, True), (20, True), (36, True), (42, False), (52, False)],
)
def test_a_singular_pair_of_directions_leaves_the_first_alone(bits, joint):
    """Q = [[1, 1], [1, 1 + ε]], b = (−1, −1 − ε): its minimum is (0, 1), and (1, 0) with the first direction alone."""
    epsilon = 2.0**-bits
    Q = torch.tensor([[1.0, 1.0], [1.0, 1.0 + epsilon]], dtype=torch.float64)
    b = torch.tensor([-1.0, -1.0 - epsilon], dtype=torch.float64)
    expected = torch.tensor([0.0, 1.0] if joint else [1.0, 0.0], dtype=torch.float64)
    assert torch.allclose(minimise(Q, b), expected, atol=1e-4)


def test_directions_without_curvature_are_not_taken():
    zero = torch.zeros(1, 1, dtype=torch.float64)
    assert torch.equal(minimise(zero, torch.ones(1, dtype=torch.float64)), torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapt": True}, "pass rescale=True or adapt=False"),
        ({"rescale": True, "kind": "empirical"}, "kind must be 'exact' or 'mc', got 'empirical'"),
        ({"rescale": True, "reduction": "sum"}, "reduction must be 'mean', got 'sum'"),
        ({"rescale": True, "adapt": True, "T": 3}, "T2 must be a multiple of T"),
    ],
)
def test_what_the_quadratic_model_cannot_be_joined_with_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        optim.NaturalGradient(net(), "categorical", "ekfac", **{"lr": 1.0, "damping": 1.0} | options)


@pytest.mark.parametrize("method", ["ekfac", "diagonal"])
def test_a_rescaled_run_resumes_bit_for_bit(method):
    def made(seed):
        model = net(seed=seed)
        return model, optim.NaturalGradient(
            model, "categorical", method, lr=1.0, damping=1.0, momentum=0.9, rescale=True, adapt=True, T1=2, T2=4, T=2
        )

    (model, opt), (x, y) = made(1), data(16)
    for _ in range(5):
        opt.step(closure_of(opt, model, x, y))
    other, resumed = made(9)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(opt.state_dict())
    for _ in range(5):
        opt.step(closure_of(opt, model, x, y))
        resumed.step(closure_of(resumed, other, x, y))
    assert (resumed.lam, resumed.gamma, resumed.last) == (opt.lam, opt.gamma, opt.last)
    assert torch.equal(flat(matrices(model)), flat(matrices(other)))
    plain = optim.NaturalGradient(net(), "categorical", method, lr=1.0, damping=1.0)
    with pytest.raises(ValueError, match="another rescale="):
        plain.load_state_dict(opt.state_dict())
    assert plain.k == 0


# ---- groups that the quadratic model joins ---------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["lr", "damping", "momentum", "weight_decay"])
@pytest.mark.parametrize("make", [optim.KFAC, optim.HessianFree])
def test_a_joined_group_with_a_value_of_its_own_is_refused(make, option):
    model = net()
    groups = [{"params": list(model[0].parameters()), option: 0.25}, {"params": list(model[2:].parameters())}]
    with pytest.raises(ValueError, match=rf"a group has {option}=0\.25, .* only a group with approximation='none'"):
        make(model, "categorical", params=groups)


@pytest.mark.parametrize("make", [optim.KFAC, optim.HessianFree])
def test_a_schedule_of_each_group_is_refused_where_one_step_joins_them(make):
    model, (x, y) = net(), data()
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2:].parameters())}]
    opt = make(model, "categorical", params=groups)
    plan = torch.optim.lr_scheduler.LambdaLR(opt, [lambda k: 1.0, lambda k: 0.5**k])
    opt.step(closure_of(opt, model, x, y))
    plan.step()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    with pytest.raises(ValueError, match=r"groups have lr=1 and lr=0\.5, and the quadratic model joins"):
        opt.step(closure_of(opt, model, x, y))
    assert torch.equal(before, torch.cat([p.detach().flatten() for p in model.parameters()]))


def test_hessian_free_says_that_a_changed_damping_changes_nothing():
    model, (x, y) = net(), data()
    opt = optim.HessianFree.paper(model, "categorical", iterations=2)
    opt.param_groups[0]["damping"] = 0.5
    with pytest.warns(UserWarning, match=r"reads only when it is created; λ = 1 .*assign opt\.lam"):
        opt.step(closure_of(opt, model, x, y))


@pytest.mark.parametrize("preconditioner", [None, "kfac"])
@pytest.mark.parametrize("parts", [WHOLE, UNEVEN], ids=["one pass", "two uneven passes"])
@pytest.mark.filterwarnings("ignore:layers")
def test_hessian_free_solves_for_layers_without_structure_too(preconditioner, parts):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).double()
    lam = 3.0
    opt = optim.HessianFree.paper(
        model, "categorical", damping=lam, preconditioner=preconditioner, iterations=300, tolerance=1e-15
    )
    x, y = data(9)
    names = [name for name, _ in model.named_parameters()]
    weights = tuple(p.detach().clone() for p in model.parameters())

    def outputs(*w):
        return torch.func.functional_call(model, dict(zip(names, w, strict=True)), (x,))

    J = torch.cat([j.flatten(2) for j in torch.autograd.functional.jacobian(outputs, weights)], 2)
    p = torch.softmax(outputs(*weights), 1)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    matrix = torch.einsum("nki,nkl,nlj->ij", J, H, J) / len(x)
    v = flat(torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters())))
    opt.step(closure_of(opt, model, x, y, parts))
    assert opt.last["step"] == 1.0
    assert opt.last["chosen"] == opt.last["iterations"]
    step = flat([p.detach() - w for p, w in zip(model.parameters(), weights, strict=True)])
    expected = -torch.linalg.solve(matrix + lam * eye(len(v)), v)
    assert (step - expected).norm() < 1e-6 * expected.norm()


# ---- low-rank steps --------------------------------------------------------------------------------------------------


class Mine(KFACApproximation):
    """K-FAC by another name."""

    name = "mine"


@pytest.mark.parametrize(("method", "used"), [("kfac", 3), (Mine, 3), ("ekfac", 0)])
def test_rows_are_solved_with_where_the_operators_act_on_rows(method, used, monkeypatch):
    found = []
    original = Preconditioner.solve_rows
    monkeypatch.setattr(
        Preconditioner, "solve_rows", lambda s, layer, rows: found.append(layer.name) or original(s, layer, rows)
    )
    model, (x, y) = net(), data(1)
    opt = optim.NaturalGradient(model, "categorical", method, lr=0.1, damping=fv.FactoredTikhonov(0.3))
    for _ in range(2):
        opt.step(closure_of(opt, model, x, y))
    assert len(found) == 2 * used
    assert opt._watcher.wanted.local == (used > 0)  # nothing is kept for a matrix that cannot use it


# ---- keywords --------------------------------------------------------------------------------------------------------

RARE = {
    optim.KFAC: {"decay": 0.9, "samples": 2, "T1": 2, "T2": 40, "tau1": 0.5, "tau2": 0.5, "omega1": 0.9, "omega2": 0.9,
                 "gamma_by": "objective", "heuristic_damping": True, "setting": "reduce", "output": None,
                 "ownership": "one"},
    optim.EKFAC: {"samples": 2, "setting": "reduce"},
    optim.HessianFree: {"tolerance": 1e-3, "carry": 0.5},
    optim.KSD: {"share": 0.5, "kl_clip": 1.0},
    optim.KBFGS: {"pair_decay": 0.5, "powell": 0.1, "memory": 3},
    optim.SubsampledNaturalGradient: {"samples": 2},
}  # fmt: skip


@pytest.mark.parametrize("make", RARE)
def test_rare_keywords_are_taken_and_near_misses_named(make):
    model, (x, y) = net(), data()
    opt = make(model, "categorical", **RARE[make])
    opt.step(closure_of(opt, model, x, y))
    for name in RARE[make]:
        with pytest.raises(TypeError, match=f"{make.__name__} has no option '{name}x'; did you mean '{name}'"):
            make(net(), "categorical", **{name + "x": 1})
    with pytest.raises(TypeError, match=f"{make.__name__} has no option 'dampin'; did you mean 'damping'"):
        make(net(), "categorical", dampin=1.0)


def test_natural_gradient_names_near_misses_of_its_own_and_of_its_methods_options():
    make = {"lr": 0.1, "damping": 0.1}
    for wrong, right in (("rescal", "rescale"), ("reducton", "reduction"), ("settin", "setting")):
        with pytest.raises(TypeError, match=f"no option '{wrong}'; did you mean '{right}'"):
            optim.NaturalGradient(net(), "categorical", "kfac", **make, **{wrong: 1})


@pytest.mark.covering
@pytest.mark.parametrize("pi", ["traces", "spectral-norm", 3.0])
@pytest.mark.parametrize("rescale", [False, True])
def test_the_first_step_of_kfac_is_along_the_solve_with_the_pi_that_was_given(pi, rescale):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(12, 3).double(), torch.randint(2, (12,))
    before = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    fisher = fv.Probe(net, "categorical").fisher(x, y)
    kfac, gradient = fv.approximate(fisher, "kfac"), fisher.gradient()
    optimizer = fv.optim.KFAC(
        net, "categorical", rescale=rescale, adapt=False, damping=fv.FactoredTikhonov(0.3, pi), weight_decay=0.0,
        kind="exact", momentum=0.0, kl_clip=float("inf"), **({"tau1": 1.0, "tau2": 1.0} if rescale else {}),
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    step = nn.utils.parameters_to_vector(net.parameters()).detach() - before
    assert cosine(-step, kfac.solve(gradient, fv.FactoredTikhonov(0.3, pi))) == pytest.approx(1.0, abs=1e-12)
    assert cosine(-step, kfac.solve(gradient, fv.FactoredTikhonov(0.3))) < 1 - 1e-6


def cosine(one, other):
    return float(one @ other / one.norm() / other.norm())
