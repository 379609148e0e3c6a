"""What a probed module's parameters look like: one matrix W̄ (d_out, da), bias last, and its unfolded inputs.

How the layers' matrices stand in one flat vector is for `space`; which layers there are, for `discover`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fisherviz.network.patches import convolution_patches, fast_patches

_UNFOLD_ENTRIES = 2**20
"""Entries of patches that are unfolded at once, about."""
_KINDS: dict[Any, str] = {
    nn.Linear.forward: "linear", nn.Conv1d.forward: "conv1d", nn.Conv2d.forward: "conv2d", nn.Conv3d.forward: "conv3d",
}  # fmt: skip
"""Structured layers, by what their modules do."""


@dataclass(frozen=True)
class LayerInfo:
    """What one probed layer is.

    Attributes:
        name: the module's name in the model, "" for the root.
        kind: "linear", "conv1d", "conv2d", "conv3d" or the module's class name in lower case.
        parameters: names of its probed parameters, as in `model.named_parameters()`.
        num_parameters: their number of entries.
        in_features: fan-in of one output unit, without the bias; 0 for generic layers.
        out_features: output units or channels; 0 for generic layers.
        bias: whether a probed bias is there.
        path: "structured" (inputs and pseudo-gradients) or "generic" (per-example gradients by `torch.func`).
        note: why the generic path was taken, or "".
    """

    name: str
    kind: str
    parameters: tuple[str, ...]
    num_parameters: int
    in_features: int
    out_features: int
    bias: bool
    path: str
    note: str = ""


@dataclass(frozen=True, eq=False)
class Layer:
    """A probed module with the geometry of its parameters and the path that it takes (see `LayerInfo`)."""

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    kind: str
    structured: bool
    note: str = ""
    roles: Mapping[str, str] = field(default_factory=dict, repr=False)
    """What the module calls each probed parameter, by the parameter's name: a pass may swap its tensors."""

    @property
    def size(self) -> int:
        """Number P of parameters."""
        return sum(p.numel() for p in self.parameters.values())

    @property
    def has_weight(self) -> bool:
        """Whether the module's weight is probed."""
        return "weight" in self.roles.values()

    @property
    def has_bias(self) -> bool:
        """Whether the module's bias is probed."""
        return "bias" in self.roles.values()

    @property
    def groups(self) -> int:
        """Groups of a convolution, 1 otherwise."""
        return getattr(self.module, "groups", 1) if self.structured else 1

    @property
    def fan_in(self) -> int:
        """Inputs of one output unit, without the bias; 0 for generic layers and frozen weights."""
        if not self.structured or not self.has_weight:
            return 0
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return math.prod(weight.shape[1:])

    @property
    def d_out(self) -> int:
        """Output units or channels; 0 for generic layers."""
        if not self.structured:
            return 0
        return int(getattr(self.module, "out_features", 0) or getattr(self.module, "out_channels", 0))

    @property
    def da(self) -> int:
        """Width of W̄: fan-in and the bias coordinate; P for generic layers."""
        return self.fan_in + int(self.has_bias) if self.structured else self.size

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape (d_out, da) of W̄; (1, P) for generic layers."""
        return (self.d_out, self.da) if self.structured else (1, self.size)

    def info(self) -> LayerInfo:
        """Plain description of the layer."""
        return LayerInfo(
            name=self.name,
            kind=self.kind,
            parameters=tuple(self.parameters),
            num_parameters=self.size,
            in_features=self.fan_in,
            out_features=self.d_out,
            bias=self.structured and self.has_bias,
            path="structured" if self.structured else "generic",
            note=self.note,
        )

    # ---- what the forward and backward passes show --------------------------------------------------------------

    def inputs(self, x: Tensor) -> Tensor:
        """Inputs with the bias coordinate: (N, T, da), or (N, T, groups, da) for grouped convolutions."""
        if not self.has_weight:
            return self._ones(x)
        if not self.has_bias:
            return self._unfold(x)
        if self.kind == "linear":
            columns = self._unfold(x)
            return torch.cat([columns, columns.new_ones(*columns.shape[:-1], 1)], -1)
        return self._unfold_with_bias(x)

    def _unfold_with_bias(self, x: Tensor) -> Tensor:
        """Patches with the bias coordinate, some examples at a time: large temporaries cost by their fresh pages."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        step = max(1, _UNFOLD_ENTRIES // max(1, x[:1].numel() * weight.shape[2:].numel()))
        columns: Tensor | None = None
        for start in range(0, max(1, len(x)), step):
            part = self._unfold(x[start : start + step])
            if columns is None:
                columns = part.new_empty(len(x), *part.shape[1:-1], part.shape[-1] + 1)
                columns[..., -1] = 1
            columns[start : start + step, ..., :-1] = part
        assert columns is not None
        return columns

    def output_gradients(self, g: Tensor) -> Tensor:
        """Gradients (K, N, ...) at the module's output as (K, N, T, dg) or (K, N, T, groups, dg)."""
        if self.kind == "linear":
            return g.reshape(*g.shape[:2], math.prod(g.shape[2:-1]), g.shape[-1])
        g = g.flatten(3).transpose(2, 3)
        return g.unflatten(3, (self.groups, -1)) if self.groups > 1 else g

    def _unfold(self, x: Tensor) -> Tensor:
        if self.kind == "linear":
            return x.reshape(len(x), -1, x.shape[-1])
        if self.groups == 1 and (fast := fast_patches(self.module, x)) is not None:
            return fast
        columns = convolution_patches(self.module, x)  # (N, T, C, kernel)
        if self.groups > 1:
            columns = columns.unflatten(2, (self.groups, -1))
        return columns.flatten(-2)

    def _ones(self, x: Tensor) -> Tensor:
        """The bias coordinate alone, for a frozen weight."""
        if self.kind == "linear":
            return x.new_ones(len(x), math.prod(x.shape[1:-1]), 1)
        positions = convolution_patches(self.module, x[:1, :1]).shape[1]
        shape = (len(x), positions, self.groups, 1) if self.groups > 1 else (len(x), positions, 1)
        return x.new_ones(shape)

    @property
    def columns(self) -> dict[str, slice]:
        """Columns of W̄ that each parameter takes, by name; generic layers are one row, parameter after parameter."""
        if self.structured:
            parts = {"weight": slice(0, self.fan_in), "bias": slice(self.fan_in, self.da)}
            return {name: parts[self.roles[name]] for name in self.parameters}
        ends = list(itertools.accumulate(p.numel() for p in self.parameters.values()))
        return {name: slice(end - p.numel(), end) for end, (name, p) in zip(ends, self.parameters.items(), strict=True)}


