"""What work takes, in seconds and operations, and its parts that announce themselves to whoever listens.

`part("inversion")` around a block, or above a method, does nothing while nobody listens. There is one listener in a
process: hooks run in threads of autograd's own, and what they do belongs to the step that waits for them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import torch

from fisherviz.support.counting import counted

F = TypeVar("F", bound=Callable[..., Any])
Listener = Callable[[str], AbstractContextManager[None]]
_listeners: list[Listener] = []


@dataclass(frozen=True)
class Effort:
    """What work took.

    Attributes:
        seconds: on the clock.
        operations: as `counting` counts them, a multiply-add as two; 0 where nobody does.
    """

    seconds: float = 0.0
    operations: int = 0

    def __add__(self, other: Effort) -> Effort:
        return Effort(self.seconds + other.seconds, self.operations + other.operations)

    def __sub__(self, other: Effort) -> Effort:
        return Effort(self.seconds - other.seconds, self.operations - other.operations)


def so_far(device: torch.device) -> Effort:
    """The clock, once a device has done what it was given, and the count; differences say what lies between."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Effort(time.perf_counter(), counted())


class part:
    """Announce a block, or every call of a function; a call without listeners costs one test.

    Args:
        name: of the part, such as "statistics" or "inversion".
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._heard: AbstractContextManager[None] = nullcontext()

    def __enter__(self) -> None:
        self._heard = _listeners[-1](self.name) if _listeners else nullcontext()
        self._heard.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._heard.__exit__(*error)

    def __call__(self, function: F) -> F:
        """The function, announced."""

        @wraps(function)
        def announced(*args: Any, **kwargs: Any) -> Any:
            if not _listeners:
                return function(*args, **kwargs)
            with _listeners[-1](self.name):
                return function(*args, **kwargs)

        return announced  # type: ignore[return-value]


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let a listener hear the parts that run inside, instead of the one that hears them now.

    Args:
        listener: takes a part's name, gives a context manager around it.

    Yields:
        Nothing.
    """
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
