"""Parts of the work that announce themselves; whoever listens can tell where the time goes.

`part("inversion")` around a block, or above a method, does nothing while nobody listens. There is one listener in a
process: hooks run in threads of autograd's own, and what they do belongs to the step that waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Listener = Callable[[str], AbstractContextManager[None]]
_listeners: list[Listener] = []


@contextmanager
def part(name: str) -> Iterator[None]:
    """Announce what runs inside; a decorator too.

    Args:
        name: of the part, such as "statistics" or "inversion".

    Yields:
        Nothing.
    """
    if not _listeners:
        yield
        return
    with _listeners[-1](name):
        yield


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
