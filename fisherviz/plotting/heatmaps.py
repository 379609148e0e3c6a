"""Pictures of matrices: |entries|, light is large, up to a maximum that other pictures may share.

Martens & Grosse 2015, figures 2, 3 (left and middle), 5 and 6. Drawn from a saved comparison, a matrix, or an object
with `block(row, col)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from fisherviz.plotting import style
from fisherviz.plotting.reduce import (
    ORDER,
    ORDERS,
    Cells,
    as_list,
    cells_of_matrix,
    cells_of_operator,
    is_array,
    is_structured,
)
from fisherviz.results.cells import LIMIT
from fisherviz.results.comparison import EXACT, Comparison
from fisherviz.support.choices import one_of

DIFFERENCE = "|difference|"
LINES_APART = 0.1
"""Inches that drawn boundaries of layers lie apart; those between are left out, as the matrix would vanish."""
APART = 2
"""Cells that boundaries of units must lie apart to be told from each other."""
CLIPPED = 0.995  # share of the non-zero cells below the default maximum of the scale


def heatmap_info(
    source: Any,
    which: str = "heatmap/exact",
    *,
    layers: Sequence[str] | None = None,
    edges: Sequence[float] | None = None,
    unit_edges: Sequence[float] | None = None,
    order: str | None = None,
    signed: bool = False,
    limit: int = LIMIT,
) -> Cells:
    """Gather what `heatmap` draws; see there for the arguments.

    Returns:
        The cells with their boundaries and names.

    Raises:
        ValueError: the comparison holds no such picture, or the arguments do not fit the matrix.
        TypeError: `source` is none of the things that can be drawn.
    """
    if isinstance(source, Comparison):
        return _saved(source, which, order, signed)
    if is_structured(source):
        return cells_of_operator(
            source, layers=layers, order=ORDER if order is None else order, signed=signed, limit=limit
        )
    if is_array(source):
        if order is not None:
            raise ValueError("the order of a bare matrix is its own; order= goes with a Fisher or an approximation.")
        return cells_of_matrix(source, edges=edges, unit_edges=unit_edges, labels=layers, signed=signed, limit=limit)
    raise TypeError(f"cannot draw {type(source).__name__}; pass a matrix, a Fisher, an approximation or a comparison.")


def _saved(source: Comparison, which: str, order: str | None, signed: bool) -> Cells:
    """A picture that a comparison keeps."""
    if signed:
        raise ValueError("a saved comparison keeps |entries| only; pass the matrix itself for signs.")
    if order not in (None, ORDER):
        one_of("order", order, ORDERS)
        raise ValueError(
            f"a saved comparison keeps its pictures in {ORDER} order; pass the matrix itself for {order!r}."
        )
    held = [name for name in source.arrays if source.arrays[name].ndim == 2 and "/" in name]
    if not isinstance(which, str):
        raise TypeError(f"which= names a picture of the comparison, got {type(which).__name__}.")
    if which not in held:
        raise style.absent(f"no picture {which!r} in this comparison", which, held)
    values = source.arrays[which]
    bounds = source.arrays.get("heatmap_edges", np.asarray([0.0, max(values.shape)]))
    names = source.layers if len(source.layers) == len(bounds) - 1 else ()
    units = source.arrays.get("heatmap_unit_edges", np.asarray([]))
    factor = max(1, round(source.meta.get("parameters", max(values.shape)) / max(values.shape)))
    return Cells(values, bounds, units, names, factor, order=ORDER, title=_saved_title(source, which))


def _saved_title(source: Comparison, which: str) -> str:
    kind, _, method = which.partition("/")
    name = "exact Fisher" if method == EXACT else method
    if kind.startswith("inverse"):
        name = f"damped inverse of {name}" + (f", {source.damping}" if source.damping else "")
    return f"|difference|, {name}" if kind.endswith("difference") else name


def shared_maximum(cells: Sequence[Cells], share: float = CLIPPED) -> float:
    """The top of a scale that several heatmaps share.

    Args:
        cells: what will be drawn; the first sets the scale.
        share: of the first one's non-zero cells, how many stay below the top.

    Returns:
        A positive number.
    """
    if isinstance(cells, Cells) or not all(isinstance(each, Cells) for each in as_list(cells, "cells")):
        raise TypeError("the scale is shared by a list of what heatmap_info gives.")
    if not len(cells):
        raise ValueError("there is nothing that could share a scale; give what heatmap_info gives, one or more.")
    for candidate in cells:
        magnitudes = np.abs(candidate.values[np.isfinite(candidate.values) & (candidate.values != 0)])
        if magnitudes.size:
            return float(np.quantile(magnitudes, share))
    return 1.0


def heatmap(
    source: Any,
    which: str = "heatmap/exact",
    *,
    ax: Axes | None = None,
    layers: Sequence[str] | None = None,
    edges: Sequence[float] | None = None,
    unit_edges: Sequence[float] | None = None,
    order: str | None = None,
    vmax: float | None = None,
    like: Any = None,
    signed: bool = False,
    units: bool = False,
    cmap: str | None = None,
    colorbar: bool = True,
    title: str | None = None,
    width: float = 5.2,
) -> Axes:
    """Draw the entries of a matrix with the boundaries of its layers (Martens & Grosse 2015, figure 2).

    Args:
        source: a matrix (array or tensor), a Fisher, an approximation, or a comparison.
        which: of a comparison, the saved picture: "heatmap/exact", "heatmap/kfac", "difference/kfac",
            "inverse/exact", "inverse/kfac", "inverse-difference/kfac".
        ax: axes to draw on; a new figure without them.
        layers: of an object, the names of the layers to show; of a matrix, the names that `edges` delimit.
        edges: of a matrix, the boundaries of its layers in entries, from 0 to the side.
        unit_edges: of a matrix, the boundaries of its units in entries.
        order: of an object, "unit" (output unit by output unit, bias last; the default of every picture), "input" (the
            K-FAC paper's) or "torch"; it stands below the picture.
        vmax: top of the colour scale; None leaves the largest half per cent of the cells clipped.
        like: the axes of another heatmap, or what one is drawn of, whose colour scale is taken.
        signed: draw entries with their signs on a diverging scale instead of |entries|.
        units: draw the boundaries of units too.
        cmap: a matplotlib colour map; None takes a perceptually uniform one.
        colorbar: draw the scale.
        title: above the axes; None: what the matrix is, "" nothing.
        width: of a new figure, in inches.

    Returns:
        The axes.

    Raises:
        ValueError: the arguments do not fit the matrix, the comparison holds no such picture, `vmax` and `like` are
            both given, or units are asked for that have no boundaries or no room.
        TypeError: `source` or `like` is none of the things that can be drawn.
    """
    info = heatmap_info(source, which, layers=layers, edges=edges, unit_edges=unit_edges, order=order, signed=signed)
    if like is not None:
        if vmax is not None:
            raise ValueError("vmax= and like= both set the top of the scale; give one of them.")
        vmax = _top_of(like)
    if units:
        _check_units(info, source)
    made = ax is None
    ax = style.new_axes(width, width, "compressed") if ax is None else ax
    draw_heatmap(ax, info, vmax=vmax, units=units, cmap=cmap, title=info.title if title is None else title)
    if colorbar:
        draw_colorbar(ax.get_figure(), [ax], info, shared_maximum([info]) if vmax is None else vmax)
    if made:
        style.fit_height(ax)
    return ax


def _top_of(like: Any) -> float:
    """The top of another picture's scale."""
    if isinstance(like, Axes):
        if not like.images:
            raise ValueError("like= takes the axes of a heatmap, and these have no image.")
        return float(max(np.abs(like.images[0].get_clim())))
    return shared_maximum([heatmap_info(like)])


def _check_units(info: Cells, source: Any) -> None:
    """Say why the boundaries of units cannot be drawn, where they cannot."""
    if not len(info.unit_edges):
        if info.order == "torch":
            why = "torch order keeps no unit together; pass order='unit' or order='input'"
        elif info.order:
            why = "no layer shown here has more than one that is known"
        else:
            why = "nobody knows them of a bare matrix; pass unit_edges="
        raise ValueError(f"units=True draws the boundaries of units, but {why}.")
    apart = np.diff(np.unique(info.unit_edges))
    if len(apart) and float(np.median(apart)) < APART:
        raise ValueError(
            f"units=True draws the boundaries of units, but {len(info.unit_edges):,} of them lie closer than {APART} "
            "cells here; show fewer layers with layers=."
        )


def draw_heatmap(
    ax: Axes,
    info: Cells,
    *,
    vmax: float | None = None,
    units: bool = False,
    cmap: str | None = None,
    title: str | None = None,
    names: bool = True,
) -> None:
    """Put gathered cells on axes.

    Args:
        ax: axes to draw on.
        info: from `heatmap_info`.
        vmax: top of the colour scale.
        units: draw the boundaries of units too.
        cmap: a matplotlib colour map.
        title: above the axes.
        names: write the layers' names along the vertical axis (they always stand along the horizontal one).
    """
    top = shared_maximum([info]) if vmax is None else vmax
    rows, cols = info.values.shape
    low, colors, line = (-top, style.DIVERGING, style.INK) if info.signed else (0.0, style.SEQUENTIAL, "white")
    extent = (0, cols, rows, 0)
    ax.imshow(info.values, vmin=low, vmax=top, cmap=cmap or colors, extent=extent, interpolation="antialiased")
    ax.set_aspect("equal")
    inner = info.edges[1:-1]
    inner = inner[style.thinned(inner.tolist(), LINES_APART / style.room(ax) * cols)]
    width = 0.7 if len(inner) < 10 else 0.3
    ax.vlines(inner, 0, rows, colors=line, linestyles=(0, (4, 3)), linewidth=width, alpha=0.9)
    ax.hlines(inner, 0, cols, colors=line, linestyles=(0, (4, 3)), linewidth=width, alpha=0.9)
    if units:
        ax.vlines(info.unit_edges, 0, rows, colors=line, linewidth=0.25, alpha=0.5)
        ax.hlines(info.unit_edges, 0, cols, colors=line, linewidth=0.25, alpha=0.5)
    ax.set(xlim=(0, cols), ylim=(rows, 0), xticks=[], yticks=[])
    if info.labels:
        centres = (info.edges[:-1] + info.edges[1:]) / 2
        style.name_layers(ax, centres, info.labels, names)
    if info.order and names:
        ax.set_xlabel(f"{info.order} order", fontsize=style.points(ax, "small"), color=style.FAINT)
    style.entitle(ax, title)


def draw_colorbar(figure: Any, axes: Sequence[Axes], info: Cells, top: float) -> None:
    """The scale beside heatmaps that share it; `info` is the loudest of them."""
    above = bool(np.nanmax(np.abs(info.values)) > top)
    bar = figure.colorbar(
        axes[0].images[0],
        ax=list(axes),
        extend=("both" if info.signed else "max") if above else "neither",
        fraction=0.05,
        pad=0.02,
        shrink=0.9 if len(axes) == 1 else 0.8,
    )
    aside = f", largest of {info.factor} × {info.factor}" if info.factor > 1 else ""
    style.scale_bar(bar, axes[0], f"{'entry' if info.signed else '|entry|'}{aside}")


def triptych_arrays(method: str, inverse: bool) -> tuple[str, str, str]:
    """Names of the arrays of a comparison that a method's triptych shows."""
    kind, away = ("inverse", "inverse-difference") if inverse else ("heatmap", "difference")
    return f"{kind}/exact", f"{kind}/{method}", f"{away}/{method}"
