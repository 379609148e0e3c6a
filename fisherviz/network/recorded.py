"""The geometry of layers without their network: what a saved matrix needs to know the order of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fisherviz.network.base import Stored
from fisherviz.network.layers import Layer, LayerInfo, Part
from fisherviz.network.space import ParameterSpace


@dataclass(frozen=True, eq=False)
class RecordedLayer(Layer):
    """A layer as it was when a matrix over it was saved; it has parameters' shapes, but no module that runs."""

    recorded: LayerInfo | None = None
    columns: tuple[Part, ...] = ()

    def info(self) -> LayerInfo:
        """Plain description of the layer."""
        assert self.recorded is not None
        return self.recorded

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parameters from left to right in W̄."""
        return self.columns

    @property
    def has_bias(self) -> bool:
        """Whether the module's bias was probed."""
        return self.info().bias

    @property
    def fan_in(self) -> int:
        """Inputs of one output unit, without the bias; 0 for generic layers."""
        return self.info().in_features

    @property
    def d_out(self) -> int:
        """Output units or channels; 0 for generic layers."""
        return self.info().out_features


def recorded(space: ParameterSpace) -> dict[str, Any]:
    """The space in plain values, for JSON."""
    return {
        "order": [place.name for place in space.places],
        "layers": [{"info": vars(layer.info()), "parts": [_plain(part) for part in layer.parts]}
                   for layer in space.layers],
    }  # fmt: skip


def restored(plain: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> ParameterSpace:
    """The space that `recorded` wrote down.

    Args:
        plain: its plain values.
        dtype: of the parameters.
        device: where vectors over them live.

    Returns:
        A space whose layers are `RecordedLayer`.
    """
    layers = []
    for each in plain["layers"]:
        info = LayerInfo(**each["info"] | {"parameters": tuple(each["info"]["parameters"])})
        parts = tuple(_part(part) for part in each["parts"])
        shapes = {part.name: part.shape for part in parts}
        # views of one number: the shapes take no memory
        parameters = {
            name: nn.Parameter(torch.zeros((), dtype=dtype, device=device).expand(shapes[name]), requires_grad=False)
            for name in info.parameters
        }
        structured = info.path == "structured"
        layers.append(
            RecordedLayer(
                info.name, nn.Module(), parameters, info.kind, structured, info.note, recorded=info, columns=parts
            )
        )
    return ParameterSpace(layers, plain["order"])


def _plain(part: Part) -> dict[str, Any]:
    columns = [part.columns.start, part.columns.stop]
    return {"name": part.name, "shape": list(part.shape), "columns": columns, "rows": part.rows, "stored": part.stored}


def _part(plain: Mapping[str, Any]) -> Part:
    stored = None if plain["stored"] is None else Stored(*map(tuple, plain["stored"]))
    return Part(plain["name"], torch.Size(plain["shape"]), slice(*plain["columns"]), plain["rows"], stored)
