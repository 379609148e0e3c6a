"""The output tensor out of what a network returns: a dictionary's entry, an attribute, a place in a tuple."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from fisherviz.support.choices import did_you_mean
from fisherviz.support.errors import OptionError


def picked(name: str | None, returned: Any) -> Tensor:
    """The output that --output names.

    Args:
        name: a key, an attribute or a number counted from 0; several one inside the other with dots between; None: the
            network returns the tensor itself.
        returned: what the network returned.

    Raises:
        OptionError: there is none, and what there is.
    """
    if name is None:
        if isinstance(returned, Tensor):
            return returned
        raise OptionError(f"--output: {_described(returned)}; say which is the output{_example(returned)}.")
    if isinstance(returned, Tensor):
        raise OptionError("--output: the network returns a tensor, which is its output; leave the option out.")
    found = returned
    for step in [name] if name in _names(returned) else name.split("."):
        if step not in _names(found):
            raise OptionError(f"--output: {_described(found)}, and no {step!r}{did_you_mean(step, _names(found))}")
        found = _entry(found, step)
    if not isinstance(found, Tensor):
        raise OptionError(f"--output: {name!r} is no tensor; {_described(found, 'it holds')}.")
    return found


def _names(returned: Any) -> list[str]:
    if isinstance(returned, Mapping):
        return [str(key) for key in returned]
    if isinstance(returned, Sequence) and not isinstance(returned, str):
        return [*map(str, range(len(returned))), *getattr(returned, "_fields", ())]
    if is_dataclass(returned):
        return [field.name for field in fields(returned)]
    return [key for key in getattr(returned, "__dict__", {}) if not key.startswith("_")]


def _entry(returned: Any, name: str) -> Any:
    if isinstance(returned, Mapping):
        return next(value for key, value in returned.items() if str(key) == name)
    if isinstance(returned, Sequence) and name.isdigit():
        return returned[int(name)]
    return getattr(returned, name)


def _described(returned: Any, begin: str = "the network returns") -> str:
    names = _names(returned)
    kind = "a dictionary" if isinstance(returned, Mapping) else f"a {type(returned).__name__}"
    return f"{begin} {kind}{' of ' + ', '.join(map(repr, names)) if names else ''}"


def _example(returned: Any) -> str:
    tensors = [name for name in _names(returned) if isinstance(_entry(returned, name), Tensor)]
    return f", for example --output {tensors[0]}" if tensors else ""
