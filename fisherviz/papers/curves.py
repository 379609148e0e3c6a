"""Pictures of training comparisons: a line per method through the seeds' medians, a band over their range.

Colours and lines are those of `fisherviz.plotting.style`: safe for colour-blind eyes, and never the only sign.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.style import context
from PIL import Image

from fisherviz.papers.training import Trained
from fisherviz.plotting.style import MethodStyle, plain_decades, tidy

LOOK = {"font.size": 9.0, "axes.linewidth": 0.7, "savefig.facecolor": "white"}
STYLES: dict[str, MethodStyle] = {
    "SGD": MethodStyle("#000000", "s", (0, (1, 1))),
    "Nesterov": MethodStyle("#000000", "s", (0, (1, 1))),
    "Adam": MethodStyle("#767676", "v", (0, (3, 1))),
    "natural gradient": MethodStyle("#0072B2", "D", (0, (5, 1, 1, 1))),
    "K-FAC": MethodStyle("#D55E00", "o", (0, (5, 1.5))),
    "FOOF": MethodStyle("#CC79A7", "*", "-"),
    "CW-NGD": MethodStyle("#882255", "P", "-"),
    "CW-NGD, mean cost": MethodStyle("#44AA99", "X", (0, (3, 1, 1, 1))),
    "TENGraD": MethodStyle("#009E73", "^", "-"),
    "K-FAC diagonal": MethodStyle("#D55E00", "o", (0, (5, 1.5))),
    "K-FAC tridiagonal": MethodStyle("#0072B2", "^", "-"),
    "K-FAC diagonal, no momentum": MethodStyle("#E69F00", "o", (0, (1, 1.5))),
    "K-FAC tridiagonal, no momentum": MethodStyle("#56B4E9", "^", (0, (3, 1, 1, 1))),
}


def picture(width: float, height: float, fill: Callable[[Figure], None], dpi: int = 130) -> bytes:
    """Draw a figure as PNG in its own 256 colours, which keeps it small.

    Args:
        width: inches.
        height: inches.
        fill: puts axes on the figure.
        dpi: pixels per inch.

    Returns:
        The file's content.
    """
    with context(["default", LOOK]):
        figure = Figure(figsize=(width, height), layout="constrained", dpi=dpi)
        fill(figure)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    stream = io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(stream, format="PNG", optimize=True, dpi=(dpi, dpi))
    return stream.getvalue()


def draw_curves(
    ax: Axes, found: Mapping[str, Trained], key: str, over: str = "epoch", factor: float = 1.0, first: int = 0
) -> None:
    """Draw a metric of each method over the course of training.

    Args:
        ax: where.
        found: name to method.
        key: the metric.
        over: "epoch" or "step".
        factor: that values are multiplied by.
        first: step to begin at.
    """
    for name, one in found.items():
        look = STYLES[name]
        curves = [[line for line in run["curve"] if line["step"] >= first] for run in one.runs]
        curves = [curve for curve in curves if curve]
        if not curves:
            continue
        length = min(map(len, curves))  # up to where the first seed broke off
        x = [line[over] for line in curves[0][:length]]
        values = factor * np.array([[line[key] for line in curve[:length]] for curve in curves])
        ax.plot(
            x, np.median(values, axis=0), color=look.color, linestyle=look.line, marker=look.marker, markersize=3.5,
            markevery=max(1, length // 10), label=label(name, one), linewidth=1.4,
        )  # fmt: skip
        if len(curves) > 1:
            ax.fill_between(x, values.min(0), values.max(0), color=look.color, alpha=0.18, linewidth=0)
    tidy(ax)
    ax.set_xlabel({"epoch": "epoch", "step": "iteration"}[over])


def label(name: str, one: Trained) -> str:
    """A method's name, with how many of its runs broke off."""
    return f"{name} ({one.stopped} of {len(one.runs)} diverged)" if one.stopped else name


def logarithmic(ax: Axes) -> None:
    """A logarithmic vertical axis with plain numbers."""
    low, high = ax.get_ylim()
    values: list[Any] = [v for line in ax.get_lines() for v in np.asarray(line.get_ydata(), dtype=float) if v > 0]
    if values:
        low, high = min(values), max(values)
    ax.set_yscale("log")
    plain_decades(ax.yaxis, max(high / low, 1.1) if low > 0 else 10.0)
