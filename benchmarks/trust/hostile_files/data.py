"""Data sets, and storages of sweeps."""

from __future__ import annotations

import gzip
import lzma
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.trust.hostile_files.case import HUGE, TOUCH, Calls, Case, flipped, holding
from benchmarks.trust.hostile_files.torch_files import (
    archive,
    tar,
)


def data_files() -> Iterator[Case]:
    """Files of data sets."""
    idx = bytes([0, 0, 8, 3]) + struct.pack(">III", 2, 28, 28) + bytes(2 * 784)
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")

    def mnist(content: Callable[[], bytes]) -> Callable[[Path], Path]:
        def write(folder: Path) -> Path:
            for name in names:
                (folder / "data/mnist").mkdir(parents=True, exist_ok=True)
                (folder / f"data/mnist/{name}-ubyte.gz").write_bytes(content())
            return folder / f"data/mnist/{names[0]}-ubyte.gz"

        return write

    def one(name: str, content: Callable[[], bytes]) -> Callable[[Path], Path]:
        return holding(f"data/{name}", content)

    packed = gzip.compress(idx, mtime=0)
    shape = bytes([0, 0, 8, 3]) + struct.pack(">III", 2**31, 2**31, 4)
    gz = {
        "a bomb": lambda: gzip.compress(bytes(HUGE), 6),
        "no gzip": lambda: b"hello",
        "nothing": lambda: b"",
        "a wrong sum": lambda: packed[:-8] + bytes(4) + packed[-4:],
        "a wrong length": lambda: packed[:-4] + b"\xff\xff\xff\x7f",
        "cut in the middle": lambda: packed[: len(packed) // 2],
        "bytes behind the end": lambda: packed + b"hello",
        "an archive instead": lambda: archive({"../../evil": b"x"}),
        "a tar with links": lambda: gzip.compress(tar({"../../evil": b"x"}, {"link": "/etc/passwd"})),
        "a pickle": lambda: gzip.compress(pickle.dumps(Calls(exec, TOUCH))),
    }
    for name, made in gz.items():
        for which, write in (("mnist", mnist(made)), ("weather", one("weatherHistory.csv.gz", made))):
            yield Case("data sets", f"{which}: {name}", (f"data {which}", f"check {which}"), write)
    for name, content in {
        "sides whose product overflows": gzip.compress(shape + bytes(16)),
        "255 dimensions": gzip.compress(bytes([0, 0, 8, 255]) + bytes(2000)),
        "floats": gzip.compress(bytes([0, 0, 13, 3]) + idx[4:]),
        "one image for all four files": packed,
        "blanked": gzip.compress(bytes(len(idx))),
    }.items():
        yield Case("data sets", f"mnist: {name}", ("data mnist", "check mnist"), mnist(lambda content=content: content))
    yield Case("data sets", "mnist: images that are all black", ("data mnist", "check mnist"), _black)
    yield Case("data sets", "mnist: labels of no class", ("data mnist", "check mnist"), _mislabelled)
    xz = {
        "a bomb": lambda: _xz(bytes(HUGE)),
        "no xz": lambda: b"hello",
        "a dictionary of 1.5 GiB": lambda: _xz(bytes(3073), 1536 * 2**20),
        "cut in the middle": lambda: _xz(bytes(3073 * 5))[:-20],
        "a wrong sum": lambda: flipped(_xz(os.urandom(3073)), b"\xfd7zXZ"),
        "bytes behind the end": lambda: _xz(bytes(3073)) + b"hello",
        "records of another length": lambda: _xz(bytes(3074)),
        "labels of no class": lambda: _xz(b"\xff" * 3073),
    }
    for name, made in xz.items():
        for file in ("train_first4000", "test_first1000"):

            def both(folder: Path, made: Callable[[], bytes] = made, file: str = file) -> Path:
                for each in ("train_first4000", "test_first1000"):
                    content = made() if each == file else _xz(bytes(range(1)) + os.urandom(3072))
                    holding(f"data/cifar10-subset/{each}.bin.xz", content)(folder)
                return folder / f"data/cifar10-subset/{file}.bin.xz"

            yield Case("data sets", f"cifar10-subset ({file}): {name}", ("data cifar10-subset",), both)
    tables = {
        "ecoli.csv.gz": ("ecoli", "mcg,gvh,lip,chg,aac,alm1,alm2,class\n", "1,1,1,1,1,1,1,cp\n"),
        "kc_house_data.csv.gz": ("house", "id,date,price\n", "1,20140501,1\n"),
    }
    for file, (which, head, row) in tables.items():
        for name, text in {
            "a cell of code": head + row.replace("1", "=cmd()", 1),
            "a missing number": head + row.replace("1", "", 1) * 2,
            "an infinite number": head + row.replace("1", "inf", 1) * 2,
            "no rows": head,
            "a class that is none": head + row.replace("cp", "\x1b[31mcp"),
            "a million columns": ",".join("c" for _ in range(100_000)) + "\n" + row,
            "a quote that never ends": head + '"' + "x" * 2**20,
            "bytes that are no text": head + "\udcff",
        }.items():
            content = gzip.compress(text.encode("utf-8", "surrogateescape"))
            yield Case("data sets", f"{which}: {name}", (f"data {which}",), one(file, lambda c=content: c))


def _idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">I", side) for side in array.shape)
    return gzip.compress(head + array.astype(np.uint8).tobytes())


