"""Eigenvalues of the exact Fisher and of its approximations on one logarithmic scale.

What is below a billionth of the largest exact eigenvalue is rounding and not drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from fisherviz.plotting import style
from fisherviz.plotting.reduce import to_array
from fisherviz.results import Comparison

RANGE = 1e-9  # eigenvalues below this share of the largest exact one are rounding, and not drawn


@dataclass(frozen=True)
class Spectra:
    """Eigenvalues per method, descending, and how many of each are not drawn: rounding, zero or negative."""

    values: dict[str, np.ndarray]
    dropped: dict[str, int]


def spectrum_info(source: Any, methods: Sequence[str] | None = None) -> Spectra:
    """Gather what `spectrum` draws; see there for the arguments.

    Returns:
        Positive eigenvalues per method, the exact ones first.

    Raises:
        ValueError: the comparison holds no spectra, or not the one asked for.
        TypeError: `source` cannot give eigenvalues.
    """
    if isinstance(source, Comparison):
        prefix = "spectrum/"
        found = {name[len(prefix) :]: v for name, v in source.arrays.items() if name.startswith(prefix)}
        if not found:
            raise ValueError("the comparison holds no spectra.")
    elif isinstance(source, Mapping):
        found = {str(name): to_array(values) for name, values in source.items()}
    elif hasattr(source, "spectrum"):
        found = {"exact": to_array(source.spectrum())}
    else:
        raise TypeError(
            f"cannot take the spectrum of {type(source).__name__}; "
            "pass a comparison, a Fisher or a dictionary of eigenvalues."
        )
    if methods is not None:
        wanted = [*(["exact"] if "exact" in found else []), *(m for m in methods if m != "exact")]
        absent = [name for name in wanted if name not in found]
        if absent:
            raise ValueError(f"no spectrum of {absent[0]!r}; there are those of {', '.join(found)}.")
        found = {name: found[name] for name in wanted}
    ordered = sorted(found, key=lambda name: name != "exact")
    largest = {name: float(np.max(found[name], initial=0.0)) for name in ordered}
    reference = largest.get("exact") or max(largest.values(), default=0.0)
    values, dropped = {}, {}
    for name in ordered:
        descending = np.sort(np.asarray(found[name], dtype=float).reshape(-1))[::-1]
        kept = descending[descending > RANGE * reference]
        values[name], dropped[name] = kept, len(descending) - len(kept)
    return Spectra(values, dropped)


def spectrum(
    source: Any, methods: Sequence[str] | None = None, *, ax: Axes | None = None, title: str | None = None
) -> Axes:
    """Draw eigenvalues in descending order on a logarithmic scale, the exact Fisher's as a thick black line.

    Args:
        source: a comparison, a Fisher, or a dictionary name -> eigenvalues.
        methods: which of them; all if None. The exact one is always there.
        ax: axes to draw on; a new figure without them.
        title: above the axes.

    Returns:
        The axes.

    Raises:
        ValueError: there is no such spectrum.
        TypeError: `source` cannot give eigenvalues.
    """
    info = spectrum_info(source, methods)
    ax = ax or style.new_axes(6.4, 3.6)
    handles, labels = [], []
    for name, look in style.method_styles(info.values).items():
        values = info.values[name]
        (line,) = ax.plot(
            np.arange(1, len(values) + 1),
            values,
            color=look.color,
            linestyle=look.line,
            linewidth=2.2 if name == "exact" else 1.2,
            label=name,
        )
        handles.append(line)
        labels.append(style.legend_label(name))
    ax.set_yscale("log")
    style.plain_decades(ax.yaxis, 1 / RANGE)
    ax.set_xlabel("index, largest first")
    ax.set_ylabel("eigenvalue")
    ax.set_xlim(left=0)
    style.tidy(ax)
    legend = ax.legend(
        handles, labels, fontsize="small", frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0)
    )
    style.plain(legend.get_texts())
    if title is not None:
        ax.set_title(title, fontsize="medium", parse_math=False)
    return ax
