"""Each preset's steps against explicit dense matrices in float64, over several steps with moving averages."""

import pytest
import torch
from torch import nn

from fisherviz import FactoredTikhonov, optim
from tests.oracles.steps import (
    assert_same,
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
    sampled,
    scores,
)

STEPS = 4


def run(make, oracle, steps=STEPS, N=12, tolerance=1e-9, **options):
    """Train and compare every step's change of the weights with the oracle's."""
    model = net()
    opt = make(model, **options)
    for k in range(steps):
        x, y = data(N, seed=10 + k)
        expected = oracle(model, x, y, k)
        before = matrices(model)
        loss_backward(opt, model, x, y)
        opt.step()
        assert_same(moved(before, matrices(model)), expected, tolerance)


class Averages:
    """Moving averages of lists of tensors."""

    def __init__(self, decay, ramp=False):
        self.decay, self.ramp, self.now, self.k = decay, ramp, None, 0

    def __call__(self, new):
        self.k += 1
        e = min(1 - 1 / self.k, self.decay) if self.ramp else self.decay
        self.now = new if self.now is None else [e * o + (1 - e) * n for o, n in zip(self.now, new, strict=True)]
        return self.now


@pytest.mark.covering
@pytest.mark.parametrize("N", [3, 12, 40])
@pytest.mark.parametrize("T", [1, 3, 12])
def test_foof_solves_with_the_averaged_inputs(N, T):
    average, used = Averages(0.9), []

    def oracle(model, x, y, k):
        now = average([a.T @ a / len(a) for a, _ in moments(model, x, scores(y))])
        if k % T == 0:
            used[:] = now
        return [
            -0.3 * v @ torch.linalg.inv(A + 0.2 * eye(len(A))) for v, A in zip(gradient(model, x, y), used, strict=True)
        ]

    run(lambda m: optim.FOOF.paper(m, "categorical", lr=0.3, damping=0.2, decay=0.9, T=T), oracle, N=N)


@pytest.mark.parametrize("N", [2, 12])
def test_cwngd_is_algorithm_1(N):
    def oracle(model, x, y, k):
        out = []
        for (a, g), v in zip(moments(model, x, scores(y)), gradient(model, x, y), strict=True):
            rows = []
            for o in range(len(v)):
                block = (g[0, :, o : o + 1] * a).T @ (g[0, :, o : o + 1] * a)  # summed, not averaged
                rows.append(torch.linalg.solve(block + 1e-4 * eye(len(block)), v[o]))
            out.append(-0.05 * torch.stack(rows))
        return out

    run(lambda m: optim.CWNGD.paper(m, "categorical", lr=0.05), oracle, N=N, tolerance=1e-7)


def test_cwngd_with_a_summed_loss_takes_loss_scale():
    model, other = net(), net()
    x, y = data()
    opt = optim.CWNGD.paper(model, "categorical", loss_scale=1.0, damping=0.1)
    nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
    reference = optim.CWNGD.paper(other, "categorical", damping=0.1)
    nn.functional.cross_entropy(other(x), y).backward()
    before = matrices(model)
    opt.step(), reference.step()
    # the gradient is N times the mean's, the Fisher is the same
    assert_same(moved(before, matrices(model)), [len(x) * d for d in moved(before, matrices(other))])


@pytest.mark.covering
@pytest.mark.parametrize("heuristic", [True, False])
@pytest.mark.parametrize(("T", "N"), [(1, 2), (1, 12), (3, 12), (10, 2), (10, 12)])
def test_plain_kfac_with_both_dampings(heuristic, T, N):
    average, used = Averages(0.95, ramp=True), []

    def oracle(model, x, y, k):
        now = average([M for pair in factors(moments(model, x, exact_vectors), len(x)) for M in pair])
        if k % T == 0:
            used[:] = now
        out = []
        for v, A, G in zip(gradient(model, x, y), used[::2], used[1::2], strict=True):
            if heuristic:
                A, G = damped_pair(A, G, 0.1**0.5)
                out.append(-0.2 * torch.linalg.inv(G) @ v @ torch.linalg.inv(A))
            else:
                F = torch.kron(G, A) + 0.1 * eye(v.numel())
                out.append(-0.2 * torch.linalg.solve(F, v.reshape(-1)).reshape(v.shape))
        return out

    def make(m):
        return optim.KFAC.paper(
            m, "categorical", rescale=False, adapt=False, lr=0.2, damping=0.1, T=T, kind="exact",
            heuristic_damping=heuristic,
        )  # fmt: skip

    run(make, oracle, N=N)


def test_kfac_samples_its_labels_from_the_model_with_its_own_generator():
    draw = sampled(torch.initial_seed())

    def oracle(model, x, y, k):
        pairs = factors(moments(model, x, draw), len(x))
        solved = []
        for v, (A, G) in zip(gradient(model, x, y), pairs, strict=True):
            A, G = damped_pair(A, G, 0.1**0.5)
            solved.append(-0.2 * torch.linalg.inv(G) @ v @ torch.linalg.inv(A))
        return solved

    def make(m):
        return optim.KFAC.paper(m, "categorical", rescale=False, adapt=False, lr=0.2, damping=0.1, decay=0.0)

    run(make, oracle)


