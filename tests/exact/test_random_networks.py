"""Networks that nobody chose: convolutions and dense layers drawn at random, against the oracle."""

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fisherviz as fv
from tests.oracles import exact, kronecker, laws, nets, trace
from tests.oracles.checks import assert_matches

quickly = settings(max_examples=12, deadline=None, derandomize=True)
activations = st.sampled_from([nn.Tanh, nn.Sigmoid, nn.Identity, nn.SiLU])


@st.composite
def convolutions(draw):
    """One or two convolutions whose kernels fit the image, with any padding, stride, dilation and groups."""
    dims = draw(st.integers(1, 2))
    channels, size = draw(st.sampled_from([1, 2])), [draw(st.integers(3, 4)) for _ in range(dims)]
    x_shape, modules = (channels, *size), []
    for _ in range(draw(st.integers(1, 2))):
        groups = draw(st.sampled_from([1, channels]))
        module = (nn.Conv1d, nn.Conv2d)[dims - 1](
            channels,
            groups * draw(st.integers(1, 2)),
            tuple(draw(st.integers(1, min(2, s))) for s in size),
            stride=tuple(draw(st.integers(1, 2)) for _ in size),
            padding=tuple(draw(st.integers(0, min(2, s - 1))) for s in size),
            padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
            groups=groups,
            bias=draw(st.booleans()),
        )
        modules += [module, draw(activations)()]
        channels, *size = module(torch.zeros(1, channels, *size)).shape[1:]
    modules.append(draw(st.sampled_from([nets.MeanPixels(), nn.Flatten()])))
    return nn.Sequential(*modules), x_shape


@st.composite
def dense_layers(draw):
    """Up to three Linear layers on vectors or tokens."""
    widths = [draw(st.integers(1, 4)) for _ in range(draw(st.integers(2, 4)))]
    modules = []
    for d_in, d_out in pairwise(widths):
        modules += [nn.Linear(d_in, d_out, bias=draw(st.booleans())), draw(activations)()]
    tokens = draw(st.integers(0, 3))
    return nn.Sequential(*modules, *[nets.MeanTokens()] * (tokens > 0)), (*[tokens] * (tokens > 0), widths[0])


@quickly
@given(
    drawn=st.one_of(convolutions(), dense_layers()),
    N=st.integers(1, 4),
    batch=st.integers(1, 4),
    empirical=st.booleans(),
    seed=st.integers(0, 999),
)
def test_exact_quantities_and_factors_of_a_random_network(drawn, N, batch, empirical, seed):
    torch.manual_seed(seed)
    net, x = nets.randomised(drawn[0]), torch.randn(N, *drawn[1], dtype=torch.float64)
    law = laws.Gaussian()
    y = law.draw(N, net(x).shape[1]) if empirical else None
    F = exact.fisher(net, x, law, targets=y)
    data = [(x[n : n + batch], y[n : n + batch]) if empirical else x[n : n + batch] for n in range(0, N, batch)]
    probe, kind = fv.Probe(net, "gaussian"), "empirical" if empirical else "exact"
    v = nets.vectors(len(F), 1)[:, 0]
    assert_matches(probe.fisher(data, kind=kind).to_dense(), F)
    assert_matches(probe.fisher(data, kind=kind) @ v, F @ v.numpy())
    assert_matches(probe.fisher(data, kind=kind).diagonal(), np.diag(F))
    moments = trace.moments(net, x, law, y)
    kfac = fv.approximate(probe.fisher(data, kind=kind), "kfac").to_dense(order="unit")
    assert_matches(kfac, kronecker.kfac(*kronecker.factors(moments)))
