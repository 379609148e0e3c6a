"""Pictures of matrices: one heatmap, and the triptych exact, approximation, |difference| with one scale.

Martens & Grosse 2015, figures 2, 3 (left and middle), 5 and 6: |entries|, light is large, up to a maximum
that is the same in each image. Drawn from a saved comparison, a matrix, or an object with `block(row, col)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fisherviz.plotting import style
from fisherviz.plotting.reduce import Cells, cells_of_matrix, cells_of_operator, to_array
from fisherviz.results.cells import LIMIT
from fisherviz.results.comparison import Comparison

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
        if signed:
            raise ValueError("a saved comparison keeps |entries| only; pass the matrix itself for signs.")
        if which not in source.arrays:
            held = [name for name in source.arrays if source.arrays[name].ndim == 2 and "/" in name]
            raise ValueError(f"no picture {which!r} in this comparison; it has {', '.join(held) or 'none'}.")
        values = source.arrays[which]
        bounds = source.arrays.get("heatmap_edges", np.asarray([0.0, max(values.shape)]))
        names = source.layers if len(source.layers) == len(bounds) - 1 else ()
        units = source.arrays.get("heatmap_unit_edges", np.asarray([]))
        factor = max(1, round(source.meta.get("parameters", max(values.shape)) / max(values.shape)))
        return Cells(values, bounds, units, names, factor)
    if hasattr(source, "block") and hasattr(source, "space"):
        return cells_of_operator(source, layers=layers, order=order, signed=signed, limit=limit)
    if hasattr(source, "shape") or isinstance(source, list | tuple):
        return cells_of_matrix(source, edges=edges, unit_edges=unit_edges, labels=layers, signed=signed, limit=limit)
    raise TypeError(f"cannot draw {type(source).__name__}; pass a matrix, a Fisher, an approximation or a comparison.")


def shared_maximum(cells: Sequence[Cells], share: float = CLIPPED) -> float:
    """The top of a scale that several heatmaps share.

    Args:
        cells: what will be drawn; the first sets the scale.
        share: of the first one's non-zero cells, how many stay below the top.

    Returns:
        A positive number.
    """
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
    signed: bool = False,
    units: bool = False,
    cmap: str | None = None,
    colorbar: bool = True,
    title: str | None = None,
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
        order: of an object, "torch", "unit" or "input" (the K-FAC paper's); None takes the object's own.
        vmax: top of the colour scale; None leaves the largest half per cent of the cells clipped.
        signed: draw entries with their signs on a diverging scale instead of |entries|.
        units: draw the boundaries of units too.
        cmap: a matplotlib colour map; None takes a perceptually uniform one.
        colorbar: draw the scale.
        title: above the axes.

    Returns:
        The axes.

    Raises:
        ValueError: the arguments do not fit the matrix, or the comparison holds no such picture.
        TypeError: `source` is none of the things that can be drawn.
    """
    info = heatmap_info(source, which, layers=layers, edges=edges, unit_edges=unit_edges, order=order, signed=signed)
    ax = ax or style.new_axes(5.2, 4.6, "compressed")
    draw_heatmap(ax, info, vmax=vmax, units=units, cmap=cmap, title=title)
    if colorbar:
        _colorbar(ax.get_figure(), [ax], info, shared_maximum([info]) if vmax is None else vmax)
    return ax


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
    width = 0.7 if len(inner) < 10 else 0.3
    ax.vlines(inner, 0, rows, colors=line, linestyles=(0, (4, 3)), linewidth=width, alpha=0.9)
    ax.hlines(inner, 0, cols, colors=line, linestyles=(0, (4, 3)), linewidth=width, alpha=0.9)
    if units:
        ax.vlines(info.unit_edges, 0, rows, colors=line, linewidth=0.25, alpha=0.5)
        ax.hlines(info.unit_edges, 0, cols, colors=line, linewidth=0.25, alpha=0.5)
    ax.set(xlim=(0, cols), ylim=(rows, 0), xticks=[], yticks=[])
    if info.labels:
        centres = (info.edges[:-1] + info.edges[1:]) / 2
        style.name_layers(ax, centres, info.labels, 14 if len(info.labels) <= 8 else 8, names)
    style.entitle(ax, title)


def _colorbar(figure: Any, axes: Sequence[Axes], info: Cells, top: float) -> None:
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
    bar.set_label(f"{'entry' if info.signed else '|entry|'}{aside}", fontsize="small")
    bar.ax.tick_params(labelsize="small")
    bar.outline.set_visible(False)
    bar.formatter.set_powerlimits((-2, 3))
    bar.ax.yaxis.get_offset_text().set_fontsize("small")


