"""Every approximation against its definition by dense matrices, and the places where it must be exact."""

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.oracles import exact, kronecker, laws, nets, order, trace
from tests.oracles.checks import assert_matches
from tests.oracles.definitions import METHODS, SHARING, definition, nearest


def unit_dense(method, net, x, likelihood, y=None, kind="exact", **options):
    fisher = fv.Probe(net, likelihood).fisher(x, y, kind=kind)
    return fv.approximate(fisher, method, **options).to_dense(order="unit").numpy()


every_method = pytest.mark.parametrize("method", METHODS)
every_law = pytest.mark.parametrize("likelihood", laws.ALL)


WELL_POSED = [(m, law) for m in METHODS for law in laws.ALL if (m, law) != ("ekfac", "gaussian")]
"""A squared loss gives the last layer G = I, whose eigenbasis is anybody's choice."""


@pytest.mark.covering
@pytest.mark.parametrize(("method", "likelihood"), WELL_POSED)
def test_of_a_multilayer_perceptron(method, likelihood):
    law, net, x = laws.ALL[likelihood], nets.mlp(2, 3, 3, 2), nets.vectors(12, 2)
    tolerance = 1e-7 if method == "kfac-tridiagonal" else 1e-9  # two inverses of ill-conditioned factors
    assert_matches(unit_dense(method, net, x, likelihood), definition(method, net, x, law), tolerance)


@every_method
def test_of_the_empirical_fisher(method):
    law, net, x = laws.Categorical(), nets.mlp(2, 3, 2), nets.vectors(12, 2)
    y = law.draw(12, 2)
    actual = unit_dense(method, net, x, "categorical", y, "empirical")
    assert_matches(actual, definition(method, net, x, law, y), 1e-8)


@every_method
def test_of_a_network_without_biases(method):
    net, x = nets.mlp(3, 4, 2, bias=False), nets.vectors(9, 3)
    assert_matches(unit_dense(method, net, x, "bernoulli"), definition(method, net, x, laws.Bernoulli()), 1e-8)


@every_method
def test_of_a_sampled_fisher_uses_the_labels_of_its_fisher(method):
    law, net, x = laws.Bernoulli(), nets.mlp(2, 3, 2), nets.vectors(12, 2)

    class Recording(fv.Bernoulli):
        def sample(self, z, generator=None):
            self.drawn = super().sample(z, generator)
            return self.drawn

    likelihood = Recording()
    fisher = fv.Probe(net, likelihood).fisher(x, kind="mc")
    fisher.diagonal()
    actual = fv.approximate(fisher, method).to_dense(order="unit")
    assert_matches(actual, definition(method, net, x, law, likelihood.drawn), 1e-8)


SCALED = [method for method in METHODS if method not in ("identity", "foof")]


@pytest.mark.parametrize("method", SCALED)
def test_of_a_summed_fisher_is_the_number_of_examples_larger(method):
    net, x = nets.mlp(2, 3, 2), nets.vectors(8, 2)
    probe = fv.Probe(net, "gaussian")
    mean = fv.approximate(probe.fisher(x), method).to_dense()
    total = fv.approximate(probe.fisher(x, reduction="sum"), method).to_dense()
    assert_matches(total, 8 * mean, 1e-9)


@pytest.mark.parametrize("method", ["identity", "foof"])
def test_what_does_not_approximate_the_scale_is_the_same_for_a_summed_fisher(method):
    net, x = nets.mlp(2, 3, 2), nets.vectors(8, 2)
    probe = fv.Probe(net, "gaussian")
    mean = fv.approximate(probe.fisher(x), method).to_dense()
    assert_matches(fv.approximate(probe.fisher(x, reduction="sum"), method).to_dense(), mean, 1e-12)


SHARED = ["diagonal", "layer", "cw-ngd", "kfac", "ekfac", "foof", "nearest-kronecker"]


@pytest.mark.covering
@pytest.mark.parametrize("method", SHARED)
@pytest.mark.parametrize("build", SHARING.values(), ids=SHARING.keys())
def test_of_shared_weights(method, build):
    net, x = build()
    assert_matches(unit_dense(method, net, x, "bernoulli"), definition(method, net, x, laws.Bernoulli()), 1e-8)


@pytest.mark.covering
@pytest.mark.parametrize("method", ["kfac", "kfac-full"])
@pytest.mark.parametrize("build", SHARING.values(), ids=SHARING.keys())
def test_reduce_setting_of_shared_weights(method, build):
    net, x = build()
    actual = unit_dense(method, net, x, "gaussian", setting="reduce")
    assert_matches(actual, definition(method, net, x, laws.Gaussian(), setting="reduce"))


