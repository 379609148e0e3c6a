"""Compiled, checkpointed, scaled and parallel training, threads and worker processes."""

# ruff: noqa: D103 - a loop's name says what it does

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.trust.loops.trial import ENTERED, N, Trial, ce, loop


class Checkpointed(nn.Module):
    """A module behind a checkpoint that is not reentrant."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Recomputed in the backward."""
        return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]


def with_model(change: Callable[[nn.Module], nn.Module], first: bool) -> Callable[[Trial], None]:
    """Train a model that is changed before the optimizer is made, or after."""

    def run(t: Trial) -> None:
        inner = t.model
        if first:
            t.rebuilt(change(inner))
            changed = t.model
        else:
            changed = change(inner)
        for _ in range(2):
            t.opt.zero_grad()
            x, y = t.batch()
            t.counts(x, ce(y))
            F.cross_entropy(changed(x), y).backward()
            t.step()

    return run


def checkpoint_parts(model: nn.Module) -> nn.Module:
    """The layers of a network in two checkpoints."""
    assert isinstance(model, nn.Sequential)
    return nn.Sequential(Checkpointed(model[:2]), Checkpointed(model[2:]))


ENTERED["torch's machinery"] = {
    "checkpoints": with_model(checkpoint_parts, first=True),
    "torch.compile": with_model(lambda m: torch.compile(m, backend="eager"), first=False),
}


@loop("torch's machinery")
def deterministic_algorithms(t: Trial) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            t.opt.zero_grad()
            t.train(*t.batch())
            t.step()
    finally:
        torch.use_deterministic_algorithms(before)


@loop("torch's machinery")
def a_scaler(t: Trial) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for k in range(3):
        t.opt.zero_grad()
        x, y = t.batch()
        if k == 1:
            x = x * float("inf")
        else:
            t.counts(x, ce(y))
        scaler.scale(t.loss(x, y)).backward()
        scaler.unscale_(t.opt)
        if k == 1:
            scaler.step(t.opt)  # which skips it
        else:
            t.step(scaler.step)
        scaler.update()


@loop("torch's machinery")
def an_evaluation_in_another_thread(t: Trial) -> None:
    inside, goes_on = threading.Event(), threading.Event()

    def halt(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        inside.set()
        assert goes_on.wait(60)

    def evaluate() -> None:
        assert inside.wait(60)
        with torch.no_grad():
            t.model(t.others)
        goes_on.set()

    t.others = t.batch()[0]
    for _ in range(2):
        t.opt.zero_grad()
        handle = t.model[1].register_forward_hook(halt)
        other = threading.Thread(target=evaluate)
        other.start()
        t.train(*t.batch())
        other.join()
        handle.remove()
        inside.clear()
        goes_on.clear()
        t.step()


@loop("torch's machinery")
def passes_of_several_threads(t: Trial) -> None:
    for _ in range(2):
        t.opt.zero_grad()
        batches = [t.batch() for _ in range(4)]
        start = threading.Barrier(4)

        def run(x: Tensor, y: Tensor, start: threading.Barrier = start) -> None:
            start.wait(60)
            t.loss(x, y).backward()

        for x, y in batches:
            t.counts(x, ce(y))
        threads = [threading.Thread(target=run, args=batch) for batch in batches]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        t.step()


def with_workers(method: str) -> Callable[[Trial], None]:
    """Train on batches that another process makes."""

    def run(t: Trial) -> None:
        loader = DataLoader(TensorDataset(*t.batch(2 * N)), N, num_workers=1, multiprocessing_context=method)
        for x, y in loader:
            t.opt.zero_grad()
            t.train(x, y)
            t.step()

    return run


WORKERS = {f"loaders that {method} their workers": with_workers(method) for method in ("fork", "spawn")}
