"""A pass counts if its gradient is in the step: loops in which others happen step as if those never had."""

import copy
import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fisherviz import optim
from tests.covering import some
from tests.oracles.steps import assert_same, damped_pair, data, eye, factors, matrices, moments, moved, net, scores

FIXED = {"rescale": False, "adapt": False, "lr": 0.1, "damping": 0.1}
PLAIN = {
    "foof": lambda m, **o: optim.FOOF.paper(m, "categorical", **o),
    "kfac": lambda m, **o: optim.KFAC.paper(m, "categorical", kind="exact", **FIXED, **o),
    "kfac-empirical": lambda m, **o: optim.KFAC.paper(m, "categorical", kind="empirical", **FIXED, **o),
    "kfac-tridiagonal": lambda m, **o: optim.KFAC.paper(
        m, "categorical", kind="exact", inverse="block-tridiagonal", **FIXED, **o
    ),
    "kfac-rarely": lambda m, **o: optim.KFAC.paper(m, "categorical", kind="exact", T=10, **FIXED, **o),
    "ekfac": lambda m, **o: optim.EKFAC.paper(m, "categorical", kind="exact", **o),
    "cw-ngd": lambda m, **o: optim.CWNGD.paper(m, "categorical", lr=0.05, damping=0.1, **o),
    "tengrad": lambda m, **o: optim.TENGraD.paper(m, "categorical", **o),
    "exact": lambda m, **o: optim.NaturalGradient(m, "categorical", lr=0.1, damping=0.1, **o),
    "sub-sampled same": lambda m, **o: optim.SubsampledNaturalGradient.paper(
        m, "categorical", kind="exact", fisher_data="same", **o
    ),
    "sub-sampled": lambda m, **o: optim.SubsampledNaturalGradient.paper(m, "categorical", kind="exact", **o),
}
CLOSURE = {
    "kfac complete": lambda m: optim.KFAC.paper(m, "categorical", kind="exact", damping=0.5, T=2, T1=2, T2=4, tau1=1.0),
    "kbfgs": lambda m: optim.KBFGS(m, "categorical"),
    "hessian-free": lambda m: optim.HessianFree.paper(m, "categorical", damping=1.0),
    "ksd": lambda m: optim.KSD.paper(m, "categorical"),
}
PRESETS = PLAIN | CLOSURE
SCORES = ["kfac-empirical", "cw-ngd", "tengrad"]
SCALED = ["cw-ngd", "tengrad"]
"""Those of SCORES that take a loss_scale."""
FEW = ("kfac", "tengrad", "exact", "sub-sampled")
"""One of each kind: of sampled labels, of scores, over all layers, that looks again when it steps."""
ALONE = [name for name in PLAIN if name in ("foof", "kfac", "kfac-empirical", "kfac-rarely", "ekfac", "tengrad")]
"""Those in which a layer's step is its own passes' alone."""


def other_loss(model, seed=7):
    x, y = data(9, seed=seed)
    return F.cross_entropy(model(5 * x), y)


def look_and(drop):
    def spoil(model, opt):
        other_loss(model).backward()
        drop(model, opt)

    return spoil


def assign_none(model, opt):
    for p in model.parameters():
        p.grad = None


def accumulate_and_drop(model, opt):
    for seed in (5, 6):
        other_loss(model, seed).backward()
    model.zero_grad()


def drop_between(model, opt):
    accumulate_and_drop(model, opt)
    look_and(assign_none)(model, opt)


def saliency(model, opt):
    x = data(9, seed=7)[0].requires_grad_()
    torch.autograd.grad(model(x).sum(), x)


def behind_a_generator(model, opt):
    """Another loss through the frozen model, as in a GAN's generator step."""
    made = nn.Linear(2, 4).double()
    for p in model.parameters():
        p.requires_grad_(False)
    model(made(torch.ones(6, 2, dtype=torch.float64))).square().sum().backward()
    assert made.weight.grad.norm() > 0
    for p in model.parameters():
        p.requires_grad_(True)


def skip_nan(model, opt):
    x, y = data(9, seed=7)
    x[2, 1] = float("nan")
    F.cross_entropy(model(x), y).backward()
    assert not all(p.grad.isfinite().all() for p in model.parameters())
    opt.zero_grad()


