"""Training curves over epochs, steps or seconds with the spread of the seeds; what a `Monitor` saw over steps."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from fisherviz.plotting import style
from fisherviz.results import metrics
from fisherviz.results.comparison import WHOLE
from fisherviz.results.run import Run, load_run
from fisherviz.support.choices import one_of
from fisherviz.support.numbers import three_digits

OVER = {"epoch": "epoch", "step": "step", "examples": "training examples seen", "seconds": "seconds of training"}
ASIDE = (
    "seed", "out", "quiet", "epochs", "max_steps", "checkpoint_every", "timings", "tensorboard", "device", "monitor",
    "monitor_every", "monitor_methods", "monitor_examples",
)  # fmt: skip
"""Fields that make no other curve."""
SEEN = {"step", "method", "layer", "metric", "value"}
"""Columns of a monitor's frame."""
SIMILARITY = ("foof_cosine_factored", "foof_cosine_eigenvalues")
INSIDE = 4
"""Lines up to which the legend stands among them."""
MARKED = 12
"""Markers that a line has at most."""
BOUNDED = ("accuracy", "cosine", "similarity")


@dataclass(frozen=True)
class Curve:
    """One line: its middle, and the smallest and largest value of the seeds at each place."""

    label: str
    x: np.ndarray
    middle: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seeds: int


Source = Run | str | os.PathLike[str]


def training_info(
    runs: Source | Iterable[Source], metric: str = "train_loss", over: str = "epoch"
) -> tuple[Curve, ...]:
    """Gather what `training` draws; see there for the arguments.

    Returns:
        One curve per configuration, seeds joined.

    Raises:
        ValueError: there are no runs, none has the metric, or `over` is unknown.
    """
    one_of("over", over, OVER)
    style.require(metric, str, "metric=", "the name of a column")
    given = [runs] if isinstance(runs, Run | str | os.PathLike) else runs
    if isinstance(given, pd.DataFrame | Mapping) or not isinstance(given, Iterable):
        raise TypeError(f"fv.plot.training takes runs or their folders, got {type(given).__name__}.")
    given = list(given)
    for each in given:
        style.require(each, (Run, str, os.PathLike), "fv.plot.training", "runs or their folders")
    loaded = [run if isinstance(run, Run) else load_run(run) for run in given]
    if not loaded:
        raise ValueError("there are no runs to draw; give folders that `fisherviz train` wrote.")
    groups: dict[str, list[Run]] = {}
    for run in loaded:
        key = repr(sorted((k, repr(v)) for k, v in run.config.items() if k not in ASIDE))
        groups.setdefault(key, []).append(run)
    labels = _labels([members[0].config for members in groups.values()])
    curves = [_curve(label, g, metric, over) for label, g in zip(labels, groups.values(), strict=True)]
    found = tuple(curve for curve in curves if curve is not None)
    if not found:
        held = sorted({c for run in loaded for kind in ("epoch", "step") for c in run.frame(kind).columns})
        raise style.absent(f"no run has {metric!r} yet", metric, held)
    return found


def training(
    runs: Source | Iterable[Source],
    metric: str = "train_loss",
    *,
    over: str = "epoch",
    ax: Axes | None = None,
    title: str | None = None,
    width: float = 6.4,
) -> Axes:
    """Draw a metric of training runs; runs that differ in their seed alone are one line with a band from min to max.

    Args:
        runs: runs, or their folders.
        metric: a column of `Run.frame("epoch")` or, where it has none, of `Run.frame("step")`.
        over: "epoch", "step", "examples" or "seconds" (of training, evaluations aside).
        ax: axes to draw on; a new figure without them.
        title: above the axes.
        width: of a new figure, in inches.

    Returns:
        The axes.

    Raises:
        ValueError: as `training_info`.
    """
    curves = training_info(runs, metric, over)
    made = ax is None
    ax = style.new_axes(width, 1.4 + 0.41 * width) if ax is None else ax
    looks = _looks([curve.label for curve in curves])
    for curve in curves:
        look = looks[curve.label]
        _line(ax, look, curve.label, curve.x, curve.middle)
        if curve.seeds > 1:
            ax.fill_between(curve.x, curve.low, curve.high, color=look.color, alpha=0.18, linewidth=0)
    _scale(ax, np.concatenate([np.concatenate([c.low, c.high]) for c in curves]), metric)
    ax.set_xlabel(OVER[over])
    seeds = max(curve.seeds for curve in curves)
    ax.set_ylabel(metric.replace("_", " ") + (f" (mean and range of {seeds} seeds)" if seeds > 1 else ""))
    _finish(ax, title, grow=made)
    return ax


