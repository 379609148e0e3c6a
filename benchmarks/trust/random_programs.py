"""Networks drawn at random from the ways to use layers: in loops, on rows that examples choose, by side doors.

Every step maps (N, T, D) to (N, T, D), and no example of the outcome depends on another: the truth is that of autograd,
one example at a time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

T, D, CLASSES = 3, 4, 3

Run = Callable[..., Tensor]


@dataclass(frozen=True)
class Way:
    """A way to use modules.

    Attributes:
        build: makes the modules.
        run: of the modules and the state h (N, T, D); the next state.
    """

    build: Callable[[], list[nn.Module]]
    run: Run


class Bare(nn.Module):
    """A parameter of its own.

    Args:
        *shape: of it.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.zeros(*shape))


def linears(n: int, d_in: int = D, d_out: int = D) -> Callable[[], list[nn.Module]]:
    """Makes so many Linear layers."""
    return lambda: [nn.Linear(d_in, d_out) for _ in range(n)]


def one(make: Callable[[], nn.Module]) -> Callable[[], list[nn.Module]]:
    """Makes one module."""
    return lambda: [make()]


def on_channels(m: nn.Module, h: Tensor) -> Tensor:
    """A module for (N, D, T)."""
    return m(h.transpose(1, 2)).transpose(1, 2)


def masked_rows(a: nn.Module, h: Tensor) -> Tensor:
    """Positions that the examples choose."""
    kept = h[..., 0] > 0
    out = torch.zeros_like(h)
    out[kept] = a(h[kept])
    return torch.tanh(out) + h


def masked_examples(a: nn.Module, h: Tensor) -> Tensor:
    """Some examples alone."""
    kept = h.mean((1, 2)) > 0
    out = h.clone()
    out[kept] = torch.tanh(a(h[kept]))
    return out


def a_part_again(a: nn.Module, b: nn.Module, h: Tensor) -> Tensor:
    """One layer on all examples, another on some, perhaps on none."""
    kept = h.sum((1, 2)) > 0
    out = a(h)
    out = out.index_add(0, kept.nonzero().squeeze(1), b(h[kept]))
    return torch.tanh(out)


def sorted_examples(a: nn.Module, h: Tensor) -> Tensor:
    """The batch in an order that its contents decide, and back."""
    order = torch.argsort(h.sum((1, 2)))
    return torch.tanh(a(h[order])[torch.argsort(order)])


def sorted_positions(a: nn.Module, h: Tensor) -> Tensor:
    """Each example's positions in an order of their own."""
    return torch.tanh(a(h.gather(1, h[..., 0].argsort(1).unsqueeze(-1).expand_as(h))))


def experts(a: nn.Module, b: nn.Module, c: nn.Module, h: Tensor) -> Tensor:
    """A mixture: each row is sent to one of three, which may get none."""
    rows = h.reshape(-1, D)
    to = (rows[:, 0] > 0).long() + (rows[:, 1] > 0).long()
    out = torch.zeros_like(rows)
    for k, m in enumerate((a, b, c)):
        mine = (to == k).nonzero().squeeze(1)
        out = out.index_add(0, mine, torch.tanh(m(rows[mine])))
    return out.reshape(h.shape) + h


def counted_loop(a: nn.Module, h: Tensor) -> Tensor:
    """So many times as the example says."""
    out = []
    for e in h:
        for _ in range(1 + int(e.abs().sum()) % 3):
            e = torch.tanh(a(e))
        out.append(e)
    return torch.stack(out)


def attention(q: nn.Module, k: nn.Module, v: nn.Module, h: Tensor) -> Tensor:
    """By hand."""
    return h + torch.softmax(q(h) @ k(h).transpose(1, 2), -1) @ v(h)


def packed(m: nn.Module, h: Tensor) -> Tensor:
    """Sequences of lengths of their own."""
    lengths = 1 + (h[:, 0].abs().sum(-1).long() % T)
    out, _ = m(pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=False))
    return pad_packed_sequence(out, batch_first=True, total_length=T)[0]


def pairs(a: nn.Module, h: Tensor) -> Tensor:
    """Every two positions."""
    both = torch.cat([h.unsqueeze(2).expand(-1, -1, T, -1), h.unsqueeze(1).expand(-1, T, -1, -1)], -1)
    return h + torch.tanh(a(both)).sum(2)


def twice_along_the_batch(a: nn.Module, h: Tensor) -> Tensor:
    """The batch and its mirror image in one call."""
    out = torch.tanh(a(torch.cat([h, -h])))
    return out[: len(h)] + 0.5 * out[len(h) :]


