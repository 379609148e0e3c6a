"""What a probed module's parameters look like: unfolded inputs with the bias coordinate, and parameter orders.

A structured layer's parameters are one matrix W̄ (d_out, da), bias last; unit order is W̄ row by row, input order
W̄ᵀ row by row, torch order the weight row by row and then the bias (DESIGN section 4). Every operator is in unit order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor, nn

Order = Literal["torch", "unit", "input"]
ORDERS: tuple[Order, ...] = ("torch", "unit", "input")
_UNFOLD_ENTRIES = 2**20
"""Entries of patches that are unfolded at once, about."""
_CONVOLUTIONS = {nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d"}


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


@dataclass(eq=False)
class Layer:
    """A probed module with the geometry of its parameters; `structured` may turn off when a check refutes it."""

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    kind: str
    structured: bool
    note: str = ""
    clone_input: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        """Note which of the module's parameters are probed, in its order: a pass may swap its tensors."""
        probed = {id(p) for p in self.parameters.values()}
        self.own = tuple(key for key, p in self.module._parameters.items() if id(p) in probed)

    @property
    def size(self) -> int:
        """Number P of parameters."""
        return sum(p.numel() for p in self.parameters.values())

    @property
    def has_weight(self) -> bool:
        """Whether the module's weight is probed."""
        return "weight" in self.own

    @property
    def has_bias(self) -> bool:
        """Whether the module's bias is probed."""
        return "bias" in self.own

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

    def make_generic(self, note: str) -> None:
        """Leave the structured path for good, and say why."""
        self.structured, self.note = False, note
        for name in ("torch_from_unit", "unit_from_torch", "input_from_unit"):
            self.__dict__.pop(name, None)

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
        if self.groups == 1 and (fast := _fast_patches(self.module, x)) is not None:
            return fast
        columns = _convolution_patches(self.module, x)  # (N, T, C, kernel)
        if self.groups > 1:
            columns = columns.unflatten(2, (self.groups, -1))
        return columns.flatten(-2)

    def _ones(self, x: Tensor) -> Tensor:
        """The bias coordinate alone, for a frozen weight."""
        if self.kind == "linear":
            return x.new_ones(len(x), math.prod(x.shape[1:-1]), 1)
        positions = _convolution_patches(self.module, x[:1, :1]).shape[1]
        shape = (len(x), positions, self.groups, 1) if self.groups > 1 else (len(x), positions, 1)
        return x.new_ones(shape)

    @property
    def pieces(self) -> list[tuple[slice, slice, tuple[int, int]]]:
        """Weight and bias: range in torch order, columns of W̄, shape."""
        units, width = self.matrix_shape
        weights = self.fan_in if self.structured else width
        found = []
        if weights:
            found.append((slice(0, units * weights), slice(0, weights), (units, weights)))
        if width > weights:
            found.append((slice(units * weights, units * width), slice(weights, width), (units, width - weights)))
        return found

    def torch_parts(self, v: Tensor) -> list[Tensor]:
        """A unit-order vector (P, ...) as consecutive parts of the torch-order one: weight, bias."""
        if not self.structured:
            return [v]
        matrix = v.unflatten(0, self.matrix_shape)
        return [matrix[:, columns].flatten(0, 1) for _, columns, _ in self.pieces]

    def to_unit(self, v: Tensor) -> Tensor:
        """A torch-order vector (P, ...) in unit order."""
        if not self.structured or len(self.pieces) == 1:
            return v
        return torch.cat([v[rows].unflatten(0, shape) for rows, _, shape in self.pieces], 1).flatten(0, 1)

    # ---- parameter orders ---------------------------------------------------------------------------------------

    @cached_property
    def torch_from_unit(self) -> Tensor:
        """Index p with torch_vector = unit_vector[p]."""
        index = torch.arange(self.size)
        if not self.structured:
            return index
        matrix = index.reshape(self.matrix_shape)
        pieces = {
            "weight": matrix[:, : self.fan_in].reshape(-1),
            "bias": matrix[:, self.fan_in :].reshape(-1),
        }
        return torch.cat([pieces[key] for key in self.own])

    @cached_property
    def unit_from_torch(self) -> Tensor:
        """Index p with unit_vector = torch_vector[p]."""
        return torch.argsort(self.torch_from_unit)

    @cached_property
    def input_from_unit(self) -> Tensor:
        """Index p with input_order_vector = unit_vector[p]."""
        index = torch.arange(self.size)
        return index.reshape(self.matrix_shape).T.reshape(-1) if self.structured else index

    def from_unit(self, order: Order) -> Tensor:
        """Index that turns a unit-order vector into the given order."""
        if order == "torch":
            return self.torch_from_unit
        if order == "unit":
            return torch.arange(self.size)
        if order == "input":
            return self.input_from_unit
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}.")


