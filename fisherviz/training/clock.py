"""Where a step's time goes: forward, backward, statistics, inversion, the rest; nothing counted twice.

A part that runs inside another is taken off it. The package's optimizers are watched at the methods named in
`PARTS`; "inversion" holds factorising the damped matrix and the solve with it. All else counts as "step",
also the complete KFAC's own forwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

PARTS = {
    "statistics": (
        "_collect", "update_moments", "update_missing", "estimate", "update_inputs", "update_outputs", "average_data",
        "again",
    ),
    "inversion": ("preconditioner_now", "damped", "solve", "woodbury", "preconditioning", "conjugate_gradients"),
}  # fmt: skip
"""Methods of an optimizer or of its directions that belong to a part."""
WATCHER_PARTS = {"statistics": ("fire", "_finish")}
"""Methods of the optimizer's watcher, which run inside the user's backward."""
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

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Count the parts of one of the package's optimizers."""
        if not self.enabled:
            return
        own = (optimizer, PARTS), (getattr(optimizer, "directions", None), PARTS)
        for target, parts in (*own, (getattr(optimizer, "_watcher", None), WATCHER_PARTS)):
            for name, methods in parts.items():
                for method in methods:
                    if target is not None and hasattr(target, method):
                        setattr(target, method, self._counted(name, getattr(target, method)))

    def _counted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if not self._stack:  # outside a step: an evaluation that somebody else measures
                return method(*args, **kwargs)
            with self.part(name):
                return method(*args, **kwargs)

        return counted

    def _turn(self) -> None:
        """The time since the last border belongs to the innermost part."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._stack:
            name = self._stack[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now
