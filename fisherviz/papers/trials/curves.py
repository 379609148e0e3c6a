"""Training comparisons on axes: a line per method through the seeds' medians, a band over their range.

Colours and lines are those of `fisherviz.plotting.style`: safe for colour-blind eyes, and never the only sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from fisherviz.papers.trials.problems import Trained, worst
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
        if not any(curves):
            continue
        x, values = over_seeds(curves, over, key)
        label = f"{name} ({one.stopped} of {len(one.runs)} diverged)" if one.stopped else name
        often = max(1, len(x) // 10)
        draw_band(ax, x, factor * values, STYLES[name], label, markersize=3.5, markevery=often, linewidth=1.4)
    tidy(ax)
    ax.set_xlabel({"epoch": "epoch", "step": "iteration"}[over])


def over_seeds(curves: Sequence[Sequence[Mapping[str, Any]]], over: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Values of all seeds side by side; one that broke off has the worst value from there on.

    Args:
        curves: of each seed, lines with "step" and metrics.
        over: what they are drawn against: its median over the seeds that have a line of a step.
        key: the metric.

    Returns:
        (n,) and (seeds, n).
    """
    lines = [{line["step"]: line for line in curve} for curve in curves]
    steps = sorted(set().union(*lines))
    x = np.array([np.median([own[step][over] for own in lines if step in own]) for step in steps])
    return x, np.array([[own[step][key] if step in own else worst(key) for step in steps] for own in lines])


def draw_band(
    ax: Axes, x: Sequence[float] | np.ndarray, values: np.ndarray, look: MethodStyle, label: str, **line: Any
) -> None:
    """Draw a line through the medians of the seeds, over a band from the smallest to the largest finite value.

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
        there = np.isfinite(values)
        low, high = np.where(there, values, np.inf).min(0), np.where(there, values, -np.inf).max(0)
        ax.fill_between(x, low, high, where=low <= high, color=look.color, alpha=0.18, linewidth=0)


def logarithmic(ax: Axes) -> None:
    """A logarithmic vertical axis with plain numbers."""
    low, high = ax.get_ylim()
    values: list[Any] = [v for line in ax.get_lines() for v in np.asarray(line.get_ydata(), dtype=float) if v > 0]
    if values:
        low, high = min(values), max(values)
    ax.set_yscale("log")
    plain_decades(ax.yaxis, max(high / low, 1.1) if low > 0 else 10.0)
