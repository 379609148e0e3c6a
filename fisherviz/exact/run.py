"""One pass over the data as one process makes it: its share of each batch, and what is kept of its captures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor

from fisherviz.capture.batch import Batch
from fisherviz.capture.joined import concatenated_bytes, extents, ragged, with_later
from fisherviz.capture.network import Network
from fisherviz.capture.structure import PathChanged
from fisherviz.capture.take import VectorSource, take, vectors_of_one
from fisherviz.capture.witness import Witness
from fisherviz.exact.kept import Held
from fisherviz.network.batches import Batches, Inputs, count_examples, select
from fisherviz.support.memory import give_back
from fisherviz.support.processes import Processes
from fisherviz.support.progress import progress_bar
from fisherviz.support.timing import Effort, so_far


class View(Protocol):
    """What a Fisher is taken of: a `Probe`."""

    @property
    def network(self) -> Network:
        """The network with its probed layers."""


class Run:
    """A pass on its way.

    Args:
        network: the network.
        data: its batches.
        vectors: the vectors to backpropagate.
        witness: of the data's outputs.
        processes: that share each batch's examples.
    """

    def __init__(
        self, network: Network, data: Batches, vectors: VectorSource, witness: Witness, processes: Processes
    ) -> None:
        self.network, self.data, self.vectors, self.processes = network, data, vectors, processes
        self.witness = witness
        self.examples = 0
        """Of all processes, so far."""
        self.consumed = Effort()
        """What the consumer took."""
        self.whys: dict[str, str] = {}
        """Why layers turned out to have no structure, by name; the pass has ended there."""
        self.check: Callable[[], None] = lambda: None
        """Called after every batch; where it raises, the pass ends."""
        self._own: list[Batch] | None = None
        self._limit = 0

    def shares(self) -> Iterator[tuple[Inputs, Tensor | None, int]]:
        """This process's part of each batch, with the position of its first example in the data."""
        for inputs, targets in self.data:
            n, first = count_examples(inputs), self.examples
            start, stop = self.processes.share(n, first)
            self.vectors.start(first, n)
            self.check()
            if start < stop:
                alone = self.processes.count == 1
                mine = inputs if alone else select(inputs, start, stop)
                self.witness.see(self.network, mine, first + start)
                yield mine, targets if alone or targets is None else targets[start:stop], first + start
            self.examples += n

    def go(self, consume: Callable[[Batch], None], limit: int, *, labels: bool, forms: bool = True) -> None:
        """Hand this process's captures to a consumer.

        Args:
            consume: called with each `Batch`.
            limit: bytes of captures that may be kept.
            labels: whether the data must have targets.
            forms: whether gradients may be formed to be kept.
        """
        size, pieces = 0, 0
        self._own, self._limit = [] if limit else None, limit

        def hand(batch: Batch) -> None:
            nonlocal size, pieces
            pieces += 1
            bar.update(0 if batch.later else batch.examples)
            start = so_far(self.network.device)
            consume(batch)
            if batch.forming and not forms:
                self._own = None
            if self._own is not None:
                kept = batch.slim()
                size += kept.bytes
                self._own = [*self._own, kept] if size <= limit else None
            self.consumed += so_far(self.network.device) - start
            self.check()

        with progress_bar(None, "passing over the data", "example", self.processes.rank == 0) as bar:
            try:
                for inputs, targets in self.data:
                    self._one(inputs, targets, hand, labels)
            except PathChanged as changed:
                self.whys = {layer.name: layer.note for layer in changed.structure.generic}
        if pieces > 1:
            give_back()

    def _one(self, inputs: Inputs, targets: Tensor | None, hand: Callable[[Batch], None], labels: bool) -> None:
        if labels and targets is None:
            raise ValueError("the gradient needs the data's labels; pass targets= or tuples (inputs, targets).")
        share = self.processes.share(count_examples(inputs), self.examples)
        self.examples += take(self.network, inputs, targets, self.vectors, hand, self.witness, self.examples, share)

    def agreed(self, weights: Callable[[], str]) -> dict[str, str]:
        """Why layers have no structure after all, by what any process found; RuntimeError for other data or weights.

        Args:
            weights: gives the digest of this process's.
        """
        if self.processes.count == 1:
            return self.whys
        said = self.processes.exchange(({"data": self.data.fingerprint, "weights": weights()}, self.whys))
        for what in ("weights", "data"):
            marks = [(rank, marks[what]) for rank, (marks, whys) in enumerate(said) if not whys]
            if others := [rank for rank, mark in marks if mark != marks[0][1]]:
                raise RuntimeError(
                    f"process {others[0]} has other {what} than process {marks[0][0]}; give all processes the same "
                    f"{what}: each takes its own share of the examples, without a DistributedSampler."
                )
        return {name: why for _, whys in said for name, why in whys.items()}

    def held(self) -> Held | None:
        """The captures, where those of all processes fit in each of them."""
        own, names = None if self._own is None else with_later(self._own), self.network.space.names
        mine = None if own is None else [[e for batch in own for e in extents(batch.captures[name])] for name in names]
        of_all, limits = zip(*self.processes.exchange((mine, self._limit)), strict=True)
        if own is None or None in of_all:
            return None
        layers = [[extent for part in parts for extent in part] for parts in zip(*of_all, strict=True)]
        if sum(map(concatenated_bytes, layers)) > min(limits):
            return None  # batches of different lengths, padded to the longest
        vectors = {extent.vectors for layer in layers for extent in layer}
        formed = self.network.structure.forming(vectors_of_one(self.network, self.vectors))
        uneven, differ, slopes = len(vectors) > 1, any(map(ragged, layers)), self.network.slopes
        return Held(own, max(vectors), uneven, differ, self.processes, slopes, formed)
