"""Moving averages of factors that are brought up to date only now and then, many steps' rows in one product.

Σ_j ε^(k-j) (1-ε) XⱼᵀXⱼ is one Gram matrix of the scaled rows of several steps: the same average, at half the
multiplications (one triangle) and without a pass over the matrix every step. Used where factors are read
rarely.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisherviz.capture.captures import AnyCapture, Capture
from fisherviz.statistics.base import RowsStatistic, Statistic
from fisherviz.statistics.products import gram


class DeferredAverage:
    """The average of one factor, with rows that are not in it yet.

    Args:
        average: the statistic that `flush` brings up to date.
    """

    def __init__(self, average: Statistic) -> None:
        self.average = average
        self.buffer: Tensor | None = None
        self.used = 0
        self.decayed = 1.0
        """Product of the decays since the last flush."""

    def add(self, rows: Tensor, weight: float, decay: float, share: float) -> None:
        """Later: average ← decay · average + share · weight · rowsᵀ rows."""
        width = rows.shape[1]
        if self.buffer is not None and self.used + len(rows) > len(self.buffer):
            self.flush()
        if self.buffer is None:
            self.buffer = rows.new_empty(max(width, len(rows)), width)
        self.decayed *= decay
        into = self.buffer[self.used : self.used + len(rows)]
        torch.mul(rows, (share * weight / self.decayed) ** 0.5, out=into)
        self.used += len(rows)

    def flush(self) -> None:
        """Bring the average up to date."""
        if self.used == 0 or self.buffer is None:
            return
        assert self.average.total is not None
        self.average.total.add_(gram(self.buffer[: self.used])).mul_(self.decayed)
        self.used, self.decayed = 0, 1.0

    def state_dict(self) -> dict[str, Any]:
        """The rows as they are: flushing here would round differently from a run that is not saved."""
        held = None if self.buffer is None or self.used == 0 else self.buffer[: self.used].clone()
        return {"rows": held, "decayed": self.decayed}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore what `state_dict` gave."""
        held = state["rows"]
        self.used, self.decayed, self.buffer = 0, state["decayed"], None
        if held is not None:
            self.buffer = held.new_empty(max(held.shape[1], len(held)), held.shape[1], device=device)
            self.buffer[: len(held)] = held.to(device)
            self.used = len(held)


def deferrable(statistic: Statistic) -> bool:
    """Whether a statistic is the Gram matrix of rows, and no class of its own makes something else of them."""
    return isinstance(statistic, RowsStatistic) and type(statistic).contribution is RowsStatistic.contribution


def rows_of(statistic: Statistic, capture: AnyCapture) -> tuple[Tensor, float] | None:
    """Rows (R, d) and a number w with contribution = w · rowsᵀ rows; None where there are no few such rows."""
    if not isinstance(statistic, RowsStatistic) or not isinstance(capture, Capture) or capture.grouped:
        return None
    rows, weight = statistic.rows(capture)
    return (rows, weight) if 2 * len(rows) <= rows.shape[1] else None
