"""Layers that scale single features (normalisation, PReLU): exact quantities, and what stands for them in methods."""

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.oracles import exact, laws, nets
from tests.oracles.checks import assert_matches

pytestmark = pytest.mark.filterwarnings("ignore:.*single features", "ignore:BatchNorm in training mode")

FACTORED = ("kfac", "ekfac", "kfac-full", "kfac-tridiagonal", "nearest-kronecker")


class Sums(nn.Module):
    """Two outputs per example from any shape, to which each entry counts differently."""

    def forward(self, x):
        flat = x.flatten(1)
        return torch.stack([flat.square().mean(1), (flat * torch.linspace(-1, 1, flat.shape[1]).to(flat)).mean(1)], 1)


def frozen(module, name):
    getattr(module, name).requires_grad_(False)
    return module


KINDS = {
    "batch norm of vectors": (lambda: nn.BatchNorm1d(4), (4,)),
    "batch norm of sequences": (lambda: nn.BatchNorm1d(4), (4, 3)),
    "batch norm of images": (lambda: nn.BatchNorm2d(4), (4, 3, 2)),
    "batch norm of volumes": (lambda: nn.BatchNorm3d(2), (2, 2, 1, 3)),
    "batch norm of one channel": (lambda: nn.BatchNorm2d(1), (1, 3, 2)),
    "batch norm, shift frozen": (lambda: frozen(nn.BatchNorm2d(4), "bias"), (4, 3, 2)),
    "batch norm, scale frozen": (lambda: frozen(nn.BatchNorm2d(4), "weight"), (4, 3, 2)),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 3, 2)),
    "instance norm by running moments": (
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        (4, 3, 2),
    ),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3)),
    "group norm of vectors": (lambda: nn.GroupNorm(2, 4), (4,)),
    "layer norm of vectors": (lambda: nn.LayerNorm(4), (4,)),
    "layer norm of tokens": (lambda: nn.LayerNorm(4), (3, 4)),
    "layer norm over two dimensions": (lambda: nn.LayerNorm((3, 2)), (2, 3, 2)),
    "layer norm without shift": (lambda: nn.LayerNorm(4, bias=False), (3, 4)),
    "RMS norm": (lambda: nn.RMSNorm(4), (3, 4)),
    "PReLU of all": (lambda: nn.PReLU(), (4, 3)),
    "PReLU by channel": (lambda: nn.PReLU(4), (4, 3, 2)),
}


def made(name):
    build, shape = KINDS[name]
    torch.manual_seed(0)
    net = nets.randomised(nn.Sequential(build(), Sums()))
    return net, torch.randn(5, *shape, dtype=torch.float64)


def features(module):
    """For every entry of the layer's torch-order vector, the feature that it belongs to."""
    return np.concatenate([np.arange(p.numel()) for p in module.parameters() if p.requires_grad])


@pytest.mark.parametrize("name", KINDS)
def test_exact_quantities_without_a_loop_or_vmap(name, monkeypatch):
    net, x = made(name)
    monkeypatch.setattr("fisherviz.capture.take.generic_captures", None)
    probe = fv.Probe(net, "gaussian")
    fisher = probe.fisher(x)
    F = exact.fisher(net, x, laws.Gaussian())
    assert_matches(fisher.to_dense(), F)
    (layer,) = probe.layers
    assert layer.path == "structured"
    assert (layer.in_features, layer.out_features) == (int(net[0].weight.requires_grad), net[0].weight.numel())
    where = features(net[0])
    for unit, block in enumerate(fisher.units(layer.name)):
        assert_matches(block, F[np.ix_(where == unit, where == unit)])
    v = torch.randn(len(F), dtype=torch.float64)
    assert_matches(fisher @ v, F @ v.numpy(), 1e-10)
    assert_matches(fisher.solve(v, 0.1), np.linalg.solve(F + 0.1 * np.eye(len(F)), v.numpy()), 1e-9)


@pytest.mark.covering
@pytest.mark.parametrize("method", FACTORED)
@pytest.mark.parametrize("name", KINDS)
def test_methods_of_factors_take_the_exact_block_of_each_feature(name, method):
    net, x = made(name)
    F = exact.fisher(net, x, laws.Gaussian())
    fisher = fv.Probe(net, "gaussian").fisher(x)
    where = features(net[0])
    expected = F * (where[:, None] == where)
    assert_matches(fv.approximate(fisher, method).to_dense(), expected)
    assert_matches(fv.approximate(fisher, method, per_feature="block").to_dense(), F)
    assert_matches(fv.approximate(fisher, method, per_feature="diagonal").to_dense(), np.diag(np.diag(F)))
    assert_matches(fv.approximate(fisher, "cw-ngd").to_dense(), expected)


