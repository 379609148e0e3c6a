"""What a run that is continued is held against: the weights that a checkpoint has, and the versions that wrote it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch

from fisherviz._version import __version__

Moves = Mapping[str, tuple[str, str]]


def versions() -> dict[str, str]:
    """What the numbers of a run hang on, beside its configuration and data."""
    return {"fisherviz": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def other_versions(before: Mapping[str, str] | None) -> Moves:
    """The versions that are others than those that wrote a checkpoint, as they were and are.

    Args:
        before: the checkpoint's; None: an older release did not note them.
    """
    now = versions()
    return {name: (version, now.get(name, "")) for name, version in (before or now).items() if version != now.get(name)}


def said(moves: Moves) -> str:
    """What other versions mean for a continued run, as the end of a sentence; "" where there are none.

    Args:
        moves: what `other_versions` found.
    """
    told = ", ".join(f"{name} {old} before and {new} now" for name, (old, new) in moves.items())
    return f"; the numbers may differ from an uninterrupted run's: {told}" if told else ""


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The first weight of two networks that is not in both, or not of one shape, in words; "" where there is none.

    Args:
        ours: a `state_dict`.
        theirs: another.
    """
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            return f"the weight {name!r} is in one of them only"
        shapes = [tuple(getattr(state[name], "shape", ())) for state in (ours, theirs)]
        if shapes[0] != shapes[1]:
            return f"the weight {name!r} has the shapes {shapes[0]} and {shapes[1]}"
    return ""