def test_ekfac_in_the_basis_of_the_reduce_setting():
    net, x = nets.tokens_net(), torch.randn(9, 4, 3, dtype=torch.float64)
    actual = unit_dense("ekfac", net, x, "bernoulli", setting="reduce")
    assert_matches(actual, definition("ekfac", net, x, laws.Bernoulli(), setting="reduce"))


def test_cross_layer_factors_expand_over_aligned_positions():
    net = nets.conv_net(nn.Conv1d(2, 2, 3, padding="same"), nn.Conv1d(2, 2, 3, padding="same"))
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    actual = unit_dense("kfac-full", net, x, "gaussian")
    assert_matches(actual, definition("kfac-full", net, x, laws.Gaussian(), setting="expand"))


def test_unequal_positions_reduce_the_whole_matrix():
    net, x = SHARING["convolution and dense"]()
    actual = unit_dense("kfac-full", net, x, "gaussian")
    assert_matches(actual, definition("kfac-full", net, x, laws.Gaussian(), setting="reduce"))
    assert np.linalg.eigvalsh(actual).min() > -1e-12 * np.linalg.norm(actual, 2)


@pytest.mark.parametrize("method", ["kfac", "ekfac", "foof"])
@pytest.mark.parametrize("bias", [True, False])
def test_groups_of_a_convolution_have_a_pair_of_factors_each(method, bias):
    net = nets.conv_net(nn.Conv2d(4, 4, 2, groups=2, bias=bias), nn.Conv2d(4, 2, 1))
    x, law = torch.randn(4, 4, 3, 2, dtype=torch.float64), laws.Bernoulli()
    moments = trace.moments(net, x, law)
    A, G = kronecker.factors(moments, "expand")
    expected = {
        "kfac": lambda: kronecker.kfac(A, G),
        "ekfac": lambda: kronecker.ekfac(moments, A, G),
        "foof": lambda: kronecker.foof(moments),
    }[method]()
    assert_matches(unit_dense(method, net, x, "bernoulli"), expected)


@pytest.mark.parametrize("entrywise", [False, True])
def test_cw_ngd_of_grouped_convolutions_keeps_one_channel_with_its_bias(entrywise):
    net = nets.conv_net(nn.Conv2d(4, 4, 2, groups=2), nn.Conv2d(4, 2, 1))
    x = torch.randn(3, 4, 3, 2, dtype=torch.float64)
    F = order.reorder(exact.fisher(net, x, laws.Gaussian()), trace.layers_of(net), "unit")
    expected = np.diag(np.diag(F)) if entrywise else kronecker.same_unit(F, trace.layers_of(net))
    assert_matches(unit_dense("cw-ngd", net, x, "gaussian", entrywise=entrywise), expected)


def test_entrywise_cw_ngd_is_the_diagonal():
    net, x = nets.mlp(3, 4, 2), nets.vectors(5, 3)
    fisher = fv.Probe(net, "categorical").fisher(x)
    entrywise = fv.approximate(fisher, "cw-ngd", entrywise=True).to_dense()
    assert_matches(entrywise, fv.approximate(fisher, "diagonal").to_dense(), 1e-13)
    assert_matches(torch.diagonal(entrywise), fisher.diagonal(), 1e-13)


@pytest.mark.parametrize("name", ["twice", "maximum"])
@pytest.mark.parametrize("method", ["layer", "kfac", "ekfac", "foof", "cw-ngd", "diagonal"])
def test_of_layers_that_are_called_twice_or_have_no_structure(method, name):
    """Calls are positions; a generic layer keeps its exact block in `layer`, its diagonal elsewhere."""
    if name == "twice":
        again = nn.Linear(3, 3)
        net, x = nets.randomised(nn.Sequential(again, nn.Tanh(), again)), nets.vectors(4, 3)
    else:
        net = nets.randomised(nn.Sequential(nn.EmbeddingBag(4, 2, mode="max"), nn.Linear(2, 2)))
        x = torch.randint(4, (4, 2))
    F = exact.fisher(net, x, laws.Bernoulli())
    approximation = fv.approximate(fv.Probe(net, "bernoulli").fisher(x), method)
    if name == "twice":
        parts = trace.walk(net, x)[0]
        moments = []
        for weight, a, g in trace.moments(net, x, laws.Bernoulli()):
            moments.append((weight, [np.concatenate(a)], [np.concatenate(g)]))
        assert len(parts) == 2
        A, G = kronecker.factors(moments)
        layers = [(3, 3, True)]
        unit = order.reorder(F, layers, "unit")
        expected = {
            "layer": lambda: unit,
            "kfac": lambda: kronecker.kfac(A, G),
            "ekfac": lambda: kronecker.ekfac(moments, A, G),
            "foof": lambda: kronecker.foof(moments),
            "cw-ngd": lambda: kronecker.same_unit(unit, layers),
            "diagonal": lambda: np.diag(np.diag(unit)),
        }[method]()
        assert_matches(approximation.to_dense(order="unit"), expected)
    else:
        own = sum(p.numel() for p in net[0].parameters())
        block = F[:own, :own] if method == "layer" else np.diag(np.diag(F)[:own])
        dense = approximation.to_dense().numpy()
        assert_matches(dense[:own, :own], block)
        assert_matches(dense[:own, own:], np.zeros((own, len(F) - own)))


