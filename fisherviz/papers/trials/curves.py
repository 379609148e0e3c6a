"""Training comparisons on axes: a line per method through the seeds' medians, a band over their range.

Colours and lines are those of `fisherviz.plotting.style`: safe for colour-blind eyes, and never the only sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from fisherviz.papers.trials.problems import Trained
from fisherviz.plotting.style import MethodStyle, plain_decades, tidy

STYLES: dict[str, MethodStyle] = {
    "SGD": MethodStyle("#000000", "s", (0, (1, 1))),
    "Nesterov": MethodStyle("#000000", "s", (0, (1, 1))),
    "Adam": MethodStyle("#767676", "v", (0, (3, 1))),
    "natural gradient": MethodStyle("#0072B2", "D", (0, (5, 1, 1, 1))),
    "K-FAC": MethodStyle("#D55E00", "o", (0, (5, 1.5))),
    "diagonal": MethodStyle("#999933", "d", (0, (2, 1))),
    "EKFAC": MethodStyle("#E69F00", "v", (0, (3, 1))),
    "FOOF": MethodStyle("#CC79A7", "*", "-"),
    "natural gradient, amortised": MethodStyle("#56B4E9", "D", (0, (1, 1.5))),
    "natural gradient, same batch": MethodStyle("#009E73", "^", (0, (3, 1, 1, 1))),
    "natural gradient, layer-wise": MethodStyle("#56B4E9", "D", (0, (3, 1))),
    "natural gradient, 300 examples": MethodStyle("#56B4E9", "X", (0, (3, 1))),
    "natural gradient, 1000 examples": MethodStyle("#009E73", "P", (0, (1, 1.5))),
    "K-FAC, one batch": MethodStyle("#E69F00", "o", (0, (3, 1, 1, 1))),
    "FOOF, amortised": MethodStyle("#882255", "P", (0, (3, 1))),
    "FOOF, amortised, tuned so": MethodStyle("#999933", "X", (0, (1, 1.5))),
    "CW-NGD": MethodStyle("#882255", "P", "-"),
    "CW-NGD, mean cost": MethodStyle("#44AA99", "X", (0, (3, 1, 1, 1))),
    "TENGraD": MethodStyle("#009E73", "^", "-"),
    "block-wise NGD": MethodStyle("#56B4E9", "h", (0, (3, 1, 1, 1))),
    "K-BFGS": MethodStyle("#882255", "p", (0, (3, 1, 1, 1, 1, 1))),
    "K-FAC diagonal": MethodStyle("#D55E00", "o", (0, (5, 1.5))),
    "K-FAC tridiagonal": MethodStyle("#0072B2", "^", "-"),
    "K-FAC diagonal, no momentum": MethodStyle("#E69F00", "o", (0, (1, 1.5))),
    "K-FAC tridiagonal, no momentum": MethodStyle("#56B4E9", "^", (0, (3, 1, 1, 1))),
}


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
        curves = [[line for line in run["curve"] if line["step"] >= first] for run in one.runs]
        curves = [curve for curve in curves if curve]
        if not curves:
            continue
        length = min(map(len, curves))  # up to where the first seed broke off
        x = [line[over] for line in curves[0][:length]]
        values = factor * np.array([[line[key] for line in curve[:length]] for curve in curves])
        label = f"{name} ({one.stopped} of {len(one.runs)} diverged)" if one.stopped else name
        draw_band(ax, x, values, STYLES[name], label, markersize=3.5, markevery=max(1, length // 10), linewidth=1.4)
    tidy(ax)
    ax.set_xlabel({"epoch": "epoch", "step": "iteration"}[over])


def draw_band(ax: Axes, x: Sequence[float], values: np.ndarray, look: MethodStyle, label: str, **line: Any) -> None:
    """Draw a line through the medians of the seeds, over a band from the smallest to the largest.

    Args:
        ax: where.
        x: (n,).
        values: (seeds, n).
        look: of the line.
        label: in the legend.
        **line: further options of the line.
    """
    medians = np.median(values, axis=0)
    ax.plot(x, medians, color=look.color, linestyle=look.line, marker=look.marker, label=label, **line)
    if len(values) > 1:
        ax.fill_between(x, values.min(0), values.max(0), color=look.color, alpha=0.18, linewidth=0)


def logarithmic(ax: Axes) -> None:
    """A logarithmic vertical axis with plain numbers."""
    low, high = ax.get_ylim()
    values: list[Any] = [v for line in ax.get_lines() for v in np.asarray(line.get_ydata(), dtype=float) if v > 0]
    if values:
        low, high = min(values), max(values)
    ax.set_yscale("log")
    plain_decades(ax.yaxis, max(high / low, 1.1) if low > 0 else 10.0)
