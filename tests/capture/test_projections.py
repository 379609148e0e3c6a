"""Attention and adapters made of Linear layers: fused and split projections, torch's kernels, low-rank updates."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fisherviz as fv
from tests.oracles import exact, laws, nets
from tests.oracles.checks import FLOAT32, assert_matches

E, T, HEADS = 4, 3, 2


class Fused(nn.Module):
    """One projection to queries, keys and values, and a kernel of torch's."""

    def __init__(self, *, causal=False, bias=True):
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(E, 3 * E, bias=bias), nn.Linear(E, E), causal

    def parts(self, x):
        return self.qkv(x).chunk(3, -1)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.parts(x))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(z.transpose(1, 2).flatten(2)).mean(1)


class Split(Fused):
    """Projections of their own, with fewer heads of keys and values than of queries."""

    def __init__(self):
        super().__init__()
        del self.qkv
        self.q, self.k, self.v = nn.Linear(E, E), nn.Linear(E, E // HEADS), nn.Linear(E, E // HEADS)

    def parts(self, x):
        return self.q(x), self.k(x).repeat(1, 1, HEADS), self.v(x).repeat(1, 1, HEADS)


class Crossing(Split):
    """Keys and values of other tokens, fewer than there are queries."""

    def parts(self, x):
        memory = torch.sin(x[:, 1:])
        return self.q(x), self.k(memory).repeat(1, 1, HEADS), self.v(memory).repeat(1, 1, HEADS)


class Adapted(nn.Module):
    """A frozen Linear layer with a low-rank update beside it, as in LoRA."""

    def __init__(self, d_in, d_out, rank=2, scale=0.5):
        super().__init__()
        self.base = nn.Linear(d_in, d_out).requires_grad_(False)
        self.down, self.up = nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=False)
        self.scale = scale

    def forward(self, x):
        return self.base(x) + self.scale * self.up(self.down(x))


class AdaptedAttention(Fused):
    """Attention of which the adapters alone are trained."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = Adapted(E, 3 * E), Adapted(E, E)


NETWORKS = {
    "fused": Fused,
    "fused, causal, without bias": lambda: Fused(causal=True, bias=False),
    "split": Split,
    "other tokens": Crossing,
    "low-rank": lambda: nn.Sequential(Adapted(E, 3), nn.Tanh(), Adapted(3, 2), nets.MeanTokens()),
    "low-rank in attention": AdaptedAttention,
}
every = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS.keys())


@every
def test_exact_quantities(build):
    net, x = nets.randomised(build()), torch.randn(5, T, E, dtype=torch.float64)
    dense = exact.fisher(net, x, laws.Categorical())
    fisher = fv.Probe(net, "categorical").fisher(x)
    assert {layer.path for layer in fisher.layers} == {"structured"}
    assert_matches(fisher.to_dense(), dense)
    v = torch.randn(len(dense), dtype=torch.float64)
    assert_matches(fisher @ v, dense @ v.numpy())
    assert_matches(fisher.diagonal(), np.diag(dense))
    assert_matches(fisher.solve(v, 0.1), np.linalg.solve(dense + 0.1 * np.eye(len(dense)), v.numpy()))


@every
def test_float32(build):
    net, x = nets.randomised(build()), torch.randn(5, T, E)
    dense = exact.fisher(net, x.double(), laws.Categorical())
    assert_matches(fv.Probe(net.float(), "categorical").fisher(x).to_dense(), dense, FLOAT32)


@every
def test_kfac_is_that_of_each_linear_layer(build):
    """Factors by their definition, from what each Linear layer is given and what comes back to it."""
    net, x = nets.randomised(build()), torch.randn(5, T, E, dtype=torch.float64)
    fisher = fv.Probe(net, "gaussian").fisher(x)
    found = fv.approximate(fisher, "kfac")
    for info in fisher.layers:
        module, seen = net.get_submodule(info.name), {}
        handle = module.register_forward_hook(lambda m, given, z, seen=seen: seen.update(given=given[0], gave=z))
        z = net(x)
        handle.remove()
        a = seen["given"].detach().flatten(0, 1)
        a = torch.cat([a, torch.ones(len(a), 1)], 1) if module.bias is not None else a
        g = torch.cat(
            [torch.autograd.grad(z[:, d].sum(), seen["gave"], retain_graph=True)[0] for d in range(z.shape[1])]
        )
        g = g.flatten(0, 1)
        block = np.kron(g.T @ g / len(x), a.T @ a / len(a))
        rows = np.arange(len(block)).reshape(info.out_features, -1)  # W̄ row by row; torch keeps the bias apart
        order = np.concatenate([rows[:, : info.in_features].ravel(), rows[:, info.in_features :].ravel()])
        assert_matches(found.block(info.name), block[np.ix_(order, order)])
