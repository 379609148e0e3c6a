"""Torch, unit and input order of the dense matrix, and vectors that mean what PyTorch's flattening says."""

import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.oracles import exact, laws, nets, order, trace
from tests.oracles.checks import assert_matches

orders = pytest.mark.parametrize("name", ["torch", "unit", "input"])


@orders
def test_dense_fisher_of_linear_layers_in_every_order(name):
    net, x = nets.mlp(3, 4, 2), nets.vectors(5, 3)
    F = exact.fisher(net, x, laws.Categorical())
    actual = fv.Probe(net, "categorical").fisher(x).to_dense(order=name)
    assert_matches(actual, order.reorder(F, trace.layers_of(net), name))


@orders
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"groups": 2}], ids=str)
def test_dense_fisher_of_convolutions_in_every_order(name, options):
    net = nets.conv_net(nn.Conv2d(2, 4, (2, 1), **options), nn.Conv2d(4, 2, 1))
    x = torch.randn(2, 2, 3, 2, dtype=torch.float64)
    F = exact.fisher(net, x, laws.Gaussian())
    actual = fv.Probe(net, "gaussian").fisher(x).to_dense(order=name)
    assert_matches(actual, order.reorder(F, trace.layers_of(net), name))


@orders
def test_layers_without_a_matrix_keep_torch_order(name):
    net = nets.randomised(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 2)))
    x = nets.vectors(4, 3)
    F = exact.fisher(net, x, laws.Gaussian())
    actual = fv.Probe(net, "gaussian").fisher(x).to_dense(order=name)
    assert_matches(actual, order.reorder(F, [(2, 3, True), 4, (2, 2, True)], name))


@orders
def test_dense_approximation_in_every_order(name):
    net, x = nets.mlp(3, 4, 2), nets.vectors(5, 3)
    approximation = fv.approximate(fv.Probe(net, "categorical").fisher(x), "kfac")
    expected = order.reorder(approximation.to_dense().numpy(), trace.layers_of(net), name)
    assert_matches(approximation.to_dense(order=name), expected, 1e-14)


def test_default_order_is_torch_order():
    net, x = nets.mlp(3, 4, 2), nets.vectors(5, 3)
    fisher = fv.Probe(net, "categorical").fisher(x)
    assert_matches(fisher.to_dense(), fisher.to_dense(order="torch"), 0)


def test_dense_fisher_times_parameters_to_vector_means_what_it_says():
    net, x = nets.mlp(3, 4, 2), nets.vectors(5, 3)
    law, y = laws.Categorical(), torch.tensor([0, 1, 1, 0, 1])
    nn.CrossEntropyLoss()(net(x), y).backward()
    gradient = nn.utils.parameters_to_vector(p.grad for p in net.parameters())
    assert_matches(gradient, exact.mean_gradient(net, x, y, law), 1e-12)
    fisher = fv.Probe(net, "categorical").fisher(x)
    assert_matches(fisher @ gradient, exact.fisher(net, x, law) @ gradient.numpy())


def test_unit_order_of_one_example_is_g_times_a():
    net, x = nets.mlp(3, 2), nets.vectors(1, 3)
    a = torch.cat([x[0], torch.ones(1, dtype=torch.float64)])
    G = laws.Gaussian().output_fisher(net(x)[0])
    fisher = fv.Probe(net, "gaussian").fisher(x)
    assert_matches(fisher.to_dense(order="unit"), torch.kron(G, torch.outer(a, a)), 1e-12)
    assert_matches(fisher.to_dense(order="input"), torch.kron(torch.outer(a, a), G), 1e-12)


@pytest.mark.parametrize("wrong", ["rows", "Torch", None, 3])
def test_an_unknown_order_is_refused_with_the_known_ones(wrong):
    fisher = fv.Probe(nets.mlp(2, 2), "gaussian").fisher(nets.vectors(2, 2))
    with pytest.raises((ValueError, TypeError), match="unit"):
        fisher.to_dense(order=wrong)
    with pytest.raises((ValueError, TypeError), match="unit"):
        fv.approximate(fisher, "kfac").to_dense(order=wrong)
