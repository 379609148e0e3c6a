"""One pass a step, what is done to its gradient before the step, and gradients that are taken by hand."""

# ruff: noqa: D103 - a loop's name says what it does

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.trust.loops.trial import Trial, ce, loop


@loop("one pass a step")
def plain(t: Trial) -> None:
    for _ in range(3):
        t.opt.zero_grad()
        t.train(*t.batch())
        t.step()


@loop("one pass a step")
def batches_of_all_sizes(t: Trial) -> None:
    for n in (12, 5, 1, 20):
        t.opt.zero_grad()
        t.train(*t.batch(n))
        t.step()


@loop("one pass a step")
def zeros_in_place_of_None(t: Trial) -> None:
    for _ in range(3):
        t.opt.zero_grad(set_to_none=False)
        t.train(*t.batch())
        t.step()


@loop("one pass a step")
def label_smoothing(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        x, y = t.batch()
        t.counts(x, ce(y, label_smoothing=0.1))
        F.cross_entropy(t.model(x), y, label_smoothing=0.1).backward()
        t.step()


@loop("one pass a step")
def a_penalty_on_the_weights_in_the_loss(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        x, y = t.batch()
        t.counts(x, ce(y))
        (t.loss(x, y) + 0.1 * sum(p.square().sum() for p in t.model.parameters())).backward()
        t.step()


@loop("one pass a step")
def the_backward_names_its_inputs(t: Trial) -> None:
    x, y = t.batch()
    t.counts(x, ce(y))
    t.loss(x, y).backward(inputs=list(t.model.parameters()))
    t.step()


@loop("gradients that are changed")
def clipped_by_norm(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        t.train(*t.batch())
        nn.utils.clip_grad_norm_(t.model.parameters(), 0.1)
        t.step()


@loop("gradients that are changed")
def clipped_by_value(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        t.train(*t.batch())
        nn.utils.clip_grad_value_(t.model.parameters(), 0.01)
        t.step()


@loop("gradients that are changed")
def noise_is_added(t: Trial) -> None:
    t.train(*t.batch())
    for p in t.model.parameters():
        p.grad += 0.1 * torch.ones_like(p)
    t.step()


@loop("gradients that are changed")
def other_tensors_are_assigned(t: Trial) -> None:
    t.train(*t.batch())
    for p in t.model.parameters():
        p.grad = p.grad.sign()
    t.step()


@loop("gradients that are changed")
def a_hook_changes_them(t: Trial) -> None:
    t.hook = lambda g: 2 * g + 0.01
    handles = [p.register_hook(t.hook) for p in t.model.parameters()]
    for _ in range(2):
        t.opt.zero_grad()
        t.train(*t.batch())
        t.step()
    for handle in handles:
        handle.remove()


@loop("gradients that are changed")
def one_layer_s_is_set_to_None(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        t.train(*t.batch())
        t.model[0].zero_grad()
        t.step()


@loop("gradients by autograd.grad")
def assigned(t: Trial) -> None:
    parameters = list(t.model.parameters())
    for _ in range(2):
        x, y = t.batch()
        t.counts(x, ce(y))
        for p, g in zip(parameters, torch.autograd.grad(t.loss(x, y), parameters), strict=True):
            p.grad = g
        t.step()


@loop("gradients by autograd.grad")
def of_two_tasks_are_combined(t: Trial) -> None:
    parameters = list(t.model.parameters())
    for _ in range(2):
        found = []
        for _ in range(2):
            x, y = t.batch()
            t.counts(x, ce(y))
            found.append(torch.autograd.grad(t.loss(x, y), parameters))
        for p, g, h in zip(parameters, *found, strict=True):
            p.grad = g + h.clamp(min=0)
        t.step()
