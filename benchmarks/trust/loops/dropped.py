"""Gradients that are dropped before the step, and passes that leave none."""

# ruff: noqa: D103 - a loop's name says what it does

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.trust import dense
from benchmarks.trust.loops.trial import ENTERED, Trial, ce, loop


def dropping(drop: Callable[[Trial], None]) -> Callable[[Trial], None]:
    def run(t: Trial) -> None:
        for _ in range(2):
            x, y = t.batch(9)
            t.loss(5 * x, y).backward()
            drop(t)
            t.train(*t.batch())
            t.step()
            t.opt.zero_grad()

    return run


def assign_None(t: Trial) -> None:
    for p in t.model.parameters():
        p.grad = None


ENTERED["gradients dropped"] = {
    "zero_grad": dropping(lambda t: t.opt.zero_grad()),
    "zeros": dropping(lambda t: t.opt.zero_grad(set_to_none=False)),
    "the model's zero_grad": dropping(lambda t: t.model.zero_grad()),
    "None": dropping(assign_None),
}


@loop("gradients dropped")
def then_the_next_are_taken_by_hand(t: Trial) -> None:
    for _ in range(2):
        x, y = t.batch(9)
        t.loss(5 * x, y).backward()
        t.opt.zero_grad()
        x, y = t.batch()
        t.counts(x, ce(y))
        parameters = list(t.model.parameters())
        for p, g in zip(parameters, torch.autograd.grad(t.loss(x, y), parameters), strict=True):
            p.grad = g
        t.step()
        t.opt.zero_grad()


@loop("gradients dropped")
def and_a_step_of_zeros(t: Trial) -> None:
    t.train(*t.batch())
    t.step()
    x, y = t.batch(9)
    t.loss(5 * x, y).backward()
    t.opt.zero_grad(set_to_none=False)
    t.step()
    t.train(*t.batch())
    t.step()


@loop("gradients dropped")
def a_generator_s_step(t: Trial) -> None:
    generator = nn.Linear(2, dense.WIDTHS[0]).double()
    for frozen in (False, True, False):
        t.opt.zero_grad()
        x, y = t.batch()
        fake = generator(x[:6, :2])
        t.counts(x, ce(y, 0.5))
        t.counts(fake, ce(y[:6] * 0, 0.5))
        (t.loss(x, y) / 2 + t.loss(fake.detach(), y[:6] * 0) / 2).backward()
        t.step()
        t.model.requires_grad_(not frozen)
        t.loss(fake, y[:6] * 0 + 1).backward()
        t.model.requires_grad_(True)


@loop("gradients dropped")
def an_inner_attack_by_backward(t: Trial) -> None:
    for _ in range(2):
        x, y = t.batch()
        near = x.clone()
        for _ in range(3):
            near = near.detach().requires_grad_()
            t.loss(near, y).backward()
            near = near + 0.1 * near.grad.sign()
        t.opt.zero_grad()
        t.train(near.detach(), y)
        t.step()


@loop("gradients dropped")
def a_batch_with_nan_is_skipped(t: Trial) -> None:
    for k in range(4):
        t.opt.zero_grad()
        x, y = t.batch()
        if k == 1:
            x[2, 1] = float("nan")
        loss = t.loss(x, y)
        loss.backward()
        if not loss.isfinite():
            continue
        t.counts(x, ce(y))
        t.step()


@loop("gradients dropped")
def a_batch_is_skipped_and_zeroed_later(t: Trial) -> None:
    for k in range(4):
        t.opt.zero_grad()
        x, y = t.batch()
        if k == 1:
            (100 * t.loss(x, y)).backward()
            continue
        t.train(x, y)
        t.step()


@loop("gradients dropped")
def an_exception_between_backward_and_step(t: Trial) -> None:
    for k in range(3):
        t.opt.zero_grad()
        x, y = t.batch()
        try:
            t.train(x, y)
            if k == 1:
                raise KeyboardInterrupt
            t.step()
        except KeyboardInterrupt:
            t.forget()


@loop("gradients dropped")
def an_exception_in_the_forward(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        x, y = t.batch()
        with contextlib.suppress(RuntimeError):
            t.model(x[:, :-1])
        t.train(x, y)
        t.step()


@loop("passes without a gradient")
def evaluation_in_between(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        x, y = t.batch()
        t.model(5 * x)
        with torch.no_grad():
            t.model(3 * x)
        t.train(x, y)
        t.model.eval()
        t.model(2 * x)
        with torch.inference_mode():
            t.model(3 * x)
        t.model.train()
        t.step()


@loop("passes without a gradient")
def a_saliency_map(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        x, y = t.batch()
        seen = x.clone().requires_grad_()
        torch.autograd.grad(t.model(seen).sum(), seen)
        t.train(x, y)
        seen = x.clone().requires_grad_()
        t.model(seen).sum().backward(inputs=[seen])
        t.step()


@loop("passes without a gradient")
def a_saliency_map_of_the_same_forward(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        x, y = t.batch()
        seen = x.clone().requires_grad_()
        z = t.model(seen)
        torch.autograd.grad(z.sum(), seen, retain_graph=True)
        t.counts(x, ce(y))
        F.cross_entropy(z, y).backward()
        t.step()


@loop("passes without a gradient")
def an_attack_by_autograd_grad(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        x, y = t.batch()
        near = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(t.loss(near, y), near)
        t.train((near + 0.1 * g.sign()).detach(), y)
        t.step()


@loop("passes without a gradient")
def gradients_looked_at_by_autograd_grad(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        x, y = t.batch()
        torch.autograd.grad(t.loss(7 * x, y), list(t.model.parameters()))
        t.train(x, y)
        torch.autograd.grad(t.loss(7 * x, y), list(t.model.parameters()))
        t.step()


@loop("passes without a gradient")
def functional_derivatives(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        x, y = t.batch()
        own = {k: p.detach() for k, p in t.model.named_parameters()}
        torch.func.grad(lambda q, x=x, y=y: F.cross_entropy(torch.func.functional_call(t.model, q, (3 * x,)), y))(own)
        torch.autograd.functional.jacobian(t.model, x[:1])
        t.train(x, y)
        t.step()