def twice_each(a: nn.Module, h: Tensor) -> Tensor:
    """Every example two times, side by side."""
    out = torch.tanh(a(h.repeat_interleave(2, 0)))
    return out[::2] + 0.3 * out[1::2] * h


def in_place(a: nn.Module, h: Tensor) -> Tensor:
    """What follows changes the layer's output."""
    y = a(h)
    y.add_(1.0).mul_(0.5)
    return torch.tanh(y)


def without_graph(a: nn.Module, b: nn.Module, h: Tensor) -> Tensor:
    """One that runs under no_grad."""
    with torch.no_grad():
        y = a(h)
    return h + y * torch.tanh(b(h))


def written_back(a: nn.Module, h: Tensor) -> Tensor:
    """One of its rows, in another's place."""
    out = h.clone()
    out[:, 0] = torch.tanh(a(h)[:, 1])
    return out


def best_position(a: nn.Module, h: Tensor) -> Tensor:
    """The position that is largest in each example."""
    best = h[torch.arange(len(h)), h.abs().sum(-1).argmax(1)]
    return h + torch.tanh(a(best)).unsqueeze(1)


def halves(m: nn.Module, h: Tensor) -> Tensor:
    """A gate."""
    a, b = m(h).chunk(2, -1)
    return a * torch.sigmoid(b)


def windows(a: nn.Module, h: Tensor) -> Tensor:
    """Unfolded by hand."""
    return torch.tanh(a(functional.pad(h, (0, 0, 1, 1)).unfold(1, 3, 1).reshape(len(h), T, -1)))


def scattered(a: nn.Module, h: Tensor) -> Tensor:
    """Positions that are added up."""
    return torch.zeros_like(h).index_add(1, torch.tensor([0, 0, 2]), torch.tanh(a(h))) + h


def recomputed(a: nn.Module, b: nn.Module, h: Tensor) -> Tensor:
    """Under a checkpoint."""
    return checkpoint(lambda x: torch.tanh(b(torch.tanh(a(x)))), h, use_reentrant=False)


def looped(a: nn.Module, h: Tensor) -> Tensor:
    """Three times."""
    for _ in range(3):
        h = torch.tanh(a(h))
    return h


