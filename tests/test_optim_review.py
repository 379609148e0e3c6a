"""Optimizers inside torch's own machinery: step hooks, gradient scalers, saved dampings; and the λ that is reported."""

import pytest
import torch
import torch.nn.functional as F

from fisherviz import optim
from tests.optim_oracle import data, matrices, net

STEPPING = {
    "kfac": lambda m: optim.KFAC(m, "categorical"),
    "kfac-plain": lambda m: optim.KFAC(m, "categorical", rescale=False, adapt=False, lr=0.1, damping=0.1),
    "kbfgs": lambda m: optim.KBFGS(m, "categorical"),
    "hessian-free": lambda m: optim.HessianFree(m, "categorical", iterations=3),
    "foof": lambda m: optim.FOOF(m, "categorical"),
    "natural-gradient": lambda m: optim.NaturalGradient(m, "categorical", "kfac", lr=0.1, damping=0.1),
    "subsampled": lambda m: optim.SubsampledNaturalGradient(m, "categorical"),
}
EMPIRICAL = {
    "cw-ngd": lambda m: optim.CWNGD(m, "categorical", lr=0.05, damping=0.1),
    "tengrad": lambda m: optim.TENGraD(m, "categorical"),
    "ekfac": lambda m: optim.EKFAC(m, "categorical", kind="empirical"),
}
SAMPLED = {
    "kfac": STEPPING["kfac-plain"],
    "foof": STEPPING["foof"],
    "cw-ngd": lambda m: optim.CWNGD(m, "categorical", lr=0.05, damping=0.1, kind="mc"),
    "tengrad": lambda m: optim.TENGraD(m, "categorical", kind="mc"),
}


def closure_of(opt, model, x, y):
    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


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


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("name", EMPIRICAL)
def test_a_scaler_is_refused_where_scores_are_read_from_its_backward(name, clip):
    with pytest.raises(RuntimeError, match=r"kind 'empirical' reads its scores .*GradScaler"):
        scaled_steps(EMPIRICAL[name], enabled=True, clip=clip)
    scaled_steps(EMPIRICAL[name], enabled=False, clip=clip)


@pytest.mark.parametrize("name", ["kfac", "kbfgs", "hessian-free"])
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
        opt = optim.CWNGD(model, "categorical", lr=0.05, damping=0.1, loss_scale=s / len(x))
        (s * F.cross_entropy(model(x), y)).backward()
        for p in model.parameters():
            p.grad /= s
        opt.step()
        found.append(matrices(model))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


