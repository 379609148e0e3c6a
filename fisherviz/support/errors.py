"""What is wrong, in one sentence: with an option, which it begins with, or with something that is left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class OptionError(ValueError):
    """What is wrong with an option of a command, in one sentence that begins with the option."""


@contextmanager
def option(name: str) -> Iterator[None]:
    """Whatever fails inside is told as a problem of one option.

    Args:
        name: of the option or the field, for example "--weights".

    Yields:
        Nothing.

    Raises:
        OptionError: something failed.
    """
    try:
        yield
    except OptionError:
        raise
    except Exception as error:  # the code inside may be the user's own: anything can come out of it
        told = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        raise OptionError(f"{name}: {one_sentence(told) or type(error).__name__}") from error


def said(error: Exception) -> str:
    """What ended something, with the kind of error: the message alone may be a key or nothing."""
    return f"{type(error).__name__}: {one_sentence(str(error))}"


def one_sentence(text: str, longest: int = 600) -> str:
    """A message on one line, cut where it gets too long to read."""
    flat = " ".join(text.split())
    return flat if len(flat) <= longest else flat[: longest - 1] + "…"