tanh, linear = torch.tanh, functional.linear
WAYS: dict[str, Way] = {
    "plain": Way(linears(1), lambda a, h: tanh(a(h))),
    "residual": Way(linears(1), lambda a, h: h + tanh(a(h))),
    "rows of positions": Way(linears(1), lambda a, h: tanh(a(h.reshape(-1, D)).reshape(h.shape))),
    "rows, positions first": Way(
        linears(1), lambda a, h: tanh(a(h.transpose(0, 1).reshape(-1, D)).reshape(T, -1, D).transpose(0, 1))
    ),
    "positions first": Way(linears(1), lambda a, h: tanh(a(h.transpose(0, 1)).transpose(0, 1))),
    "batch as one sequence": Way(linears(1), lambda a, h: tanh(a(h.reshape(1, -1, D))).reshape(h.shape)),
    "a loop over positions": Way(linears(1), lambda a, h: tanh(torch.stack([a(h[:, t]) for t in range(T)], 1))),
    "a loop over examples": Way(linears(1), lambda a, h: tanh(torch.stack([a(e) for e in h]))),
    "a loop over rows": Way(linears(1), lambda a, h: tanh(torch.stack([a(r) for e in h for r in e]).reshape(h.shape))),
    "the batch in two parts": Way(linears(1), lambda a, h: tanh(torch.cat([a(part) for part in h.chunk(2)]))),
    "the batch reversed": Way(linears(1), lambda a, h: tanh(a(h.flip(0)).flip(0))),
    "the batch rolled": Way(linears(1), lambda a, h: tanh(a(h.roll(1, 0)).roll(-1, 0))),
    "examples sorted": Way(linears(1), sorted_examples),
    "positions sorted": Way(linears(1), sorted_positions),
    "positions permuted": Way(linears(1), lambda a, h: tanh(a(h[:, [2, 0, 1]]))),
    "some rows": Way(linears(1), masked_rows),
    "some examples": Way(linears(1), masked_examples),
    "some examples again": Way(linears(2), a_part_again),
    "one or the other": Way(
        linears(2), lambda a, b, h: tanh(torch.where(h.mean((1, 2), keepdim=True) > 0, a(h), b(h)))
    ),
    "a branch on the example": Way(
        linears(2), lambda a, b, h: torch.stack([tanh((a if e.sum() > 0 else b)(e)) for e in h])
    ),
    "even and odd positions": Way(
        linears(2), lambda a, b, h: tanh(torch.stack([(b if t % 2 else a)(h[:, t]) for t in range(T)], 1))
    ),
    "experts": Way(linears(3), experts),
    "the best position": Way(linears(1), best_position),
    "the first position": Way(linears(1), lambda a, h: tanh(h + a(h[:, 0]).unsqueeze(1).expand_as(h))),
    "after a mean": Way(linears(1), lambda a, h: h + tanh(a(h.mean(1))).unsqueeze(1)),
    "after a maximum": Way(linears(1), lambda a, h: h + tanh(a(h.amax(1))).unsqueeze(1)),
    "the batch and its mirror": Way(linears(1), twice_along_the_batch),
    "every example twice": Way(linears(1), twice_each),
    "pairs of positions": Way(linears(1, 2 * D), pairs),
    "windows": Way(linears(1, 3 * D), windows),
    "across positions": Way(linears(1, T, T), on_channels),
    "cumulative sums": Way(linears(1), lambda a, h: tanh(a(h.cumsum(1)).cumsum(1))),
    "scattered": Way(linears(1), scattered),
    "written back": Way(linears(1), written_back),
    "an output that is not used": Way(linears(1), lambda a, h: h + tanh(a(h))[:, :1]),
    "changed in place": Way(linears(1), in_place),
    "once for all": Way(linears(1), lambda a, h: tanh(h + a(torch.linspace(-1, 1, D, dtype=h.dtype).unsqueeze(0)))),
    "three times": Way(linears(1), looped),
    "as often as the example says": Way(linears(1), counted_loop),
    "a gate": Way(linears(1, D, 2 * D), halves),
    "a product": Way(linears(2), lambda a, b, h: tanh(a(h)) * b(h)),
    "a part detached": Way(linears(2), lambda a, b, h: h + 0.5 * a(h).detach() + tanh(b(h))),
    "under no_grad": Way(linears(2), without_graph),
    "a checkpoint": Way(linears(2), recomputed),
    "under vmap": Way(linears(1), lambda a, h: torch.vmap(lambda e: tanh(linear(e, a.weight, a.bias)))(h)),
    "by einsum": Way(linears(1), lambda a, h: tanh(torch.einsum("ntd,od->nto", h, a.weight) + a.bias)),
    "also by a side door": Way(linears(1), lambda a, h: tanh(a(h) + 0.5 * linear(h, a.weight))),
    "also transposed": Way(linears(1), lambda a, h: tanh(linear(tanh(a(h)), a.weight.T))),
    "also its bias": Way(linears(1), lambda a, h: tanh(a(h)) * a.bias),
    "also its norm": Way(linears(1), lambda a, h: tanh(a(h)) * (1 + a.weight.square().sum())),
    "normalised weights": Way(linears(1), lambda a, h: tanh(h @ torch.softmax(a.weight, -1).T)),
    "on another's weights": Way(linears(2), lambda a, b, h: tanh(linear(h, a(b.weight)))),
    "on a parameter": Way(lambda: [nn.Linear(D, D), Bare(T, D)], lambda a, b, h: tanh(h + a(b.p))),
    "a bare matrix": Way(lambda: [Bare(D, D)], lambda a, h: tanh(h @ a.p)),
    "a bare scale": Way(lambda: [Bare(D)], lambda a, h: h * a.p),
    "a bare scale of positions": Way(lambda: [Bare(T, D)], lambda a, h: h * a.p),
    "attention by hand": Way(linears(3), attention),
    "attention": Way(
        one(lambda: nn.MultiheadAttention(D, 2, batch_first=True)),
        lambda m, h: h + m(h, h, h, need_weights=False)[0],
    ),
    "attention to others": Way(
        one(lambda: nn.MultiheadAttention(D, 2, batch_first=True)),
        lambda m, h: h + m(h, h.flip(1), 0.5 * h, need_weights=False)[0],
    ),
    "a convolution": Way(one(lambda: nn.Conv1d(D, D, 3, padding=1)), lambda m, h: tanh(on_channels(m, h))),
    "a grouped convolution": Way(
        one(lambda: nn.Conv1d(D, D, 3, padding=1, groups=2)), lambda m, h: tanh(on_channels(m, h))
    ),
    "a convolution of rows": Way(
        one(lambda: nn.Conv1d(1, 1, 3, padding=1)), lambda m, h: tanh(m(h.reshape(-1, 1, D)).reshape(h.shape))
    ),
    "a convolution, unbatched": Way(
        one(lambda: nn.Conv1d(D, D, 3, padding=1)), lambda m, h: tanh(torch.stack([m(e.T).T for e in h]))
    ),
    "a bilinear layer": Way(one(lambda: nn.Bilinear(D, D, D)), lambda m, h: tanh(m(h, h.flip(1)))),
    "a GRU": Way(one(lambda: nn.GRU(D, D, batch_first=True)), lambda m, h: m(h)[0]),
    "a GRU, time first": Way(one(lambda: nn.GRU(D, D)), lambda m, h: m(h.transpose(0, 1))[0].transpose(0, 1)),
    "a GRU on packed sequences": Way(one(lambda: nn.GRU(D, D, batch_first=True)), packed),
    "an LSTM": Way(one(lambda: nn.LSTM(D, D, batch_first=True)), lambda m, h: m(h)[0]),
    "LayerNorm": Way(one(lambda: nn.LayerNorm(D)), lambda m, h: m(h)),
    "LayerNorm of positions": Way(one(lambda: nn.LayerNorm((T, D))), lambda m, h: m(h)),
    "RMSNorm": Way(one(lambda: nn.RMSNorm(D)), lambda m, h: m(h)),
    "GroupNorm": Way(one(lambda: nn.GroupNorm(2, D)), on_channels),
    "InstanceNorm": Way(one(lambda: nn.InstanceNorm1d(D, affine=True)), on_channels),
    "BatchNorm": Way(one(lambda: nn.BatchNorm1d(D)), on_channels),
    "PReLU": Way(one(nn.PReLU), lambda m, h: m(h)),
    "a table": Way(one(lambda: nn.Embedding(3, D)), lambda m, h: h + m((h[..., 0] > 0).long() + (h[..., 1] > 0))),
    "a table's mean": Way(
        one(lambda: nn.Embedding(2, D)), lambda m, h: h + m((h[..., 0] > 0).long()).mean(1, keepdim=True)
    ),
    "a table of positions": Way(one(lambda: nn.Embedding(T, D)), lambda m, h: tanh(h + m(torch.arange(T)))),
    "positions of each example": Way(
        one(lambda: nn.Embedding(T, D)), lambda m, h: tanh(h + m(torch.arange(T).expand(len(h), T)))
    ),
}  # fmt: skip
"""By name."""


