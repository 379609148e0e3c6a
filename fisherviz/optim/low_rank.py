"""Directions of low rank that are added to the weights without being written down first.

A layer's direction is often c · base + leftᵀ right with fewer rows than the layer is wide (Martens & Grosse 2015, end
of section 8; Benzing 2021, eq. 21). One product straight into the weights saves a matrix of their size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fisherviz.network.layers import Layer
from fisherviz.optim.selection import ordered_parameters


@dataclass(frozen=True, eq=False)
class LowRank:
    """c · base + leftᵀ right for one parameter.

    Attributes:
        left: (R, d_out).
        right: (R, columns).
        shape: the parameter's, d_out x columns entries.
        base: a tensor of that shape; None: zero.
        weight: c.
    """

    left: Tensor
    right: Tensor
    shape: torch.Size
    base: Tensor | None = None
    weight: float = 1.0

    def add_to(self, target: Tensor, scale: float, keep: float = 1.0) -> None:
        """Target ← keep · target + scale · self, in place; the target is contiguous."""
        if self.base is not None:
            if keep != 1.0:
                target.mul_(keep)
            target.add_(self.base, alpha=scale * self.weight)
            keep = 1.0
        target.view(self.left.shape[1], -1).addmm_(self.left.mT, self.right, beta=keep, alpha=scale)

    def dense(self) -> Tensor:
        """The direction written down."""
        product = (self.left.mT @ self.right).reshape(self.shape)
        return product if self.base is None else product.add_(self.base, alpha=self.weight)


Direction = Tensor | LowRank
Tensors = dict[nn.Parameter, Tensor]
Moves = dict[nn.Parameter, Direction]


def dense(direction: Direction) -> Tensor:
    """A direction written down, if it is not."""
    return direction.dense() if isinstance(direction, LowRank) else direction


def add_direction(target: Tensor, direction: Direction, scale: float, keep: float = 1.0) -> None:
    """Target ← keep · target + scale · direction, in place."""
    if isinstance(direction, LowRank):
        direction.add_to(target, scale, keep)
        return
    if keep != 1.0:
        target.mul_(keep)
    target.add_(direction, alpha=scale)


def split_rows(
    layer: Layer, right: Tensor, left: Tensor, bases: dict[nn.Parameter, Tensor] | None = None, weight: float = 1.0
) -> Moves:
    """The parameters' shares of weight · bases + leftᵀ right.

    Args:
        layer: a structured layer.
        right: (R, da), the bias's column last.
        left: (R, d_out).
        bases: what is added, by parameter; None and those that are missing: nothing.
        weight: its factor.

    Returns:
        One direction per parameter, written down where a parameter's layout or type asks for it.
    """
    parameters = ordered_parameters(layer)
    columns = right.split([p.numel() // layer.d_out for p in parameters], 1)
    out: Moves = {}
    for p, part in zip(parameters, columns, strict=True):
        made = LowRank(left, part, p.shape, (bases or {}).get(p), weight)
        fits = p.dtype == right.dtype and p.is_contiguous()
        out[p] = made if fits else made.dense().to(p.dtype)
    return out
