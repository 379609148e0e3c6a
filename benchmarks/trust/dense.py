"""Steps by dense float64 matrices, from nothing but the weights, the examples that count and plain autograd.

The network is the tanh network of `net`; nothing of the package is used. A layer's matrix is W̄ = [W, b], a vector of
all layers is their W̄ row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

WIDTHS = (4, 5, 3, 3)


def net(seed: int = 0) -> nn.Sequential:
    """A tanh network in float64."""
    generator = torch.Generator().manual_seed(seed)
    modules: list[nn.Module] = []
    for d_in, d_out in pairwise(WIDTHS):
        modules += [nn.Linear(d_in, d_out), nn.Tanh()]
    model = nn.Sequential(*modules[:-1]).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.6 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def linears(model: nn.Module) -> list[nn.Linear]:
    """Its layers."""
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def weights(model: nn.Module) -> list[Tensor]:
    """Their W̄ (d_out, d_in + 1) as they stand."""
    return [torch.cat([m.weight, m.bias[:, None]], 1).detach().clone() for m in linears(model)]


def gradients(model: nn.Module) -> list[Tensor | None]:
    """The gradients of the W̄ as they stand; None where a layer has none."""
    found: list[Tensor | None] = []
    for m in linears(model):
        parts = [p.grad for p in (m.weight, m.bias)]
        if all(g is None for g in parts):
            found.append(None)
            continue
        whole = [torch.zeros_like(p) if p.grad is None else p.grad for p in (m.weight, m.bias)]
        found.append(torch.cat([whole[0], whole[1][:, None]], 1).detach().clone())
    return found


def outputs(W: Sequence[Tensor], x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The network's outputs, and each layer's inputs with the 1 and outputs, which gradients can be taken of."""
    inputs, sums, h = [], [], x
    for i, M in enumerate(W):
        a = torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype)], 1)
        s = a @ M.T
        inputs.append(a)
        sums.append(s)
        h = s if i + 1 == len(W) else torch.tanh(s)
    return h, inputs, sums


