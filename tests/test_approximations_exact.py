"""Every approximation against its definition by dense matrices, and the places where it must be exact."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.oracles import exact, kronecker, laws, nets, order, trace
from tests.oracles.checks import assert_matches

METHODS = [
    "identity",
    "diagonal",
    "layer",
    "cw-ngd",
    "kfac-full",
    "kfac",
    "kfac-tridiagonal",
    "ekfac",
    "foof",
    "nearest-kronecker",
]


def nearest(F, layers, rank=1):
    blocks = []
    for part, (d_out, fan_in, bias) in zip(order.segments(layers), layers, strict=True):
        blocks.append(kronecker.nearest_kronecker(F[part, part], d_out, fan_in + bias, rank))
    return kronecker.block_diagonal(blocks)


def definition(method, net, x, law, targets=None, setting="expand"):
    """The dense approximation in unit order, from moments and the brute-force Fisher."""
    layers, moments = trace.layers_of(net), trace.moments(net, x, law, targets)
    F = order.reorder(exact.fisher(net, x, law, targets=targets), layers, "unit")
    A, G = kronecker.factors(moments, setting)
    return {
        "identity": lambda: np.eye(len(F)),
        "diagonal": lambda: np.diag(np.diag(F)),
        "layer": lambda: kronecker.same_layer(F, order.segments(layers)),
        "cw-ngd": lambda: kronecker.same_unit(F, layers),
        "kfac-full": lambda: kronecker.full(A, G),
        "kfac": lambda: kronecker.kfac(A, G),
        "kfac-tridiagonal": lambda: kronecker.tridiagonal(A, G),
        "ekfac": lambda: kronecker.ekfac(moments, A, G),
        "foof": lambda: kronecker.foof(moments),
        "nearest-kronecker": lambda: nearest(F, layers),
    }[method]()


def unit_dense(method, net, x, likelihood, y=None, kind="exact", **options):
    fisher = fv.Probe(net, likelihood).fisher(x, y, kind=kind)
    return fv.approximate(fisher, method, **options).to_dense(order="unit").numpy()


every_method = pytest.mark.parametrize("method", METHODS)
every_law = pytest.mark.parametrize("likelihood", laws.ALL)


WELL_POSED = [(m, law) for m in METHODS for law in laws.ALL if (m, law) != ("ekfac", "gaussian")]
"""A squared loss gives the last layer G = I, whose eigenbasis is anybody's choice."""


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
    assert_matches(
        unit_dense(method, net, x, "bernoulli"), definition(method, net, x, laws.Bernoulli()), 1e-8
    )


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
SHARING = {
    "tokens": lambda: (nets.tokens_net(), torch.randn(6, 4, 3, dtype=torch.float64)),
    "convolutions": lambda: (
        nets.conv_net(nn.Conv2d(1, 3, 2), nn.Conv2d(3, 2, 2, padding=1)),
        torch.randn(4, 1, 4, 3, dtype=torch.float64),
    ),
    "strided and dilated": lambda: (
        nets.conv_net(nn.Conv1d(2, 3, 2, stride=2, padding=1), nn.Conv1d(3, 2, 2, dilation=2)),
        torch.randn(4, 2, 7, dtype=torch.float64),
    ),
    "circular without bias": lambda: (
        nets.conv_net(
            nn.Conv2d(1, 3, 3, padding=1, padding_mode="circular", bias=False), nn.Conv2d(3, 2, 1, bias=False)
        ),
        torch.randn(4, 1, 4, 5, dtype=torch.float64),
    ),
    "three dimensions": lambda: (
        nets.conv_net(nn.Conv3d(1, 2, 2), nn.Conv3d(2, 2, 1)),
        torch.randn(3, 1, 3, 2, 3, dtype=torch.float64),
    ),
    "convolution and dense": lambda: (
        nets.randomised(nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2))),
        torch.randn(10, 1, 5, dtype=torch.float64),
    ),
}


@pytest.mark.parametrize("method", SHARED)
@pytest.mark.parametrize("build", SHARING.values(), ids=SHARING.keys())
def test_of_shared_weights(method, build):
    net, x = build()
    assert_matches(
        unit_dense(method, net, x, "bernoulli"), definition(method, net, x, laws.Bernoulli()), 1e-8
    )


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