def _mnist(folder: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    for name, part in (("train", slice(0, 60)), ("t10k", slice(60, 80))):
        holding(f"data/mnist/{name}-images-idx3-ubyte.gz", _idx(images[part]))(folder)
        holding(f"data/mnist/{name}-labels-idx1-ubyte.gz", _idx(labels[part]))(folder)
    return folder / "data/mnist/train-images-idx3-ubyte.gz"


def _black(folder: Path) -> Path:
    return _mnist(folder, np.zeros((80, 28, 28)), np.arange(80) % 10)


def _mislabelled(folder: Path) -> Path:
    _mnist(folder, np.random.default_rng(0).integers(0, 256, (80, 28, 28)), np.full(80, 200))
    return folder / "data/mnist/train-labels-idx1-ubyte.gz"


def _xz(content: bytes, dictionary: int = 2**20) -> bytes:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**20}]
    packed = bytearray(lzma.compress(content, lzma.FORMAT_XZ, filters=filters))
    if dictionary != 2**20:  # its size is a byte of the block's header, which has a sum of its own
        place = packed.find(b"\x21\x01", 12)
        packed[place + 2] = 36 if dictionary > 2**30 else 30
        length = 4 * (packed[12] + 1)
        import zlib

        struct.pack_into("<I", packed, 12 + length - 4, zlib.crc32(bytes(packed[12 : 12 + length - 4])))
    return bytes(packed)


def storages() -> Iterator[Case]:
    """Optuna's storages."""
    import sqlite3

    def database(*statements: str) -> Callable[[Path], Path]:
        def write(folder: Path) -> Path:
            with sqlite3.connect(folder / "study.db") as made:
                for each in statements:
                    made.execute(each)
            made.close()
            return folder / "study.db"

        return write

    yield Case("storages", "no database", ("storage",), holding("study.db", b"hello" * 100))
    yield Case("storages", "a pickle", ("storage",), holding("study.db", pickle.dumps(Calls(exec, TOUCH))))
    yield Case("storages", "other tables", ("storage",), database("create table studies (x text)"))
    yield Case(
        "storages", "a version that is none", ("storage",),
        database("create table version_info (version_info_id integer primary key, schema_version integer, "
                 "library_version text)", "insert into version_info values (1, 99, 'x')"),
    )  # fmt: skip
    for url in ("nothing", "sqlite", "evil+driver://x", "mysql+pickle://x", "os://system", "sqlite:////no/such/x.db"):
        yield Case("storages", f"the address {url}", ("storage url",), holding("url", url.encode()), named="storage")
