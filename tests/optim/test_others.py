"""Sub-sampled, K-BFGS and Hessian-free steps against explicit dense matrices; all presets on real digits."""

import io
from functools import reduce

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import fisherviz as fv
from fisherviz import optim
from fisherviz.optim.bfgs import LastPairs
from tests.covering import some
from tests.oracles.steps import (
    assert_same,
    closure_of,
    data,
    exact_vectors,
    eye,
    gradient,
    matrices,
    moments,
    moved,
    net,
    per_example,
    scores,
)


def pieces(d, like):
    return [p.reshape(M.shape) for p, M in zip(d.split([M.numel() for M in like]), like, strict=True)]


def kbfgs_in_groups(*dampings):
    model, (x, y) = net(), data(9)
    weights = [p for p in model.parameters() if p.dim() == 2]
    biases = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": each, "damping": d} for each, d in zip((weights, biases), dampings, strict=True)]
    opt = optim.KBFGS(model, "categorical", params=groups)
    opt.step(closure_of(opt, model, x, y))
    return model


def test_kbfgs_reads_a_groups_damping_whatever_form_it_has():
    plain = kbfgs_in_groups(0.25, 0.25)
    assert_same(matrices(kbfgs_in_groups(fv.Tikhonov(0.25), fv.Tikhonov(0.25))), matrices(plain))
    factored = [fv.FactoredTikhonov(0.5)] * 2  # γ² = λ
    assert_same(matrices(kbfgs_in_groups(*factored)), matrices(plain))


def test_kbfgs_refuses_one_layer_with_two_dampings():
    with pytest.raises(ValueError, match=r"layer '0' are in groups with different dampings"):
        kbfgs_in_groups(0.25, 0.5)


@pytest.mark.covering
@pytest.mark.parametrize("structure", ["full", "layer"])
@pytest.mark.parametrize("source", ["previous", "same", "independent"])
@pytest.mark.parametrize("T", [1, 3])
def test_subsampled_natural_gradient(structure, source, T):
    model = net()
    own = [data(7, seed=50 + i) for i in range(2)]
    fisher_data = {"previous": None, "same": "same", "independent": [x for x, _ in own]}[source]
    opt = optim.SubsampledNaturalGradient.paper(
        model,
        "categorical",
        structure=structure,
        fisher_data=fisher_data,
        lr=0.1,
        damping=0.05,
        T=T,
        kind="exact",
    )
    used, previous, draws = None, None, 0
    for k in range(5):
        x, y = data(9, seed=k)
        if k % T == 0:
            inputs = {
                "previous": x if previous is None else previous,
                "same": x,
                "independent": own[draws % 2][0],
            }[source]
            draws += 1
            layers = moments(model, inputs, exact_vectors)
            joint = [per_example(layers)] if structure == "full" else [per_example([layer]) for layer in layers]
            used = torch.block_diag(*[J.T @ J / len(inputs) for J in joint])
        previous = x
        v = gradient(model, x, y)
        d = -0.1 * torch.linalg.solve(used + 0.05 * eye(len(used)), torch.cat([g.reshape(-1) for g in v]))
        before = matrices(model)
        closure_of(opt, model, x, y)()
        opt.step()
        assert_same(moved(before, matrices(model)), pieces(d, v), 1e-8)


def bfgs(H, s, y):
    rho = 1 / (s @ y)
    n = eye(len(s))
    return (n - rho * torch.outer(s, y)) @ H @ (n - rho * torch.outer(y, s)) + rho * torch.outer(s, s)


