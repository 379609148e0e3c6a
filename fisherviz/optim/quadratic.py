"""The quadratic model M(δ) = ½ δᵀ(F + (λ + η)I)δ + ∇hᵀδ of a mini-batch, by forward products only.

Martens & Grosse 2015, equation 5, sections 6.4 and 7, appendix C: J δ for a few directions gives every
scalar δᵀFδ′.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointError

from fisherviz.network.batches import count_examples
from fisherviz.network.guest import as_guest
from fisherviz.network.likelihoods import Likelihood
from fisherviz.optim.processes import summed
from fisherviz.optim.structure import REENTRANT
from fisherviz.optim.watcher import Inputs, Watcher, at_least_float32

Direction = Mapping[nn.Parameter, Tensor]


def choose(inputs: Inputs, share: float, generator: torch.Generator) -> Inputs:
    """A random share of a batch's examples, at least one.

    Args:
        inputs: arguments of the model.
        share: between 0 and 1; 1 gives the inputs themselves.
        generator: where the choice comes from.

    Returns:
        Arguments with the chosen examples.
    """
    n = count_examples(inputs)
    if share >= 1:
        return inputs
    index = torch.randperm(n, generator=generator, device=generator.device)[: max(1, round(share * n))]
    return pytree.tree_map(
        lambda leaf: (
            leaf[index.to(leaf.device)] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == n else leaf
        ),
        inputs,
    )


class FisherForms:
    """The bilinear form uᵀFv on a list of batches, from one forward-mode pass per direction.

    Args:
        watcher: knows the model and how to call it.
        likelihood: gives F_R.
        batches: arguments of the model, of the mini-batch or a share of it.
    """

    def __init__(self, watcher: Watcher, likelihood: Likelihood, batches: Sequence[Inputs]) -> None:
        self.watcher, self.likelihood, self.batches = watcher, likelihood, list(batches)
        self.examples = sum(count_examples(batch) for batch in self.batches)
        if hidden := [layer.name for layer in watcher.layers if layer.note == REENTRANT]:
            raise NotImplementedError(
                f"layer {hidden[0]!r} runs inside checkpoint(use_reentrant=True), through which no forward-mode "
                "product passes; for KFAC pass use_reentrant=False, for HessianFree run the model without checkpoint."
            )

    def tangents(self, direction: Direction) -> list[tuple[Tensor, Tensor]]:
        """Output z and J · direction for each batch."""
        model = self.watcher.model
        names = {name: direction[p] for name, p in model.named_parameters() if p in direction}
        out = []
        self.watcher.paused = True
        try:
            for batch in self.batches:
                with as_guest(model), torch.no_grad(), forward_ad.dual_level():
                    duals = {
                        name: forward_ad.make_dual(p.detach(), names[name])
                        for name, p in model.named_parameters()
                        if name in names
                    }
                    z = self.watcher.call(lambda *a, d=duals, **k: functional_call(model, d, a, k), batch)
                    z, t = forward_ad.unpack_dual(z)
                    t = torch.zeros_like(z) if t is None else t
                out.append(tuple(_rows(x) for x in (z, t)))
        finally:
            self.watcher.paused = False
        return out  # type: ignore[return-value]

    def product(self, direction: Direction) -> dict[nn.Parameter, Tensor]:
        """F · direction: forward mode, the output Fisher, and one reverse pass."""
        model = self.watcher.model
        total = {p: torch.zeros_like(d) for p, d in direction.items()}
        self.watcher.paused = True
        try:
            for batch in self.batches:
                with as_guest(model), forward_ad.dual_level():
                    leaves = {name: p for name, p in model.named_parameters() if p in direction}
                    copies = {name: p.detach().requires_grad_() for name, p in leaves.items()}
                    duals = {name: forward_ad.make_dual(copies[name], direction[p]) for name, p in leaves.items()}
                    z = self.watcher.call(lambda *a, d=duals, **k: functional_call(model, d, a, k), batch)
                    z, t = forward_ad.unpack_dual(z)
                    if t is None:
                        continue
                    u = self.likelihood.product(_rows(z), _rows(t)).reshape(z.shape).to(z.dtype)
                    try:
                        found = torch.autograd.grad(z, list(copies.values()), u.detach(), allow_unused=True)
                    except CheckpointError as error:
                        raise RuntimeError(
                            "the products of HessianFree do not pass through checkpoint, which runs a part of the "
                            "model again without their forward-mode directions; run the model without checkpoint."
                        ) from error
                for p, g in zip(leaves.values(), found, strict=True):
                    if g is not None:
                        total[p].add_(g, alpha=1 / self.examples)
        finally:
            self.watcher.paused = False
        return total

    def form(self, u: Sequence[tuple[Tensor, Tensor]], v: Sequence[tuple[Tensor, Tensor]]) -> float:
        """uᵀFv from the two directions' tangents, in float64, over the examples of all processes."""
        total = 0.0
        for (z, s), (_, t) in zip(u, v, strict=True):
            total += float((s.double() * self.likelihood.product(z, t).double()).sum())
        total, examples = summed([total, self.examples], u[0][0].device)
        return total / examples


def _rows(x: Tensor) -> Tensor:
    x = at_least_float32(x.detach())
    return x.unsqueeze(1) if x.dim() == 1 else x


def dot(u: Direction, v: Direction) -> float:
    """Inner product of two directions; each parameter's share by one BLAS product, their sum in float64."""
    shares = [torch.dot(u[p].reshape(-1), v[p].reshape(-1)) for p in u if p in v]
    return float(torch.stack(shares).double().sum()) if shares else 0.0


def combine(terms: Sequence[tuple[float, Direction]]) -> dict[nn.Parameter, Tensor]:
    """Σ c · direction."""
    out: dict[nn.Parameter, Tensor] = {}
    for c, direction in terms:
        for p, d in direction.items():
            out[p] = c * d if p not in out else out[p].add(d, alpha=c)
    return out


def minimise(quadratic: Tensor, linear: Tensor) -> Tensor:
    """Argmin of ½ cᵀQc + bᵀc for one or two coefficients; the first alone where Q is singular (section 7).

    Args:
        quadratic: (n, n), float64.
        linear: (n,), float64.

    Returns:
        (n,).
    """
    if len(linear) == 2:
        q = quadratic
        determinant = float(q[0, 0] * q[1, 1] - q[0, 1] * q[1, 0])
        if determinant > 1e-12 * float(q[0, 0] * q[1, 1]) > 0:
            return -torch.linalg.solve(q, linear)
    out = torch.zeros_like(linear)
    if float(quadratic[0, 0]) > 0:
        out[0] = -linear[0] / quadratic[0, 0]
    return out
