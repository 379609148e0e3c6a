"""Transposed convolutions: every option against the layer and brute force, every method against a convolution."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fisherviz as fv
from fisherviz.network.layers import make_layer
from tests.oracles import exact, laws, nets
from tests.oracles.checks import FLOAT32, assert_matches
from tests.training_runs import half_squares, trained

KINDS = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
CONVOLUTIONS = dict(zip(KINDS, [nn.Conv1d, nn.Conv2d, nn.Conv3d], strict=True))


def modules(kind):
    """One module for every combination of options that torch takes, with the output for an input."""
    x = torch.randn(2, 4, *(3, 4, 2)[: KINDS.index(kind) + 1], dtype=torch.float64)
    for k, s, p, d, g in itertools.product((1, 2, 3), (1, 2, 3), (0, 1, 2), (1, 2), (1, 2)):
        for more in range(max(s, d)):
            made = kind(4, 6, k, s, p, more, groups=g, dilation=d).double()
            try:
                yield made, x, made(x)
            except (RuntimeError, ValueError):
                continue  # nothing is left of the output, or the output padding is too large


@pytest.mark.parametrize("kind", KINDS)
def test_layer_is_its_matrix_on_its_inputs(kind):
    seen = 0
    for module, x, z in modules(kind):
        layer = make_layer("", module, dict(module.named_parameters()))
        wide = torch.cat([p.as_matrix(layer.parameters[p.name].detach().reshape(-1)) for p in layer.parts], 1)
        a = layer.inputs(x, z.shape)
        a = a if layer.groups > 1 else a.unsqueeze(2)
        found = torch.einsum("goi,ntgi->ntgo", wide.unflatten(0, (layer.groups, -1)), a).flatten(2)
        torch.testing.assert_close(found.mT.reshape(z.shape), z.detach(), rtol=0, atol=1e-12)
        seen += 1
    assert seen > 100


OPTIONS = st.fixed_dictionaries(
    {
        "kernel_size": st.integers(1, 3),
        "stride": st.integers(1, 3),
        "padding": st.integers(0, 1),
        "dilation": st.integers(1, 2),
        "groups": st.sampled_from([1, 2]),
        "bias": st.booleans(),
    }
)


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(KINDS), options=OPTIONS, more=st.integers(0, 1), seed=st.integers(0, 99))
def test_exact_fisher(kind, options, more, seed):
    torch.manual_seed(seed)
    more = min(more, max(options["stride"], options["dilation"]) - 1)
    net = nets.conv_net(kind(2, 2, output_padding=more, **options), kind(2, 2, 1))
    x = torch.randn(2, 2, *(3,) * (KINDS.index(kind) + 1), dtype=torch.float64)
    F = exact.fisher(net, x, laws.Gaussian())
    fisher = fv.Probe(net, "gaussian").fisher(x)
    assert [layer.path for layer in fisher.layers] == ["structured"] * 2
    assert_matches(fisher.to_dense(), F)
    v = torch.randn(len(F), dtype=torch.float64)
    assert_matches(fisher @ v, F @ v.numpy())
    assert_matches(fisher.diagonal(), np.diag(F))
    assert_matches(fisher.solve(v, 0.1), np.linalg.solve(F + 0.1 * np.eye(len(F)), v.numpy()))


def test_float32():
    net, x = nets.conv_net(nn.ConvTranspose2d(2, 4, 3, 2, 1, 1), nn.Conv2d(4, 2, 1)), torch.randn(3, 2, 3, 3)
    F = exact.fisher(net, x.double(), laws.Gaussian())
    assert_matches(fv.Probe(net.float(), "gaussian").fisher(x).to_dense(), F, FLOAT32)


@pytest.mark.parametrize("name", ["0.weight", "0.bias"])
@pytest.mark.parametrize("groups", [1, 2])
def test_frozen_half(name, groups):
    net = nets.conv_net(nn.ConvTranspose1d(2, 4, 3, 2, groups=groups), nn.Conv1d(4, 2, 1))
    net.get_parameter(name).requires_grad_(False)
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    fisher = fv.Probe(net, "gaussian").fisher(x)
    assert_matches(fisher.to_dense(), exact.fisher(net, x, laws.Gaussian()))
    assert fisher.layers[0].path == "structured"


def test_units():
    net, x = nets.conv_net(nn.ConvTranspose1d(2, 4, 3, 2, groups=2), nn.Conv1d(4, 2, 1)), torch.randn(3, 2, 3).double()
    F = exact.fisher(net, x, laws.Gaussian())
    weights = np.arange(12).reshape(2, 2, 3)  # (input channel and group, output channel of the group, pixel)
    rows = np.concatenate([weights.reshape(4, 3), 12 + np.arange(4)[:, None]], 1)
    assert_matches(fv.Probe(net, "gaussian").fisher(x).units("0"), np.stack([F[np.ix_(row, row)] for row in rows]))


class UNet(nn.Module):
    """Down and up again to the very size that came: the call chooses it."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(1, 2, 2, 2), nn.ConvTranspose2d(2, 2, 2, 2)

    def forward(self, x):
        up = self.up(torch.tanh(self.down(x)), output_size=x.shape[2:])
        return (up * x).flatten(2).mean(2)


