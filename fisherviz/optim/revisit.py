"""A forward and backward of our own on given inputs, for statistics of other examples than the step's.

Used for the K-FAC paper's subset τ₁, for independent mini-batches and for a first pass over data; never
counted as training.
"""

from __future__ import annotations

from fisherviz.captures import AnyCapture, Capture
from fisherviz.guest import as_guest
from fisherviz.optim.passes import Source, backpropagate
from fisherviz.optim.watch import Inputs, Pass, Watcher, at_least_float32
from fisherviz.recorder import capture_calls


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
