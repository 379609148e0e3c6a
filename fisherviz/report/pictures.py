"""The pictures of a page: drawn once, kept as files, and as text that stands inside the page.

Charts become inline SVG, heatmaps PNG below a size that keeps the page light. Nothing is looked up but the
saved comparison, and the style is matplotlib's default whatever the user's is.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.style import context as style_context
from PIL import Image

from fisherviz import plotting
from fisherviz.plotting import style
from fisherviz.plotting.heatmaps import draw_heatmap, heatmap_info, shared_maximum, triptych_arrays
from fisherviz.results import metrics
from fisherviz.results.comparison import Comparison
from fisherviz.support.names import short
from fisherviz.support.numbers import show_number

LONGEST = 60  # letters of a method's label in the name of a file
LARGEST = 300_000  # bytes of one PNG inside the page
DPI = 120
DRAWN = ("relative_frobenius", "direction_cosine")  # the metrics that have charts
_INKS = {
    "#000000": "currentColor", style.INK: "currentColor", style.FAINT: "var(--soft)", "#d9d9d9": "var(--line)",
    "#ffffff": "var(--paper)", "#eef3f8": "var(--tint)",
}  # fmt: skip
_LOOK = {
    "font.size": 9.0, "axes.labelsize": 9.0, "axes.linewidth": 0.7, "svg.fonttype": "path",
    "svg.hashsalt": "fisherviz", "savefig.facecolor": "white",
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """One picture of the page.

    Args:
        name: of its files, without the extension.
        group: "front", "matrix", "inverse", "means", "spectra" or "layers": where it stands.
        caption: below it.
        description: what a reader who cannot see it should know.
        svg: the chart as SVG text, or "" for a heatmap.
        png: the picture as PNG, or b"" of a chart that is wanted inside a page alone.
    """

    name: str
    group: str
    caption: str
    description: str
    svg: str
    png: bytes

    def inline(self) -> str:
        """HTML that needs no other file."""
        label = html.escape(self.description, quote=True)
        if self.svg:
            return inline_svg(self.svg, self.name, label)
        data = base64.b64encode(self.png).decode()
        return f'<img src="data:image/png;base64,{data}" alt="{label}">'

    def files(self) -> dict[str, bytes | str]:
        """File name to content."""
        found: dict[str, bytes | str] = {f"{self.name}.png": self.png}
        return {**found, f"{self.name}.svg": self.svg} if self.svg else found


def pictures(comparison: Comparison, prefix: str = "", *, alone: bool = False) -> Iterator[Picture]:
    """Draw everything that a saved comparison has numbers for.

    Args:
        comparison: what to draw.
        prefix: of the files' names.
        alone: draw what stands in a page, and not every method's matrix and inverse, the layers' charts and the charts'
            PNG, which stand beside it.

    Yields:
        Pictures in the order of the page; the first of group "matrix" is the one that a page shows without scripts.
    """
    shown = (partial(_fronts, beside=not alone), partial(_matrices, only_first=alone), _root_means)
    for drawn in (*shown, partial(_spectra, beside=not alone), *(() if alone else (_means, _layers))):
        for picture in drawn(comparison):
            yield replace(picture, name=prefix + picture.name)


def _fronts(comparison: Comparison, beside: bool) -> Iterator[Picture]:
    cost = "passes" if comparison.whole("passes") else "seconds"
    for metric in DRAWN:
        try:
            info = plotting.pareto_info(comparison, metric, cost)
        except ValueError:
            continue
        entry = metrics.metric(metric)
        front = np.asarray(info.methods)[info.on_front]
        error = f"1 − {entry.label}" if entry.best == "one" else entry.title
        yield _chart(
            f"front-{metric}", "front", 5.6, 3.9, partial(plotting.pareto, comparison, metric, cost),
            f"{error} against the cost of building the approximation, both logarithmic. "
            "Ringed and bold: the front. Whatever lies in the shaded area is beaten in both by a ringed one.",
            f"Scatter plot of the {entry.label} against cost, {len(info.methods)} methods. On the front, "
            f"from cheap to close: {', '.join(front)}.", beside,
        )  # fmt: skip


def closest_first(comparison: Comparison, metric: str = "relative_frobenius") -> list[str]:
    """The methods, smallest error of the whole matrix first, or in the median over the layers; exact ones come last.

    Args:
        comparison: whose methods.
        metric: the error.
    """
    errors = comparison.whole(metric)
    if not errors:
        errors = comparison.blocks(metric).groupby("method")["value"].median().to_dict()
    infinity = float("inf")
    return sorted(
        comparison.methods, key=lambda m: (errors.get(m, infinity) < metrics.ROUNDING, errors.get(m, infinity))
    )


def _matrices(comparison: Comparison, only_first: bool = False) -> Iterator[Picture]:
    for inverse, group in ((False, "matrix"),) if only_first else ((False, "matrix"), (True, "inverse")):
        metric = "inverse_frobenius" if inverse else "relative_frobenius"
        errors = comparison.whole(metric)
        ranked = closest_first(comparison, metric)[: 1 if only_first else None]
        what = "damped inverse of the Fisher" if inverse else "Fisher"
        named = file_names(comparison.methods)
        for method, png in _triptychs(comparison, ranked, inverse):
            error = f": relative Frobenius error {show_number(errors[method])}" if method in errors else ""
            yield Picture(
                f"{group}-{named[method]}", group, f"{method}{error}",
                f"Three heatmaps of absolute entries on one scale: exact {what}, its approximation {method}, "
                f"and their absolute difference{error}.", "", png,
            )  # fmt: skip


def file_names(methods: Iterable[str]) -> dict[str, str]:
    """Names for files, of letters, digits and few signs; those of different methods differ, also where case does not.

    Args:
        methods: their labels.
    """
    found: dict[str, str] = {}
    taken: set[str] = set()
    for method in methods:
        stem = re.sub(r"[^\w.-]", "_", method)[:LONGEST] or "method"
        tries = itertools.chain([stem], (f"{stem}-{count}" for count in itertools.count(2)))
        found[method] = next(name for name in tries if _folded(name) not in taken)
        taken.add(_folded(found[method]))
    return found


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKD", name).casefold()


def _triptychs(comparison: Comparison, methods: Sequence[str], inverse: bool) -> Iterator[tuple[str, bytes]]:
    """One triptych per method that has the arrays: laid out once, then only the images and a title change."""
    methods = [name for name in methods if set(triptych_arrays(name, inverse)) <= comparison.arrays.keys()]
    if not methods:
        return
    figure = Figure(figsize=(9.6, 3.5), layout="compressed")
    with _look():
        axes = list(figure.subplots(1, 3))
        plotting.triptych(comparison, methods[0], inverse=inverse, ax=axes)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        above = [a for ax in axes[1:] for a in (*ax.images, *ax.collections, *ax.spines.values())]
        sheet = _Sheet(figure, [*above, axes[1].title])
        for method in methods:
            cells = plotting.triptych_info(comparison, method, inverse=inverse)
            for ax, info in zip(axes[1:], cells[1:], strict=True):
                ax.images[0].set_data(info.values)
            axes[1].title.set_text(short(method, 24))
            yield method, _small_png(sheet)


def _root_means(comparison: Comparison) -> Iterator[Picture]:
    """The map of blocks above the limit of dense matrices."""
    ranked = [name for name in closest_first(comparison) if f"block_rms/{name}" in comparison.arrays]
    if not ranked:
        return
    names = ("block_rms/exact", f"block_rms/{ranked[0]}", f"block_rms_difference/{ranked[0]}")
    edges = list(range(len(comparison.layers) + 1))
    figure = Figure(figsize=(9.6, 3.5), layout="compressed")
    with _look():
        cells = [heatmap_info(comparison.arrays[name], edges=edges, layers=comparison.layers) for name in names]
        top = shared_maximum(cells)
        titles = ("exact Fisher", short(ranked[0], 20), "difference")
        for ax, info, title in zip(figure.subplots(1, 3), cells, titles, strict=True):
            draw_heatmap(ax, info, vmax=top, title=title, names=title == titles[0])
        canvas, png = FigureCanvasAgg(figure), io.BytesIO()
        canvas.draw()
        _pixels(canvas).save(png, format="PNG")
    yield Picture(
        "root-means", "matrix", f"Root mean square of each block: the exact Fisher, {ranked[0]} and their difference",
        f"Three maps of layers by layers: the root mean square of each block's entries in the exact Fisher, in "
        f"{ranked[0]}, and of their difference.", "", png.getvalue(),
    )  # fmt: skip


def _means(comparison: Comparison) -> Iterator[Picture]:
    for inverse, what in ((False, "F"), (True, "the damped inverse of F")):
        if f"{'block_means_inverse' if inverse else 'block_means'}/exact" not in comparison.arrays:
            continue
        yield _chart(
            f"means{'-inverse' if inverse else ''}", "means", 3.5, 3.1,
            partial(plotting.block_means, comparison, inverse=inverse),
            f"Mean |entry| of each block of {what}.",
            f"Heatmap of the mean absolute entry of each pair of layers in {what}.",
        )  # fmt: skip


def _spectra(comparison: Comparison, beside: bool) -> Iterator[Picture]:
    if any(name.startswith("spectrum/") for name in comparison.arrays):
        yield _chart(
            "spectra", "spectra", 9.0, 3.8, partial(plotting.spectrum, comparison),
            "Eigenvalues, largest first. Where a line leaves the thick one, steps are stretched or shrunk. "
            + _not_drawn(comparison),
            "Line plot of the eigenvalues of the exact Fisher and of each approximation, logarithmic.", beside,
        )  # fmt: skip


def _not_drawn(comparison: Comparison) -> str:
    """Which eigenvalues are missing: rounding, zero or negative."""
    info = plotting.spectrum_info(comparison)
    counts = [f"{name} {n} of {n + len(info.values[name])}" for name, n in info.dropped.items() if n]
    if not counts:
        return "All are drawn."
    return f"Not drawn, since below a billionth of the largest exact one: {', '.join(counts)}."


def _layers(comparison: Comparison) -> Iterator[Picture]:
    for metric in DRAWN:
        rows = comparison.blocks(metric)
        if rows.empty or len(set(rows["row"])) < 2:
            continue
        entry = metrics.metric(metric)
        yield _chart(
            f"layers-{metric}", "layers", 5.7, 1.0 + 0.27 * len(set(rows["method"])),
            partial(plotting.comparison, comparison, metric),
            f"{entry.title} of each layer's own block, one mark per layer, best method first.",
            f"Dot plot of {entry.label} per layer for each method; the numbers are in the table below.",
        )  # fmt: skip


def _chart(
    name: str, group: str, width: float, height: float, draw: Callable[..., Any], caption: str, description: str,
    beside: bool = True,
) -> Picture:  # fmt: skip
    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    with _look():
        draw(ax=figure.subplots())
        text, png = io.StringIO(), io.BytesIO()
        canvas = FigureCanvasAgg(figure)
        if beside:
            canvas.draw()  # lays the figure out too
            _pixels(canvas).save(png, format="PNG")
        elif (engine := figure.get_layout_engine()) is not None:
            engine.execute(figure)
        figure.set_layout_engine("none")
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})
    return Picture(name, group, caption, description, text.getvalue(), png.getvalue())


class _Sheet:
    """A figure that is drawn again and again, of which only some artists change: the rest is drawn once.

    Args:
        figure: laid out, without a layout engine.
        changing: what changes, in the order of drawing; nothing else lies above it.
    """

    def __init__(self, figure: Figure, changing: Sequence[Artist]) -> None:
        self.figure, self.changing = figure, changing
        self._rest: dict[int, tuple[FigureCanvasAgg, Any]] = {}
        for artist in changing:
            artist.set_animated(True)  # left out when the whole is drawn

    def drawn(self, dpi: int) -> Image.Image:
        """The figure's pixels as it is now."""
        self.figure.set_dpi(dpi)
        if dpi not in self._rest:
            canvas = FigureCanvasAgg(self.figure)
            canvas.draw()
            self._rest[dpi] = (canvas, canvas.copy_from_bbox(self.figure.bbox))
        canvas, rest = self._rest[dpi]
        self.figure.set_canvas(canvas)
        canvas.restore_region(rest)
        for artist in self.changing:
            artist.draw(canvas.get_renderer())
        return _pixels(canvas)


