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
from fisherviz.plotting.reduce import is_array, is_structured, to_array
from fisherviz.results.comparison import Comparison
from fisherviz.support.choices import number
from fisherviz.support.names import shortened

RANGE = 1e-9  # eigenvalues below this share of the largest exact one are rounding, and not drawn

SYMMETRIC = 1e-4  # asymmetry that rounding of float32 matrices explains, as a share of the largest entry


@dataclass(frozen=True)
class Spectra:
    """Eigenvalues per method, descending, and how many of each are not drawn: rounding, zero or negative."""

    values: dict[str, np.ndarray]
    dropped: dict[str, int]

    def count(self, name: str) -> str:
        """How many eigenvalues are drawn of how many: "41/96"."""
        shown = len(self.values[name])
        return f"{shown:,}/{shown + self.dropped[name]:,}"


def spectrum_info(source: Any, methods: Sequence[str] | None = None, floor: float = RANGE) -> Spectra:
    """Gather what `spectrum` draws; see there for the arguments.

    Returns:
        Eigenvalues per method, the exact ones first.

    Raises:
        ValueError: the comparison holds no spectra, or not the one asked for.
        TypeError: `source` cannot give eigenvalues.
    """
    if isinstance(source, Comparison):
        prefix = "spectrum/"
        found = {name[len(prefix) :]: _padded(v, 0) for name, v in source.arrays.items() if name.startswith(prefix)}
        if not found:
            raise ValueError("the comparison holds no spectra.")
    elif isinstance(source, Mapping):
        if not source:
            raise ValueError("the dictionary holds no spectrum; give it names with matrices or their eigenvalues.")
        found = {str(name): eigenvalues(values) for name, values in source.items()}
    else:
        name = "exact" if hasattr(source, "spectrum") else getattr(source, "title", None)
        found = {name if isinstance(name, str) else "matrix": eigenvalues(source)}
    if methods is not None:
        wanted = [*(["exact"] if "exact" in found else []), *(m for m in style.chosen(methods, found) if m != "exact")]
        for name in wanted:
            if name not in found:
                raise style.absent(f"no spectrum of {name!r}", name, found)
        found = {name: found[name] for name in wanted}
    ordered = sorted(found, key=lambda name: name != "exact")
    largest = {name: float(np.max(found[name], initial=0.0)) for name in ordered}
    reference = largest.get("exact") or max(largest.values(), default=0.0)
    number("floor", floor, 0.0, 1.0)
    values, dropped = {}, {}
    for name in ordered:
        descending = np.sort(np.asarray(found[name], dtype=float).reshape(-1))[::-1]
        kept = descending[descending > floor * reference] if floor else descending
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
    if hasattr(source, "spectrum") and not isinstance(source, type):
        return _padded(to_array(source.spectrum()), source.shape[0])
    if not is_structured(source) and not is_array(source):
        raise TypeError(
            f"cannot take the spectrum of {type(source).__name__}; pass a comparison, a Fisher, an approximation, "
            "a symmetric matrix, or a dictionary of them or of their eigenvalues."
        )
    array = to_array(source)
    if not array.size:
        raise ValueError("a spectrum needs at least one eigenvalue, this array is empty.")
    if array.ndim == 1:
        return array
    if array.ndim != 2 or array.shape[0] != array.shape[1]:
        raise ValueError(f"a spectrum needs a square matrix or eigenvalues, this array has the shape {array.shape}.")
    matrix = array.astype(np.float64)
    if np.abs(matrix - matrix.T).max(initial=0.0) > SYMMETRIC * np.abs(matrix).max(initial=0.0):
        raise ValueError("a spectrum needs a symmetric matrix, and this one is not; pass the eigenvalues themselves.")
    return np.linalg.eigvalsh((matrix + matrix.T) / 2)


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    """Non-zero eigenvalues with the zeros that a matrix of this size has beside them."""
    return np.concatenate([values, np.zeros(max(0, size - len(values)), values.dtype)])


def spectrum(
    source: Any,
    methods: Sequence[str] | None = None,
    *,
    floor: float = RANGE,
    ax: Axes | None = None,
    title: str | None = None,
    width: float = 6.4,
) -> Axes:
    """Draw eigenvalues in descending order on a logarithmic scale, the exact Fisher's as a thick black line.

    The picture says how many of each matrix's eigenvalues are drawn.

    Args:
        source: a comparison, a Fisher, an approximation, a symmetric matrix (array or tensor), their eigenvalues, or a
            dictionary from names to any of these but a comparison.
        methods: which of them; all if None. The exact one is always there.
        floor: share of the largest exact eigenvalue; what lies below is rounding and not drawn. 0 draws all, zeros and
            negative ones on a linear stretch around 0.
        ax: axes to draw on; a new figure without them.
        title: above the axes.
        width: of a new figure, in inches.

    Returns:
        The axes.

    Raises:
        ValueError: there is no such spectrum, or a matrix is not symmetric.
        TypeError: `source` cannot give eigenvalues.
    """
    info = spectrum_info(source, methods, floor)
    made = ax is None
    ax = style.new_axes(width, 1.2 + 0.38 * width) if ax is None else ax
    names = dict(zip(info.values, shortened(info.values, 24), strict=True))
    for name, look in style.method_styles(info.values).items():
        values, thick = info.values[name], 2.2 if name == "exact" else 1.2
        places, label = np.arange(1, len(values) + 1), style.legend_label(names[name])
        alone = look.marker if len(values) == 1 else ""  # one point makes no line
        ax.plot(places, values, color=look.color, linestyle=look.line, linewidth=thick, label=label, marker=alone)
    _scale(ax, np.concatenate(list(info.values.values())), RANGE)
    counts = {style.legend_label(names[name]): info.count(name) for name in info.values}
    same = len(set(counts.values())) == 1
    drawn = f" ({next(iter(counts.values())).replace('/', ' of ')} drawn)" if same else " (n/m: n of m drawn)"
    ax.set(xlabel=f"index, largest first{drawn}", ylabel="eigenvalue")
    ax.set_xlim(left=0)
    style.tidy(ax, title)
    handles, labels = ax.get_legend_handles_labels()
    cut = {style.legend_label(names[name]) for name in info.values if info.dropped[name]}  # the others are whole
    said = labels if same else [f"{name} {counts[name]}" if name in cut else name for name in labels]
    style.legend(ax, grow=made, handles=handles, labels=said)
    return ax


def _scale(ax: Axes, values: np.ndarray, floor: float) -> None:
    """Logarithmic; linear around 0, below the rounding of the largest, where values are not positive."""
    positive = values[values > 0]
    if not len(positive):
        return
    if len(positive) == len(values):
        style.logarithmic(ax.yaxis, positive.min(), positive.max())
    else:
        style.linear_around_zero(ax.yaxis, floor * float(positive.max()))