@pytest.mark.parametrize("name", ["twice", "norm", "embedding"])
@pytest.mark.parametrize("method", ["layer", "kfac", "ekfac", "foof", "cw-ngd", "diagonal"])
def test_of_layers_that_are_called_twice_or_have_no_structure(method, name):
    """Calls are positions; a generic layer keeps its exact block in `layer`, its diagonal elsewhere."""
    if name == "twice":
        again = nn.Linear(3, 3)
        net, x = nets.randomised(nn.Sequential(again, nn.Tanh(), again)), nets.vectors(4, 3)
    elif name == "norm":
        net, x = nets.randomised(nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2))), nets.vectors(4, 3)
    else:
        net = nets.randomised(nn.Sequential(nn.Embedding(4, 2), nn.Flatten(), nn.Linear(4, 2)))
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
        float(
            torch.linalg.norm(fisher.block(i) - approximation.block(i, i))
            / torch.linalg.norm(fisher.block(i))
        )
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


@every_law
@pytest.mark.parametrize("build", ORDERED.values(), ids=ORDERED.keys())
def test_nearest_kronecker_is_the_floor_under_kfac_and_foof(build, likelihood):
    net, x = build()
    fisher = fv.Probe(net, likelihood).fisher(x)
    floor = relative_errors(fisher, "nearest-kronecker")
    for other in ("kfac", "foof"):
        for better, worse in zip(floor, relative_errors(fisher, other), strict=True):
            assert better <= worse + ROUNDING


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


# ---- the block-tridiagonal inverse ---------------------------------------------------------------


def chain(*widths, N=14, likelihood="gaussian"):
    net, x = nets.mlp(*widths), nets.vectors(N, widths[0])
    fisher = fv.Probe(net, likelihood).fisher(x)
    return fisher, kronecker.factors(trace.moments(net, x, laws.ALL[likelihood])), trace.layers_of(net)


@every_law
def test_tridiagonal_of_two_layers_is_the_khatri_rao_matrix(likelihood):
    fisher, _, _ = chain(3, 4, 2, likelihood=likelihood)
    tridiagonal = fv.approximate(fisher, "kfac-tridiagonal").to_dense()
    assert_matches(tridiagonal, fv.approximate(fisher, "kfac-full").to_dense(), 1e-10)


@every_law
def test_tridiagonal_blocks_agree_with_the_khatri_rao_matrix(likelihood):
    fisher, _, _ = chain(2, 3, 3, 2, likelihood=likelihood)
    hat, full = fv.approximate(fisher, "kfac-tridiagonal"), fv.approximate(fisher, "kfac-full")
    for i in range(3):
        for j in range(max(0, i - 1), min(3, i + 2)):
            assert_matches(hat.block(i, j), full.block(i, j), 1e-12)
    assert torch.linalg.norm(hat.block(0, 2) - full.block(0, 2)) > 1e-3 * torch.linalg.norm(full.block(0, 2))


@pytest.mark.parametrize("gamma", [0.03, 0.3])
@every_law
def test_factored_damping_of_the_tridiagonal_inverse(likelihood, gamma):
    fisher, factors, layers = chain(2, 3, 3, 2, likelihood=likelihood)
    expected = kronecker.tridiagonal_inverse(*kronecker.damp(*factors, gamma))
    approximation = fv.approximate(fisher, "kfac-tridiagonal")
    damping = fv.FactoredTikhonov(gamma)
    assert_matches(approximation.inverse(damping).to_dense(), order.to_torch(expected, layers), 1e-8)
    v = nets.vectors(len(expected), 1)[:, 0]
    assert_matches(approximation.solve(v, damping), order.to_torch(expected, layers) @ v.numpy(), 1e-8)
    damped = approximation.damped(damping).to_dense(order="unit")
    assert_matches(damped, kronecker.tridiagonal(*kronecker.damp(*factors, gamma)), 1e-8)


def test_damped_tridiagonal_inverse_is_block_tridiagonal_and_positive_definite():
    fisher, _, _ = chain(2, 3, 3, 3, 2)
    inverse = fv.approximate(fisher, "kfac-tridiagonal").inverse(fv.FactoredTikhonov(0.1)).to_dense()
    sizes = [0, 9, 21, 33, 41]
    scale = inverse.abs().max()
    for i in range(4):
        for j in range(i + 2, 4):
            assert inverse[sizes[i] : sizes[i + 1], sizes[j] : sizes[j + 1]].abs().max() < 1e-9 * scale
    assert torch.linalg.eigvalsh((inverse + inverse.T) / 2).min() > 0


def test_undamped_tridiagonal_inverse_of_a_singular_fisher_is_refused():
    """The bias coordinate is the same in all layers, so that I - S1 (x) S2 has the eigenvalue 0."""
    fisher, _, _ = chain(2, 3, 2, likelihood="categorical")
    with pytest.raises((ValueError, RuntimeError), match="damping"):
        fv.approximate(fisher, "kfac-tridiagonal").solve(nets.vectors(17, 1)[:, 0])


