"""Parts of the work that announce themselves; whoever listens can tell where the time goes.

`part("inversion")` around a block, or above a method, does nothing unless a listener is set in this context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

Listener = Callable[[str], AbstractContextManager[None]]
_LISTENER: ContextVar[Listener | None] = ContextVar("fisherviz_timing", default=None)


@contextmanager
def part(name: str) -> Iterator[None]:
    """Announce what runs inside; a decorator too.

    Args:
        name: of the part, such as "statistics" or "inversion".

    Yields:
        Nothing.
    """
    listener = _LISTENER.get()
    if listener is None:
        yield
    else:
        with listener(name):
            yield


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let a listener hear the parts that run inside.

    Args:
        listener: takes a part's name, gives a context manager around it.

    Yields:
        Nothing.
    """
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)
