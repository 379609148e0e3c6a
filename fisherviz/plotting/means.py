"""Averages of |entries| block by block: which pairs of layers matter.

Martens & Grosse 2015, figure 3, right: a layers × layers matrix for F and for its damped inverse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from fisherviz.plotting import style
from fisherviz.plotting.reduce import as_list, is_array, is_structured, to_array
from fisherviz.results.comparison import Comparison
from fisherviz.support.numbers import superscript

LETTERS = 4
"""A cell must have room for, so that its mean is written into it."""


@dataclass(frozen=True)
class BlockMeans:
    """Means of |entries|, (layers, layers), with the layers' names, and of which inverse they are, if of one."""

    values: np.ndarray
    labels: tuple[str, ...]
    inverse: str = ""


def block_means_info(
    source: Any,
    method: str = "exact",
    *,
    inverse: bool = False,
    edges: Sequence[int] | None = None,
    layers: Sequence[str] | None = None,
) -> BlockMeans:
    """Gather what `block_means` draws; see there for the arguments.

    Returns:
        The means with the layers' names.

    Raises:
        ValueError: the comparison holds no such means, or a matrix came without edges.
    """
    if isinstance(source, Comparison):
        if not isinstance(method, str):
            raise TypeError(f"method= names a method of the comparison, got {type(method).__name__}.")
        name = f"{'block_means_inverse' if inverse else 'block_means'}/{method}"
        if name not in source.arrays:
            held = sorted(key for key in source.arrays if key.startswith("block_means"))
            raise style.absent(f"no {name!r} in this comparison", name, held)
        said = f"inverse, {source.damping}" if inverse and source.damping else "inverse" if inverse else ""
        return BlockMeans(source.arrays[name], source.layers, said)
    if inverse:
        raise ValueError("inverse=True goes with a comparison; pass the inverse itself, fisher.inverse(damping).")
    if is_structured(source):
        names = tuple(source.space.names)
        rows = [[np.abs(to_array(source.block(row, col))).mean() for col in names] for row in names]
        title = str(getattr(source, "title", ""))
        return BlockMeans(np.asarray(rows), names, title if "inverse" in title else "")
    if not is_array(source):
        raise TypeError(
            "fv.plot.block_means takes a comparison, a Fisher, an approximation or a matrix, got "
            f"{type(source).__name__}."
        )
    if edges is None:
        raise ValueError("the block means of a bare matrix need edges, the boundaries of its layers.")
    matrix, bounds = np.abs(to_array(source)), [int(edge) for edge in as_list(edges, "edges")]
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"block means need a square matrix, this array has the shape {matrix.shape}.")
    rising = all(start < stop for start, stop in pairwise(bounds))
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != len(matrix) or not rising:
        raise ValueError(f"edges must rise from 0 to the matrix's side {len(matrix)}, not {bounds}.")
    if layers is not None and len(as_list(layers, "layers")) != len(bounds) - 1:
        raise ValueError(f"{len(list(layers))} layer names do not fit {len(bounds) - 1} intervals of edges.")
    spans = [slice(start, stop) for start, stop in pairwise(bounds)]
    means = np.asarray([[matrix[row, col].mean() for col in spans] for row in spans])
    return BlockMeans(means, tuple(layers or (str(k) for k in range(len(spans)))))


def block_means(
    source: Any,
    method: str = "exact",
    *,
    inverse: bool = False,
    ax: Axes | None = None,
    edges: Sequence[int] | None = None,
    layers: Sequence[str] | None = None,
    cmap: str | None = None,
    title: str | None = None,
    width: float | None = None,
) -> Axes:
    """Draw the mean of |entries| of each block (Martens & Grosse 2015, figure 3, right).

    Args:
        source: a comparison, a Fisher, an approximation, or a matrix with `edges`.
        method: of a comparison, whose matrix: "exact" or a method.
        inverse: of a comparison, take the damped inverse.
        ax: axes to draw on; a new figure without them.
        edges: of a matrix, the boundaries of its layers in entries.
        layers: of a matrix, the layers' names.
        cmap: a matplotlib colour map.
        title: above the axes.
        width: of a new figure, in inches; None: as the number of layers takes.

    Returns:
        The axes. Means are written into their cells where they have room; elsewhere there is a scale.

    Raises:
        ValueError: the comparison holds no such means, or a matrix came without edges.
    """
    info = block_means_info(source, method, inverse=inverse, edges=edges, layers=layers)
    count, made = len(info.values), ax is None
    if ax is None:
        width = min(6.9, max(3.6, 1.6 + 0.42 * count)) if width is None else width
        ax = style.new_axes(width, width, "compressed")
    top = float(np.nanmax(info.values)) or 1.0
    image = ax.imshow(info.values, vmin=0, vmax=top, cmap=cmap or style.SEQUENTIAL)
    power, decimals = _units(top)
    size = style.points(ax, "medium")
    cell = 0.62 * style.room(ax) / count  # inches, about
    written = style.letters(cell, size) >= LETTERS or style.letters(cell, style.SMALLEST) >= LETTERS
    if written:
        size = size if style.letters(cell, size) >= LETTERS else style.SMALLEST
        for (i, j), value in np.ndenumerate(info.values):
            ink = "black" if value > 0.6 * top else "white"
            text = f"{value / 10.0**power:.{decimals}f}"
            ax.text(j, i, text, ha="center", va="center", color=ink, fontsize=size)
    else:
        figure = ax.get_figure()
        assert figure is not None
        style.scale_bar(figure.colorbar(image, ax=ax, fraction=0.05, pad=0.02), ax, "mean |entry|")
    style.name_layers(ax, range(count), info.labels)
    scale = f" [10{superscript(power)}]" if power and written else ""
    of = f", {info.inverse}" if info.inverse else ""
    style.entitle(ax, f"mean |entry| per block{scale}{of}" if title is None else title)
    if made:
        style.fit_height(ax)
    return ax


def _units(top: float) -> tuple[int, int]:
    """The power of ten that all means are written in, and their decimals."""
    power = math.floor(math.log10(top))
    if -1 <= power <= 2:
        return 0, 2 - max(power, 0)
    return power, 2
