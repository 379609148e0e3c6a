"""From a matrix of any size to a few hundred cells per side: each cell is the largest |entry| that it covers.

Dense matrices are reduced at once, objects that know only blocks one block at a time, so that no picture ever
needs the P × P array. Boundaries of layers and units are returned in cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fisherviz.results.cells import LIMIT, reduce_matrix
from fisherviz.support.choices import one_of

ORDERS = ("torch", "unit", "input")
ORDER = "unit"
"""In which matrices are drawn unless another order is asked for; a comparison's saved pictures are in it too."""
DENSE = 3000  # side up to which the dense matrix costs less than its blocks one by one


@dataclass(frozen=True)
class Cells:
    """A matrix ready to be drawn.

    Args:
        values: (n, m) float32; |entries|, or with signs the entry of largest magnitude in each cell.
        edges: boundaries of the layers in cells, from 0 to n.
        unit_edges: boundaries of the units in cells; empty if unknown.
        labels: names of the layers, one per interval of `edges`; empty if unknown.
        factor: matrix entries per cell and side.
        signed: whether `values` has signs.
        order: of the weights, "" if unknown.
        title: what the matrix is in a few words, "" if unknown.
    """

    values: np.ndarray
    edges: np.ndarray
    unit_edges: np.ndarray
    labels: tuple[str, ...]
    factor: int
    signed: bool = False
    order: str = ""
    title: str = ""


