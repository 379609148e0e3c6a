"""Operators as plain values and tensors: each is recorded as what its constructor takes, and made again from that.

A class joins by keeping its constructor's arguments as attributes of the same names, or by a method `arguments` that
gives them: tensors, numbers, text, operators, and lists, tuples and dictionaries of these. What several hold is written
once. Nothing is imported from a file, and no code is run but constructors of classes that are there.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherviz.operators.base import Operator
from fisherviz.operators.block_matrix import Rescaled
from fisherviz.operators.khatri_rao import LeadingPairs
from fisherviz.operators.permuted import NearChain

Plain = dict[str, Any]
"""What JSON holds."""
_PRECONDITIONERS = (LeadingPairs, Rescaled, NearChain)
_PLAIN = (bool, int, float, str)


class Recorder:
    """Writes values down as plain ones and named tensors.

    Args:
        others: classes beside operators that are recorded by their constructors' arguments.
        segments: names of the segments of the whole operator, for those of its parts.
    """

    def __init__(self, others: tuple[type, ...] = (), segments: Sequence[str] = ()) -> None:
        self.others, self.segments = (*others, *_PRECONDITIONERS), tuple(segments)
        self.tensors: dict[str, Tensor] = {}
        """By name: the way of attributes and positions that leads to each."""
        self._seen: dict[int, tuple[str, Any]] = {}

    def plain(self, value: Any, name: str) -> Any:
        """A value in plain ones.

        Args:
            value: an operator, or anything that its constructor takes.
            name: of its tensors.

        Returns:
            What `Reader.value` turns into the same.

        Raises:
            NotImplementedError: it holds what cannot be written down, such as a function.
        """
        if value is None or isinstance(value, _PLAIN):
            return value
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": "the reader's"}
        if id(value) in self._seen:
            return {"same": self._seen[id(value)][0]}
        if isinstance(value, Tensor):
            self._seen[id(value)] = (name, value)
            self.tensors[name] = value.detach().cpu().contiguous()
            return {"tensor": name}
        if isinstance(value, list | tuple):
            return [self.plain(each, _joined(name, self._label(name, i))) for i, each in enumerate(value)]
        if isinstance(value, Mapping):
            entries = [
                [self.plain(key, name), self.plain(each, _joined(name, self._label(name, key)))]
                for key, each in value.items()
            ]
            return {"entries": entries}
        return self._made(value, name)

    def _label(self, name: str, key: object) -> str:
        """What a part is called: by its segments, where it is one of the whole operator."""
        if isinstance(key, tuple):
            return "-".join(self._label(name, each) for each in key)
        if isinstance(key, int) and key < len(self.segments) and name in ("operators", "blocks"):
            return self.segments[key]
        return str(key)

    def _made(self, value: Any, name: str) -> Plain:
        if not isinstance(value, (Operator, *self.others)):
            raise NotImplementedError(
                f"{name or 'the matrix'} holds a {type(value).__name__}, which cannot be saved; save the approximation "
                "itself, and damp or invert it after loading."
            )
        self._seen[id(value)] = (name, value)
        out: Plain = {"class": _called(type(value)), "name": name}
        out["arguments"] = {key: self.plain(each, _joined(name, key)) for key, each in _arguments(value).items()}
        return out | ({"trusted": True} if getattr(value, "_trusted", False) else {})


class Reader:
    """Makes again what a `Recorder` wrote.

    Args:
        tensors: by name.
        others: as of the recorder.
        device: where everything is to live.
    """

    def __init__(self, tensors: Mapping[str, Tensor], others: tuple[type, ...], device: torch.device) -> None:
        self.tensors, self.device = tensors, device
        self.classes = {_called(cls): cls for cls in (*_subclasses(Operator), *others, *_PRECONDITIONERS)}
        self._made: dict[str, Any] = {}

    def value(self, plain: Any) -> Any:
        """The value that was written down.

        Raises:
            ValueError: it is of a class that is not there, or that takes other arguments.
        """
        if isinstance(plain, list):
            return [self.value(each) for each in plain]
        if not isinstance(plain, dict):
            return plain
        if "dtype" in plain:
            return getattr(torch, plain["dtype"])
        if "device" in plain:
            return self.device
        if "same" in plain:
            return self._made[plain["same"]]
        if "tensor" in plain:
            return self._made.setdefault(plain["tensor"], self.tensors[plain["tensor"]])
        if "entries" in plain:
            return {_key(self.value(key)): self.value(each) for key, each in plain["entries"]}
        made = self._constructed(plain["class"], self.value_of(plain["arguments"]))
        if plain.get("trusted"):
            made.trust()
        self._made[plain["name"]] = made
        return made

    def value_of(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a constructor."""
        return {key: self.value(each) for key, each in arguments.items()}

    def _constructed(self, name: str, arguments: dict[str, Any]) -> Any:
        if name not in self.classes:
            raise ValueError(f"the matrix holds a {name}, which is not there; import the module that defines it first.")
        try:
            return self.classes[name](**arguments)
        except TypeError as error:
            raise ValueError(
                f"the matrix holds a {name} that takes other arguments than it was saved with: {error}."
            ) from error


def _arguments(value: Any) -> dict[str, Any]:
    """What a value's constructor takes again."""
    if (own := getattr(value, "arguments", None)) is not None:
        return own()
    names = list(inspect.signature(type(value)).parameters)
    if missing := [name for name in names if not hasattr(value, name)]:
        raise NotImplementedError(
            f"a {type(value).__name__} cannot be saved: it keeps no attribute {missing[0]!r} of what its constructor "
            "takes; keep it, or define a method arguments() that returns by name all that it cannot do without."
        )
    return {name: getattr(value, name) for name in names}


def _subclasses(cls: type) -> Iterator[type]:
    each: type
    for each in cls.__subclasses__():
        yield each
        yield from _subclasses(each)


def _called(cls: type) -> str:
    """A name that stays when a file of the package moves."""
    return cls.__name__ if cls.__module__.startswith("fisherviz.") else f"{cls.__module__}.{cls.__qualname__}"


def _joined(name: str, part: object) -> str:
    return f"{name}.{part}" if name else str(part)


def _key(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key
