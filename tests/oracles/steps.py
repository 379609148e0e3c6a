"""A small tanh network by hand, and steps by explicit dense matrices: what the optimizers' steps are
compared with.

Layers are matrices W̄ (d_out, d_in + 1) with the bias last, vectors are W̄ row by row; nothing of the
package is used.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

WIDTHS = (4, 5, 3, 3)


def net(seed=1, widths=WIDTHS, activation=nn.Tanh):
    generator = torch.Generator().manual_seed(seed)
    modules = []
    for d_in, d_out in pairwise(widths):
        modules += [nn.Linear(d_in, d_out), activation()]
    model = nn.Sequential(*modules[:-1]).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.6 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def data(N=12, seed=2, widths=WIDTHS):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, widths[0], generator=generator, dtype=torch.float64)
    return x, torch.randint(widths[-1], (N,), generator=generator)


def matrices(model):
    return [torch.cat([m.weight, m.bias[:, None]], 1).detach().clone() for m in model if isinstance(m, nn.Linear)]


def moments(model, x, vectors):
    """Inputs a (N, da) and pseudo-gradients g (K, N, dg) of each layer of a tanh network, by the chain rule."""
    W = matrices(model)
    inputs, slopes, h = [], [], x
    for i, M in enumerate(W):
        a = torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype)], 1)
        inputs.append(a)
        s = a @ M.T
        h = torch.tanh(s) if i + 1 < len(W) else s
        slopes.append(1 - h**2)
    g = vectors(h)
    out = []
    for i in reversed(range(len(W))):
        out.insert(0, (inputs[i], g))
        if i:
            g = (g @ W[i][:, :-1]) * slopes[i - 1]
    return out


def exact_vectors(z):
    """Columns of a root of diag(p) - p pᵀ for each example, by eigendecomposition."""
    p = torch.softmax(z, 1)
    values, basis = torch.linalg.eigh(torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
    return (basis * values.clamp_min(0).sqrt()[:, None, :]).permute(2, 0, 1)


def scores(y):
    return lambda z: (torch.softmax(z, 1) - F.one_hot(y, z.shape[1]))[None]


def sampled(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(z):
        u = torch.rand(len(z), 1, generator=generator, dtype=torch.float64)  # label c where P(y < c) <= u < P(y <= c)
        y = (u >= torch.softmax(z, 1).float().double().cumsum(1)[:, :-1]).sum(1)
        return scores(y)(z)

    return draw


def per_example(layers):
    """Rows vec(g aᵀ) of all layers side by side, (K N, P)."""
    return torch.cat([(g[:, :, :, None] * a[None, :, None, :]).flatten(2).flatten(0, 1) for a, g in layers], 1)


def closure_of(opt, model, x, y):
    """What `step` evaluates: the mean loss, backpropagated."""

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def gradient(model, x, y):
    """The mean loss's gradient, one (d_out, da) matrix per layer."""
    return [(g[0].T @ a) / len(x) for a, g in moments(model, x, scores(y))]


def factors(layers, N):
    return [(a.T @ a / N, torch.einsum("kni,knj->ij", g, g) / N) for a, g in layers]


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def damped_pair(A, G, gamma):
    pi = ((A.trace() / len(A)) / (G.trace() / len(G))) ** 0.5
    return A + pi * gamma * eye(len(A)), G + gamma / pi * eye(len(G))


def loss_backward(opt, model, x, y):
    opt.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def moved(before, after):
    return [new - old for old, new in zip(before, after, strict=True)]


def assert_same(found, expected, tolerance=1e-9):
    for left, right in zip(found, expected, strict=True):
        gap = (left - right).norm() / right.norm().clamp_min(1e-30)
        assert gap < tolerance, f"relative difference {gap:.3e}"
