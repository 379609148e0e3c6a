"""The oracles against each other and against closed forms, before they judge anybody else."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.oracles import cumulants, exact, kronecker, laws, nets, order, trace
from tests.oracles.checks import assert_matches
from tests.oracles.patches import patches


@pytest.mark.parametrize("law", [*laws.ALL.values(), laws.Gaussian(0.3)], ids=str)
def test_scores_of_a_law_have_mean_zero_and_the_output_fisher_as_second_moment(law):
    z = torch.randn(3, dtype=torch.float64, requires_grad=True)
    mean, second = np.zeros(3), np.zeros((3, 3))
    for weight, y in law.labels(z):
        (score,) = torch.autograd.grad(law.log_density(z, y), z)
        mean += weight * score.numpy()
        second += weight * np.outer(score, score)
    assert np.abs(mean).max() < 1e-14
    assert_matches(second, law.output_fisher(z), 1e-13)


@pytest.mark.parametrize("law", laws.ALL.values(), ids=str)
def test_output_fisher_is_minus_the_hessian_of_the_log_density(law):
    z = torch.randn(3, dtype=torch.float64)
    y = law.draw(1, 3)[0]
    hessian = torch.autograd.functional.hessian(lambda z: law.log_density(z, y), z)
    assert_matches(-hessian, law.output_fisher(z), 1e-12)


@pytest.mark.parametrize("law", laws.ALL.values(), ids=str)
def test_sum_over_labels_equals_jacobian_form(law):
    net, x = nets.mlp(3, 4, 2), nets.vectors(4, 3)
    assert_matches(exact.fisher(net, x, law), exact.by_jacobian(net, x, law), 1e-12)


def test_jacobian_equals_torch_func():
    net, x = nets.mlp(3, 4, 2), nets.vectors(1, 3)
    parameters = dict(net.named_parameters())
    J = torch.func.jacrev(lambda p: torch.func.functional_call(net, p, (x,))[0])(parameters)
    stacked = torch.cat([J[name].reshape(2, -1) for name in parameters], dim=1)
    assert_matches(exact.jacobian(net, x, 0), stacked, 1e-13)


def test_linear_gaussian_fisher_is_the_input_second_moment_over_the_variance():
    net, x = nets.mlp(3, 2), nets.vectors(5, 3)
    a = np.concatenate([x.numpy(), np.ones((5, 1))], axis=1)
    closed = np.kron(np.eye(2), a.T @ a / 5) / 0.3
    F = exact.fisher(net, x, laws.Gaussian(0.3))
    assert_matches(order.reorder(F, [(2, 3, True)], "unit"), closed, 1e-13)


def test_unit_and_input_order_are_kronecker_products_the_two_ways_round():
    net, x = nets.mlp(3, 2), nets.vectors(1, 3)
    law = laws.Categorical()
    F = exact.fisher(net, x, law)
    a = np.append(x[0].numpy(), 1.0)
    G = law.output_fisher(net(x)[0]).detach().numpy()
    assert_matches(order.reorder(F, [(2, 3, True)], "unit"), np.kron(G, np.outer(a, a)), 1e-13)
    assert_matches(order.reorder(F, [(2, 3, True)], "input"), np.kron(np.outer(a, a), G), 1e-13)


def test_to_torch_undoes_reorder():
    layers = [(2, 3, True), 5, (4, 2, False)]
    M = np.random.default_rng(0).normal(size=(21, 21))
    for name in ("torch", "unit", "input"):
        assert_matches(order.to_torch(order.reorder(M, layers, name), layers, name), M, 0)


CONVOLUTIONS = {
    "1d": lambda **k: (nn.Conv1d(2, 4, 3, **k), (7,)),
    "2d": lambda **k: (nn.Conv2d(2, 4, (3, 2), **k), (5, 6)),
    "3d": lambda **k: (nn.Conv3d(2, 4, 2, **k), (3, 4, 3)),
}
OPTIONS = [
    {},
    {"padding": 1, "stride": 2},
    {"padding": "same", "dilation": 2},
    {"padding": "valid"},
    {"groups": 2, "bias": False, "padding": 1},
    *({"padding": 1, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
    {"padding": "same", "padding_mode": "circular"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolution_is_a_matrix_times_its_patches(kind, options):
    conv, size = CONVOLUTIONS[kind](**options)
    conv = nets.randomised(conv)
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    assert_matches(trace.walk_convolution(conv, x, 0, []), conv(x), 1e-13)


def test_patches_pad_as_torch_pads():
    conv = nn.Conv2d(1, 1, 3, padding=(2, 1), padding_mode="reflect")
    x = torch.arange(20.0).reshape(1, 1, 4, 5)
    padded = nn.functional.pad(x, (1, 1, 2, 2), mode="reflect")
    expected = nn.functional.unfold(padded, 3).transpose(1, 2)
    assert_matches(patches(conv, x)[0][:, :, 0], expected, 0)


@pytest.mark.parametrize("targets", [False, True])
def test_moments_rebuild_the_fisher(targets):
    net, x, law = nets.mlp(3, 4, 2), nets.vectors(4, 3), laws.Categorical()
    y = law.draw(4, 2) if targets else None
    rows = [
        (w, np.concatenate([(gi.T @ ai).reshape(-1) for ai, gi in zip(a, g, strict=True)]))
        for w, a, g in trace.moments(net, x, law, y)
    ]
    unit = sum(w * np.outer(v, v) for w, v in rows)
    assert_matches(order.to_torch(unit, trace.layers_of(net)), exact.fisher(net, x, law, targets=y), 1e-12)


def test_moments_of_a_grouped_convolution_rebuild_the_fisher():
    net = nets.conv_net(nn.Conv2d(2, 4, 2, groups=2), nn.Conv2d(4, 2, 2, padding=1))
    x, law = torch.randn(2, 2, 3, 3, dtype=torch.float64), laws.Bernoulli()
    rows = [
        (w, np.concatenate([(gi.T @ ai).reshape(-1) for ai, gi in zip(a, g, strict=True)]))
        for w, a, g in trace.moments(net, x, law)
    ]
    unit = sum(w * np.outer(v, v) for w, v in rows)
    assert_matches(order.to_torch(unit, trace.layers_of(net)), exact.fisher(net, x, law), 1e-12)


def three_layers():
    net, x = nets.mlp(2, 3, 2, 2), nets.vectors(12, 2)
    return kronecker.damp(*kronecker.factors(trace.moments(net, x, laws.Gaussian())), 0.1)


def test_tridiagonal_has_the_inverse_of_its_regressions():
    A, G = three_layers()
    dense = kronecker.tridiagonal(A, G)
    assert_matches(dense @ kronecker.tridiagonal_inverse(A, G), np.eye(len(dense)), 1e-9)


def test_tridiagonal_inverse_is_block_tridiagonal():
    A, G = three_layers()
    inverse = np.linalg.inv(kronecker.tridiagonal(A, G))
    first, last = len(A[0, 0]) * len(G[0, 0]), len(A[2, 2]) * len(G[2, 2])
    assert np.abs(inverse[:first, -last:]).max() < 1e-10 * np.abs(inverse).max()
    assert np.abs(kronecker.tridiagonal(A, G)[:first, -last:]).max() > 1e-4


def test_nearest_kronecker_of_a_kronecker_product_is_itself():
    rng = np.random.default_rng(0)
    A, G = rng.normal(size=(3, 3)), rng.normal(size=(2, 2))
    assert_matches(kronecker.nearest_kronecker(np.kron(G, A), 2, 3), np.kron(G, A), 1e-12)


def test_fourth_cumulant_of_a_gaussian_vanishes():
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    x = np.repeat(nodes, 5)
    y = 0.4 * x + np.tile(nodes, 5) + 0.7
    w = np.outer(weights, weights).reshape(-1)
    w = w / w.sum()
    assert abs(cumulants.cumulant(w, [x, y, y, y])) < 1e-11
    assert abs(cumulants.cumulant(w, [x, y, y])) < 1e-12
    assert cumulants.cumulant(w, [x, y]) == pytest.approx(0.4)


def test_there_are_fifteen_partitions_of_four():
    assert len(list(cumulants.partitions((0, 1, 2, 3)))) == 15


def test_cumulant_error_is_fisher_minus_khatri_rao():
    net, x, law = nets.mlp(2, 2, 2), nets.vectors(4, 2), laws.Categorical()
    for targets in (None, law.draw(4, 2)):
        moments = trace.moments(net, x, law, targets)
        F = order.reorder(exact.fisher(net, x, law, targets=targets), trace.layers_of(net), "unit")
        error, bound = cumulants.table(moments)
        assert_matches(kronecker.assemble(error, 2), F - kronecker.full(*kronecker.factors(moments)), 1e-11)
        assert all((bound[ij] >= abs(error[ij]) - 1e-14).all() for ij in error)


def test_exact_cumulant_bound_has_the_three_terms_of_the_paper():
    net, x, law = nets.mlp(2, 2, 2), nets.vectors(4, 2), laws.Categorical()
    moments = trace.moments(net, x, law)
    w = np.array([m[0] for m in moments])
    a = [np.array([m[1][1][0, k] for m in moments]) for k in range(2)]
    g = [np.array([m[2][1][0, k] for m in moments]) for k in range(2)]
    k = cumulants.cumulant
    terms = [
        k(w, [a[0], a[1], g[0], g[1]]),
        (w @ a[0]) * k(w, [a[1], g[0], g[1]]),
        (w @ a[1]) * k(w, [a[0], g[0], g[1]]),
    ]
    error, bound = cumulants.error_and_bound(w, a[0], a[1], g[0], g[1])
    assert error == pytest.approx(sum(terms), rel=1e-9)
    assert bound == pytest.approx(sum(map(abs, terms)), rel=1e-9)
