"""The command line's flags, made from the fields of a pydantic model, so that both always say the same.

A flag that is not given leaves a file's value, or the field's default, alone.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fisherviz.commands.names import COMPLETED, completion
from fisherviz.support.errors import OptionError
from fisherviz.support.plain import from_yaml

_SHORT = {"model_options": ("--model-option", "-M"), "optimizer_options": ("--optimizer-option", "-O")}


def with_flags(
    model: type[BaseModel], completed: Mapping[str, Sequence[str]] = COMPLETED, *, from_files: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a typer command whose flags are the fields of a model, after those that it declares itself.

    Args:
        model: whose fields, with their descriptions.
        completed: names that a shell completes, by field.
        from_files: whether a file may give fields too, so that flags must be able to say no.

    Returns:
        A decorator of a function that takes `fields`, the given fields with their values, and options of its own.
    """
    fields = model.model_fields

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        flags = [_flag(name, field, completed.get(name), from_files) for name, field in fields.items()]

        def run(**given: Any) -> None:
            mine = {p.name: given.pop(p.name) for p in own}
            found = {name: _value(name, fields[name], v) for name, v in given.items() if v is not None and v != []}
            command(found, **mine)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(own + flags)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in own + flags} | {"return": None}
        return run

    return decorated


def _flag(name: str, field: FieldInfo, completed: Sequence[str] | None, from_files: bool) -> inspect.Parameter:
    default = field.get_default(call_default_factory=True)
    names: list[str] = []
    kind, shown, metavar = _plain(field.annotation), str(default), None
    text = field.description or ""
    if name in _SHORT:
        kind, names, shown, metavar = list[str], list(_SHORT[name]), "", "NAME=VALUE"
        text += " May be repeated."
    elif typing.get_origin(kind) in (list, tuple):
        kind, shown, metavar = str, ",".join(default or ()), "NAME,..."
    elif kind is bool:  # its two names say it
        shown, names = "", [] if from_files or default else ["--" + name.replace("_", "-")]
    if default is not None and shown:
        text += f" [default: {shown}]"
    option = typer.Option(
        *names, help=text, show_default=False, metavar=metavar,
        autocompletion=completion(completed) if completed else None,
    )  # fmt: skip
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _plain(annotation: Any) -> Any:
    """The type of a flag: None is what a flag that is not given has."""
    if typing.get_origin(annotation) is Literal:
        return str
    parts = typing.get_args(annotation)
    return parts[0] if type(None) in parts else annotation


def _value(name: str, field: FieldInfo, given: Any) -> Any:
    if name in _SHORT:
        return assignments(_SHORT[name][0], given)
    if isinstance(given, str) and typing.get_origin(_plain(field.annotation)) in (list, tuple):
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
        if not value.strip():
            raise OptionError(f"{flag}: {name.strip()} has no value; write {name.strip()}=null for None.")
        try:
            found[name.strip()] = from_yaml(value)
        except ValueError as error:
            raise OptionError(f"{flag}: {name.strip()} has no value that YAML knows: {error}.") from error
    return found
