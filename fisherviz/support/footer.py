"""What the footer of a Parquet file says of its columns' sizes, read without pyarrow.

pyarrow ends the whole process where it is asked for a column of a damaged or hostile footer: an error of its C++ part
passes where none is caught. The footer is one structure of Thrift's compact protocol: fields of a number and a type,
integers of 7 bits a byte, each after another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

MARK = b"PAR1"
DEPTH = 32
"""Structures and lists in one another; a Parquet file has less than ten."""
CODECS = {0: "UNCOMPRESSED", 1: "SNAPPY", 2: "GZIP", 3: "LZO", 4: "BROTLI", 5: "LZ4", 6: "ZSTD", 7: "LZ4_RAW"}


class Part(NamedTuple):
    """A column within a group of rows."""

    compression: str
    compressed: int
    uncompressed: int


def parts(content: bytes) -> list[Part]:
    """The columns of all groups of rows.

    Args:
        content: of the file.

    Raises:
        ValueError: it is no Parquet file, or its footer is damaged.
    """
    length = int.from_bytes(content[-8:-4], "little")
    if content[:4] != MARK or content[-4:] != MARK or not 0 < length <= len(content) - 12:
        raise ValueError("it is no Parquet file")
    try:
        facts = _Reader(content[-8 - length : -8]).structure(DEPTH)
        found = [column[3] for group in facts[4] for column in group[1]]
        return [Part(CODECS.get(one[4], f"codec {one[4]}"), _size(one[7]), _size(one[6])) for one in found]
    except (LookupError, TypeError) as error:
        raise ValueError("its footer is damaged") from error


def _size(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError("its footer is damaged")
    return value


class _Reader:
    """Values one after another.

    Args:
        content: of the footer.
    """

    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def byte(self) -> int:
        """The next one."""
        self.at += 1
        return self.content[self.at - 1]

    def count(self) -> int:
        """An unsigned integer of any length."""
        value = shift = 0
        while (byte := self.byte()) & 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
            if shift > 63:
                raise ValueError("its footer is damaged")
        return value | byte << shift

    def signed(self) -> int:
        """An integer whose sign is its lowest bit."""
        value = self.count()
        return value >> 1 ^ -(value & 1)

    def passed(self, length: int) -> None:
        """What is not read."""
        self.at += length
        if self.at > len(self.content):
            raise ValueError("its footer is damaged")

    def structure(self, depth: int) -> dict[int, Any]:
        """Fields by number; of two with one number the last."""
        found: dict[int, Any] = {}
        number = 0
        while head := self.byte():
            number = number + (head >> 4) if head >> 4 else self.signed()
            kind = head & 15
            found[number] = kind == 1 if kind in (1, 2) else self.value(kind, depth)
        return found

    def value(self, kind: int, depth: int) -> Any:
        """A value of a type; of texts, fractions and dictionaries None."""
        read: dict[int, Callable[[], Any]] = {
            1: self.byte, 2: self.byte, 3: self.byte, 4: self.signed, 5: self.signed, 6: self.signed,
            7: lambda: self.passed(8), 8: lambda: self.passed(self.count()), 9: lambda: self.several(depth),
            10: lambda: self.several(depth), 12: lambda: self.structure(depth - 1),
        }  # fmt: skip
        if kind not in read or not depth:  # dictionaries among them, which no Parquet footer has
            raise ValueError("its footer is damaged")
        return read[kind]()

    def several(self, depth: int) -> list[Any]:
        """A list."""
        head = self.byte()
        length = self.count() if head >> 4 == 15 else head >> 4
        if length > len(self.content):  # each takes a byte at least
            raise ValueError("its footer is damaged")
        return [self.value(head & 15, depth - 1) for _ in range(length)]