def test_block_tridiagonal_kfac():
    def oracle(model, x, y, k):
        N, layers = len(x), moments(model, x, exact_vectors)
        pairs = factors(layers, N)
        damped = [damped_pair(A, G, 0.5) for A, G in pairs]
        sizes = [len(A) * len(G) for A, G in pairs]
        P = sum(sizes)
        psi, lam, start = eye(P), torch.zeros(P, P, dtype=torch.float64), 0
        for i, (A, G) in enumerate(damped):
            end = start + sizes[i]
            sigma = torch.kron(G, A)
            if i + 1 < len(damped):
                cross_A = layers[i][0].T @ layers[i + 1][0] / N
                cross_G = torch.einsum("kni,knj->ij", layers[i][1], layers[i + 1][1]) / N
                next_A, next_G = damped[i + 1]
                regression = torch.kron(cross_G @ torch.linalg.inv(next_G), cross_A @ torch.linalg.inv(next_A))
                sigma = sigma - regression @ torch.kron(next_G, next_A) @ regression.T
                psi[start:end, end : end + sizes[i + 1]] = -regression
            lam[start:end, start:end] = torch.linalg.inv(sigma)
            start = end
        v = torch.cat([g.reshape(-1) for g in gradient(model, x, y)])
        d = -0.2 * psi.T @ lam @ psi @ v
        return [piece.reshape(g.shape) for piece, g in zip(d.split(sizes), gradient(model, x, y), strict=True)]

    def make(m):
        return optim.KFAC.paper(
            m, "categorical", inverse="block-tridiagonal", rescale=False, adapt=False, lr=0.2, damping=0.25,
            kind="exact", decay=0.0,
        )  # fmt: skip

    run(make, oracle, tolerance=1e-7)


def test_exact_natural_gradient_averages_the_whole_fisher():
    average = Averages(0.8)

    def oracle(model, x, y, k):
        J = per_example(moments(model, x, exact_vectors))
        (F,) = average([J.T @ J / len(x)])
        v = gradient(model, x, y)
        d = -0.1 * torch.linalg.solve(F + 0.05 * eye(len(F)), torch.cat([g.reshape(-1) for g in v]))
        return [p.reshape(g.shape) for p, g in zip(d.split([g.numel() for g in v]), v, strict=True)]

    run(lambda m: optim.NaturalGradient(m, "categorical", lr=0.1, damping=0.05, decay=0.8), oracle)


@pytest.mark.parametrize("kind", ["empirical", "exact"])
def test_tengrad_is_the_exact_block_of_each_layer(kind):
    def oracle(model, x, y, k):
        vectors = scores(y) if kind == "empirical" else exact_vectors
        out = []
        for layer, v in zip(moments(model, x, vectors), gradient(model, x, y), strict=True):
            J = per_example([layer])
            F = J.T @ J / len(x) + 0.1 * eye(v.numel())
            out.append(-0.05 * torch.linalg.solve(F, v.reshape(-1)).reshape(v.shape))
        return out

    run(lambda m: optim.TENGraD.paper(m, "categorical", lr=0.05, momentum=0.0, kind=kind), oracle)


@pytest.mark.parametrize("T", [1, 2])
def test_ekfac_averages_second_moments_in_the_latest_basis(T):
    factor_average, state = Averages(0.9), {}

    def oracle(model, x, y, k):
        layers = moments(model, x, exact_vectors)
        now = factor_average([M for pair in factors(layers, len(x)) for M in pair])
        out = []
        for i, ((a, g), v) in enumerate(zip(layers, gradient(model, x, y), strict=True)):
            if k % T == 0:
                state[i] = [torch.linalg.eigh(now[2 * i])[1], torch.linalg.eigh(now[2 * i + 1])[1], None]
            QA, QG, S = state[i]
            fresh = torch.einsum("kno,ni->oi", (g @ QG) ** 2, (a @ QA) ** 2) / len(x)
            S = fresh if S is None else 0.9 * S + 0.1 * fresh
            state[i][2] = S
            out.append(-0.1 * QG @ ((QG.T @ v @ QA) / (S + 0.05)) @ QA.T)
        return out

    def make(m):
        return optim.EKFAC.paper(m, "categorical", lr=0.1, damping=0.05, momentum=0.0, decay=0.9, T=T, kind="exact")

    run(make, oracle)


