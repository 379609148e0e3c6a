"""What a probed module's parameters look like: one matrix W̄ (d_out, da), bias last, and its unfolded inputs.

How the layers' matrices stand in one flat vector is for `space`; which layers there are, for `discover`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from fisherviz.network.base import Kind, Stored
from fisherviz.network.kinds import Embedding, kind_of
from fisherviz.support.tables import html_table, text_table


@dataclass(frozen=True)
class LayerInfo:
    """What one probed layer is.

    Attributes:
        name: the module's name in the model, "" for the root.
        kind: "linear", "conv1d", "conv2d", "conv3d" or the module's class name in lower case ("layernorm").
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


HEADS = ("layer", "kind", "parameters", "out x in", "path")
"""Of `LayerInfos.rows`."""
WORDS = (0, 1, 3, 4)
"""Which of these columns are words."""


class LayerInfos(tuple[LayerInfo, ...]):
    """What the probed layers are: a tuple that shows itself as a table."""

    __slots__ = ()

    def rows(self, looked: bool = True) -> list[tuple[str, ...]]:
        """Cells of a table, a row per layer.

        Args:
            looked: whether the model has been seen running; otherwise paths are what is expected.
        """
        rows: list[tuple[str, ...]] = []
        for info in self:
            shape = (
                f"{info.out_features} x {info.in_features}{' + 1' if info.bias else ''}" if info.out_features else ""
            )
            unchecked = info.path == "structured" and not looked
            why = f": {info.note}" if info.note else " if the first pass confirms it" if unchecked else ""
            rows.append((info.name or "(root)", info.kind, f"{info.num_parameters:,}", shape, info.path + why))
        return rows

    def __repr__(self) -> str:
        return text_table(HEADS, self.rows(), WORDS)

    def _repr_html_(self) -> str:
        return html_table(HEADS, self.rows(), words=WORDS)


