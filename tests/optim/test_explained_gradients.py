"""What no pass explains in a step's gradient is said, and what no gradient of the step has is in no Fisher."""

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherviz as fv
from fisherviz import optim
from tests.oracles.steps import assert_same, data, matrices, moved, net

MAKE = {
    "foof": lambda m: optim.FOOF.paper(m, "categorical"),
    "exact": lambda m: optim.NaturalGradient(m, "categorical", lr=0.1, damping=0.1, decay=0.0),
    "cw-ngd": lambda m: optim.CWNGD.paper(m, "categorical", lr=0.05, damping=0.1, kind="exact"),
    "tengrad": lambda m: optim.TENGraD.paper(m, "categorical"),
}


def backward(model, seed=0, N=12):
    x, y = data(N, seed=seed)
    F.cross_entropy(model(x), y).backward()


def evaluation_mode(model):
    model.eval()
    backward(model, 1)
    model.train()


def alone(model):
    model[2](torch.ones(4, 5, dtype=torch.float64)).square().sum().backward()


def failing(model):
    def fail(gradient):
        raise KeyError("the user's own")

    handle = model[0].weight.register_hook(fail)
    with pytest.raises(KeyError):
        backward(model, 1)
    handle.remove()


def penalty(model):
    sum(p.square().sum() for p in model.parameters()).backward()


