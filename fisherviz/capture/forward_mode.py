"""Exact Fisher products on the network itself: one forward-mode pass, the output Fisher, one reverse pass.

F v = Jᵀ F_R J v costs about 1.7 forward+backward passes whatever the layer's size; uᵀ F v needs forward passes only
(K-FAC paper, appendix C). Relied on by `Fisher @ v` and `Fisher.quadratic`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fisherviz.capture.per_example import densified
from fisherviz.network.batches import Inputs, move, select
from fisherviz.network.guest import as_guest, check_modes
from fisherviz.network.vectors import AnyVectors
from fisherviz.probe import Probe


def fisher_product(
    probe: Probe,
    inputs: Inputs,
    targets: Tensor | None,
    vectors: AnyVectors,
    tangents: Mapping[str, Tensor],
    first: int,
) -> tuple[dict[str, Tensor], int]:
    """Sum over a batch of Jᵀ F_R J v.

    Args:
        probe: the probe.
        inputs: the batch's inputs.
        targets: its targets.
        vectors: the kind of Fisher.
        tangents: v by parameter name.
        first: position of the batch's first example.

    Returns:
        The product by parameter name, and the number of examples.
    """
    check_modes(probe.model)
    inputs = move(inputs, probe.device)
    with as_guest(probe.model):
        leaves, z, t = _dual_output(probe, inputs, tangents)
        _check(probe, z)
        u = vectors.product(z.detach(), t.detach(), targets, first)
        gradients = torch.autograd.grad(z, list(leaves.values()), u, allow_unused=True)
    filled = {
        name: torch.zeros_like(leaf) if g is None else densified(g)
        for (name, leaf), g in zip(leaves.items(), gradients, strict=True)
    }
    return filled, len(z)


def _dual_output(
    probe: Probe, inputs: Inputs, tangents: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Leaves, output z with its graph to them, and the tangent J v.

    The level is left before the caller goes backward: the reverse pass must not drag tangents along.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in probe.parameters().items()}
    with forward_ad.dual_level(), _ConstantInputs():
        duals = {name: forward_ad.make_dual(leaves[name], tangents[name]) for name in leaves}
        z, t = forward_ad.unpack_dual(_functional(probe, duals, inputs))
    return leaves, z, torch.zeros_like(z) if t is None else t


class _ConstantInputs(TorchFunctionMode):
    """Linear layers on inputs without a tangent, such as the data: torch would multiply one of zeros."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear or kwargs or forward_ad.unpack_dual(args[0]).tangent is not None:
            return func(*args, **(kwargs or {}))
        pairs = [forward_ad.unpack_dual(p) for p in args[1:] if p is not None]
        if any(pair.tangent is None for pair in pairs):
            return func(*args)
        z = func(args[0], *(pair.primal for pair in pairs))
        return forward_ad.make_dual(z, func(args[0], *(pair.tangent for pair in pairs)))


def output_tangent(probe: Probe, inputs: Inputs, tangents: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Output z and its directional derivative J v for a batch, forward mode only."""
    check_modes(probe.model)
    inputs = move(inputs, probe.device)
    with as_guest(probe.model), torch.no_grad(), forward_ad.dual_level(), _ConstantInputs():
        duals = {name: forward_ad.make_dual(p.detach(), tangents[name]) for name, p in probe.parameters().items()}
        z, t = forward_ad.unpack_dual(_functional(probe, duals, inputs))
    _check(probe, z)
    return z, torch.zeros_like(z) if t is None else t


def forward_mode_is_right(probe: Probe, inputs: Inputs) -> bool:
    """Whether uᵀ(J d) equals (Jᵀu)ᵀd on two examples of a batch.

    Forward mode ignores `torch.no_grad` and padding rows of embeddings, and lacks some operations.
    """
    few = move(select(inputs, 0, 2), probe.device)
    private = torch.Generator().manual_seed(1)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=private, dtype=torch.float64).to(like)

    tangents = {name: noise(p) for name, p in probe.parameters().items()}
    try:
        with as_guest(probe.model):
            z = probe.forward(few)
            u = noise(z)
            gradients = torch.autograd.grad(z, list(probe.parameters().values()), u, allow_unused=True)
            leaves, again, t = _dual_output(probe, few, tangents)
            torch.autograd.grad(again, list(leaves.values()), u, allow_unused=True)
        output_tangent(probe, few, tangents)
    except (RuntimeError, NotImplementedError, TypeError):
        return False  # an operation without forward mode: products go through captures
    pairs = [
        (densified(g).double(), tangents[name].double())
        for name, g in zip(tangents, gradients, strict=True)
        if g is not None
    ]
    reverse = sum(float((g * d).sum()) for g, d in pairs)
    size = sum(float(g.square().sum()) for g, _ in pairs) ** 0.5 * sum(float(d.square().sum()) for _, d in pairs) ** 0.5
    tolerance = 1e-6 if z.dtype == torch.float64 else 5e-3
    return abs(float((t.detach().double() * u.double()).sum()) - reverse) <= tolerance * size + 1e-30


def _functional(probe: Probe, parameters: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
    return probe.call(lambda *args, **kwargs: functional_call(probe.model, dict(parameters), args, kwargs), inputs)


def _check(probe: Probe, z: Tensor) -> None:
    probe.likelihood.check_output(z)
    if not bool(torch.isfinite(z).all()):
        raise ValueError("NaN or infinite values in the output; check the data and the weights before probing.")
