"""CURVES: images of one smooth curve through three random points, drawn from a seed.

The original set (Hinton & Salakhutdinov 2006) is not at hand; this follows its description: 28 x 28 pixels,
20,000 training and 10,000 test images, six degrees of freedom. Nothing but the seed decides the images.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fisherviz.datasets.raw import Raw

SIDE = 28
TRAIN, TEST = 20_000, 10_000
STEPS = 48  # points along a curve: close enough for the pen's width that single points do not show
PEN = 0.7  # standard deviation of the pen, in pixels
# The parabola through three points leaves their box by at most an eighth of its side (the Lagrange basis has
# an absolute sum of at most 5/4), so that curves through this box keep a twentieth of the frame free.
LOW, HIGH = 0.14, 0.86


def draw(points: Tensor) -> Tensor:
    """Draw the parabola p with p(0), p(1/2), p(1) at the given points, by a round pen of constant ink.

    Args:
        points: (n, 3, 2), coordinates (x, y) in [0, 1].

    Returns:
        (n, 28, 28) ink in [0, 1], rows along y.
    """
    t = (torch.arange(STEPS, dtype=points.dtype, device="cpu") + 0.5) / STEPS
    basis = torch.stack([(1 - t) * (1 - 2 * t), 4 * t * (1 - t), t * (2 * t - 1)], dim=1)
    slope = torch.stack([4 * t - 3, 4 - 8 * t, 4 * t - 1], dim=1)
    path = SIDE * basis @ points
    length = torch.linalg.vector_norm(SIDE * slope @ points, dim=2, keepdim=True) / STEPS
    pixels = torch.arange(SIDE, dtype=points.dtype, device="cpu") + 0.5
    # the bound keeps far pixels out of the slow denormal numbers, and below every ink that is kept
    near = torch.exp((-((pixels - path[..., None]) ** 2) / (2 * PEN**2)).clamp_(min=-40))  # (n, steps, 2, side)
    across, down = near.unbind(dim=2)
    # a long straight stroke has ink 1 along its middle
    ink = (down * length).transpose(1, 2) @ across / (np.sqrt(2 * np.pi) * PEN)
    return ink.clamp_(max=1)


def curves(seed: int) -> Raw:
    """Generate the data set: points uniform in the middle of the frame, ink in 256 levels."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(TRAIN + TEST, 3, 2, generator=generator, device="cpu") * (HIGH - LOW) + LOW
    images = torch.cat([draw(chunk) for chunk in points.split(1000)])
    pixels = ((images * 255).round() / 255).numpy()[:, None]
    note = f"Generated from seed {seed}, following the description of the original set, which is not at hand."
    return Raw(pixels[:TRAIN], None, pixels[TRAIN:], None, notes=(note,))
