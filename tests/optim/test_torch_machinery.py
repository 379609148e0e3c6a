"""Optimizers inside torch's own machinery: step hooks, gradient scalers, saved dampings; and the λ that is reported."""

import io

import pytest
import torch
import torch.nn.functional as F

import fisherviz as fv
from fisherviz import optim
from fisherviz.comparison.strengths import strengths
from fisherviz.papers.sang.optimizers import DecayedKFAC
from fisherviz.training.diagnosis import explain
from fisherviz.training.optimizers import dampings
from tests.oracles.steps import closure_of, data, matrices, net

STEPPING = {
    "kfac": lambda m: optim.KFAC.paper(m, "categorical"),
    "kfac-plain": lambda m: optim.KFAC.paper(m, "categorical", rescale=False, adapt=False, lr=0.1, damping=0.1),
    "kfac-decayed": lambda m: DecayedKFAC(m, "categorical"),
    "kbfgs": lambda m: optim.KBFGS(m, "categorical"),
    "hessian-free": lambda m: optim.HessianFree.paper(m, "categorical", iterations=3),
    "ksd": lambda m: optim.KSD.paper(m, "categorical", dimension=3, iterations=3),
    "foof": lambda m: optim.FOOF.paper(m, "categorical"),
    "natural-gradient": lambda m: optim.NaturalGradient(m, "categorical", "kfac", lr=0.1, damping=0.1),
    "subsampled": lambda m: optim.SubsampledNaturalGradient.paper(m, "categorical"),
}
EMPIRICAL = {
    "cw-ngd": lambda m: optim.CWNGD.paper(m, "categorical", lr=0.05, damping=0.1),
    "tengrad": lambda m: optim.TENGraD.paper(m, "categorical"),
    "ekfac": lambda m: optim.EKFAC.paper(m, "categorical", kind="empirical"),
}
SAMPLED = {
    "kfac": STEPPING["kfac-plain"],
    "foof": STEPPING["foof"],
    "cw-ngd": lambda m: optim.CWNGD.paper(m, "categorical", lr=0.05, damping=0.1, kind="mc"),
    "tengrad": lambda m: optim.TENGraD.paper(m, "categorical", kind="mc"),
}


@pytest.mark.parametrize("name", STEPPING)
def test_step_hooks_run_once_whatever_was_created_before(name):
    for make in STEPPING.values():  # torch wraps the `step` of each class when it is first created
        make(net())
    model = net()
    opt = STEPPING[name](model)
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    for _ in range(2):
        opt.step(closure_of(opt, model, *data()))
    assert seen == ["before", "after"] * 2


