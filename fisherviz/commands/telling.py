"""How commands are mounted: help in whole sentences, what goes wrong in one, and --debug that shows where.

Exit code 2 is for an option, 1 for all else that fails.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from fisherviz.commands.terminal import tell
from fisherviz.support.choices import unknown
from fisherviz.support.errors import OptionError, sentence
from fisherviz.support.names import visible

Debug = Annotated[
    bool,
    typer.Option("--debug", envvar="FISHERVIZ_TRACEBACK", show_envvar=False, help="Show where an error comes from."),
]
_EXPECTED = (ValueError, TypeError, RuntimeError, MemoryError, OSError, ImportError)


def mount(
    app: typer.Typer, function: Callable[..., None], example: str, *, name: str | None = None, shares: bool = False
) -> None:
    """Make a function a command, with an example under its help and the option --debug.

    Args:
        app: where.
        function: whose options are its arguments.
        example: a call of it.
        name: of the command; None: the function's.
        shares: whether processes that torchrun has started share its work; else they are refused.
    """
    own = list(inspect.signature(function, eval_str=True).parameters.values())
    debugging = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)

    def run(**given: Any) -> None:
        with told(given.pop("debug")), _as_flags({p.name: _flag(p) for p in own}):
            if not shares:
                _refuse_processes(" ".join(dict.fromkeys(("fisherviz", str(app.info.name), run.__name__))))
            function(**given)

    run.__name__, run.__doc__ = name or function.__name__, function.__doc__
    run.__signature__ = inspect.Signature([*own, debugging])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (*own, debugging)} | {"return": None}
    app.command(name=name, cls=Command, epilog=f"Example: {example}")(run)


@contextmanager
def told(debug: bool = False) -> Iterator[None]:
    """Whatever fails inside is told in one sentence.

    Args:
        debug: let it through instead, with its traceback.

    Yields:
        Nothing.

    Raises:
        typer.Exit: something failed.
    """
    formatted = warnings.formatwarning
    warnings.formatwarning = lambda *given, **more: visible(formatted(*given, **more))
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OptionError):
            text = str(error)
        else:
            text = sentence(error)
            if not isinstance(error, _EXPECTED):
                text += "; --debug shows the traceback."
        tell(f"fisherviz: {' '.join(text.split())}", err=True)
        raise typer.Exit(2 if isinstance(error, OptionError) else 1) from None
    finally:
        warnings.formatwarning = formatted


@contextmanager
def _as_flags(flags: Mapping[str, str]) -> Iterator[None]:
    """What is wrong with an argument is wrong with its flag: the sentence begins with that."""
    try:
        yield
    except OptionError as error:
        name, colon, rest = str(error).partition(":")
        if not colon or name not in flags:
            raise
        raise OptionError(f"{flags[name]}:{rest}") from error


def _flag(parameter: inspect.Parameter) -> str:
    """The long flag of a command's argument."""
    (option, *_) = getattr(parameter.annotation, "__metadata__", (None,))
    # typer takes the first declaration for the default until it reads the signature
    declared = [getattr(option, "default", None), *(getattr(option, "param_decls", None) or ())]
    declared = [flag for flag in declared if isinstance(flag, str) and flag.startswith("--")]
    return declared[0] if declared else "--" + parameter.name.replace("_", "-")


def _refuse_processes(command: str) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError(
            f"torchrun has started several processes, and `{command}` does not share its work: start it "
            "without torchrun (of all commands `fisherviz report` alone works in several processes)."
        )


class _Whole:
    """Help in whole sentences, and of near names the nearest alone."""

    help: str | None

    def get_short_help_str(self, limit: int = 45) -> str:
        """The first sentence, not cut.

        Args:
            limit: is not kept: lines are wrapped.
        """
        return " ".join((self.help or "").split("\n\n")[0].split())

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer's.

        Args:
            ctx: of the call.
            args: what was typed.
        """
        try:
            return super().parse_args(ctx, args)  # type: ignore[misc]
        except Exception as error:
            if near := getattr(error, "possibilities", None):
                error.possibilities = near[:1]  # type: ignore[attr-defined]
            if isinstance(said := getattr(error, "message", None), str):
                error.message = visible(said)  # type: ignore[attr-defined]
            raise


class Command(_Whole, TyperCommand):
    """A command that answers an unknown option with the nearest one alone."""


class Group(_Whole, TyperGroup):
    """Commands; an unknown one is answered with the nearest."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As typer's.

        Args:
            ctx: of the call.
            args: what was typed.
        """
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            ctx.fail(unknown("command", args[0], self.list_commands(ctx)))
        return super().resolve_command(ctx, args)
