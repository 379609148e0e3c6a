"""Outputs of some examples on their own, which every pass over the data must show again among all the others.

What does not: a model that couples its examples, draws at random, or computes another function than in an earlier pass,
since its mode, a hook or an attribute was changed. Weights and buffers have their fingerprint besides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fisherviz.capture.evidence import alone, telling_examples
from fisherviz.capture.network import Network
from fisherviz.capture.ways import is_due
from fisherviz.network.batches import Inputs, count_examples, move, take_rows
from fisherviz.network.guest import RandomState, as_guest
from fisherviz.support.counting import counted_as

FEW = 8
"""Examples that run the other way round, if half of them are not fewer; a quarter of more than four times as many."""
ROUNDING, SMALL = {torch.float64: 1e-6, torch.float32: 1e-4}, 1e-2
"""What an output changes with the examples beside it by rounding, relative to its largest entry or to a small one."""
REPEATS = 32
"""Runs of a model that draws random numbers, to see whether they have an effect."""
Given = Mapping[str, Sequence[Tensor]]
"""What the calls of each layer were given."""
COUPLED = (
    "the model's output for example {} changes with the other examples of the batch, or at random; "
    "a Fisher needs independent examples: call model.eval(), or remove what couples them."
)
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
        self._given: dict[int, Given] = {}
        """What examples gave each layer alone, by their positions in the data; until they are met among the others."""
        self._asked: set[tuple[int, int]] = set()
        self._turned: set[tuple[int, int]] = set()

    def number(self, first: int) -> int:
        """The number of a batch in the data, from zero, by the position of its first example."""
        return self._numbers.setdefault(first, len(self._numbers))

    def asks(self, first: int, count: int) -> bool:
        """Whether so many examples are met for the first time, by the position of the first of them."""
        new = (first, count) not in self._asked
        self._asked.add((first, count))
        return new

    def given(self, first: int, count: int) -> dict[int, Given]:
        """What some of so many examples gave each layer alone, by their places among them; told once.

        Args:
            first: position of the first of them in the data.
            count: number of examples.
        """
        there = [n for n in self._given if first <= n < first + count]
        return {n - first: self._given.pop(n) for n in there}

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
                z, calls = alone(network, inputs, n)
                rows.append(z[0].detach())
                if calls:
                    self._given[first + n] = {name: [call.x for call in made] for name, made in calls.items()}
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
                if finite and differs(own, row, network.coarsest(z)):
                    raise RuntimeError((CHANGED if n in self._confirmed else COUPLED).format(n))
                self._confirmed.add(n)

    def turn(self, network: Network, inputs: Inputs, z: Tensor, first: int) -> None:
        """Run the last of some examples, the last first, or two where no more are due: each must keep its output.

        What couples only some of them (experts that take so many rows and drop the rest) shows in no single one.

        Args:
            network: the network, as a guest.
            inputs: the examples, which have just run.
            z: their outputs (N, ...).
            first: position of the first of them in the data.

        Raises:
            RuntimeError: an output is another.
        """
        count, due = len(z), is_due(len(self._turned))
        if (first, count) in self._turned:
            return
        self._turned.add((first, count))
        if count < 3:
            return
        last = torch.arange(count - 1, count - 1 - max(count // 4, min(count // 2, FEW)), -1, device="cpu")
        rows = last if due else torch.tensor(asked(count, first), device="cpu")
        with counted_as(0):
            again = network.forward(take_rows(inputs, rows)).detach()
        if again.shape[1:] != z.shape[1:]:
            return  # padded to the longest of them
        again, seen = again.flatten(1), z.detach()[rows.to(z.device)].flatten(1)
        gap, largest = (again - seen).abs().amax(1), again.abs().amax(1)
        finite = again.isfinite().all(1)  # what is not is refused with its place
        wrong = finite & ~(gap <= ROUNDING.get(network.coarsest(z), 0.1) * largest.clamp(min=SMALL))
        if bool(wrong.any()):
            raise RuntimeError(COUPLED.format(first + int(rows[wrong.cpu()][0])))


def asked(count: int, first: int) -> list[int]:
    """Two of so many examples: the last, which whatever moves rows moves most often, and another in every piece.

    Args:
        count: number of examples.
        first: position of the first of them in the data.
    """
    return sorted({count - 1, (first // max(1, count) * 7 + count // 3) % count}, reverse=True)


def differs(z: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether outputs of an example differ by more than rounding explains."""
    if z.shape != other.shape or not z.numel():
        return z.shape != other.shape
    z, scale = z.detach(), max(float(other.abs().max()), SMALL)
    return not float((z - other).abs().max()) <= ROUNDING.get(dtype, 0.1) * scale


def _check_draws(network: Network, inputs: Inputs, rows: list[Tensor]) -> None:
    """A model that draws without effect (a layer dropped in training alone) is no random one."""
    for _ in range(REPEATS):
        for n, (z, row) in enumerate(zip(network.forward(inputs), rows, strict=True)):
            if differs(z, row, network.coarsest(z)):
                raise RuntimeError(COUPLED.format(n))
