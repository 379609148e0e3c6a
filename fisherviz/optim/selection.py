"""Which layers an optimizer preconditions, and their gradients as unit-order matrices.

Parameters in groups with approximation="none" belong to no layer; a layer keeps what is left of it (DESIGN
section 7).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fisherviz.approximations import Approximation
from fisherviz.network.discover import find_layers
from fisherviz.network.guest import check_modes
from fisherviz.network.layers import Layer, make_layer
from fisherviz.operators.damping import Damping
from fisherviz.optim.watcher import at_least_float32


def unwrap(model: nn.Module) -> nn.Module:
    """The module to be hooked: the inner one of DistributedDataParallel; compiled models are refused.

    Raises:
        TypeError: the model is no module.
        RuntimeError: it has been compiled already, or is replicated over devices in one process.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return unwrap(model.module)
    if isinstance(model, nn.DataParallel):
        raise RuntimeError(
            "nn.DataParallel replicates the model on every forward, where no hook of an optimizer follows; "
            "use DistributedDataParallel."
        )
    for module in model.modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise RuntimeError(
                "the model is compiled already, and hooks put on it now would not run; "
                "create the optimizer first, then call torch.compile(model)."
            )
    return model


def choose_layers(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> list[Layer]:
    """Layers of the parameters whose group has an approximation.

    Args:
        model: the model.
        groups: the optimizer's parameter groups.

    Returns:
        The layers in torch order; empty where every group is plain.

    Raises:
        ValueError: a preconditioned parameter is not the model's.
    """
    chosen = {id(p): p for group in groups if group["approximation"] != "none" for p in group["params"]}
    own = {id(p) for p in model.parameters()}
    if foreign := [p for key, p in chosen.items() if key not in own]:
        raise ValueError(
            f"{len(foreign)} of the parameters do not belong to the model; put them in a group with "
            f"approximation='none'."
        )
    if not any(p.requires_grad for p in chosen.values()):
        return []
    layers = []
    for layer in find_layers(model, None)[0]:
        mine = {name: p for name, p in layer.parameters.items() if id(p) in chosen}
        if mine:
            tied = not layer.structured and "shared" in layer.note
            layers.append(
                layer if len(mine) == len(layer.parameters) else make_layer(layer.name, layer.module, mine, tied)
            )
    return layers


def refuse_thawed(groups: Iterable[Mapping[str, Any]], known: set[nn.Parameter]) -> None:
    """Raise where a parameter has a gradient that was frozen, or not there, when the layers were chosen."""
    for group in groups:
        if group["approximation"] != "none" and any(p.grad is not None and p not in known for p in group["params"]):
            raise RuntimeError(
                "a parameter that was frozen when the optimizer was created, or added by add_param_group since, has a "
                "gradient; create the optimizer after unfreezing and with all groups, or put the parameter in a group "
                "with approximation='none'."
            )


def one_damping(layer: Layer, dampings: Mapping[nn.Parameter, float | Damping]) -> float | Damping:
    """The damping that a layer's parameters agree on; ValueError where they do not."""
    mine = [dampings[p] for p in layer.parameters.values()]
    if any(value != mine[0] for value in mine):
        raise ValueError(
            f"the parameters of layer {layer.name!r} are in groups with different dampings; give them one."
        )
    return mine[0]


def gradient_matrix(layer: Layer, weight_decay: Mapping[nn.Parameter, float]) -> Tensor:
    """The layer's gradient plus weight decay, (d_out, da) with the bias last; (1, P) for generic layers.

    Missing gradients count as zero.
    """
    return matrix_of(layer, layer_gradients(layer, weight_decay))


def layer_gradients(layer: Layer, weight_decay: Mapping[nn.Parameter, float]) -> dict[nn.Parameter, Tensor]:
    """The layer's gradients plus weight decay, by parameter; parameters without one are left out."""
    gradients = {}
    for p in layer.parameters.values():
        if p.grad is None:
            continue
        if p.grad.is_sparse:
            raise RuntimeError(
                f"layer {layer.name!r} has a sparse gradient, which no approximation takes; "
                "put it in a group with approximation='none'."
            )
        gradients[p] = p.grad.add(p, alpha=weight_decay[p]) if weight_decay.get(p) else p.grad
    return gradients


def matrix_of(layer: Layer, tensors: Mapping[nn.Parameter, Tensor]) -> Tensor:
    """Tensors of a layer's parameters as one (d_out, da) matrix with the bias last; missing ones are zero."""
    rows = layer.d_out if layer.structured else 1
    parts = [
        at_least_float32(tensors[p] if p in tensors else torch.zeros_like(p)).reshape(rows, -1)
        for p in ordered_parameters(layer)
    ]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def split_matrix(layer: Layer, direction: Tensor) -> dict[nn.Parameter, Tensor]:
    """The parameters' shares of a direction (d_out, da) or (P,) in unit order."""
    parameters = ordered_parameters(layer)
    rows = layer.d_out if layer.structured else 1
    matrix = direction.reshape(rows, -1)
    pieces = matrix.split([p.numel() // rows for p in parameters], 1)
    return {p: piece.reshape(p.shape).to(p.dtype) for p, piece in zip(parameters, pieces, strict=True)}


def ordered_parameters(layer: Layer) -> list[nn.Parameter]:
    """The parameters from left to right in W̄, whatever the order of registration."""
    columns = layer.columns
    return [layer.parameters[name] for name in sorted(columns, key=lambda name: columns[name].start)]


def rows_explain(layer: Layer, a: Tensor, g: Tensor, exact: float = 32.0) -> bool:
    """Whether `.grad` is gᵀ a to rounding, and no hook of the user's may have made it something else.

    Looked at in two ways: all of it times one vector of random signs, which a change of single units' rows does not
    survive, and entry by entry on a few units, where a small penalty on all weights shows.
    """
    gradients = []
    for p in ordered_parameters(layer):
        if p.grad is None or p._backward_hooks or p._post_accumulate_grad_hooks:
            return False
        gradients.append(at_least_float32(p.grad).reshape(layer.d_out, -1))
    rounding = exact * torch.finfo(a.dtype).eps
    signs = _signs(a.shape[1], a.dtype, a.device)
    parts = signs.split([gradient.shape[1] for gradient in gradients])
    gap = torch.mv(g.mT, torch.mv(a, signs))
    for gradient, part in zip(gradients, parts, strict=True):
        gap.addmv_(gradient, part, alpha=-1)
    inputs, outputs = a.abs(), g.abs()
    if not bool((gap.abs_() <= rounding * torch.mv(outputs.mT, inputs.sum(1))).all()):
        return False
    every = slice(None, None, max(1, layer.d_out // 4))
    few = torch.cat([gradient[every] for gradient in gradients], 1)
    few.addmm_(g[:, every].mT, a, alpha=-1)
    return bool((few.abs_() <= rounding * (outputs[:, every].mT @ inputs)).all())


@lru_cache(maxsize=64)
def _signs(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random signs, the same for every call."""
    generator = torch.Generator().manual_seed(n)
    return (torch.randint(2, (n,), generator=generator) * 2 - 1).to(device=device, dtype=dtype)


def say_once(sentence: str) -> None:
    """A warning at the user's line."""
    warnings.warn(sentence, stacklevel=3)


def settle(
    model: nn.Module,
    layers: Sequence[Layer],
    generic: Sequence[Layer],
    approximation: Approximation,
) -> list[Layer]:
    """Layers that are preconditioned; what happens to those without structure is said once.

    Args:
        model: the model.
        layers: all layers.
        generic: those without structure.
        approximation: what preconditions.

    Returns:
        The layers that are not left plain.
    """
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules()):
        say_once("BatchNorm in training mode couples the examples; the Fisher is that of each example given the rest.")
    if not generic:
        return list(layers)
    names = ", ".join(repr(layer.name) for layer in generic)
    why = "; ".join(f"{layer.name!r}: {layer.note}" for layer in generic)
    try:
        check_modes(model)
    except ValueError:
        say_once(
            f"layers {names} have no structure and are left plain: active Dropout or training BatchNorm leaves no "
            f"gradients of single examples ({why})."
        )
        return [layer for layer in layers if layer.structured]
    if not approximation.handles_generic:
        say_once(f"layers {names} have no structure; they are preconditioned by the exact diagonal ({why}).")
    return list(layers)
