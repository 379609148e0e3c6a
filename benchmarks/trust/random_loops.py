"""Training loops drawn at random from what users do between two steps; each says which examples count."""

# ruff: noqa: D103 - an action's name says what it does

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.trust.dense import linears
from benchmarks.trust.loops import Trial, ce


class Walk:
    """A loop drawn at random.

    Args:
        seed: decides all of it.
        steps: how many steps it takes.
    """

    def __init__(self, seed: int, steps: int = 3) -> None:
        self.seed, self.steps = seed, steps
        self.done: list[str] = []
        """What it did, in words."""

    def __call__(self, t: Trial) -> None:
        """Run it."""
        draw, self.done = random.Random(self.seed), []
        names = sorted(ACTIONS)
        for _ in range(self.steps):
            for name in draw.choices(names, [ACTIONS[name][1] for name in names], k=draw.randint(1, 8)):
                self.done.append(name)
                ACTIONS[name][0](t, draw)
            if not t.counted:
                t.model.requires_grad_(True)
                self.done.append("a pass")
                a_pass(t, draw)
            self.done.append("a step")
            t.step()
            zero = draw.choice(list(ZEROS))
            self.done.append(zero)
            ZEROS[zero](t)


def trained(t: Trial) -> tuple[int, ...]:
    """The layers that a backward leaves a gradient in."""
    return tuple(i for i, m in enumerate(linears(t.model)) if m.weight.requires_grad)


def a_pass(t: Trial, draw: random.Random) -> None:
    t.train(*t.batch(draw.randint(1, 12)), layers=trained(t))


def a_pass_with_another_loss(t: Trial, draw: random.Random) -> None:
    x, y = t.batch(draw.randint(2, 12))
    scale, smoothing = draw.choice([0.25, 1.0, 3.0]), draw.choice([0.0, 0.2])
    t.counts(x, ce(y, scale, label_smoothing=smoothing), layers=trained(t))
    (scale * F.cross_entropy(t.model(x), y, label_smoothing=smoothing)).backward()


def two_backwards(t: Trial, draw: random.Random) -> None:
    x, y = t.batch(draw.randint(2, 12))
    t.counts(x, ce(y, 1.5), layers=trained(t))
    loss = t.loss(x, y)
    (loss / 2).backward(retain_graph=True)
    loss.backward()


def two_forwards_and_one_backward(t: Trial, draw: random.Random) -> None:
    batches = [t.batch(draw.randint(1, 12)) for _ in range(2)]
    for x, y in batches:
        t.counts(x, ce(y), layers=trained(t))
    sum(t.loss(x, y) for x, y in batches).backward()  # type: ignore[union-attr]


def an_attack_by_backward(t: Trial, draw: random.Random) -> None:
    """The gradient stays until somebody drops it: so the pass counts."""
    x, y = t.batch(draw.randint(1, 12))
    x.requires_grad_()
    t.counts(x, ce(y), layers=trained(t))
    t.loss(x, y).backward()


def evaluation(t: Trial, draw: random.Random) -> None:
    t.model.eval()
    with torch.no_grad() if draw.random() < 0.5 else contextlib.nullcontext():
        t.model(3 * t.batch()[0])
    t.model.train()


def a_forward_only(t: Trial, draw: random.Random) -> None:
    with torch.no_grad() if draw.random() < 0.5 else contextlib.nullcontext():
        t.model(3 * t.batch()[0])


def saliency(t: Trial, draw: random.Random) -> None:
    x = t.batch()[0].requires_grad_()
    torch.autograd.grad(t.model(x).sum(), x, create_graph=draw.random() < 0.5)


def a_look_by_autograd_grad(t: Trial, draw: random.Random) -> None:
    """Where `.grad` has nothing yet, the rule takes what is returned for assigned, until a backward leaves some."""
    parameters = [p for p in t.model.parameters() if p.requires_grad]
    if t.counted and all(p.grad is not None for p in parameters) and parameters:
        torch.autograd.grad(t.loss(*t.batch()), parameters)


def clipping(t: Trial, draw: random.Random) -> None:
    nn.utils.clip_grad_norm_(t.model.parameters(), 0.1)


def noise(t: Trial, draw: random.Random) -> None:
    if t.counted:
        for p in t.model.parameters():
            if p.grad is not None and bool(p.grad.any()):
                p.grad += 0.01


