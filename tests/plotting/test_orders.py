"""Pictures of one network can be laid beside each other: one order, one scale where it is asked for, both said."""

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch import nn

import fisherviz as fv
from fisherviz.plotting.reduce import ORDERS

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def figures_are_closed():
    yield
    pyplot.close("all")


def fisher_of(examples=20):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()
    data = torch.randn(examples, 3).double(), torch.randint(3, (examples,))
    return fv.Probe(model, "categorical").fisher(data)


def shown(ax):
    return np.asarray(ax.images[0].get_array())


@pytest.fixture(scope="module")
def drawn():
    """A Fisher and its picture."""
    torch.manual_seed(0)
    fisher = fisher_of()
    return fisher, fv.plot.heatmap(fisher, ax=Figure().subplots())


@pytest.mark.parametrize("method", fv.approximations())
def test_every_methods_default_order_and_scale_are_the_exact_fishers(drawn, method):
    fisher, exact = drawn
    approximation = fv.approximate(fisher, method)
    near = fv.plot.heatmap(approximation, like=exact, ax=Figure().subplots())
    by_matrix = fv.plot.heatmap(approximation, like=fisher, ax=Figure().subplots())
    assert exact.get_xlabel() == near.get_xlabel() == "unit order"
    assert exact.images[0].get_clim() == near.images[0].get_clim() == by_matrix.images[0].get_clim()
    np.testing.assert_allclose(shown(exact), fisher.to_dense("unit").abs().float(), rtol=1e-6)
    np.testing.assert_allclose(shown(near), approximation.to_dense("unit").abs().float(), rtol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_asked_for_stands_in_the_picture(order):
    fisher = fisher_of()
    kfac = fv.approximate(fisher, "kfac")
    for source in (fisher, kfac):
        ax = fv.plot.heatmap(source, order=order, ax=Figure().subplots())
        assert ax.get_xlabel() == f"{order} order"
        np.testing.assert_allclose(shown(ax), source.to_dense(order).abs().float(), rtol=1e-6)
    axes = fv.plot.triptych(fisher, kfac, order=order).axes
    assert axes[0].get_xlabel() == f"{order} order"
    np.testing.assert_allclose(shown(axes[1]), kfac.to_dense(order).abs().float(), rtol=1e-6)


def test_a_comparison_and_its_fisher_are_drawn_in_the_same_order():
    fisher = fisher_of()
    saved = fv.plot.heatmap(fv.compare(fisher, ["kfac"]), ax=Figure().subplots())
    np.testing.assert_allclose(shown(saved), shown(fv.plot.heatmap(fisher, ax=Figure().subplots())), rtol=1e-6)
    assert saved.get_xlabel() == "unit order"


def test_units_are_drawn_or_it_is_said_why_not():
    fisher = fisher_of()
    plain = fv.plot.heatmap(fisher, ax=Figure().subplots())
    units = fv.plot.heatmap(fisher, units=True, ax=Figure().subplots())
    assert len(units.collections) == len(plain.collections) + 2
    drawn = [segment[0][0] for segment in units.collections[2].get_segments()]
    assert drawn == [4, 8, 12, 20, 24]  # 4 units of 3 weights and a bias, 3 units of 4 weights
    with pytest.raises(ValueError, match="torch order keeps no unit together; pass order='unit'"):
        fv.plot.heatmap(fisher, order="torch", units=True)
    with pytest.raises(ValueError, match=r"of a bare matrix; pass unit_edges="):
        fv.plot.heatmap(np.eye(3), units=True)
    with pytest.raises(ValueError, match="999 of them lie closer than 2 cells"):
        fv.plot.heatmap(np.eye(1000), unit_edges=range(1, 1000), units=True)


def test_exact_damped_inverses_are_drawn_beside_approximate_ones():
    fisher = fisher_of()
    kfac = fv.approximate(fisher, "kfac")
    axes = fv.plot.triptych(fisher, kfac, inverse=True, damping=0.1).axes
    damped = fisher.to_dense("unit") + 0.1 * torch.eye(28).double()
    np.testing.assert_allclose(shown(axes[0]), torch.linalg.inv(damped).abs(), rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(shown(axes[1]), kfac.inverse(0.1).to_dense("unit").abs(), rtol=1e-5, atol=1e-8)
    titles = [" ".join(ax.get_title().split()) for ax in axes[:3]]
    assert titles == ["damped inverse of exact Fisher, λ = 0.1", "damped inverse of kfac, λ = 0.1", "|difference|"]
    factored = fv.plot.triptych(fisher, kfac, inverse=True, damping=fv.FactoredTikhonov(0.5)).axes
    assert "factored" in factored[1].get_title()


def test_every_damped_picture_names_its_damping():
    comparison = fv.compare(fisher_of(), ["kfac", "diagonal"], damping=0.125)
    said = [
        fv.plot.heatmap(comparison, "inverse/kfac").get_title(),
        fv.plot.heatmap(comparison, "inverse-difference/kfac").get_title(),
        fv.plot.block_means(comparison, inverse=True).get_title(),
        fv.plot.triptych(comparison, "kfac", inverse=True).axes[0].get_title(),
        fv.plot.comparison(comparison, "direction_cosine").get_xlabel(),
        fv.plot.pareto(comparison, "direction_cosine").get_ylabel(),
        fv.plot.heatmap(fisher_of().inverse(0.125)).get_title(),
        fv.plot.block_means(fisher_of().inverse(0.125)).get_title(),
    ]
    for text in said:
        assert "λ = 0.125" in " ".join(text.split())
    assert "λ" not in fv.plot.comparison(comparison).get_xlabel()


def test_a_spectrum_says_how_many_eigenvalues_it_shows_and_can_show_all():
    fisher = fisher_of(3)  # rank 6 of 28
    ax = fv.plot.spectrum(fisher)
    assert ax.get_xlabel() == "index, largest first (6 of 28 drawn)"
    every = fv.plot.spectrum(fisher, floor=0)
    assert len(every.lines[0].get_ydata()) == 28
    assert "28 of 28" in every.get_xlabel()
    two = fv.plot.spectrum({"exact": [2.0, 1.0, 0.0], "kfac": [2.0, 1.0, 0.5]})
    assert [text.get_text() for text in two.get_legend().get_texts()] == ["exact 2/3", "kfac"]
    assert two.get_xlabel() == "index, largest first (n/m: n of m drawn)"