def columns(module, x):
    """What each trained entry multiplies, (N, T, P), from what the module itself returns, whatever it normalises by."""
    with torch.no_grad():
        rows = spread(module, x.clamp(max=0) if isinstance(module, nn.PReLU) else bare(module, x))
    both = {"weight": rows, "bias": torch.ones_like(rows)}
    return torch.cat([both[key] for key, p in module.named_parameters() if p.requires_grad], 2)


def spread(module, t):
    """(N, T, features)."""
    count = module.weight.numel()
    last = isinstance(module, nn.LayerNorm | nn.RMSNorm)
    return t.reshape(len(t), -1, count) if last else t.reshape(len(t), count, -1).mT


def bare(module, x):
    """The output with a scale of one and without shift."""
    weight, bias = module.weight.clone(), None if getattr(module, "bias", None) is None else module.bias.clone()
    module.weight.fill_(1)
    if bias is not None:
        module.bias.zero_()
    out = module(x)
    module.weight.copy_(weight)
    if bias is not None:
        module.bias.copy_(bias)
    return out


@pytest.mark.parametrize("name", KINDS)
def test_foof_takes_the_moments_of_each_feature(name):
    net, x = made(name)
    rows, where = columns(net[0], x).flatten(0, 1).numpy(), features(net[0])
    expected = rows.T @ rows / len(x) * (where[:, None] == where)
    assert_matches(fv.approximate(fv.Probe(net, "gaussian").fisher(x), "foof").to_dense(), expected)


@pytest.mark.parametrize("name", KINDS)
def test_in_float32(name):
    net, x = made(name)
    F = exact.fisher(net, x, laws.Gaussian())
    found = fv.Probe(net.float(), "gaussian").fisher(x.float()).to_dense()
    assert found.dtype == torch.float32
    assert_matches(found, F, 1e-5)


@pytest.mark.covering
@pytest.mark.parametrize("optimizer", ["kfac", "layer", "cw-ngd", "foof"])
@pytest.mark.parametrize("name", KINDS)
def test_a_training_step_divides_by_the_block_of_each_feature(name, optimizer):
    """BatchNorm by the batch's own moments: each example's gradient is that at the layer's output."""
    net, x = made(name)
    net.train()
    module, where, n = net[0], features(net[0]), len(x)
    trained = [p for p in module.parameters() if p.requires_grad]
    y, damping = torch.randn(n, 2, dtype=torch.float64), 0.3

    out = module(x)
    (g,) = torch.autograd.grad(0.5 * (net[1](out) - y).square().sum(), out)
    a = columns(module, x)
    scores = spread(module, g).repeat(1, 1, len(trained))
    each = (scores * a).sum(1)
    gradient = each.mean(0).numpy()
    rows = a.flatten(0, 1) if optimizer == "foof" else each
    F = (rows.T @ rows / n).numpy() * (1 if optimizer == "layer" else where[:, None] == where)
    expected = -np.linalg.solve(F + damping * np.eye(len(F)), gradient)

    before = torch.cat([p.detach().reshape(-1).clone() for p in trained])
    options = {"lr": 1.0, "damping": damping, "momentum": 0.0, "kind": "empirical", "decay": 0.0}
    preconditioned = fv.optim.NaturalGradient(net, "gaussian", optimizer, **options)
    (0.5 * (net(x) - y).square().sum() / n).backward()
    preconditioned.step()
    after = torch.cat([p.detach().reshape(-1) for p in trained])
    assert_matches(after - before, expected, 1e-8)


def test_k_bfgs_leaves_them_plain_and_records_nothing_there():
    torch.manual_seed(0)
    net = nets.randomised(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))).train()
    optimizer = fv.optim.KBFGS(net, "gaussian", lr=0.1, momentum=0.0)
    x, y, start = torch.randn(6, 4).double(), torch.randn(6, 2).double(), net[1].weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * (net(x) - y).square().sum(1).mean()
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="'1' have no factors and are left plain by K-BFGS"):
        closure()
    gradient = net[1].weight.grad.clone()
    assert not net[1]._forward_hooks
    optimizer.step(closure)
    assert_matches(net[1].weight, start - 0.1 * gradient)


def test_a_residual_network_is_compared_by_every_method():
    """Nothing of a small ResNet is left to the generic path, and no method is left out."""

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.inner = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
            )

        def forward(self, x):
            return x + self.inner(x)

    torch.manual_seed(0)
    net = nets.randomised(
        nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), Block(3), nets.MeanPixels(), nn.Linear(3, 3))
    ).eval()
    x = torch.randn(12, 1, 5, 5, dtype=torch.float64)
    probe = fv.Probe(net, "categorical")
    fisher = probe.fisher(x)
    assert_matches(fisher.to_dense(), exact.fisher(net, x, laws.Categorical()))
    comparison = fv.compare(fisher, progress=False)
    assert {layer.path for layer in probe.layers} == {"structured"}
    assert set(fv.approximations) <= set(comparison.frame["method"])
    said = [note for note in comparison.meta["notes"] if "single features" in note]
    assert len(said) == 1
