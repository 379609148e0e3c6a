"""Which positions of a layer count where outputs are left out: all but those on which only such outputs depend.

A padded token under an attention mask, or the last one of a causal model, acts on its own output alone; a prompt acts
on what counts. Told by evidence: two vectors are backpropagated, at the outputs that count and at the others.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fisherviz.capture.agreement import noise
from fisherviz.capture.captures import StructuredCapture, TiedCapture
from fisherviz.network.likelihoods import Likelihood

INDICATORS = 2
"""Vectors that tell positions apart."""


def indicators(likelihood: Likelihood, z: Tensor, counted: Tensor) -> Tensor:
    """Noise at the outputs that count, and at the others, (2, N, ...).

    Args:
        likelihood: of the outputs.
        z: (N, ...).
        counted: its positions that count, (N, ...).
    """
    u = noise(z[:1], 0).expand_as(z)
    return torch.stack([likelihood.only(u, counted), likelihood.only(u, ~counted)])


def marked(capture: StructuredCapture, counted: Tensor) -> StructuredCapture:
    """A capture whose last vectors are the indicators, without them, and with the positions that count.

    Args:
        capture: of a layer.
        counted: positions of the output that count, (N, ...).
    """
    if isinstance(capture, TiedCapture):
        return capture.each(lambda part: marked(part, counted))
    k = capture.vectors - INDICATORS
    here, elsewhere = (capture.g[k:] != 0).flatten(3).any(3)
    # where the layer has the output's positions, one whose own output counts does, though nothing may depend on it
    own = counted.flatten(1) if counted.dim() > 1 else counted.unsqueeze(1)
    counts = here | (own if own.shape == here.shape else ~elsewhere)
    return replace(capture, g=capture.g[:k], counted=None if bool(counts.all()) else counts)