def cells_of_matrix(
    matrix: Any,
    *,
    edges: Sequence[float] | None = None,
    unit_edges: Sequence[float] | None = None,
    labels: Sequence[str] | None = None,
    signed: bool = False,
    limit: int = LIMIT,
) -> Cells:
    """Reduce a matrix that is held in memory.

    Args:
        matrix: (rows, cols) array or tensor.
        edges: boundaries of its layers in entries, from 0 to the side.
        unit_edges: boundaries of its units in entries.
        labels: names of its layers, one fewer than `edges`.
        signed: keep signs.
        limit: most cells per side.

    Returns:
        The `Cells`.

    Raises:
        ValueError: not a matrix, or edges and labels that do not fit it.
    """
    array = to_array(matrix)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"a heatmap needs a matrix, this array has the shape {array.shape}.")
    side = max(array.shape)
    bounds = np.asarray([0, side] if edges is None else edges, dtype=float)
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != side or np.any(np.diff(bounds) < 0):
        raise ValueError(f"edges must rise from 0 to the matrix's side {side}; they are {bounds.tolist()}.")
    names = tuple(labels or ())
    if names and len(names) != len(bounds) - 1:
        raise ValueError(f"{len(names)} layer names do not fit {len(bounds) - 1} intervals of edges.")
    factor = -(-side // limit)
    units = np.asarray([] if unit_edges is None else unit_edges, dtype=float)
    values = reduce_matrix(array, factor, signed)
    return Cells(values, bounds / factor, units / factor, names, factor, signed)


def cells_of_operator(
    operator: Any,
    *,
    layers: Sequence[str] | None = None,
    order: str = ORDER,
    signed: bool = False,
    limit: int = LIMIT,
) -> Cells:
    """Reduce a Fisher or an approximation block by block, through `block(row, col)`.

    Args:
        operator: has `space` (which knows each layer's `info()` and orders), `block(row, col)` in torch order and
            `to_dense`.
        layers: names of the layers to show; all of them if None.
        order: "torch", "unit" or "input", each layer by layer.
        signed: keep signs.
        limit: most cells per side.

    Returns:
        The `Cells`.

    Raises:
        ValueError: an unknown layer or order.
    """
    space = operator.space
    infos = [layer.info() for layer in space.layers]
    places = list(range(len(infos)))
    if layers is not None:
        known = {info.name: place for place, info in enumerate(infos)}
        places = [known[one_of("layers", name, known)] for name in _names(layers)]
        infos = [infos[place] for place in places]
    one_of("order", order, ORDERS)
    sizes = [info.num_parameters for info in infos]
    edges = np.concatenate([[0], np.cumsum(sizes)])
    side = int(edges[-1])
    factor = -(-side // limit)
    if places == list(range(len(space.layers))) and side <= DENSE:
        own = [np.asarray(space.own_permutation(place, order)) for place in places]
        index = np.concatenate([part + start for part, start in zip(own, edges, strict=False)])
        values = reduce_matrix(to_array(operator.to_dense("unit"))[np.ix_(index, index)], factor, signed)
    else:
        values = np.zeros((-(-side // factor), -(-side // factor)), np.float32)
        orders = [_from_torch(space, place, order) for place in places]
        for i, row in enumerate(infos):
            for j, col in enumerate(infos):
                block = to_array(operator.block(row.name, col.name))[np.ix_(orders[i], orders[j])]
                _paste(values, block, int(edges[i]), int(edges[j]), factor, signed)
    units = unit_boundaries(infos, edges, order)
    labels = tuple(info.name for info in infos)
    title = str(getattr(operator, "title", ""))
    return Cells(values, edges / factor, units / factor, labels, factor, signed, order, title)


def _paste(values: np.ndarray, block: np.ndarray, top: int, left: int, factor: int, signed: bool) -> None:
    """Reduce one block into the cells it touches; cells at its rim are shared with its neighbours."""
    rim = ((top % factor, 0), (left % factor, 0))
    part = reduce_matrix(np.pad(block, rim), factor, signed)
    i, j = top // factor, left // factor
    seen = values[i : i + part.shape[0], j : j + part.shape[1]]
    seen[...] = np.where(np.abs(part) > np.abs(seen), part, seen)


def _from_torch(space: Any, place: int, order: str) -> np.ndarray:
    """Positions of a layer's entries in another order among its own in torch order, as they lie in memory."""
    unit = np.argsort(np.asarray(space.own_permutation(place, "torch")))
    return unit[np.asarray(space.own_permutation(place, order))]


def unit_boundaries(infos: Sequence[Any], edges: np.ndarray, order: str) -> np.ndarray:
    """Boundaries inside the layers: of output units in unit order, of inputs in input order."""
    bounds: list[float] = []
    for info, start in zip(infos, edges, strict=False):
        if order == "torch" or info.path != "structured":
            continue
        fan_in = info.in_features + int(info.bias)
        width, count = (fan_in, info.out_features) if order == "unit" else (info.out_features, fan_in)
        bounds.extend(start + width * k for k in range(1, count))
    return np.asarray(bounds, dtype=float)


def _names(layers: Any) -> list[Any]:
    if isinstance(layers, str) or not isinstance(layers, Iterable) or not (names := list(layers)):
        raise ValueError(f"layers= takes the names of one or more layers, got {layers!r}.")
    return names


def is_structured(source: Any) -> bool:
    """Whether it is a Fisher, an approximation or another matrix over layers."""
    return not isinstance(source, type) and hasattr(source, "block") and hasattr(source, "space")


def is_array(source: Any) -> bool:
    """Whether it is an array, a tensor, an operator or a list."""
    return not isinstance(source, type) and (hasattr(source, "shape") or isinstance(source, list | tuple))


def as_list(given: Any, name: str) -> list[Any]:
    """A list of what is given; TypeError where it is none."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{name} is a list, got {type(given).__name__}.")
    return list(given)


def to_array(matrix: Any) -> np.ndarray:
    """A tensor, operator block or array-like as a float numpy array on the CPU.

    Raises:
        TypeError: it is no array of real numbers.
    """
    if hasattr(matrix, "to_dense") and not hasattr(matrix, "detach"):
        matrix = matrix.to_dense()
    if hasattr(matrix, "detach"):
        matrix = matrix.detach().cpu()
        matrix = matrix.to_dense() if matrix.is_sparse else matrix
        matrix = (matrix.float() if matrix.element_size() < 4 else matrix).numpy()
    try:
        array = np.asarray(matrix)
    except ValueError:
        raise ValueError("the rows of a matrix must have equal lengths, these have not.") from None
    if array.dtype.kind not in "fiub":
        raise TypeError(f"a picture needs an array of real numbers, got {type(matrix).__name__} of {array.dtype}.")
    return array.astype(np.result_type(array.dtype, np.float32), copy=False)