class ParameterSpace:
    """The probed parameters as one vector: flat in torch order, a dictionary, or one unit-order vector per layer."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self.names = tuple(layer.name for layer in self.layers)
        self.sizes = tuple(layer.size for layer in self.layers)
        self.size = sum(self.sizes)
        self.offsets = [0]
        for size in self.sizes:
            self.offsets.append(self.offsets[-1] + size)

    def position(self, layer: str | int | LayerInfo) -> int:
        """Position of a layer given by name, position or `LayerInfo`."""
        if isinstance(layer, LayerInfo):
            layer = layer.name
        if isinstance(layer, Integral) and not isinstance(layer, bool):
            layer = int(layer)
        if isinstance(layer, bool) or not isinstance(layer, str | int):
            raise TypeError(f"a layer is given by its name or position, got {type(layer).__name__}.")
        if isinstance(layer, str):
            if layer not in self.names:
                raise ValueError(
                    f"no probed layer is called {layer!r}; the layers are {', '.join(map(repr, self.names))}."
                )
            return self.names.index(layer)
        if not -len(self.layers) <= layer < len(self.layers):
            raise ValueError(f"layer position {layer} is out of range; there are {len(self.layers)} layers.")
        return layer % len(self.layers)

    def split(self, v: Tensor) -> list[Tensor]:
        """Unit-order vectors (P_i, ...) of the layers from a flat torch-order one (P, ...)."""
        if v.dim() not in (1, 2) or v.shape[0] != self.size:
            raise ValueError(
                f"a flat vector must have {self.size} entries (or shape ({self.size}, k)), got {tuple(v.shape)}."
            )
        pieces = torch.split(v, list(self.sizes))
        return [layer.to_unit(piece) for layer, piece in zip(self.layers, pieces, strict=True)]

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """Flat torch-order vector (P, ...) from the layers' unit-order ones."""
        return torch.cat([part for layer, p in zip(self.layers, pieces, strict=True) for part in layer.torch_parts(p)])

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Flat torch-order vector from a dictionary name -> tensor like `named_parameters()`."""
        expected = [name for layer in self.layers for name in layer.parameters]
        missing, unknown = set(expected) - set(tensors), set(tensors) - set(expected)
        if missing or unknown:
            raise ValueError(
                f"the dictionary must have exactly the probed parameters; missing: {sorted(missing) or 'none'}, "
                f"not probed: {sorted(unknown) or 'none'}."
            )
        for layer in self.layers:
            for name, p in layer.parameters.items():
                if not isinstance(tensors[name], Tensor):
                    raise TypeError(f"entry {name!r} must be a tensor, got {type(tensors[name]).__name__}.")
                if tensors[name].shape != p.shape:
                    raise ValueError(
                        f"entry {name!r} must have shape {tuple(p.shape)}, got {tuple(tensors[name].shape)}."
                    )
        return torch.cat([tensors[name].reshape(-1) for name in expected])

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """Dictionary name -> tensor from a flat torch-order vector (P,)."""
        out: dict[str, Tensor] = {}
        start = 0
        for layer in self.layers:
            for name, p in layer.parameters.items():
                out[name] = v[start : start + p.numel()].reshape(p.shape)
                start += p.numel()
        return out

    def index(self, order: Order) -> Tensor:
        """Index that turns a flat torch-order vector into the given order."""
        pieces = [
            layer.unit_from_torch[layer.from_unit(order)] + start
            for layer, start in zip(self.layers, self.offsets, strict=False)
        ]
        return torch.cat(pieces)

    def reorder_dense(self, matrix: Tensor, order: Order) -> Tensor:
        """A dense torch-order matrix in another order."""
        if order == "torch":
            return matrix
        index = self.index(order).to(matrix.device)
        return matrix[index][:, index]

    def write_block(self, out: Tensor, quarters: Tensor, row: int, col: int, scale: float = 1.0) -> None:
        """Write a block (dg, da, dg', da') between two layers, times `scale`, into a torch-order one (P_row, P_col)."""
        for rows, inputs, shape in self.layers[row].pieces:
            for cols, others, other_shape in self.layers[col].pieces:
                target = out[rows, cols].unflatten(1, other_shape).unflatten(0, shape)
                torch.mul(quarters[:, inputs, :, others], scale, out=target)

    def reorder_block(self, block: Tensor, row: int, col: int, order: Order) -> Tensor:
        """A unit-order block between two layers in another order."""
        if order == "unit":
            return block
        if order == "torch":
            out = torch.empty_like(block)
            shapes = self.layers[row].matrix_shape, self.layers[col].matrix_shape
            self.write_block(out, block.reshape(*shapes[0], *shapes[1]), row, col)
            return out
        rows = self.layers[row].from_unit(order).to(block.device)
        cols = self.layers[col].from_unit(order).to(block.device)
        return block[rows][:, cols]


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
    kind, note = type(module).__name__.lower(), ""
    structured = False
    if type(module).forward is nn.Linear.forward:
        kind, structured = "linear", True
    for cls, cls_kind in _CONVOLUTIONS.items():
        if type(module).forward is cls.forward:
            kind, structured = cls_kind, True
    if not structured:
        note = f"{type(module).__name__} has no Kronecker structure"
    elif shared:
        structured, note = False, "a parameter is shared with another module"
    elif not _owns_plain_parameters(module, parameters):
        structured, note = False, "its weight or bias is reparametrised, or it owns further parameters"
    return Layer(name, module, dict(parameters), kind, structured, note)


def _owns_plain_parameters(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> bool:
    own = {key: p for key, p in module._parameters.items() if p is not None}
    return (
        set(own) <= {"weight", "bias"}
        and all(any(p is q for q in own.values()) for p in parameters.values())
        and not hasattr(module, "parametrizations")
        and isinstance(getattr(module, "weight", None), nn.Parameter)
    )


def _fast_patches(module: nn.Module, x: Tensor) -> Tensor | None:
    """Patches (N, T, C kernel) of a two-dimensional convolution with padding by zeros, by torch's own unfolding."""
    if not isinstance(module, nn.Conv2d) or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None
    columns = nn.functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    return columns.transpose(1, 2)


def _convolution_patches(module: nn.Module, x: Tensor) -> Tensor:
    """Patches (N, T, C, kernel) that a convolution multiplies its filters with, padding included."""
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    dims = len(module.kernel_size)
    pad: list[int] = []
    for d in reversed(range(dims)):
        if module.padding == "same":
            total = module.dilation[d] * (module.kernel_size[d] - 1)
            pad += [total // 2, total - total // 2]
        elif module.padding == "valid":
            pad += [0, 0]
        else:
            pad += [int(module.padding[d])] * 2
    if any(pad):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = nn.functional.pad(x, pad, mode=mode)
    for d in range(dims):
        span = module.dilation[d] * (module.kernel_size[d] - 1) + 1
        x = x.unfold(2 + d, span, module.stride[d])[..., :: module.dilation[d]]
    # (N, C, out..., kernel...) -> (N, T, C, kernel)
    x = x.flatten(2 + dims)
    return x.movedim(1, -2).flatten(1, dims)
