"""What a model's attributes hold, as it is now, and how to put it back in place: items, values, what is inside them.

`Belongings` relies on it: whatever a forward does to a tensor, array, list, dictionary, set or helper object that it
reaches from an attribute is undone, and all of them stay the objects that they were.
"""

from __future__ import annotations

import io
import logging
import random
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.weak import WeakIdKeyDictionary

from fisherviz.network.items import ATOMS, Attributes, Items, Members, Sequence, holder_of, slots_of
from fisherviz.network.values import Array, Value, generator_state, set_generator_state
from fisherviz.support.warning import warn

SMALL = 2**16
"""Bytes up to which tensors and arrays are copied in every visit."""
MOST = 10_000
"""Things inside one attribute that are looked at; one with more of them is put back at its outermost level alone."""
_RANDOM = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_FOREIGN = (
    nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, Dataset, DataLoader, Iterator, io.IOBase,
    logging.Logger, threading.Thread, type(threading.Lock()), type(threading.RLock()), threading.Condition,
    threading.Event,
)  # fmt: skip
"""What is more than its attributes say: an object that holds one of these is no helper, but runs something."""
_CLOSED = (sys.stdlib_module_names - {"types", "argparse"}) | {
    "torch", "numpy", "pandas", "scipy", "triton", "numba", "fisherviz"
}  # fmt: skip
"""Libraries whose objects are not looked into."""
_written = WeakIdKeyDictionary()
"""Large tensors and arrays that a forward was seen to change: they are copied from then on."""


class _Foreign(Exception):
    """An object is no plain helper."""


class _TooMany(Exception):
    """An attribute holds too much to look at all of it."""


