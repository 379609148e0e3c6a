"""One metric layer by layer: a row per method, a mark per layer, so that ten methods stay readable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes

from fisherviz.plotting import style
from fisherviz.results import metrics
from fisherviz.results.comparison import Comparison
from fisherviz.support.names import shortened

NAMED = 10
"""Layers up to which each has a marker of its own in the legend."""
ROW = 0.28
"""Inches of a method."""
MARKERS = "os^Dv<>Ph*"


@dataclass(frozen=True)
class Blocks:
    """A metric per method (rows, best first) and layer (columns), nan where it does not apply."""

    metric: str
    methods: tuple[str, ...]
    layers: tuple[str, ...]
    values: np.ndarray
    whole: dict[str, float]


def comparison_info(
    source: Comparison, metric: str = "relative_frobenius", methods: Sequence[str] | None = None
) -> Blocks:
    """Gather what `comparison` draws; see there for the arguments.

    Returns:
        The metric's values, methods sorted by their median over the layers.

    Raises:
        ValueError: the comparison has no such metric per layer, or no such method.
    """
    style.require(source, Comparison, "fv.plot.comparison", "a Comparison, which fv.compare(fisher) gives")
    style.require(metric, str, "metric=", "the name of a metric")
    rows = source.blocks(metric)
    rows = rows[np.isfinite(rows["value"])]
    if rows.empty:
        held = [name for name in source.metrics if len(source.blocks(name))]
        raise style.absent(f"no {metric!r} per layer in this comparison", metric, held)
    table = rows.pivot_table(index="method", columns="row", values="value", aggfunc="last", sort=False)
    for name in style.chosen(methods, table.index):
        if name not in table.index:
            raise style.absent(f"no {metric!r} of the method {name!r}", name, table.index)
    layers = [name for name in source.layers if name in table]
    table = table.loc[list(table.index if methods is None else methods), layers]
    table = table.loc[metrics.metric(metric).away(table).median(axis=1).sort_values(kind="stable").index]
    whole = {m: v for m, v in source.whole(metric).items() if m in table.index and np.isfinite(v)}
    return Blocks(metric, tuple(table.index), tuple(layers), table.to_numpy(), whole)


def comparison(
    source: Comparison,
    metric: str = "relative_frobenius",
    *,
    methods: Sequence[str] | None = None,
    ax: Axes | None = None,
    title: str | None = None,
    width: float = 6.4,
) -> Axes:
    """Draw one metric of every diagonal block: methods are rows (best first), layers are marks on them.

    Args:
        source: the comparison.
        metric: its name, for example "relative_frobenius", "direction_cosine".
        methods: which of them; all if None.
        ax: axes to draw on; a new figure without them.
        title: above the axes.
        width: of a new figure, in inches.

    Returns:
        The axes. A short vertical bar is the whole matrix's value where the comparison has one.

    Raises:
        ValueError: the comparison has no such metric per layer, or no such method.
    """
    info = comparison_info(source, metric, methods)
    made = ax is None
    row = ROW * (1.0 if len(info.layers) <= NAMED else 1.5)  # many marks need height to stay apart
    ax = style.new_axes(width, 1.1 + row * len(info.methods)) if ax is None else ax
    colors = colormaps["viridis"](np.linspace(0.0, 0.88, len(info.layers)))
    places = np.arange(len(info.methods))
    named = len(info.layers) <= NAMED
    spread = (0.5 if named else 0.7) / max(1, len(info.layers) - 1)  # of one layer it is multiplied by 0
    positive = info.values[np.isfinite(info.values)]
    logarithmic = metrics.metric(metric).best != "one" and bool(np.all(positive >= 0) and positive.any())
    floor = _floor(positive) if logarithmic else -np.inf
    shown = np.maximum(info.values, floor)
    low, high = np.nanmin(shown, axis=1), np.nanmax(shown, axis=1)
    ax.hlines(places, low, high, colors="#bdbdbd", linewidth=3, zorder=1)
    handles = []
    for k in range(len(info.layers)):
        handles.append(
            ax.scatter(
                shown[:, k],
                places + (k - (len(info.layers) - 1) / 2) * spread,
                color=colors[k],
                marker=MARKERS[k % len(MARKERS)] if named else "o",
                s=style.EXACT.markersize(4.7) ** 2 if named else 9,
                linewidths=0.4 if named else 0,
                edgecolors="white",
                zorder=3,
            )
        )
    whole = np.maximum([info.whole.get(name, np.nan) for name in info.methods], floor)
    if np.any(np.isfinite(whole)):
        handles.append(ax.scatter(whole, places, marker="|", s=110, color=style.INK, linewidths=1.6, zorder=2))
    if logarithmic:
        style.logarithmic(ax.xaxis, np.nanmin(shown), np.nanmax(shown))
        if np.any(info.values < floor):
            ax.axvline(floor, color=style.FAINT, linewidth=0.8, linestyle=":")
            ax.annotate("exact", (floor, 1.0), xycoords=("data", "axes fraction"), xytext=(3, 2),
                        textcoords="offset points", fontsize=style.points(ax, "small"), color="#555555")  # fmt: skip
    ax.set_yticks(places, shortened(info.methods, 20))
    style.plain(ax.get_yticklabels())
    ax.set_ylim(len(info.methods) - 0.5, -0.5)
    ax.set_xlabel(style.damped_label(metrics.metric(metric).axis_label, metric, source.damping))
    style.tidy(ax, title)
    _legend(ax, info, handles, named, made)
    return ax


def _floor(values: np.ndarray) -> float:
    """Where exact blocks are put on a logarithmic axis: below every error that is more than rounding."""
    real = values[values > metrics.ROUNDING]
    return float((real if real.size else values[values > 0]).min()) / 3


def _legend(ax: Axes, info: Blocks, handles: list, named: bool, grow: bool) -> None:
    labels = [style.legend_label(name) for name in shortened(info.layers, 24)]
    if not named:  # too many to name: first, middle, last show which way the colours run
        keep = [0, len(labels) // 2, len(labels) - 1]
        rest = handles[len(labels) :]
        handles = [handles[k] for k in keep] + rest
        labels = [f"{labels[k]} ({k + 1} of {len(labels)})" for k in keep]
    if len(handles) > len(labels):
        labels.append("whole matrix")
    style.legend(ax, handles=handles, labels=labels, handletextpad=0.3, grow=grow)
