"""Measurements that leave tensors behind, such as trained weights, which other measurements start from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fisherviz.papers.trials.work import Run, kept, place
from fisherviz.support.files import write_whole
from fisherviz.support.sealing import read_sealed, seal

State = dict[str, Any]


def kept_state(
    what: Mapping[str, Any], measure: Callable[[], tuple[dict[str, Any], State]], run: Run
) -> tuple[dict[str, Any], State]:
    """A measurement with the state that it ended in, or what is kept of them; see `kept`.

    Args:
        what: everything that decides it, as JSON holds it.
        measure: gives the measurement and the state (tensors, numbers, and dictionaries of them).
        run: where they are kept, side by side.

    Returns:
        Both. Where the measurement is kept without its state, which is large, the state is made again.
    """
    path = place(what, run, ".state")
    made: list[State] = []

    def measured() -> dict[str, Any]:
        result, state = measure()
        made.append(state)
        if path is not None:
            write_whole(path, seal(state))
        return result

    found = kept(what, measured, run)
    if not made and path is not None and path.exists():
        return found, read_sealed(path)
    if not made:
        measured()
    return found, made[0]
