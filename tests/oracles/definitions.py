"""Each approximation by its definition as a dense matrix, and networks whose layers share weights."""

import numpy as np
import torch
from torch import nn

from tests.oracles import exact, kronecker, nets, order, trace

METHODS = [
    "identity",
    "diagonal",
    "layer",
    "cw-ngd",
    "kfac-full",
    "kfac",
    "kfac-tridiagonal",
    "kfra",
    "ekfac",
    "foof",
    "centred",
    "nearest-kronecker",
]


def nearest(F, layers, rank=1):
    blocks = []
    for part, (d_out, fan_in, bias) in zip(order.segments(layers), layers, strict=True):
        blocks.append(kronecker.nearest_kronecker(F[part, part], d_out, fan_in + bias, rank))
    return kronecker.block_diagonal(blocks)


def definition(method, net, x, law, targets=None, setting="expand"):
    """The dense approximation in unit order, from moments and the brute-force Fisher."""
    layers, moments = trace.layers_of(net), trace.moments(net, x, law, targets)
    F = order.reorder(exact.fisher(net, x, law, targets=targets), layers, "unit")
    A, G = kronecker.factors(moments, setting)
    return {
        "identity": lambda: np.eye(len(F)),
        "diagonal": lambda: np.diag(np.diag(F)),
        "layer": lambda: kronecker.same_layer(F, order.segments(layers)),
        "cw-ngd": lambda: kronecker.same_unit(F, layers),
        "kfac-full": lambda: kronecker.full(A, G),
        "kfac": lambda: kronecker.kfac(A, G),
        "kfac-tridiagonal": lambda: kronecker.tridiagonal(A, G),
        "kfra": lambda: kronecker.kfra(A, G, trace.passed_on(net, x)),
        "ekfac": lambda: kronecker.ekfac(moments, A, G),
        "foof": lambda: kronecker.foof(moments),
        "centred": lambda: kronecker.centred(moments, A, G),
        "nearest-kronecker": lambda: nearest(F, layers),
    }[method]()


SHARING = {
    "tokens": lambda: (nets.tokens_net(), torch.randn(6, 4, 3, dtype=torch.float64)),
    "convolutions": lambda: (
        nets.conv_net(nn.Conv2d(1, 3, 2), nn.Conv2d(3, 2, 2, padding=1)),
        torch.randn(4, 1, 4, 3, dtype=torch.float64),
    ),
    "strided and dilated": lambda: (
        nets.conv_net(nn.Conv1d(2, 3, 2, stride=2, padding=1), nn.Conv1d(3, 2, 2, dilation=2)),
        torch.randn(4, 2, 7, dtype=torch.float64),
    ),
    "circular without bias": lambda: (
        nets.conv_net(
            nn.Conv2d(1, 3, 3, padding=1, padding_mode="circular", bias=False), nn.Conv2d(3, 2, 1, bias=False)
        ),
        torch.randn(4, 1, 4, 5, dtype=torch.float64),
    ),
    "three dimensions": lambda: (
        nets.conv_net(nn.Conv3d(1, 2, 2), nn.Conv3d(2, 2, 1)),
        torch.randn(3, 1, 3, 2, 3, dtype=torch.float64),
    ),
    "convolution and dense": lambda: (
        nets.randomised(nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2))),
        torch.randn(10, 1, 5, dtype=torch.float64),
    ),
}