def freezing_or_thawing(t: Trial, draw: random.Random) -> None:
    """Never all, nor the last one, through which the first gradients come."""
    m = draw.choice(linears(t.model)[:-1])
    m.requires_grad_(not m.weight.requires_grad)


def another_loss_through_the_frozen_model(t: Trial, draw: random.Random) -> None:
    kept = [p.requires_grad for p in t.model.parameters()]
    t.model.requires_grad_(False)
    x, y = t.batch()
    t.loss(x.requires_grad_(), y).backward()
    for p, flag in zip(t.model.parameters(), kept, strict=True):
        p.requires_grad_(flag)


def a_copy_that_trains(t: Trial, draw: random.Random) -> None:
    twin = copy.deepcopy(t.model)
    x, y = t.batch()
    F.cross_entropy(twin(x), y).backward()


def an_exception_in_the_forward(t: Trial, draw: random.Random) -> None:
    with contextlib.suppress(RuntimeError):
        t.model(t.batch()[0][:, :-1])


def functional_derivatives(t: Trial, draw: random.Random) -> None:
    x, y = t.batch()
    own = {k: p.detach() for k, p in t.model.named_parameters()}
    torch.func.grad(lambda q: F.cross_entropy(torch.func.functional_call(t.model, q, (x,)), y))(own)


def weights_swapped_and_back(t: Trial, draw: random.Random) -> None:
    own = [p.detach().clone() for p in t.model.parameters()]
    for p in t.model.parameters():
        p.data.mul_(0.5)
    with torch.no_grad():
        t.model(t.batch()[0])
    for p, k in zip(t.model.parameters(), own, strict=True):
        p.data.copy_(k)


def one_layer_dropped(t: Trial, draw: random.Random) -> None:
    """What has counted no longer does for this layer."""
    i = draw.randrange(2)
    linears(t.model)[i].zero_grad()
    t.forget(i)


def by_hand(t: Trial, draw: random.Random) -> None:
    t.opt.zero_grad()
    t.forget()
    x, y = t.batch()
    mine = [p for p in t.model.parameters() if p.requires_grad]
    t.counts(x, ce(y), layers=trained(t))
    for p, g in zip(mine, torch.autograd.grad(t.loss(x, y), mine), strict=True):
        p.grad = g
    t.step()
    t.opt.zero_grad()


def a_state_saved_and_loaded(t: Trial, draw: random.Random) -> None:
    """Into a new optimizer, as after a restart: what has counted since the last step is not in it."""
    if not t.counted:
        t.model.zero_grad()
        state = copy.deepcopy(t.opt.state_dict())
        t.rebuilt(t.model)
        t.opt.load_state_dict(state)


def forgetting(drop: Callable[[Trial], None]) -> Callable[[Trial], None]:
    def run(t: Trial) -> None:
        drop(t)
        t.forget()

    return run


def assign_none(t: Trial) -> None:
    for p in t.model.parameters():
        p.grad = None


ZEROS = {
    "zero_grad": forgetting(lambda t: t.opt.zero_grad()),
    "zeros": forgetting(lambda t: t.opt.zero_grad(set_to_none=False)),
    "the model's zero_grad": forgetting(lambda t: t.model.zero_grad()),
    "None": forgetting(assign_none),
}


def a_drop(t: Trial, draw: random.Random) -> None:
    ZEROS[draw.choice(list(ZEROS))](t)


ACTIONS: dict[str, tuple[Callable[[Trial, random.Random], None], int]] = {
    f.__name__.replace("_", " "): (f, weight)
    for f, weight in (
        (a_pass, 4), (a_pass_with_another_loss, 3), (two_backwards, 2), (two_forwards_and_one_backward, 2),
        (an_attack_by_backward, 1), (evaluation, 1), (a_forward_only, 1), (saliency, 1), (a_look_by_autograd_grad, 1),
        (clipping, 1), (noise, 1), (freezing_or_thawing, 2), (another_loss_through_the_frozen_model, 1),
        (a_copy_that_trains, 1), (an_exception_in_the_forward, 1), (functional_derivatives, 1),
        (weights_swapped_and_back, 1), (one_layer_dropped, 1), (by_hand, 1), (a_drop, 3), (a_state_saved_and_loaded, 2),
    )
}  # fmt: skip
"""What may happen between two steps, and how often beside the others."""
