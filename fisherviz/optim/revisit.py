"""Passes that are never counted as training: on given inputs, for statistics, and of the user's closure once more.

Statistics of other examples than the step's are those of the K-FAC paper's subset τ₁, of independent mini-batches and
of a first pass over data; the closure is evaluated again for the loss at new weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fisherviz.capture.captures import AnyCapture
from fisherviz.capture.take import shown
from fisherviz.network.batches import Arguments
from fisherviz.network.guest import as_guest
from fisherviz.optim.processes import distributed
from fisherviz.optim.watcher import Source, Watcher


def capture_forward(
    watcher: Watcher, inputs: Arguments, source: Source, *, generic: bool | None = None
) -> tuple[dict[str, AnyCapture], int]:
    """Captures of a forward and backward of our own, in the model's present mode.

    Args:
        watcher: the watcher, which looks away.
        inputs: arguments of the model.
        source: the vectors to backpropagate.
        generic: whether layers without structure are wanted; None: as the watcher takes them.

    Returns:
        Captures by layer name, and the number of examples.
    """
    generic = watcher.generic_diagonal if generic is None else generic
    with watcher.looking_away(), as_guest(watcher.model):
        z, calls = watcher.network.record(inputs)
        captures = shown(watcher.network, inputs, z, calls, source(z.detach()), generic=generic)
    return captures, len(z)


def evaluate(watcher: Watcher, closure: Callable[[], Any], parameters: Sequence[nn.Parameter]) -> Any:
    """The closure's loss at the present weights; its gradients and side effects on the model are undone.

    Args:
        watcher: the watcher, which looks away.
        closure: evaluates the loss and backpropagates it.
        parameters: those whose gradients are put back, in a run of several processes by value, since the next
            backward of DistributedDataParallel may overwrite the memory of those that it gave.

    Returns:
        What the closure returned.
    """
    gradients = [p.grad for p in parameters]
    values = [g.clone() if g is not None and distributed() else None for g in gradients]
    for p in parameters:
        p.grad = None
    try:
        with watcher.looking_away(), as_guest(watcher.model):
            return closure()
    finally:
        for p, g, value in zip(parameters, gradients, values, strict=True):
            p.grad = g if g is None or value is None else g.copy_(value)
