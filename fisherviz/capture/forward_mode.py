"""Exact Fisher products on the network itself: one forward-mode pass, the output Fisher, one reverse pass.

F v = Jᵀ F_R J v costs about 1.7 forward+backward passes whatever the layer's size; uᵀ F v needs forward passes only
(K-FAC paper, appendix C). Forward mode is wrong for some models (it ignores `torch.no_grad`) and lacks some operations:
it is believed where it agrees with reverse mode, which each product shows anew.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fisherviz.capture.agreement import TOLERANCE, noise
from fisherviz.capture.calls import behind, empty
from fisherviz.capture.network import Network
from fisherviz.capture.per_example import densified
from fisherviz.network.batches import Inputs, move
from fisherviz.network.guest import as_guest

_one_level = threading.RLock()
"""Torch has one forward-mode level for all threads."""
OutputProduct = Callable[[Tensor, Tensor], Tensor]
"""From an output z and a tangent t to F_R(z) t."""


class Product(NamedTuple):
    """Jᵀ u for u = F_R J v over a batch.

    Attributes:
        parts: by parameter name, in torch order.
        form: uᵀ J v, which is vᵀ F v.
        examples: number of examples.
        agrees: whether uᵀ (J v), by forward mode, is (Jᵀ u)ᵀ v, by reverse mode, and no use of a parameter is hidden
            from forward mode: its part of J v would be missing, and so that of u, on both sides. Nothing is there
            where the model does not run in forward mode at all.
    """

    parts: dict[str, Tensor]
    form: float
    examples: int
    agrees: bool


def product(network: Network, inputs: Inputs, tangents: Mapping[str, Tensor], output: OutputProduct) -> Product:
    """Sum over a batch of Jᵀ F_R J v.

    Args:
        network: the network.
        inputs: the batch's inputs.
        tangents: v by parameter name; parameters that are not named stand still.
        output: gives F_R t.

    Returns:
        The product, and whether forward mode can be believed for it.
    """
    inputs = move(inputs, network.device)
    with as_guest(network.model):
        own = network.parameters
        # the parameters themselves: reverse mode then sees uses that forward mode does not, and the two disagree
        leaves = {
            name: own[name] if own[name].requires_grad else own[name].detach().requires_grad_() for name in tangents
        }
        try:
            z, t, hidden = _dual(network, inputs, leaves, tangents)
        except (RuntimeError, TypeError):  # an operation without forward mode; another fault shows without it too
            return Product({}, 0.0, 0, False)
        u = output(z.detach(), t.detach())
        found = torch.autograd.grad(z, list(leaves.values()), u, allow_unused=True)
    parts = {
        name: torch.zeros_like(leaf) if g is None else densified(g)
        for (name, leaf), g in zip(leaves.items(), found, strict=True)
    }
    form = float((t.detach().double() * u.double()).sum())
    reverse = sum(_inner(g, tangents[name]) for name, g in parts.items())
    size = sum(_inner(g, g) for g in parts.values()) * sum(_inner(tangents[name], tangents[name]) for name in parts)
    rounding = 1e3 * torch.finfo(z.dtype).eps * size**0.5
    agrees = abs(form - reverse) <= TOLERANCE.get(network.coarsest(z), 0.1) * abs(form) + rounding + 1e-30
    return Product(parts, form, len(z), agrees and not hidden)


def tangent(network: Network, inputs: Inputs, tangents: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Output z and its directional derivative J v for a batch, forward mode only."""
    inputs = move(inputs, network.device)
    with as_guest(network.model), torch.no_grad():
        own = network.parameters
        z, t, _ = _dual(network, inputs, {name: own[name].detach() for name in tangents}, tangents)
        return z, t


