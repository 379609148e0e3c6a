"""Ctrl-C at random moments: the guest's model is as it was, no file is half-written, and the next call is right."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fisherviz as fv
from benchmarks.trust.injection import forked
from benchmarks.trust.keeping import WORK, Kept, fresh, network, plain, result_of

KINDS = ("exact", "mc", "empirical")
OPTIMIZERS = ("KFAC", "EKFAC", "FOOF", "HessianFree")
Asked = Callable[[Any], Any]
QUESTIONS: dict[str, Asked] = {
    "product": lambda f: f @ torch.ones(f.shape[0]),
    "diagonal": lambda f: f.diagonal(),
    "dense": lambda f: f.to_dense(),
    "solve": lambda f: f.solve(torch.ones(f.shape[0]), damping=0.1),
    "kfac": lambda f: fv.approximate(f, "kfac").to_dense(),
}


def _tried(function: Callable[[float | None], Any], chance: random.Random, count: int) -> dict[str, Any]:
    """Call a function in forks with a moment at which it is to interrupt itself; it returns what was wrong."""
    longest = 1.1 * max(forked(partial(function, None)).found[2] for _ in range(3))
    found: Counter[str] = Counter()
    said: list[str] = []
    tries = 0
    while found["interrupted"] < count and tries < 4 * count:
        tries += 1
        end = forked(partial(function, chance.uniform(0, longest)))
        if end.how != "done":
            found["interrupted"] += 1
            found["raw"] += 1
            said.append(f"{end.how}: {end.told[-400:]}")
            continue
        came, left, _ = end.found
        found["interrupted" if came else "ended before"] += 1
        found["right"] += came and not left
        for kind, text in left:
            found[kind] += 1
            said.append(f"{kind}: {text[:300]}")
    return {**found, "said": said[:5]}


def _alarmed(after: float | None, work: Callable[[], Any]) -> tuple[bool, float]:
    """Whether Ctrl-C came while it worked, and for how many seconds it did."""
    began = time.monotonic()
    try:
        try:
            if after is not None:
                signal.setitimer(signal.ITIMER_REAL, max(after, 1e-4))
            work()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return True, time.monotonic() - began
    return False, time.monotonic() - began


def _shape(model: nn.Module) -> Any:
    """Everything of a model that a guest must leave as it was."""
    parts = []
    for name, module in model.named_modules():
        hooks = {key: len(value) for key, value in vars(module).items() if key.endswith("hooks") and value is not None}
        parts.append([name, module.training, hooks, sorted(k for k in vars(module) if not k.startswith("_"))])
    weights = [
        [name, p.requires_grad, None if p.grad is None else plain(p.grad), plain(p), len(p._backward_hooks or ())]
        for name, p in model.named_parameters()
    ]
    return json.loads(json.dumps([parts, weights]))


def _requests(kind: str, seed: int, count: int, folder: Path) -> dict[str, Any]:
    net, x = network()
    y = torch.arange(len(x)) % 3
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    asked = list(QUESTIONS)

    def made() -> Any:
        return fv.Probe(net, "categorical").fisher(batches, kind=kind, generator=torch.Generator().manual_seed(5))

    first = made()
    right = {name: QUESTIONS[name](first) for name in asked}

    def once(after: float | None) -> Any:
        before, state = _shape(net), torch.get_rng_state()
        fisher = made()
        order = asked[:] if after is None else random.Random(after).sample(asked, len(asked))
        came, seconds = _alarmed(after, lambda: [QUESTIONS[name](fisher) for name in order])
        left = []
        if _shape(net) != before:
            left.append(["left", f"the model: {_shape(net)}"])
        if not torch.equal(torch.get_rng_state(), state):
            left.append(["left", "torch's generator"])
        again = made()
        for said, one in (("", fisher), (" of a new one", again)):
            left += [["other", f"{name}{said}"] for name in asked if not _close(QUESTIONS[name](one), right[name])]
        return [came, left, seconds]

    return _tried(once, random.Random(seed), count)


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal up to the rounding of another path to the same number, as after other requests."""
    return torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def _steps(seed: int, count: int, folder: Path) -> dict[str, Any]:
    def once(after: float | None) -> Any:
        net, x = network()
        y = torch.arange(len(x)) % 3
        name = OPTIMIZERS[0 if after is None else int(after * 1e6) % len(OPTIMIZERS)]
        shape = _hooks(net)
        optimizer = getattr(fv.optim, name)(net, "categorical")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            return loss

        def steps() -> None:
            for _ in range(6):
                optimizer.step(closure)

        steps()
        watched = _hooks(net)
        came, seconds = _alarmed(after, steps)
        left = [] if _hooks(net) == watched else [["left", f"hooks: {_hooks(net)} where there were {watched}"]]
        if not all(isinstance(p, nn.Parameter) and torch.isfinite(p).all() for p in net.parameters()):
            left.append(["left", "a parameter that is none, or not finite"])
        before = float(nn.functional.cross_entropy(net(x), y).detach())
        steps()  # and training goes on
        after_steps = float(nn.functional.cross_entropy(net(x), y).detach())
        if not after_steps <= before + 0.05:
            left.append(["other", f"{name}: the loss goes from {before} to {after_steps}"])
        if hasattr(optimizer, "detach"):
            optimizer.detach()
            left += [] if _hooks(net) == shape else [["left", f"hooks after detach: {_hooks(net)}"]]
        return [came, left, seconds]

    return _tried(once, random.Random(seed), count)


def _hooks(model: nn.Module) -> Any:
    return [
        [name, {key: len(value) for key, value in vars(m).items() if key.endswith("hooks") and value}]
        for name, m in model.named_modules()
    ]


def _written(work: Kept, seed: int, count: int, folder: Path) -> dict[str, Any]:
    fresh(folder)
    work.before(folder)
    old = json.dumps(work.state(folder)) if work.replaces else ""
    work.work(folder)
    new = json.dumps(work.state(folder))

    def once(after: float | None) -> Any:
        fresh(folder)
        work.before(folder)
        came, seconds = _alarmed(after, lambda: work.work(folder))
        left = [["left", path.name] for path in folder.rglob(".*") if "-" in path.name or path.name == ".commit"]
        if work.replaces and came and result_of(json.dumps(work.state(folder))) not in (result_of(old), result_of(new)):
            left.append(["other", "neither the old result nor the new one"])
        work.work(folder)
        left += [] if json.dumps(work.state(folder)) == new else [["other", "another result"]]
        return [came, left, seconds]

    return _tried(once, random.Random(seed), count)


TRIED: dict[str, Callable[[int, int, Path], dict[str, Any]]] = {
    **{f"{kind} Fisher": partial(_requests, kind) for kind in KINDS},
    "optimizer steps": _steps,
    **{work.name: partial(_written, work) for work in WORK},
}
"""What is interrupted, called with a seed, the number of interrupts and a folder."""
