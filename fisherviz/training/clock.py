"""Where a step's time goes: forward, backward, statistics, inversion, the rest; nothing counted twice.

A part that runs inside another is taken off it. The package's optimizers announce theirs (`support.timing`);
"inversion" holds factorising the damped matrix and the solve with it. All else counts as "step", also the complete
KFAC's own forwards.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fisherviz.support.timing import listening

NAMES = ("forward", "backward", "statistics", "inversion", "step")


class Clock:
    """Counts seconds by part.

    Args:
        device: where the work runs; a GPU is waited for at every border.
        enabled: whether anything is counted but the total.
    """

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        self.device, self.enabled = device, enabled
        self._stack: list[str] = []
        self._since = 0.0
        self._seconds: dict[str, float] = {}

    @contextmanager
    def step(self) -> Iterator[None]:
        """Count what runs inside as "step", but for the parts that announce themselves."""
        with listening(self.part), self.part("step"):
            yield

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs inside, but for parts inside it."""
        if not self.enabled:
            yield
            return
        self._turn()
        self._stack.append(name)
        try:
            yield
        finally:
            self._turn()
            self._stack.pop()

    def lap(self) -> dict[str, float]:
        """Seconds by part since the last lap."""
        found = {name: self._seconds[name] for name in NAMES if name in self._seconds}
        self._seconds = {}
        return found

    def _turn(self) -> None:
        """The time since the last border belongs to the innermost part."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._stack:
            name = self._stack[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now
