"""How methods, layers and names look in every picture: one colour, marker and line per method.

Colours are distinguishable with colour-blind eyes and on paper, and never the only sign: markers and lines
differ too.
Nothing here touches matplotlib's global settings.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import FuncFormatter, LogLocator
from matplotlib.transforms import ScaledTranslation

from fisherviz.results import metrics
from fisherviz.support.choices import did_you_mean
from fisherviz.support.names import short, shortened
from fisherviz.support.numbers import superscript, three_digits

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

    def markersize(self, size: float) -> float:
        """The size in points at which its marker looks as large as a circle of this size."""
        return size * _LARGER.get(self.marker, 1.0)


_LARGER = {"*": 1.75, "^": 1.2, "v": 1.2, "<": 1.2, ">": 1.2, "d": 1.3, "P": 1.2, "X": 1.2, "h": 1.15, "H": 1.15,
           "p": 1.15, "D": 0.9, "s": 0.95}  # fmt: skip
"""Stars and triangles fill less of their size than circles do."""
SMALLEST = 6.0
"""Points of the smallest text."""
FULL = 4.6
"""Inches of a picture from which text has the user's own size; in narrower ones it is smaller."""
EXACT = MethodStyle("#000000", "o", "-")
_KNOWN = {
    "identity": MethodStyle("#767676", "X", (0, (1, 1))),
    "diagonal": MethodStyle("#999933", "v", (0, (3, 1))),
    "layer": MethodStyle("#332288", "s", (0, (5, 1))),
    "cw-ngd": MethodStyle("#882255", "P", (0, (3, 1, 1, 1))),
    "kfac-full": MethodStyle("#0072B2", "D", (0, (5, 1, 1, 1))),
    "kfac": MethodStyle("#D55E00", "o", (0, (4, 1.5))),
    "kfac-tridiagonal": MethodStyle("#B8860B", "^", (0, (6, 1, 1, 1, 1, 1))),
    "kfra": MethodStyle("#44AA99", "H", (0, (1, 3))),
    "ekfac": MethodStyle("#009E73", "h", (0, (2, 1))),
    "foof": MethodStyle("#CC79A7", "*", (0, (1, 2))),
    "centred": MethodStyle("#AA4499", "p", (0, (2, 2))),
    "nearest-kronecker": MethodStyle("#56B4E9", "<", (0, (7, 2))),
}
_OTHERS = (
    MethodStyle("#117733", ">", (0, (4, 1, 2, 1))),
    MethodStyle("#661100", "d", (0, (6, 3))),
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


def damped_label(label: str, metric: str, damping: str) -> str:
    """The label of a metric's axis, with the damping where the metric hangs on one."""
    damped = metrics.metric(metric).needs in ("damping", "direction")
    return f"{label}, {damping}" if damped and damping else label


def require(given: Any, kind: type | tuple[type, ...], what: str, takes: str) -> None:
    """TypeError, one sentence, for what is not of the kind that a picture takes."""
    if not isinstance(given, kind):
        raise TypeError(f"{what} takes {takes}, got {type(given).__name__}.")


def absent(what: str, given: str, known: Iterable[str]) -> ValueError:
    """One sentence on a name that is not there, with the nearest that is, or else with those there are."""
    names = list(known)
    near = did_you_mean(given, names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    listed = f"; it has {', '.join(names[:LISTED]) or 'none'}{more}."
    return ValueError(f"{what}{listed if near == '.' else near}")


def chosen(names: Any, known: Iterable[str]) -> list[str]:
    """The names asked for, all of those known where none are; TypeError where they are no list of names."""
    if names is None:
        return list(known)
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"methods= takes a list of names, got {type(names).__name__}.")
    if not (found := list(names)):
        raise ValueError("methods= names no method; leave it out for all of them.")
    return found


def shown(value: Any) -> str:
    """A setting's value, in a label."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def plain(texts: Sequence[Any]) -> None:
    """Names are text: a dollar sign in one starts no formula."""
    for text in texts:
        text.set_parse_math(False)


def room(ax: Axes) -> float:
    """Inches from left to right that axes have for themselves and their labels."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    spec = ax.get_subplotspec()
    share = 1.0 if spec is None else len(spec.colspan) / spec.get_gridspec().ncols
    return figure.get_figwidth() * share


def alone(ax: Axes) -> bool:
    """Whether axes have the whole width of their figure."""
    spec = ax.get_subplotspec()
    return spec is None or len(spec.colspan) == spec.get_gridspec().ncols


def points(ax: Axes, size: str | float = "medium") -> float:
    """The size of text in a picture: the user's, smaller where there is little room, but never below 6 points."""
    own = FontProperties(size=size).get_size_in_points()
    return max(SMALLEST, own * min(1.0, max(0.75, room(ax) / FULL)))


def letters(inches: float, size: float) -> int:
    """About how many letters of a size stand beside each other."""
    return max(1, int(inches * 72 / (0.53 * size)))


def wrapped(text: str, inches: float, size: float) -> str:
    """A text in as many lines as it takes; a number stays with its λ, a word whole unless it is wider than a line."""
    whole, most = text.replace("λ = ", "λ\u00a0=\u00a0"), max(8, letters(inches, size))
    hyphens = max(map(len, whole.split(" "))) > most
    return textwrap.fill(whole, most, break_on_hyphens=hyphens, break_long_words=False) or text


def tidy(ax: Axes, title: str | None = None) -> None:
    """Fewer lines: no frame above and on the right, a light grid behind the data; text that fits; the title, if any."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, which="major", color="#d9d9d9", linewidth=0.6)
    ax.set_axisbelow(True)
    for axis, size in ((ax.xaxis, rcParams["xtick.labelsize"]), (ax.yaxis, rcParams["ytick.labelsize"])):
        axis.set_tick_params(which="major", labelsize=points(ax, size))
        axis.set_tick_params(which="minor", labelsize=points(ax, "small"))
    figure = ax.get_figure(root=True)
    assert figure is not None
    for axis, inches in ((ax.xaxis, 0.72 * room(ax)), (ax.yaxis, 0.66 * figure.get_figheight())):
        size = points(ax, rcParams["axes.labelsize"])
        axis.label.set_fontsize(size)
        axis.label.set_text(wrapped(axis.label.get_text(), inches, size))
    entitle(ax, title)


def entitle(ax: Axes, title: str | None) -> None:
    """A title, if there is one, as text, in as many lines as it takes."""
    if title is not None:
        size = points(ax, "medium" if alone(ax) else "small")
        ax.set_title(wrapped(title, (0.85 if alone(ax) else 0.55) * room(ax), size), fontsize=size, parse_math=False)


LISTED = 12
"""Names that an error lists at most."""
NARROW = 1.6
"""Inches of a panel that has room for no names of its own."""
BESIDE = 0.2
"""Share of a picture's width that a legend beside the axes may take."""


def legend(ax: Axes, *, beside: bool = True, grow: bool = False, **options: Any) -> None:
    """A small legend without a frame: beside the axes where they keep most of the width, else below them.

    Args:
        ax: what it belongs to.
        beside: False puts it inside.
        grow: whether the figure may become taller for one below.
        options: of matplotlib's legend.
    """
    size = points(ax, "small")
    options = {"fontsize": size, "frameon": False, "borderaxespad": 0.4, "handlelength": 1.8, **options}
    made = ax.legend(**({"loc": "upper left", "bbox_to_anchor": (1.0, 1.02)} if beside else {}), **options)
    plain(made.get_texts())
    if not beside:
        return
    figure = ax.get_figure(root=True)
    assert figure is not None
    width, height = (side / figure.dpi for side in made.get_window_extent().size)
    if width <= BESIDE * room(ax) and height <= 0.95 * figure.get_figheight():
        return
    entries, widest = len(made.get_texts()), width - 1.2 * size / 72
    columns = max(1, min(entries, int(0.9 * room(ax) / (widest + size / 72))))
    label = points(ax, rcParams["axes.labelsize"]) * 1.3 * (ax.xaxis.label.get_text().count("\n") + 1) + 4
    under = 9 + 1.3 * points(ax, rcParams["xtick.labelsize"]) + (label if ax.get_xlabel() else 0)
    place = ax.transAxes + ScaledTranslation(0, -under / 72, figure.dpi_scale_trans)
    made = ax.legend(
        loc="upper center", bbox_to_anchor=(0.5, 0.0), bbox_transform=place, ncols=columns, columnspacing=1.0, **options
    )
    plain(made.get_texts())
    if grow:
        figure.set_figheight(figure.get_figheight() + made.get_window_extent().height / figure.dpi)


def scale_bar(bar: Colorbar, ax: Axes, label: str) -> None:
    """How the bar beside a picture of a matrix looks.

    Args:
        bar: the colour bar.
        ax: the axes that it stands beside.
        label: of its numbers.
    """
    size = points(ax, "small")
    bar.set_label(label, fontsize=size)
    bar.ax.tick_params(labelsize=size)
    bar.outline.set_visible(False)
    bar.formatter.set_powerlimits((-2, 3))  # type: ignore[attr-defined]
    bar.ax.yaxis.get_offset_text().set_fontsize(size)


def thinned(places: Sequence[float], apart: float) -> list[int]:
    """Positions of the places that lie at least so far from the one kept before."""
    kept: list[int] = []
    for k, place in enumerate(places):
        if not kept or place - places[kept[-1]] >= apart:
            kept.append(k)
    return kept


def name_layers(ax: Axes, centres: Sequence[float], names: Sequence[str], vertical: bool = True) -> None:
    """Layers' names along the axes of a matrix; where these would stand on each other, only those that have room.

    Args:
        ax: axes with a matrix.
        centres: where each layer's middle is.
        names: the layers'.
        vertical: whether they stand along the vertical axis too.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    size = points(ax, "small")
    side = 0.58 * min(room(ax), figure.get_figheight())  # of the matrix at least, in inches
    left, right = ax.get_xlim()
    width = min(24, max(8, letters(0.19 * figure.get_figwidth(), size)))
    kept = thinned(centres, 1.3 * size / 72 / side * (right - left))
    short_ones = shortened(names, width)
    places, labels = [centres[k] for k in kept], [short_ones[k] for k in kept]
    least = min((b - a for a, b in pairwise(places)), default=right - left)
    turned = max(map(len, labels)) + 1 > letters(least / (right - left) * side, size)
    horizontal = vertical or room(ax) >= NARROW  # in the narrow panels beside another its names stand for all
    ax.set_xticks(places, labels if horizontal else [""] * len(labels), rotation=90 if turned else 0, fontsize=size)
    ax.set_yticks(places, labels if vertical else [""] * len(labels), fontsize=size)
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
    axis.set_minor_formatter(FuncFormatter(lambda value, _: three_digits(value) if subs else ""))
    axis.set_tick_params(which="minor", labelsize=points(axis.axes, "small"))


def linear_around_zero(axis: Axis, least: float) -> None:
    """A scale that is logarithmic from `least` on, on both sides of a linear stretch around 0."""
    scale = axis.axes.set_xscale if axis is axis.axes.xaxis else axis.axes.set_yscale
    scale("symlog", linthresh=least, linscale=2.5)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"−{_decade(-value)}" if value < 0 else _decade(value)))


def _decade(value: float) -> str:
    if 1e-4 < value < 1e5 or value <= 0 or math.isinf(value):
        return f"{value:g}"
    return f"10{superscript(round(math.log10(value)))}"


def png(figure: Figure, dpi: int) -> bytes:
    """A figure as the content of a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    return stream.getvalue()


def fit_height(ax: Axes) -> None:
    """Give a new figure of square pictures the height that they, at the width there is, and their labels take."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.set_figheight(2 * figure.get_figwidth() + 2)
    figure.draw_without_rendering()
    figure.set_figheight(figure.get_tightbbox().height + 0.1)


def new_axes(width: float, height: float, layout: str = "constrained") -> Axes:
    """Axes of a new figure that notebooks show by themselves, as `pyplot` users expect.

    Args:
        width: of the figure in inches.
        height: of the figure in inches.
        layout: matplotlib's layout engine.
    """
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout=layout)[1]