def try_forward_mode(network: Network, inputs: Inputs) -> bool:
    """Whether uᵀ(J d) equals (Jᵀu)ᵀd on a batch for random u and d; the network keeps the answer.

    u does not hang on J d, so that what is missing there shows in any example and output.
    """
    directions = {name: noise(p, i) for i, (name, p) in enumerate(network.parameters.items(), 1)}
    drawn = list[Tensor]()

    def dense(z: Tensor, t: Tensor) -> Tensor:
        drawn.append(noise(z, 0))
        return drawn[0]

    right = False
    with contextlib.suppress(RuntimeError, TypeError), warnings.catch_warnings():
        # torch scripts its own derivatives when forward mode is first used
        warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
        made = product(network, inputs, directions, dense)
        if made.agrees:
            # alone it runs without gradients, where a model may do something else
            _, t = tangent(network, inputs, directions)
            gap = abs(float((t.double() * drawn[0].double()).sum()) - made.form)
            size = float(torch.linalg.vector_norm(t.double()) * torch.linalg.vector_norm(drawn[0].double()))
            right = gap <= TOLERANCE.get(network.coarsest(t), 0.1) * size + 1e-30
    network.note(forward_mode=right)
    return right


def _dual(
    network: Network, inputs: Inputs, leaves: Mapping[str, Tensor], tangents: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, bool]:
    """Output z with its graph to the leaves, the tangent J v, and whether a use of a leaf has no part in it.

    The level is left before the caller goes backward: the reverse pass must not drag tangents along.
    """
    with _one_level, forward_ad.dual_level(), _Rules():
        # copies: an operation in place on a parameter changes its tangent in place too
        duals = {name: forward_ad.make_dual(leaf, tangents[name].clone()) for name, leaf in leaves.items()}
        z, t = forward_ad.unpack_dual(network.functional(duals, inputs))
    network.likelihood.check_output(z)
    if not bool(torch.isfinite(z).all()):
        raise ValueError("NaN or infinite values in the output; check the data and the weights before probing.")
    return z, torch.zeros_like(z) if t is None else t, _hidden(z, leaves.values(), duals.values())


def _hidden(z: Tensor, leaves: Collection[Tensor], duals: Collection[Tensor]) -> bool:
    """Whether an output's graph reaches a leaf past its dual: from a list, a closure, a view that was made before."""
    seen = {dual.grad_fn for dual in duals}
    own = {id(leaf) for leaf in leaves}
    there = (node for node in behind(z.grad_fn) if node not in seen and not empty(node))
    return any(id(getattr(before, "variable", None)) in own for node in there for before, _ in node.next_functions)


def _inner(x: Tensor, y: Tensor) -> float:
    """Inner product in at least float32, without a temporary as large as the parameters."""
    work = torch.promote_types(x.dtype, torch.float32)
    return float(torch.dot(x.reshape(-1).to(work), y.reshape(-1).to(work)))


class _Rules(TorchFunctionMode):
    """Rules of forward mode where torch's own waste work or differ from reverse mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and not kwargs and forward_ad.unpack_dual(args[0]).tangent is None:
            return _linear(*args)
        z = func(*args, **kwargs)
        return _without_padding(z, *args, **kwargs) if func is F.embedding else z


def _linear(x: Tensor, *parameters: Any) -> Tensor:
    """A linear layer on an input without a tangent, such as the data: torch would multiply one of zeros."""
    pairs = [forward_ad.unpack_dual(p) for p in parameters if p is not None]
    if any(pair.tangent is None for pair in pairs):
        return F.linear(x, *parameters)
    z = F.linear(x, *(pair.primal for pair in pairs))
    return forward_ad.make_dual(z, F.linear(x, *(pair.tangent for pair in pairs)))


def _without_padding(
    z: Tensor, ids: Tensor, weight: Tensor, padding_idx: int | None = None, *_: Any, **__: Any
) -> Tensor:
    """The output of an embedding without the tangent of its padding row, which has no gradient in reverse mode."""
    primal, tangent = forward_ad.unpack_dual(z)
    if padding_idx is None or tangent is None:
        return z
    padding = (ids == padding_idx % len(weight)).unsqueeze(-1)
    return forward_ad.make_dual(primal, tangent.masked_fill(padding, 0))
