"""What went wrong, in one sentence: the option that caused it, and for the user's own code what it raised and where."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


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
        raise OptionError(f"{name}: {sentence(error)}") from error


@contextmanager
def refusing() -> Iterator[None]:
    """Whatever a parser raises on bytes that are not what it takes them for is a ValueError.

    Yields:
        Nothing.

    Raises:
        ValueError: something was raised; its text says what.
    """
    try:
        yield
    except Exception as error:  # parsers of others' formats fail in classes of their own, and in Python's on their way
        said = " ".join(str(error).split())[:200]
        told = said if isinstance(error, ValueError | OSError) and said else f"{type(error).__name__}: {said}"
        raise ValueError(told.rstrip(" .:")) from error


def sentence(error: BaseException) -> str:
    """An error in one sentence: its type unless the package raised it, its text, its place in the user's code."""
    text, place = one_sentence(str(error)), _place(error)
    if not _is_ours(error) or not text:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"{text} ({place})" if place else text


def one_sentence(text: str, longest: int = 600) -> str:
    """A message on one line, cut where it gets too long to read."""
    flat = " ".join(text.split())
    return flat if len(flat) <= longest else flat[: longest - 1] + "…"


def _is_ours(error: BaseException) -> bool:
    """Whether a line of the package raised it, itself or in a call to what is not written in Python."""
    frames = traceback.extract_tb(error.__traceback__)
    return not frames or PACKAGE in Path(frames[-1].filename).parents


def _place(error: BaseException | None) -> str:
    """The innermost line outside the package and of no library that it, or what caused it, came through."""
    while error is not None:
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            own = PACKAGE in Path(frame.filename).parents or frame.filename.startswith(("<", *_LIBRARIES))
            if not own:
                within = "" if frame.name == "<module>" else f", in {frame.name}"
                return f"{Path(frame.filename).name}, line {frame.lineno}{within}"
        error = error.__cause__
    return ""