def _pixels(canvas: FigureCanvasAgg) -> Image.Image:
    """What was drawn on a canvas; `savefig` would draw everything twice."""
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _look() -> Any:
    return style_context(["default", _LOOK])


def _small_png(sheet: _Sheet) -> bytes:
    """A heatmap as PNG, coarser until it is small enough for the page."""
    dpi = DPI
    while True:
        png = _encoded(sheet.drawn(dpi))
        if len(png) <= LARGEST or dpi <= 40:
            return png
        dpi = int(dpi * max(0.5, 0.95 * (LARGEST / len(png)) ** 0.5))


def _encoded(image: Image.Image) -> bytes:
    """PNG in the colour map's own colours and greys: a third of the size of one with all colours."""
    colors = colormaps[style.SEQUENTIAL](np.linspace(0, 1, 224))[:, :3]
    greys = np.repeat(np.linspace(0, 1, 32)[:, None], 3, axis=1)
    palette = Image.new("P", (1, 1))
    palette.putpalette((255 * np.vstack([colors, greys])).round().astype(np.uint8).tobytes())
    stream = io.BytesIO()
    image.quantize(palette=palette, dither=Image.Dither.NONE).save(stream, format="PNG")
    return stream.getvalue()


def inline_svg(text: str, name: str, label: str) -> str:
    """SVG from a file as an element of a page: no prologue, no names of other places, ids of its own.

    Args:
        text: what matplotlib wrote.
        name: makes the ids unique in the page.
        label: escaped description.

    Returns:
        The element.
    """
    body = text[text.index("<svg") :]
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", body)
    body = body.replace("xlink:href", "href")
    key = re.sub(r"\W", "-", name)
    body = re.sub(r'\bid="', f'id="{key}-', body)
    body = re.sub(r'href="#', f'href="#{key}-', body)
    body = re.sub(r"url\(#", f"url(#{key}-", body)
    body = re.sub(r'\bstyle="([^"]*)"', _attributes, body)
    return body.replace("<svg", f'<svg role="img" class="chart" aria-label="{label}"', 1).strip()


def _attributes(found: re.Match[str]) -> str:
    """A style attribute, which a page that forbids inline styles would ignore, as attributes in the page's colours."""
    pairs = (pair.split(":", 1) for pair in found[1].split(";") if ":" in pair)
    return " ".join(f'{name.strip()}="{_paint(value.strip())}"' for name, value in pairs)


def _paint(value: str) -> str:
    """A colour as the page has it: ink, paper and lines are its own, others may be lighter on a dark page."""
    if value in _INKS:
        return _INKS[value]
    return f"var(--c-{value[1:]}, {value})" if re.fullmatch("#[0-9a-f]{6}", value) else value