@pytest.mark.covering
@pytest.mark.parametrize("other", [evaluation_mode, alone, failing, penalty])
@pytest.mark.parametrize("name", MAKE)
def test_a_gradient_that_is_in_no_fisher_is_named(name, other):
    model = net()
    opt = MAKE[name](model)
    other(model)
    backward(model)
    with pytest.warns(UserWarning, match=r"gradient of the layers '.*' comes from no pass that the Fisher is of"):
        opt.step()
    model.zero_grad()
    backward(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()


def test_only_the_layers_that_have_it_are_named():
    model = net()
    opt = MAKE["foof"](model)
    backward(model)
    alone(model)
    with pytest.warns(UserWarning, match=r"gradient of the layers '2' comes from no pass"):
        opt.step()


@pytest.mark.parametrize("name", MAKE)
def test_gradients_that_the_last_step_had_already_are_named(name):
    model = net()
    opt = MAKE[name](model)
    backward(model)
    opt.step()
    backward(model, 1)
    with pytest.warns(UserWarning, match=r"'0', '2', '4' hold those of the last step.*zero_grad\(\) after each step"):
        opt.step()


@pytest.mark.parametrize("zero", [lambda o: o.zero_grad(), lambda o: o.zero_grad(set_to_none=False)])
def test_ordinary_training_says_nothing(zero):
    model = net()
    opt = MAKE["foof"](model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(4):
            zero(opt)
            backward(model, k)
            backward(model, k + 10)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            opt.step()


@pytest.mark.parametrize("name", MAKE)
def test_a_forward_with_other_weights_is_no_pass(name):
    model = net()
    opt = MAKE[name](model)
    x, y = data()
    fast = {key: 0.5 * p for key, p in model.named_parameters()}
    F.cross_entropy(torch.func.functional_call(model, fast, (x,)), y).backward()
    with pytest.raises(RuntimeError, match=r"with the optimizer's own parameters.*functional_call with other weights"):
        opt.step()


def stepped(name, prepare):
    model = net()
    opt, start = MAKE[name](model), matrices(model)
    prepare(model, opt)
    opt.step()
    return moved(start, matrices(model))


def assigned(model, seed=0):
    x, y = data(seed=seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p, g in zip(parameters, torch.autograd.grad(F.cross_entropy(model(x), y), parameters), strict=True):
        p.grad = g


@pytest.mark.parametrize("name", MAKE)
def test_gradients_assigned_by_hand_after_a_drop_have_their_own_fisher(name):
    def dropped_first(model, opt):
        backward(model, 5, N=9)
        opt.zero_grad()
        assigned(model)

    assert_same(stepped(name, dropped_first), stepped(name, lambda model, opt: assigned(model)), 1e-14)


@pytest.mark.parametrize("name", MAKE)
def test_a_step_of_zeros_counts_no_pass(name):
    """The averages are those of the passes whose gradient was in a step."""
    model = net()
    opt, start = MAKE[name](model), matrices(model)
    backward(model)
    opt.zero_grad(set_to_none=False)
    opt.step()
    assert all(torch.equal(one, two) for one, two in zip(matrices(model), start, strict=True))
    assert all(s.total is None for named in opt.moments.average for s in named.values())


@pytest.mark.parametrize("make", [optim.KFAC, optim.HessianFree])
def test_a_look_by_autograd_grad_is_not_in_the_quadratic_model_of_a_net_with_a_frozen_layer(make):
    ends = []
    for look in (False, True):
        model = net()
        model[0].requires_grad_(False)
        opt = make(model, "categorical", kind="exact")
        x, y = data()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if look:
            mine = [p for p in model.parameters() if p.requires_grad]
            torch.autograd.grad(F.cross_entropy(model(9 * x), y), mine)
        opt.step(lambda loss=loss: loss)
        ends.append(matrices(model))
    assert_same(ends[1], ends[0], 1e-14)


@pytest.mark.parametrize("name", MAKE)
def test_hooks_on_parameters_change_gradients_and_not_the_fisher(name):
    def hooked(model, opt):
        for p in model.parameters():
            p.register_hook(lambda gradient: 3 * gradient + 0.01)
        backward(model)

    def changed(model, opt):
        backward(model)
        for p in model.parameters():
            p.grad = 3 * p.grad + 0.01

    assert_same(stepped(name, hooked), stepped(name, changed), 1e-13)


def test_hooks_on_parameters_do_not_change_what_a_probe_sees():
    model, (x, y) = net(), data()
    plain = fv.Probe(model, "categorical").fisher(x, y)
    dense, gradient = plain.to_dense(), plain.gradient()
    calls = []
    for p in model.parameters():
        p.register_hook(lambda g: calls.append(1) or 2 * g)
    hooked = fv.Probe(model, "categorical").fisher(x, y)
    assert torch.equal(hooked.to_dense(), dense)
    assert torch.equal(hooked.gradient(), gradient)
    assert not calls
    backward(model)
    assert len(calls) == 6


def test_a_matrix_over_all_layers_is_over_those_that_step():
    """A layer in the middle is frozen: the inverse is that of the others' block, whose size is theirs alone."""
    model = net()
    opt, start = MAKE["exact"](model), matrices(model)
    model[2].requires_grad_(False)
    x, y = data()
    F.cross_entropy(model(x.requires_grad_()), y).backward()
    opt.step()
    found = moved(start, matrices(model))
    other = net()
    fisher = fv.Probe(other, "categorical", layers=["0", "4"]).fisher(x.detach(), y)
    wanted = torch.linalg.solve(fisher.to_dense() + 0.1 * torch.eye(fisher.shape[0]).double(), fisher.gradient())
    flat = torch.cat([-0.1 * part.reshape(-1) for part in wanted.split([20, 5, 9, 3])])
    mine = torch.cat([part.reshape(-1) for m in (found[0], found[2]) for part in (m[:, :-1], m[:, -1])])
    torch.testing.assert_close(mine, flat, rtol=1e-10, atol=1e-13)


def test_a_sum_over_examples_is_over_those_of_the_layer_s_own_passes():
    x, y = data(12)

    def run(both):
        model = net()
        opt, start = optim.CWNGD.paper(model, "categorical", lr=1.0, damping=0.1, kind="exact"), matrices(model)
        if both:
            model[0].requires_grad_(False)
            F.cross_entropy(model(3 * x), y).backward()
            model[0].requires_grad_(True)
        F.cross_entropy(model(x), y).backward()
        opt.step()
        return moved(start, matrices(model))[:1]

    assert_same(run(True), run(False), 1e-12)


def test_freezing_between_backward_and_step_is_refused_where_the_step_runs_the_model():
    model = net()
    opt = optim.KFAC(model, "categorical", adapt=False)
    backward(model)
    model[0].requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"layer '0' has a gradient.*frozen since the backward"):
        opt.step()


def test_scores_with_derivatives_in_the_loss_are_named_and_sampled_labels_are_not_touched_by_them():
    for kind, said in (("empirical", 1), ("exact", 0)):
        model, (x, y) = net(), data()
        opt = optim.TENGraD.paper(model, "categorical", kind=kind)
        loss = F.cross_entropy(model(x.requires_grad_()), y)
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + g.square().sum()).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opt.step()
        assert sum("derivatives in the loss" in str(w.message) for w in caught) == said


def test_a_loss_of_a_part_of_the_batch_is_named_where_the_likelihood_cannot_tell():
    model, (x, _) = net(), data()
    opt = optim.FOOF.paper(model, "gaussian")
    model(x)[:5].square().mean().backward()
    with pytest.warns(UserWarning, match=r"zero at the outputs of 7 of 12 examples.*run the model on the examples"):
        opt.step()
    opt.zero_grad()
    z = model(x)
    z[:5].square().mean().backward(retain_graph=True)
    z[5:].square().mean().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()


def test_another_thread_s_evaluation_does_not_end_a_pass():
    model, reference = net(), net()
    opt, alone_ = MAKE["foof"](model), MAKE["foof"](reference)
    x, y = data()

    def evaluate(*_):
        other = threading.Thread(target=lambda: model.eval()(2 * x) is None or model.train())
        if threading.current_thread() is threading.main_thread():
            other.start()
            other.join()

    model[1].register_forward_hook(evaluate)
    for one, o in ((model, opt), (reference, alone_)):
        F.cross_entropy(one(x), y).backward()
        o.step()
    assert_same(matrices(model), matrices(reference), 1e-15)


def test_passes_of_several_threads_are_averaged():
    ends = []
    for threads in (False, True):
        model = net()
        opt = MAKE["foof"](model)
        batches = [data(12, seed=k) for k in range(4)]

        def run(x, y, model=model):
            F.cross_entropy(model(x), y).backward()

        if threads:
            started = [threading.Thread(target=run, args=batch) for batch in batches]
            for one in started:
                one.start()
            for one in started:
                one.join()
        else:
            for batch in batches:
                run(*batch)
        opt.step()
        ends.append(matrices(model))
    assert_same(ends[1], ends[0], 1e-12)
