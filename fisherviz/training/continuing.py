"""What a run that is continued is held against: the weights that its checkpoint has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
