"""Plots gather the right numbers, draw them with the right artists, and leave everything else alone."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import fisherviz as fv
from fisherviz import plotting as plot
from fisherviz.plotting.reduce import cells_of_matrix, cells_of_operator, reduce_matrix
from fisherviz.results.comparison import Comparison
from tests.factory import METHODS, make_comparison

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def comparison():
    return make_comparison(layers=("in", "mid_1", "mid_2", "out"))


@pytest.fixture(scope="module")
def fisher():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3, bias=False))
    return fv.Probe(model.double(), "categorical").fisher(torch.randn(20, 3, dtype=torch.float64))


@pytest.fixture(autouse=True)
def nothing_else_changes(monkeypatch):
    before = dict(matplotlib.rcParams)
    monkeypatch.setattr(pyplot, "show", lambda *a, **k: pytest.fail("a plot called show()"))
    yield
    pyplot.close("all")
    assert dict(matplotlib.rcParams) == before


def every_plot(comparison):
    return {
        "heatmap": lambda ax: plot.heatmap(comparison, ax=ax),
        "block_means": lambda ax: plot.block_means(comparison, ax=ax),
        "spectrum": lambda ax: plot.spectrum(comparison, ax=ax),
        "comparison": lambda ax: plot.comparison(comparison, ax=ax),
        "pareto": lambda ax: plot.pareto(comparison, ax=ax),
    }


@pytest.mark.parametrize("name", ["heatmap", "block_means", "spectrum", "comparison", "pareto"])
def test_every_plot_takes_axes_and_returns_them(comparison, name):
    ax = Figure().subplots()
    assert every_plot(comparison)[name](ax) is ax
    made = every_plot(comparison)[name](None)
    assert isinstance(made, Axes)
    made.get_figure().draw_without_rendering()


# ---- reduction -----------------------------------------------------------------------------------


def test_a_cell_is_the_largest_magnitude_it_covers():
    matrix = np.array([[1.0, -5.0, 2.0], [0.0, 3.0, -4.0], [7.0, 0.0, -1.0]])
    np.testing.assert_array_equal(reduce_matrix(matrix, 2), [[5, 4], [7, 1]])
    np.testing.assert_array_equal(reduce_matrix(matrix, 2, signed=True), [[-5, -4], [7, -1]])


def test_a_large_matrix_is_reduced_before_it_is_drawn():
    matrix = np.zeros((2500, 2500), np.float32)
    matrix[2400, 1] = -3.0
    ax = plot.heatmap(matrix, ax=Figure().subplots())
    drawn = ax.images[0].get_array()
    assert drawn.shape == (500, 500)
    assert drawn[480, 0] == 3.0
    assert drawn.sum() == 3.0


def test_boundaries_are_in_cells():
    info = cells_of_matrix(np.eye(1200), edges=[0, 300, 1200], labels=["a", "b"], limit=600)
    assert info.factor == 2
    np.testing.assert_array_equal(info.edges, [0, 150, 600])


@pytest.mark.parametrize("order", ["torch", "unit", "input"])
@pytest.mark.parametrize("limit", [600, 9, 5])
def test_blockwise_reduction_equals_the_reduction_of_the_dense_matrix(fisher, monkeypatch, order, limit):
    monkeypatch.setattr("fisherviz.plotting.reduce.DENSE", 0)
    blockwise = cells_of_operator(fisher, order=order, limit=limit)
    dense = fisher.to_dense(order=order).numpy()
    np.testing.assert_allclose(blockwise.values, reduce_matrix(dense, blockwise.factor), rtol=1e-6, atol=1e-12)
    assert max(blockwise.values.shape) <= limit


def test_an_object_without_a_dense_form_is_drawn_by_its_blocks(fisher):
    class Blocks:
        space = fisher.space
        block = staticmethod(fisher.block)

        def to_dense(self, order):
            pytest.fail("asked for the dense matrix")

    layers = ["0"]
    info = plot.heatmap_info(Blocks(), layers=layers)
    np.testing.assert_allclose(info.values, fisher.to_dense("unit").abs().numpy()[:16, :16], rtol=1e-6)
    np.testing.assert_array_equal(info.unit_edges, [4, 8, 12])


def test_unit_boundaries_follow_the_order(fisher):
    np.testing.assert_array_equal(plot.heatmap_info(fisher, order="input").unit_edges, [4, 8, 12, 19, 22, 25])
    assert plot.heatmap_info(fisher, order="torch").unit_edges.size == 0


# ---- heatmaps ------------------------------------------------------------------------------------


def test_a_heatmap_shows_magnitudes_from_zero(comparison):
    ax = plot.heatmap(comparison, "heatmap/kfac", ax=Figure().subplots())
    (image,) = ax.images
    np.testing.assert_array_equal(image.get_array(), comparison.arrays["heatmap/kfac"])
    assert image.norm.vmin == 0
    assert image.get_cmap().name == "magma"


def test_layers_are_named_and_their_boundaries_dashed(comparison):
    ax = plot.heatmap(comparison, ax=Figure().subplots())
    assert [label.get_text() for label in ax.get_xticklabels()] == ["in", "mid_1", "mid_2", "out"]
    np.testing.assert_allclose(ax.get_xticks(), [12, 36, 60, 84])
    segments = [segment[0][0] for segment in ax.collections[0].get_segments()]
    assert segments == [24, 48, 72]
    assert ax.collections[0].get_linestyle()[0][1] is not None


def test_signs_are_kept_on_a_scale_that_is_symmetric():
    matrix = np.array([[1.0, -2.0], [-2.0, 0.5]])
    (image,) = plot.heatmap(matrix, signed=True, ax=Figure().subplots()).images
    np.testing.assert_array_equal(image.get_array(), matrix)
    assert image.norm.vmin == -image.norm.vmax


def test_a_triptych_shares_one_scale_taken_from_the_exact_matrix(comparison):
    axes = Figure().subplots(1, 3)
    figure = plot.triptych(comparison, "kfac", ax=axes)
    assert figure is axes[0].get_figure()
    limits = {ax.images[0].get_clim() for ax in axes}
    assert len(limits) == 1
    top = plot.shared_maximum([plot.heatmap_info(comparison)])
    assert limits == {(0.0, top)}
    names = ["heatmap/exact", "heatmap/kfac", "difference/kfac"]
    for ax, name in zip(axes, names, strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), comparison.arrays[name])
    assert [ax.get_title() for ax in axes] == ["exact Fisher", "kfac", "|difference|"]


def test_a_triptych_of_inverses(comparison):
    axes = Figure().subplots(1, 3)
    plot.triptych(comparison, "kfac", inverse=True, ax=axes)
    np.testing.assert_array_equal(axes[2].images[0].get_array(), comparison.arrays["inverse-difference/kfac"])


def test_the_kfac_papers_figures_are_one_call_each(fisher):
    full = fv.approximate(fisher, "kfac-full")
    figure2 = plot.triptych(fisher, full, order="input")
    exact = fisher.to_dense("input").abs().numpy()
    np.testing.assert_allclose(figure2.axes[0].images[0].get_array(), exact, rtol=1e-6)
    figure5 = plot.triptych(full, fv.approximate(fisher, "kfac"), order="input")
    away = figure5.axes[2].images[0].get_array()
    assert away[:16, :16].max() < 1e-12
    assert away[:16, 16:].max() > 1e-4
    damping = fv.FactoredTikhonov(0.1)
    kfac = fv.approximate(fisher, "kfac").inverse(damping)
    figure6 = plot.triptych(fv.approximate(fisher, "kfac-tridiagonal").inverse(damping), kfac, order="input")
    assert figure6.axes[0].images[0].get_clim() == figure6.axes[2].images[0].get_clim()


def test_a_triptych_of_matrices_shows_the_absolute_difference():
    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [5.0, 4.0]])
    third = plot.triptych_info(a, b)[2]
    np.testing.assert_array_equal(third.values, [[0, 2], [2, 0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda c: plot.heatmap(c, "heatmap/none"),
            r"no picture 'heatmap/none' in this comparison; did you mean 'heatmap/",
        ),
        (lambda c: plot.heatmap(np.zeros(3)), r"needs a matrix.*\(3,\)"),
        (lambda c: plot.heatmap(np.eye(3), edges=[0, 2]), r"edges must rise from 0 to the matrix's side 3"),
        (lambda c: plot.heatmap(np.eye(3), edges=[0, 3], layers=["a", "b"]), "2 layer names do not fit 1"),
        (lambda c: plot.triptych(np.eye(2), np.eye(3)), r"differ in shape, \(2, 2\) and \(3, 3\)"),
        (lambda c: plot.triptych(np.eye(2), np.eye(2), inverse=True), "inverse=True takes two matrices that can be"),
        (lambda c: plot.triptych(c, "kfac", ax=[None]), "three axes"),
        (lambda c: plot.block_means(np.eye(3)), "need edges"),
        (lambda c: plot.spectrum(c, ["none"]), "no spectrum of 'none'"),
        (lambda c: plot.comparison(c, "kl"), r"no 'kl' per layer.*relative_frobenius"),
        (lambda c: plot.comparison(c, methods=["none"]), "of the method 'none'"),
        (lambda c: plot.pareto(c, "off_unit_share"), "no method of this comparison has both"),
    ],
)
def test_what_cannot_be_drawn_is_said(comparison, call, message):
    with pytest.raises(ValueError, match=message):
        call(comparison)


def test_what_is_no_matrix_is_a_type_error():
    with pytest.raises(TypeError, match="cannot draw str"):
        plot.heatmap("heatmap")


# ---- block means, spectra, layers ----------------------------------------------------------------


def test_block_means_are_written_into_their_cells():
    matrix = np.array([[1.0, -1.0, 4.0], [1.0, 1.0, 0.0], [0.0, 0.0, -3.0]])
    info = plot.block_means_info(matrix, edges=[0, 2, 3])
    np.testing.assert_array_equal(info.values, [[1, 2], [0, 3]])
    ax = plot.block_means(matrix, edges=[0, 2, 3], ax=Figure().subplots())
    assert [text.get_text() for text in ax.texts] == ["1.00", "2.00", "0.00", "3.00"]
    ax = plot.block_means(1e-4 * matrix, edges=[0, 2, 3], ax=Figure().subplots())
    assert [text.get_text() for text in ax.texts] == ["1.00", "2.00", "0.00", "3.00"]
    assert ax.get_title() == "mean |entry| per block [10⁻⁴]"


def test_block_means_of_a_fisher_are_those_of_its_dense_matrix(fisher):
    means = plot.block_means_info(fisher).values
    dense = fisher.to_dense().abs().numpy()
    np.testing.assert_allclose(means[0, 1], dense[:16, 16:].mean())


def test_the_spectrum_is_logarithmic_and_exact_comes_first(comparison):
    ax = plot.spectrum(comparison, ["kfac", "ekfac"], ax=Figure().subplots())
    assert ax.get_yscale() == "log"
    assert [line.get_label() for line in ax.lines] == ["exact", "kfac", "ekfac"]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), comparison.arrays["spectrum/exact"])


def test_rounding_and_negative_eigenvalues_are_not_drawn_but_counted():
    info = plot.spectrum_info({"exact": [4.0, 1.0, 1e-12, 0.0], "other": [3.0, -1.0]})
    assert info.dropped == {"exact": 2, "other": 1}
    np.testing.assert_array_equal(info.values["other"], [3.0])


def test_layers_are_marks_and_methods_rows_best_first(comparison):
    info = plot.comparison_info(comparison)
    assert info.methods[0] == "layer"
    assert np.all(np.diff(np.median(info.values, axis=1)) >= 0)
    ax = plot.comparison(comparison, ax=Figure().subplots())
    assert [label.get_text() for label in ax.get_yticklabels()] == list(info.methods)
    marks = ax.collections[1].get_offsets()
    np.testing.assert_allclose(marks[1:, 0], info.values[1:, 0])


def test_a_cosine_is_sorted_downwards_on_a_linear_axis(comparison):
    info = plot.comparison_info(comparison, "direction_cosine")
    assert np.all(np.diff(np.median(info.values, axis=1)) <= 0)
    assert plot.comparison(comparison, "direction_cosine", ax=Figure().subplots()).get_xscale() == "linear"


# ---- the front -----------------------------------------------------------------------------------


def test_the_front_is_what_no_other_beats_in_both(comparison):
    info = plot.pareto_info(comparison)
    front = [name for name, on in zip(info.methods, info.on_front, strict=True) if on]
    assert front == ["identity", "foof", "kfac", "kfac-tridiagonal", "kfac-full"]
    for name, cost, error, on in zip(info.methods, info.costs, info.errors, info.on_front, strict=True):
        beaten = [
            other
            for other, c, e in zip(info.methods, info.costs, info.errors, strict=True)
            if other != name and c <= cost and e <= error
        ]
        assert bool(beaten) != on


def test_the_front_is_drawn_on_logarithmic_axes_with_a_label_per_method(comparison):
    ax = plot.pareto(comparison, ax=Figure().subplots())
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    labels = [text for text in ax.texts if text.get_text()]
    assert sorted(text.get_text() for text in labels) == sorted(METHODS)
    bold = {text.get_text() for text in labels if text.get_fontweight() == "bold"}
    assert bold == {"identity", "foof", "kfac", "kfac-tridiagonal", "kfac-full"}
    assert "forward + backward passes" in ax.get_xlabel()


@pytest.mark.parametrize("seed", range(4))
def test_labels_of_the_front_do_not_collide(seed):
    comparison = make_comparison()
    rng = np.random.default_rng(seed)
    frame = comparison.frame
    for metric in ("relative_frobenius", "passes"):  # all ten methods within a factor of two
        whole = (frame["metric"] == metric) & (frame["row"] == "all")
        frame.loc[whole, "value"] = rng.uniform(0.5, 1.0, whole.sum())
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    ax = plot.pareto(comparison, ax=figure.subplots())
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in ax.texts if text.get_text()]
    overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]
    assert overlaps == []
    frame_box = ax.get_window_extent()
    assert all(frame_box.x0 <= box.x0 and box.x1 <= frame_box.x1 for box in boxes)


def test_an_exact_method_stands_at_the_foot_of_the_front():
    comparison = make_comparison()
    frame = comparison.frame
    whole = (frame["metric"] == "relative_frobenius") & (frame["row"] == "all")
    whole &= frame["method"] == "layer"
    frame.loc[whole, "value"] = 0.0
    ax = plot.pareto(comparison, ax=Figure().subplots())
    assert "layer (exact)" in [text.get_text() for text in ax.texts]
    ax.get_figure().draw_without_rendering()


def test_what_costs_nothing_stands_at_the_left_end_of_the_front():
    comparison = make_comparison()
    frame = comparison.frame
    whole = (frame["metric"] == "passes") & (frame["row"] == "all")
    frame.loc[whole & (frame["method"] == "identity"), "value"] = 0.0
    assert plot.pareto_info(comparison).methods[0] == "identity"
    ax = plot.pareto(comparison, ax=Figure().subplots())
    assert "identity (free)" in [text.get_text() for text in ax.texts]
    assert ax.get_xlim()[0] > 0
    frame.loc[whole, "value"] = 0.0
    plot.pareto(comparison, ax=Figure().subplots()).get_figure().draw_without_rendering()


# ---- names ---------------------------------------------------------------------------------------


def test_names_of_narrow_layers_do_not_stand_on_each_other():
    edges = np.array([0, 40, 41, 42, 43, 80, 100])
    names = ["in", "a", "b", "c", "mid", "out"]
    ax = plot.heatmap(torch.rand(100, 100), edges=edges, layers=names, ax=Figure().subplots())
    for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["in", "a", "mid", "out"]


def test_names_are_text_and_never_formulas():
    comparison = make_comparison(layers=("$\\frac{", "_hidden", "a" * 60, ""), methods=("$x", "_mine", "b" * 60))
    figure = Figure(figsize=(22, 5), layout="constrained")
    axes = figure.subplots(1, 4)
    plot.comparison(comparison, ax=axes[0])
    plot.spectrum(comparison, ax=axes[1])
    plot.heatmap(comparison, ax=axes[2])
    plot.pareto(comparison, ax=axes[3])
    figure.draw_without_rendering()
    labels = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert labels[:2] == ["$\\frac{", " _hidden"]
    assert labels[3] == "(root)"
    assert all(len(label) < 30 for label in labels)
    assert [text.get_text() for text in axes[1].get_legend().get_texts()][1:3] == ["$x 54/96", " _mine 54/96"]


def test_a_method_looks_the_same_in_every_picture():
    few, many = (
        plot.spectrum(make_comparison(methods=methods), ax=Figure().subplots())
        for methods in (("kfac", "mine"), METHODS)
    )
    color = {line.get_label(): line.get_color() for line in many.lines}
    assert few.lines[1].get_color() == color["kfac"]
    assert len(set(color.values())) == len(color)


@pytest.mark.parametrize(("low", "high"), [(1e-5, 1e300), (1e200, 1e300)])
def test_axes_reach_far_into_the_range_of_floats(low, high):
    """A logarithmic axis has ticks beyond the largest number."""
    rows = [
        (method, layer, layer, metric, value)
        for metric in ("kl", "bytes")
        for method, value in (("kfac", low), ("foof", high))
        for layer in ("all", "0")
    ]
    frame = pd.DataFrame(rows, columns=["method", "row", "col", "metric", "value"])
    saved = Comparison(frame, {"layers": [{"name": "0"}]})
    for ax in (plot.comparison(saved, "kl"), plot.pareto(saved, "kl", "bytes")):
        ax.figure.canvas.draw()
        drawn = {float(x) for each in ax.collections if hasattr(each, "get_offsets") for x in each.get_offsets()[:, 0]}
        assert {low, high} <= drawn
