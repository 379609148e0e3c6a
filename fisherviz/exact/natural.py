"""The damped natural gradient of the data's own loss in one pass: scores and vectors backpropagated together.

With U the Fisher's columns and ∇h = Σ_n g⁰_n a_nᵀ / N, Uᵀ∇h needs Gram matrices alone, and (∇h - U w) / λ is one
product of combined pseudo-gradients with the inputs (Benzing eq. 18-21; Shrestha eq. 40-43).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fisherviz.capture.captures import AnyCapture, Batch, Capture
from fisherviz.exact.solving import DampedCholesky
from fisherviz.statistics.products import gram

if TYPE_CHECKING:
    from fisherviz.exact.fisher import Fisher


def natural_gradient(fisher: Fisher, damping: float) -> Tensor:
    """(F + damping I)⁻¹ ∇h; see `Fisher.natural_gradient`."""
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be a finite number of at least 0, got {damping}.")
    kept: list[Batch] = []
    fisher.pass_with_scores(kept.append)
    captures = [batch.captures for batch in kept]
    simple = len(captures) == 1 and all(isinstance(c, Capture) and c.factored for c in captures[0].values())
    vectors = 1 if not captures else next(iter(captures[0].values())).vectors - 1
    if not simple or damping == 0 or vectors * fisher.examples >= fisher.shape[0]:
        return fisher.solve(fisher.gradient(), damping)
    return _by_gram_matrices(fisher, captures[0], damping)


def _by_gram_matrices(fisher: Fisher, captures: dict[str, AnyCapture], damping: float) -> Tensor:
    scale = fisher.scale
    total: Tensor | None = None
    right: Tensor | None = None
    for capture in captures.values():
        assert isinstance(capture, Capture)
        g = capture.g[:-1, :, 0].flatten(0, 1)  # (K N, dg)
        inputs = gram(capture.a[:, 0].T)
        own, cross = gram(g.T), g @ capture.g[-1, :, 0].T
        if len(own) > len(inputs):
            tiles = own.reshape(-1, len(inputs), len(own) // len(inputs), len(inputs))
            own = tiles.mul_(inputs.unsqueeze(1)).reshape(len(own), len(own))
        else:
            own = own.mul_(inputs)
        part = cross.reshape(-1, *inputs.shape).mul_(inputs).sum(2).reshape(-1)
        total = own if total is None else total.add_(own)
        right = part if right is None else right.add_(part)
    assert total is not None
    assert right is not None
    factor = DampedCholesky(total, damping / scale, "the damped Gram matrix of the examples")
    w = factor.solve(scale * right.unsqueeze(1))[:, 0]
    out = w.new_empty(fisher.space.size)
    for i, name in enumerate(fisher.space.names):
        capture = captures[name]
        assert isinstance(capture, Capture)
        combined = capture.g[-1, :, 0] * (scale / damping)
        for g, weights in zip(capture.g[:-1, :, 0], w.reshape(-1, len(combined), 1), strict=True):
            combined.addcmul_(g, weights, value=-1 / damping)
        for place in fisher.space.of(i):  # each parameter where it stands, without a copy
            torch.mm(combined.T, capture.a[:, 0, place.columns], out=out[place.flat].view(place.matrix))
    return out
