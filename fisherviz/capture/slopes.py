"""Derivatives of what stands between two layers, where that acts on each entry by itself: an activation f, and f'(h).

Told by evidence in the graph of each pass, whoever computes f: ones and noise are backpropagated from the next layer's
input to the output h, and are f'(h) and noise times f'(h) for a function that mixes no entries, and for no other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fisherviz.capture.agreement import close, noise
from fisherviz.capture.backward import gradients_at
from fisherviz.capture.calls import Call, Layout
from fisherviz.capture.look import neighbours


def with_slopes(calls: Mapping[str, Sequence[Call]]) -> dict[str, list[Call]]:
    """The calls of a pass, whose graph is there, with the slopes of those that have any.

    Args:
        calls: by layer name, in the order of execution.
    """
    out = {name: list(made) for name, made in calls.items()}
    for row, col in neighbours(calls):
        out[row] = [replace(out[row][0], slopes=between(out[row][0], out[col][0]))]
    return out


def between(row: Call, col: Call) -> Tensor | None:
    """Derivatives f'(h) (N, d) of an element-wise function f from one layer's output h to the next one's input.

    Args:
        row: the call before it.
        col: the call after it.

    Returns:
        None where either has several positions, or there is no such function.
    """
    plain = all(call.layout is Layout.FIRST and call.examples == call.shape[0] for call in (row, col))
    if col.origin is None or not plain or len(row.shape) != 2 or row.shape != col.x.shape:
        return None
    v = noise(col.x[:1], 0) * noise(col.x[:, :1], 1)  # no two entries have the same
    found = [gradients_at([row.edge], [col.origin], [u], retain_graph=True)[0] for u in (torch.ones_like(col.x), v)]
    slopes, mixed = (None if g is None else g.detach().reshape(row.shape) for g in found)
    if slopes is None or mixed is None or not close(mixed, slopes * v.to(slopes.dtype)):
        return None
    return slopes
