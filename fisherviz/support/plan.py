"""A plan: what requests will take, step by step, before any of it is done.

Counts do not depend on the machine; seconds do, and are these counts at the speed of one matrix product here.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from fisherviz.support.memory import available
from fisherviz.support.numbers import human, three_digits
from fisherviz.support.tables import html_table, text_table

_SIDE = 768
"""Of the matrices whose product tells a device's speed."""


@dataclass(frozen=True)
class Step:
    """One step of a plan.

    Attributes:
        what: the request, or the part of one.
        how: the algorithm.
        multiply_adds: in matrix products and factorisations.
        bytes: held at its peak, beside the model and the data.
        passes: of the network over all data, in forward+backward passes of its loss.
        at_most: whether iterations may end before all of this is done.
        allowed: bytes that it may hold; None: the whole budget.
    """

    what: str
    how: str
    multiply_adds: float = 0.0
    bytes: float = 0.0
    passes: float = 0.0
    at_most: bool = False
    allowed: float | None = None


class Plan:
    """Steps with what they take; printed as a table, multiply-adds in billions (GMACs).

    Args:
        steps: one after the other.
        device: where they run.
        dtype: in which precision.
        pass_seconds: of one forward+backward pass over the data.
    """

    def __init__(self, steps: Iterable[Step], device: torch.device, dtype: torch.dtype, pass_seconds: float) -> None:
        self.steps: Sequence[Step] = tuple(steps)
        self.device, self.pass_seconds = device, pass_seconds
        self.budget = available(device)
        """Bytes that may be held: those that are free, or `fv.config.memory_budget`."""
        self._speed = speed(device, dtype)

    @property
    def multiply_adds(self) -> float:
        """Of all steps."""
        return sum(step.multiply_adds for step in self.steps)

    @property
    def passes(self) -> float:
        """Of all steps."""
        return sum(step.passes for step in self.steps)

    @property
    def bytes(self) -> float:
        """At the peak of the largest step."""
        return max((step.bytes for step in self.steps), default=0.0)

    @property
    def seconds(self) -> float:
        """Of all steps, about."""
        return sum(map(self._seconds, self.steps))

    @property
    def fits(self) -> bool:
        """Whether every step stays within what it may hold."""
        return all(map(self._fits, self.steps))

    def _fits(self, step: Step) -> bool:
        return step.bytes <= (self.budget if step.allowed is None else min(step.allowed, self.budget))

    def _seconds(self, step: Step) -> float:
        return step.multiply_adds / self._speed + step.passes * self.pass_seconds

    def frame(self) -> pd.DataFrame:
        """A row per step: what, how, passes, multiply_adds, bytes, seconds, at_most, fits."""
        rows = [
            (s.what, s.how, s.passes, s.multiply_adds, s.bytes, self._seconds(s), s.at_most, self._fits(s))
            for s in self.steps
        ]
        columns = ["what", "how", "passes", "multiply_adds", "bytes", "seconds", "at_most", "fits"]
        return pd.DataFrame(rows, columns=columns)

    def _rows(self) -> list[list[str]]:
        rows = []
        for step in self.steps:
            most = "≤ " if step.at_most else ""
            rows.append(
                [
                    step.what,
                    step.how,
                    f"{step.passes:.1f}" if step.passes else "",
                    most + billions(step.multiply_adds),
                    human(step.bytes) + ("" if self._fits(step) else " (too much)"),
                    most + duration(self._seconds(step)),
                ]
            )
        return rows

    @property
    def verdict(self) -> str:
        """All of it in one sentence."""
        large = ", ".join(dict.fromkeys(step.what for step in self.steps if not self._fits(step)))
        fits = f"{human(self.budget)} may be taken" + (f": too little for {large}." if large else ".")
        return (
            f"{self.passes:.1f} passes and {billions(self.multiply_adds)} billion multiply-adds, about "
            f"{duration(self.seconds)} here; the peak is {human(self.bytes)}, {fits}"
        )

    _HEADS = ("what", "how", "passes", "GMACs", "peak", "time")

    def __repr__(self) -> str:
        return f"{text_table(self._HEADS, self._rows(), (0, 1))}\n{self.verdict}"

    def _repr_html_(self) -> str:
        return html_table(self._HEADS, self._rows(), words=(0, 1), notes=[self.verdict])


def billions(count: float) -> str:
    """A count in billions, to three digits, large ones without an exponent."""
    value = count / 1e9
    return f"{value:,.0f}" if value >= 999.5 else three_digits(value)


def speed(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds per second of a matrix product on a device, the fastest of three."""
    x = torch.ones(_SIDE, _SIDE, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):  # the first warms up
        start = time.perf_counter()
        y = x @ x
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    del y
    return _SIDE**3 / best


def duration(seconds: float) -> str:
    """A time with its unit, to two digits."""
    if seconds < 1:
        return f"{1e3 * seconds:.0f} ms" if seconds >= 1e-3 else "< 1 ms"
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.2g} min" if seconds < 6000 else f"{seconds / 3600:.2g} h"