@pytest.mark.parametrize("size", [(4, 4), (5, 4), (5, 5)])
def test_a_call_that_chooses_its_output_size(size):
    net, x = nets.randomised(UNet()), torch.randn(3, 1, *size, dtype=torch.float64)
    fisher = fv.Probe(net, "gaussian").fisher(x)
    assert_matches(fisher.to_dense(), exact.fisher(net, x, laws.Gaussian()))
    assert [layer.path for layer in fisher.layers] == ["structured"] * 2


class Spread(nn.Module):
    """Zeros between pixels and around them, or pixels off the border: a convolution follows."""

    def __init__(self, transposed):
        super().__init__()
        self.of = (transposed,)  # no submodule

    def forward(self, x):
        (t,) = self.of
        for d, stride in enumerate(t.stride):
            many = x.new_zeros(*x.shape[: 2 + d], stride * (x.shape[2 + d] - 1) + 1, *x.shape[3 + d :])
            many.movedim(2 + d, 0)[::stride] = x.movedim(2 + d, 0)
            x = many
        pads = []
        for d in reversed(range(x.dim() - 2)):
            around = t.dilation[d] * (t.kernel_size[d] - 1) - t.padding[d]
            pads += [around, around + t.output_padding[d]]
        return nn.functional.pad(x, pads)


def to_convolution(weight, groups):
    """A transposed convolution's weight, or any tensor in its form, in the form of the convolution's."""
    c, o, *kernel = weight.shape
    turned = weight.flip(tuple(range(2, weight.dim()))).reshape(groups, c // groups, o, *kernel)
    return turned.transpose(1, 2).reshape(groups * o, c // groups, *kernel)


def twins(kind, **options):
    """The same function by transposed convolutions and by convolutions; where the other's parameters stand."""
    torch.manual_seed(0)
    net = nets.conv_net(kind(2, 4, 3, 2, **options), kind(4, 2, 3, padding=1))  # eigenvalues all differ
    other, index, start = [], [], 0
    for module in net:
        if not isinstance(module, kind):
            other.append(module)
            continue
        twin = CONVOLUTIONS[kind](
            module.in_channels, module.out_channels, module.kernel_size, groups=module.groups, dilation=module.dilation
        ).double()
        twin.weight.data, twin.bias.data = to_convolution(module.weight.data, module.groups), module.bias.data.clone()
        other += [Spread(module), twin]
        places = torch.arange(module.weight.numel()).view(module.weight.shape)
        index += [start + to_convolution(places, module.groups).reshape(-1)]
        index += [start + places.numel() + torch.arange(len(module.bias))]
        start += places.numel() + len(module.bias)
    x = torch.randn(6, 2, *(3, 2, 2)[: KINDS.index(kind) + 1], dtype=torch.float64)
    return net, nn.Sequential(*other), x, torch.cat(index)


CASES = [
    (nn.ConvTranspose1d, {"output_padding": 1}),
    (nn.ConvTranspose2d, {"groups": 2}),
    (nn.ConvTranspose3d, {"dilation": 2}),
]


@pytest.mark.covering
@pytest.mark.filterwarnings("ignore:.*chain", "ignore:.*grouped")
@pytest.mark.parametrize(("kind", "options"), CASES)
@pytest.mark.parametrize("method", list(fv.approximations))
def test_methods_are_those_of_the_convolution(kind, options, method):
    net, other, x, index = twins(kind, **options)
    torch.testing.assert_close(net(x), other(x))
    found, twin = (fv.approximate(fv.Probe(m, "gaussian").fisher(x), method) for m in (net, other))
    assert_matches(found.to_dense().numpy()[np.ix_(index, index)], twin.to_dense(), 1e-9)
    v = torch.randn(len(index), dtype=torch.float64)
    damping = fv.FactoredTikhonov(0.3) if method.startswith("kfac") else 0.1
    assert_matches(found.solve(v, damping)[index], twin.solve(v[index], damping), 1e-8)


@pytest.mark.covering
@pytest.mark.filterwarnings("ignore:.*lambda", "ignore:.*damping")
@pytest.mark.parametrize("optimizer", ["KFAC", "EKFAC", "FOOF", "CWNGD", "TENGraD", "HessianFree"])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_optimizers_step_as_on_the_convolution(kind, options, optimizer):
    net, other, x, index = twins(kind, **options)
    loss = half_squares(x, torch.randn(6, 2, dtype=torch.float64))
    assert_matches(trained(optimizer, net, loss, 2)[index], trained(optimizer, other, loss, 2), 1e-8)


def test_pieces_that_fit_the_memory_are_those_of_the_output():
    """Unfolded inputs are as many as the output's pixels, however few the input has."""
    net = nets.conv_net(nn.ConvTranspose2d(2, 2, 4, 8), nn.Conv2d(2, 2, 1))
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    probe = fv.Probe(net, "gaussian")
    probe.fisher(x).diagonal()
    fixed, _ = probe.network.structure.example_bytes
    pixels = net[0](x).shape[2:].numel()
    assert fixed >= 8 * pixels * (2 * 16 + 1 + 2 + 1)
    assert fixed <= 8 * (pixels * (2 * 16 + 1 + 2 + 1) + math.prod(x.shape[1:]))