@pytest.mark.parametrize(("first", "memory"), [("batch", None), ("data", None), ("batch", 3), ("batch", 100)])
def test_kbfgs_is_the_authors_algorithm(first, memory):
    """With a memory, K-BFGS(L): H_g is what BFGS makes of the identity by the last pairs."""
    model = net()
    lam, beta, lr, m = 0.3, 0.9, 0.3, 0.9
    everything = data(30, seed=99)[0]
    first_data = [everything[:10], everything[10:]] if first == "data" else None
    opt = optim.KBFGS(model, "categorical", data=first_data, memory=memory)
    state = [{} for _ in matrices(model)]
    damped_s = damped_y = 0
    for k in range(8):
        x, y = data(16, seed=k)
        layers, v, W = moments(model, x, scores(y)), gradient(model, x, y), matrices(model)
        if k == 0 and first == "data":
            for st, (a, _) in zip(state, moments(model, everything, exact_vectors), strict=True):
                st["A"] = a.T @ a / 30
        expected = []
        for st, (a, _), g in zip(state, layers, v, strict=True):
            fresh = a.T @ a / len(x)
            st["A"] = fresh if "A" not in st else beta * st["A"] + (1 - beta) * fresh
            if "Ha" not in st:
                st["Ha"], st["Hg"] = torch.linalg.inv(st["A"] + lam**0.5 * eye(len(fresh))), eye(len(g))
                st["v"], st["s"], st["y"] = 0 * g, torch.zeros(len(g)).double(), torch.zeros(len(g)).double()
            st["v"] = m * st["v"] + (1 - m) * g
            expected.append(-lr * st["Hg"] @ st["v"] @ st["Ha"])
        before = matrices(model)
        opt.step(closure_of(opt, model, x, y))
        assert_same(moved(before, matrices(model)), expected, 1e-8)
        after = moments(model, x, scores(y))
        for st, (a, g), (a2, g2), W1, W2 in zip(state, layers, after, W, matrices(model), strict=True):
            s = st["Ha"] @ a.mean(0)
            st["Ha"] = bfgs(st["Ha"], s, (st["A"] + lam**0.5 * eye(len(s))) @ s)
            st["s"] = 0.9 * st["s"] + 0.1 * (a2 @ W2.T - a @ W1.T).mean(0)
            st["y"] = 0.9 * st["y"] + 0.1 * (g2 - g)[0].mean(0)
            s, t, Hy = st["s"], st["y"], st["Hg"] @ st["y"]
            if s @ t < 0.2 * t @ Hy:
                theta = 0.8 * (t @ Hy) / (t @ Hy - s @ t)
                s, damped_s = theta * s + (1 - theta) * Hy, damped_s + 1
            if s @ t < lam**0.5 * s @ s:
                theta = (1 - lam**0.5) * (s @ s) / (s @ s - s @ t)
                t, damped_y = theta * t + (1 - theta) * s, damped_y + 1
            st["pairs"] = [*st.get("pairs", []), (s, t)][-memory if memory else None :]
            st["Hg"] = reduce(lambda H, pair: bfgs(H, *pair), st["pairs"], eye(len(s)))
    assert damped_y > 0
    for own in opt.directions.factors.values():
        assert ("Hg" in own) is (memory is None)
        assert memory is None or len(own["S"]) == len(own["Y"]) == min(memory, 8)


def test_kbfgs_with_a_memory_resumes_bit_for_bit():
    def make(seed):
        model = net(seed=seed)
        return model, optim.KBFGS(model, "categorical", memory=2)

    model, opt = make(1)
    x, y = data(16)
    for _ in range(3):
        opt.step(closure_of(opt, model, x, y))
    other, resumed = make(2)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(opt.state_dict())
    for _ in range(3):
        opt.step(closure_of(opt, model, x, y))
        resumed.step(closure_of(resumed, other, x, y))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_pairs_without_curvature_are_not_kept():
    pairs = LastPairs(torch.zeros(0, 2), torch.zeros(0, 2))
    e, f, g = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.ones(2)
    assert len(pairs.with_pair(e, f, g, 5).S) == 0
    assert len(pairs.with_pair(e, -e, g, 5).S) == 0
    assert len(pairs.with_pair(e, e, g, 5).S) == 1
    assert torch.equal(pairs @ g, g)


@pytest.mark.parametrize("memory", [0, -1, 1.5, True, "many"])
def test_a_memory_that_is_no_number_of_pairs_is_refused(memory):
    with pytest.raises(ValueError, match="memory must be a positive whole number"):
        optim.KBFGS(net(), "categorical", memory=memory)


def test_double_damping_raises_both_curvatures():
    from fisherviz.optim.bfgs import double_damping

    torch.manual_seed(0)
    H = eye(4) * 2
    for s, y in ((torch.randn(4).double(), torch.randn(4).double()) for _ in range(20)):
        s2, y2 = double_damping(s, y, H, 0.2, 0.5)
        assert s2 @ y2 >= (0.5 - 1e-9) * s2 @ s2
        powell = (1 - 0.2) * (y @ H @ y) / (y @ H @ y - s @ y) if s @ y < 0.2 * y @ H @ y else 1.0
        assert torch.allclose(s2, powell * s + (1 - powell) * H @ y)


@pytest.mark.parametrize("preconditioner", [None, "kfac", "diagonal"])
def test_hessian_free_solves_with_the_exact_fisher_and_adapts_lambda(preconditioner):
    """With enough iterations conjugate gradients reach (F + (λ+η)I)⁻¹∇h, whatever preconditions them."""
    model = net()
    lam, eta = 2.0, 1e-2
    opt = optim.HessianFree.paper(
        model, "categorical", damping=lam, weight_decay=eta, preconditioner=preconditioner, iterations=200,
        tolerance=1e-14,
    )  # fmt: skip
    for k in range(4):
        x, y = data(20, seed=k)
        J = per_example(moments(model, x, exact_vectors))
        W = matrices(model)
        v = torch.cat([(g + eta * M).reshape(-1) for g, M in zip(gradient(model, x, y), W, strict=True)])
        B = J.T @ J / len(x) + (lam + eta) * eye(J.shape[1])
        d = -torch.linalg.solve(B, v)
        loss = float(F.cross_entropy(model(x), y).detach())
        opt.step(closure_of(opt, model, x, y))
        if opt.last["chosen"] == opt.last["iterations"] and opt.last["step"] == 1:
            assert_same(moved(W, matrices(model)), pieces(d, W), 1e-5)
            after = float(F.cross_entropy(model(x), y).detach())
            squares = [sum(float(M.square().sum()) for M in Ws) for Ws in (W, matrices(model))]
            rho = (after - loss + eta / 2 * (squares[1] - squares[0])) / float(0.5 * d @ B @ d + v @ d)
            assert opt.last["rho"] == pytest.approx(rho, rel=1e-3)
            lam *= 2 / 3 if rho > 0.75 else 1.5 if rho < 0.25 else 1
            assert opt.lam == pytest.approx(lam)
        lam = opt.lam
        assert opt.last["decrease"] > 0
    assert lam != 2.0


