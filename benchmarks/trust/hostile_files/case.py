"""A hostile file, and what the files of several kinds share."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CANARY = "executed"
HUGE = 2**29
"""Bytes that bombs unfold to; they are a thousandth of that."""
TOUCH = f"open({CANARY!r}, 'w').close()"


@dataclass(frozen=True)
class Case:
    """A hostile file.

    Args:
        kind: what the page counts it under.
        name: what is wrong with it.
        entries: the doors, by the names of `doors.DOORS`.
        write: into a folder; gives the path that a door is handed.
        named: what the refusal must name, beside which the file's own name will do.
    """

    kind: str
    name: str
    entries: tuple[str, ...]
    write: Callable[[Path], Path]
    named: str = ""


class Calls:
    """Pickled, it is a call: unpickling makes it."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        """The call."""
        return self.call


def holding(name: str, content: bytes | Callable[[], bytes]) -> Callable[[Path], Path]:
    """Writes a file of this name and content into a folder."""

    def write(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content())
        return path

    return write


def swollen(whole: bytes) -> bytes:
    """The archive with the sizes of its directory's entries at 2 GiB."""
    found = bytearray(whole)
    place = found.find(b"PK\x01\x02")
    while place >= 0:
        struct.pack_into("<II", found, place + 20, 2**31, 2**31)
        place = found.find(b"PK\x01\x02", place + 4)
    return bytes(found)


def beside(name: str, content: bytes | Callable[[], bytes], signed: bool = False) -> Callable[[Path], Path]:
    """Into the folder of a good comparison or run, which the door has put there; gives the folder."""

    def write(folder: Path) -> Path:
        data = content if isinstance(content, bytes) else content()
        (folder / name).write_bytes(data)
        if signed:  # whoever wrote it wrote its sum too
            facts = json.loads((folder / "comparison.json").read_text())
            facts["sha256"][name] = hashlib.sha256(data).hexdigest()
            facts.pop("sealed", None)
            (folder / "comparison.json").write_text(json.dumps(facts))
        return folder

    return write


def flipped(content: bytes, behind: bytes) -> bytes:
    """The same with a bit of a byte changed, twenty bytes behind a text."""
    place = content.find(behind) + len(behind) + 20
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
