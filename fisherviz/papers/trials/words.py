"""What comparisons of training found, in words: medians and ranges, chosen settings, runs that broke off."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from fisherviz.papers.trials.problems import Trained

SHOWN = 6
"""Values of a grid that a protocol writes out."""


def spread(values: Sequence[float], digits: str = ".3g", factor: float = 1.0, unit: str = "") -> str:
    """Median and range of the seeds, in words."""
    middle, low, high = (factor * v for v in (median(values), min(values), max(values)))
    if all(math.isinf(v) for v in values):
        return "diverged"
    shown = [format(v, digits) if math.isfinite(v) else "diverged" for v in (middle, low, high)]
    return shown[0] + unit + (f" ({shown[1]} to {shown[2]})" if len(values) > 1 else "")


def protocol(found: Mapping[str, Trained]) -> tuple[dict[str, str], ...]:
    """How each method was tuned and trained: what was open to it, what was tried, chosen, and what broke off."""
    rows = []
    for name, one in found.items():
        method, effort = one.method, one.effort
        broken = sum(math.isinf(loss) for _, loss in one.trials)
        tried = f"{len(one.trials)} of {effort.trial_steps} steps, {broken} diverged"
        rows.append(
            {
                "method": name,
                "optimizer": method.optimizer.rpartition(":")[2],
                "fixed": _options(method.fixed),
                "grid": "; ".join(f"{key} {_values(values)}" for key, values in method.grid.items()) or "none",
                "start": _options(method.start),
                "trials": tried if one.trials else "none",
                "chosen": _options(one.options),
                "runs": f"{len(one.runs)} seeds of {effort.steps} steps, {one.stopped} diverged",
            }
        )
    return tuple(rows)


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_value(value)}" for key, value in options.items()) or "none"


def _values(values: Sequence[Any]) -> str:
    if len(values) <= SHOWN:
        return ", ".join(map(_value, values))
    first, second, *_, last = map(_value, values)
    return f"{first}, {second}, ..., {last} ({len(values)} values)"


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings_words(found: Mapping[str, Trained]) -> str:
    """What tuning chose, in words."""
    shown = {name: ", ".join(f"{k} {v:g}" for k, v in one.options.items()) for name, one in found.items()}
    return "; ".join(f"{name} {options}" for name, options in shown.items() if options)


def stopped_words(found: Mapping[str, Trained]) -> str:
    """Which runs broke off and why, in words; empty if none did."""
    parts = []
    for name, one in found.items():
        if one.stopped:
            why = next(run["stopped"] for run in one.runs if run["stopped"] is not None)
            parts.append(f"{name}: {one.stopped} of {len(one.runs)} ({why.rstrip('.')})")
    return f"; runs that broke off: {', '.join(parts)}" if parts else ""
