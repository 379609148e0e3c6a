"""Quality against cost: every method is a point, those that no other beats in both form the front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from fisherviz.plotting import style
from fisherviz.results import metrics
from fisherviz.results.comparison import Comparison
from fisherviz.results.metrics import ROUNDING
from fisherviz.support.names import shortened


@dataclass(frozen=True)
class Front:
    """Methods with their cost and error, cheapest first, and which of them lie on the front."""

    metric: str
    cost: str
    methods: tuple[str, ...]
    costs: np.ndarray
    errors: np.ndarray
    on_front: np.ndarray


def pareto_info(
    source: Comparison,
    metric: str = "relative_frobenius",
    cost: str = "passes",
    methods: Sequence[str] | None = None,
) -> Front:
    """Gather what `pareto` draws; see there for the arguments.

    Returns:
        The points, cheapest first. A cosine or share c, best at 1, becomes the error |1 − c|; a cost of 0 stays 0.

    Raises:
        ValueError: the comparison has no method with both numbers.
    """
    style.require(source, Comparison, "fv.plot.pareto", "a Comparison, which fv.compare(fisher) gives")
    for given, name in ((metric, "metric="), (cost, "cost=")):
        style.require(given, str, name, "the name of a metric")
        if given not in source.metrics:
            raise style.absent(f"no {given!r} in this comparison", given, source.metrics)
    wanted = style.chosen(methods, source.methods)
    if unknown := [name for name in wanted if name not in source.methods]:
        raise style.absent(f"no method {unknown[0]!r} in this comparison", unknown[0], source.methods)
    costs, away = source.whole(cost), metrics.metric(metric).away
    errors = {name: away(value) for name, value in source.whole(metric).items()}
    names = [name for name in wanted if name in errors and name in costs and np.isfinite(errors[name])]
    if not names:
        raise ValueError(f"no method of this comparison has both {metric!r} and {cost!r}.")
    names.sort(key=lambda name: (costs[name], errors[name]))
    cost_values = np.asarray([costs[name] for name in names], dtype=float)
    error_values = np.asarray([errors[name] for name in names], dtype=float)
    rounded = np.where(error_values < ROUNDING, 0.0, error_values)
    best = np.concatenate([[np.inf], np.minimum.accumulate(rounded)[:-1]])
    return Front(metric, cost, tuple(names), cost_values, error_values, rounded < best)


def pareto(
    source: Comparison,
    metric: str = "relative_frobenius",
    cost: str = "passes",
    *,
    methods: Sequence[str] | None = None,
    ax: Axes | None = None,
    title: str | None = None,
    width: float = 6.4,
) -> Axes:
    """Draw error against cost, both logarithmic, with the Pareto front and a label at every point.

    Args:
        source: the comparison.
        metric: the error; of a metric that is best at 1, the distance from 1 is drawn.
        cost: "passes" (multiply-adds in multiples of one forward and backward pass), "seconds" or "bytes". What costs
            nothing stands at the left end, and is labelled as free.
        methods: which of them; all if None.
        ax: axes to draw on; a new figure without them.
        title: above the axes.
        width: of a new figure, in inches.

    Returns:
        The axes.

    Raises:
        ValueError: the comparison has no method with both numbers.
    """
    info = pareto_info(source, metric, cost, methods)
    ax = ax or style.new_axes(width, 1.4 + 0.44 * width)
    real = info.errors[info.errors >= ROUNDING]
    floor = float(real.min()) / 4 if real.size else ROUNDING
    heights = np.where(info.errors < ROUNDING, floor, info.errors)
    paid = info.costs[info.costs > 0]
    free = float(paid.min()) / 4 if paid.size else 1.0
    places = np.where(info.costs > 0, info.costs, free)
    _draw_front(ax, info, places, heights)
    for look, x, y in zip(style.method_styles(info.methods).values(), places, heights, strict=True):
        size = look.markersize(0.7 * style.points(ax)) ** 2
        ax.scatter(x, y, marker=look.marker, color=look.color, s=size, edgecolors="white", linewidths=0.6, zorder=4)
    style.logarithmic(ax.xaxis, places.min(), places.max())
    style.logarithmic(ax.yaxis, heights.min(), heights.max())
    ax.set_xlim(places.min() / 2.0, places.max() * 2.6)
    ax.set_ylim(floor / 1.6 if np.any(info.errors < ROUNDING) else floor * 4 / 1.6, heights.max() * 1.8)
    if np.any(info.errors < ROUNDING):
        ax.axhline(floor, color=style.FAINT, linewidth=0.8, linestyle=":", zorder=1)
    if np.any(info.costs <= 0):
        ax.axvline(free, color=style.FAINT, linewidth=0.8, linestyle=":", zorder=1)
    entry = metrics.metric(metric)
    label = f"1 − {entry.label}" if entry.best == "one" else entry.axis_label
    ax.set_ylabel(style.damped_label(label, metric, source.damping))
    ax.set_xlabel(metrics.metric(cost).axis_label)
    style.tidy(ax)
    exact = np.where(info.errors < ROUNDING, " (exact)", "")
    words = np.char.add(exact, np.where(info.costs > 0, "", " (free)"))
    names = shortened(info.methods, min(24, style.letters(0.3 * style.room(ax), style.points(ax, "small"))))
    style.entitle(ax, title)
    texts = [f"{name}{word}" for name, word in zip(names, words, strict=True)]
    _label_points(ax, places, heights, texts, info.on_front)
    return ax


def _draw_front(ax: Axes, info: Front, places: np.ndarray, heights: np.ndarray) -> None:
    xs, ys = places[info.on_front], heights[info.on_front]
    steps = [*xs, places.max() * 100], [*ys, ys[-1]]  # beyond the frame on the right
    ax.step(*steps, where="post", color=style.INK, linewidth=1.0, zorder=2, label="front")
    ax.fill_between(*steps, heights.max() * 100, step="post", color="#eef3f8", zorder=0, linewidth=0)
    ax.scatter(
        xs, ys, s=(1.25 * style.points(ax)) ** 2, facecolors="none", edgecolors=style.INK, linewidths=0.9, zorder=3
    )


def _label_points(ax: Axes, xs: np.ndarray, ys: np.ndarray, texts: Sequence[str], bold: np.ndarray) -> None:
    """Put one label beside each point, in the first place where it covers neither point nor label."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    if (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)  # constrained layout moves the axes; labels are placed where they end up
    scale, size = figure.dpi / 72, style.points(ax, "small")
    points = ax.transData.transform(np.column_stack([xs, ys]))
    frame, gap = ax.get_window_extent(), 0.62 * style.points(ax) * scale
    taken = np.hstack([points - gap, points + gap])  # left, lower, right and upper end of each
    for index in np.argsort(-points[:, 1], kind="stable"):
        label = ax.annotate(
            texts[index], (xs[index], ys[index]), xytext=(0, 0), textcoords="offset points", fontsize=size,
            fontweight="bold" if bold[index] else "normal", color=style.INK, zorder=5, ha="left", va="center",
            parse_math=False, bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
        extent = label.get_window_extent()
        width, height = extent.width, extent.height
        places = _places(width, height, 1.5 * gap)
        corners = points[index] + np.asarray(places) - (0.0, height / 2)
        boxes = np.hstack([corners, corners + np.asarray((width, height))])
        costs = _covered(boxes, np.delete(taken, index, axis=0)) + np.where(_inside(boxes, frame), 0.0, 1e9)
        best = int(np.argmin(costs))
        dx, dy = places[best]
        label.set_position((dx / scale, dy / scale))
        taken = np.vstack([taken, boxes[best]])
        if abs(dy) > 2.0 * height:
            end = (dx / scale if dx > 0 else (dx + width) / scale, dy / scale)
            ax.annotate("", (xs[index], ys[index]), xytext=end, textcoords="offset points", zorder=3,
                        arrowprops={"arrowstyle": "-", "color": style.FAINT, "linewidth": 0.6})  # fmt: skip


def _places(width: float, height: float, gap: float) -> list[tuple[float, float]]:
    """Offsets of a label's left end and middle from its point, the preferred ones first."""
    places = [(gap, 0.0), (-gap - width, 0.0)]
    for ring in (1.1, 1.7, 2.4, 3.2, 4.0, 5.0):
        for dy in (ring * height, -ring * height):
            places += [(gap * 0.6, dy), (-width / 2, dy), (-gap * 0.6 - width, dy)]
    return places


def _covered(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of each box the area that others cover, counted for each of them."""
    lower = np.maximum(boxes[:, None, :2], others[:, :2])
    upper = np.minimum(boxes[:, None, 2:], others[:, 2:])
    return np.maximum(upper - lower, 0.0).prod(2).sum(1)


def _inside(boxes: np.ndarray, frame: Bbox) -> np.ndarray:
    return np.all(boxes[:, :2] >= frame.min, axis=1) & np.all(boxes[:, 2:] <= frame.max, axis=1)