@dataclass(frozen=True)
class Part:
    """A parameter as some columns of its layer's W̄.

    Attributes:
        name: as in `named_parameters()`.
        shape: of the parameter.
        columns: of W̄ (rows, da) that are the parameter.
        rows: of W̄.
        stored: how the entries lie in memory where that is not row by row.
    """

    name: str
    shape: torch.Size
    columns: slice
    rows: int
    stored: Stored | None

    @property
    def matrix(self) -> tuple[int, int]:
        """Its shape as a part of W̄: rows and columns."""
        return self.rows, self.columns.stop - self.columns.start

    def as_matrix(self, entries: Tensor) -> Tensor:
        """Its entries (numel, ...) as a part of W̄: (rows, columns, ...)."""
        if self.stored is None:
            return entries.unflatten(0, self.matrix)
        shape, axes = self.stored
        further = range(len(shape), len(shape) + entries.dim() - 1)
        return entries.unflatten(0, shape).permute(*axes, *further).reshape(*self.matrix, *entries.shape[1:])

    def as_entries(self, matrix: Tensor) -> Tensor:
        """A part of W̄ (rows, columns, ...) as the parameter's entries (numel, ...)."""
        if self.stored is None:
            return matrix.flatten(0, 1)
        shape, axes = self.stored
        matrix = matrix.reshape(*(shape[axis] for axis in axes), *matrix.shape[2:])
        back = sorted(range(len(axes)), key=axes.__getitem__)
        return matrix.permute(*back, *range(len(axes), matrix.dim())).flatten(0, len(axes) - 1)


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
    """Whether each probed parameter is the module's "weight" or "bias", by its name: a pass may swap its tensors."""
    ties: Mapping[nn.Module, frozenset[str]] = field(default_factory=dict, repr=False)
    """Other modules that act with its parameters, each with the roles of those that it shares."""
    of: Kind | None = field(default=None, repr=False)
    """What the module's class was when the layer was described."""

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
        """Groups of units that see inputs of their own: of a convolution, the features of a normalisation; else 1."""
        return self._kind.groups(self.module) if self.structured else 1

    @property
    def own_inputs(self) -> bool:
        """Whether every unit has an input of its own (normalisation, PReLU): unit blocks, but no Kronecker factors."""
        return self.structured and self._kind.own_inputs

    @property
    def one_hot(self) -> bool:
        """Whether its inputs are one-hot (embeddings): `inputs` gives their positions, and A is diagonal."""
        return self.structured and self._kind.one_hot

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Its module and those tied to it."""
        return (self.module, *self.ties)

    @property
    def both_ways(self) -> bool:
        """Whether its weight is both an embedding's table and a Linear's: W̄ acts as it is and transposed."""
        return self.structured and any(reads(module) != self.one_hot for module in self.ties)

    @property
    def factors(self) -> bool:
        """Whether the layer has Kronecker factors that can be coupled with other layers'."""
        return self.structured and not (self._kind.own_inputs or self._kind.one_hot or self.both_ways)

    @property
    def unseen(self) -> str:
        """Why it may act without having been seen."""
        return self._kind.unseen

    @property
    def fan_in(self) -> int:
        """Inputs of one output unit, without the bias; 0 for generic layers and frozen weights."""
        if not self.structured or not self.has_weight:
            return 0
        return self._kind.fan_in(self.module)

    @property
    def d_out(self) -> int:
        """Output units or channels; 0 for generic layers."""
        return self._kind.units(self.module) if self.structured else 0

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

    @property
    def _kind(self) -> Kind:
        assert self.of is not None
        return self.of

    def inputs(self, x: Tensor, outputs: torch.Size, module: nn.Module | None = None) -> Tensor:
        """Inputs with the bias coordinate: (N, T, da), (N, T, groups, da) of grouped convolutions, or tokens (N, T).

        What a tied module does not share of W̄ is zero.

        Args:
            x: what the module was given.
            outputs: shape of what it gave.
            module: one tied to the layer; None: its own.
        """
        module = self.module if module is None else module
        kind, shared = _known(module).called(outputs), self.ties.get(module, frozenset(self.roles.values()))
        if "weight" not in shared:
            return functional.pad(kind.ones(module, x), (self.da - 1, 0))
        if kind.one_hot or not self.has_bias:
            return kind.unfold(module, x)
        a = kind.with_bias(module, x)
        if "bias" not in shared:
            a[..., -1] = 0
        return a

    def output_gradients(self, g: Tensor, module: nn.Module | None = None) -> Tensor:
        """Gradients (K, N, ...) at a module's output as (K, N, T, dg) or (K, N, T, groups, dg); see `inputs`."""
        module = self.module if module is None else module
        return _known(module).outputs(module, g)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parameters from left to right in W̄; generic layers are one row, parameter after parameter."""
        found, end, rows = [], 0, self.matrix_shape[0]
        roles = self.roles if self.structured else {}
        for name in sorted(self.parameters, key=lambda name: roles.get(name) == "bias"):
            p, start = self.parameters[name], end
            end += p.numel() // rows
            stored = self._kind.stored(self.module) if roles.get(name) == "weight" else None
            found.append(Part(name, p.shape, slice(start, end), rows, stored))
        return tuple(found)


def make_layer(
    name: str, module: nn.Module, parameters: Mapping[str, nn.Parameter], modules: Iterable[nn.Module] = ()
) -> Layer:
    """Describe a module: structured for the `KINDS`, generic for everything else.

    Args:
        name: the module's name in the model.
        module: the module.
        parameters: the parameters that it contributes, by their names in the model.
        modules: of the model, among which others may hold some of the parameters.

    Returns:
        The layer.
    """
    found = kind_of(module)
    note = "" if found is not None else f"{type(module).__name__} has no Kronecker structure"
    roles = {own: _role(module, p) for own, p in parameters.items()}
    ties = {}
    for other in modules:
        shared = [p for p in parameters.values() if any(p is q for q in other._parameters.values())]
        if other is not module and shared:
            ties[other] = frozenset(_role(other, p) for p in shared)
            mine = frozenset(_role(module, p) for p in shared)
            if not note and (mine != ties[other] or not _fits(module, other, mine)):
                note = (
                    f"a parameter is shared with another module, in which it has another use ({type(other).__name__})"
                )
    if found is not None:
        note = next(filter(None, map(_refusal, (module, *ties))), note)
    kind = (found.name if found is not None else "") or type(module).__name__.lower()
    return Layer(name, module, dict(parameters), kind, not note, note, roles, ties, found)


def reads(module: nn.Module) -> bool:
    """Whether a module reads rows of a table: its inputs are one-hot."""
    return _known(module).one_hot


def is_single(module: nn.Module, x: Tensor) -> bool:
    """Whether the input of a module of a known kind is one row or image without an axis of several."""
    return _known(module).is_single(module, x)


def goes_on(module: nn.Module) -> bool:
    """Whether a module does more to what its matrix gives."""
    return _known(module).goes_on


def units(module: nn.Module) -> int:
    """Output units or channels of a module of a known kind."""
    return _known(module).units(module)


def read_weights(module: nn.Module, tokens: Tensor) -> Tensor:
    """What a module that `reads` multiplies the rows by that it reads, (N, T)."""
    kind = _known(module)
    assert isinstance(kind, Embedding)
    return kind.weights(module, tokens)


def _known(module: nn.Module) -> Kind:
    found = kind_of(module)
    assert found is not None
    return found


def _role(module: nn.Module, p: nn.Parameter) -> str:
    """Whether a parameter is a module's "weight" or "bias"; "" for neither."""
    kind = kind_of(module)
    named = {} if kind is None else {kind.weight: "weight", kind.bias: "bias"}
    return next((named.get(key, "") for key, own in module._parameters.items() if own is p), "")


def _fits(module: nn.Module, other: nn.Module, shared: Container[str]) -> bool:
    """Whether what a module shares acts in another one as in its own W̄, or the weight as its transpose."""
    kind, its = kind_of(module), kind_of(other)
    if kind is None or its is None:
        return False
    return kind.same_matrix(module, its, other) or ("bias" not in shared and kind.transposed_matrix(its))


def _refusal(module: nn.Module) -> str:
    """Why a module of a known kind has no structure; "" where it has."""
    kind = kind_of(module)
    if kind is None or (refusal := kind.refusal(module)):
        return "" if kind is None else refusal
    own = {key for key, p in module._parameters.items() if p is not None}
    plain = own <= {kind.weight, kind.bias} and isinstance(getattr(module, kind.weight, None), nn.Parameter)
    if plain and not hasattr(module, "parametrizations"):
        return ""
    return "its weight or bias is reparametrised, or it owns further parameters"
