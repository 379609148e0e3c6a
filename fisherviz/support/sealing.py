"""States of tensors as bytes with a checksum inside; opening them runs no code."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from fisherviz.support.pickles import tensors

EMPTY = b"\0\0"
"""Length of the comment at the end of a ZIP archive that has none."""


def seal(state: dict[str, Any]) -> bytes:
    """A state as `torch.save` writes it, with its checksum as the archive's comment, where every reader passes over it.

    Args:
        state: tensors, numbers, texts, and lists and dictionaries of them.

    Returns:
        The file's content.
    """
    buffer = io.BytesIO()
    torch.save({"sealed": True, **state}, buffer)
    return _sealed(buffer.getvalue())


def unseal(content: bytes) -> dict[str, Any]:
    """What `seal` made its argument of; a state without a seal, as older releases wrote it, is taken as it is.

    Args:
        content: of the file.

    Raises:
        ValueError: a byte is another, or it is no archive of tensors.
    """
    state = tensors(content)
    if not isinstance(state, dict):
        raise ValueError("it is no state")
    if state.get("sealed") and content != _sealed(_opened(content)):
        raise ValueError("its checksum is another")
    return state


def read_sealed(path: Path) -> dict[str, Any]:
    """The state in a file that `seal` filled.

    Args:
        path: the file.

    Raises:
        ValueError: it is damaged, or holds something else.
    """
    content = path.read_bytes()
    try:
        return unseal(content)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: it is damaged or no saved state ({error}).") from error


def _sealed(archive: bytes) -> bytes:
    digest = hashlib.sha256(archive).hexdigest().encode()
    return archive[: -len(EMPTY)] + len(digest).to_bytes(len(EMPTY), "little") + digest


def _opened(sealed: bytes) -> bytes:
    return sealed[: -len(EMPTY) - 2 * hashlib.sha256().digest_size] + EMPTY
