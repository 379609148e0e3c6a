"""Parts of the work that announce themselves; whoever listens can tell where the time goes.

`part("inversion")` around a block, or above a method, does nothing while nobody listens. There is one listener in a
process: hooks run in threads of autograd's own, and what they do belongs to the step that waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
Listener = Callable[[str], AbstractContextManager[None]]
_listeners: list[Listener] = []


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