@dataclass(frozen=True)
class Examples:
    """Examples that count.

    Attributes:
        x: their inputs (N, d).
        loss: the user's loss as a function of the outputs.
        W: the weights at which they ran.
        scale: c where the loss is c times the sum of the examples'.
        layers: the layers for which they count.
    """

    x: Tensor
    loss: Callable[[Tensor], Tensor]
    W: Sequence[Tensor]
    scale: float
    layers: tuple[int, ...]

    def rows(self, kind: str, labels: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Inputs a (N, da) and vectors g (K, N, dg) of each layer."""
        W = [M.clone().requires_grad_() for M in self.W]
        z, inputs, sums = outputs(W, self.x.detach())
        p = torch.softmax(z.detach(), 1)
        if kind == "exact":
            values, basis = torch.linalg.eigh(torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
            vectors = (basis * values.clamp_min(0).sqrt()[:, None, :]).permute(2, 0, 1)
        elif kind == "mc":
            vectors = (p - nn.functional.one_hot(labels(z.detach()), z.shape[1]))[None]
        else:
            at = z.detach().requires_grad_()
            vectors = (torch.autograd.grad(self.loss(at), at)[0] / self.scale)[None]
        g = [torch.autograd.grad(z, sums, v, retain_graph=True) for v in vectors]
        return [(a.detach(), torch.stack([one[i] for one in g])) for i, a in enumerate(inputs)]


class Dense:
    """One method's step by dense matrices, with the statistics of one step alone.

    Args:
        method: its name.
        kind: of Fisher.
        lr: learning rate.
        damping: λ.
    """

    def __init__(self, method: str, kind: str, lr: float, damping: float) -> None:
        self.method, self.kind, self.lr, self.damping = method, kind, lr, damping

    def step(
        self,
        counted: Sequence[Examples],
        grads: Sequence[Tensor | None],
        W: Sequence[Tensor],
        labels: Callable[[Tensor], Tensor],
    ) -> list[Tensor]:
        """What the step adds to each W̄: nothing where a layer has no gradient, or no pass counts and it is zero."""
        moves = [torch.zeros_like(M) for M in W]
        if not counted and not any(g is not None and bool(g.any()) for g in grads):
            return moves
        parts = [(made, made.rows(self.kind, labels)) for made in counted]
        some = set[int]().union(*(made.layers for made in counted))
        mine = [i for i, g in enumerate(grads) if g is not None and (i in some or bool(g.any()))]
        if self.method in ("exact", "inputs"):
            return self._joint(parts, mine, grads, moves)
        a, g = {}, {}
        for i in mine:
            shown = [rows[i] for made, rows in parts if i in made.layers]
            a[i] = torch.cat([x for x, _ in shown])
            g[i] = torch.cat([v for _, v in shown], 1)
        for i in mine:
            moves[i] = -self.lr * getattr(self, "_" + self.method.replace("-", "_"))(a[i], g[i], grads[i])
        return moves

    def _joint(
        self, parts: Sequence[Any], mine: Sequence[int], grads: Sequence[Any], moves: list[Tensor]
    ) -> list[Tensor]:
        """All layers together: zeros where an example does not count for a layer, but for a pass over the inputs."""
        U = [[_outer(*rows[i]) * (self.method == "inputs" or i in made.layers) for i in mine] for made, rows in parts]
        whole = torch.cat([torch.cat(row, 1) for row in U])
        n = sum(len(made.x) for made, _ in parts)
        found = _solve(whole.T @ whole / n, self.damping, torch.cat([grads[i].reshape(-1) for i in mine]))
        for i, piece in zip(mine, found.split([grads[i].numel() for i in mine]), strict=True):
            moves[i] = -self.lr * piece.reshape(grads[i].shape)
        return moves

    def _layer(self, a: Tensor, g: Tensor, v: Tensor) -> Tensor:
        U = _outer(a, g)
        return _solve(U.T @ U / len(a), self.damping, v.reshape(-1)).reshape(v.shape)

    def _diagonal(self, a: Tensor, g: Tensor, v: Tensor) -> Tensor:
        return v / (_outer(a, g).square().sum(0).reshape(v.shape) / len(a) + self.damping)

    def _units(self, a: Tensor, g: Tensor, v: Tensor) -> Tensor:
        U = _outer(a, g).unflatten(1, v.shape)
        return torch.stack([_solve(U[:, o].T @ U[:, o], self.damping, v[o]) for o in range(len(v))])

    def _foof(self, a: Tensor, g: Tensor, v: Tensor) -> Tensor:
        return _solve(a.T @ a / len(a), self.damping, v.T).T

    def _kfac(self, a: Tensor, g: Tensor, v: Tensor) -> Tensor:
        A, G = _factors(a, g)
        return _solve(torch.kron(G, A), self.damping, v.reshape(-1)).reshape(v.shape)

    def _kfac_factored(self, a: Tensor, g: Tensor, v: Tensor) -> Tensor:
        A, G = _factors(a, g)
        pi, gamma = ((A.trace() / len(A)) / (G.trace() / len(G))) ** 0.5, self.damping**0.5
        return _solve(A, float(pi * gamma), _solve(G, float(gamma / pi), v).T).T

    def _ekfac(self, a: Tensor, g: Tensor, v: Tensor) -> Tensor:
        A, G = _factors(a, g)
        (_, QA), (_, QG) = torch.linalg.eigh(A), torch.linalg.eigh(G)
        S = torch.einsum("kni,nj->ij", (g @ QG).square(), (a @ QA).square()) / len(a)
        return QG @ ((QG.T @ v @ QA) / (S + self.damping)) @ QA.T


def _outer(a: Tensor, g: Tensor) -> Tensor:
    return (g[:, :, :, None] * a[None, :, None, :]).flatten(2).flatten(0, 1)


def _factors(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return a.T @ a / len(a), torch.einsum("kni,knj->ij", g, g) / len(a)


def _solve(F: Tensor, damping: float, v: Tensor) -> Tensor:
    return torch.linalg.solve(F + damping * torch.eye(len(F), dtype=F.dtype), v)
