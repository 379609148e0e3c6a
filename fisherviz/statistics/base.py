"""Statistic: a sum over examples that a Capture updates, with its count.

Every statistic merges (batches, processes), blends (exponential decay), and serialises; one pass over the data feeds
all that approximations and optimizers name. A second moment of rows shows its rows (`RowsStatistic`), so that a moving
average can wait with the product.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from fisherviz.capture.batch import Batch
from fisherviz.capture.captures import AnyCapture
from fisherviz.capture.formed import FormedCapture
from fisherviz.statistics.products import gram, second_moment
from fisherviz.support.choices import one_of
from fisherviz.support.counting import count_too
from fisherviz.support.processes import Processes

Setting = Literal["expand", "reduce", "sum"]
SETTINGS: tuple[Setting, ...] = ("expand", "reduce", "sum")


class Statistic(ABC):
    """A sum over examples of something that the captures of one or two layers show.

    Attributes:
        layers: names of the layers whose captures it reads.
        setting: how positions that share weights are taken together, where that is a choice.
        total: the running sum, None before the first update; the mean while `normalised`.
        count: the number of examples in it.
        normalised: whether `normalise` has turned the sum into the mean.
    """

    needs_gradients: ClassVar[bool] = True
    """Whether it reads pseudo-gradients; a pass for statistics that do not skips the backward half."""
    needs_rows: ClassVar[bool] = True
    """Whether it reads inputs or pseudo-gradients by themselves; otherwise per-example gradients are enough."""
    forms: ClassVar[bool] = False
    """Whether it reads per-example gradients, which are formed for it where they are smaller."""
    needs_slopes: ClassVar[bool] = False
    """Whether it reads derivatives of what stands between layers."""
    lasting: ClassVar[bool] = True
    """Whether a later fit may want the same; what hangs on this fit's own numbers is forgotten with it."""

    def __init__(self, *layers: str, setting: Setting | None = None) -> None:
        if setting is not None:
            one_of("setting", setting, SETTINGS)
        self.layers, self.setting = layers, setting
        self.total: Tensor | None = None
        self.count = 0.0
        self.normalised = False

    @property
    def key(self) -> Hashable:
        """Equal for statistics that hold the same quantity, so that a pass computes it once."""
        return (type(self).__name__, *self.layers, self.setting)

    def empty(self) -> Self:
        """The same statistic of no example yet."""
        made = copy.copy(self)
        made.total, made.count, made.normalised = None, 0.0, False
        return made

    @abstractmethod
    def contribution(self, *captures: AnyCapture) -> Tensor:
        """The sum over the examples of a batch, from the captures of `layers`."""

    def spared(self, kept: FormedCapture) -> int:
        """Operations that it would have taken beside, had the gradients not been formed before."""
        return kept.operations

    @property
    def mean(self) -> Tensor:
        """The sum over the count; RuntimeError before the first update."""
        if self.total is None:
            raise RuntimeError(f"{self.key} has seen no example yet; update it first.")
        return self.total if self.normalised or self.count == 1 else self.total / self.count

    def normalise(self) -> None:
        """Turn the sum into the mean, in place: no second copy is held by those who read the mean."""
        if self.total is not None and not self.normalised:
            self.total.div_(self.count)
            self.normalised = True

    def _sum(self) -> Tensor | None:
        return self.total if self.total is None or not self.normalised else self.total * self.count

    def update(self, batch: Batch) -> None:
        """Add a batch."""
        if batch.later and not self.needs_gradients:
            return  # the same inputs with other vectors
        captures = {name: batch.smaller(name) if self.forms else batch.captures[name] for name in self.layers}
        found = self.contribution(*(captures[name] for name in self.layers))
        for capture in captures.values():
            if isinstance(capture, FormedCapture):
                count_too(self.spared(capture))
        self.add(found, 0 if batch.later else batch.examples)

    def add(self, total: Tensor, count: float) -> None:
        """Add a sum over `count` examples."""
        if total.dtype in (torch.float16, torch.bfloat16):
            total = total.float()
        self.total, self.normalised = self._sum(), False
        # the first sum may be a view of a capture; later ones are added into memory of our own
        self.total = (
            total.clone()
            if self.total is None and total._is_view()
            else (total if self.total is None else self.total.add_(total))
        )
        self.count += count

    def merge(self, other: Statistic) -> None:
        """Add the examples of another statistic of the same key."""
        if other.key != self.key:
            raise ValueError(f"cannot merge {other.key} into {self.key}; they hold different quantities.")
        added = other._sum()
        if added is not None:
            self.add(added if other.normalised else added.clone(), other.count)

    def blend(self, other: Statistic, decay: float) -> None:
        """Exponential moving average of means: decay * self + (1 - decay) * other; starts as `other`."""
        if other.total is None:
            raise RuntimeError(f"{other.key} has seen no example yet; update it first.")
        share = 1.0 if other.normalised else 1 / other.count
        if self.total is None:
            self.total = other.total * share
        else:  # in place: a moving average is the optimizers' every step
            self.normalise()
            self.total.mul_(decay).add_(other.total, alpha=(1 - decay) * share)
        self.count, self.normalised = 1.0, False

    def state_dict(self) -> dict[str, Any]:
        """Total and count."""
        total = self._sum()
        return {"total": None if total is None else total.clone(), "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        total = state["total"]
        self.total, self.normalised = None if total is None else total.clone(), False
        self.count = float(state["count"])


class RowsStatistic(Statistic):
    """A second moment w XᵀX, known by rows X and a weight w."""

    def __init__(self, layer: str, setting: Setting = "expand") -> None:
        super().__init__(layer, setting=setting)

    @abstractmethod
    def values(self, capture: AnyCapture) -> tuple[Tensor, bool, float]:
        """Rows (..., d), whether they are (..., groups, d) of a grouped convolution, and w."""

    def rows(self, capture: AnyCapture) -> tuple[Tensor, float]:
        """Rows (R, d), or (groups, R, d) of a grouped convolution, and w."""
        x, grouped, weight = self.values(capture)
        return _by_group(x, grouped), weight

    def diagonal(self, capture: AnyCapture) -> Tensor | None:
        """The moment's diagonal (d,), where its rows are one-hot and it has no other entries; None elsewhere."""
        return None

    def contribution(self, *captures: AnyCapture) -> Tensor:
        """Sum over the batch and its vectors."""
        if (alone := self.diagonal(captures[0])) is not None:
            return alone
        x, grouped, weight = self.values(captures[0])
        total = gram(_by_group(x, grouped)) if grouped else second_moment(x)
        return total if weight == 1 else total.mul_(weight)


def _by_group(x: Tensor, grouped: bool) -> Tensor:
    """Rows (R, d), or (groups, R, d), from (..., d) or (..., groups, d)."""
    return x.flatten(0, -3).transpose(0, 1) if grouped else x.flatten(0, -2)


def update_all(statistics: Iterable[Statistic], batch: Batch) -> None:
    """Feed one batch to all statistics."""
    for statistic in statistics:
        statistic.update(batch)


def needs_slopes(statistics: Iterable[Statistic]) -> bool:
    """Whether any reads derivatives of what stands between layers."""
    return any(statistic.needs_slopes for statistic in statistics)


def add_up(statistics: Iterable[Statistic], processes: Processes) -> None:
    """Make of each process's sums those of all of them; a process may have seen no example.

    Args:
        statistics: of the same keys in the same order in all processes, not normalised.
        processes: whose sums are added.
    """
    if processes.count == 1:
        return
    mine = list(statistics)
    totals = processes.add_up([statistic.total for statistic in mine])
    counts = processes.exchange([statistic.count for statistic in mine])
    for statistic, total, of_all in zip(mine, totals, zip(*counts, strict=True), strict=True):
        statistic.total, statistic.count = total, sum(of_all)