def scaled_steps(make, enabled, clip=False):
    model = net()
    opt = make(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
    for seed in range(3):
        x, y = data(seed=seed)
        opt.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if clip:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
    return matrices(model)


@pytest.mark.covering
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("name", EMPIRICAL)
def test_a_scaler_is_refused_where_scores_are_read_from_its_backward(name, clip):
    with pytest.raises(RuntimeError, match=r"kind 'empirical' reads its scores .*GradScaler"):
        scaled_steps(EMPIRICAL[name], enabled=True, clip=clip)
    scaled_steps(EMPIRICAL[name], enabled=False, clip=clip)


@pytest.mark.parametrize("name", ["kfac", "kbfgs", "hessian-free", "ksd"])
@pytest.mark.parametrize("closure", [False, True])
def test_a_scaler_is_refused_where_a_closure_is_evaluated(name, closure):
    model = net()
    opt = STEPPING[name](model)
    scaler = torch.amp.GradScaler("cpu")
    x, y = data()
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    with pytest.raises(RuntimeError, match="GradScaler cannot be used with an optimizer that evaluates a closure"):
        scaler.step(opt, *([closure_of(opt, model, x, y)] if closure else []))


def test_a_refused_scaler_leaves_the_optimizer_usable():
    model, reference = net(), net()
    opt, other = EMPIRICAL["cw-ngd"](model), EMPIRICAL["cw-ngd"](reference)
    x, y = data()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(opt)
    for o, m in ((opt, model), (other, reference)):
        o.step(closure_of(o, m, x, y))
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.covering
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("name", SAMPLED)
def test_a_scaler_changes_nothing_where_labels_are_sampled(name, clip):
    torch.manual_seed(0)
    plain = scaled_steps(SAMPLED[name], enabled=False)
    torch.manual_seed(0)
    scaled = scaled_steps(SAMPLED[name], enabled=True, clip=clip)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_loss_scale_is_that_of_a_loss_scaled_by_hand():
    found = []
    for s in (1.0, 1024.0):
        model = net()
        x, y = data()
        opt = optim.CWNGD.paper(model, "categorical", lr=0.05, damping=0.1, loss_scale=s / len(x))
        (s * F.cross_entropy(model(x), y)).backward()
        for p in model.parameters():
            p.grad /= s
        opt.step()
        found.append(matrices(model))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "damping"),
    [("kfac", fv.Tikhonov(0.1)), ("kfac", fv.FactoredTikhonov(0.3)), ("kfac-tridiagonal", fv.FactoredTikhonov(0.3))],
)
def test_saved_dampings_are_loaded_by_torch_as_it_is(method, damping):
    made = []
    for seed in (1, 5):
        model = net(seed=seed)
        groups = [{"params": list(model[:2].parameters())}, {"params": list(model[2:].parameters()), "lr": 0.05}]
        start = damping if seed == 1 else type(damping)(7.0)  # another one: the loaded value must take its place
        made.append((model, optim.NaturalGradient(model, "categorical", method, params=groups, lr=0.1, damping=start)))
    (model, opt), (other, resumed) = made
    opt.step(closure_of(opt, model, *data()))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    assert [group["damping"] for group in opt.param_groups] == [damping, damping]
    assert [group["damping"] for group in resumed.param_groups] == [damping, damping]
    for m, o in made:
        o.step(closure_of(o, m, *data(seed=3)))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_state_with_a_damaged_damping_changes_nothing():
    model = net()
    opt = STEPPING["natural-gradient"](model)
    for damaged in ({"gamma": "x"}, {"gamma": 0.1, "value": 0.1}, {"lambda": 0.1}):
        state = opt.state_dict()
        state["param_groups"][0] |= {"damping": damaged, "lr": 9.0}
        with pytest.raises(ValueError, match="param_groups cannot be read"):
            opt.load_state_dict(state)
        assert (opt.param_groups[0]["damping"], opt.param_groups[0]["lr"]) == (0.1, 0.1)


def test_the_adapted_strength_of_hessian_free_is_reported():
    model = net()
    opt = optim.HessianFree.paper(model, "categorical", iterations=3, damping=2.0)
    assert strengths(opt) == {"lambda": 2.0}
    for seed in range(5):
        opt.step(closure_of(opt, model, *data(seed=seed)))
    assert opt.lam != 2.0
    assert strengths(opt) == {"lambda": opt.lam}
    assert dampings(opt)["lambda"] == opt.lam
    assert opt.param_groups[0]["damping"] == 2.0


def test_the_damping_of_a_plain_optimizer_is_reported_and_named_in_errors():
    model = net()
    groups = [
        {"params": list(model[:2].parameters()), "approximation": "none", "damping": 5.0},
        {"params": list(model[2:].parameters())},
    ]
    plain = {"rescale": False, "adapt": False, "lr": 0.5, "damping": 0.04}
    eigenvalues = optim.KFAC.paper(model, "categorical", params=groups, heuristic_damping=False, **plain)
    assert dampings(eigenvalues) == {"lr": 0.5, "lambda": 0.04}
    opt = optim.KFAC.paper(model, "categorical", **plain)
    assert dampings(opt) == {"lr": 0.5, "lambda": 0.04, "gamma": 0.2}
    opt.param_groups[0]["damping"] = 0.09  # a scheduler's
    assert dampings(opt) == {"lr": 0.5, "lambda": 0.09, "gamma": 0.3}
    adaptive = optim.KFAC.paper(model, "categorical", damping=4.0, weight_decay=0.0)
    assert dampings(adaptive) == {"lr": 1.0, "lambda": 4.0, "gamma": 2.0}
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    assert dampings(sgd) == {"lr": 0.5}
    assert "damping λ 0.09, γ 0.3, learning rate 0.5" in str(explain(model, opt, data()[0], float("nan"), 3, 1))
