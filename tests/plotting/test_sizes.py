"""In one column and in two, of few layers and of many, nothing is cut, covered or too small to read."""

import functools
import itertools
import types

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from fisherviz import plotting as plot
from tests.factory import make_comparison

matplotlib.use("Agg")

WIDTHS = (3.3, 6.9)
LAYERS = (6, 60)
ENDS = ("attention.in_projection", "attention.out_projection", "feedforward.first", "feedforward.second")


@pytest.fixture(autouse=True)
def figures_are_closed():
    yield
    pyplot.close("all")


def names(count):
    """Long names of a transformer's layers."""
    blocks = [f"model.encoder.layers.{k}.{end}" for k in range(count) for end in ENDS]
    return (*blocks[: count - 1], "head")


@functools.cache  # drawing changes none
def comparison_of(layers):
    return make_comparison(layers=names(layers), units=2, fan_in=2)


def sweep_of(lines):
    """Learning rates over four decades, a line per damping, with the range of the seeds."""
    rates, dampings = np.logspace(-4, 0, 5), np.logspace(-3, 0, lines)
    rows = [(0.3 + 0.1 * i + 0.05 * j, rate, damping) for i, rate in enumerate(rates) for j, damping in
            enumerate(dampings)]  # fmt: skip
    table = pd.DataFrame(rows, columns=["value", "optimizer_options.lr", "optimizer_options.damping"])
    table = table.assign(low=table["value"] - 0.02, high=table["value"] + 0.02, seconds=1.0, stopped=False, run="run")
    return types.SimpleNamespace(table=table, metric="train_loss", maximise=False)


def seen(methods):
    """The frame of a monitor."""
    rows = [(step, method, "all", "direction_cosine", 0.9 / (k + 1 + step / 50))
            for step in range(1, 100, 3) for k, method in enumerate(methods)]  # fmt: skip
    rows += [(step, "exact", "all", "damping", 0.01) for step in range(1, 100, 3)]
    return pd.DataFrame(rows, columns=["step", "method", "layer", "metric", "value"])


