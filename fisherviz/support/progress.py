"""The progress bar of long work: after a moment, on a terminal or in a notebook, and never where it is turned off.

Work that ends within the moment shows nothing, and neither do logs and pipes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm.auto import tqdm

MOMENT = 2.0
"""Seconds without a bar."""
_shown: ContextVar[bool] = ContextVar("shown", default=True)


def progress_bar(items: Iterable[Any] | int | None, what: str, unit: str, shown: bool = True) -> tqdm:
    """A bar that goes away when it is done.

    Args:
        items: what to iterate over; or their number, None where that is unknown, for those who update the bar.
        what: the work, before the bar.
        unit: what an item is.
        shown: False turns the bar off, and so does `showing(False)`.

    Returns:
        The bar.
    """
    given = {"total": items} if items is None or isinstance(items, int) else {"iterable": items}
    off = not (shown and _shown.get() and watched())
    return tqdm(**given, desc=what, unit=unit, leave=False, delay=MOMENT, disable=off)


@contextmanager
def showing(shown: bool) -> Iterator[None]:
    """What runs inside shows its bars, or none does where `shown` is False here or further out."""
    token = _shown.set(shown and _shown.get())
    try:
        yield
    finally:
        _shown.reset(token)


def watched() -> bool:
    """Whether somebody may be looking: a terminal, or a notebook's widgets."""
    # `tqdm.auto` has decided which; disable=None would hide the bar in a notebook, whose stderr is no terminal
    widgets = any(cls.__module__ == "tqdm.notebook" for cls in tqdm.__mro__)
    return widgets or bool(getattr(sys.stderr, "isatty", lambda: False)())