@pytest.mark.parametrize("method", ["diagonal", "identity", "cw-ngd", "kfac-full", "nearest-kronecker"])
def test_every_registered_method_steps_with_its_own_matrix(method):
    """The step solves with the matrix that `fv.approximate` gives on the same data."""
    import fisherviz as fv

    model = net()
    x, y = data(20)
    matrix = fv.approximate(fv.Probe(model, "categorical").fisher(x), method).to_dense()
    opt = optim.NaturalGradient(model, "categorical", method, lr=0.1, damping=0.2, kind="exact")
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    loss_backward(opt, model, x, y)
    v = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    opt.step()
    after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    expected = -0.1 * torch.linalg.solve(matrix + 0.2 * eye(len(matrix)), v)
    assert_same([after - before], [expected], 1e-8)


def test_momentum_and_weight_decay_come_after_and_before_the_matrix():
    buffers = []

    def oracle(model, x, y, k):
        W = matrices(model)
        out = []
        for i, (layer, v) in enumerate(zip(moments(model, x, scores(y)), gradient(model, x, y), strict=True)):
            A = layer[0].T @ layer[0] / len(x)
            d = (v + 0.1 * W[i]) @ torch.linalg.inv(A + 0.2 * eye(len(A)))
            if k == 0:
                buffers.append(d)
            else:
                buffers[i] = 0.9 * buffers[i] + d
            out.append(-0.3 * buffers[i])
        return out

    def make(m):
        return optim.FOOF.paper(m, "categorical", lr=0.3, damping=0.2, decay=0.0, momentum=0.9, weight_decay=0.1)

    run(make, oracle, N=3)


def test_a_damping_object_is_taken_as_it_is():
    one, two = net(), net()
    x, y = data()
    for model, damping in ((one, 0.04), (two, FactoredTikhonov(0.2))):
        opt = optim.KFAC.paper(model, "categorical", rescale=False, adapt=False, lr=0.1, damping=damping, kind="exact")
        loss_backward(opt, model, x, y)
        opt.step()
    assert_same(matrices(one), matrices(two), 1e-14)


def test_convolutions_and_groups_step_with_their_analysed_matrix():
    import fisherviz as fv

    for method in ("kfac", "foof", "cw-ngd", "ekfac", "layer"):
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(4, 4, 2, groups=2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(36, 3),
        ).double()
        x, y = torch.randn(6, 2, 4, 4, dtype=torch.float64), torch.randint(3, (6,))
        matrix = fv.approximate(fv.Probe(model, "categorical").fisher(x), method).to_dense()
        opt = optim.NaturalGradient(model, "categorical", method, lr=0.1, damping=0.2, kind="exact")
        before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        loss_backward(opt, model, x, y)
        v = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        opt.step()
        after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        assert_same([after - before], [-0.1 * torch.linalg.solve(matrix + 0.2 * eye(len(matrix)), v)], 1e-8)


@pytest.mark.parametrize("passes", [1, 2])
def test_deferred_averages_are_the_averages_at_every_snapshot(passes):
    """Wide layers with few rows defer their products; what is factorised is the same."""
    found = []
    for T in (12, 1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 3)).double()
        opt = optim.KFAC.paper(
            model,
            "categorical",
            rescale=False,
            adapt=False,
            lr=0.0,
            damping=0.1,
            T=T,
            kind="exact",
            decay=0.8,
        )
        for k in range(25):
            opt.zero_grad()
            for part in range(passes):
                x, y = data(3 + k % 2, seed=100 * part + k, widths=(30, 3))
                nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
        found.append([v[key] for v in opt.moments.values for key in ("A", "G")])
        waits = {key: deferred.buffer is not None for key, deferred in opt.moments.deferred[0].items()}
        assert waits == ({"A": True, "G": True} if T == 12 else {})
    assert_same(found[0], found[1], 1e-12)


@pytest.mark.parametrize(("saved", "loaded"), [(12, 1), (1, 12), (12, 12)])
def test_a_state_goes_on_in_an_optimizer_that_factorises_more_or_less_often(saved, loaded):
    """Rows that the one has put off are in the other's averages."""

    def optimizer(T):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 3)).double()
        options = {"rescale": False, "adapt": False, "lr": 0.0, "damping": 0.1, "kind": "exact", "decay": 0.8}
        return model, optim.KFAC.paper(model, "categorical", inverse="block-tridiagonal", T=T, **options)

    def steps(made, first, last):
        model, opt = made
        for k in range(first, last):
            opt.zero_grad()
            x, y = data(4, seed=k, widths=(30, 3))
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
        opt.moments.snapshot(keep=True)
        return [values[key] for values in opt.moments.values for key in sorted(values)]

    begun, other, whole = optimizer(saved), optimizer(loaded), optimizer(1)
    for k in range(6):
        begun[1].zero_grad()
        x, y = data(4, seed=k, widths=(30, 3))
        nn.functional.cross_entropy(begun[0](x), y).backward()
        begun[1].step()
    other[1].load_state_dict(begun[1].state_dict())
    assert_same(steps(other, 6, 9), steps(whole, 0, 9), 1e-12)
