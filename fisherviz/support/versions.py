"""What the numbers of work that goes on later hang on beside its options and data: versions, and the package's code."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from functools import cache

import torch

from fisherviz._version import __version__
from fisherviz.support.errors import PACKAGE

Moves = Mapping[str, tuple[str, str]]


def versions() -> dict[str, str]:
    """Of the package, torch and Python."""
    return {"fisherviz": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def other_versions(before: Mapping[str, str] | None) -> Moves:
    """The versions that are others than those that wrote a checkpoint, as they were and are.

    Args:
        before: the checkpoint's; None: an older release did not note them.
    """
    now = versions()
    return {name: (version, now.get(name, "")) for name, version in (before or now).items() if version != now.get(name)}


def said(moves: Moves) -> str:
    """What other versions mean for a continued run, as the end of a sentence; "" where there are none.

    Args:
        moves: what `other_versions` found.
    """
    told = ", ".join(f"{name} {old} before and {new} now" for name, (old, new) in moves.items())
    return f"; the numbers may differ from an uninterrupted run's: {told}" if told else ""


@cache
def code() -> str:
    """Digest of the package's source: a version's number says nothing of a file that was changed since."""
    found = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        found.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]
