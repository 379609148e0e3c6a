"""Several passes to a step, and several backwards of one forward."""

# ruff: noqa: D103 - a loop's name says what it does

from __future__ import annotations

import warnings

import torch
from torch.nn import functional as F

from benchmarks.trust.loops.trial import N, Trial, ce, loop


@loop("several passes a step")
def accumulation(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        for n in (5, 12, 7):
            t.train(*t.batch(n))
        t.step()


@loop("several passes a step")
def accumulation_of_losses_divided(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        for _ in range(3):
            x, y = t.batch()
            t.counts(x, ce(y, 1 / 3))
            (t.loss(x, y) / 3).backward()
        t.step()


@loop("several passes a step")
def contrastive_pairs(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        (x, y), (other, _) = t.batch(), t.batch()
        with torch.no_grad():
            z, z_other = t.model(x), t.model(other)
        t.counts(x, lambda o, z=z_other, y=y: F.cross_entropy(o, y) + (o - z).square().mean())
        t.counts(other, lambda o, z=z, y=y: F.cross_entropy(o, y) + (z - o).square().mean())
        one, two = t.model(x), t.model(other)
        (F.cross_entropy(one, y) + F.cross_entropy(two, y) + (one - two).square().mean()).backward()
        t.step()


@loop("several passes a step")
def the_forwards_come_before_the_backwards(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        (x, y), (other, label) = t.batch(), t.batch()
        t.counts(x, ce(y))
        t.counts(other, ce(label))
        first, second = t.loss(x, y), t.loss(other, label)
        second.backward()
        first.backward()
        t.step()


@loop("several backwards of one forward")
def two_losses(t: Trial) -> None:
    w, v = torch.linspace(0.1, 0.9, N, dtype=torch.float64), torch.linspace(2.0, 0.5, N, dtype=torch.float64)
    for _ in range(2):
        t.opt.zero_grad()
        x, y = t.batch()
        t.counts(x, lambda z, y=y: ((w + v) * F.cross_entropy(z, y, reduction="none")).mean())
        each = F.cross_entropy(t.model(x), y, reduction="none")
        (w * each).mean().backward(retain_graph=True)
        (v * each).mean().backward()
        t.step()


@loop("several backwards of one forward")
def the_first_is_dropped(t: Trial) -> None:
    x, y = t.batch()
    loss = t.loss(x, y)
    (5 * loss).backward(retain_graph=True)
    t.opt.zero_grad()
    t.counts(x, ce(y))
    loss.backward()
    t.step()


@loop("several backwards of one forward")
def create_graph(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        x, y = t.batch()
        t.counts(x, ce(y))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about cycles
            t.loss(x, y).backward(create_graph=True)
        for p in t.model.parameters():
            p.grad = p.grad.detach()
        t.step()