def test_tridiagonal_of_convolutions_with_equal_positions_expands():
    net = nets.conv_net(*(nn.Conv1d(2, 2, 3, padding="same") for _ in range(3)))
    x = torch.randn(5, 2, 5, dtype=torch.float64)
    actual = unit_dense("kfac-tridiagonal", net, x, "bernoulli")
    assert_matches(actual, definition("kfac-tridiagonal", net, x, laws.Bernoulli()), 1e-7)


def test_tridiagonal_of_unequal_positions_reduces():
    net = nets.randomised(
        nn.Sequential(
            nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 2)
        )
    )
    x, gamma = torch.randn(14, 1, 4, dtype=torch.float64), 0.1
    A, G = kronecker.damp(*kronecker.factors(trace.moments(net, x, laws.Bernoulli()), "reduce"), gamma)
    approximation = fv.approximate(fv.Probe(net, "bernoulli").fisher(x), "kfac-tridiagonal")
    expected = order.to_torch(kronecker.tridiagonal_inverse(A, G), trace.layers_of(net))
    assert_matches(approximation.inverse(fv.FactoredTikhonov(gamma)).to_dense(), expected, 1e-8)


@pytest.mark.filterwarnings("ignore:.*diagonal")
def test_layer_without_factors_stays_out_of_the_tridiagonal_chain():
    """Linear, LayerNorm, Linear: the two Linear layers are neighbours, the norm keeps its exact diagonal."""
    net, x = (
        nets.randomised(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2))),
        nets.vectors(14, 2),
    )
    fisher = fv.Probe(net, "bernoulli").fisher(x)
    hat = fv.approximate(fisher, "kfac-tridiagonal")
    full = fv.approximate(fv.Probe(net, "bernoulli", layers=["0", "2"]).fisher(x), "kfac-full").to_dense()
    dense = hat.to_dense().numpy()
    linear = np.r_[0:9, 15:23]
    assert_matches(dense[np.ix_(linear, linear)], full, 1e-9)
    assert_matches(dense[9:15, 9:15], np.diag(np.diag(exact.fisher(net, x, laws.Bernoulli()))[9:15]))
    assert_matches(dense[9:15, linear], np.zeros((6, 17)))


