"""Charts of the page that are made of a few shapes: block means, and one small panel per method with all its layers.

SVG text whose colours are the page's, so that they follow a dark page; names are escaped here.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from markupsafe import Markup, escape
from matplotlib import colormaps
from PIL import Image

from fisherviz.plotting import style
from fisherviz.plotting.means import block_means_info
from fisherviz.results import metrics
from fisherviz.results.comparison import EXACT, Comparison
from fisherviz.support.names import readable, short, shortened
from fisherviz.support.numbers import show_number

WRITTEN = 5  # layers up to which a map's means are written into it
WIDE, HIGH = 212, 92  # of a small panel
LETTER = 7  # width of a letter beside a map
LEFT, TOP, RIGHT, BOTTOM = 40, 22, 6, 8  # its margins


def means_map(comparison: Comparison, inverse: bool) -> Markup | None:
    """The mean |entry| of each block as a map with numbers.

    Args:
        comparison: that holds the means.
        inverse: of the damped inverse.

    Returns:
        An SVG element; None if there are no means.
    """
    try:
        info = block_means_info(comparison, EXACT, inverse=inverse)
    except ValueError:
        return None
    values, count = np.asarray(info.values, dtype=float), len(info.values)
    side = 260
    top = float(values.max()) or 1.0
    size = side / count
    labels = shortened(info.labels, 10)
    margin = max(70, LETTER * max(map(len, labels)) + 8)  # a label is longer where nothing shorter is its own
    step = max(1, math.ceil(count / 16))
    what = "the damped inverse of F" if inverse else "F"
    parts = [f'<image href="{_png(values / top)}" x="{margin}" y="2" width="{side}" height="{side}" class="cells"/>']
    for i, label in enumerate(labels):
        at = (i + 0.5) * size
        if i % step == 0:
            name = escape(label)
            parts.append(f'<text x="{margin - 6}" y="{at + 6:.1f}" text-anchor="end">{name}</text>')
            place = f"{margin + at + 4:.1f} {side + 8}"
            parts.append(f'<text transform="translate({place}) rotate(-45)" text-anchor="end">{name}</text>')
        for j in range(count if count <= WRITTEN else 0):
            ink = "#000" if values[i, j] > 0.6 * top else "#fff"
            text = show_number(values[i, j], 2)
            x, y = margin + (j + 0.5) * size, at + 6
            parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" fill="{ink}">{text}</text>')
    label = f"Map of the mean absolute entry of each pair of layers in {what}; the largest is {show_number(top)}."
    return _svg(margin + side + 4, side + 0.75 * margin + 12, label, parts, "map-of-means")


def panels(comparison: Comparison, metric: str, other: Comparison | None = None) -> list[Markup]:
    """One small chart per method: the metric of every layer's own block, in the layers' order, at one scale.

    Args:
        comparison: where the values are.
        metric: its name.
        other: shown hollow beside it; then only methods and layers that both have.

    Returns:
        SVG elements, the best median first; none for fewer than two layers.
    """
    grid = _grid(comparison, metric)
    beside = None if other is None else _grid(other, metric)
    if beside is not None:
        grid = grid.loc[grid.index.isin(beside.index), [layer for layer in grid if layer in beside]]
        beside = beside.reindex(index=grid.index, columns=grid.columns)
    if grid.shape[1] < 2 or grid.empty:
        return []
    entry = metrics.metric(metric)
    found = grid.to_numpy(dtype=float)
    before = None if beside is None else beside.to_numpy(dtype=float)
    scale = _scale(found if before is None else np.concatenate([found, before]), entry)
    return [
        _panel(str(method), list(map(readable, grid)), found[k], scale, entry, None if before is None else before[k])
        for k, method in enumerate(grid.index)
    ]


def _grid(comparison: Comparison, metric: str) -> pd.DataFrame:
    """Methods by layers, the best median first."""
    grid = comparison.blocks(metric).pivot_table(index="method", columns="row", values="value", sort=False)
    far = metrics.metric(metric).away(grid).median(axis=1)
    return grid.loc[far.sort_values(kind="stable").index, [layer for layer in comparison.layers if layer in grid]]


def _scale(values: np.ndarray, entry: metrics.Metric) -> _Scale:
    """Logarithmic where errors differ by more than a factor of 30; never for what is best at 1."""
    finite = values[np.isfinite(values)]
    positive = finite[finite > metrics.ROUNDING]
    if entry.best != "one" and positive.size and finite.min() >= 0 and positive.max() / positive.min() > 30:
        return _Scale(positive.min() / 1.3, positive.max() * 1.3, True)
    top = max(1.0 if entry.best == "one" else 0.0, float(finite.max(initial=0.0))) or 1.0
    return _Scale(min(0.0, float(finite.min(initial=0.0))), top, False)


class _Scale:
    """Heights of values in a panel, and the few that are written beside it."""

    def __init__(self, low: float, high: float, logarithmic: bool) -> None:
        self.low, self.high, self.logarithmic = low, high, logarithmic

    def height(self, value: float) -> float:
        if self.logarithmic:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / ((self.high - self.low) or 1.0)
        return TOP + (HIGH - TOP - BOTTOM) * (1 - min(1.0, max(0.0, share)))

    def ticks(self) -> list[float]:
        if not self.logarithmic:
            unit = 10.0 ** math.floor(math.log10(self.high - self.low))
            step = next(s * unit for s in (0.5, 1, 2, 5) if (self.high - self.low) / (s * unit) <= 3)
            first = math.ceil(self.low / step - 1e-9)
            return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]
        tens = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
        every = max(1, math.ceil(len(tens) / 3))
        return [10.0**k for k in tens if k % every == 0]


def _panel(
    method: str, layers: Sequence[str], values: np.ndarray, scale: _Scale, entry: metrics.Metric,
    before: np.ndarray | None,
) -> Markup:  # fmt: skip
    width = (WIDE - LEFT - RIGHT) / len(layers)
    radius = min(3.0, max(1.2, width / 2.5))
    known = [(k, float(v)) for k, v in enumerate(values) if np.isfinite(v)]
    median = show_number(float(np.median([v for _, v in known]))) if known else metrics.MISSING
    parts = [f'<text x="{LEFT}" y="13" class="name">{escape(short(method, 20))}</text>']
    parts.append(f'<text x="{WIDE - RIGHT}" y="13" text-anchor="end" class="number">{median}</text>')
    for tick in scale.ticks():
        y = scale.height(tick)
        parts.append(f'<line x1="{LEFT}" x2="{WIDE - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        text = show_number(tick, 1).removeprefix("1.0·")  # of a power of ten, that alone
        parts.append(f'<text x="{LEFT - 4}" y="{y + 3.5:.1f}" text-anchor="end" class="tick">{text}</text>')
    for k, value in enumerate([] if before is None else before):
        if np.isfinite(value):
            said = escape(f"{layers[k]}, before: {show_number(float(value))}")
            x, y = LEFT + (k + 0.5) * width, scale.height(float(value))
            circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" class="before">'
            parts.append(f"{circle}<title>{said}</title></circle>")
    points = [(LEFT + (k + 0.5) * width, scale.height(v), k, v) for k, v in known]
    parts.append(f'<polyline class="line" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)}"/>')
    for x, y, k, value in points:
        said = escape(f"{layers[k]}: {show_number(value)}")
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" class="dot"><title>{said}</title></circle>')
    worst = max(known, key=lambda pair: entry.away(pair[1]), default=None)
    far = f"; furthest from exact at {layers[worst[0]]}, {show_number(worst[1])}" if worst else ""
    return _svg(
        WIDE, HIGH, f"{method}: {entry.label} of {len(layers)} layers, median {median}{far}.", parts, "panel-chart"
    )


def _png(shares: np.ndarray) -> str:
    pixels = (255 * colormaps[style.SEQUENTIAL](shares)[..., :3]).round().astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _svg(width: float, height: float, label: str, parts: Sequence[str], name: str) -> Markup:
    head = Markup('<svg role="img" class="{}" viewBox="0 0 {} {}" width="{}" height="{}" aria-label="{}">').format(
        name, width, height, width, height, label
    )
    return head + Markup("".join(parts) + "</svg>")
