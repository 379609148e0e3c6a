"""Texts that carry a checksum of themselves, so that a byte that was flipped or lost is noticed when they are read.

JSON ends in a key `seal`, other texts in a comment of that name; whoever reads them with something else passes over it.
A text without one, as older releases wrote it, is taken as it is, unless its end looks like a seal that was damaged.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from fisherviz.support.plain import from_json

LENGTH = 16
"""Hexadecimal digits of a checksum: enough against damage; it is no signature."""
KEY = "seal"
_DIGITS = f"[0-9a-f]{{{LENGTH}}}"
_JSON = re.compile(rf'(.*),(\s*)"{KEY}": "({_DIGITS})"\s*\}}\s*', re.DOTALL)
_LIKE_JSON = re.compile(rf'"[^"]*":\s*"{_DIGITS}"\s*\}}\s*$')
_HEAD = "# The last line is a checksum of the others.\n"
_COMMENT = re.compile(rf"({re.escape(_HEAD)}.*)# {KEY}: ({_DIGITS})\n", re.DOTALL)
_LIKE_COMMENT = re.compile(rf"{re.escape(_HEAD)}|.*{_DIGITS}\s*$", re.DOTALL)


def sealed_json(value: Mapping[str, Any], indent: int | None = None, sort_keys: bool = False) -> str:
    """A dictionary as JSON that ends in its checksum.

    Args:
        value: of whatever JSON holds, without a key "seal"; not empty.
        indent: as for `json.dumps`.
        sort_keys: likewise.

    Raises:
        ValueError: a number in it is none.
    """
    text = json.dumps(value, indent=indent, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False)
    # a path whose bytes are no text has halves of surrogate pairs, which JSON writes as escapes
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    body = text[:-1].rstrip("\n")
    gap, end = (" ", "}") if indent is None else ("\n" + " " * indent, "\n}")
    return f'{body},{gap}"{KEY}": "{_digest(body)}"{end}'


def opened_json(text: str) -> Any:
    """What `sealed_json` made its argument of, or any JSON without a seal.

    Args:
        text: of the file, or of one line of it.

    Raises:
        ValueError: it is no JSON, or a byte of it is another.
    """
    found = _JSON.fullmatch(text)
    if found is None:
        if _LIKE_JSON.search(text):
            raise ValueError("its checksum is damaged")
        value = from_json(text)
        if isinstance(value, dict) and KEY in value:
            raise ValueError("its checksum is damaged")
        return value
    if _digest(found[1]) != found[3]:
        raise ValueError("its checksum is another")
    value = from_json(text)
    del value[KEY]
    return value


def sealed_text(text: str) -> str:
    """Lines with their checksum as a comment below, and a comment above that says so, as YAML has them.

    Args:
        text: whole lines.
    """
    body = _HEAD + text
    return f"{body}# {KEY}: {_digest(body)}\n"


def opened_text(text: str) -> str:
    """What `sealed_text` was given, or lines without a seal.

    Args:
        text: of the file.

    Raises:
        ValueError: a byte of it is another.
    """
    found = _COMMENT.fullmatch(text)
    if found is None:
        if _HEAD.startswith(text) or _LIKE_COMMENT.match(text):
            raise ValueError("its checksum is damaged")
        return text
    if _digest(found[1]) != found[2]:
        raise ValueError("its checksum is another")
    return found[1].removeprefix(_HEAD)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]