def triptych_info(
    exact: Any,
    approximation: Any,
    *,
    inverse: bool = False,
    layers: Sequence[str] | None = None,
    edges: Sequence[float] | None = None,
    order: str | None = None,
) -> tuple[Cells, Cells, Cells]:
    """Gather what `triptych` draws: exact, approximation and |difference|; see there for the arguments.

    Returns:
        Three `Cells` of the same size.

    Raises:
        ValueError: the two do not fit each other, or the comparison holds no such pictures.
        TypeError: one of them cannot be drawn.
    """
    if isinstance(exact, Comparison):
        first, second, gap = (heatmap_info(exact, name) for name in triptych_arrays(approximation, inverse))
        return first, second, gap
    if inverse:
        raise ValueError(
            "inverse=True belongs to a comparison; pass the two inverses, for example "
            "approx.inverse(damping).to_dense()."
        )
    if hasattr(exact, "block") and hasattr(approximation, "block"):
        order = order or getattr(approximation, "plot_order", None) or "torch"
        first = heatmap_info(exact, layers=layers, order=order)
        second = heatmap_info(approximation, layers=layers, order=order)
        gap = cells_of_operator(_Difference(exact, approximation), layers=layers, order=order)
        return first, second, gap
    a, b = to_array(exact), to_array(approximation)
    if a.shape != b.shape:
        raise ValueError(f"the two matrices differ in shape, {a.shape} and {b.shape}.")
    first, second, gap = (cells_of_matrix(m, edges=edges, labels=layers) for m in (a, b, a - b))
    return first, second, gap


def triptych_arrays(method: str, inverse: bool) -> tuple[str, str, str]:
    """Names of the arrays of a comparison that a method's triptych shows."""
    kind, away = ("inverse", "inverse-difference") if inverse else ("heatmap", "difference")
    return f"{kind}/exact", f"{kind}/{method}", f"{away}/{method}"


class _Difference:
    """Two objects with blocks, subtracted block by block."""

    def __init__(self, exact: Any, approximation: Any) -> None:
        self.exact, self.approximation, self.space = exact, approximation, exact.space

    def block(self, row: str, col: str) -> np.ndarray:
        return to_array(self.exact.block(row, col)) - to_array(self.approximation.block(row, col))

    def to_dense(self, order: str) -> np.ndarray:
        return to_array(self.exact.to_dense(order)) - to_array(self.approximation.to_dense(order))


def triptych(
    exact: Any,
    approximation: Any,
    *,
    inverse: bool = False,
    ax: Sequence[Axes] | None = None,
    layers: Sequence[str] | None = None,
    edges: Sequence[float] | None = None,
    order: str | None = None,
    vmax: float | None = None,
    cmap: str | None = None,
    colorbar: bool = True,
    titles: Sequence[str] | None = None,
) -> Figure:
    """Draw exact, approximation and |difference| side by side on one scale (Martens & Grosse 2015, figure 2).

    Args:
        exact: a comparison, a matrix, a Fisher, or an approximation that plays the exact one's part
            (figure 5: "kfac-full").
        approximation: of a comparison, the method's name; otherwise the same kind of thing as `exact`.
        inverse: of a comparison, show the damped inverses instead (figure 6).
        ax: three axes to draw on; a new figure without them.
        layers: of objects, the names of the layers to show; of matrices, the names that `edges` delimit.
        edges: of matrices, the boundaries of the layers in entries.
        order: of objects, "torch", "unit" or "input"; None takes the approximation's own.
        vmax: top of the shared scale; None takes it from the exact matrix.
        cmap: a matplotlib colour map.
        colorbar: draw the shared scale.
        titles: three titles.

    Returns:
        The figure.

    Raises:
        ValueError: the two do not fit each other, three axes were not given, or there is no such picture.
        TypeError: one of them cannot be drawn.
    """
    cells = triptych_info(exact, approximation, inverse=inverse, layers=layers, edges=edges, order=order)
    if titles is None:
        titles = _titles(exact, approximation, inverse)
    if ax is None:
        from matplotlib import pyplot

        ax = list(pyplot.subplots(1, 3, figsize=(9.6, 3.5), layout="compressed")[1])
    if len(ax) != 3 or len(titles) != 3:
        raise ValueError(f"a triptych needs three axes and three titles, not {len(ax)} and {len(titles)}.")
    top = shared_maximum(cells) if vmax is None else vmax
    for panel, info, title in zip(ax, cells, titles, strict=True):
        draw_heatmap(panel, info, vmax=top, cmap=cmap, title=title, names=panel is ax[0])
    figure = ax[0].get_figure()
    if colorbar:
        loudest = max(cells, key=lambda info: float(np.nanmax(np.abs(info.values))))
        _colorbar(figure, ax, replace(loudest, factor=cells[0].factor), top)
    return figure  # type: ignore[return-value]


def _titles(exact: Any, approximation: Any, inverse: bool) -> tuple[str, str, str]:
    suffix = ", damped inverse" if inverse else ""
    if isinstance(exact, Comparison):
        return f"exact Fisher{suffix}", f"{style.short(approximation, 20)}{suffix}", "|difference|"
    left = getattr(exact, "name", None) or "exact Fisher"
    return str(left), str(getattr(approximation, "name", None) or "approximation"), "|difference|"
