"""The pictures that a training run ends with: its curves, and what was monitored, as PNG files in its folder."""

from __future__ import annotations

from matplotlib.figure import Figure

from fisherviz.plotting import style
from fisherviz.plotting.training import monitor, training
from fisherviz.results import metrics
from fisherviz.results.run import Run

MONITORED = ("relative_frobenius", "direction_cosine", "similarity", "condition_number", "lambda", "gamma")


def run_pictures(run: Run) -> dict[str, bytes]:
    """Draw a run.

    Args:
        run: a training run with at least one evaluation.

    Returns:
        "curves.png", and "monitor.png" where approximations were monitored.
    """
    epochs = run.frame("epoch")
    drawn = ("train_loss", "validation_loss", "validation_accuracy", "validation_squared_error")
    curves = [(training, name, name.replace("_", " ")) for name in drawn if name in epochs]
    pictures = {"curves.png": _drawn(curves, run)}
    if any(record["kind"] == "monitor" for record in run.records):
        seen = set(run.frame("monitor")["metric"])
        if "foof_cosine_factored" in seen:
            seen.add("similarity")
        panels = [(monitor, name, metrics.metric(name).label) for name in MONITORED if name in seen]
        pictures["monitor.png"] = _drawn(panels, run)
    return pictures


def _drawn(panels: list, run: Run) -> bytes:
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows), layout="constrained")
    for k, (draw, metric, title) in enumerate(panels):
        ax = figure.add_subplot(rows, columns, k + 1)
        draw(run, metric, ax=ax, title=title)
        if draw is training and (legend := ax.get_legend()) is not None:  # one run: the title says it
            legend.remove()
    return style.png(figure, 120)
