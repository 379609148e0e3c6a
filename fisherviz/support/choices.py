"""What an option's value must be: one sentence that names the option, what it got, and the nearest right name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """End of a sentence about an unknown name: "; did you mean 'kfac'?", or "." where nothing is near."""
    known = list(known)
    near = set(difflib.get_close_matches(str(given), known, n=len(known) or 1))
    if not near:
        return "."
    # of several that are as near the first on the list, where the usual ones stand
    best = max((name for name in known if name in near), key=lambda name: _likeness(name, str(given)))
    return f"; did you mean {best!r}?"


def _likeness(name: str, given: str) -> float:
    return difflib.SequenceMatcher(None, name, given).ratio()


def unknown(what: str, given: str, known: Iterable[str]) -> str:
    """One sentence on a name that is not there, with the nearest that is, or with all."""
    known = list(known)
    near = did_you_mean(given, known)
    return f"there is no {what} {given!r}" + (f"; it must be one of {', '.join(known)}." if near == "." else near)


def one_of(name: str, value: Any, allowed: Iterable[str]) -> str:
    """The value, if it is on the list; ValueError otherwise."""
    known = list(allowed)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}{did_you_mean(value, known)}")
    return value


def count(name: str, value: Any) -> int:
    """The value, if it is a positive whole number; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive whole number, got {value!r}.")
    return value


def whole(name: str, value: Any) -> int:
    """The value as an int, if it is a whole number of any type; TypeError otherwise."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}.")
    return int(value)


def positive(name: str, value: Any) -> None:
    """Refuse what is not a positive, finite number."""
    if not is_number(value) or not 0 < float(value) < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}.")


def number(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """Refuse what is not a finite number in [low, high]."""
    if not is_number(value) or not low <= float(value) <= high or math.isinf(float(value)):
        most = "" if high == math.inf else f" and at most {high:g}"
        raise ValueError(f"{name} must be a number of at least {low:g}{most}, got {value!r}.")


def share(name: str, value: Any) -> None:
    """Refuse what is not a number in (0, 1]."""
    if not is_number(value) or not 0 < float(value) <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}.")


def flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")


def is_number(value: Any) -> bool:
    """Whether a value is a real number, or a tensor of one."""
    if isinstance(value, Real):
        return not isinstance(value, bool)
    from torch import Tensor  # here: options have names before anything needs torch

    return isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
