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


@pytest.mark.parametrize("name", KINDS)
def test_foof_takes_the_moments_of_each_feature(name):
    """From what the module itself returns: its output is scale times input plus shift, whatever it normalises by."""
    net, x = made(name)
    module, where = net[0], features(net[0])
    with torch.no_grad():
        multiplied = x.clamp(max=0) if isinstance(module, nn.PReLU) else bare(module, x)
    count, last = module.weight.numel(), isinstance(module, nn.LayerNorm | nn.RMSNorm)
    rows = multiplied.reshape(5, -1, count) if last else multiplied.reshape(5, count, -1).mT
    rows = rows.flatten(0, 1)
    both = {"weight": rows, "bias": torch.ones_like(rows)}
    columns = torch.cat([both[key] for key, p in module.named_parameters() if p.requires_grad], 1).numpy()
    expected = columns.T @ columns / 5 * (where[:, None] == where)
    assert_matches(fv.approximate(fv.Probe(net, "gaussian").fisher(x), "foof").to_dense(), expected)


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
def test_in_float32(name):
    net, x = made(name)
    F = exact.fisher(net, x, laws.Gaussian())
    found = fv.Probe(net.float(), "gaussian").fisher(x.float()).to_dense()
    assert found.dtype == torch.float32
    assert_matches(found, F, 1e-5)


@pytest.mark.parametrize("optimizer", ["kfac", "layer", "cw-ngd", "foof"])
@pytest.mark.parametrize("name", ["batch norm of vectors", "batch norm of images", "layer norm of tokens", "RMS norm"])
def test_a_training_step_divides_by_the_block_of_each_feature(name, optimizer):
    """BatchNorm by the batch's own moments: each example's gradient is that at the layer's output."""
    net, x = made(name)
    net.train()
    module, where = net[0], features(net[0])
    y, damping = torch.randn(5, 2, dtype=torch.float64), 0.3

    kept = {}
    handle = module.register_forward_hook(lambda m, args, out: (out.retain_grad(), kept.update(out=out))[0])
    z = net(x)
    (0.5 * (z - y).square().sum()).backward()
    handle.remove()
    count, last = module.weight.numel(), isinstance(module, nn.LayerNorm | nn.RMSNorm)
    spread = (lambda t: t.reshape(5, -1, count)) if last else (lambda t: t.reshape(5, count, -1).mT)
    with torch.no_grad():
        inputs = spread(bare(module, x))
    g = spread(kept["out"].grad)
    both = {"weight": inputs, "bias": torch.ones_like(inputs)}
    names = [key for key, _ in module.named_parameters()]
    each = torch.cat([(g * both[key]).sum(1) for key in names], 1)
    F = (each.T @ each / 5).numpy()
    if optimizer == "foof":
        rows = torch.cat([both[key] for key in names], 2).flatten(0, 1)
        F = (rows.T @ rows / 5).numpy()
    mask = np.ones_like(F) if optimizer == "layer" else where[:, None] == where
    gradient = torch.cat([p.grad.reshape(-1) for p in module.parameters()]).numpy() / 5
    expected = -np.linalg.solve(F * mask + damping * np.eye(len(F)), gradient)

    net.zero_grad()
    before = torch.cat([p.detach().reshape(-1).clone() for p in module.parameters()])
    options = {"lr": 1.0, "damping": damping, "momentum": 0.0, "kind": "empirical", "decay": 0.0}
    preconditioned = fv.optim.NaturalGradient(net, "gaussian", optimizer, **options)
    (0.5 * (net(x) - y).square().sum() / 5).backward()
    preconditioned.step()
    after = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    assert_matches(after - before, expected, 1e-8)


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
