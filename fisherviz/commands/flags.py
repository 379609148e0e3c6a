"""The command line's flags, made from the fields of a configuration, so that both always say the same.

A flag that is not given leaves the file's value, or the field's default, alone.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import typer

from fisherviz.commands.telling import told
from fisherviz.support.errors import OptionError
from fisherviz.training.config import Config, parse

_SHORT = {"model_options": ("--model-option", "-M"), "optimizer_options": ("--optimizer-option", "-O")}


def with_flags(command: Callable[..., None], leave_out: Sequence[str] = ()) -> Callable[..., None]:
    """A typer command whose flags are the fields of `Config`, after those that it declares itself.

    Args:
        command: takes `fields`, the given fields with their values, and options of its own.
        leave_out: fields without a flag.
    """
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    flags = [_flag(name) for name in Config.model_fields if name not in leave_out]

    def run(**given: Any) -> None:
        mine = {p.name: given.pop(p.name) for p in own}
        with told():
            command({name: _value(name, v) for name, v in given.items() if v is not None and v != []}, **mine)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(own + flags)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in own + flags} | {"return": None}
    return run


def _flag(name: str) -> inspect.Parameter:
    field = Config.model_fields[name]
    default = field.get_default(call_default_factory=True)
    names: list[str] = []
    kind, shown = (_plain(field.annotation), str(default).lower() if isinstance(default, bool) else str(default))
    if name in _SHORT:
        kind, names, shown = list[str], list(_SHORT[name]), ""
        text = f"{field.description} NAME=VALUE; may be repeated."
    elif typing.get_origin(kind) is list:
        kind, shown, text = str, ",".join(default), f"{field.description} Separated by commas."
    else:
        text = field.description or ""
    if default is not None and shown:
        text += f" [default: {shown}]"
    option = typer.Option(*names, help=text, show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _plain(annotation: Any) -> Any:
    """The type of a flag: None is what a flag that is not given has."""
    parts = [part for part in typing.get_args(annotation) if part is not type(None)]
    if typing.get_origin(annotation) is Literal:
        return str
    if type(None) in typing.get_args(annotation):
        return parts[0]
    return annotation


def _value(name: str, given: Any) -> Any:
    if name in _SHORT:
        return assignments(_SHORT[name][0], given)
    if isinstance(given, str) and typing.get_origin(Config.model_fields[name].annotation) is list:
        return [part.strip() for part in given.split(",") if part.strip()]
    return given


def assignments(flag: str, texts: Sequence[str]) -> Mapping[str, Any]:
    """NAME=VALUE texts as a mapping, values read as YAML.

    Raises:
        ValueError: one has no "=", or a name comes twice.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise OptionError(f"{flag}: {text!r} is no NAME=VALUE; write for example {flag} lr=0.1.")
        if name.strip() in found:
            raise OptionError(f"{flag}: {name.strip()} is given twice; leave one out.")
        found[name.strip()] = parse(value)
    return found
