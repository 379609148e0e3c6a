"""BFGS updates of an inverse by curvature pairs, with double damping (Goldfarb, Ren & Bahamou 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

SKIP = 1e-4
"""Pairs with sᵀy at most this times ‖s‖² times the mean score's norm are skipped (the authors' code)."""

Inverse: TypeAlias = "Tensor | LastPairs"
"""An inverse, which vectors are multiplied by."""


@dataclass(frozen=True)
class LastPairs:
    """The inverse that BFGS makes of the identity by a few pairs, never formed (L-BFGS's two loops).

    Attributes:
        S: (p, d) changes of the pre-activations, the oldest first.
        Y: (p, d) changes of the scores.
    """

    S: Tensor
    Y: Tensor

    def __matmul__(self, v: Tensor) -> Tensor:
        """Multiply (d,) or (d, k)."""
        rhos, weights = 1 / (self.S * self.Y).sum(1), []
        for s, y, rho in zip(self.S.flip(0), self.Y.flip(0), rhos.flip(0), strict=True):
            weights.append(rho * (s @ v))
            v = v - _outer(y, weights[-1])
        for s, y, rho, weight in zip(self.S, self.Y, rhos, reversed(weights), strict=True):
            v = v + _outer(s, weight - rho * (y @ v))
        return v

    def with_pair(self, s: Tensor, y: Tensor, gradient: Tensor, most: int) -> LastPairs:
        """With one pair more, if it has usable curvature, and the oldest dropped where there were as many already."""
        if not usable(s, y, gradient):
            return self
        return LastPairs(*(torch.cat([kept, new.unsqueeze(0)])[-most:] for kept, new in ((self.S, s), (self.Y, y))))


def _outer(column: Tensor, row: Tensor) -> Tensor:
    """The product of a column with a number or a row."""
    return column * row if row.dim() == 0 else torch.outer(column, row)


def usable(s: Tensor, y: Tensor, gradient: Tensor) -> bool:
    """Whether a pair has the curvature that an update asks for."""
    sy = torch.dot(s, y)
    return bool(sy > 0) and not bool(sy <= SKIP * torch.dot(s, s) * gradient.norm())


def bfgs(H: Tensor, s: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
    """BFGS update of an inverse, (I − ρsyᵀ) H (I − ρysᵀ) + ρssᵀ; skipped where the pair has no usable curvature."""
    if not usable(s, y, gradient):
        return H
    Hy, rho = H @ y, 1 / torch.dot(s, y)
    return H + (rho**2 * torch.dot(y, Hy) + rho) * torch.outer(s, s) - rho * (torch.outer(s, Hy) + torch.outer(Hy, s))


def double_damping(s: Tensor, y: Tensor, H: Inverse, powell: float, second: float) -> tuple[Tensor, Tensor]:
    """Powell's damping with H on s, then with I on y.

    Args:
        s: change of the mean pre-activations.
        y: change of the mean scores.
        H: the inverse that is updated.
        powell: sᵀy is raised to at least this times yᵀHy.
        second: and then to at least this times sᵀs.

    Returns:
        The damped pair.
    """
    Hy = H @ y
    sy, yHy = torch.dot(s, y), torch.dot(y, Hy)
    if bool(sy < powell * yHy):
        theta = (1 - powell) * yHy / (yHy - sy)
        s = theta * s + (1 - theta) * Hy
    ss, sy = torch.dot(s, s), torch.dot(s, y)
    if bool(sy < second * ss):
        theta = (1 - second) * ss / (ss - sy)
        y = theta * y + (1 - theta) * s
    return s, y
