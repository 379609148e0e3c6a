"""Which layers an optimizer preconditions, and what happens to the others.

Parameters in groups with approximation="none" belong to no layer; a layer keeps what is left of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fisherviz.approximations import Approximation
from fisherviz.network.discover import check_types, find_layers
from fisherviz.network.guest import check_modes
from fisherviz.network.layers import Layer, make_layer
from fisherviz.support.warning import warn


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
        ValueError: a preconditioned parameter is not the model's, or they are of float64 and smaller types.
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
            if len(mine) < len(layer.parameters):
                layer = make_layer(layer.name, layer.module, mine, layer.ties)
            layers.append(layer)
    # matrices of half-precision layers are float32, like those of float32
    check_types(layers, "preconditioned", torch.float32)
    return layers


def precision_of(layers: Sequence[Layer]) -> str:
    """The type that the layers' matrices are in; "" without layers."""
    types = {torch.promote_types(p.dtype, torch.float32) for layer in layers for p in layer.parameters.values()}
    return ", ".join(sorted(str(one).removeprefix("torch.") for one in types))


def refuse_thawed(groups: Iterable[Mapping[str, Any]], known: set[nn.Parameter]) -> None:
    """Raise where a parameter has a gradient that was frozen, or not there, when the layers were chosen."""
    for group in groups:
        if group["approximation"] != "none" and any(p.grad is not None and p not in known for p in group["params"]):
            raise RuntimeError(
                "a parameter that was frozen when the optimizer was created, or added by add_param_group since, has a "
                "gradient; create the optimizer after unfreezing and with all groups, or put the parameter in a group "
                "with approximation='none'."
            )


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
        warn("BatchNorm in training mode couples the examples; the Fisher is that of each example given the rest.")
    if not generic:
        return list(layers)
    names = ", ".join(repr(layer.name) for layer in generic)
    why = "; ".join(f"{layer.name!r}: {layer.note}" for layer in generic)
    try:
        check_modes(model)
    except ValueError:
        warn(
            f"layers {names} have no structure and are left plain: active Dropout or training BatchNorm leaves no "
            f"gradients of single examples ({why})."
        )
        return [layer for layer in layers if layer.structured]
    if not approximation.handles_generic:
        warn(f"layers {names} have no structure; they are preconditioned by the exact diagonal ({why}).")
    return list(layers)
