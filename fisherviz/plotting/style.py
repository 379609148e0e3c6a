"""How methods, layers and names look in every picture: one colour, marker and line per method.

Colours are distinguishable with colour-blind eyes and on paper, and never the only sign: markers and lines
differ too.
Nothing here touches matplotlib's global settings.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from fisherviz.results.metrics import superscript
from fisherviz.support.names import short as short
from fisherviz.support.names import shortened

SEQUENTIAL = "magma"  # perceptually uniform, dark is small: the papers' "white level"
DIVERGING = "RdBu_r"
INK = "#1a1a1a"
FAINT = "#8a8a8a"


@dataclass(frozen=True)
class MethodStyle:
    """Colour, marker and line of one method."""

    color: str
    marker: str
    line: Any


EXACT = MethodStyle("#000000", "o", "-")
_KNOWN = {
    "identity": MethodStyle("#767676", "X", (0, (1, 1))),
    "diagonal": MethodStyle("#999933", "v", (0, (3, 1))),
    "layer": MethodStyle("#332288", "s", (0, (5, 1))),
    "cw-ngd": MethodStyle("#882255", "P", (0, (3, 1, 1, 1))),
    "kfac-full": MethodStyle("#0072B2", "D", (0, (5, 1, 1, 1))),
    "kfac": MethodStyle("#D55E00", "o", (0, (4, 1.5))),
    "kfac-tridiagonal": MethodStyle("#B8860B", "^", (0, (6, 1, 1, 1, 1, 1))),
    "ekfac": MethodStyle("#009E73", "h", (0, (2, 1))),
    "foof": MethodStyle("#CC79A7", "*", (0, (1, 2))),
    "nearest-kronecker": MethodStyle("#56B4E9", "<", (0, (7, 2))),
}
_OTHERS = (
    MethodStyle("#117733", ">", (0, (4, 1, 2, 1))),
    MethodStyle("#AA4499", "p", (0, (2, 2))),
    MethodStyle("#661100", "d", (0, (6, 3))),
    MethodStyle("#44AA99", "H", (0, (1, 3))),
    MethodStyle("#6699CC", "8", (0, (8, 1, 1, 1))),
)


def method_styles(methods: Iterable[str]) -> dict[str, MethodStyle]:
    """The look of each method: the package's own keep theirs in every picture, others take turns.

    Args:
        methods: names, in the order of the comparison; "exact" is the exact Fisher.

    Returns:
        Name to style.
    """
    styles, others = {}, 0
    for method in methods:
        if method == "exact":
            styles[method] = EXACT
        elif method in _KNOWN:
            styles[method] = _KNOWN[method]
        elif method not in styles:
            styles[method] = _OTHERS[others % len(_OTHERS)]
            others += 1
    return styles


def legend_label(name: str) -> str:
    """A name for a legend; matplotlib drops entries that begin with an underscore."""
    name = short(name, 24)
    return f" {name}" if name.startswith("_") else name


def shown(value: Any) -> str:
    """A setting's value, in a label."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def plain(texts: Sequence[Any]) -> None:
    """Names are text: a dollar sign in one starts no formula."""
    for text in texts:
        text.set_parse_math(False)


def tidy(ax: Axes, title: str | None = None) -> None:
    """Fewer lines: no frame above and on the right, a light grid behind the data; and the title, if any."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, which="major", color="#d9d9d9", linewidth=0.6)
    ax.set_axisbelow(True)
    entitle(ax, title)


def entitle(ax: Axes, title: str | None) -> None:
    """A title, if there is one, as text."""
    if title is not None:
        ax.set_title(title, fontsize="medium", parse_math=False)


def legend(ax: Axes, *, beside: bool = True, **options: Any) -> None:
    """A small legend without a frame.

    Args:
        ax: what it belongs to.
        beside: whether it stands on the right of the axes, or inside.
        options: of matplotlib's legend.
    """
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.02)} if beside else {}
    plain(ax.legend(**place, **options, fontsize="small", frameon=False).get_texts())


def name_layers(ax: Axes, centres: Sequence[float], names: Sequence[str], width: int, vertical: bool = True) -> None:
    """Layers' names along the axes of a matrix; where these would stand on each other, only those that have room.

    Args:
        ax: axes with a matrix.
        centres: where each layer's middle is.
        names: the layers'.
        width: most characters of one.
        vertical: whether they stand along the vertical axis too.
    """
    left, right = ax.get_xlim()
    places: list[float] = []
    labels: list[str] = []
    for centre, label in zip(centres, shortened(names, width), strict=True):
        if not places or centre - places[-1] >= (right - left) / 24:
            places.append(centre)
            labels.append(label)
    turned = max(map(len, labels)) * len(labels) > 36
    ax.set_xticks(places, labels, rotation=90 if turned else 0, fontsize="small")
    ax.set_yticks(places, labels if vertical else [""] * len(labels), fontsize="small")
    ax.tick_params(length=0)
    plain([*ax.get_xticklabels(), *ax.get_yticklabels()])


def logarithmic(axis: Axis, low: float, high: float) -> None:
    """A logarithmic scale with plain numbers, for values from `low` to `high`."""
    scale = axis.axes.set_xscale if axis is axis.axes.xaxis else axis.axes.set_yscale
    scale("log")
    plain_decades(axis, high / low)


def plain_decades(axis: Axis, ratio: float) -> None:
    """Plain numbers on a logarithmic axis, between the decades too where it spans few of them.

    Args:
        axis: an axis whose scale is logarithmic.
        ratio: of the largest to the smallest value shown.
    """
    axis.set_major_formatter(FuncFormatter(lambda value, _: _decade(value)))
    subs = (2.0, 5.0) if 3 < ratio < 300 else (2.0, 3.0, 5.0, 7.0) if ratio <= 3 else ()
    axis.set_minor_locator(LogLocator(subs=subs or (1.0,), numticks=40))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if subs else ""))
    axis.set_tick_params(which="minor", labelsize="small")


def _decade(value: float) -> str:
    if 1e-4 < value < 1e5 or value <= 0:
        return f"{value:g}"
    return f"10{superscript(round(math.log10(value)))}"


def png(figure: Figure, dpi: int) -> bytes:
    """A figure as the content of a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    return stream.getvalue()


def new_axes(width: float, height: float, layout: str = "constrained") -> Axes:
    """Axes of a new figure that notebooks show by themselves, as `pyplot` users expect."""
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout=layout)[1]
