"""Arrays of numpy and tables of Parquet."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.trust.hostile_files.case import CANARY, HUGE, TOUCH, Calls, Case, beside, flipped, holding, swollen
from benchmarks.trust.hostile_files.torch_files import (
    archive,
)


def array_files() -> Iterator[Case]:
    """arrays.npz of a comparison and the archive of the faces."""

    def shaped(shape: str, descr: str = "'<f4'") -> str:
        return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}"

    objects = io.BytesIO()
    np.save(objects, np.array([Calls(exec, TOUCH)], dtype=object), allow_pickle=True)
    members = {
        "an array of objects": objects.getvalue(),
        "2^40 numbers": _npy(shaped("(1099511627776,)"), bytes(64)),
        "sides whose product overflows": _npy(shaped("(4294967296, 4294967296)"), bytes(64)),
        "sides whose product is 0 in 64 bits": _npy(shaped("(4294967296, 4294967296, 0)"), b""),
        "a negative side": _npy(shaped("(-4,)"), bytes(16)),
        "two negative sides": _npy(shaped("(-2, -2)"), bytes(16)),
        "a side in words": _npy(shaped("('a',)"), bytes(16)),
        "fewer bytes than numbers": _npy(shaped("(100,)"), bytes(16)),
        "more bytes than numbers": _npy(shaped("(2,)"), bytes(16)),
        "a type of Python's": _npy(shaped("(1,)", "'|O'"), pickle.dumps(Calls(exec, TOUCH))),
        "a structured type": _npy(shaped("(1,)", "[('a', '|O')]"), bytes(8)),
        "words": _npy(shaped("(2,)", "'<U4'"), bytes(32)),
        "dates": _npy(shaped("(2,)", "'<M8[s]'"), bytes(16)),
        "a header that is code": _npy("__import__('os').system('touch executed')"),
        "a header of a million brackets": _npy("(" * 60_000),
        "a header of 4 GB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
        "a version from the future": _npy(shaped("(4,)"), bytes(16), (9, 0)),
        "no array": b"hello",
        "nothing": b"",
    }
    for name, member in members.items():
        content = archive({"heatmap/exact.npy": member}, zipfile.ZIP_DEFLATED)
        yield Case("numpy arrays", name, ("comparison", "against"), beside("arrays.npz", content, signed=True))
        faces = archive({"faces.npy": member, "subject.npy": member}, zipfile.ZIP_DEFLATED)
        yield Case("numpy arrays", f"{name} as faces", ("data faces",), holding("data/olivetti_faces.npz", faces))
    flat = _npy(shaped(f"({HUGE // 4},)"), bytes(HUGE))
    bombs: dict[str, Callable[[], bytes]] = {
        "zeros": lambda: archive({"a.npy": flat}, zipfile.ZIP_DEFLATED),
        "two arrays of one name": lambda: _twice(_npy(shaped("(4,)"), bytes(16))),
        "entries that claim more than there is": lambda: swollen(archive({"a.npy": _npy(shaped("(4,)"), bytes(16))})),
        "a wrong sum": lambda: flipped(archive({"a.npy": _npy(shaped("(4,)"), bytes(16))}), b"\x93NUMPY"),
        "no archive": lambda: b"hello",
        "an array alone": lambda: _npy(shaped("(4,)"), bytes(16)),
    }
    for name, made in bombs.items():
        yield Case("archives", f"npz: {name}", ("comparison",), beside("arrays.npz", made, signed=True))


def _npy(header: str, data: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    text = header.encode("latin1") + b"\n"
    size = struct.pack("<H" if version == (1, 0) else "<I", len(text) % 2 ** (16 if version == (1, 0) else 32))
    return b"\x93NUMPY" + bytes(version) + size + text + data


def _twice(member: bytes) -> bytes:
    import warnings

    content = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(content, "w") as made:
        warnings.simplefilter("ignore")
        made.writestr("a.npy", member)
        made.writestr("a.npy", member)
    return content.getvalue()


def parquet_files() -> Iterator[Case]:
    """comparison.parquet."""
    for name, made in _tables().items():
        yield Case("Parquet", name, ("comparison", "against"), beside("comparison.parquet", made, signed=True))


def _tables() -> dict[str, Callable[[], bytes]]:
    import pyarrow as pa
    from pyarrow import parquet

    words = {name: pa.array(["all"]) for name in ("method", "row", "col", "metric")}
    good = pa.table({**words, "value": [1.0], "stderr": [0.0]})

    def written(table: pa.Table, **options: Any) -> Callable[[], bytes]:
        def write() -> bytes:
            stream = io.BytesIO()
            parquet.write_table(table, stream, **options)
            return stream.getvalue()

        return write

    def said(**metadata: str | bytes) -> pa.Table:
        return good.replace_schema_metadata(metadata)

    evil = pickle.dumps(Calls(exec, TOUCH), 0).decode("latin1")
    index = {"index_columns": [{"kind": "range", "name": None, "start": 0, "stop": 2**60, "step": 1}], "columns": []}
    columns = {"index_columns": [], "columns": [{"name": "value", "field_name": "value", "pandas_type": evil,
               "numpy_type": f"__import__('os').system('touch {CANARY}')", "metadata": {"pickled": evil}}]}  # fmt: skip
    whole = written(good)()
    long = pa.table({**words, "method": ["x" * 2**20], "value": [1.0], "stderr": [0.0]})
    twice = pa.Table.from_arrays([*good.columns, good.column(0)], [*good.column_names, "method"])

    def many() -> bytes:
        word = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2**20, np.int8)), ["a"])
        numbers = dict.fromkeys(("value", "stderr"), np.zeros(2**20))
        table = pa.table({**dict.fromkeys(words, word), **numbers})
        stream = io.BytesIO()
        with parquet.ParquetWriter(stream, table.schema) as writer:
            for _ in range(24):
                writer.write_table(table)
        return stream.getvalue()

    found: dict[str, Callable[[], bytes]] = {
        "many rows in few bytes": many,
        "a word of a megabyte in 200 rows": lambda: written(pa.concat_tables([long] * 200))(),
        "compression by zstd": written(good, compression="zstd"),
        "compression by gzip": written(good, compression="gzip"),
        "words as bytes": written(good.set_column(0, "method", pa.array([b"\xff\xfe"]))),
        "words as numbers": written(good.set_column(0, "method", pa.array([1]))),
        "words as lists": written(good.set_column(0, "method", pa.array([["a"]]))),
        "words that are missing": written(good.set_column(0, "method", pa.array([None], pa.string()))),
        "numbers as words": written(good.set_column(4, "value", pa.array(["1"]))),
        "numbers that are NaN": written(good.set_column(4, "value", pa.array([float("nan")]))),
        "numbers that are missing": written(good.set_column(4, "value", pa.array([None], pa.float64()))),
        "no columns": written(pa.table({"x": [1]})),
        "a column twice": written(twice),
        "no table": lambda: b"hello",
        "nothing": lambda: b"",
        "a footer of 2 GiB": lambda: whole[:-8] + struct.pack("<I", 2**31 - 1) + b"PAR1",
        "a footer of no bytes": lambda: whole[:-8] + struct.pack("<I", 0) + b"PAR1",
        "a pickle": lambda: pickle.dumps(Calls(exec, TOUCH)),
    }
    for share in (0.1, 0.5, 0.9):
        found[f"cut at {share:.0%}"] = lambda share=share: whole[: int(share * len(whole))]
    found |= {
        f"harmless: {name}": written(table)
        for name, table in {
            "pandas' metadata with a pickle": said(pandas=json.dumps(columns)),
            "pandas' metadata with 2^60 rows": said(pandas=json.dumps(index)),
            "pandas' metadata that are no JSON": said(pandas="{"),
            "pandas' metadata 10,000 deep": said(pandas="[" * 10_000 + "]" * 10_000),
            "attributes of pandas": said(PANDAS_ATTRS=evil),
        }.items()
    }
    return found