# ---- where approximations must be exact ----------------------------------------------------------


@every_law
def test_kfac_is_exact_for_one_example_without_weight_sharing(likelihood):
    net, x = nets.mlp(3, 4, 2), nets.vectors(1, 3)
    fisher = fv.Probe(net, likelihood).fisher(x)
    assert_matches(fv.approximate(fisher, "kfac").to_dense(), fv.approximate(fisher, "layer").to_dense())
    assert_matches(fv.approximate(fisher, "kfac-full").to_dense(), exact.fisher(net, x, laws.ALL[likelihood]))


def test_kfac_is_exact_for_one_example_seen_many_times():
    net, x = nets.mlp(3, 4, 2), nets.vectors(1, 3).repeat(5, 1)
    fisher = fv.Probe(net, "categorical").fisher(x)
    assert_matches(fv.approximate(fisher, "kfac-full").to_dense(), fisher.to_dense())


def test_kfac_is_exact_for_one_image_of_one_patch():
    net = nets.randomised(nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(3, 2)))
    fisher = fv.Probe(net, "categorical").fisher(torch.randn(1, 2, 2, 2, dtype=torch.float64))
    assert_matches(fv.approximate(fisher, "kfac-full").to_dense(), fisher.to_dense())


@pytest.mark.parametrize("method", ["kfac", "ekfac", "nearest-kronecker"])
def test_kronecker_methods_are_exact_for_a_layer_with_a_frozen_weight(method):
    """The bias's input is always 1, so that a and g are independent."""
    net, x = nets.mlp(3, 4, 2), nets.vectors(6, 3)
    net[0].weight.requires_grad_(False)
    fisher = fv.Probe(net, "categorical").fisher(x)
    assert_matches(fv.approximate(fisher, method).block(0, 0), fisher.block(0))


LINEAR = {"biases": True, "no biases": False}
EXACT_FOR_LINEAR = ["kfac-full", "kfac", "ekfac", "nearest-kronecker"]


@pytest.mark.parametrize("bias", LINEAR.values(), ids=LINEAR.keys())
@pytest.mark.parametrize("method", EXACT_FOR_LINEAR)
def test_deep_linear_network_with_squared_loss_is_exact(method, bias):
    """The backpropagated derivatives do not depend on the input, so that a and g are independent."""
    net, x = nets.mlp(3, 4, 3, 2, activation=nn.Identity, bias=bias), nets.vectors(7, 3)
    fisher = fv.Probe(net, "gaussian").fisher(x)
    reference = exact.fisher(net, x, laws.Gaussian())
    if method != "kfac-full":
        reference = kronecker.same_layer(reference, order.segments(trace.layers_of(net)))
    assert_matches(fv.approximate(fisher, method).to_dense(), reference)


def test_expand_is_exact_for_a_deep_linear_network_with_one_output_per_token():
    net = nets.mlp(3, 4, 2, activation=nn.Identity)
    fisher = fv.Probe(net, "gaussian").fisher(torch.randn(5, 3, 3, dtype=torch.float64))
    kfac = fv.approximate(fisher, "kfac", setting="expand").to_dense()
    assert_matches(kfac, fv.approximate(fisher, "layer").to_dense())


def test_reduce_is_exact_for_a_deep_linear_network_that_averages_its_tokens():
    net = nets.randomised(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nets.MeanTokens()))
    fisher = fv.Probe(net, "gaussian").fisher(torch.randn(5, 3, 3, dtype=torch.float64))
    assert_matches(fv.approximate(fisher, "kfac-full", setting="reduce").to_dense(), fisher.to_dense())


