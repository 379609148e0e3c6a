"""Tiny networks in float64 with random weights and biases, and inputs to go with them."""

from itertools import pairwise

import torch
from torch import nn


def randomised(model):
    """Float64, evaluation mode, every parameter and running statistic away from its starting value."""
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.7 * torch.randn_like(p))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn_like(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand_like(buffer))
    return model


def mlp(*widths, activation=nn.Tanh, bias=True):
    """Linear layers with an activation between them."""
    modules = []
    for d_in, d_out in pairwise(widths):
        modules += [nn.Linear(d_in, d_out, bias=bias), activation()]
    return randomised(nn.Sequential(*modules[:-1]))


def vectors(N, d):
    return torch.randn(N, d, dtype=torch.float64)


class MeanTokens(nn.Module):
    """(N, T, d) to (N, d)."""

    def forward(self, x):
        return x.mean(1)


def tokens_net(d=3, hidden=4, out=2, *, bias=True):
    """Two Linear layers shared over tokens, averaged at the end."""
    return randomised(
        nn.Sequential(nn.Linear(d, hidden, bias=bias), nn.Tanh(), nn.Linear(hidden, out, bias=bias), MeanTokens())
    )


class MeanPixels(nn.Module):
    """(N, C, ...) to (N, C)."""

    def forward(self, x):
        return x.flatten(2).mean(2)


def conv_net(first, *more):
    """Convolutions with tanh between them, averaged over pixels."""
    modules = [first]
    for conv in more:
        modules += [nn.Tanh(), conv]
    return randomised(nn.Sequential(*modules, MeanPixels()))
