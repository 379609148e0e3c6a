"""Which modules a Probe attaches to: names or modules chosen, tied parameters counted once, frozen ones left out.

The result is a list of `Layer`s in torch order and the reasons for everything left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from fisherviz.network.layers import Layer, make_layer
from fisherviz.support.choices import did_you_mean


def find_layers(
    model: nn.Module, wanted: Sequence[str | nn.Module] | str | nn.Module | None
) -> tuple[list[Layer], list[tuple[str, str]]]:
    """Probed layers in the order of their first parameters, and (name, reason) of what is left out."""
    modules = dict(model.named_modules())
    chosen = set(modules.values()) if wanted is None else _choose(modules, wanted)
    names = {id(p): name for name, p in model.named_parameters()}
    holders: dict[int, list[nn.Module]] = {}
    for module in modules.values():
        for p in module._parameters.values():
            holders.setdefault(id(p), []).append(module)
    rank = {name: i for i, name in enumerate(names.values())}
    layers: list[Layer] = []
    left_out: list[tuple[str, str]] = []
    taken: dict[int, str] = {}
    for name, module in modules.items():
        own = {key: p for key, p in module._parameters.items() if p is not None}
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise TypeError(
                f"module {name or '(root)'!r} is FullyShardedDataParallel, whose flat parameters hide the layers and "
                "are in parts in the processes; use whole parameters, as DistributedDataParallel does."
            )
        if not own:
            continue
        if module not in chosen:
            left_out.append((name or "(root)", "not among layers="))
            continue
        mine: dict[str, nn.Parameter] = {}
        for key, p in own.items():
            full = f"{name}.{key}" if name else key
            if hasattr(p, "placements"):
                raise TypeError(
                    f"{full!r} is a DTensor (FSDP2, tensor parallelism), of which this process holds a part, while its "
                    "layer's Fisher couples all of it; use whole parameters, as DistributedDataParallel does."
                )
            if isinstance(p, nn.parameter.UninitializedParameter):
                raise ValueError(
                    f"{full!r} of a lazy module has no values yet; run the model once on some inputs before the Probe."
                )
            if id(p) in taken:
                left_out.append((full, f"tied to {taken[id(p)]}, counted there"))
            elif not p.requires_grad:
                left_out.append((full, "frozen (requires_grad=False)"))
            elif p.is_complex():
                raise TypeError(f"{full!r} is complex; freeze it, or hold its real and imaginary parts as parameters.")
            elif p.is_meta:
                raise TypeError(
                    f"{full!r} is on the meta device, without values; give the model real parameters first."
                )
            else:
                mine[names[id(p)]] = p
                taken[id(p)] = names[id(p)]
        if mine and isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"module {name or '(root)'!r} is a {type(module).__name__}, which takes no hooks; "
                "put the module it was made of in its place, or freeze it."
            )
        if mine:
            mine = dict(sorted(mine.items(), key=lambda item: rank[item[0]]))
            sharing = dict.fromkeys(other for p in mine.values() for other in holders[id(p)])
            layers.append(make_layer(name, module, mine, sharing))
    if not layers:
        raise ValueError("no trainable parameter is left to probe; set requires_grad=True or choose other layers=.")
    # a tied parameter may stand earlier in named_parameters() than the module that was chosen for it
    layers.sort(key=lambda layer: min(rank[name] for name in layer.parameters))
    return layers, left_out


def check_types(layers: Sequence[Layer], what: str = "probed", least: torch.dtype | None = None) -> None:
    """Refuse parameters of several types.

    Args:
        layers: whose parameters.
        what: they are called.
        least: a type that smaller ones count as, where these may be mixed.

    Raises:
        ValueError: they have several types; the message names a parameter of each.
    """
    kinds: dict[torch.dtype, tuple[str, torch.dtype]] = {}
    for layer in layers:
        for name, p in layer.parameters.items():
            kinds[p.dtype if least is None else torch.promote_types(p.dtype, least)] = name, p.dtype
    if len(kinds) > 1:
        examples = ", ".join(f"{name!r} is {str(dtype).removeprefix('torch.')}" for name, dtype in kinds.values())
        raise ValueError(f"the {what} parameters have several types ({examples}); convert the model to one with .to().")


def _choose(modules: dict[str, nn.Module], wanted: Sequence[str | nn.Module] | str | nn.Module) -> set[nn.Module]:
    """The modules named, each with all modules inside it."""
    if not isinstance(wanted, str | nn.Module | Iterable):
        raise TypeError(f"layers= takes names or modules, got {type(wanted).__name__}.")
    items = [wanted] if isinstance(wanted, str | nn.Module) else list(wanted)
    if not items:
        raise ValueError("layers= names no layer; leave it out for all of them.")
    chosen: set[nn.Module] = set()
    for item in items:
        if isinstance(item, str):
            if item not in modules:
                raise ValueError(f"the model has no module called {item!r}{did_you_mean(item, modules)}")
            module = modules[item]
        elif isinstance(item, nn.Module):
            if all(item is not m for m in modules.values()):
                raise ValueError(f"the {type(item).__name__} given in layers= is not part of the model.")
            module = item
        else:
            raise TypeError(f"layers= takes names or modules, got {type(item).__name__}.")
        found = [m for m in module.modules() if any(p is not None for p in m._parameters.values())]
        if not found:
            raise ValueError(f"layer {item!r} owns no parameters; name a module that does.")
        chosen |= set(found)
    return chosen
