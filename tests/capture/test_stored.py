"""Layers whose weights do not lie in memory as in W̄: every quantity, every method and every optimizer all the same."""

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.oracles import exact, laws, nets
from tests.oracles.checks import assert_matches
from tests.training_runs import half_squares, trained


class Conv1D(nn.Module):
    """GPT-2's linear layer, (d_in, d_out), as in Hugging Face's transformers."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


Conv1D.forward.__module__, Conv1D.forward.__qualname__ = "transformers.pytorch_utils", "Conv1D.forward"


class Tokens(nn.Module):
    """The mean over tokens."""

    def forward(self, x):
        return x.mean(1)


def twins(shape):
    """The same function twice, of Conv1D and of Linear."""
    torch.manual_seed(0)
    middle = [nn.Tanh(), *([Tokens()] if len(shape) > 1 else [])]
    one = nets.randomised(nn.Sequential(Conv1D(4, 3), *middle, Conv1D(2, 4)))
    other = nn.Sequential(nn.Linear(3, 4), *middle, nn.Linear(4, 2)).double()
    for mine, its in zip(one, other, strict=True):
        if isinstance(mine, Conv1D):
            its.weight.data, its.bias.data = mine.weight.data.T.clone(), mine.bias.data.clone()
    return one, other, torch.randn(6, *shape, dtype=torch.float64)


def reorder(other):
    """Index that turns the twin's flat vector into that of the first."""
    places = torch.arange(sum(p.numel() for p in other.parameters()))
    parts = places.split([p.numel() for p in other.parameters()])
    turned = [part.view(p.shape).movedim(0, -1).reshape(-1) for part, p in zip(parts, other.parameters(), strict=True)]
    return torch.cat(turned).numpy()


@pytest.mark.parametrize("shape", [(3,), (5, 3)], ids=["vectors", "tokens"])
def test_exact_quantities(shape):
    net, other, x = twins(shape)
    F, index = exact.fisher(net, x, laws.Gaussian()), reorder(other)
    assert_matches(F, exact.fisher(other, x, laws.Gaussian())[np.ix_(index, index)])
    probe = fv.Probe(net, "gaussian")
    fisher = probe.fisher(x)
    assert [layer.path for layer in probe.layers] == ["structured"] * 2
    assert [(layer.in_features, layer.out_features) for layer in probe.layers] == [(3, 4), (4, 2)]
    assert_matches(fisher.to_dense(), F)
    assert_matches(fisher.block(0, 1), F[:16, 16:])
    assert_matches(fisher.block(0), F[:16, :16])
    v = torch.randn(len(F), dtype=torch.float64)
    assert_matches(fisher @ v, F @ v.numpy(), 1e-10)
    assert_matches(fisher.solve(v, 0.1), np.linalg.solve(F + 0.1 * np.eye(len(F)), v.numpy()), 1e-9)
    y = torch.randn(6, 2, dtype=torch.float64)
    found = fv.Probe(net, "gaussian").fisher((x, y))
    expected = np.linalg.solve(F + 0.1 * np.eye(len(F)), found.gradient().numpy())
    assert_matches(found.natural_gradient(damping=0.1), expected, 1e-9)
    assert_matches(fisher.diagonal(), np.diag(F))


@pytest.mark.covering
@pytest.mark.filterwarnings("ignore:.*chain")
@pytest.mark.parametrize("method", list(fv.approximations))
@pytest.mark.parametrize("shape", [(3,), (5, 3)], ids=["vectors", "tokens"])
def test_methods_are_those_of_the_twin(shape, method):
    net, other, x = twins(shape)
    index = reorder(other)
    found, twin = (fv.approximate(fv.Probe(m, "gaussian").fisher(x), method) for m in (net, other))
    assert_matches(found.to_dense(), twin.to_dense()[np.ix_(index, index)], 1e-9)
    v = torch.randn(len(index), dtype=torch.float64)
    back = torch.as_tensor(np.argsort(index))
    assert_matches(found.solve(v, 0.1), twin.solve(v[back], 0.1)[index], 1e-8)


@pytest.mark.filterwarnings("ignore:.*lambda", "ignore:.*damping")
@pytest.mark.parametrize("optimizer", ["KFAC", "EKFAC", "FOOF", "CWNGD", "TENGraD", "KBFGS", "HessianFree"])
@pytest.mark.parametrize("shape", [(3,), (5, 3)], ids=["vectors", "tokens"])
def test_optimizers_step_as_on_the_twin(shape, optimizer):
    net, other, x = twins(shape)
    if optimizer == "KBFGS" and len(shape) > 1:
        pytest.skip("K-BFGS is not defined for weight sharing")
    loss = half_squares(x, torch.randn(6, 2, dtype=torch.float64))
    assert_matches(trained(optimizer, net, loss), trained(optimizer, other, loss)[reorder(other)], 1e-8)
