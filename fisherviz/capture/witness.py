"""Outputs of some examples on their own, which every pass over the data must show again among all the others.

What does not: a model that couples its examples, draws at random, or computes another function than in an earlier pass,
since its mode, a hook or an attribute was changed. Weights and buffers have their fingerprint besides.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fisherviz.capture.evidence import COUPLED, alone, telling_examples
from fisherviz.capture.network import Network
from fisherviz.capture.ways import is_due
from fisherviz.network.batches import Inputs, count_examples, move, take_rows
from fisherviz.network.guest import RandomState, as_guest
from fisherviz.support.counting import counted_as

ROUNDING, SMALL = {torch.float64: 1e-6, torch.float32: 1e-4}, 1e-2
"""What an output changes with the examples beside it by rounding, relative to its largest entry or to a small one."""
REPEATS = 32
"""Runs of a model that draws random numbers, to see whether they have an effect."""
CHANGED = (
    "the model's output for example {} is another than in an earlier pass: its mode, a hook or an attribute was "
    "changed since, or it draws at random; make a new Fisher with probe.fisher(...) of a model that stays as it is."
)


class Witness:
    """Of one Fisher's data: some examples of each of the first batches, and then of fewer and fewer."""

    def __init__(self) -> None:
        self.alone: dict[int, tuple[Tensor, Tensor]] = {}
        """Positions of examples in the data and their outputs, by the position of their batch's first."""
        self._confirmed: set[int] = set()
        self._numbers: dict[int, int] = {}
        self._looked: set[int] = set()
        self._turned: set[tuple[int, int]] = set()
        self._reversed: set[tuple[int, int]] = set()

    def number(self, first: int) -> int:
        """The number of a batch in the data, from zero, by the position of its first example."""
        return self._numbers.setdefault(first, len(self._numbers))

    def looks(self, number: int) -> bool:
        """Whether a batch is met for the first time by those who look for evidence, by its number."""
        new = number not in self._looked
        self._looked.add(number)
        return new

    def turns(self, first: int, count: int) -> bool:
        """Whether so many examples are met for the first time, by the position of the first of them."""
        new = (first, count) not in self._turned
        self._turned.add((first, count))
        return new

    def reverses(self, first: int, count: int) -> bool:
        """The same for those who see outputs alone, where the others have not met them either."""
        new = (first, count) not in self._turned | self._reversed
        self._reversed.add((first, count))
        return new

    def see(self, network: Network, inputs: Inputs, first: int) -> None:
        """Run some examples of a batch one by one, if the batch is due and was not seen yet.

        Args:
            network: the network.
            inputs: the batch's inputs.
            first: position of its first example in the data.

        Raises:
            RuntimeError: the model draws random numbers, and they change its output.
        """
        if first in self.alone or not is_due(self.number(first)):
            return
        inputs = move(inputs, network.device)
        some = torch.unique(torch.tensor([int(telling_examples(inputs)[0]), count_examples(inputs) - 1], device="cpu"))
        with counted_as(0), as_guest(network.model):  # with gradients, which some forwards are made of
            before, rows = RandomState(), list[Tensor]()
            for n in some.tolist():
                rows.append(alone(network, inputs, n)[0].detach())
            if before.differs():
                _check_draws(network, take_rows(inputs, some), rows)
        if len({row.shape for row in rows}) == 1:
            self.alone[first] = (first + some, torch.stack(rows))

    def confirm(self, network: Network, z: Tensor, first: int) -> None:
        """Compare outputs of a pass with what was seen.

        Args:
            network: the network.
            z: outputs (N, ...) of some examples.
            first: position of the first of them in the data.

        Raises:
            RuntimeError: they differ by more than rounding explains.
        """
        for positions, seen in self.alone.values():
            here = (positions >= first) & (positions < first + len(z))
            for n, row in zip(positions[here].tolist(), seen[here], strict=True):
                own = z[n - first]
                finite = bool(own.isfinite().all())  # what is not is refused with its place
                if finite and differs(own, row, network.coarsest(z), largest_of(z)):
                    raise RuntimeError((CHANGED if n in self._confirmed else COUPLED).format(n))
                self._confirmed.add(n)


def differs(z: Tensor, other: Tensor, dtype: torch.dtype, largest: float = SMALL) -> bool:
    """Whether outputs differ by more than rounding explains.

    Args:
        z: of an example, or of several.
        other: of the same.
        dtype: that they were computed in.
        largest: of outputs beside which theirs may be small, as is the rounding of what they are made of.
    """
    if z.shape != other.shape or not z.numel():
        return z.shape != other.shape
    z, other = z.detach(), other.detach()
    scale = max(float(other.abs().max()), largest)
    return not float((z - other).abs().max()) <= ROUNDING.get(dtype, 0.1) * scale


def largest_of(z: Tensor, least: float = SMALL) -> float:
    """The largest size of some numbers, or what it is at least; NaN where one is."""
    if not z.numel():
        return least
    low, high = z.detach().aminmax()
    return max(float(high), -float(low), least) if bool(high == high) else math.nan


def _check_draws(network: Network, inputs: Inputs, rows: list[Tensor]) -> None:
    """A model that draws without effect (a layer dropped in training alone) is no random one."""
    for _ in range(REPEATS):
        for n, (z, row) in enumerate(zip(network.forward(inputs), rows, strict=True)):
            if differs(z, row, network.coarsest(z)):
                raise RuntimeError(COUPLED.format(n))