def test_last_layers_foof_is_exact_up_to_the_variance_for_squared_loss():
    net, x = nets.mlp(3, 2), nets.vectors(6, 3)
    fisher = fv.Probe(net, fv.Gaussian(variance=0.5)).fisher(x)
    assert_matches(2 * fv.approximate(fisher, "foof").to_dense(), fisher.to_dense())


@every_law
def test_ekfac_has_the_trace_of_the_exact_blocks(likelihood):
    net, x = nets.mlp(3, 4, 2), nets.vectors(5, 3)
    fisher = fv.Probe(net, likelihood).fisher(x)
    ekfac = fv.approximate(fisher, "ekfac")
    for i in range(2):
        assert float(ekfac.block(i, i).trace()) == pytest.approx(float(fisher.block(i).trace()), rel=1e-10)


ROUNDING = 1e-10
"""Two methods that are both exact differ by rounding, amplified by an iteration or an eigenbasis."""


def relative_errors(fisher, method, **options):
    approximation = fv.approximate(fisher, method, **options)
    return [
        float(torch.linalg.norm(fisher.block(i) - approximation.block(i, i)) / torch.linalg.norm(fisher.block(i)))
        for i in range(len(fisher.layers))
    ]


ORDERED = {
    "perceptron": lambda: (nets.mlp(3, 4, 3, 2), nets.vectors(6, 3)),
    "tokens": SHARING["tokens"],
    "convolutions": SHARING["convolutions"],
}


@every_law
@pytest.mark.parametrize("build", ORDERED.values(), ids=ORDERED.keys())
def test_ekfac_is_at_least_as_close_as_kfac(build, likelihood):
    net, x = build()
    fisher = fv.Probe(net, likelihood).fisher(x)
    for better, worse in zip(relative_errors(fisher, "ekfac"), relative_errors(fisher, "kfac"), strict=True):
        assert better <= worse + ROUNDING


@pytest.mark.covering
@every_law
@pytest.mark.parametrize("build", ORDERED.values(), ids=ORDERED.keys())
def test_nearest_kronecker_is_the_floor_under_kfac_and_foof(build, likelihood):
    net, x = build()
    fisher = fv.Probe(net, likelihood).fisher(x)
    floor = relative_errors(fisher, "nearest-kronecker")
    for other in ("kfac", "foof"):
        for better, worse in zip(floor, relative_errors(fisher, other), strict=True):
            assert better <= worse + ROUNDING


@pytest.mark.covering
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("build", ORDERED.values(), ids=ORDERED.keys())
def test_nearest_kronecker_is_the_truncated_svd_of_the_rearranged_block(build, rank):
    net, x = build()
    layers = trace.layers_of(net)
    F = order.reorder(exact.fisher(net, x, laws.Gaussian()), layers, "unit")
    actual = unit_dense("nearest-kronecker", net, x, "gaussian", rank=rank)
    best = nearest(F, layers, rank)
    kept = kronecker.same_layer(F, order.segments(layers))
    assert np.linalg.norm(actual - kept) == pytest.approx(np.linalg.norm(best - kept), rel=1e-7)
    assert_matches(actual, best, 1e-6)


def test_rank_one_nearest_kronecker_is_positive_semidefinite():
    net, x = nets.mlp(3, 4, 2), nets.vectors(6, 3)
    dense = unit_dense("nearest-kronecker", net, x, "categorical")
    assert np.linalg.eigvalsh(dense).min() > -1e-10 * np.linalg.norm(dense, 2)


def test_full_rank_nearest_kronecker_is_the_block_itself():
    net, x = nets.mlp(1, 2), nets.vectors(6, 1)
    fisher = fv.Probe(net, "categorical").fisher(x)
    assert_matches(fv.approximate(fisher, "nearest-kronecker", rank=4).to_dense(), fisher.to_dense(), 1e-8)


@every_law
def test_same_unit_blocks_of_cw_ngd_are_exact(likelihood):
    net, x = nets.mlp(3, 4, 2), nets.vectors(5, 3)
    fisher = fv.Probe(net, likelihood).fisher(x)
    dense = fv.approximate(fisher, "cw-ngd").to_dense(order="unit")
    kept = torch.stack([dense[4 * o : 4 * o + 4, 4 * o : 4 * o + 4] for o in range(4)])
    assert_matches(kept, fisher.units(0), 1e-13)
