"""The quadratic model M(δ) = ½ δᵀ(F + (λ + η)I)δ + ∇hᵀδ of a mini-batch, by products with the exact F alone.

Martens & Grosse 2015, equation 5, sections 6.4 and 7, appendix C: J δ for a few directions gives every scalar δᵀFδ′.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fisherviz.capture.forward_mode import product, tangent, try_forward_mode
from fisherviz.capture.uses import REENTRANT
from fisherviz.network.batches import Arguments, count_examples, take_rows
from fisherviz.network.guest import check_modes
from fisherviz.network.likelihoods import Likelihood
from fisherviz.network.vectors import FreshVectors
from fisherviz.optim.gradients import summed_products
from fisherviz.optim.watcher import Watcher, at_least_float32
from fisherviz.statistics.examples import Examples
from fisherviz.support.processes import Processes, summed

Direction = Mapping[nn.Parameter, Tensor]


def choose(inputs: Arguments, share: float, generator: torch.Generator) -> Arguments:
    """A random share of a batch's examples, at least one.

    Args:
        inputs: arguments of the model.
        share: between 0 and 1; 1 gives the inputs themselves.
        generator: where the choice comes from.

    Returns:
        Arguments with the chosen examples, all of which count.
    """
    if share >= 1:
        return inputs
    n = examples_of(inputs)
    chosen = torch.randperm(n, generator=generator, device=generator.device)[: max(1, round(share * n))]
    rows = inputs.examples
    return take_rows(inputs, chosen if rows is None else rows[chosen.to(rows.device)])


def examples_of(inputs: Arguments) -> int:
    """Number of examples that count."""
    rows = inputs.examples
    return count_examples(inputs) if rows is None else len(rows)


class Image(NamedTuple):
    """What a direction d comes to on one batch: J d beside the output z, or Uᵀ d in example space, where z is None.

    `weight` is that of the output's positions.
    """

    z: Tensor | None
    t: Tensor
    weight: Tensor | None = None


class FisherForms:
    """The bilinear form uᵀFv and products F v on a list of batches, by forward mode where it can be believed.

    Args:
        watcher: of the model.
        likelihood: gives F_R.
        batches: arguments of the model, of the mini-batch or a share of it.

    Raises:
        NotImplementedError: a layer is hidden from forward mode, or forward mode is wrong for the model and there are
            no gradients of single examples either.
    """

    def __init__(self, watcher: Watcher, likelihood: Likelihood, batches: Sequence[Arguments]) -> None:
        self.watcher, self.network, self.likelihood = watcher, watcher.network, likelihood
        self.batches = [Arguments(*batch) for batch in batches]
        (self.examples,) = summed([sum(examples_of(batch) for batch in self.batches)], self.network.device)
        """Of all processes, each of which has batches of its own, or none."""
        if hidden := [layer.name for layer in watcher.layers if layer.note == REENTRANT]:
            raise NotImplementedError(
                f"layer {hidden[0]!r} runs inside checkpoint(use_reentrant=True), through which no forward-mode "
                "product passes; for KFAC pass use_reentrant=False, for HessianFree run the model without checkpoint."
            )
        self._spaces: list[tuple[list[int], Examples]] | None = None
        if self.network.structure.forward_mode is None and self.batches:
            with watcher.away():
                try_forward_mode(self.network, self.batches[0])
        if not self.network.structure.forward_mode and self.batches:
            self._leave_forward_mode()

    def _leave_forward_mode(self) -> None:
        """Work in example space from here on: captures of each batch for the vectors of the exact F."""
        try:
            check_modes(self.network.model)
        except ValueError as error:
            raise NotImplementedError(
                "forward-mode derivatives of this model are missing or wrong, and in this mode there are no gradients "
                f"of single examples to take their place: {error}"
            ) from error
        self.network.note(forward_mode=False)
        source = FreshVectors(self.likelihood, "exact", 1, torch.Generator(), lambda: 0)
        self._spaces = []
        for batch in self.batches:
            captures, _ = self.watcher.captures_of(batch, source, generic=True)
            there = [i for i, layer in enumerate(self.network.layers) if layer.name in captures]
            names = self.network.space.names
            self._spaces.append((there, Examples([captures[names[i]] for i in there], 1.0)))

    def _named(self, direction: Direction) -> dict[str, Tensor]:
        return {name: direction[p] for name, p in self.network.parameters.items() if p in direction}

    def _pieces(self, direction: Direction, layers: Sequence[int]) -> list[Tensor]:
        """A direction as unit-order columns (P_i, 1) of some layers."""
        own = self.network.parameters
        pieces = []
        for i in layers:
            parts = {place.name: own[place.name] for place in self.network.space.of(i)}
            flat = {
                name: (direction[p] if p in direction else torch.zeros_like(p))
                .detach()
                .reshape(-1)
                .to(self.network.precision)
                for name, p in parts.items()
            }
            pieces.append(self.network.space.gather(i, flat).unsqueeze(1))
        return pieces

    def tangents(self, direction: Direction) -> list[Image]:
        """What the direction comes to on each batch."""
        if self._spaces is not None:
            return [Image(None, space.project(self._pieces(direction, there))) for there, space in self._spaces]
        with self.watcher.away():
            made = [tangent(self.network, batch, self._named(direction)) for batch in self.batches]
        return [
            Image(at_least_float32(z), at_least_float32(t), batch.weight)
            for (z, t), batch in zip(made, self.batches, strict=True)
        ]

    def product(self, direction: Direction) -> dict[nn.Parameter, Tensor]:
        """F · direction: forward mode, the output Fisher, and one reverse pass."""
        return _summed(self._own_product(direction))

    def _own_product(self, direction: Direction) -> dict[nn.Parameter, Tensor]:
        """This process's part."""
        if self._spaces is not None:
            return self._example_product(direction)
        own, named = self.network.parameters, self._named(direction)
        total = {p: torch.zeros_like(d) for p, d in direction.items()}
        for batch in self.batches:
            with self.watcher.away():
                made = product(self.network, batch, named, partial(self._output, batch.weight))
            if not made.agrees:
                self._leave_forward_mode()
                return self._example_product(direction)
            for name, part in made.parts.items():
                total[own[name]].add_(part, alpha=1 / self.examples)
        return total

    def _output(self, weight: Tensor | None, z: Tensor, t: Tensor) -> Tensor:
        u = self.likelihood.product(at_least_float32(z), at_least_float32(t))
        return self.likelihood.only(u, weight).to(z.dtype)

    def _example_product(self, direction: Direction) -> dict[nn.Parameter, Tensor]:
        assert self._spaces is not None
        own, total = self.network.parameters, {p: torch.zeros_like(d) for p, d in direction.items()}
        for there, space in self._spaces:
            for i, piece in zip(there, space.product(self._pieces(direction, there)), strict=True):
                for name, part in self.network.space.scatter(i, piece[:, 0]).items():
                    p = own[name]
                    if p in total:
                        total[p].add_(part.view_as(p), alpha=1 / self.examples)
        return total

    def form(self, u: Sequence[Image], v: Sequence[Image]) -> float:
        """uᵀFv from the two directions' images, in float64, over the examples of all processes."""
        total = 0.0
        for one, other in zip(u, v, strict=True):
            t = other.t if one.z is None else self._output(one.weight, one.z, other.t)
            total += float((one.t.double() * t.double()).sum())
        return summed([total], self.network.device)[0] / self.examples


def _summed(parts: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
    """Sums over the processes that train together."""
    processes = Processes.training()
    return {p: processes.total(part) for p, part in parts.items()}


def dot(u: Direction, v: Direction) -> float:
    """Inner product of two directions."""
    return summed_products([(u[p].reshape(-1), v[p].reshape(-1)) for p in u if p in v])


def combine(terms: Sequence[tuple[float, Direction]]) -> dict[nn.Parameter, Tensor]:
    """Σ c · direction."""
    out: dict[nn.Parameter, Tensor] = {}
    for c, direction in terms:
        for p, d in direction.items():
            if abs(c) > torch.finfo(d.dtype).max:  # of a direction that has all but vanished
                scaled = (c * d.double()).to(d.dtype)
                out[p] = out[p] + scaled if p in out else scaled
            else:
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