class Program(nn.Module):
    """A few ways one after the other, and a head on the mean over positions.

    Args:
        ways: their names.
    """

    def __init__(self, ways: Sequence[str]) -> None:
        super().__init__()
        self.ways = tuple(ways)
        self.parts = nn.ModuleList(nn.ModuleList(WAYS[name].build()) for name in ways)
        self.head = nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs (N, T, D)."""
        for name, modules in zip(self.ways, self.parts, strict=True):
            x = WAYS[name].run(*modules, x)  # type: ignore[misc]
        return self.head(x.mean(1))


def drawn(seed: int) -> tuple[Program, random.Random]:
    """A program in float64 and evaluation mode whose parameters and statistics are random, and what drew it."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    net = Program(chance.choices(sorted(WAYS), k=chance.randint(1, 4))).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.6 * torch.randn_like(p))
        for m in net.modules():
            if isinstance(m, nn.BatchNorm1d):
                m.running_mean.normal_(), m.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr, operator]
    return net, chance


def truth(net: nn.Module, x: Tensor, likelihood: str) -> Tensor:
    """The Fisher (P, P) of the mean, one example at a time: autograd alone."""
    parameters = list(net.parameters())
    total: Any = 0.0
    for n in range(len(x)):
        z = net(x[n : n + 1])[0]
        J = torch.stack([_flat(parameters, torch.autograd.grad(c, parameters, retain_graph=True, allow_unused=True))
                         for c in z])  # fmt: skip
        p = torch.softmax(z.detach(), 0)
        H = torch.diag(p) - torch.outer(p, p) if likelihood == "categorical" else torch.eye(len(z), dtype=z.dtype)
        total = total + J.T @ H @ J
    return total / len(x)


def _flat(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    return torch.cat(
        [p.new_zeros(p.numel()) if g is None else g.reshape(-1) for p, g in zip(parameters, gradients, strict=True)]
    )