class Contents:
    """Copies of what is found, and where it was.

    Put back are: the items of lists, dictionaries, sets and deques, inside each other to any depth and in circles; the
    attributes of helper objects (of classes outside torch, numpy and Python's library; not of those that hold a module,
    an optimizer, a data set, an iterator, a file, a lock or a thread); values of plain tensors and numpy arrays; states
    of generators. Tensors and arrays above `SMALL` bytes are copied only where `large` asks for it, or if a forward
    changed them while it did: a tensor that changes all the same is named in a warning, an array is overlooked.

    Args:
        large: copy tensors and arrays of any size, and note for later which of them are changed.
    """

    def __init__(self, large: bool) -> None:
        self.large = large
        self.holders: list[Items | Sequence | Members | Attributes] = []
        self.arrays: list[Array] = []
        self.generators: list[tuple[Any, Any]] = []
        self.places: list[tuple[int, Any, Any]] = []
        """Of tensors by id: what holds them, and under which key."""
        self.values: dict[int, Value] = {}
        self.seen: dict[int, Any] = {}
        """By id what was looked at: kept, so that nothing else gets its id."""

    # ---- looking ---------------------------------------------------------------------------------------------------

    def look(self, held: dict[str, Any], key: str) -> None:
        """Keep an attribute's value as it is, and what is inside."""
        value, mark = held[key], self._mark()
        self._left = MOST
        try:
            self._walk([(value, held, key)], strict=False)
        except _TooMany:
            self._back_to(mark)
            if id(value) not in self.seen and (holder := holder_of(value)) is not None:
                self.seen[id(value)] = value
                self.holders.append(holder)

    def look_at_buffer(self, held: dict[str, Any], key: str, buffer: Tensor) -> None:
        """Keep a buffer's values, of any layout and size."""
        own = id(buffer)
        if own not in self.values:
            self.values[own] = Value(buffer, copied=True, large=False)
        if type(held) is dict:  # a scripted module gives no place
            self.places.append((own, held, key))

    def _walk(self, found: list[tuple[Any, Any, Any]], strict: bool) -> None:
        """Keep values, given with what holds them and the key there, and all inside; strictly, nothing foreign."""
        while found:
            value, held, key = found.pop()
            if isinstance(value, Tensor):
                self._tensor(value, held, key)
            elif id(value) in self.seen:
                continue
            else:
                self.seen[id(value)] = value
                if strict and isinstance(value, _FOREIGN):
                    raise _Foreign
                found += self._inside(value, strict)
            self._left -= 1
            if self._left < 0:
                raise _TooMany

    def _inside(self, value: Any, strict: bool) -> list[tuple[Any, Any, Any]]:
        """Keep one thing, and give what is inside."""
        if isinstance(value, np.ndarray):
            if value.flags.writeable and (self.large or value.nbytes <= SMALL or value in _written):
                self.arrays.append(Array(value, value.nbytes > SMALL))
        elif isinstance(value, _RANDOM):
            self.generators.append((value, generator_state(value)))
        elif isinstance(value, tuple | frozenset):
            return [(item, None, None) for item in value if type(item) not in ATOMS]
        elif (holder := holder_of(value)) is not None:
            return self._holds([holder, *_attributes(value)])
        elif _is_helper(value):
            if strict:
                return self._holds(_attributes(value))
            mark = self._mark()
            try:
                self._walk(self._holds(_attributes(value)), strict=True)
            except _Foreign:
                self._back_to(mark)
        return []

    def _holds(self, holders: list[Any]) -> list[tuple[Any, Any, Any]]:
        self.holders += holders
        return [each for holder in holders for each in holder.inside()]

    def _tensor(self, tensor: Tensor, held: Any, key: Any) -> None:
        if type(tensor) is not Tensor:
            return  # a parameter, or of a class with rules of its own
        if id(tensor) not in self.values:
            small = tensor.layout == torch.strided and not tensor.is_nested and tensor.nbytes <= SMALL
            self.values[id(tensor)] = Value(tensor, small or self.large or tensor in _written, large=not small)
        if held is not None:
            self.places.append((id(tensor), held, key))

    def _mark(self) -> list[int]:
        return [len(each) for each in self._journals()]

    def _back_to(self, mark: list[int]) -> None:
        """Forget what was found since, but that it was seen."""
        for each, length in zip(self._journals(), mark, strict=True):
            if isinstance(each, list):
                del each[length:]
            while len(each) > length:
                each.popitem()  # the last one

    def _journals(self) -> list[Any]:
        return [self.holders, self.arrays, self.generators, self.places, self.values, self.seen]

    # ---- putting back ----------------------------------------------------------------------------------------------

    def hand_back(self) -> None:
        """Items and attributes are those that were there."""
        for holder in self.holders:
            holder.put_back()

    def refresh(self) -> None:
        """Before a forward, after `hand_back`: values are as they were, in new tensors: graphs hold the old ones."""
        if changed := {own: value for own, value in self.values.items() if value.changed()}:
            somewhere = {own for own, _, _ in self.places}
            fresh = {own: value.fresh() for own, value in changed.items() if own in somewhere}
            for own, held, key in self.places:
                if fresh.get(own) is not None:
                    held[key] = fresh[own]
            for own, value in changed.items():
                if fresh.get(own) is None:  # also in a tuple, a set or a slot
                    value.restore()
        for array in self.arrays:
            array.restore()

    def restore(self) -> None:
        """At the end, after `hand_back`: values and states are what and as they were."""
        for value in self.values.values():
            if value.restore() and value.large and value.tensor not in _written:
                _written[value.tensor] = True
                if value.saved is None:
                    self._lost(value.tensor)
        for array in self.arrays:
            if array.restore() and array.large:
                _written[array.array] = True
        for generator, state in self.generators:
            set_generator_state(generator, state)

    def _lost(self, tensor: Tensor) -> None:
        name = next((key for own, _, key in self.places if own == id(tensor)), "")
        warn(
            f"a forward changed a tensor {tuple(tensor.shape)} in place that the model holds as {name!r}: it was too "
            "large to be copied before it was known to change, and its values are those after the passes; register it "
            "as a buffer, which is always put back."
        )


def _attributes(value: Any) -> list[Any]:
    """An object's attributes in a dictionary, and those in slots."""
    own: list[Any] = [Items(vars(value))] if type(getattr(value, "__dict__", None)) is dict else []
    return own + [Attributes(value, names) for names in [slots_of(type(value))] if names]


def _is_helper(value: Any) -> bool:
    """Whether an object may be one whose attributes are all that it is."""
    return type(value).__module__.partition(".")[0] not in _CLOSED and not isinstance(value, (type, *_FOREIGN))
