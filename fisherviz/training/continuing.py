"""What a run that is continued is held against, and what its checkpoint has beside weights that are saved anyhow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The first weight of two networks that is not in both, or not of one shape, in words; "" where there is none.

    Args:
        ours: a `state_dict`.
        theirs: another.
    """
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            return f"the weight {name!r} is in one of them only"
        shapes = [tuple(getattr(state[name], "shape", ())) for state in (ours, theirs)]
        if shapes[0] != shapes[1]:
            return f"the weight {name!r} has the shapes {shapes[0]} and {shapes[1]}"
    return ""


def unsaved(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that a `state_dict` leaves out (persistent=False), by name."""
    kept = model.state_dict(keep_vars=True)
    return {name: buffer.detach() for name, buffer in model.named_buffers() if name not in kept}


def put_back(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Put back what `unsaved` gave; buffers of another shape are the network's to make anew.

    Args:
        model: the model.
        buffers: by name; older checkpoints have none.
    """
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in buffers and buffers[name].shape == buffer.shape:
                buffer.copy_(buffers[name])


def cuda_random(device: torch.device) -> Tensor | None:
    """The random state of a CUDA device; None for others."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None
