"""`Fisher.natural_gradient` against a dense solve with per-example gradients from plain autograd, in float64."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherviz as fv


def network(kind):
    torch.manual_seed(0)
    if kind == "convolution":
        layers = [nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)]
        return nn.Sequential(*layers).double(), torch.randn(7, 2, 4, 4, dtype=torch.float64)
    layers = [nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 7, bias=False), nn.Tanh(), nn.Linear(7, 3)]
    return nn.Sequential(*layers).double(), torch.randn(7, 9, dtype=torch.float64)


def score(model, x, y):
    """The gradient of one example's nll, flat."""
    loss = F.cross_entropy(model(x[None]), y[None])
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])


def expected(model, x, y, kind, damping, total):
    if kind == "empirical":
        second = sum(torch.outer(s, s) for s in (score(model, a, b) for a, b in zip(x, y, strict=True)))
    else:
        second = 0
        for a in x:
            p = model(a[None]).softmax(1)[0].detach()
            for c in range(3):
                s = score(model, a, torch.tensor(c))
                second = second + p[c] * torch.outer(s, s)
    gradient = sum(score(model, a, b) for a, b in zip(x, y, strict=True))
    scale = 1.0 if total else 1 / len(x)
    eye = torch.eye(len(gradient), dtype=torch.float64)
    return torch.linalg.solve(scale * second + damping * eye, scale * gradient)


@pytest.mark.parametrize("model", ["dense", "convolution"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("batches", [1, 2])
def test_it_is_the_dense_solve(model, kind, reduction, batches):
    net, x = network(model)
    y = torch.tensor([0, 1, 2, 1, 0, 2, 2])
    data = (x, y) if batches == 1 else [(x[:4], y[:4]), (x[4:], y[4:])]
    found = fv.Probe(net, "categorical").fisher(data, kind=kind, reduction=reduction).natural_gradient(0.03)
    wanted = expected(net, x, y, kind, 0.03, reduction == "sum")
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_it_is_the_dense_solve_where_examples_have_different_numbers_of_outputs():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(20, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    batches = [(torch.randint(20, (2, T)), torch.randint(3, (2, T))) for T in (3, 5)]
    found = fv.Probe(net, "categorical").fisher(batches).natural_gradient(0.1)
    x, y = (torch.cat([part.reshape(-1) for part in parts]) for parts in zip(*batches, strict=True))
    wanted = expected(net, x, y, "exact", 4 * 0.1, True)  # of four examples, whose tokens are independent
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("samples", [1, 3])
def test_it_is_the_solve_with_the_fisher_of_the_same_sampled_labels(samples):
    net, x = network("dense")
    y = torch.tensor([0, 1, 2, 1, 0, 2, 2])
    fisher = fv.Probe(net, "categorical").fisher(x, y, kind="mc", samples=samples)
    found = fisher.natural_gradient(0.03)
    dense, gradient = fisher.to_dense(), sum(score(net, a, b) for a, b in zip(x, y, strict=True)) / len(x)
    wanted = torch.linalg.solve(dense + 0.03 * torch.eye(len(dense), dtype=torch.float64), gradient)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf")])
def test_a_damping_out_of_range_is_refused(damping):
    net, x = network("dense")
    fisher = fv.Probe(net, "categorical").fisher(x, torch.zeros(7, dtype=torch.long))
    with pytest.raises(ValueError, match="damping must be a finite number of at least 0"):
        fisher.natural_gradient(damping)


def test_without_labels_it_is_refused():
    net, x = network("dense")
    with pytest.raises(ValueError, match="needs the data's labels"):
        fv.Probe(net, "categorical").fisher(x).natural_gradient(0.1)


@pytest.mark.parametrize("model", ["dense", "convolution"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("damping", [1e-3, 1e-5, 1e-7])
def test_in_float32_it_solves_at_small_damping(model, kind, damping):
    """Three digits of the residual (F + λI)d − ∇h, whatever λ: float32 alone would keep none at the smallest."""
    net, x = network(model)
    y = torch.tensor([0, 1, 2, 1, 0, 2, 2])
    F64 = fv.Probe(net, "categorical").fisher(x, y, kind=kind).to_dense()
    gradient = sum(score(net, a, b) for a, b in zip(x, y, strict=True)) / len(x)
    found = fv.Probe(net.float(), "categorical").fisher(x.float(), y, kind=kind).natural_gradient(damping).double()
    residual = F64 @ found + damping * found - gradient
    assert residual.norm() < 1e-3 * gradient.norm()


def test_a_damping_below_the_networks_rounding_is_said():
    net, x = network("dense")
    y = torch.tensor([0, 1, 2, 1, 0, 2, 2])
    fisher = fv.Probe(net.float(), "categorical").fisher(x.float(), y)
    with pytest.warns(UserWarning, match="below float32's rounding of this Fisher"):
        fisher.natural_gradient(1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fisher.natural_gradient(1e-4)
        fv.Probe(net.double(), "categorical").fisher(x, y).natural_gradient(1e-10)