SPOILS = {
    "zero_grad": look_and(lambda model, opt: opt.zero_grad()),
    "model.zero_grad": look_and(lambda model, opt: model.zero_grad()),
    "zeros": look_and(lambda model, opt: opt.zero_grad(set_to_none=False)),
    "another optimizer's zeros": look_and(
        lambda model, opt: torch.optim.SGD(model.parameters(), 0.1).zero_grad(set_to_none=False)
    ),
    "None": look_and(assign_none),
    "several": accumulate_and_drop,
    "again and again": drop_between,
    "saliency": saliency,
    "generator": behind_a_generator,
    "nan": skip_nan,
}


def train(make, spoil=None, steps=3):
    model = net()
    opt = make(model)
    for k in range(steps):
        if spoil is not None:
            spoil(model, opt)
        x, y = data(12, seed=20 + k)

        def closure(x=x, y=y):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        opt.step(closure)
        model.zero_grad()
    return matrices(model)


@pytest.mark.covering
@pytest.mark.parametrize("how", SPOILS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_pass_whose_gradient_is_dropped_never_happened(preset, how):
    # gradients that began as zeros take the dense product: the same numbers in another order
    tolerance = 1e-11 if "zeros" in how else 1e-14
    assert_same(train(PRESETS[preset], SPOILS[how]), train(PRESETS[preset]), tolerance)


@pytest.mark.parametrize("preset", some(PLAIN, *FEW))
def test_the_passes_after_a_drop_are_averaged_and_those_before_are_not(preset):
    options = {"loss_scale": 1 / 12} if preset in SCALED else {}
    ends = []
    for spoil in (False, True):
        model = net()
        opt = PLAIN[preset](model, **options)
        if spoil:
            drop_between(model, opt)
        x, y = data(12)
        for piece in (slice(0, 5), slice(5, 12)):
            (F.cross_entropy(model(x[piece]), y[piece], reduction="sum") / 12).backward()
        opt.step()
        ends.append(matrices(model))
    assert_same(ends[1], ends[0], 1e-14)


@pytest.mark.parametrize("preset", some(ALONE, "kfac", "tengrad"))
def test_a_layer_whose_own_gradient_is_dropped_forgets_alone(preset):
    """The head's first gradient is dropped: the head counts the second pass, the body both."""
    options = {"loss_scale": 1 / 12} if preset in SCALED else {}
    x, y = data(12)

    def run(drop, *pieces):
        model = net()
        opt = PLAIN[preset](model, **options)
        for piece in pieces:
            (F.cross_entropy(model(x[piece]), y[piece], reduction="sum") / 12).backward()
            if drop:
                model[4].zero_grad()
                drop = False
        opt.step()
        return matrices(model)

    first, second = slice(0, 5), slice(5, 12)
    found, both, last = run(True, first, second), run(False, first, second), run(False, second)
    assert_same(found[:2], both[:2], 1e-13)
    assert_same(found[2:], last[2:], 1e-13)


@pytest.mark.covering
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("preset", some(PLAIN, *FEW))
def test_a_discriminator_does_not_notice_the_generator_s_steps(preset, frozen):
    def run(generator_steps):
        made, model = net(seed=3, widths=(3, 5, 4)), net()
        opt = PLAIN[preset](model, **({"loss_scale": 1 / 24} if preset in SCALED else {}))
        for k in range(2):
            opt.zero_grad()
            real, y = data(12, seed=k)
            fake = made(data(12, seed=10 + k, widths=(3, 3))[0])
            (F.cross_entropy(model(real), y) / 2 + F.cross_entropy(model(fake.detach()), 0 * y) / 2).backward()
            opt.step()
            if generator_steps:
                for p in model.parameters():
                    p.requires_grad_(not frozen)
                F.cross_entropy(model(fake), 0 * y + 1).backward()
                assert made[0].weight.grad.norm() > 0
                made.zero_grad()
                for p in model.parameters():
                    p.requires_grad_(True)
        return matrices(model)

    assert_same(run(True), run(False), 1e-14)


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(2, 3, batch_first=True)

    def forward(self, x):
        return self.lstm(x.unflatten(1, (2, 2)))[0][:, -1]


@pytest.mark.covering
@pytest.mark.filterwarnings("ignore:layers 'lstm' have no structure")
@pytest.mark.parametrize("preset", ["kfac", "exact", "tengrad"])
@pytest.mark.parametrize("how", ["model.zero_grad", "saliency"])
def test_dropped_passes_of_layers_without_structure_never_happened(preset, how):
    ends = []
    for spoil in (False, True):
        model = Sequence().double()
        opt = PLAIN[preset](model)
        for k in range(2):
            x, y = data(12, seed=k)
            if spoil and how == "saliency":
                saliency_of = x.clone().requires_grad_()
                torch.autograd.grad(model(saliency_of).sum(), saliency_of)
            elif spoil:
                F.cross_entropy(model(5 * x), y).backward()
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
        ends.append([p.detach() for p in model.parameters()])
    assert_same(ends[1], ends[0], 1e-14)


# ---- several backwards of one forward ------------------------------------------------------------------------------


W1, W2 = torch.linspace(0.1, 0.9, 12, dtype=torch.float64), torch.linspace(2.0, 0.5, 12, dtype=torch.float64)


def two_losses(model, opt, x, y):
    each = F.cross_entropy(model(x), y, reduction="none")
    (W1 * each).mean().backward(retain_graph=True)
    (W2 * each).mean().backward()


def graph_never_freed(model, opt, x, y):
    each = F.cross_entropy(model(x), y, reduction="none")
    model.kept = each  # the graph outlives the step
    (W1 * each).mean().backward(retain_graph=True)
    (W2 * each).mean().backward(retain_graph=True)


def saliency_first(model, opt, x, y):
    x = x.clone().requires_grad_()
    z = model(x)
    torch.autograd.grad(z.sum(), x, retain_graph=True)
    ((W1 + W2) * F.cross_entropy(z, y, reduction="none")).mean().backward()


def dropped_first(model, opt, x, y):
    each = F.cross_entropy(model(x), y, reduction="none")
    (7 * W1 * each).mean().backward(retain_graph=True)
    opt.zero_grad()
    ((W1 + W2) * each).mean().backward()


def by_hand(model, opt, x, y):
    loss = ((W1 + W2) * F.cross_entropy(model(x), y, reduction="none")).mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for p, g in zip(model.parameters(), gradients, strict=True):
        p.grad = g


def by_hand_and_then_backward(model, opt, x, y):
    loss = ((W1 + W2) * F.cross_entropy(model(x), y, reduction="none")).mean()
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    loss.backward()


def inputs_named(model, opt, x, y):
    loss = ((W1 + W2) * F.cross_entropy(model(x), y, reduction="none")).mean()
    loss.backward(inputs=list(model.parameters()))


def create_graph(model, opt, x, y):
    loss = ((W1 + W2) * F.cross_entropy(model(x), y, reduction="none")).mean()
    loss.backward(create_graph=True)


def layer_by_layer(model, opt, x, y):
    loss = ((W1 + W2) * F.cross_entropy(model(x), y, reduction="none")).mean()
    loss.backward(inputs=list(model[0].parameters()), retain_graph=True)
    loss.backward(inputs=[p for i in (2, 4) for p in model[i].parameters()])


WAYS = {
    f.__name__: f
    for f in (
        two_losses, graph_never_freed, saliency_first, dropped_first, by_hand, by_hand_and_then_backward,
        inputs_named, create_graph, layer_by_layer,
    )
}  # fmt: skip


def by_brute_force(preset, x, y):
    """The first step by dense float64 matrices: example n has the loss (w₁ + w₂) ce and its score."""
    model = net()
    c, n = W1 + W2, len(x)
    layers = [(a, g * c[None, :, None]) for a, g in moments(model, x, scores(y))]
    steps = []
    for a, g in layers:
        gradient = g[0].T @ a / n
        if preset == "kfac-empirical":
            A, G = factors([(a, g)], n)[0]
            A, G = damped_pair(A, G, 0.1**0.5)
            steps.append(-0.1 * torch.linalg.inv(G) @ gradient @ torch.linalg.inv(A))
            continue
        rows = (g[0][:, :, None] * a[:, None, :]).flatten(1)
        if preset == "tengrad":
            F_ii = rows.T @ rows / n + 0.1 * eye(rows.shape[1])
            steps.append(-0.01 * torch.linalg.solve(F_ii, gradient.reshape(-1)).reshape(gradient.shape))
            continue
        units = rows.reshape(n, *gradient.shape)
        blocks = torch.einsum("noi,noj->oij", units, units) + 0.1 * eye(a.shape[1])
        steps.append(-0.05 * torch.linalg.solve(blocks, gradient[:, :, None])[:, :, 0])
    return steps


@pytest.mark.covering
@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("preset", SCORES)
def test_scores_of_several_backwards_add_up_as_gradients_do(preset, way):
    model, (x, y) = net(), data(12)
    opt, start = PLAIN[preset](model), matrices(model)
    WAYS[way](model, opt, x, y)
    opt.step()
    assert_same(moved(start, matrices(model)), by_brute_force(preset, x, y), 1e-11)


@pytest.mark.covering
@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("preset", some(PLAIN, *FEW))
def test_several_backwards_of_one_forward_step_like_one(preset, way):
    ends = []
    for run in (inputs_named, WAYS[way]):
        model = net()
        opt = PLAIN[preset](model)
        for k in range(3):
            opt.zero_grad()
            run(model, opt, *data(12, seed=k))
            opt.step()
        ends.append(matrices(model))
    assert_same(ends[1], ends[0], 1e-11)


@pytest.mark.parametrize("preset", some(PLAIN, *FEW))
def test_gradients_of_several_passes_taken_by_hand_are_averaged(preset):
    ends = []
    x, y = data(12)
    for hand in (False, True):
        model = net()
        opt = PLAIN[preset](model, **({"loss_scale": 1 / 12} if preset in SCALED else {}))
        total = [torch.zeros_like(p) for p in model.parameters()]
        for piece in (slice(0, 5), slice(5, 12)):
            loss = F.cross_entropy(model(x[piece]), y[piece], reduction="sum") / 12
            if hand:
                total = [t + g for t, g in zip(total, torch.autograd.grad(loss, list(model.parameters())), strict=True)]
            else:
                loss.backward()
        if hand:
            for p, g in zip(model.parameters(), total, strict=True):
                p.grad = g
        opt.step()
        ends.append(matrices(model))
    assert_same(ends[1], ends[0], 1e-12)


@pytest.mark.parametrize("preset", some(PLAIN, *FEW))
def test_a_gradient_taken_by_hand_to_look_at_is_no_pass(preset):
    def look(model, opt):
        torch.autograd.grad(other_loss(model), list(model.parameters()))

    assert_same(train(PLAIN[preset], look), train(PLAIN[preset]), 1e-14)


# ---- what does not count costs nothing -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["saliency", "generator"])
def test_what_leaves_no_gradient_draws_no_labels(how):
    model = net()
    opt = optim.KFAC.paper(model, "categorical", **FIXED)
    state = opt.generator.get_state()
    SPOILS[how](model, opt)
    assert torch.equal(opt.generator.get_state(), state)
    other_loss(model).backward()
    assert not torch.equal(opt.generator.get_state(), state)


@pytest.mark.parametrize("run", [saliency, look_and(lambda model, opt: None)])
def test_a_freed_graph_is_not_kept_while_the_output_lives(run):
    model = net()
    opt = optim.KFAC.paper(model, "categorical", **FIXED)
    seen = []
    model.register_forward_hook(lambda module, args, z: seen.append(z))
    model[2].register_forward_hook(lambda module, args, z: seen.append(weakref.ref(args[0])))
    run(model, opt)
    gc.collect()
    assert seen[0]() is None  # the input of a layer
    assert seen[1].grad_fn is not None


# ---- two optimizers, batches that are skipped ----------------------------------------------------------------------


def joined(model, own, make):
    groups = [{"params": [p for i in own for p in model[i].parameters()]}]
    groups += [{"params": [p for i in {0, 2, 4} - set(own) for p in model[i].parameters()], "approximation": "none"}]
    groups[1]["lr"] = 0.0
    return make(model, params=groups)


@pytest.mark.covering
@pytest.mark.parametrize("head", some((name for name in PLAIN if "sub-sampled" not in name), "kfac", "cw-ngd", "exact"))
@pytest.mark.parametrize("body", ["kfac", "foof", "tengrad", "kfac-empirical"])
def test_two_optimizers_on_one_model_step_as_if_alone(head, body):
    """All but sub-sampled ones, which look at the model again when they step."""
    x, y = data(12)

    def run(*parts):
        model = net()
        opts = [joined(model, own, PLAIN[name]) for own, name in parts]
        for k in range(2):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if k == 1:  # both steps from the same weights
                for opt in opts:
                    opt.step()
        return matrices(model)

    mine, theirs = ([4], head), ([0, 2], body)
    alone = run(theirs)[:2] + run(mine)[2:]
    for order in ((mine, theirs), (theirs, mine)):
        assert_same(run(*order), alone, 1e-14)


@pytest.mark.parametrize("preset", ["foof", "kfac", "exact", "sub-sampled"])
def test_a_batch_that_a_scaler_skips_is_as_if_left_out(preset):
    ends = []
    for scaled in (False, True):
        model = net().float()
        opt = PLAIN[preset](model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for k in range(4):
            x, y = data(12, seed=k)
            if k == 1 and not scaled:
                continue
            opt.zero_grad()
            scaler.scale(F.cross_entropy(model(x.float() * (float("inf") if k == 1 else 1.0)), y)).backward()
            scaler.step(opt)
            scaler.update()
        ends.append(matrices(model))
    assert_same(ends[1], ends[0], 1e-5)


@pytest.mark.parametrize("preset", ["foof", "kfac"])
def test_a_forward_that_overflows_in_half_precision_is_skipped_by_the_scaler(preset):
    model = net().float()
    opt = PLAIN[preset](model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for k in range(4):
        x, y = data(12, seed=k)
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            z = model(x.float() * (1e30 if k == 1 else 1.0))
        scaler.scale(F.cross_entropy(z.float(), y)).backward()
        scaler.step(opt)
        scaler.update()
    assert opt.k == 3
    assert scaler.get_scale() == 2.0**9
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("preset", some(PLAIN, *FEW))
def test_a_batch_with_nan_whose_gradient_is_in_the_step_raises(preset):
    model = net()
    opt = PLAIN[preset](model)
    x, y = data(12)
    F.cross_entropy(model(x), y).backward()
    x[0, 0] = float("nan")
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match="NaN or infinite for 1 of 24 examples"):
        opt.step()


# ---- losses and outputs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [optim.TENGraD.paper, optim.CWNGD.paper, optim.KBFGS])
def test_a_summed_loss_has_the_scale_one(make):
    """The sum's gradient is N times the mean's, the Fisher is the same: so is the step of a linear rule."""
    moves = []
    for reduction in ("mean", "sum"):
        model, loss, (x, y) = net(), nn.CrossEntropyLoss(reduction=reduction), data(12)
        opt = make(model, loss, damping=0.1)
        start = matrices(model)

        def closure(model=model, loss=loss, x=x, y=y):
            value = loss(model(x), y)
            value.backward()
            return value

        opt.step(closure)
        moves.append([m / (12 if reduction == "sum" else 1) for m in moved(start, matrices(model))])
    assert_same(moves[1], moves[0], 1e-12)


@dataclass
class Made:
    loss: torch.Tensor | None
    logits: torch.Tensor


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x, y=None):
        z = self.net(x)
        return Made(None if y is None else F.cross_entropy(z, y), z)


def test_a_model_that_returns_a_dataclass_trains_as_one_that_returns_a_tensor():
    model, plain, (x, y) = Wrapped(), net(), data()
    opt, reference = PLAIN["foof"](model, output=lambda out: out.logits), PLAIN["foof"](plain)
    F.cross_entropy(model(x).logits, y).backward()
    F.cross_entropy(plain(x), y).backward()
    opt.step(), reference.step()
    assert_same(matrices(model.net), matrices(plain), 1e-15)


def test_a_loss_computed_inside_forward_is_named():
    model, (x, y) = Wrapped(), data()
    opt = PLAIN["foof"](model, output=lambda out: out.logits)
    model(x, y).loss.backward()
    with pytest.raises(RuntimeError, match=r"output= picks .*not inside forward.*without labels"):
        opt.step()


# ---- life time -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", some(PRESETS, "kfac", "tengrad", "kbfgs", "hessian-free"))
def test_a_replaced_optimizer_is_gone_at_once(preset):
    model, (x, y) = net(), data()
    opt = PRESETS[preset](model)

    def closure():
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    gc.collect()
    gc.disable()
    try:
        opt.step(closure)
        F.cross_entropy(model(x), y).backward()
        dead = weakref.ref(opt)
        del opt
        assert dead() is None
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    finally:
        gc.enable()


def test_a_copied_model_sheds_the_hooks_when_it_first_runs():
    model, (x, _) = net(), data()
    _opt = PLAIN["kfac"](model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    for module in twin.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_hooks_with_kwargs
    assert model._forward_hooks
