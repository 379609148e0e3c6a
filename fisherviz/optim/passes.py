"""The backward passes of our own: vectors from an output to the layers' outputs, never to the weights.

The vectors are columns of the output Fisher's root, or scores of labels that are sampled with the
optimizer's generator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fisherviz.capture.hooks import Call
from fisherviz.network.likelihoods import Likelihood
from fisherviz.optim.settings import NOT_FINITE

Source = Callable[[Tensor], Tensor]
"""From an output (N, ...) to the vectors (K, N, ...) that are backpropagated from it."""


def make_source(
    likelihood: Likelihood, kind: str, samples: int, generator: torch.Generator, step: Callable[[], int]
) -> Source:
    """The vectors of a kind of Fisher.

    Args:
        likelihood: the predictive distribution.
        kind: "exact"; anything else samples labels from the model.
        samples: labels per example.
        generator: where the labels come from.
        step: gives the number of the step, for errors.

    Returns:
        A function of outputs; ValueError where labels are to be sampled from NaN or infinite ones.
    """

    def exact(z: Tensor) -> Tensor:
        likelihood.check_output(z)
        return likelihood.vectors(z)

    def sampled(z: Tensor) -> Tensor:
        likelihood.check_output(z)
        if bad := not_finite(z):  # before sampling, which on an accelerator would end the process's context
            raise ValueError(NOT_FINITE.format(step(), bad, len(z)))
        scores = [likelihood.score(z, likelihood.sample(z, generator)) for _ in range(samples)]
        return torch.stack(scores) / samples**0.5

    return exact if kind == "exact" else sampled


def not_finite(z: Tensor) -> int:
    """Number of examples whose output (N, ...) is NaN or infinite."""
    bad = ~z.isfinite()
    return int((bad.flatten(1).any(1) if z.dim() > 1 else bad).sum())


def backpropagate(z: Tensor, calls: dict[str, list[Call]], v: Tensor) -> dict[str, list[Tensor]]:
    """Gradients of each vector's product with z at each call's output, never of the weights.

    Args:
        z: the output with its graph, (N, ...).
        calls: recorded calls by layer name.
        v: vectors (K, N, ...).

    Returns:
        (K, N, ...) for each call.
    """
    flat = [call for each in calls.values() for call in each]
    edges = [call.edge for call in flat]
    if not edges:
        return {}
    options: dict[str, Any] = {"allow_unused": True, "retain_graph": True}
    if len(v) == 1:
        found: list[Tensor | None] = [
            None if g is None else g.unsqueeze(0) for g in torch.autograd.grad(z, edges, v[0], **options)
        ]
    else:
        try:
            found = list(torch.autograd.grad(z, edges, v, is_grads_batched=True, **options))
        except RuntimeError:  # an operation without a batching rule: the same numbers one vector at a time
            each = [torch.autograd.grad(z, edges, vector, **options) for vector in v]
            found = [None if g[0] is None else torch.stack(list(g)) for g in zip(*each, strict=True)]
    filled = iter(
        z.new_zeros(len(v), *call.shape) if g is None else g.detach() for g, call in zip(found, flat, strict=True)
    )
    return {name: [next(filled) for _ in each] for name, each in calls.items()}
