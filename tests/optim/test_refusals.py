"""What the optimizers refuse with a sentence, or say once, instead of failing bare or stepping wrongly in silence."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F

from fisherviz import optim
from fisherviz.optim.options import keywords
from tests.optim.test_saved_states import ALL, entries
from tests.oracles.steps import closure_of, data, net


@pytest.mark.parametrize("name", sorted(ALL.keys() - {"kfac"}))  # whose None is its default
def test_no_damping_at_all_is_not_none(name):
    with pytest.raises((TypeError, ValueError), match=r"damping must be a .*number.*got None"):
        ALL[name](net(), "categorical", damping=None)


def test_a_group_needs_a_damping_too():
    model = net()
    with pytest.raises(TypeError, match="damping must be a number"):
        optim.FOOF(model, "categorical", params=[{"params": model.parameters(), "damping": None}])


@pytest.mark.parametrize(("value", "error"), [("a", TypeError), (True, TypeError), (-1.0, ValueError)])
def test_loss_scale_is_a_positive_number(value, error):
    with pytest.raises(error, match="loss_scale must be"):
        optim.CWNGD(net(), "categorical", loss_scale=value)


def test_kbfgs_without_a_layer_has_no_use_for_data():
    model, (x, y) = net(), data()
    group = {"params": list(model.parameters()), "approximation": "none"}
    with pytest.raises(ValueError, match="leave data out"):
        optim.KBFGS(model, "categorical", data=[x], params=[dict(group)])
    opt = optim.KBFGS(model, "categorical", params=[group], lr=0.1)
    before = model[0].weight.detach().clone()
    opt.step(closure_of(opt, model, x, y))
    assert torch.allclose(model[0].weight, before - 0.1 * model[0].weight.grad, atol=1e-15)


@pytest.mark.parametrize("name", ALL)
def test_copies_and_pickles_go_by_state_dict_and_the_model_alone_still_copies(name):
    model, (x, y) = net(), data()
    opt = ALL[name](model, "categorical")
    for attempt in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match=r"use state_dict\(\)"):
            attempt(opt)
    with pytest.raises(TypeError, match=r"use state_dict\(\)"):
        copy.deepcopy((model, opt))
    F.cross_entropy(model(x), y).backward()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    F.cross_entropy(twin(x), y).backward()
    assert torch.equal(twin[0].weight.grad, model[0].weight.grad)


def without(state, key):
    return {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize("name", ALL)
def test_states_that_are_none_are_refused_and_change_nothing(name):
    model, (x, y) = net(), data()
    opt = ALL[name](model, "categorical")
    opt.step(closure_of(opt, model, x, y))
    state = opt.state_dict()
    other = ALL[name](net(), "categorical")
    own = state["fisherviz"]
    for wrong in (3, None, {}, {"fisherviz": None}, without(state, "fisherviz"), without(state, "param_groups")):
        with pytest.raises(ValueError, match="state"):
            other.load_state_dict(wrong)
    for wrong in ({}, without(own, "moments"), without(own, "k")):
        with pytest.raises(ValueError, match="lacks"):
            other.load_state_dict(state | {"fisherviz": wrong})
    narrow = ALL[name](net(widths=(4, 6, 3, 3)), "categorical")
    with pytest.raises(ValueError, match=r"another network: parameter '0.weight'"):
        narrow.load_state_dict(state)
    assert other.k == 0
    other.load_state_dict(state)
    assert other.k == 1


def test_damaged_statistics_are_refused():
    model, (x, y) = net(), data()
    opt = optim.FOOF(model, "categorical")
    opt.step(closure_of(opt, model, x, y))
    state = opt.state_dict()
    own = state["fisherviz"]
    with pytest.raises(ValueError, match="cannot be read"):
        opt.load_state_dict(state | {"fisherviz": own | {"moments": {}}})


@pytest.mark.parametrize("name", ["cw-ngd", "tengrad", "kbfgs"])
@pytest.mark.parametrize("scale", [None, 1 / 12])
def test_accumulation_without_loss_scale_is_said_once(name, scale):
    model, (x, y) = net(), data(12)
    opt = ALL[name].paper(model, "categorical", loss_scale=scale)

    def closure():
        opt.zero_grad()
        for piece in (slice(0, 5), slice(5, 12)):
            (F.cross_entropy(model(x[piece]), y[piece], reduction="sum") / 12).backward()
        return 0.0

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            opt.step(closure)
    assert sum("averages 2 passes" in str(w.message) for w in said) == (scale is None)


@pytest.mark.parametrize("name", ["cw-ngd", "ekfac"])
def test_nothing_is_said_of_one_pass_or_of_sampled_labels(name):
    model, (x, y) = net(), data(12)
    opt = ALL[name](model, "categorical")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2 if name == "ekfac" else 1):
            F.cross_entropy(model(x), y).backward()
        opt.step()


@pytest.mark.covering
@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
@pytest.mark.parametrize("name", ALL)
def test_a_batch_with_nan_is_named_and_does_not_poison_the_next(name, likelihood):
    model, (x, _) = net(), data()
    opt = ALL[name](model, likelihood)

    def step(x):
        def closure():
            opt.zero_grad()
            loss = model(x).square().sum() / 24
            loss.backward()
            return loss

        opt.step(closure)

    step(x)
    bad = x.clone()
    bad[3] = float("nan")
    with pytest.raises(ValueError, match=r"at step 2, .* NaN or infinite for 1 of 12 .* lower lr or raise damping"):
        step(bad)
    step(x)
    assert opt.k == 2
    assert all(bool(p.isfinite().all()) for p in model.parameters())


SPOILED = {
    "NaN in the loss": lambda loss, model: (loss * float("nan")).backward(),
    "an infinite loss": lambda loss, model: (loss / 0.0).backward(),
    "one entry by hand": lambda loss, model: (loss.backward(), model[0].weight.grad[0, 0].fill_(torch.inf)),
    "in a bias": lambda loss, model: (loss.backward(), model[-1].bias.grad[-1].fill_(torch.nan)),
}


@pytest.mark.covering
@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
@pytest.mark.parametrize("name", ALL)
def test_a_gradient_that_is_not_finite_moves_nothing_and_does_not_poison_the_next(name, spoil):
    model, (x, y) = net(), data()
    opt = ALL[name](model, "categorical")
    good = closure_of(opt, model, x, y)
    opt.step(good)
    weights, state = copy.deepcopy(list(model.parameters())), entries(opt.state_dict())

    def bad():
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        spoil(loss, model)
        return loss

    with pytest.raises(ValueError, match=r"the gradient of '.*' is NaN or infinite at step 2, and nothing has moved"):
        opt.step(bad)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    now = entries(opt.state_dict())
    assert now.keys() == state.keys()
    for place, before in state.items():
        same = torch.equal(now[place], before) if isinstance(before, torch.Tensor) else now[place] == before
        assert same, place
    opt.step(good)
    assert opt.k == 2
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_gradient_that_is_not_finite_stops_plain_groups_too():
    model, (x, y) = net(), data()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "approximation": "none"}]
    opt = optim.FOOF(model, "categorical", params=groups)
    F.cross_entropy(model(x), y).backward()
    model[2].weight.grad[0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"the gradient of .* is NaN or infinite at step 1"):
        opt.step()
    assert all(torch.equal(p, before[key]) for key, p in model.state_dict().items())


def test_gradients_whose_sum_overflows_are_finite():
    model, (x, y) = net(), data()
    opt = optim.NaturalGradient(model, "categorical", "diagonal", lr=1e-30, damping=1.0)
    F.cross_entropy(model(x), y).backward()
    model[0].weight.grad.fill_(2e38)
    opt.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.covering
@pytest.mark.parametrize("name", ALL)
def test_a_batch_of_no_examples_changes_nothing_and_the_next_is_as_if_it_had_not_been(name):
    steps = []
    for empty in (False, True):
        torch.manual_seed(0)
        model, (x, y) = net(), data()
        opt = ALL[name](model, "categorical")
        if empty:
            before = copy.deepcopy(model.state_dict())
            none = x[:0], y[:0]
            opt.zero_grad()
            F.cross_entropy(model(none[0]), none[1], reduction="sum").backward()
            opt.zero_grad()
            assert all(torch.equal(p, before[key]) for key, p in model.state_dict().items())
        opt.step(closure_of(opt, model, x, y))
        steps.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*steps, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ALL)
def test_a_step_of_a_batch_of_no_examples_is_no_error(name):
    model, (x, y) = net(), data()
    opt = ALL[name](model, "categorical", **({"weight_decay": 0.0} if name == "kfac" else {}))

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(model(x[:0]), y[:0], reduction="sum")
        loss.backward()
        return loss

    before = copy.deepcopy(model.state_dict())
    opt.step(closure)
    assert all(torch.equal(p, before[key]) for key, p in model.state_dict().items())


WRONG = {"lr", "momentum", "weight_decay", "decay", "T", "samples", "kind", "loss_scale", "output", "params"} | {
    "inverse", "rescale", "adapt", "heuristic_damping", "T1", "T2", "tau1", "tau2", "omega1", "omega2", "gamma_by",
    "tolerance", "memory", "carry", "iterations", "structure", "pair_decay", "powell", "ramp", "reduction",
    "ownership",
}  # fmt: skip


@pytest.mark.parametrize("make", [*ALL.values(), optim.NaturalGradient])
def test_options_of_a_wrong_type_are_named(make):
    needed = {"lr": 0.1, "damping": 0.1} if make is optim.NaturalGradient else {}
    options = WRONG & set(keywords(make))
    assert len(options) > 5
    for name in options:
        for value in ("a", object(), torch.ones(2), float("nan")):
            with pytest.raises((TypeError, ValueError), match=f"^{name} must be "):
                make(net(), "categorical", **needed | {name: value})


@pytest.mark.parametrize("option", ["lr", "momentum", "weight_decay"])
def test_a_group_with_a_wrong_number_is_refused(option):
    model = net()
    with pytest.raises(ValueError, match=f"^{option} must be a number"):
        optim.FOOF(model, "categorical", params=[{"params": model.parameters(), option: "a"}])


@pytest.mark.parametrize("make", [optim.CWNGD, optim.EKFAC, optim.TENGraD, optim.KFAC, optim.HessianFree, optim.KSD])
def test_no_kind_is_not_sampled_labels(make):
    with pytest.raises(ValueError, match=r"kind must be one of .*got None"):
        make(net(), "categorical", kind=None)


def plain_first(model, **plain):
    rest = [*model[2].parameters(), *model[4].parameters()]
    return [{"params": list(model[0].parameters()), "approximation": "none"} | plain, {"params": rest}]


@pytest.mark.parametrize("make", [optim.KFAC, optim.HessianFree, optim.KSD])
def test_a_plain_group_keeps_its_own_lr_and_weight_decay_beside_adaptive_steps(make):
    steps = []
    x, y = data()
    for lr in (0.05, 0.0):
        model = net()
        opt = make(model, "categorical", params=plain_first(model, lr=lr, weight_decay=0.1), weight_decay=1e-5)
        before = [p.detach().clone() for p in model.parameters()]
        opt.step(closure_of(opt, model, x, y))
        for p, old in zip(model[0].parameters(), before, strict=False):
            assert torch.allclose(p, old - lr * (p.grad + 0.1 * old), atol=1e-15)
        steps.append([p.detach() - old for p, old in zip(model.parameters(), before, strict=True)][2:])
    assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))  # the plain lr touches the plain group alone
    assert steps[0][0].abs().max() > 0


def test_lambda_is_adjusted_by_the_quadratic_models_own_step():
    x, y = data()
    ratios = []
    for lr in (0.5, 0.0):
        model = net()
        opt = optim.KFAC(model, "categorical", params=plain_first(model, lr=lr), T1=1, damping=1.0)
        opt.step(closure_of(opt, model, x, y))
        ratios.append(opt.last["rho"])
    assert ratios[0] == ratios[1]


def test_preconditioned_groups_still_share_one_lr():
    model = net()
    groups = plain_first(model, lr=0.05)
    groups[1]["lr"] = 0.5
    with pytest.raises(ValueError, match="only a group with approximation='none' may have its own"):
        optim.KFAC(model, "categorical", params=groups)


RETURNED = {"nothing": lambda loss: None, "a pair": lambda loss: (loss, 1), "text": lambda loss: "1.5"} | {
    "several": lambda loss: loss.repeat(2)
}


@pytest.mark.parametrize("returned", RETURNED)
@pytest.mark.parametrize("make", [optim.KFAC, optim.HessianFree, optim.KSD])
def test_a_closure_that_returns_no_number_is_refused_before_the_step(make, returned):
    (x, y), steps = data(), []
    for first in (True, False):
        model = net()
        opt = make(model, "categorical")
        closure = closure_of(opt, model, x, y)
        if first:
            with pytest.raises(TypeError, match="step's closure must return its loss, one number"):
                opt.step(lambda closure=closure: RETURNED[returned](closure()))
            assert opt.k == 0
        opt.step(closure)
        steps.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*steps, strict=True))


def test_a_closure_whose_loss_nobody_compares_may_return_nothing():
    model, (x, y) = net(), data()
    for make in (optim.FOOF, optim.KBFGS):
        opt = make(model, "categorical")
        closure = closure_of(opt, model, x, y)
        assert opt.step(lambda closure=closure: closure() and None) is None
