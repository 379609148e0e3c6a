"""Networks in other coordinates compute the same function, come back, and are whitened where they should be."""

import pytest
import torch
from torch import nn

from fisherviz import models


def network(*, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4, bias), nn.Tanh(), nn.Linear(4, 4, bias), nn.Linear(4, 2, bias)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return net


def matrices(*sizes, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(d, d, generator=generator, dtype=torch.float64) + 3 * torch.eye(d) for d in sizes]


@pytest.mark.parametrize("bias", [True, False])
def test_the_transformed_network_is_the_same_function_with_the_papers_weights(bias):
    net = network(bias=bias)
    omegas, phis = matrices(*(d + bias for d in (3, 4, 4))), matrices(4, 4, 2)
    twin = models.transformed(net, omegas, phis)
    x = torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(twin(x), net(x), rtol=1e-9, atol=1e-9)
    whole = torch.cat([net[0].weight, net[0].bias[:, None]], 1) if bias else net[0].weight
    expected = torch.linalg.inv(phis[0]) @ whole @ torch.linalg.inv(omegas[0])
    torch.testing.assert_close(twin.get_submodule("0").weight, expected)


def test_a_trained_twin_comes_back_as_its_function_and_the_model_stays():
    net = network()
    before = [p.detach().clone() for p in net.parameters()]
    twin = models.transformed(net, matrices(4, 5, 5), matrices(4, 4, 2))
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.1)
    x = torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(models.restored(twin, net)(x), twin(x), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(twin(x), net(x))
    for p, old in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, old)


@pytest.mark.parametrize(("omegas", "phis"), [((4, 5), (4, 4)), ((3, 5, 5), (4, 4, 2)), ((4, 5, 5), (4, 4, 3))])
def test_matrices_that_do_not_fit_are_told(omegas, phis):
    with pytest.raises(ValueError, match=r"linear layers; give as many|needs Ω of shape"):
        models.transformed(network(), matrices(*omegas), matrices(*phis))


def test_whitened_activities_have_mean_zero_and_covariance_one():
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(50, 3, generator=generator, dtype=torch.float64).exp()
    a = torch.cat([a, torch.ones(50, 1, dtype=torch.float64)], 1)
    g = torch.randn(50, 2, generator=generator, dtype=torch.float64) * 3
    A, G = a.T @ a / 50, g.T @ g / 50
    (omega,), (phi,) = models.whitening([(A, G)])
    white = a @ omega.T
    torch.testing.assert_close(white[:, -1], torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(white[:, :-1].mean(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(white[:, :-1].T.cov(correction=0), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(phi.T @ G @ phi, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-9)
    (omega,), _ = models.whitening([(A, G)], homogeneous=False)
    torch.testing.assert_close(omega @ A @ omega.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-9)


def test_logistic_units_take_the_place_of_tanh():
    net = network()
    twin = models.logistic_twin(net)
    assert [type(m).__name__ for m in twin] == ["Linear", "Sigmoid", "Linear", "Linear"]
    x = torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(twin(x), net(x), rtol=1e-9, atol=1e-9)