class Branching(nn.Module):
    """Two layers side by side on the same input, then one on their sum: no chain."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.left(x)) + torch.tanh(self.right(x)))


def test_network_that_is_no_chain_takes_neighbours_in_execution_and_says_so():
    net, x = nets.randomised(Branching()), nets.vectors(14, 2)
    fisher = fv.Probe(net, "bernoulli").fisher(x)
    with pytest.warns(UserWarning, match="chain"):
        hat = fv.approximate(fisher, "kfac-tridiagonal")
    full = fv.approximate(fisher, "kfac-full")
    for i, j in ((0, 1), (1, 2)):
        assert_matches(hat.block(i, j), full.block(i, j), 1e-9)


# ---- damping, products and solves ----------------------------------------------------------------


@every_method
def test_tikhonov_damping_adds_a_multiple_of_the_identity(method):
    net, x = nets.mlp(3, 4, 2), nets.vectors(6, 3)
    approximation = fv.approximate(fv.Probe(net, "categorical").fisher(x), method)
    dense = approximation.to_dense().numpy()
    damped = dense + 0.2 * np.eye(len(dense))
    V = nets.vectors(len(dense), 2)
    assert_matches(approximation.damped(0.2).to_dense(), damped)
    assert_matches(approximation.solve(V[:, 0], 0.2), np.linalg.solve(damped, V[:, 0]), 1e-8)
    assert_matches(approximation.solve(V, 0.2), np.linalg.solve(damped, V), 1e-8)
    assert_matches(approximation.damped(0.2).solve(V[:, 0]), np.linalg.solve(damped, V[:, 0]), 1e-8)
    assert_matches(approximation.inverse(0.2).to_dense(), np.linalg.inv(damped), 1e-8)
    assert_matches(approximation.inverse(0.2) @ V[:, 0], np.linalg.solve(damped, V[:, 0]), 1e-8)


def test_tikhonov_object_and_number_mean_the_same():
    net, x = nets.mlp(3, 4, 2), nets.vectors(6, 3)
    kfac = fv.approximate(fv.Probe(net, "categorical").fisher(x), "kfac")
    assert_matches(kfac.damped(fv.Tikhonov(0.2)).to_dense(), kfac.damped(0.2).to_dense(), 0)


@pytest.mark.parametrize("method", ["kfac", "kfac-full"])
@pytest.mark.parametrize("gamma", [0.02, 0.5])
def test_factored_damping_of_each_layers_own_two_factors(method, gamma):
    net, x, law = nets.mlp(3, 4, 2), nets.vectors(6, 3), laws.Categorical()
    layers = trace.layers_of(net)
    A, G = kronecker.damp(*kronecker.factors(trace.moments(net, x, law)), gamma)
    expected = order.to_torch((kronecker.kfac if method == "kfac" else kronecker.full)(A, G), layers)
    approximation = fv.approximate(fv.Probe(net, "categorical").fisher(x), method)
    damping = fv.FactoredTikhonov(gamma)
    v = nets.vectors(len(expected), 1)[:, 0]
    assert_matches(approximation.damped(damping).to_dense(), expected)
    assert_matches(approximation.solve(v, damping), np.linalg.solve(expected, v), 1e-8)
    assert_matches(approximation.inverse(damping).to_dense(), np.linalg.inv(expected), 1e-8)


@pytest.mark.parametrize("method", ["kfac", "kfac-full", "kfac-tridiagonal"])
def test_factored_damping_of_a_summed_fisher_starts_from_the_summed_factors(method):
    """A (x) N G and N A (x) G are damped to the same matrix, since pi takes up the difference."""
    net, x = nets.mlp(2, 3, 2), nets.vectors(9, 2)
    A, G = kronecker.factors(trace.moments(net, x, laws.Gaussian()))
    A, G = kronecker.damp(A, {ij: 9 * g for ij, g in G.items()}, 0.1)
    dense = {"kfac": kronecker.kfac, "kfac-full": kronecker.full, "kfac-tridiagonal": kronecker.tridiagonal}
    approximation = fv.approximate(fv.Probe(net, "gaussian").fisher(x, reduction="sum"), method)
    actual = approximation.damped(fv.FactoredTikhonov(0.1)).to_dense(order="unit")
    assert_matches(actual, dense[method](A, G), 1e-8)
    actual = approximation.inverse(fv.FactoredTikhonov(0.1)).to_dense(order="unit")
    assert_matches(actual, np.linalg.inv(dense[method](A, G)), 1e-7)


def test_factored_damping_of_a_dead_layer_takes_equal_parts():
    net, x = nets.mlp(3, 4, 2), nets.vectors(6, 3)
    with torch.no_grad():
        net[2].weight.zero_()
    kfac = fv.approximate(fv.Probe(net, "categorical").fisher(x), "kfac")
    block = kfac.damped(fv.FactoredTikhonov(0.1)).block(0, 0)
    A = kronecker.factors(trace.moments(net, x, laws.Categorical()))[0][0, 0]
    expected = np.kron(0.1 * np.eye(4), A + 0.1 * np.eye(4))
    assert_matches(block, order.to_torch(expected, [(4, 3, True)]))


@pytest.mark.parametrize("method", ["diagonal", "layer", "cw-ngd"])
def test_factored_damping_of_a_matrix_without_factors_adds_gamma_squared(method):
    """The product of the two added identities, (pi gamma) (gamma / pi): what is left without factors."""
    approximation = fv.approximate(fv.Probe(nets.mlp(3, 2), "gaussian").fisher(nets.vectors(4, 3)), method)
    damped = approximation.damped(fv.FactoredTikhonov(0.1)).to_dense()
    assert_matches(damped, approximation.to_dense() + 0.01 * torch.eye(8, dtype=torch.float64), 1e-12)


@every_method
def test_products_blocks_diagonal_and_norms_agree_with_the_dense_matrix(method):
    net, x = nets.mlp(2, 3, 2, 2), nets.vectors(9, 2)
    fisher = fv.Probe(net, "bernoulli").fisher(x)
    approximation = fv.approximate(fisher, method)
    dense = approximation.to_dense().numpy()
    V = nets.vectors(len(dense), 2)
    assert dense.shape == tuple(fisher.shape)
    assert_matches(dense, dense.T, 1e-10)
    assert_matches(approximation @ V[:, 0], dense @ V[:, 0].numpy(), 1e-8)
    assert_matches(approximation @ V, dense @ V.numpy(), 1e-8)
    assert_matches(approximation.diagonal(), np.diag(dense), 1e-8)
    assert float(approximation.norm("fro")) == pytest.approx(np.linalg.norm(dense), rel=1e-8)
    assert float(approximation.norm("spectral")) == pytest.approx(np.linalg.norm(dense, 2), rel=1e-5)
    assert float(approximation.norm("trace")) == pytest.approx(np.trace(dense), rel=1e-8)
    parts = {"0": slice(0, 9), "2": slice(9, 17), "4": slice(17, 23)}
    for row, rows in parts.items():
        for col, cols in parts.items():
            assert_matches(approximation.block(row, col), dense[rows, cols], 1e-8)


@every_method
def test_dictionaries_like_named_parameters(method):
    net, x = nets.mlp(2, 3, 2), nets.vectors(9, 2)
    approximation = fv.approximate(fv.Probe(net, "bernoulli").fisher(x), method)
    v = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    flat = torch.cat([t.reshape(-1) for t in v.values()])
    for given, expected in (
        (approximation @ v, approximation @ flat),
        (approximation.solve(v, 0.1), approximation.solve(flat, 0.1)),
    ):
        assert list(given) == list(v)
        assert_matches(torch.cat([t.reshape(-1) for t in given.values()]), expected, 1e-13)


@every_method
def test_float32_approximations(method):
    net, x = nets.mlp(2, 3, 2), nets.vectors(12, 2)
    expected = definition(method, net, x, laws.Bernoulli())
    fisher = fv.Probe(net.float(), "bernoulli").fisher(x.float())
    dense = fv.approximate(fisher, method).to_dense(order="unit")
    assert dense.dtype == torch.float32
    assert_matches(dense, expected, 1e-4)


@pytest.mark.parametrize("method", ["kfac", "ekfac", "foof", "cw-ngd", "layer", "nearest-kronecker"])
def test_undamped_solve_of_singular_factors_names_the_layer_and_the_damping_that_would_do(method):
    net, x = nets.mlp(3, 4, 2), nets.vectors(2, 3)
    approximation = fv.approximate(fv.Probe(net, "categorical").fisher(x), method)
    v = nets.vectors(26, 1)[:, 0]
    sentence = r"layer '0'.*smallest eigenvalue.*damping of at least ([\d.e+-]+\d)"
    with pytest.raises((ValueError, RuntimeError), match=sentence) as error:
        approximation.solve(v)
    enough = float(re.search(sentence, str(error.value)).group(1))
    assert torch.isfinite(approximation.solve(v, enough)).all()


def test_undamped_solve_of_regular_factors():
    net, x = nets.mlp(2, 3), nets.vectors(9, 2)
    kfac = fv.approximate(fv.Probe(net, "gaussian").fisher(x), "kfac")
    v = nets.vectors(9, 1)[:, 0]
    assert_matches(kfac.solve(v), np.linalg.solve(kfac.to_dense(), v), 1e-9)


def test_ten_methods_are_registered():
    assert set(METHODS) <= set(fv.approximations)


def test_an_approximation_of_ones_own_is_registered_in_a_few_lines(monkeypatch):
    class Doubled(fv.Approximation):
        """Twice the identity."""

        def statistics(self, layer):
            return {}

        def operator_for(self, layer, values):
            return fv.approximate(small, "identity").operator(0, 0).scale(2.0)

    net, x = nets.mlp(3, 2), nets.vectors(4, 3)
    small = fv.Probe(net, "gaussian").fisher(x)
    monkeypatch.setattr(fv.approximations, "_classes", dict(fv.approximations))
    fv.register("doubled", Doubled)
    assert "doubled" in fv.approximations
    assert_matches(fv.approximate(small, "doubled").to_dense(), 2 * np.eye(8))
    assert_matches(fv.approximate(small, Doubled).to_dense(), 2 * np.eye(8))
    with pytest.raises((ValueError, TypeError), match="kfac"):
        fv.register("kfac", Doubled)


def test_order_of_layers_in_the_chain_is_that_of_execution():
    """Defined last, run first: the chain follows the forward pass, the numbering the definition."""

    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.third, self.first, self.second = nn.Linear(3, 2), nn.Linear(2, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))

    net, x = nets.randomised(Backwards()), nets.vectors(14, 2)
    straight = nn.Sequential(net.first, nn.Tanh(), net.second, nn.Tanh(), net.third)
    damping = fv.FactoredTikhonov(0.1)
    fisher = fv.Probe(net, "gaussian").fisher(x)
    actual = fv.approximate(fisher, "kfac-tridiagonal").inverse(damping).to_dense()
    layers = trace.layers_of(straight)
    A, G = kronecker.damp(*kronecker.factors(trace.moments(straight, x, laws.Gaussian())), 0.1)
    expected = order.to_torch(kronecker.tridiagonal_inverse(A, G), layers)
    first, second, third = (np.arange(len(expected))[part] for part in order.segments(layers))
    where = np.concatenate([third, first, second])
    assert_matches(actual, expected[np.ix_(where, where)], 1e-8)
