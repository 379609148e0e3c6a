"""When two derivatives agree: the random vectors that they are compared on, and what rounding explains."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fisherviz.capture.captures import AnyCapture, GenericCapture, StructuredCapture, TiedCapture

TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3}
"""Relative differences that rounding explains, by type; 0.1 for the half precisions."""


def noise(like: Tensor, seed: int) -> Tensor:
    """Normal random numbers like a tensor, always the same and without the global random state."""
    private = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=private, dtype=torch.float64, device="cpu").to(like)


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether two gradients differ by no more than rounding explains."""
    gap = torch.linalg.vector_norm((found - expected).double())
    size = torch.linalg.vector_norm(expected.double())
    return bool(gap <= TOLERANCE.get(found.dtype, 0.1) * size + 1e-30)


def weighted_sum(capture: AnyCapture, shares: Tensor) -> Tensor:
    """Gradients of all vectors summed over examples, each with its share (N,), in unit order."""
    if isinstance(capture, GenericCapture):
        return shares.to(capture.gradients) @ capture.gradients.sum(0)
    given = capture.tensors[0].dtype  # tolerances go by it
    return _weighted(capture.to(torch.promote_types(given, torch.float32)), shares).sum().to(given)


def _weighted(capture: StructuredCapture, shares: Tensor) -> StructuredCapture:
    if isinstance(capture, TiedCapture):
        return capture.each(lambda part: _weighted(part, shares))
    return replace(capture, g=capture.g * shares.to(capture.g).view(-1, *(1 for _ in capture.g.shape[2:])))
