"""Some entries of per-example gradients, and their second moments: exact entries of F without its blocks.

A pick is a sub-grid of a layer's W̄, some output units by some inputs. Captures are cut before anything is multiplied,
so that entries which are not picked are not formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisherviz.capture.captures import AnyCapture, Capture, GenericCapture, TiedCapture
from fisherviz.capture.tokens import TokenCapture
from fisherviz.support.memory import at_once

PIECE_ENTRIES = 2**20
"""Entries of picked gradients that are formed at once."""


@dataclass(frozen=True, eq=False)
class Pick:
    """Some output units and inputs of a layer.

    Attributes:
        units: rows of W̄, ascending, (u,).
        inputs: columns of W̄, ascending, (i,).
        width: number da of columns.
    """

    units: Tensor
    inputs: Tensor
    width: int

    @property
    def size(self) -> int:
        """Number of parameters."""
        return len(self.units) * len(self.inputs)

    @property
    def flat(self) -> Tensor:
        """Their places in unit order, (u i,)."""
        return (self.units.unsqueeze(1) * self.width + self.inputs).reshape(-1)


def picked(capture: AnyCapture, pick: Pick) -> AnyCapture:
    """The capture of a layer whose parameters are the picked ones alone, in unit order."""
    if isinstance(capture, GenericCapture):
        return GenericCapture(capture.gradients[..., pick.flat])
    if isinstance(capture, TokenCapture):
        return _read(capture, pick.units, pick.inputs)
    if isinstance(capture, TiedCapture):
        rows, cols = (pick.units, pick.inputs) if capture.transposed else (pick.inputs, pick.units)
        used = Capture(capture.used.a[..., rows], capture.used.g[..., cols])
        return TiedCapture(_read(capture.read, rows, cols), used, capture.transposed)
    if capture.grouped:
        group = pick.units // capture.g.shape[-1]
        a, g = capture.a[:, :, group][..., pick.inputs], capture.g.flatten(3)[..., pick.units]
        return GenericCapture(torch.einsum("knto,ntoi->knoi", g, a).flatten(2))
    return Capture(capture.a[..., pick.inputs], capture.g[..., pick.units])


def _read(capture: TokenCapture, units: Tensor, tokens: Tensor) -> TokenCapture:
    """Some rows and columns of W̄ (d, V); what is read of other columns is not counted."""
    place = torch.searchsorted(tokens, capture.tokens.contiguous()).clamp_(max=len(tokens) - 1)
    inside = tokens[place] == capture.tokens
    return replace(
        capture, tokens=torch.where(inside, place, 0), weights=capture.weights * inside, g=capture.g[..., units],
        vocabulary=len(tokens),
    )  # fmt: skip


def picked_moments(captures: Sequence[AnyCapture], picks: Sequence[Pick]) -> Tensor:
    """Σ_nk of the outer products of picked gradients, layer after layer, (S, S) in float64."""
    size = sum(pick.size for pick in picks)
    total = picks[0].units.new_zeros(size, size, dtype=torch.float64)
    step = max(1, at_once(PIECE_ENTRIES, total) // (captures[0].vectors * size))
    for start in range(0, captures[0].examples, step):
        parts = [
            picked(capture.select(start, start + step), pick).to(torch.float64).gradients
            for capture, pick in zip(captures, picks, strict=True)
        ]
        rows = torch.cat(parts, 2).flatten(0, 1)
        total.addmm_(rows.mT, rows)
    return total
