"""The training examples in an order that a seed decides, as batches that any step can be taken from.

Position (epoch, offset) says everything: the permutation of an epoch comes from seed and epoch alone.
Batches may grow as in section 13 of the K-FAC paper, m_k = min(m_1 exp((k − 1)/b), |S|): each holds exactly so many
different examples, the rest of an epoch and then the first of the next that are not in it yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fisherviz import datasets
from fisherviz.support.choices import unknown
from fisherviz.support.errors import OptionError, option
from fisherviz.support.importing import imported
from fisherviz.training.config import Config

Pair = tuple[Tensor, Tensor]
INDEPENDENT = 1
"""Word of the seed that sets the order of independent mini-batches apart."""


@dataclass(frozen=True)
class Position:
    """The next example: `offset` in the permutation of `epoch`, both from 0."""

    epoch: int = 0
    offset: int = 0


class Batches:
    """Mini-batches of one set of examples.

    Args:
        inputs: (N, ...).
        targets: (N, ...).
        size: examples per batch, 0 for all; m₁ of batches that grow.
        full_at: step at which growing batches hold all examples; None: they don't grow, and the last batch of an
            epoch is what is left of it.
        seed: decides the order.

    Raises:
        ValueError: there are no examples, or not as many targets; a size is negative; full_at is below 2.

    Example:
        >>> import torch
        >>> batches = Batches(torch.rand(600, 3), torch.rand(600, 1), size=10, full_at=5)
        >>> [len(x) for x, y in batches.steps(6)]
        [10, 28, 77, 216, 600, 600]
    """

    def __init__(self, inputs: Tensor, targets: Tensor, size: int, full_at: int | None = None, seed: int = 0) -> None:
        if not 0 < len(inputs) == len(targets):
            raise ValueError(f"{len(inputs)} inputs and {len(targets)} targets; give as many of both, at least one.")
        if size < 0 or (full_at is not None and full_at < 2):
            raise ValueError(f"size must not be negative and full_at at least 2, got size={size}, full_at={full_at}.")
        self.inputs, self.targets, self.full_at, self.seed = inputs, targets, full_at, seed
        self.size = min(size or len(inputs), len(inputs))
        self._orders: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.inputs)

    def size_at(self, step: int) -> int:
        """m_k of step k, from 1 (section 13)."""
        if self.full_at is None:
            return self.size
        if step >= self.full_at:
            return len(self)
        b = (self.full_at - 1) / max(math.log(len(self) / self.size), 1e-12)
        return min(round(self.size * math.exp((step - 1) / b)), len(self))

    def steps(self, count: int) -> Iterator[Pair]:
        """The batches of the first steps.

        Args:
            count: how many steps.

        Returns:
            An iterator over pairs of inputs and targets.
        """
        position = Position()
        for step in range(1, count + 1):
            x, y, position = self.take(position, step)
            yield x, y

    def take(self, position: Position, step: int) -> tuple[Tensor, Tensor, Position]:
        """The batch at a position and the position after it.

        Args:
            position: of its first example.
            step: its number, from 1, which decides the size of growing batches.
        """
        wanted, order = self.size_at(step), self._order(position.epoch)
        chosen = order[position.offset : position.offset + wanted]
        after = Position(position.epoch, position.offset + len(chosen))
        if self.full_at is not None and len(chosen) < wanted:
            more, end = self._others(position.epoch + 1, chosen, wanted - len(chosen))
            chosen, after = torch.cat([chosen, more]), Position(position.epoch + 1, end)
        if after.offset == len(self):
            after = Position(after.epoch + 1, 0)
        return self.inputs[chosen], self.targets[chosen], after

    def _others(self, epoch: int, taken: Tensor, count: int) -> tuple[Tensor, int]:
        """The first so many of an epoch that are not taken yet, and where they end."""
        order = self._order(epoch)
        free = torch.ones(len(self), dtype=torch.bool, device=order.device)
        free[taken] = False
        places = free[order].nonzero().flatten()[:count]
        return order[places], int(places[-1]) + 1

    def once(self) -> list[Pair]:
        """All examples in their own order, batch by batch."""
        return list(zip(self.inputs.split(self.size), self.targets.split(self.size), strict=True))

    def independent(self, size: int | None = None) -> Reordered:
        """All examples in another order than training's, for Fishers of an independent mini-batch.

        Args:
            size: examples per batch; None: as many as training's.
        """
        return Reordered(self, size or self.size)

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            kept = {one: order for one, order in self._orders.items() if one == epoch - 1}
            self._orders = {**kept, epoch: permutation(len(self), self.seed, epoch).to(self.inputs.device)}
        return self._orders[epoch]


class Reordered:
    """Mini-batches of the same examples in another order, the same every time.

    Args:
        batches: the training batches.
        size: examples per batch.
    """

    def __init__(self, batches: Batches, size: int) -> None:
        self.batches, self.size = batches, size

    def __iter__(self) -> Iterator[Pair]:
        """Batch by batch."""
        order = permutation(len(self.batches), self.batches.seed, 0, INDEPENDENT).to(self.batches.inputs.device)
        for chosen in order.split(self.size):
            yield self.batches.inputs[chosen], self.batches.targets[chosen]


def permutation(count: int, *words: int) -> Tensor:
    """A permutation that the words decide."""
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
    return torch.randperm(count, generator=torch.Generator().manual_seed(int(state) >> 1), device="cpu")


@option("dataset")
def load_dataset(config: Config) -> datasets.Dataset:
    """The data set of a run, on its device and in its floating-point type.

    Raises:
        ValueError: it is unknown, or an option does not fit it.
    """
    task = config.task
    if task is None and config.model.endswith("-autoencoder"):
        task = "autoencoder"
    if config.dataset in datasets.names():
        found = datasets.load(
            config.dataset, size=config.size, task=task, standardise=config.standardise,
            limit=config.limit, seed=config.data_seed, progress=not config.quiet,
        )  # fmt: skip
    elif ":" in config.dataset:
        given = imported(config.dataset)
        found = given() if callable(given) and not isinstance(given, datasets.Dataset) else given
        if not isinstance(found, datasets.Dataset):
            raise ValueError(f"{config.dataset} gave {type(found).__name__}; give a fisherviz Dataset.")
        if found.task not in datasets.TASKS:
            raise ValueError(f"{config.dataset} gave a task {found.task!r}; it is one of {', '.join(datasets.TASKS)}.")
        _refuse_loaders(config)
        with option("limit"):
            found = found.subset(train=config.limit)
    else:
        raise ValueError(unknown("data set", config.dataset, datasets.names()))
    return found.to(device=config.device, dtype=getattr(torch, config.dtype))


def _refuse_loaders(config: Config) -> None:
    """Refuse what a loader of the user's decides itself: it would be left unread."""
    for name in ("size", "task", "standardise"):
        if getattr(config, name) is not None:
            raise OptionError(f"{name}: {config.dataset} makes its examples itself; leave it out, or do it there.")


def split(config: Config, dataset: datasets.Dataset) -> tuple[Pair, Pair]:
    """Training and validation examples.

    Raises:
        ValueError: nothing is left for one of them.
    """
    inputs, targets = dataset.train
    if not config.holdout:
        if not len(dataset.test.inputs):
            raise OptionError("holdout: the data set has no test part to validate on; give a share of the training's.")
        return (inputs, targets), (dataset.test.inputs, dataset.test.targets)
    held = round(config.holdout * len(inputs))
    if not 0 < held < len(inputs):
        raise OptionError(f"holdout: a share of {config.holdout} leaves nothing of {len(inputs)} examples on one side.")
    order = permutation(len(inputs), config.data_seed, len(inputs)).to(inputs.device)
    kept, out = order[held:], order[:held]
    return (inputs[kept], targets[kept]), (inputs[out], targets[out])
