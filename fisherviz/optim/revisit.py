"""Passes that are never counted as training: on given inputs, for statistics, and of the user's closure once more.

Statistics of other examples than the step's are those of the K-FAC paper's subset τ₁, of independent mini-batches and
of a first pass over data; the closure is evaluated again for the loss at new weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fisherviz.capture.captures import AnyCapture, Capture
from fisherviz.capture.hooks import capture_calls
from fisherviz.network.guest import as_guest
from fisherviz.optim.averages import distributed
from fisherviz.optim.passes import Source, backpropagate
from fisherviz.optim.watcher import Inputs, Pass, Watcher, at_least_float32


def capture_forward(watcher: Watcher, inputs: Inputs, source: Source) -> tuple[dict[str, AnyCapture], int]:
    """Captures of a forward and backward of our own, in the model's present mode.

    Args:
        watcher: the watcher, whose recorder is used.
        inputs: arguments of the model.
        source: the vectors to backpropagate.

    Returns:
        Captures by layer name, and the number of examples.
    """
    recorder = watcher.recorder
    watcher.paused = True
    try:
        with as_guest(watcher.model):
            recorder.calls, recorder.active = [], False
            handle = watcher.model.register_forward_pre_hook(lambda *_: setattr(recorder, "active", True))
            try:
                z = watcher.call(watcher.model, inputs)
            finally:
                handle.remove()
                recorder.active = False
            calls = {name: made for name, made in recorder.by_layer().items() if made[0].layer.structured}
            recorder.calls = []
            shaped = at_least_float32(z.detach())
            v = source(shaped.unsqueeze(1) if z.dim() == 1 else shaped).to(z.dtype).reshape(-1, *z.shape)
            gradients = backpropagate(z, calls, v)
    finally:
        watcher.paused = False
    captures: dict[str, AnyCapture] = {}
    for name, made in calls.items():
        capture = capture_calls(made, gradients[name])
        captures[name] = Capture(at_least_float32(capture.a), at_least_float32(capture.g))
    if watcher.generic_diagonal:
        captures |= watcher.generic_captures(Pass(len(z), inputs, None, {}, {}), v)
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
    watcher.paused = True
    try:
        with as_guest(watcher.model):
            return closure()
    finally:
        watcher.paused = False
        for p, g, value in zip(parameters, gradients, values, strict=True):
            p.grad = g if g is None or value is None else g.copy_(value)