PICTURES = {
    "heatmap": lambda c, w: plot.heatmap(c, width=w).figure,
    "heatmap of an inverse": lambda c, w: plot.heatmap(c, "inverse/kfac-tridiagonal", width=w).figure,
    "block_means": lambda c, w: plot.block_means(c, width=w).figure,
    "block_means of inverses": lambda c, w: plot.block_means(c, inverse=True, width=w).figure,
    "spectrum": lambda c, w: plot.spectrum(c, width=w).figure,
    "spectrum, all": lambda c, w: plot.spectrum(c, floor=0, width=w).figure,
    "comparison": lambda c, w: plot.comparison(c, width=w).figure,
    "comparison of cosines": lambda c, w: plot.comparison(c, "direction_cosine", width=w).figure,
    "pareto": lambda c, w: plot.pareto(c, width=w).figure,
    "pareto of cosines": lambda c, w: plot.pareto(c, "direction_cosine", width=w).figure,
    "triptych": lambda c, w: plot.triptych(c, "kfac-tridiagonal", width=w),
    "triptych of inverses": lambda c, w: plot.triptych(c, "kfac-tridiagonal", inverse=True, width=w),
    "sweep": lambda c, w: plot.sweep(sweep_of(len(c.layers) // 6), width=w).figure,
    "monitor": lambda c, w: plot.monitor(seen(c.methods), "direction_cosine", width=w).figure,
    "monitor of few": lambda c, w: plot.monitor(seen(c.methods[:2]), "direction_cosine", width=w).figure,
}
"""Every function that draws, at a width; `training` is drawn like `monitor`, by the same helpers."""


def drawn(name, layers, width):
    figure = PICTURES[name](comparison_of(layers), width)
    figure.draw_without_rendering()
    return figure


def texts(figure):
    """What is written, with where; ticks outside the limits are not drawn."""
    ghosts = set()
    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        drawn_ticks = axis._update_ticks()
        for tick in (*axis.majorTicks, *axis.minorTicks):
            if tick not in drawn_ticks:
                ghosts |= {tick.label1, tick.label2}
    shown = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [(text, text.get_window_extent()) for text in shown if text not in ghosts]


LOW, HIGH = [0, 1], [2, 3]
"""Of a box's extents the left and the lower end, the right and the upper."""
CASES = [*itertools.product(PICTURES, LAYERS, WIDTHS)]


@pytest.mark.covering
@pytest.mark.parametrize(("name", "layers", "width"), CASES)
def test_nothing_is_cut_covered_or_too_small_and_axes_keep_most_of_the_width(name, layers, width):
    figure = drawn(name, layers, width)
    assert figure.get_figwidth() == width
    page, found = figure.bbox, texts(figure)
    for text, box in found:
        assert text.get_fontsize() >= 6, text.get_text()
        assert min(box.x0 - page.x0, page.x1 - box.x1, box.y0 - page.y0, page.y1 - box.y1) >= -1, text.get_text()
    corners = np.array([box.extents for _, box in found])
    low, high = (pick(corners[:, None, k], corners[:, k]) for pick, k in ((np.maximum, LOW), (np.minimum, HIGH)))
    pairs = np.argwhere(np.triu((high - low > 1).all(2), 1))  # more than their rims in common
    assert [(found[i][0].get_text(), found[j][0].get_text()) for i, j in pairs] == []
    boxes = [ax.get_window_extent() for ax in figure.axes if not hasattr(ax, "_colorbar")]
    assert max(box.x1 for box in boxes) - min(box.x0 for box in boxes) >= 0.55 * page.width
    assert len({round(box.width) for box in boxes}) == 1


def overlap(a, b):
    """Whether two boxes share more than their rims."""
    common = Bbox.intersection(a, b)
    return common is not None and common.width > 1 and common.height > 1


@pytest.mark.parametrize("width", WIDTHS)
def test_markers_are_as_large_as_each_other(width):
    """Of a line and of the front: the ink of each marker is at least a third of the largest's, and 4 points wide."""
    figure = plot.monitor(seen(make_comparison().methods), "direction_cosine", width=width).figure
    figure.draw_without_rendering()
    sizes = {}
    for line in figure.axes[0].lines:
        marker = line._marker
        box = marker.get_path().transformed(marker.get_transform()).get_extents()
        sizes[line.get_label()] = box.width * line.get_markersize()
    assert min(sizes.values()) >= 3.9, sizes
    assert max(sizes.values()) <= 2 * min(sizes.values()), sizes


@pytest.mark.covering(2)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("metric", ["relative_frobenius", "direction_cosine"])
@pytest.mark.parametrize("seed", range(3))
def test_labels_of_the_front_do_not_stand_on_each_other_or_on_points(width, metric, seed):
    comparison, rng = make_comparison(), np.random.default_rng(seed)
    for name in (metric, "passes"):  # ten methods within a factor of two
        whole = (comparison.frame["metric"] == name) & (comparison.frame["row"] == "all")
        comparison.frame.loc[whole, "value"] = rng.uniform(0.4, 0.8, whole.sum())
    ax = plot.pareto(comparison, metric, width=width)
    ax.figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in ax.texts if text.get_text()]
    assert len(boxes) == 10
    assert not any(overlap(a, b) for a, b in itertools.combinations(boxes, 2))
    frame = ax.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)


def test_the_users_axes_and_settings_are_kept():
    with pyplot.rc_context({"font.size": 12.0}):
        ax = plot.spectrum(make_comparison(), ax=Figure(figsize=(6.9, 4), layout="constrained").subplots())
        assert ax.get_xticklabels()[0].get_fontsize() == 12
    ax = plot.spectrum(make_comparison(), ax=Figure(figsize=(3.3, 3), layout="constrained").subplots())
    assert ax.get_xticklabels()[0].get_fontsize() == 7.5


def test_axes_are_logarithmic_where_values_span_decades():
    ax = plot.sweep(sweep_of(2))
    assert ax.get_xscale() == "log"
    table = sweep_of(1).table.assign(**{"optimizer_options.lr": [0.0, 1e-3, 1e-2, 1e-1, 1.0]})
    with_zero = types.SimpleNamespace(table=table, metric="train_loss", maximise=False)
    assert plot.sweep(with_zero).get_xscale() == "symlog"
    table = table.assign(**{"optimizer_options.lr": [0.1, 0.2, 0.3, 0.4, 0.5]})
    assert plot.sweep(types.SimpleNamespace(table=table, metric="train_loss", maximise=False)).get_xscale() == "linear"


def test_a_single_eigenvalue_is_a_mark_since_it_makes_no_line():
    lines = plot.spectrum({"one": np.array([0.5]), "two": np.array([0.5, 0.1])}).lines
    assert [line.get_marker() not in ("", "None") for line in lines] == [True, False]