@pytest.mark.parametrize("make", [optim.KBFGS, optim.HessianFree.paper, optim.KSD])
def test_closures_are_asked_for(make):
    opt = make(net(), "categorical")
    with pytest.raises(RuntimeError, match=r"call step\(closure\)"):
        opt.step()


def test_kbfgs_refuses_shared_weights():
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 3)).double()
    opt = optim.KBFGS(model, "categorical")
    x, y = torch.randn(4, 1, 3, 3).double(), torch.tensor([0, 1, 2, 0])
    with pytest.raises(NotImplementedError, match="layer '0' shares its weights"):
        opt.step(closure_of(opt, model, x, y))


OTHERS = {
    "subsampled": lambda m: optim.SubsampledNaturalGradient.paper(m, "categorical", T=2, momentum=0.5),
    "subsampled-data": lambda m: optim.SubsampledNaturalGradient.paper(
        m, "categorical", fisher_data=[data(5, seed=s)[0] for s in range(3)], structure="layer"
    ),
    "kbfgs": lambda m: optim.KBFGS(m, "categorical"),
    "hessian-free": lambda m: optim.HessianFree.paper(m, "categorical", preconditioner="kfac", iterations=5),
    "ksd": lambda m: optim.KSD(m, "categorical", preconditioner="kfac", dimension=4, share=0.5),
}


@pytest.mark.parametrize("name", OTHERS)
def test_resuming_is_bitwise(name):
    model = net()
    opt = OTHERS[name](model)
    for k in range(3):
        opt.step(closure_of(opt, model, *data(seed=k)))
    file = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file)
    torch.manual_seed(5)
    other = net(seed=3)
    other.load_state_dict(weights)
    resumed = OTHERS[name](other)
    resumed.load_state_dict(state)
    for k in range(3, 8):
        opt.step(closure_of(opt, model, *data(seed=k)))
        resumed.step(closure_of(resumed, other, *data(seed=k)))
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)


def kfac(m, **options):
    return optim.KFAC.paper(m, "categorical", rescale=False, adapt=False, **{"lr": 0.1, "damping": 0.03} | options)


CONVERGE = {
    "foof": lambda m: optim.FOOF.paper(m, "categorical", lr=0.3, damping=0.1),
    "cw-ngd": lambda m: optim.CWNGD.paper(m, "categorical", lr=0.5, damping=1.0),
    "kfac-adaptive": lambda m: optim.KFAC.paper(m, "categorical", damping=1.0),
    "kfac-adaptive-tridiagonal": lambda m: optim.KFAC.paper(m, "categorical", inverse="block-tridiagonal", damping=1.0),
    "kfac-factored": kfac,
    "kfac-eigenvalues": lambda m: kfac(m, heuristic_damping=False),
    "kfac-tridiagonal": lambda m: kfac(m, inverse="block-tridiagonal"),
    "ekfac": lambda m: optim.EKFAC.paper(m, "categorical", lr=0.02, damping=0.03),
    "tengrad": lambda m: optim.TENGraD.paper(m, "categorical", lr=0.03),
    "subsampled-full": lambda m: optim.SubsampledNaturalGradient.paper(m, "categorical", lr=0.3, damping=0.1),
    "subsampled-layer": lambda m: optim.SubsampledNaturalGradient.paper(
        m, "categorical", structure="layer", lr=0.3, damping=0.1
    ),
    "exact": lambda m: optim.NaturalGradient(m, "categorical", lr=0.3, damping=0.05, T=5),
    "kbfgs": lambda m: optim.KBFGS(m, "categorical", lr=0.5, damping=0.01),
    "hessian-free": lambda m: optim.HessianFree.paper(
        m, "categorical", damping=1.0, preconditioner="kfac", iterations=8
    ),
    "ksd": lambda m: optim.KSD.paper(m, "categorical", dimension=10, iterations=5),
}


# the others in the long run: tests/optim/test_defaults.py trains their classes with their defaults
QUICK = ("kfac-eigenvalues", "kfac-tridiagonal", "exact")


@pytest.mark.parametrize("name", some(CONVERGE, *QUICK))
def test_every_preset_learns_the_real_digits(name):
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    opt = CONVERGE[name](model)
    generator = torch.Generator().manual_seed(0)
    steps = {"hessian-free": 25, "ksd": 25, "exact": 60}.get(name, 120)
    size = 500 if name in ("hessian-free", "ksd", "kfac-adaptive", "kfac-adaptive-tridiagonal") else 100
    for _ in range(steps):
        batch = torch.randint(len(x), (size,), generator=generator)
        opt.step(closure_of(opt, model, x[batch], y[batch]))
    with torch.no_grad():
        accuracy = float((model(x).argmax(1) == y).float().mean())
    assert accuracy > 0.85, f"{accuracy:.3f}"
