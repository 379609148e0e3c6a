"""What every registered approximation promises: its products, solves and norms are those of its own dense matrix."""

import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.approximations import fit_all
from fisherviz.statistics import Diagonal
from tests.oracles import nets

NETWORKS = {
    "perceptron": lambda: (nets.mlp(3, 4, 2), nets.vectors(9, 3)),
    "without biases": lambda: (nets.mlp(3, 4, 2, bias=False), nets.vectors(9, 3)),
    "shared over tokens": lambda: (nets.tokens_net(), torch.randn(6, 4, 3, dtype=torch.float64)),
    "convolutions": lambda: (
        nets.conv_net(nn.Conv2d(1, 3, 2), nn.Conv2d(3, 2, 2, padding=1)),
        torch.randn(4, 1, 4, 3, dtype=torch.float64),
    ),
}
every_approximation = pytest.mark.parametrize("method", list(fv.approximations))
every_network = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS.keys())


def close(actual, expected):
    return torch.allclose(actual, expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max()))


@every_approximation
@every_network
def test_it_is_its_dense_matrix(method, build):
    net, x = build()
    fisher = fv.Probe(net, "categorical").fisher(x)
    approximation = fv.approximate(fisher, method)
    M = approximation.to_dense()
    P = len(M)
    assert M.shape == approximation.shape == fisher.shape
    assert close(M, M.T)
    V = torch.randn(P, 3, dtype=torch.float64)
    assert close(approximation @ V, M @ V)
    assert close(approximation @ V[:, 0], M @ V[:, 0])
    assert close(approximation.diagonal(), M.diagonal())
    damped = M + 0.3 * torch.eye(P, dtype=torch.float64)
    assert close(approximation.solve(V, 0.3), torch.linalg.solve(damped, V))
    assert close(approximation.damped(0.3).to_dense(), damped)
    assert close(approximation.inverse(0.3).to_dense(), torch.linalg.inv(damped))
    assert close(approximation.scale(2.0).to_dense(), 2 * M)
    assert approximation.norm("fro") == pytest.approx(float(torch.linalg.matrix_norm(M)), rel=1e-8)
    assert approximation.norm("trace") == pytest.approx(float(M.trace()), rel=1e-8)
    assert approximation.norm("spectral") == pytest.approx(float(torch.linalg.matrix_norm(M, 2)), rel=1e-4)
    assert approximation.seconds > 0
    assert approximation.bytes >= 0
    pieces = V[:, 0].split([p.numel() for p in net.parameters()])
    named = {name: v.reshape(p.shape) for (name, p), v in zip(net.named_parameters(), pieces, strict=True)}
    product = approximation @ named
    assert close(torch.cat([product[name].reshape(-1) for name, _ in net.named_parameters()]), M @ V[:, 0])


@every_approximation
def test_fitted_beside_the_others_it_is_what_it_is_alone(method):
    net, x = NETWORKS["shared over tokens"]()
    probe = fv.Probe(net, "bernoulli")
    others = {name: cls() for name, cls in fv.approximations.items()}
    assert fv.approximations[method] is type(others[method])
    assert all(error is None for error in fit_all(probe.fisher(x), list(others.values())))
    assert close(others[method].to_dense(), fv.approximate(probe.fisher(x), method).to_dense())


def test_an_approximation_goes_by_the_name_of_its_class_until_it_is_registered():
    class Mine(fv.approximations["diagonal"]):
        """A diagonal."""

        def statistics(self, layer):
            return {"diagonal": Diagonal(layer.name)}

    assert Mine.name == "Mine"
    assert fv.approximations["diagonal"].name == "diagonal"
