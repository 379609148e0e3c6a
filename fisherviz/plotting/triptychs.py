"""Exact, approximation and |difference| side by side on one scale (Martens & Grosse 2015, figures 2, 5 and 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fisherviz.plotting import style
from fisherviz.plotting.heatmaps import (
    DIFFERENCE,
    draw_colorbar,
    draw_heatmap,
    heatmap_info,
    shared_maximum,
    triptych_arrays,
)
from fisherviz.plotting.reduce import Cells, as_list, cells_of_matrix, is_array, is_structured, to_array
from fisherviz.results.comparison import Comparison


def triptych_info(
    exact: Any,
    approximation: Any,
    *,
    inverse: bool = False,
    damping: Any = None,
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
        if not isinstance(approximation, str):
            raise TypeError(f"beside a comparison stands the name of a method, got {type(approximation).__name__}.")
        if damping is not None:
            raise ValueError(f"a comparison's inverses have its own damping, {exact.damping}; leave damping= out.")
        names = triptych_arrays(approximation, inverse)
        first, second, gap = (heatmap_info(exact, name, order=order) for name in names)
        return first, second, replace(gap, title=DIFFERENCE)
    structured = [is_structured(each) for each in (exact, approximation)]
    if inverse or damping is not None:
        if not (inverse and all(structured) and damping is not None):
            raise ValueError(
                "inverse=True takes two matrices that can be inverted, such as a Fisher and an approximation, and "
                "their damping=; of bare matrices pass the two inverses."
            )
        exact, approximation = exact.inverse(damping), approximation.inverse(damping)
    if all(structured):
        if [layer.name for layer in exact.space.layers] != [layer.name for layer in approximation.space.layers]:
            raise ValueError("the two matrices are over different layers; take both of one probe.")
        first = heatmap_info(exact, layers=layers, order=order)
        second = heatmap_info(approximation, layers=layers, order=order)
        gap = heatmap_info(_Difference(exact, approximation), layers=layers, order=order)
        return first, second, gap
    if any(structured):
        exact, approximation = (
            each.to_dense() if known else each for each, known in zip((exact, approximation), structured, strict=True)
        )
    for each in (exact, approximation):
        if not is_array(each):
            raise TypeError(
                f"cannot draw {type(each).__name__}; a triptych takes two matrices, a Fisher and an approximation, or "
                "a comparison and the name of a method."
            )
    a, b = to_array(exact), to_array(approximation)
    if a.shape != b.shape:
        raise ValueError(f"the two matrices differ in shape, {a.shape} and {b.shape}.")
    first, second, gap = (cells_of_matrix(m, edges=edges, labels=layers) for m in (a, b, a - b))
    return first, second, replace(gap, title=DIFFERENCE)


class _Difference:
    """Two objects with blocks, subtracted block by block."""

    def __init__(self, exact: Any, approximation: Any) -> None:
        self.exact, self.approximation, self.space, self.title = exact, approximation, exact.space, DIFFERENCE

    def block(self, row: str, col: str) -> np.ndarray:
        return to_array(self.exact.block(row, col)) - to_array(self.approximation.block(row, col))

    def to_dense(self, order: str) -> np.ndarray:
        return to_array(self.exact.to_dense(order)) - to_array(self.approximation.to_dense(order))


def triptych(
    exact: Any,
    approximation: Any,
    *,
    inverse: bool = False,
    damping: Any = None,
    ax: Sequence[Axes] | None = None,
    layers: Sequence[str] | None = None,
    edges: Sequence[float] | None = None,
    order: str | None = None,
    vmax: float | None = None,
    cmap: str | None = None,
    colorbar: bool = True,
    titles: Sequence[str] | None = None,
    width: float = 9.6,
) -> Figure:
    """Draw exact, approximation and |difference| side by side on one scale (Martens & Grosse 2015, figure 2).

    Args:
        exact: a comparison, a matrix, a Fisher, or an approximation that plays the exact one's part
            (figure 5: "kfac-full").
        approximation: of a comparison, the method's name; otherwise the same kind of thing as `exact`.
        inverse: show the damped inverses instead (figure 6).
        damping: of these inverses where they are not a comparison's: a number, `Tikhonov` or `FactoredTikhonov`.
        ax: three axes to draw on; a new figure without them.
        layers: of objects, the names of the layers to show; of matrices, the names that `edges` delimit.
        edges: of matrices, the boundaries of the layers in entries.
        order: of objects, "unit" (the default), "input" or "torch"; it stands below the first picture.
        vmax: top of the shared scale; None takes it from the exact matrix.
        cmap: a matplotlib colour map.
        colorbar: draw the shared scale.
        titles: three titles.
        width: of a new figure, in inches.

    Returns:
        The figure.

    Raises:
        ValueError: the two do not fit each other, three axes were not given, or there is no such picture.
        TypeError: one of them cannot be drawn.
    """
    cells = triptych_info(
        exact, approximation, inverse=inverse, damping=damping, layers=layers, edges=edges, order=order
    )
    if titles is None:
        plain = ("exact Fisher", "approximation", DIFFERENCE)
        titles = [info.title or name for info, name in zip(cells, plain, strict=True)]
    made = ax is None
    if ax is None:
        from matplotlib import pyplot

        ax = list(pyplot.subplots(1, 3, figsize=(width, width), layout="compressed")[1])
    ax = as_list(ax, "ax")
    if len(ax) != 3 or len(titles) != 3 or not all(isinstance(panel, Axes) for panel in ax):
        raise ValueError(f"a triptych needs three axes and three titles, not {len(ax)} and {len(titles)}.")
    top = shared_maximum(cells) if vmax is None else vmax
    for panel, info, title in zip(ax, cells, titles, strict=True):
        draw_heatmap(panel, info, vmax=top, cmap=cmap, title=title, names=panel is ax[0])
    figure = ax[0].get_figure()
    if colorbar:
        loudest = max(cells, key=lambda info: float(np.nanmax(np.abs(info.values))))
        draw_colorbar(figure, ax, replace(loudest, factor=cells[0].factor), top)
    if made:
        style.fit_height(ax[0])
    return figure
