"""Files of tensors that somebody else made: read by torch, which runs no code of theirs, once they have been looked at.

torch's own reader of weights refuses every class that it does not know, but among those that it knows are some that
take as much memory as they are told to, and it unfolds compressed archives. Files of weights need neither.
"""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fisherviz.support.errors import refusing

_STORAGE = re.compile(r"(torch|torch\.storage|torch\.cuda) [A-Z][a-zA-Z0-9]*Storage")
_TYPE = re.compile(r"torch (bool|(float|bfloat|int|uint|complex)[0-9]+)")
_KNOWN = frozenset(
    "collections " + name for name in ("OrderedDict", "Counter")
) | frozenset(
    {"__builtin__ set", "builtins set", "torch Size", "torch device", "torch.nn.parameter Parameter"}
) | frozenset(
    f"torch._utils {name}"
    for name in (
        "_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_parameter_with_state",
        "_rebuild_sparse_tensor",
    )
) | {"torch.serialization _get_layout"}  # fmt: skip
"""Names that pickles of weights and of trainers' checkpoints hold, none of which takes memory by a number's value."""
_OTHERS = ("torch.storage UntypedStorage", "torch UntypedStorage")
_SIZES = {
    "ComplexDoubleStorage": 16, "ComplexFloatStorage": 8, "DoubleStorage": 8, "LongStorage": 8, "FloatStorage": 4,
    "IntStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "ShortStorage": 2,
}  # fmt: skip
"""Bytes of a number; 1 in all others."""
PROTOCOLS = (2, 3)
"""Of pickles that torch reads as weights; 2 is its own."""
_UNUSED = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "POP", "POP_MARK", "DUP"}
"""Operations that `torch.save` does not use: other ways to name a class, and what takes back what was said."""
_KEPT = 5
"""Pickles at the beginning of a file of releases before 1.6: sign, version, machine, content, names of the storages."""
_ZIP = b"PK\x03\x04"


def tensors(content: bytes | Path) -> Any:
    """What `torch.save` wrote of tensors, numbers, texts, and lists and dictionaries of them.

    Args:
        content: of the file, or its path.

    Returns:
        The same, on the CPU.

    Raises:
        ValueError: it is something else, is damaged, holds classes that no weights need, or claims more than it has.
    """
    with refusing():
        if isinstance(content, Path):
            with open(content, "rb") as stream:
                _look(stream)
        else:
            _look(io.BytesIO(content))
        return torch.load(
            content if isinstance(content, Path) else io.BytesIO(content), map_location="cpu", weights_only=True
        )


def _look(stream: BinaryIO) -> None:
    """Refuse what is no file of weights before anything of it is made."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    zipped = stream.read(len(_ZIP)) == _ZIP
    stream.seek(0)
    if not zipped:
        for _ in range(_KEPT):
            _look_at(stream, size, {})
        return
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if len(set(names)) < len(names):
            raise ValueError("two of its entries have one name")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("its entries are compressed, which torch.save does not do")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("its entries claim more bytes than it has")
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it holds no pickle of its own, or several")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}constants.pkl" in names:
            raise ValueError("it is a program of torchscript")
        sizes = {entry.filename.removeprefix(f"{folder}data/"): entry.file_size for entry in entries}
        _look_at(io.BytesIO(archive.read(pickles[0])), size, sizes)


def _look_at(stream: Any, size: int, sizes: dict[str, int]) -> None:
    """One pickle: its classes are those of weights, and no storage is larger than its place in the file."""
    last: list[Any] = []
    memo: dict[Any, Any] = {}
    for name, argument, value in _constants(stream, memo):
        if name in _UNUSED:
            raise ValueError(f"its pickle uses {name}, which torch.save does not")
        if name == "PROTO" and argument not in PROTOCOLS:
            raise ValueError(f"its pickle is of the protocol {argument}, which torch does not read")
        if name == "GLOBAL" and not _allowed(str(argument)):
            raise ValueError(f"it holds {str(argument).replace(' ', '.')!r}, which weights have no use for")
        if name == "MARK":
            last = []
        elif name == "BINPERSID":
            _check_storage(last, size, sizes)
        elif value is not None:
            last.append(value)


def _constants(stream: Any, memo: dict[Any, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Each operation of a pickle with its argument and, where it puts a constant on the stack, with that."""
    before: Any = None
    for operation, argument, _ in pickletools.genops(stream):
        name = operation.name
        if name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = before
            continue
        if name == "MEMOIZE":
            memo[len(memo)] = before
            continue
        if name in ("BINGET", "LONG_BINGET", "GET"):
            value = memo.get(argument)
        elif name == "GLOBAL":
            value = f"class {argument}"
        elif name == "NONE":
            value = "none"
        else:
            value = argument
        before = value
        yield name, argument, value


def _check_storage(found: list[Any], size: int, sizes: dict[str, int]) -> None:
    """A storage's place: the word, its class, its key, where it was, its numbers."""
    if len(found) < 5 or found[0] != "storage" or not isinstance(found[4], int) or isinstance(found[4], bool):
        raise ValueError("it names a storage in another way than torch.save does")
    kind, key, count = str(found[1]).rpartition(".")[2].split(" ")[-1], str(found[2]), found[4]
    held = sizes.get(key, size)
    if count < 0 or count * _SIZES.get(kind, 1) > held:
        raise ValueError(f"a tensor of it claims {count:,} numbers where {held:,} bytes are")


def _allowed(name: str) -> bool:
    return name not in _OTHERS and (
        name in _KNOWN or _STORAGE.fullmatch(name) is not None or _TYPE.fullmatch(name) is not None
    )
