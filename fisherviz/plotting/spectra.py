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
from fisherviz.results.comparison import Comparison

RANGE = 1e-9  # eigenvalues below this share of the largest exact one are rounding, and not drawn

SYMMETRIC = 1e-4  # asymmetry that rounding of float32 matrices explains, as a share of the largest entry


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
        found = {str(name): eigenvalues(values) for name, values in source.items()}
    else:
        name = "exact" if hasattr(source, "spectrum") else getattr(source, "name", None)
        found = {name if isinstance(name, str) else "matrix": eigenvalues(source)}
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


def eigenvalues(source: Any) -> np.ndarray:
    """Eigenvalues of what is drawn.

    Args:
        source: a Fisher, an approximation or other structured matrix, a symmetric matrix (P, P), or eigenvalues (n,).

    Returns:
        (n,) numbers in any order.

    Raises:
        ValueError: the array is neither a symmetric matrix nor a vector.
        TypeError: it has no eigenvalues.
    """
    if hasattr(source, "spectrum"):
        return to_array(source.spectrum())
    if not hasattr(source, "to_dense") and not hasattr(source, "shape") and not isinstance(source, list | tuple):
        raise TypeError(
            f"cannot take the spectrum of {type(source).__name__}; pass a comparison, a Fisher, an approximation, "
            "a symmetric matrix, or a dictionary of them or of their eigenvalues."
        )
    array = to_array(source)
    if array.ndim == 1:
        return array
    if array.ndim != 2 or array.shape[0] != array.shape[1]:
        raise ValueError(f"a spectrum needs a square matrix or eigenvalues, this array has the shape {array.shape}.")
    matrix = array.astype(np.float64)
    if np.abs(matrix - matrix.T).max(initial=0.0) > SYMMETRIC * np.abs(matrix).max(initial=0.0):
        raise ValueError("a spectrum needs a symmetric matrix, and this one is not; pass the eigenvalues themselves.")
    return np.linalg.eigvalsh((matrix + matrix.T) / 2)


def spectrum(
    source: Any, methods: Sequence[str] | None = None, *, ax: Axes | None = None, title: str | None = None
) -> Axes:
    """Draw eigenvalues in descending order on a logarithmic scale, the exact Fisher's as a thick black line.

    Args:
        source: a comparison, a Fisher, an approximation, a symmetric matrix (array or tensor), their eigenvalues, or a
            dictionary from names to any of these but a comparison.
        methods: which of them; all if None. The exact one is always there.
        ax: axes to draw on; a new figure without them.
        title: above the axes.

    Returns:
        The axes.

    Raises:
        ValueError: there is no such spectrum, or a matrix is not symmetric.
        TypeError: `source` cannot give eigenvalues.
    """
    info = spectrum_info(source, methods)
    ax = ax or style.new_axes(6.4, 3.6)
    for name, look in style.method_styles(info.values).items():
        values, width = info.values[name], 2.2 if name == "exact" else 1.2
        places = np.arange(1, len(values) + 1)
        ax.plot(places, values, color=look.color, linestyle=look.line, linewidth=width, label=style.legend_label(name))
    style.logarithmic(ax.yaxis, RANGE, 1.0)
    ax.set(xlabel="index, largest first", ylabel="eigenvalue")
    ax.set_xlim(left=0)
    style.tidy(ax, title)
    style.legend(ax)
    return ax
