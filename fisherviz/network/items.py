"""Lists, dictionaries, sets and attributes with the items that they have now, and how these are put back.

By the methods of Python's own classes: some of their subclasses refuse to be changed, or do more.
"""

from __future__ import annotations

import collections
import functools
import operator
import types
from typing import Any

import torch
from torch import nn

ATOMS = frozenset(
    {int, float, complex, bool, str, bytes, type(None), type, range, slice, torch.dtype, torch.device, torch.Size,
     types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial, nn.Parameter}
)  # fmt: skip
"""Types with nothing inside that anybody changes."""
CALM = ATOMS | {tuple}
_MISSING = object()


def are_atoms(values: Any) -> bool:
    """Whether nothing among many values has anything inside, told in little time."""
    return ATOMS.issuperset(map(type, values))


class Items:
    """A dictionary and its items, in their order."""

    __slots__ = ("before", "held", "kind")

    def __init__(self, held: dict[Any, Any]) -> None:
        self.held, self.before = held, dict(dict.items(held))
        self.kind = collections.OrderedDict if isinstance(held, collections.OrderedDict) else dict

    def inside(self) -> list[tuple[Any, Any, Any]]:
        """Values with their holder and key."""
        if are_atoms(self.before.values()):
            return []
        return [(value, self.held, key) for key, value in self.before.items() if type(value) not in ATOMS]

    def put_back(self) -> None:
        """The items are those that were there."""
        now, before = self.held, self.before
        keys, values = dict.keys(now), dict.values(now)
        same = len(now) == len(before) and all(map(operator.is_, keys, before))
        if not (same and all(map(operator.is_, values, before.values()))):
            self.kind.clear(now)
            self.kind.update(now, before)


_SEQUENCES = (list, collections.deque, bytearray)


class Sequence:
    """A list, deque or bytearray and its items."""

    __slots__ = ("before", "held", "kind")

    def __init__(self, held: Any) -> None:
        self.kind: Any = next(kind for kind in _SEQUENCES if isinstance(held, kind))
        self.held, self.before = held, list(self.kind.__iter__(held))

    def inside(self) -> list[tuple[Any, Any, Any]]:
        """Items with their holder and place."""
        if are_atoms(self.before):
            return []
        return [(value, self.held, i) for i, value in enumerate(self.before) if type(value) not in ATOMS]

    def put_back(self) -> None:
        """The items are those that were there."""
        now, before = self.held, self.before
        if len(now) != len(before) or not all(map(operator.is_, self.kind.__iter__(now), before)):
            self.kind.clear(now)
            self.kind.extend(now, before)


class Members:
    """A set and its members."""

    __slots__ = ("before", "held")

    def __init__(self, held: set[Any]) -> None:
        self.held, self.before = held, set.copy(held)

    def inside(self) -> list[tuple[Any, Any, Any]]:
        """Members, which have no place."""
        return [(value, None, None) for value in self.before if type(value) not in ATOMS]

    def put_back(self) -> None:
        """The members are those that were there."""
        if not set.__eq__(self.held, self.before):
            set.clear(self.held)
            set.update(self.held, self.before)


class Attributes:
    """An object and what its slots hold."""

    __slots__ = ("before", "held", "names")

    def __init__(self, held: Any, names: tuple[str, ...]) -> None:
        self.held, self.names = held, names
        self.before = [_slot(held, name) for name in names]

    def inside(self) -> list[tuple[Any, Any, Any]]:
        """Values, whose places are no items."""
        return [(value, None, None) for value in self.before if value is not _MISSING and type(value) not in ATOMS]

    def put_back(self) -> None:
        """The slots hold what they held."""
        for name, value in zip(self.names, self.before, strict=True):
            if _slot(self.held, name) is value:
                continue
            if value is _MISSING:
                object.__delattr__(self.held, name)
            else:
                object.__setattr__(self.held, name, value)


def holder_of(value: Any) -> Items | Sequence | Members | None:
    """A container with its items; None for what is none."""
    if isinstance(value, dict):
        return Items(value)
    if isinstance(value, _SEQUENCES):
        return Sequence(value)
    return Members(value) if isinstance(value, set) else None


def slots_of(kind: type) -> tuple[str, ...]:
    """The names of a class's slots."""
    given = [base.__dict__.get("__slots__", ()) for base in kind.__mro__ if base.__module__ != "builtins"]
    names = [name for each in given for name in ((each,) if isinstance(each, str) else each)]
    return tuple(name for name in names if not name.startswith("__"))


def _slot(held: Any, name: str) -> Any:
    try:
        return object.__getattribute__(held, name)
    except AttributeError:
        return _MISSING
