"""A sweep's points: the metric over what was varied, a line per value of the second thing that was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fisherviz.plotting import style

LINES = 12
"""Values of the second thing that get lines of their own."""
DECADE = 10
"""Times the smallest value from which an axis is logarithmic."""
FAR = 1e4
"""Times the smallest value up to which the picture goes; runs that all but diverged lie above it."""
_ASIDE = ("value", "low", "high", "seconds", "stopped", "run")


@dataclass(frozen=True)
class Points:
    """A line per label: places, values, and the smallest and largest value of the seeds."""

    x_name: str
    lines: dict[str, tuple[list[Any], np.ndarray, np.ndarray, np.ndarray]]
    numeric: bool
    stopped: int


def sweep_info(found: Any) -> Points:
    """Gather what `sweep` draws; see there for the arguments.

    Returns:
        The finished points by line; runs that stopped have none.

    Raises:
        TypeError: it is no sweep.
        ValueError: no point has a value.
    """
    table = getattr(found, "table", None)
    if not isinstance(table, pd.DataFrame) or "value" not in table or not hasattr(found, "maximise"):
        raise TypeError(f"fv.plot.sweep takes a Sweep, which training.sweep(...) gives, got {type(found).__name__}.")
    held = table[np.isfinite(table["value"].astype(float))]
    if held.empty:
        raise ValueError("no point of the sweep has a value: every run stopped, or none has finished.")
    varied = [name for name in table.columns if name not in _ASIDE]
    values = {name: table[name].nunique(dropna=False) for name in varied}  # None is a value
    numeric = [name for name in varied if _are_numbers(table[name]) and values[name] > 1]
    x_name = max(numeric, key=values.__getitem__) if numeric else varied[0]
    rest = [name for name in varied if name != x_name and values[name] > 1]
    parts = [part for _, part in held.groupby(rest, sort=True, dropna=False)] if rest else [held]
    lines = {}
    for label, part in zip(_labels(rest, parts), parts, strict=True):
        part = part.sort_values(x_name) if numeric else part.sort_values(x_name, key=lambda column: column.map(str))
        lines[label] = (part[x_name].tolist(), *(part[name].to_numpy(float) for name in ("value", "low", "high")))
    return Points(x_name, lines, bool(numeric), len(table) - len(held))


def _labels(names: list[str], parts: list[pd.DataFrame]) -> list[str]:
    """A label for each line; numbers have all their digits where fewer would not tell lines apart."""
    rows = [[part[name].iloc[0] for name in names] for part in parts]
    for shown in (style.shown, str):
        labels = [", ".join(f"{_short(n)} {shown(v)}" for n, v in zip(names, row, strict=True)) for row in rows]
        if len(set(labels)) == len(labels):
            break
    return labels


def _are_numbers(values: pd.Series) -> bool:
    return all(isinstance(v, int | float | np.number) and not isinstance(v, bool | np.bool_) for v in values)


def sweep(found: Any, *, ax: Axes | None = None, title: str | None = None, width: float = 6.4) -> Axes:
    """Draw the metric of a sweep over what was varied; bars reach from the lowest to the highest seed.

    Args:
        found: a `Sweep`.
        ax: axes to draw on; a new figure without them.
        title: above the axes.
        width: of a new figure, in inches.

    Returns:
        The axes; the best point has a ring.

    Raises:
        ValueError: no point has a value.
    """
    info = sweep_info(found)
    made = ax is None
    ax = style.new_axes(width, 1.4 + 0.41 * width) if ax is None else ax
    many = len(info.lines) > LINES
    colors = ["#0072B2"] if len(info.lines) == 1 else colormaps["viridis"](np.linspace(0.0, 0.9, len(info.lines)))
    for color, (label, (x, y, low, high)) in zip(colors, info.lines.items(), strict=True):
        places = x if info.numeric else [style.shown(v) for v in x]
        ax.plot(places, y, color=color, linewidth=1.2, label=style.legend_label(label),
                marker="o", markersize=4, linestyle="" if many else "-")  # fmt: skip
        if np.any(high > low):
            spread = np.isfinite(low) & np.isfinite(high)
            ax.vlines(np.asarray(places)[spread], low[spread], high[spread], colors=[color], linewidth=1.0, alpha=0.6)
    _ring(ax, info, found.maximise)
    values = np.concatenate([y for _, y, _, _ in info.lines.values()])
    if info.numeric:
        xs = np.asarray([v for x, *_ in info.lines.values() for v in x], dtype=float)
        _spread(ax, xs)
    top = FAR * values.min()
    off = int(np.sum(values > top)) if values.min() > 0 else 0
    if values.min() > 0 and values.max() / values.min() >= DECADE:
        style.logarithmic(ax.yaxis, values.min(), min(values.max(), top))
        if off:
            ax.set_ylim(top=top)
    left_out = [f"{count} {word}" for count, word in ((off, "above"), (info.stopped, "stopped")) if count]
    ax.set_xlabel(_short(info.x_name))
    aside = f" ({', '.join(left_out)})" if left_out else ""
    ax.set_ylabel(f"final {found.metric.replace('_', ' ')}{aside}")
    style.tidy(ax, title)
    if len(info.lines) > 1 and not many:
        style.legend(ax, grow=made)
    return ax


def _spread(ax: Axes, xs: np.ndarray) -> None:
    """A logarithmic axis for what spans a decade or more; 0, where it is among them, has a place of its own."""
    positive = xs[xs > 0]
    if xs.min() < 0 or not len(positive) or positive.max() / positive.min() < DECADE:
        return
    if xs.min() > 0:
        style.logarithmic(ax.xaxis, xs.min(), xs.max())
    else:
        style.linear_around_zero(ax.xaxis, float(positive.min()))


def sweep_picture(found: Any) -> bytes:
    """The picture of a sweep as PNG; a sentence where no point has a value."""
    figure = Figure(figsize=(6.8, 4.2), layout="constrained")
    ax = figure.add_subplot()
    try:
        sweep(found, ax=ax)
    except ValueError as error:
        ax.set_axis_off()
        ax.text(0.5, 0.5, str(error), ha="center", va="center", wrap=True)
    return style.png(figure, 130)


def _ring(ax: Axes, info: Points, maximise: bool) -> None:
    better = max if maximise else min
    points = [(v, k) for x, y, _, _ in info.lines.values() for k, v in zip(x, y.tolist(), strict=True)]
    value, place = better(points, key=lambda point: point[0])
    place = place if info.numeric else style.shown(place)
    ax.scatter([place], [value], s=90, facecolors="none", edgecolors=style.INK, zorder=4)


def _short(name: str) -> str:
    return name.split(".")[-1]
