"""The backward passes of our own: vectors from an output to the layers' outputs, never to the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fisherviz.capture.calls import Call

BATCHED_ENTRIES = 2**17
"""Above this many entries per vector and layer one backward pass per vector is faster than a batched one."""
HIDDEN = (
    "the model runs checkpoint(use_reentrant=True), through which no gradients of single examples pass; "
    "pass use_reentrant=False."
)
DONATED = (
    "a function inside the model was compiled by torch.compile so that its first backward gives its buffers away, and "
    "captures take a backward of their own; set torch._functorch.config.donated_buffer = False, then call "
    "torch.compiler.reset(), before the next pass."
)


def backpropagate(
    z: Tensor, calls: Mapping[str, Sequence[Call]], vectors: Tensor, *, keep: bool = False
) -> dict[str, list[Tensor]]:
    """Gradients of each vector's product with an output at each call's output.

    Args:
        z: the output with its graph, (N, ...).
        calls: recorded calls by layer name.
        vectors: (K, N, ...).
        keep: whether the graph is needed afterwards.

    Returns:
        (K, *gradient_shape) for each call; zeros where z does not depend on it.
    """
    flat = [call for made in calls.values() for call in made]
    if not flat or not z.requires_grad or not len(vectors):
        return {name: [z.new_zeros(len(vectors), *c.gradient_shape) for c in made] for name, made in calls.items()}
    gradients = partial(_gradients, z, flat)
    out: Sequence[Tensor | None] | None = None
    if len(vectors) > 1 and max(call.gradient_shape.numel() for call in flat) <= BATCHED_ENTRIES:
        # an operation without a batching rule: one vector at a time gives the same numbers; in torch's anomaly mode
        # none has one, since it asks for NaN
        with contextlib.suppress(RuntimeError), torch.autograd.set_detect_anomaly(False):
            out = gradients(vectors, is_grads_batched=True, retain_graph=True)
    if out is None and len(vectors) == 1:
        out = [None if g is None else g.unsqueeze(0) for g in gradients(vectors[0], retain_graph=keep)]
    if out is None:
        out = stacked = [z.new_empty(len(vectors), *call.gradient_shape) for call in flat]
        for k, vector in enumerate(vectors):
            for whole, g in zip(stacked, gradients(vector, retain_graph=keep or k + 1 < len(vectors)), strict=True):
                whole[k] = 0 if g is None else g
    filled = iter(
        z.new_zeros(len(vectors), *call.gradient_shape) if g is None else g.detach()
        for g, call in zip(out, flat, strict=True)
    )
    return {name: [next(filled) for _ in made] for name, made in calls.items()}


def _gradients(z: Tensor, calls: Sequence[Call], vectors: Tensor, **options: Any) -> list[Tensor | None]:
    """Gradients at the calls' outputs for one vector (N, ...) or several (K, N, ...)."""
    edges = [edge for call in calls for edge in call.edges]
    found = iter(gradients_at(edges, z, vectors, **options))
    leading = vectors.dim() - z.dim()
    return [call.together([next(found) for _ in call.edges], leading) for call in calls]


def gradients_at(
    edges: Sequence[GradientEdge],
    outputs: Tensor | Sequence[GradientEdge],
    vectors: Tensor | Sequence[Tensor],
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """Torch's gradients at edges, None for zero; where it gives none for a reason that is known, in our words."""
    try:
        return torch.autograd.grad(outputs, edges, vectors, allow_unused=True, **options)
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise NotImplementedError(HIDDEN) from error
        if "donated buffers" in str(error):
            raise RuntimeError(DONATED) from error
        raise
