"""Steps whose gradient is that of no Fisher of examples, which have to say so, and losses that hold derivatives."""

# ruff: noqa: D103 - a loop's name says what it does

from __future__ import annotations

import contextlib
import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.trust.loops.trial import Trial, ce, loop


@loop("must be said")
def a_backward_in_evaluation_mode(t: Trial) -> None:
    t.cannot_be()
    t.train(*t.batch())
    t.model.eval()
    t.loss(*t.batch()).backward()
    t.model.train()
    t.step()


@loop("must be said")
def dropped_and_then_a_backward_in_evaluation_mode(t: Trial) -> None:
    t.cannot_be()
    t.train(*t.batch())
    t.opt.zero_grad()
    t.model.eval()
    t.loss(*t.batch()).backward()
    t.model.train()
    t.step()


@loop("must be said")
def a_module_called_by_itself(t: Trial) -> None:
    t.cannot_be()
    t.train(*t.batch())
    t.model[0](t.batch()[0]).square().mean().backward()
    t.step()


@loop("must be said")
def a_module_called_by_itself_in_the_same_loss(t: Trial) -> None:
    t.cannot_be()
    x, y = t.batch()
    t.counts(x, ce(y))
    (t.loss(x, y) + t.model[0](t.batch()[0]).square().mean()).backward()
    t.step()


@loop("must be said")
def a_gradient_kept_from_the_last_step(t: Trial) -> None:
    t.train(*t.batch())
    t.step()
    t.cannot_be()
    t.train(*t.batch())
    t.step()


@loop("must be said")
def a_second_step_with_the_same_gradient(t: Trial) -> None:
    t.train(*t.batch())
    t.step()
    t.cannot_be()
    t.step()


@loop("must be said")
def other_weights_in_the_model_s_place(t: Trial) -> None:
    t.cannot_be()
    fast = {k: 0.5 * p for k, p in t.model.named_parameters()}
    x, y = t.batch()
    F.cross_entropy(torch.func.functional_call(t.model, fast, (x,)), y).backward()
    t.counts(x, ce(y))
    t.step()


@loop("must be said")
def an_inner_step_that_is_differentiated(t: Trial) -> None:
    t.cannot_be()
    own = dict(t.model.named_parameters())
    x, y = t.batch()
    inner = F.cross_entropy(torch.func.functional_call(t.model, own, (x,)), y)
    g = torch.autograd.grad(inner, list(own.values()), create_graph=True)
    fast = {k: p - 0.1 * h for (k, p), h in zip(own.items(), g, strict=True)}
    x, y = t.batch()
    t.counts(x, ce(y))
    F.cross_entropy(torch.func.functional_call(t.model, fast, (x,)), y).backward()
    t.step()


@loop("must be said")
def a_copy_s_gradients_assigned(t: Trial) -> None:
    t.cannot_be()
    twin = copy.deepcopy(t.model)
    x, y = t.batch()
    F.cross_entropy(twin(x), y).backward()
    t.counts(x, ce(y))
    for p, q in zip(t.model.parameters(), twin.parameters(), strict=True):
        p.grad = q.grad
    t.step()


@loop("must be said")
def a_backward_that_fails_midway(t: Trial) -> None:
    def fail(g: Tensor) -> None:
        raise KeyError("mine")

    handle = t.model[0].weight.register_hook(fail)
    with contextlib.suppress(KeyError):
        t.loss(*t.batch()).backward()
    assert t.model[4].weight.grad is not None
    handle.remove()
    t.cannot_be()
    t.train(*t.batch())
    t.step()


@loop("must be said")
def a_nan_whose_gradient_is_in_the_step(t: Trial) -> None:
    t.cannot_be()
    t.train(*t.batch())
    x, y = t.batch()
    x[0, 0] = float("nan")
    t.loss(x, y).backward()
    t.step()


@loop("must be said")
def a_penalty_with_a_backward_of_its_own(t: Trial) -> None:
    t.cannot_be()
    t.train(*t.batch())
    sum(p.square().sum() for p in t.model.parameters()).backward()
    t.step()


@loop("derivatives in the loss")
def a_gradient_penalty_on_other_inputs(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        x, y = t.batch()
        other = t.batch()[0].requires_grad_()
        t.counts(x, ce(y))
        (g,) = torch.autograd.grad(t.model(other).sum(), other, create_graph=True)
        (t.loss(x, y) + (g.norm(dim=1) - 1).square().mean()).backward()
        t.step()


@loop("derivatives in the loss")
def a_gradient_penalty_on_the_same_inputs(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        x, y = t.batch()
        seen = x.clone().requires_grad_()
        t.counts(x, ce(y))
        loss = t.loss(seen, y)
        (g,) = torch.autograd.grad(loss, seen, create_graph=True)
        (loss + g.square().sum()).backward()
        t.step()
