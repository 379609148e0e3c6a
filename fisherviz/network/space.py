"""The probed parameters as one flat vector, and the one place that knows their order.

Flat vectors are in *torch order*: the probed parameters as in `named_parameters()`, each row-major, whatever layer they
belong to. A layer's *unit order* is its W̄ (d_out, da) row by row, bias last; its *input order* is W̄ᵀ row by row. Whole
vectors in unit or input order take layer after layer. Every operator is in unit order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from fisherviz.network.layers import Layer, LayerInfo, Part
from fisherviz.support.choices import did_you_mean, one_of, unknown

Order = Literal["torch", "unit", "input"]
ORDERS: tuple[Order, ...] = ("torch", "unit", "input")


@dataclass(frozen=True)
class Place(Part):
    """Where one probed parameter stands.

    Attributes:
        layer: position of its layer.
        start: of its entries in the flat vector.
        inner: of its entries among those of its layer alone, in torch order.
    """

    layer: int
    start: int
    inner: int

    @property
    def flat(self) -> slice:
        """Its entries in the flat vector."""
        return slice(self.start, self.start + self.shape.numel())

    @property
    def own(self) -> slice:
        """Its entries among those of its layer alone."""
        return slice(self.inner, self.inner + self.shape.numel())


class ParameterSpace:
    """The probed parameters as one flat torch-order vector, a dictionary, or one unit-order vector per layer.

    Args:
        layers: in the order of their first parameters.
        names: the probed parameters' names in torch order; None: layer after layer.
    """

    def __init__(self, layers: Sequence[Layer], names: Sequence[str] | None = None) -> None:
        self.layers = tuple(layers)
        self.names = tuple(layer.name for layer in self.layers)
        self.sizes = tuple(layer.size for layer in self.layers)
        self.size = sum(self.sizes)
        self.offsets = [0]
        """Where each layer begins in a vector in unit or input order."""
        for size in self.sizes:
            self.offsets.append(self.offsets[-1] + size)
        self.places = self._placed(names)
        """Of the parameters, in torch order."""
        self._of = tuple(tuple(p for p in self.places if p.layer == i) for i in range(len(self.layers)))

    def _placed(self, names: Sequence[str] | None) -> tuple[Place, ...]:
        owners = {name: i for i, layer in enumerate(self.layers) for name in layer.parameters}
        parts = [{part.name: part for part in layer.parts} for layer in self.layers]
        places: list[Place] = []
        start, inner = 0, [0] * len(self.layers)
        for name in owners if names is None else names:
            if name not in owners:
                continue
            i = owners[name]
            part = parts[i][name]
            places.append(Place(**vars(part), layer=i, start=start, inner=inner[i]))
            start += part.shape.numel()
            inner[i] += part.shape.numel()
        return tuple(places)

    def over(self, layers: Sequence[Layer]) -> ParameterSpace:
        """The space of some of the layers, or of the same with other paths, in the same order."""
        return ParameterSpace(layers, [place.name for place in self.places])

    def of(self, i: int) -> tuple[Place, ...]:
        """The places of a layer's parameters, in torch order."""
        return self._of[i]

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
                raise ValueError(unknown("probed layer", layer, [name or "'' (root)" for name in self.names]))
            return self.names.index(layer)
        if not -len(self.layers) <= layer < len(self.layers):
            raise ValueError(f"layer position {layer} is out of range; there are {len(self.layers)} layers.")
        return layer % len(self.layers)

    # ---- vectors -------------------------------------------------------------------------------------------------

    def split(self, v: Tensor) -> list[Tensor]:
        """Unit-order vectors (P_i, ...) of the layers from a flat torch-order one (P, ...)."""
        if v.dim() not in (1, 2) or v.shape[0] != self.size:
            raise ValueError(
                f"a flat vector must have {self.size} entries (or shape ({self.size}, k)), got {tuple(v.shape)}."
            )
        return [self.gather(i, {place.name: v[place.flat] for place in mine}) for i, mine in enumerate(self._of)]

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """Flat torch-order vector (P, ...) from the layers' unit-order ones."""
        parts = [self.scatter(i, piece) for i, piece in enumerate(pieces)]
        return torch.cat([parts[place.layer][place.name] for place in self.places])

    def gather(self, i: int, parts: Mapping[str, Tensor]) -> Tensor:
        """A layer's unit-order vector (P_i, ...) from its parameters' entries by name, (numel, ...) each."""
        mine = sorted(self._of[i], key=lambda place: place.columns.start)
        if len(mine) == 1:
            return mine[0].as_matrix(parts[mine[0].name]).flatten(0, 1)
        return torch.cat([place.as_matrix(parts[place.name]) for place in mine], 1).flatten(0, 1)

    def scatter(self, i: int, v: Tensor) -> dict[str, Tensor]:
        """The entries (numel, ...) of a layer's parameters by name from its unit-order vector (P_i, ...)."""
        matrix = v.unflatten(0, self.layers[i].matrix_shape)
        return {place.name: place.as_entries(matrix[:, place.columns]) for place in self._of[i]}

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Flat torch-order vector from a dictionary name -> tensor like `named_parameters()`."""
        expected = [place.name for place in self.places]
        missing, others = set(expected) - set(tensors), set(tensors) - set(expected)
        if missing or others:
            near = did_you_mean(min(others), sorted(missing)) if others else "."
            raise ValueError(
                f"the dictionary must have exactly the probed parameters; missing: {sorted(missing) or 'none'}, "
                f"not probed: {sorted(others) or 'none'}{near}"
            )
        for place in self.places:
            given = tensors[place.name]
            if not isinstance(given, Tensor):
                raise TypeError(f"entry {place.name!r} must be a tensor, got {type(given).__name__}.")
            if given.shape != place.shape:
                raise ValueError(
                    f"entry {place.name!r} must have shape {tuple(place.shape)}, got {tuple(given.shape)}."
                )
        return torch.cat([tensors[name].reshape(-1) for name in expected])

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """Dictionary name -> tensor from a flat torch-order vector (P,)."""
        return {place.name: v[place.flat].reshape(place.shape) for place in self.places}

    # ---- indices -------------------------------------------------------------------------------------------------

    def own_permutation(self, i: int, order: Order) -> Tensor:
        """Index p of one layer with vector_in_order = unit_vector[p]; torch order is that of its parameters alone."""
        layer = self.layers[i]
        unit = torch.arange(layer.size, device="cpu")
        if one_of("order", order, ORDERS) == "unit":
            return unit
        matrix = unit.view(layer.matrix_shape)
        if order == "input":
            return matrix.T.reshape(-1) if layer.structured else unit
        return torch.cat([place.as_entries(matrix[:, place.columns]) for place in self._of[i]])

    def where(self, i: int) -> slice | Tensor:
        """A layer's entries in the flat vector, a slice where its parameters are neighbours there."""
        mine = self._of[i]
        first, last = mine[0], mine[-1]
        if last.flat.stop - first.start == self.sizes[i]:
            return slice(first.start, last.flat.stop)
        return torch.cat([torch.arange(place.flat.start, place.flat.stop, device="cpu") for place in mine])

    def part(self, matrix: Tensor, row: int, col: int) -> Tensor:
        """The block between two layers of a dense torch-order matrix (P, P), in torch order."""
        return matrix[self.where(row)][:, self.where(col)]

    def permutation(self, order: Order) -> Tensor:
        """Index p that turns a flat torch-order vector into the given order: vector_in_order = torch_vector[p]."""
        return torch.cat(self.split(torch.arange(self.size, device="cpu")))[self._from_unit(order)]

    def _from_unit(self, order: Order) -> Tensor:
        """Index p that turns a unit-order vector into the given order."""
        if order == "torch":
            return torch.argsort(self.permutation("unit"))
        return torch.cat([self.own_permutation(i, order) + start for i, start in enumerate(self.offsets[:-1])])

    # ---- matrices ------------------------------------------------------------------------------------------------

    def reorder_dense(self, matrix: Tensor, order: Order) -> Tensor:
        """A dense torch-order matrix in another order."""
        return _taken(matrix, self.permutation(order))

    def reorder_unit_dense(self, matrix: Tensor, order: Order) -> Tensor:
        """A dense unit-order matrix in another order."""
        if one_of("order", order, ORDERS) == "unit":
            return matrix
        return _taken(matrix, self._from_unit(order))

    def torch_block(self, block: Tensor, row: int, col: int) -> Tensor:
        """A unit-order block between two layers in torch order, which is that of their parameters alone."""
        out = torch.empty_like(block)
        shapes = self.layers[row].matrix_shape, self.layers[col].matrix_shape
        self.write_block(out, block.reshape(*shapes[0], *shapes[1]), row, col, whole=False)
        return out

    def targets(self, out: Tensor, row: int, col: int, whole: bool) -> list[tuple[Tensor, slice, slice]]:
        """Views (rows, columns, rows', columns') of a torch-order matrix and the columns of W̄ and W̄' that they take.

        Args:
            out: the whole matrix (P, P), or the block between two layers (P_row, P_col).
            row: position of the layer whose parameters are the matrix's rows; all lie in memory as in W̄.
            col: likewise its columns.
            whole: whether `out` is the whole matrix.
        """
        found = []
        for p, q, part in self._parts(out, row, col, whole):
            found.append((part.unflatten(1, q.matrix).unflatten(0, p.matrix), p.columns, q.columns))
        return found

    def write_block(
        self, out: Tensor, quarters: Tensor, row: int, col: int, scale: float = 1.0, *, whole: bool
    ) -> None:
        """Write a block (dg, da, dg', da') between two layers, times `scale`, into a matrix; see `targets`."""
        if self.lies_as_matrix(row) and self.lies_as_matrix(col):
            for target, columns, others in self.targets(out, row, col, whole):
                torch.mul(quarters[:, columns, :, others], scale, out=target)
            return
        for p, q, part in self._parts(out, row, col, whole):
            entries = p.as_entries(quarters[:, p.columns, :, q.columns])  # (numel, rows', columns')
            part.copy_(q.as_entries(entries.movedim(0, -1)).mT).mul_(scale)

    def lies_as_matrix(self, i: int) -> bool:
        """Whether the entries of a layer's parameters lie in memory as in W̄."""
        return all(place.stored is None for place in self._of[i])

    def _parts(self, out: Tensor, row: int, col: int, whole: bool) -> Iterator[tuple[Place, Place, Tensor]]:
        """The part of a torch-order matrix between any two parameters of two layers."""
        for p in self._of[row]:
            for q in self._of[col]:
                yield p, q, out[p.flat, q.flat] if whole else out[p.own, q.own]


def _taken(matrix: Tensor, index: Tensor) -> Tensor:
    """Rows and columns of a matrix by an index."""
    index = index.to(matrix.device)
    return matrix[index][:, index]
