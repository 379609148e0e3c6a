"""Pictures of exhibits: matplotlib figures drawn in one look and kept as small PNG files.

Colours are those of `fisherviz.plotting`; the style is matplotlib's default whatever the user's is. Nothing
here touches pyplot.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.style import context
from PIL import Image

from fisherviz.plotting.style import SEQUENTIAL

LARGEST = 300_000
"""Bytes of one picture."""
_LOOK = {"font.size": 9.0, "axes.linewidth": 0.7, "savefig.facecolor": "white"}


def draw(width: float, height: float, fill: Callable[[Figure], None], *, heatmaps: bool = False) -> bytes:
    """Draw a figure as PNG in 256 colours, coarser where that is needed to keep it small.

    Args:
        width: inches.
        height: inches.
        fill: puts axes on the figure.
        heatmaps: whether it shows heatmaps, which take more pixels, wider margins and their own colours.

    Returns:
        The file's content, at most `LARGEST` bytes unless 60 dpi are still too many.
    """
    dpi = 150 if heatmaps else 130
    with context(["default", _LOOK]):
        figure = Figure(figsize=(width, height), layout="constrained")
        if heatmaps:
            figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)  # type: ignore[union-attr,call-arg]
        fill(figure)
        while True:
            content = _png(figure, dpi, heatmaps)
            if len(content) <= LARGEST or dpi <= 60:
                return content
            dpi = max(60, int(dpi * 0.97 * (LARGEST / len(content)) ** 0.5))


def _png(figure: Figure, dpi: int, heatmaps: bool) -> bytes:
    """The figure in 256 colours, its own or the heatmaps' and greys: a third of the size of all colours."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    palette = None
    if heatmaps:
        colors = colormaps[SEQUENTIAL](np.linspace(0, 1, 224))[:, :3]
        greys = np.repeat(np.linspace(0, 1, 32)[:, None], 3, axis=1)
        palette = Image.new("P", (1, 1))
        palette.putpalette((255 * np.vstack([colors, greys])).round().astype(np.uint8).tobytes())
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    stream = io.BytesIO()
    small = image.quantize(256, palette=palette, dither=Image.Dither.NONE)
    small.save(stream, format="PNG", optimize=True, dpi=(dpi, dpi))
    return stream.getvalue()
