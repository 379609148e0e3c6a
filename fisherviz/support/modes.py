"""Training and evaluation mode, put back module by module; the types that torch computes in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Put every module back into the mode that it has now, also after an exception.

    Args:
        model: whose modules.

    Yields:
        Nothing.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def full_precision(model: nn.Module) -> AbstractContextManager[Any]:
    """Without the user's autocast: the model runs in its own types, and sums over examples are not rounded to half.

    Args:
        model: on whose device.
    """
    device = next(model.parameters(), torch.empty(0, device="cpu")).device.type
    known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known and torch.is_autocast_enabled(device) else nullcontext()
