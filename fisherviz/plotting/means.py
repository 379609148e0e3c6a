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
from fisherviz.plotting.reduce import to_array
from fisherviz.results import metrics
from fisherviz.results.comparison import Comparison

WRITTEN = 12  # layers up to which every mean is written into its cell


@dataclass(frozen=True)
class BlockMeans:
    """Means of |entries|, (layers, layers), with the layers' names."""

    values: np.ndarray
    labels: tuple[str, ...]


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
        name = f"{'block_means_inverse' if inverse else 'block_means'}/{method}"
        if name not in source.arrays:
            held = sorted(key for key in source.arrays if key.startswith("block_means"))
            raise ValueError(f"no {name!r} in this comparison; it has {', '.join(held) or 'no block means'}.")
        return BlockMeans(source.arrays[name], source.layers)
    if hasattr(source, "block") and hasattr(source, "space"):
        names = tuple(source.space.names)
        rows = [[np.abs(to_array(source.block(row, col))).mean() for col in names] for row in names]
        return BlockMeans(np.asarray(rows), names)
    if edges is None:
        raise ValueError("the block means of a bare matrix need edges, the boundaries of its layers.")
    matrix, bounds = np.abs(to_array(source)), [int(edge) for edge in edges]
    if bounds[0] != 0 or bounds[-1] != len(matrix):
        raise ValueError(f"edges must run from 0 to the matrix's side {len(matrix)}, not {bounds}.")
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

    Returns:
        The axes.

    Raises:
        ValueError: the comparison holds no such means, or a matrix came without edges.
    """
    info = block_means_info(source, method, inverse=inverse, edges=edges, layers=layers)
    ax = ax or style.new_axes(3.6, 3.4, "compressed")
    top = float(info.values.max()) or 1.0
    count = len(info.values)
    ax.imshow(info.values, vmin=0, vmax=top, cmap=cmap or style.SEQUENTIAL)
    power, decimals = _units(top)
    if count <= WRITTEN:
        for (i, j), value in np.ndenumerate(info.values):
            ink = "black" if value > 0.6 * top else "white"
            text = f"{value / 10.0**power:.{decimals}f}"
            ax.text(j, i, text, ha="center", va="center", color=ink, fontsize=9 if count <= 5 else 6)
    style.name_layers(ax, range(count), info.labels, 12)
    scale = f" [10{metrics.superscript(power)}]" if power and count <= WRITTEN else ""
    style.entitle(ax, f"mean |entry| per block{scale}" if title is None else title)
    return ax


def _units(top: float) -> tuple[int, int]:
    """The power of ten that all means are written in, and their decimals."""
    power = math.floor(math.log10(top))
    if -1 <= power <= 2:
        return 0, 2 - max(power, 0)
    return power, 2
