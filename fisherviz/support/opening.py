"""Files that somebody else made, opened without trusting them: arrays, tables, compressed bytes.

Nothing in them is run, and what they say of their sizes is held against the bytes that they have before memory is
taken: a file may unfold to `ROOM` bytes, or to `RATIO` times its own size where that is more. What is refused is a
ValueError that says why; whoever opens a file adds which, and what to do. `pickles` opens tensors, `plain` texts.
"""

from __future__ import annotations

import gzip
import io
import lzma
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fisherviz.support.errors import refusing

ROOM = 2**26
RATIO = 100
"""Above what matrices with many equal entries compress to, below what bombs do (up to 1,032 for one layer of gzip)."""
UNPACKED = 2**27
"""Bytes that a compressed file of a data set may have without its compression; MNIST's largest takes 47 million."""
DICTIONARY = 2**27
"""Bytes that an xz file may make its reader hold."""
HEADER = 10_000
"""Characters of an array's header."""


def most(size: int) -> int:
    """Bytes that a file of so many may unfold to."""
    return max(ROOM, RATIO * size)


def arrays(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of an .npz file: numbers alone, of which none is larger than its place in the file.

    Args:
        content: of the file.

    Returns:
        Arrays by name.

    Raises:
        ValueError: it is something else, is damaged, or would unfold to more than its size justifies.
    """
    with refusing(), zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        names = [entry.filename.removesuffix(".npy") for entry in entries]
        if len(set(names)) < len(names):
            raise ValueError("two of its arrays have one name")
        if (total := sum(entry.file_size for entry in entries)) > most(len(content)):
            raise ValueError(f"its {len(content):,} bytes would unfold to {total:,}")
        return {name: _array(archive.read(entry)) for name, entry in zip(names, entries, strict=True)}


def _array(content: bytes) -> np.ndarray:
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an array is in version {version} of its format")
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(stream, max_header_size=HEADER)
    if dtype.kind not in "biuf":
        raise ValueError(f"an array holds {dtype}, not numbers")
    size = dtype.itemsize
    for side in shape:  # numpy would multiply in 64 bits
        size *= side
    if min(shape, default=0) < 0 or size != len(content) - stream.tell():
        raise ValueError(f"an array of the shape {shape} does not fit its {len(content) - stream.tell():,} bytes")
    flat = np.frombuffer(stream.read(), dtype=dtype)
    return (flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)).copy()


def table(content: bytes, words: Sequence[str], numbers: Sequence[str]) -> pd.DataFrame:
    """A Parquet file's columns of words and of numbers; whatever else its metadata say is left unread.

    Args:
        content: of the file.
        words: names of columns of text.
        numbers: names of columns of floating-point numbers; those that are not there are left out.

    Returns:
        The table, with a plain index.

    Raises:
        ValueError: it is something else, is damaged, or would unfold to more than its size justifies.
    """
    with refusing():
        import pyarrow as pa
        from pyarrow import parquet

        # words stay where they are once, so that a row takes a few bytes whatever its words are
        file = parquet.ParquetFile(io.BytesIO(content), read_dictionary=list(words))
        facts, room = file.metadata, most(len(content))
        parts = [
            facts.row_group(group).column(place)
            for group in range(facts.num_row_groups)
            for place in range(facts.num_columns)
        ]
        for part in parts:
            if part.compression not in ("SNAPPY", "UNCOMPRESSED"):
                raise ValueError(f"a column is compressed by {part.compression}, which fisherviz does not write")
        if sum(part.total_compressed_size for part in parts) > len(content):
            raise ValueError("its columns lie in the same bytes")
        columns = [*words, *(name for name in numbers if name in file.schema_arrow.names)]
        total = max(8 * len(columns) * facts.num_rows, sum(part.total_uncompressed_size for part in parts))
        if total > room:
            raise ValueError(f"its {len(content):,} bytes would unfold to {total:,}")
        found = file.read(columns=columns, use_threads=False, use_pandas_metadata=False)
        if found.column_names != columns or found.num_rows != facts.num_rows:
            raise ValueError(f"it does not have the columns {', '.join(columns)}")
        made = {}
        for name in columns:
            column = found.column(name).combine_chunks()
            if name in numbers:
                if not pa.types.is_floating(column.type):
                    raise ValueError(f"its column {name!r} holds {column.type}, not numbers")
                made[name] = column.to_numpy(zero_copy_only=False)
            else:
                made[name] = _texts(column, name, room)
        return pd.DataFrame(made)


def _texts(column: Any, name: str, room: int) -> list[str]:
    import pyarrow as pa

    parts = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    found: list[str] = []
    for part in parts:
        if not len(part):  # older pandas writes the words of an empty table as a column of no type
            continue
        if not pa.types.is_dictionary(part.type) or not pa.types.is_string(part.type.value_type) or part.null_count:
            raise ValueError(f"its column {name!r} holds {part.type}, not words")
        each = part.dictionary.to_pylist()
        found += [each[place] for place in part.indices.to_pylist()]
    if (total := sum(map(len, found))) > room:
        raise ValueError(f"its column {name!r} would unfold to {total:,} letters")
    return found


def decompressed(path: Path) -> bytes:
    """What a gzip or xz file holds.

    Args:
        path: the file; its ending tells which it is.

    Raises:
        ValueError: it cannot be read, is damaged, or holds more than `UNPACKED` bytes.
    """
    with refusing():
        if path.suffix == ".gz":
            with gzip.open(path) as stream:  # whose sum is compared at its end
                content = stream.read(UNPACKED + 1)
        else:
            reader = lzma.LZMADecompressor(lzma.FORMAT_XZ, DICTIONARY)
            content = reader.decompress(path.read_bytes(), UNPACKED + 1)
            if len(content) <= UNPACKED and (not reader.eof or reader.unused_data):
                raise ValueError("it does not end where its content does")
        if len(content) > UNPACKED:
            raise ValueError(f"it unfolds to more than {UNPACKED:,} bytes")
        return content
