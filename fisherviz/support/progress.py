"""The progress bar of long work: after a moment, on a terminal or in a notebook, and never where it is turned off.

Work that ends within the moment shows nothing, and neither do logs and pipes (DESIGN section 3, "long work").
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm

MOMENT = 2.0
"""Seconds without a bar."""


def progress_bar(items: Iterable[Any] | int, what: str, unit: str, shown: bool) -> tqdm:
    """A bar that goes away when it is done.

    Args:
        items: what to iterate over; or their number, for those who update the bar themselves.
        what: the work, before the bar.
        unit: what an item is.
        shown: False turns the bar off.

    Returns:
        The bar.
    """
    given = {"total": items} if isinstance(items, int) else {"iterable": items}
    return tqdm(**given, desc=what, unit=unit, leave=False, delay=MOMENT, disable=not (shown and watched()))


def watched() -> bool:
    """Whether somebody may be looking: a terminal, or a notebook's widgets."""
    # `tqdm.auto` has decided which; disable=None would hide the bar in a notebook, whose stderr is no terminal
    widgets = any(cls.__module__ == "tqdm.notebook" for cls in tqdm.__mro__)
    return widgets or bool(getattr(sys.stderr, "isatty", lambda: False)())