def monitor_info(source: Any, metric: str | None = None) -> tuple[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Gather what `monitor` draws; see there for the arguments.

    Returns:
        The metric, and for each line its steps and values.

    Raises:
        ValueError: the metric was not recorded.
    """
    source = load_run(source) if isinstance(source, str | os.PathLike) else source
    style.require(metric, str | None, "metric=", "the name of a metric")  # type: ignore[arg-type]
    found = source if isinstance(source, pd.DataFrame) else getattr(source, "frame", None)
    frame = source.frame("monitor") if isinstance(source, Run) else found
    if not isinstance(frame, pd.DataFrame) or not (frame.empty or set(frame) >= SEEN):
        raise TypeError(
            f"fv.plot.monitor takes a Monitor, its frame, a run or its folder, got {type(source).__name__}."
        )
    if frame.empty:
        raise ValueError("the monitor has not looked yet; train for `every` steps first.")
    metric = metric or "relative_frobenius"
    wanted = SIMILARITY if metric == "similarity" else (metric,)
    rows = frame[(frame["layer"] == WHOLE) & frame["metric"].isin(wanted)]
    if rows.empty:
        held = sorted(set(frame[frame["layer"] == WHOLE]["metric"]))
        raise style.absent(f"no {metric!r} of the whole network was recorded", metric, held)
    lines = {}
    for (method, name), part in rows.groupby(["method", "metric"], sort=False):
        label = metrics.metric(str(name)).short if metric == "similarity" else str(method)
        if metric == "similarity" and rows["method"].nunique() > 1:
            label = f"{method}, {label}"
        lines[label] = (part["step"].to_numpy(), part["value"].to_numpy())
    return metric, lines


def monitor(
    source: Any,
    metric: str | None = None,
    *,
    ax: Axes | None = None,
    title: str | None = None,
    width: float = 6.4,
) -> Axes:
    """Draw what a monitor saw, a line per method over the steps.

    Args:
        source: a `Monitor`, its frame, or a run with `monitor: true`, or its folder.
        metric: "relative_frobenius" (default), "direction_cosine", "condition_number", "lambda", "gamma", ...;
            "similarity" is KFAC's cosine with FOOF under both dampings (Benzing 2021, figure 4A).
        ax: axes to draw on; a new figure without them.
        title: above the axes.
        width: of a new figure, in inches.

    Returns:
        The axes.

    Raises:
        ValueError: the metric was not recorded.
    """
    metric, lines = monitor_info(source, metric)
    made = ax is None
    ax = style.new_axes(width, 1.4 + 0.41 * width) if ax is None else ax
    looks = style.method_styles(lines)
    for label, (x, y) in lines.items():
        _line(ax, looks[label], label, x, y)
    _scale(ax, np.concatenate([y for _, y in lines.values()]), metric)
    ax.set_xlabel("step")
    ax.set_ylabel(style.damped_label(metrics.metric(metric).axis_label, metric, _damping(source)))
    _finish(ax, title, legend=list(lines) != ["optimizer"], grow=made)
    return ax


def _damping(source: Any) -> str:
    """λ of what a monitor saw: one, or the range over the steps."""
    source = load_run(source) if isinstance(source, str | os.PathLike) else source
    frame = source if isinstance(source, pd.DataFrame) else source.frame
    frame = source.frame("monitor") if isinstance(source, Run) else frame
    values = frame[frame["metric"] == "damping"]["value"]
    if values.empty:
        return ""
    low, high = float(values.min()), float(values.max())
    return f"λ = {three_digits(low)}" if low == high else f"λ = {three_digits(low)} to {three_digits(high)}"


def _labels(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Optimizers' names, with what else differs between the configurations."""
    flat = [
        {k: v for k, v in config.items() if k not in ("optimizer_options", "optimizer", *ASIDE)}
        | (config.get("optimizer_options") or {})
        for config in configs
    ]
    names = [str(config.get("optimizer", "run")) for config in configs]
    out = []
    for name, mine in zip(names, flat, strict=True):
        same = [other for other, theirs in zip(flat, names, strict=True) if theirs == name]
        keys = dict.fromkeys(k for other in same for k in other)
        differs = [k for k in keys if len({repr(other.get(k)) for other in same}) > 1 and k in mine]
        detail = ", ".join(f"{k}={style.shown(mine[k])}" for k in differs)
        out.append(f"{name} ({detail})" if detail else name)
    return [label if out.count(label) == 1 else f"{label} #{i + 1}" for i, label in enumerate(out)]


def _curve(label: str, runs: Sequence[Run], metric: str, over: str) -> Curve | None:
    """The seeds joined at the steps that all of them have: one that is still running ends where it is."""
    column = "seconds_total" if over == "seconds" else over
    found = []
    for run in runs:
        for kind in ("epoch", "step"):
            frame = run.frame(kind)
            if metric in frame:
                part = frame[[column, metric]].set_axis(frame["step"]).dropna()
                found.append(part[~part.index.duplicated(keep="last")])
                break
    if not found:
        return None
    common = found[0].index
    for part in found[1:]:
        common = common[common.isin(part.index)]
    x = np.mean([part.loc[common, column].to_numpy(float) for part in found], axis=0)
    values = np.stack([part.loc[common, metric].to_numpy(float) for part in found])
    return Curve(label, x, values.mean(0), values.min(0), values.max(0), len(found)) if len(common) else None


def _looks(labels: Sequence[str]) -> dict[str, style.MethodStyle]:
    """An optimizer has the look of its approximation; variants of one optimizer take turns."""
    names = [label.split(" (")[0] for label in labels]
    alone = [label if names.count(name) > 1 else name for label, name in zip(labels, names, strict=True)]
    return dict(zip(labels, style.method_styles(alone).values(), strict=True))


def _line(ax: Axes, look: style.MethodStyle, label: str, x: np.ndarray, y: np.ndarray) -> None:
    every = max(1, -(-len(x) // MARKED))
    ax.plot(
        x, y, color=look.color, linestyle=look.line, linewidth=1.3, label=style.legend_label(label),
        marker=look.marker, markersize=look.markersize(0.55 * style.points(ax)), markevery=every,
        markeredgecolor="white", markeredgewidth=0.4,
    )  # fmt: skip


def _scale(ax: Axes, values: np.ndarray, metric: str) -> None:
    finite = values[np.isfinite(values)]
    if any(word in metric for word in BOUNDED) or not len(finite) or finite.min() <= 0:
        return
    style.logarithmic(ax.yaxis, finite.min(), finite.max())


def _finish(ax: Axes, title: str | None, legend: bool = True, grow: bool = False) -> None:
    low, high = ax.get_xlim()
    if high > 1e4:
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.set_xlim(max(low, 0.0), high)
    style.tidy(ax, title)
    if legend:
        style.legend(ax, beside=len(ax.lines) > INSIDE or style.room(ax) < style.FULL, grow=grow)
