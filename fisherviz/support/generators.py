"""Where random numbers come from: the caller's generator, or a private one, so that the global state stays as it is."""

from __future__ import annotations

import torch


def private(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """The generator that was given, or a private one seeded from `torch.initial_seed()`.

    Args:
        generator: the caller's, or None.
        device: where the numbers are wanted.

    Raises:
        TypeError: it is no generator.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}.")
    return torch.Generator(device=device).manual_seed(torch.initial_seed()) if generator is None else generator
