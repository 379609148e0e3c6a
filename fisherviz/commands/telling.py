"""What goes wrong is told in one sentence: exit code 2 for an option, else 1; FISHERVIZ_TRACEBACK=1 shows where."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand

from fisherviz.support.errors import OptionError, one_sentence


@contextmanager
def told(hint: str = "") -> Iterator[None]:
    """Whatever fails inside is told in one sentence.

    Args:
        hint: said after what no option is to blame for.

    Yields:
        Nothing.

    Raises:
        typer.Exit: something failed.
    """
    try:
        yield
    except (ValueError, TypeError, RuntimeError, MemoryError, OSError, ImportError) as error:
        if isinstance(error, typer.Exit) or os.environ.get("FISHERVIZ_TRACEBACK"):
            raise
        guilty = isinstance(error, OptionError)
        sentence = one_sentence(str(error)) or type(error).__name__
        typer.echo(f"fisherviz: {sentence}{'' if guilty else hint}", err=True)
        raise typer.Exit(2 if guilty else 1) from None


class Command(TyperCommand):
    """A command that answers an unknown option with the nearest one alone."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer's.

        Args:
            ctx: of the call.
            args: what was typed.
        """
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if near := getattr(error, "possibilities", None):
                error.possibilities = near[:1]  # type: ignore[attr-defined]
            raise