def make_layer(name: str, module: nn.Module, parameters: Mapping[str, nn.Parameter], shared: bool) -> Layer:
    """Describe a module: structured for plain Linear and convolutions, generic for everything else.

    Args:
        name: the module's name in the model.
        module: the module.
        parameters: the parameters that it contributes, by their names in the model.
        shared: whether one of its parameters also belongs to another module.

    Returns:
        The layer.
    """
    kind, note = _KINDS.get(type(module).forward, type(module).__name__.lower()), ""
    if type(module).forward not in _KINDS:
        note = f"{type(module).__name__} has no Kronecker structure"
    elif shared:
        note = "a parameter is shared with another module"
    elif not _owns_plain_parameters(module, parameters):
        note = "its weight or bias is reparametrised, or it owns further parameters"
    keys = {id(p): key for key, p in module._parameters.items()}
    roles = {own: keys[id(p)] for own, p in parameters.items()}
    return Layer(name, module, dict(parameters), kind, not note, note, roles)


def _owns_plain_parameters(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> bool:
    own = {key: p for key, p in module._parameters.items() if p is not None}
    return (
        set(own) <= {"weight", "bias"}
        and all(any(p is q for q in own.values()) for p in parameters.values())
        and not hasattr(module, "parametrizations")
        and isinstance(getattr(module, "weight", None), nn.Parameter)
    )
